"""Several tasks as one: trained on the problems of all, judged by those of the first.

More varied training problems keep a small model from learning a small data set by heart.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from shoestring.config.settings import Settings, pick
from shoestring.errors import ConfigError
from shoestring.model.chat import Messages
from shoestring.tasks.base import Task, check_split
from shoestring.types import Problem, Score

# A task that makes its problems has as many as are asked for: more than this of one part is taken for a mistake.
_MOST = 50_000


TABLE: dict[str, type[Any]] = {}
"""The tasks that a mixture may hold: the package fills it with its own table."""


def _parts(value: Any) -> tuple[Task, ...]:
    if not isinstance(value, list | tuple) or len(value) < 2:
        raise ConfigError(
            f"task.of is {value!r}",
            "a mixture is made of two tasks or more",
            'write of = ["svamp", "gsm8k"], or tables with the settings of each',
        )
    return tuple(pick(TABLE, "task.of", part) for part in value)


class Mixture(Settings):
    """Each problem is asked and scored as its own task does."""

    name: Literal["mixture"] = "mixture"
    of: Annotated[tuple[Any, ...], BeforeValidator(_parts)]
    """The tasks. Splits other than "train" are those of the first."""
    num: tuple[Annotated[int, Field(ge=1)], ...] | None = None
    """How many training problems to take of each, the first ones; default: all."""

    def model_post_init(self, context: Any) -> None:
        first = self.of[0]
        for part in self.of[1:]:
            if (part.format, part.chat) != (first.format, first.chat):
                raise ConfigError(
                    f"task.of holds {first.name} and {part.name}",
                    "they put problems to the model in different ways (format, chat)",
                    "give both the same format and chat",
                )
        if self.num is not None and len(self.num) != len(self.of):
            raise ConfigError(
                f"task.num has {len(self.num)} numbers", f"there are {len(self.of)} tasks", "write one for each"
            )

    @property
    def format(self) -> Literal["chat", "plain"]:
        return self.of[0].format

    @property
    def chat(self) -> dict[str, Any]:
        return self.of[0].chat

    def problems(self, split: str) -> Sequence[Problem]:
        check_split(split)
        if split != "train":
            return self.of[0].problems(split)
        return [problem for place in range(len(self.of)) for problem in self._of_part(place)]

    def _of_part(self, place: int) -> list[Problem]:
        part = self.of[place]
        found = part.problems("train")
        count = min(len(found), self.num[place] if self.num else len(found))
        if count > _MOST:
            raise ConfigError(
                f"task.of holds {part.name}",
                f"it has {count:,} training problems",
                "say with task.num how many to take",
            )
        first = [found[i] for i in range(count)]
        if place == 0:
            return first
        return [replace(p, id=f"{part.name}/{p.id}", meta={**p.meta, "part": place}) for p in first]

    def _owner(self, problem: Problem) -> Task:
        return self.of[problem.meta.get("part", 0)]

    def ask(self, problem: Problem) -> Messages:
        return self._owner(problem).ask(problem)

    def score(self, problem: Problem, text: str) -> Score:
        return self._owner(problem).score(problem, text)

    def vote(self, text: str) -> str | None:
        return self.of[0].vote(text)

    def solution(self, problem: Problem) -> str | None:
        return self._owner(problem).solution(problem)
