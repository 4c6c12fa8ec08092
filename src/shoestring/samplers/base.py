"""The sampler seam: settings of sampling, and what a sampler must do."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from pydantic import Field, field_validator, model_validator

from shoestring.config.settings import Settings
from shoestring.errors import ConfigError
from shoestring.types import Completion, Prompt

if TYPE_CHECKING:
    from shoestring.model.policy import Policy


class Sampling(Settings):
    """How completions are drawn. Temperature 0 is greedy decoding; top_k 0, top_p 1 and min_p 0 filter nothing."""

    num_prompts: int = Field(default=16, ge=1)
    """Prompts in a step."""
    num_completions: int = Field(default=8, ge=1)
    """Completions of each prompt."""
    max_new_tokens: int = Field(default=128, ge=1)
    """Limit on the tokens of an answer, a forced prefix and the end token included."""
    temperature: float = Field(default=1.0, ge=0)
    top_p: float = Field(default=1.0, gt=0, le=1)
    top_k: int = Field(default=0, ge=0)
    min_p: float = Field(default=0.0, ge=0, lt=1)
    max_prompt_tokens: int | None = Field(default=None, ge=1)
    """Longer prompts are refused, or cut from the left with `allow_truncated_prompts`; None sets no limit, and the
    memory plan takes the longest prompt of the data."""
    dynamic_sampling: float = Field(default=1.0, ge=1)
    """At most so many times `num_prompts` are sampled in a step, in place of groups without signal (DAPO, arXiv
    2503.14476); 1.0 samples no more than once."""
    ignore_eos: bool = False
    """Sample `max_new_tokens` whatever comes (for benchmarks)."""
    entropy: bool = Field(default=False, exclude=True)
    """Completions carry the entropy at each token. Asked for where the algorithm needs it, so no config writes it."""

    @field_validator("dynamic_sampling", mode="before")
    @classmethod
    def _is_a_budget(cls, value: Any) -> Any:
        if isinstance(value, bool):
            raise ConfigError(
                f"sampling.dynamic_sampling is {str(value).lower()}",
                "it is how many times num_prompts a step may sample",
                "write a number such as 3 (1 turns it off)",
            )
        return value

    @model_validator(mode="after")
    def _budget_holds_a_prompt_more(self) -> Sampling:
        if self.dynamic_sampling > 1 and self.most_prompts == self.num_prompts:
            raise ConfigError(
                f"sampling.dynamic_sampling is {self.dynamic_sampling:g} with {self.num_prompts} prompts",
                "that leaves less than one prompt to sample beyond them",
                f"write {1 + 1 / self.num_prompts:.3g} or more, or 1 to turn it off",
            )
        return self

    @property
    def most_prompts(self) -> int:
        """Prompts that a step samples at most."""
        return int(self.dynamic_sampling * self.num_prompts + 1e-6)


Told = Callable[[int, tuple[Completion, ...]], None]
"""Hears of a group as soon as it is complete: the place of its prompt in the call, and its completions."""


class Engine(Protocol):
    """A sampler at work for one policy. One whose `keeps_trunk` is true is also given a `trunk_layer` in `sample` and
    `rehearse`, and keeps what enters that layer."""

    @property
    def wave_tokens(self) -> int | None:
        """Most cache slots (rows times the longest of them) that a wave may hold; None takes everything at once.
        Lowered for good when a wave runs out of memory."""
        ...

    def sample(
        self,
        prompts: Sequence[Prompt],
        *,
        num: int,
        sampling: Sampling,
        seed: int,
        first: int = 0,
        done: Told | None = None,
    ) -> list[tuple[Completion, ...]]:
        """`num` completions of each prompt. What a completion draws depends on (seed, place of the prompt, place of the
        completion, position) and on nothing else, so neither waves nor batch sizes choose it. Places of prompts are
        counted from `first`, so that many prompts can be sampled in several calls as in one.

        `done`, where given, may be told of each group once it is complete, while others are sampled. Where sampling
        begins anew because memory ran out, it may be told again; what counts is what is returned."""
        ...

    def rehearse(self, prompts: Sequence[Prompt], *, num: int, sampling: Sampling) -> None:
        """Takes the memory that sampling `num` full-length completions of each prompt takes at most, in little time."""
        ...

    def sync(self, policy: Policy) -> None:
        """Told after each optimizer step that the policy's weights changed. An engine with weights of its own takes the
        adapter here, and keeps it beside them: merged, it would be rounded away. Until then it samples with the one
        before."""
        ...


class Sampler(Protocol):
    """The settings of a sampler, which opens it for a policy."""

    name: str

    @property
    def exact(self) -> bool:
        """Whether it draws from the policy itself, its log-probs being the training forward's up to rounding. Otherwise
        `objective.importance_correction` makes up for the difference."""
        ...

    def open(self, policy: Policy, wave_tokens: int | None = None) -> Engine: ...
