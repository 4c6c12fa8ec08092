"""What tasks share that make their problems: a train split without end, and held-back problems that are distinct."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Protocol

from shoestring.types import Problem


class Generator(Protocol):
    """A task that makes its problems."""

    num_train: int
    num_held_out: int

    def draw(self, split: str, index: int) -> Problem:
        """Item `index` of the endless stream of `split`."""
        ...


class Stream(Sequence[Problem]):
    """The train split, drawn as it is read."""

    def __init__(self, task: Generator):
        self._task = task

    def __len__(self) -> int:
        return self._task.num_train

    def __getitem__(self, index: int) -> Problem:  # type: ignore[override]
        if not 0 <= index < len(self):
            raise IndexError(index)
        return self._task.draw("train", index)

    def __iter__(self) -> Iterator[Problem]:
        return (self[index] for index in range(len(self)))


def distinct(task: Generator, split: str) -> tuple[Problem, ...]:
    """The first `num_held_out` distinct problems of the split's stream; it gives up when draws hardly bring new
    ones."""
    found: dict[str, Problem] = {}
    index = 0
    while len(found) < task.num_held_out and index < 20 * task.num_held_out:
        problem = task.draw(split, index)
        found.setdefault(problem.id, problem)
        index += 1
    return tuple(found.values())
