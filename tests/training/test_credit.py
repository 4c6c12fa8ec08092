"""Credit on its way into training: completions that no function scored teach nothing, and what cannot be is refused."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from tests.algorithms.test_algorithms import make_group
from tests.run.test_loop import config, varied

from shoestring import ConfigError, train
from shoestring.algorithms import ALGORITHMS
from shoestring.algorithms.base import Replay, StepGenerator
from shoestring.curricula.replay import choose
from shoestring.training.credit import credit_step
from shoestring.types import Credit, Group, Score, has_signal

TEXTS = ("abc", "abd", "ae", "abc")


def credit_of(algorithm: Any, group: Group) -> Credit:
    """The credit of a step of one group."""
    return credit_step(algorithm, [group], {}, StepGenerator.seeded(0, [0]))[0][0]


def unscored(group: Group, *places: int, value: float = 0.0) -> Group:
    scores = [
        Score(value if i in places else score.value, {"unscored": float(i in places)})
        for i, score in enumerate(group.scores)
    ]
    return replace(group, scores=tuple(scores))


def credit(name: str, group: Group) -> Credit:
    return credit_of(ALGORITHMS[name](), group)


@pytest.mark.parametrize("name", sorted(set(ALGORITHMS) - {"s-grpo"}))  # whose draws differ with the size of the group
def test_unscored_completions_are_as_if_they_were_not_there(name: str) -> None:
    """Whatever stands in for their reward; but for their share of the average, as in TRL."""
    whole = make_group(TEXTS, (1.0, 0.0, 1.0, 0.0))
    without = make_group(TEXTS[:1] + TEXTS[2:], (1.0, 1.0, 0.0))
    wanted = credit(name, without)
    for value in (0.0, 0.5, 100.0):
        found = credit(name, unscored(whole, 1, value=value))
        assert torch.equal(found.row, torch.tensor([0, 2, 3])[wanted.row])
        assert torch.equal(found.col, wanted.col)
        assert torch.equal(found.advantage, wanted.advantage)
        assert torch.equal(found.weight, wanted.weight * 0.75)
        assert 1 not in found.row.tolist()


@pytest.mark.parametrize("name", sorted(ALGORITHMS))
def test_one_scored_completion_is_compared_with_nothing(name: str) -> None:
    group = make_group(TEXTS, (1.0, 0.0, 0.0, 0.0))
    assert not has_signal(credit(name, unscored(group, 1, 2, 3, value=1.0)))
    assert not has_signal(credit(name, unscored(group, 0, 1, 2, 3)))


def test_others_that_score_alike_are_no_signal() -> None:
    """The mean of three times 0.1 is not 0.1 in floating point."""
    group = unscored(make_group(TEXTS, (0.1, 0.1, 0.1, 0.1)), 3, value=sum([0.1] * 3) / 3)
    assert not has_signal(credit("grpo", group))


def test_replay_continues_no_unscored_completion() -> None:
    replay = Replay("success", 1.0, None, "half")
    group = unscored(make_group(["abcd", "efgh", "ijkl"], (1.0, 0.0, 5.0)), 2, value=5.0)
    [prompt] = choose(replay, [group], 1, Random(0))
    assert prompt.prefix == tuple(map(ord, "ab"))


def of(at: list[int], places: list[int], **changes: Any) -> Credit:
    ones = torch.ones(len(at))
    return replace(Credit(torch.tensor(at), torch.tensor(places), ones, ones), **changes)


class Fixed:
    """An algorithm that gives what it was made with."""

    name = "mine:Fixed"
    least_completions = 2

    def __init__(self, credit: Any):
        self._credit = credit

    def credit(self, group: Group, generator: torch.Generator) -> Any:
        return self._credit


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (of([0, 2], [0, 2]), "col is 2, in completion 2, which has 2 tokens"),
        (of([0, 2], [0, -1]), "col is -1"),
        (of([0, 4], [0, 0]), "row is 4, in a group of 4 completions"),
        (of([-1], [0]), "row is -1"),
        (of([0, 1, 0], [1, 1, 1]), "row and col name a token twice"),
        (of([0, 1], [1, 1], weight=torch.ones(3)), "weight has 3 numbers, and row 2"),
        (of([0, 1], [1, 1], advantage=torch.tensor([0.0, float("nan")])), "advantage is not finite"),
        (of([0, 1], [1, 1], kl_weight=torch.tensor([0.0, float("inf")])), "kl_weight is not finite"),
        (of([0], [1], row=torch.tensor([0.0])), r"row is of torch\.float32"),
        (of([0], [1], col=[1]), r"col is \[1\]"),
        (of([0], [1], weight=torch.ones(1, 1)), r"weight is of shape \[1, 1\]"),
        (([0], [1]), "type is tuple"),
        (None, "type is NoneType"),
    ],
)
def test_credit_that_cannot_be_is_refused(given: Any, says: str) -> None:
    with pytest.raises(ConfigError, match=says) as caught:
        credit_of(Fixed(given), make_group(TEXTS, (1.0, 0.0, 0.0, 1.0)))
    assert "mine:Fixed" in caught.value.given


def test_credit_of_every_token_passes() -> None:
    given = of([0, 0, 0, 2, 2], [0, 1, 2, 0, 1])
    assert credit_of(Fixed(given), make_group(TEXTS, (1.0, 0.0, 0.0, 1.0))) is given


@pytest.mark.parametrize("fault", ["return Credit(row, col + 1, ones, ones)", "raise ValueError('not yet')"])
def test_a_mended_algorithm_finds_its_folder_free(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    source = """
import torch
from shoestring.algorithms.base import every_token
from shoestring.algorithms.grpo import GRPO
from shoestring.types import Credit

class Mine(GRPO):
    name: str

    def credit(self, group, generator):
        row, col = every_token(group)
        ones = torch.ones(len(row))
        FAULT
        return Credit(row, col, ones, ones)
"""
    monkeypatch.syspath_prepend(".")
    Path("faulty.py").write_text(source.replace("FAULT", fault))
    Path("mended.py").write_text(source.replace("FAULT", ""))
    with pytest.raises((ConfigError, ValueError)):
        train(config(algorithm="faulty:Mine", steps=1), quiet=True)
    assert not Path("run").exists()
    train(config(algorithm="mended:Mine", steps=1), quiet=True)


def test_a_run_does_not_train_on_what_was_not_scored() -> None:
    def some(completions: list[Any], **others: Any) -> list[float | None]:
        return [None if i % 4 == 1 else value for i, value in enumerate(varied(completions))]

    train(config(algorithm="t-spmo", steps=2), rewards=[some], quiet=True)
    seen = 0
    for line in Path("run/samples.jsonl").read_text().splitlines():
        sample = json.loads(line)
        if sample["parts"].get("unscored"):
            seen += 1
            assert not any(weight for _, weight in sample.get("credit", []))
    assert seen == 6
