"""The sections of a config that have no table."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from shoestring.config.settings import Settings


class EvaluationSettings(Settings):
    """The evaluations during a run (`eval_every`)."""

    split: str = "validation"
    num: int = Field(default=100, ge=1)
    """Problems, the first ones of the split."""
    by: Literal["auto", "answers", "rewards"] = "auto"
    """What judges: whether answers are right, or the mean of the run's own rewards; "auto" takes the latter where the
    task has no answers."""
    keep: Literal["last", "best"] = "last"
    """Which weights the run ends with: the last, or the best in these evaluations."""


class ExecutionSettings(Settings):
    """How a step is carried out. Nothing here changes its result beyond rounding."""

    device: Annotated[str, Field(pattern=r"^(auto|cpu|cuda(:\d+)?)$")] = "auto"
    """"auto", "cpu", "cuda" or "cuda:N"."""
    wave_tokens: int | None = Field(default=None, ge=1)
    """Cache slots that sampling fills at once; None leaves it to the memory plan."""
    micro_batch_tokens: int | None = Field(default=None, ge=1)
    """Padded tokens that the training forward takes at once; None leaves it to the memory plan."""
    plain: bool = False
    """Train through transformers' own layers, each completion behind a copy of its prompt: slower, and the reference of
    what is faster."""
    trunk_cache: bool | Literal["auto"] = "auto"
    """Keep, from sampling to training, what the layers below the lowest trained one gave for each token, so that they
    are not run again. "auto" leaves it to the memory plan."""
    checkpointing: bool | Literal["auto"] = "auto"
    """Recompute the layers that carry gradient in the backward pass: less memory, more time. "auto" leaves it to the
    memory plan."""
