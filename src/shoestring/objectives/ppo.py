"""The clipped surrogate."""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from jaxtyping import Bool, Float
from pydantic import Field
from torch import Tensor

from shoestring.config.settings import Settings
from shoestring.objectives.base import Figure, Metrics, Role, Tokens, log_ratio
from shoestring.types import TokenColumns


class PPO(Settings):
    """The clipped surrogate of each token's own ratio (arXiv 1707.06347)."""

    name: Literal["ppo"] = "ppo"
    clip_low: float = Field(default=0.2, ge=0)
    """A ratio below 1 minus this earns a bad token nothing more."""
    clip_high: float = Field(default=0.2, ge=0)
    """A ratio above 1 plus this earns a good token nothing more."""

    role: ClassVar[Role] = "policy"

    def loss(self, tokens: Tokens, columns: TokenColumns) -> tuple[Tensor, Metrics]:
        loss_N, clipped_N = policy_loss(tokens.logprob, tokens.old, columns.advantage, self.clip_low, self.clip_high)
        return loss_N, {"clip_fraction": Figure(clipped_N.sum())}


def policy_loss(
    logprob_N: Float[Tensor, " N"],
    old_N: Float[Tensor, " N"],
    advantage_N: Float[Tensor, " N"],
    clip_low: float,
    clip_high: float,
) -> tuple[Float[Tensor, " N"], Bool[Tensor, " N"]]:
    """Return the clipped surrogate of each token and where clipping took its gradient. [N], [N] bool

        max(-A rho, -A clip(rho, 1 - low, 1 + high)),   rho = exp(logprob - old)

    >>> pg, clipped = policy_loss(torch.tensor([1.3]).log(), torch.zeros(1), torch.tensor([2.0]), 0.2, 0.2)
    >>> round(pg.item(), 4), clipped.item()
    (-2.4, True)
    """
    ratio = torch.exp(log_ratio(logprob_N, old_N))
    return clipped(ratio, advantage_N, clip_low, clip_high)


def clipped(
    ratio_N: Float[Tensor, " N"], advantage_N: Float[Tensor, " N"], clip_low: float, clip_high: float
) -> tuple[Float[Tensor, " N"], Bool[Tensor, " N"]]:
    """Return max(-A rho, -A clip(rho, 1 - low, 1 + high)) and where the second is larger. [N], [N] bool"""
    free, held = -advantage_N * ratio_N, -advantage_N * ratio_N.clamp(1 - clip_low, 1 + clip_high)
    return torch.maximum(free, held), held > free
