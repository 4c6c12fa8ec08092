"""The clipped surrogate of a row's ratio."""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from jaxtyping import Float, Int
from pydantic import Field
from torch import Tensor

from shoestring.config.settings import Settings
from shoestring.objectives.base import MAX_LOG_RATIO, Figure, Metrics, Role, Tokens, row_sums
from shoestring.objectives.ppo import clipped
from shoestring.types import TokenColumns


class GSPO(Settings):
    """The clipped surrogate of the whole completion's ratio (arXiv 2507.18071)."""

    name: Literal["gspo"] = "gspo"
    clip_low: float = Field(default=3e-4, ge=0)
    """A ratio below 1 minus this earns the tokens of a bad completion nothing more."""
    clip_high: float = Field(default=4e-4, ge=0)
    """A ratio above 1 plus this earns the tokens of a good completion nothing more."""

    role: ClassVar[Role] = "policy"

    def loss(self, tokens: Tokens, columns: TokenColumns) -> tuple[Tensor, Metrics]:
        ratio_N = sequence_ratio(tokens.logprob, tokens.old, tokens.row, (columns.weight != 0).to(tokens.old.dtype))
        loss_N, clipped_N = clipped(ratio_N, columns.advantage, self.clip_low, self.clip_high)
        return loss_N, {"clip_fraction": Figure(clipped_N.sum())}


def sequence_ratio(
    logprob_N: Float[Tensor, " N"],
    old_N: Float[Tensor, " N"],
    row_N: Int[Tensor, " N"],
    counts_N: Float[Tensor, " N"],
) -> Float[Tensor, " N"]:
    """Give each token its row's ratio, with the gradient of the token's own log-prob. [N]

        s = exp(mean over the row of (logprob - old)),   s_t = sg[s] exp(logprob_t - sg[logprob_t])

    The mean is over the tokens whose `counts_N` is 1 and not 0: those of the policy term, without those that are
    selected for the KL alone. s_t is the paper's GSPO-token. Where advantage and weight are the same all over a row its
    gradient is that of s itself.

    >>> log_ratio, row = torch.tensor([0.1, -0.2, 0.3]), torch.zeros(3, dtype=torch.int64)
    >>> sequence_ratio(log_ratio, torch.zeros(3), row, torch.ones(3))
    tensor([1.0689, 1.0689, 1.0689])
    """
    own_N = logprob_N.detach()
    mean_N = row_sums((own_N - old_N) * counts_N, row_N) / row_sums(counts_N, row_N).clamp(min=1)
    return mean_N.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp() * torch.exp(logprob_N - own_N)
