"""S-GRPO, stochastic GRPO (arXiv 2504.20834): only a few tokens of each completion enter the loss."""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from shoestring.algorithms.base import ObjectiveDefaults, PerGroup, chosen_credit, relative_advantages, rewards
from shoestring.config.settings import Settings
from shoestring.errors import ConfigError
from shoestring.types import Credit, Group


class SGRPO(PerGroup, Settings):
    """GRPO over the first `alpha` tokens of a completion, and behind them over random ones until `k` are selected.

        token t is selected   if t < alpha
                              with probability p   if t >= alpha and fewer than k are selected before it

    The average is over the selected tokens of each completion, then over completions. Only the selected tokens meet the
    vocabulary matrix, and nothing behind the last of them is run. The paper's alpha, k and p are not known; the
    defaults are ours. With `alpha` at least as long as the completions this is GRPO.
    """

    name: Literal["s-grpo"] = "s-grpo"
    alpha: int = Field(default=32, ge=0)
    """Number of tokens that are always selected."""
    k: int = Field(default=64, ge=1)
    """Limit on the number of selected tokens, the first `alpha` included."""
    p: float = Field(default=0.5, ge=0, le=1)
    """Probability of each further token."""
    advantage: Literal["standardised", "centred"] = "standardised"
    eps: float = Field(default=1e-6, gt=0)
    kl_scope: Literal["selected", "all"] = "selected"
    """Which tokens the KL term averages over. "all" runs and reads every token, and gives the savings away."""
    mask_truncated: bool = False

    objective: ClassVar = ObjectiveDefaults()
    least_completions: ClassVar[int] = 2
    replay: ClassVar[None] = None
    normalise: ClassVar[Literal["groups", "tokens"]] = "groups"

    @model_validator(mode="after")
    def _alpha_within_k(self) -> SGRPO:
        if self.alpha > self.k:
            raise ConfigError(
                f"algorithm.alpha is {self.alpha} and algorithm.k is {self.k}",
                "the first alpha tokens are always selected, so no completion could keep to k",
                f"use alpha at most k, such as alpha = {self.k} or k = {self.alpha}",
            )
        return self

    def credit(self, group: Group, generator: torch.Generator) -> Credit:
        advantage_G = relative_advantages(rewards(group), self.advantage, self.eps)
        chosen = self.select(group, generator)
        return chosen_credit(group, chosen, advantage_G, mask_truncated=self.mask_truncated, kl_scope=self.kl_scope)

    def select(self, group: Group, generator: torch.Generator) -> Tensor:
        """Which of the group's tokens, row by row, are selected. [sum of lengths], bool"""
        lengths = torch.tensor([len(completion.token_ids) for completion in group.completions])
        inside = torch.arange(int(lengths.max())) < lengths[:, None]
        uniform_GT = torch.zeros(inside.shape, dtype=torch.float64)
        uniform_GT[inside] = torch.rand(int(lengths.sum()), generator=generator, dtype=torch.float64)
        return self.select_row(uniform_GT)[inside]

    def select_row(self, uniform_T: Tensor) -> Tensor:
        """The rule above in one piece: one uniform number a position, also where the cap makes it idle. [T] or [G, T],
        bool

        >>> u = torch.tensor([0.0, 0.0, 0.0, 0.7, 0.2, 0.9, 0.4, 0.1, 0.3, 0.6])
        >>> SGRPO(alpha=3, k=5, p=0.5).select_row(u).nonzero().flatten().tolist()
        [0, 1, 2, 4, 6]
        """
        position = torch.arange(uniform_T.shape[-1])
        drawn = (uniform_T < self.p) & (position >= self.alpha)
        return (position < self.alpha) | (drawn & (self.alpha + drawn.cumsum(-1) <= self.k))
