"""The task seam: problems, how to ask them, how to score an answer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, Protocol

from pydantic import Field

from shoestring.config.settings import Settings
from shoestring.errors import ConfigError
from shoestring.model.chat import Messages
from shoestring.types import Problem, Score

SPLITS = ("train", "validation", "test")


class Task(Protocol):
    """What the rest of the program knows of a task. All three methods are pure."""

    name: str
    format: Literal["chat", "plain"]
    chat: dict[str, Any]

    def problems(self, split: str) -> Sequence[Problem]:
        """The problems of "train", "validation" or "test", always in the same order; raises `DataError`."""
        ...

    def ask(self, problem: Problem) -> Messages:
        """The chat messages, [{"role", "content"}], that put the problem to the model."""
        ...

    def score(self, problem: Problem, text: str) -> Score:
        """The score of an answer's text. Never raises, whatever the text holds."""
        ...

    def vote(self, text: str) -> str | None:
        """The answer that a text gives, in one form for equal answers (maj@k counts these); None if it gives none."""
        ...

    def solution(self, problem: Problem) -> str | None:
        """A worked answer to imitate in a supervised warm start, or None if there is none."""
        ...


class Asking(Settings):
    """The settings that all tasks share: how a problem is put to the model."""

    data: str | None = None
    """Folder or file with the data; else the environment variable SHOESTRING_DATA, else the hub."""
    prompt: str = "{question}"
    """The user's message; `{question}` stands for the problem's text."""
    system: str | None = None
    """The system message, if any."""
    format: Literal["chat", "plain"] = "chat"
    """"chat" goes through the tokenizer's chat template; "plain" is the bare text, for base models without one."""
    chat: dict[str, Any] = Field(default_factory=dict)
    """Further options for the tokenizer's chat template, such as enable_thinking = false."""

    def model_post_init(self, context: Any) -> None:
        if "{question}" not in self.prompt:
            raise ConfigError(
                f"task.prompt is {self.prompt!r}", "the problem would not be in it", "put {question} where it goes"
            )

    def ask(self, problem: Problem) -> Messages:
        system = [{"role": "system", "content": self.system}] if self.system else []
        return [*system, {"role": "user", "content": self.prompt.replace("{question}", problem.question)}]


def parts(task: Task) -> tuple[Task, ...]:
    """The tasks that a mixture is made of, the one that judges first; any other task by itself."""
    return getattr(task, "of", (task,))


def has_answers(task: Task) -> bool:
    """Whether a task of one part has anything to compare an answer with."""
    return getattr(task, "check", "") != "none"


def check_split(split: str) -> None:
    if split not in SPLITS:
        raise ConfigError(f'split is "{split}"', "there is no such split", "use one of: " + ", ".join(SPLITS))
