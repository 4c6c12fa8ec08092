"""GRPO on the tokens of highest entropy (arXiv 2506.01939): where the model was least sure how to go on."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from shoestring.algorithms.base import (
    ObjectiveDefaults,
    PerGroup,
    chosen_credit,
    cut_off,
    every_token,
    relative_advantages,
    rewards,
)
from shoestring.config.settings import Settings
from shoestring.errors import ConfigError
from shoestring.types import Credit, Group


class EntropyFilter(PerGroup, Settings):
    """GRPO over the tokens at which the sampling distribution had the highest entropy.

        token t of completion i is selected   if H_it is among the highest `fraction` of the group
        or, with k instead of it,             if H_it is among the k highest of completion i

    The average is over the selected tokens of each completion, then over completions, as in S-GRPO, which chooses at
    random; a completion without selected tokens adds nothing. Of equal entropies the earlier token goes first. The
    paper takes the highest of a whole batch; here it is of the group, which is all that `credit` sees. With `fraction`
    1 this is GRPO.

    Entropies 1.5, 0.1, 1.3 and 0.2, 0.4 with `fraction` 0.4 select 1.5 and 1.3; with `k` 1, 1.5 and 0.4.
    """

    name: Literal["entropy-filter"] = "entropy-filter"
    fraction: float | None = Field(default=0.2, gt=0, le=1)
    """Share of the group's tokens that is selected, rounded to whole tokens and at least one; None with `k`."""
    k: int | None = Field(default=None, ge=1)
    """Instead: number of tokens selected in each completion."""
    advantage: Literal["standardised", "centred"] = "standardised"
    eps: float = Field(default=1e-6, gt=0)
    mask_truncated: bool = False
    """Leave completions that were cut off out of the loss, and out of what `fraction` counts."""

    objective: ClassVar = ObjectiveDefaults()
    least_completions: ClassVar[int] = 2
    replay: ClassVar[None] = None
    normalise: ClassVar[Literal["groups", "tokens"]] = "groups"
    needs_entropy: ClassVar[bool] = True

    @model_validator(mode="before")
    @classmethod
    def _k_takes_the_place_of_the_fraction(cls, data: Any) -> Any:
        return {"fraction": None, **data} if isinstance(data, dict) and data.get("k") is not None else data

    @model_validator(mode="after")
    def _one_of_the_two(self) -> EntropyFilter:
        if (self.fraction is None) == (self.k is None):
            raise ConfigError(
                f"algorithm.fraction is {self.fraction} and algorithm.k is {self.k}",
                "a token is selected by its rank in the group or by its rank in its completion",
                "write one of the two, such as fraction = 0.2 or k = 64",
            )
        return self

    def credit(self, group: Group, generator: torch.Generator) -> Credit:
        advantage_G = relative_advantages(rewards(group), self.advantage, self.eps)
        return chosen_credit(group, self.select(group), advantage_G, mask_truncated=self.mask_truncated)

    def select(self, group: Group) -> Tensor:
        """Which of the group's tokens, row by row, are selected. [sum of lengths], bool"""
        row, col = every_token(group)
        spread, num = entropies(group), len(row)
        if self.mask_truncated:
            cut = cut_off(group)[row]
            spread, num = spread.masked_fill(cut, -torch.inf), int((~cut).sum())
        order = spread.argsort(descending=True, stable=True)
        if self.k is None:
            best = order[: max(round((self.fraction or 0.0) * num), 1)]
        else:  # sorted by row and then by entropy, the token at a place has the rank that this place has in its row
            best = order[row[order].argsort(stable=True)][col < self.k]
        return torch.zeros(len(row), dtype=torch.bool).index_fill(0, best, True)


def entropies(group: Group) -> Tensor:
    """Those of all the group's tokens, row by row. [sum of lengths], float64"""
    for completion in group.completions:
        if len(completion.entropies) != len(completion.token_ids):
            raise ConfigError(
                f"the sampler gave {len(completion.entropies)} entropies for {len(completion.token_ids)} tokens",
                'algorithm.name "entropy-filter" selects tokens by them',
                'use sampler.name = "auto", or another algorithm',
            )
    flat = [value for completion in group.completions for value in completion.entropies]
    return torch.tensor(flat, dtype=torch.float64)
