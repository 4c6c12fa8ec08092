"""How completions are drawn."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pydantic import Field, field_validator, model_validator

from shoestring.config.settings import Settings
from shoestring.errors import ConfigError

if TYPE_CHECKING:
    pass


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
