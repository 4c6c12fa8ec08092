"""REINFORCE with a capped ratio as its weight."""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from jaxtyping import Bool, Float
from pydantic import Field
from torch import Tensor

from shoestring.config.settings import Settings
from shoestring.objectives.base import Figure, Metrics, Role, Tokens, log_ratio
from shoestring.types import TokenColumns


class CISPO(Settings):
    """REINFORCE weighed by each token's capped ratio (arXiv 2506.13585)."""

    name: Literal["cispo"] = "cispo"
    cap: float = Field(default=5.0, gt=0)
    """The largest ratio. It has no floor. The default is that of ScaleRL (arXiv 2510.13786)."""

    role: ClassVar[Role] = "policy"

    def loss(self, tokens: Tokens, columns: TokenColumns) -> tuple[Tensor, Metrics]:
        loss_N, capped_N = capped_reinforce(tokens.logprob, tokens.old, columns.advantage, self.cap)
        return loss_N, {"clip_fraction": Figure(capped_N.sum())}


def capped_reinforce(
    logprob_N: Float[Tensor, " N"], old_N: Float[Tensor, " N"], advantage_N: Float[Tensor, " N"], cap: float
) -> tuple[Float[Tensor, " N"], Bool[Tensor, " N"]]:
    """Return the loss of each token and where the cap changed its ratio. [N], [N] bool

        -sg[min(rho, cap)] A logprob,   rho = exp(logprob - old)

    Every token keeps a gradient, those above the cap too.

    >>> logprob, rho = torch.tensor([-1.0, -2.0, -0.5]), torch.tensor([0.5, 1.0, 6.0])
    >>> capped_reinforce(logprob, logprob - rho.log(), torch.ones(3), 5.0)
    (tensor([0.5000, 2.0000, 2.5000]), tensor([False, False,  True]))
    """
    ratio = torch.exp(log_ratio(logprob_N.detach(), old_N))
    return -ratio.clamp(max=cap) * advantage_N * logprob_N, ratio > cap
