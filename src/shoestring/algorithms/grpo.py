"""GRPO (arXiv 2402.03300): every token of a completion carries the completion's advantage over its group."""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from shoestring.algorithms.base import ObjectiveDefaults, PerGroup, cut_off, every_token, relative_advantages, rewards
from shoestring.config.settings import Settings
from shoestring.errors import ConfigError
from shoestring.types import Credit, Group

Aggregation = Literal["seq_mean_token_mean", "token_mean", "seq_mean_token_sum", "token_sum_norm"]


class GRPO(PerGroup, Settings):
    """The full-token baseline.

        A_i  = (R_i - mean(R)) / (std(R) + eps)        the same for every token of completion i
        Loss = mean over completions of the mean over tokens of  max(-A rho, -A clip(rho)) + beta kl

    `loss_agg` takes other averages: `token_mean` is DAPO's (arXiv 2503.14476), `token_sum_norm` with `advantage =
    "centred"` is Dr. GRPO (arXiv 2503.20783). Rewards 1, 0, 0, 1 give advantages of +-0.866.
    """

    name: Literal["grpo"] = "grpo"
    advantage: Literal["standardised", "centred"] = "standardised"
    eps: float = Field(default=1e-6, gt=0)
    """Added to the sample deviation."""
    loss_agg: Aggregation = "seq_mean_token_mean"
    norm_length: int | None = Field(default=None, ge=1)
    """The constant length that `token_sum_norm` divides by; usually the limit on new tokens."""
    mask_truncated: bool = False
    """Leave completions that were cut off out of the loss (their rewards still count in the group's mean)."""

    objective: ClassVar = ObjectiveDefaults()
    least_completions: ClassVar[int] = 2
    replay: ClassVar[None] = None

    @model_validator(mode="after")
    def _norm_length_where_needed(self) -> GRPO:
        if (self.loss_agg == "token_sum_norm") != (self.norm_length is not None):
            raise ConfigError(
                f'algorithm.loss_agg is "{self.loss_agg}" and algorithm.norm_length is {self.norm_length}',
                "token_sum_norm divides by norm_length, and nothing else does",
                'write both, such as loss_agg = "token_sum_norm" and norm_length = 256, or neither',
            )
        return self

    @property
    def normalise(self) -> Literal["groups", "tokens"]:
        return "tokens" if self.loss_agg == "token_mean" else "groups"

    def credit(self, group: Group, generator: torch.Generator) -> Credit:
        advantage_G = relative_advantages(rewards(group), self.advantage, self.eps)
        row, col = every_token(group)
        if self.mask_truncated:
            kept = ~cut_off(group)[row]
            row, col = row[kept], col[kept]
        weight_G = self._weights(group)
        return Credit(row, col, advantage_G[row].float(), weight_G[row].float())

    def _weights(self, group: Group) -> Tensor:
        """The share of one token of each completion. [G], float64"""
        lengths_G = torch.tensor([len(c.token_ids) for c in group.completions], dtype=torch.float64)
        num = len(group.completions)
        match self.loss_agg:
            case "seq_mean_token_mean":
                return 1 / (num * lengths_G.clamp(min=1))
            case "token_mean":
                return torch.ones_like(lengths_G)
            case "seq_mean_token_sum":
                return torch.full_like(lengths_G, 1 / num)
            case "token_sum_norm":
                return torch.full_like(lengths_G, 1 / (num * (self.norm_length or 1)))
