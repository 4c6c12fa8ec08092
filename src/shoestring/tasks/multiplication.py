"""Multi-digit multiplication, the second task of arXiv 2504.20834: problems without end, and none shared between
splits."""

from __future__ import annotations

from collections.abc import Sequence
from random import Random
from typing import Literal

from pydantic import Field, model_validator

from shoestring import answers
from shoestring.errors import ConfigError
from shoestring.hashing import stable_hash
from shoestring.tasks.base import Asking, check_split
from shoestring.tasks.generated import Stream, distinct
from shoestring.types import Problem, Score

_FEWEST_PAIRS = 1_000


class Multiplication(Asking):
    """Products of two whole numbers of `digits[0]` and `digits[1]` digits.

    A problem's split is a hash of its two factors in ascending order and of nothing else, about 90 % train, 5 %
    validation and 5 % test; so 12*34 and 34*12 are never on two sides, whatever the seeds. Item i of a split is drawn
    by a hash of (seed, split, i). "train" repeats itself as any random stream does; the problems of the other two are
    distinct.
    """

    name: Literal["multiplication"] = "multiplication"
    digits: tuple[int, int] = (2, 2)
    """Digits of the first and of the second factor."""
    seed: int = 0
    """Which stream of problems is drawn. No seed moves a problem to another split."""
    num_train: int = Field(default=100_000, ge=1)
    """Length of the train split."""
    num_held_out: int = Field(default=300, ge=1)
    """Number of distinct problems in "validation" and in "test" (fewer where there are no more)."""

    @model_validator(mode="after")
    def _enough_pairs(self) -> Multiplication:
        if min(self.digits) < 1:
            raise ConfigError(f"task.digits is {list(self.digits)}", "a factor has at least one digit", "write [2, 2]")
        pairs = 9 * 10 ** (self.digits[0] - 1) * 9 * 10 ** (self.digits[1] - 1)
        if pairs < _FEWEST_PAIRS:
            raise ConfigError(
                f"task.digits is {list(self.digits)}",
                f"there are only {pairs} such problems, too few to hold some back for a test",
                f"choose widths with at least {_FEWEST_PAIRS:,} pairs, such as [2, 2] or [1, 3]",
            )
        return self

    def problems(self, split: str) -> Sequence[Problem]:
        check_split(split)
        if split == "train":
            return Stream(self)
        return distinct(self, split)

    def draw(self, split: str, index: int) -> Problem:
        """Item `index` of the endless stream of `split`: the first pair of its own random numbers that belongs
        there."""
        random = Random(stable_hash("multiplication", self.digits, self.seed, split, index))
        low_a, low_b = (10 ** (width - 1) for width in self.digits)
        while True:
            a, b = random.randrange(low_a, 10 * low_a), random.randrange(low_b, 10 * low_b)
            if split_of(a, b) == split:
                return Problem(f"multiplication-{a}x{b}", f"{a}*{b}=", str(a * b), {})

    def score(self, problem: Problem, text: str) -> Score:
        right = float(answers.is_correct(text, problem.answer))
        return Score(right, {"correct": right})

    def vote(self, text: str) -> str | None:
        return answers.extract(text)

    def solution(self, problem: Problem) -> str:
        """The product worked out: one partial product a digit of the second factor, added up as they come.

        >>> task = Multiplication()
        >>> print(task.solution(Problem("", "23*45=", "1035")))
        23*5=115
        23*40=920
        115+920=1035
        #### 1035
        """
        first, second = problem.question.rstrip("=").split("*")
        lines, total = [], None
        for place, digit in enumerate(reversed(second)):
            factor = int(digit) * 10**place
            if factor == 0:
                continue
            part = int(first) * factor
            lines.append(f"{first}*{factor}={part}")
            if total is not None:
                lines.append(f"{total}+{part}={total + part}")
            total = part if total is None else total + part
        return "\n".join([*lines, f"#### {problem.answer}"])


def split_of(a: int, b: int) -> str:
    """The split of a problem, from its sorted factors alone.

    >>> split_of(12, 34) == split_of(34, 12)
    True
    """
    place = stable_hash("multiplication", min(a, b), max(a, b)) % 100
    return "train" if place < 90 else "validation" if place < 95 else "test"
