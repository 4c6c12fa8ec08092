"""Whether the problems that judge a model were also there to train it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from shoestring.errors import ShoestringError
from shoestring.tasks.base import Task, parts
from shoestring.tasks.rows import Checked
from shoestring.types import Problem


@dataclass(frozen=True)
class Overlap:
    """How many of `problems` have the text of a training problem, and the first of them."""

    problems: int
    shared: int
    sample: str | None

    def describe(self) -> str:
        """
        >>> Overlap(300, 2, "q-7: What is 2*3?").describe()
        '2 of 300 problems with the text of a training problem, such as q-7: What is 2*3?'
        """
        sample = f", such as {self.sample}" if self.sample else ""
        return f"{self.shared} of {self.problems} problems with the text of a training problem{sample}"


def overlap(problems: Sequence[Problem], trained_on: Task) -> Overlap | None:
    """The problems whose text, but for case and space, is in the training split of `trained_on`.

    None where that split is made, not read (no text of such a task is in two splits), or is not there.
    """
    read = [part for part in parts(trained_on) if isinstance(part, Checked)]
    if not read:
        return None
    try:
        seen = {_text(problem) for part in read for problem in part.problems("train")}
    except ShoestringError:
        return None
    shared = [problem for problem in problems if _text(problem) in seen]
    sample = f"{shared[0].id}: {' '.join(shared[0].question.split())}" if shared else None
    return Overlap(len(problems), len(shared), sample)


def _text(problem: Problem) -> str:
    messages = problem.meta.get("messages") or [{"content": problem.question}]
    return " ".join(" ".join(message["content"] for message in messages).split()).casefold()
