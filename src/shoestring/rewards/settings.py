"""Settings of rewards, and what only Python can hand over."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, model_validator

from shoestring.config.settings import Settings, as_tuple
from shoestring.errors import ConfigError


class RewardSettings(Settings):
    """Which functions score a completion: dotted paths in TRL's form, and "task" for the task's own score."""

    functions: Annotated[tuple[str, ...], BeforeValidator(as_tuple)] = ("task",)
    weights: tuple[float, ...] | None = None
    workers: int = Field(default=0, ge=0)
    """Processes that score, each completion by itself, while others are sampled; 0 scores in the loop's own thread."""
    timeout: float | None = Field(default=None, gt=0)
    """Seconds that a completion may take to score in a worker; None waits."""
    on_timeout: Literal["stop", "zero", "unscored"] = "stop"
    """What a completion does that takes longer: stop the run, count 0, or count as its prompt's others do in the mean,
    like one that every function passes over."""

    @model_validator(mode="after")
    def _a_timeout_can_act(self) -> RewardSettings:
        if self.timeout is not None and self.workers == 0:
            raise ConfigError(
                f"rewards.timeout is {self.timeout:g} and rewards.workers 0",
                "a function that runs in the loop's own thread cannot be stopped",
                "set rewards.workers to 1 or more, or leave the timeout out",
            )
        if self.on_timeout != "stop" and self.timeout is None:
            raise ConfigError(
                f'rewards.on_timeout is "{self.on_timeout}" without rewards.timeout',
                "nothing ever takes too long",
                "set rewards.timeout, in seconds a completion",
            )
        return self

    @model_validator(mode="after")
    def _a_weight_each(self) -> RewardSettings:
        if not self.functions:
            raise ConfigError("rewards.functions is empty", "nothing would be scored", 'write ["task"] or your own')
        named = (
            "functions" in self.model_fields_set
        )  # else they may come as Python functions, with `train(rewards=...)`
        if named and self.weights is not None and len(self.weights) != len(self.functions):
            raise ConfigError(
                f"rewards.weights has {len(self.weights)} values and rewards.functions {len(self.functions)}",
                "each function needs one weight",
                "make them equally long, or leave the weights out",
            )
        return self


_PYTHON = "python:"  # stands before the name of a reward that was handed over as a function


def is_python(name: str) -> bool:
    """Whether a reward was handed over as a function."""
    return name.startswith(_PYTHON)


def refuse_python(given: str, rewards: RewardSettings, call: str) -> None:
    """Raises `ConfigError` if rewards were handed over as functions, which nothing but that call can do again."""
    missing = [name.removeprefix(_PYTHON) for name in rewards.functions if is_python(name)]
    if missing:
        raise ConfigError(
            given,
            f"its rewards were the Python functions {', '.join(missing)}, which only Python can hand over again",
            f"call it from Python: {call}",
        )
