"""Rows to score, and scores."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeVar

from shoestring.types import Problem, Score

RewardFunction = Callable[..., Any]


class Row(NamedTuple):
    """One completion to score."""

    problem: Problem
    text: str
    completion_ids: Sequence[int]


@dataclass(frozen=True)
class TrainerState:
    """What a reward function may know of the run, under the names that transformers' TrainerState gives them."""

    global_step: int = 0
    max_steps: int = 0
    epoch: float = 0.0
    num_train_epochs: int = 0
    num_input_tokens_seen: int = 0
    log_history: Sequence[Mapping[str, float]] = ()
    is_local_process_zero: bool = True
    is_world_process_zero: bool = True


@dataclass(frozen=True)
class Scored:
    """A step's scores, one a row; the means of what `log_metric` gave; the columns of `log_extra`, one value a row."""

    scores: list[Score]
    metrics: Mapping[str, float] = field(default_factory=dict)
    columns: Mapping[str, list[Any]] = field(default_factory=dict)
    timed_out: Sequence[str] = ()
    """The problems of the rows that were not scored in time, one a row."""


def joined_scored(pieces: Sequence[Scored]) -> Scored:
    """Several of a step's scores as one; a metric's mean is over their rows."""
    if len(pieces) == 1:
        return pieces[0]
    rows = [len(piece.scores) for piece in pieces]
    metrics: dict[str, float] = {}
    for name in dict.fromkeys(name for piece in pieces for name in piece.metrics):
        held = [(piece.metrics[name], num) for piece, num in zip(pieces, rows, strict=True) if name in piece.metrics]
        metrics[name] = sum(mean * num for mean, num in held) / sum(num for _, num in held)
    return Scored(
        [score for piece in pieces for score in piece.scores],
        metrics,
        _joined_columns([piece.columns for piece in pieces], rows),
        tuple(problem for piece in pieces for problem in piece.timed_out),
    )


@dataclass(frozen=True)
class Judged:
    """What the functions said of some rows, before weights: each function's rewards by its name, [rows]; the parts of
    the task's own score, [rows]; what `log_metric` gave; the columns of `log_extra` by (function, column), [rows]."""

    rewards: Mapping[str, list[float | None]]
    parts: list[dict[str, float]]
    metrics: Mapping[str, list[float]] = field(default_factory=dict)
    columns: Mapping[tuple[str, str], list[Any]] = field(default_factory=dict)


def joined_judged(pieces: Sequence[Judged]) -> Judged:
    """What was said of one row after another, as one."""
    names = dict.fromkeys(name for piece in pieces for name in piece.metrics)
    return Judged(
        {name: [reward for piece in pieces for reward in piece.rewards[name]] for name in pieces[0].rewards},
        [part for piece in pieces for part in piece.parts],
        {name: [value for piece in pieces for value in piece.metrics.get(name, [])] for name in names},
        _joined_columns([piece.columns for piece in pieces], [len(piece.parts) for piece in pieces]),
    )


K = TypeVar("K")


def _joined_columns(pieces: Sequence[Mapping[K, list[Any]]], rows: Sequence[int]) -> dict[K, list[Any]]:
    """Columns end to end, with None for the rows of a piece that lacks one."""
    names = dict.fromkeys(name for piece in pieces for name in piece)
    return {
        name: [value for piece, num in zip(pieces, rows, strict=True) for value in piece.get(name, [None] * num)]
        for name in names
    }
