"""Importance correction: a wrapper around a policy term, for a sampler that is not quite the policy."""

from __future__ import annotations

from typing import ClassVar, Literal, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from shoestring.objectives.base import Figure, Metrics, Role, Term, Tokens, row_sums
from shoestring.types import TokenColumns

Correction = Literal["none", "token-truncate", "token-mask", "sequence-truncate", "sequence-mask"]


class _Corrected(NamedTuple):
    inner: Term
    correction: Correction
    cap: float


class Corrected(_Corrected):
    """A policy term whose tokens are weighed by `importance_weights`. It is a term too."""

    role: ClassVar[Role] = "policy"

    @property
    def name(self) -> str:
        return self.inner.name

    def loss(self, tokens: Tokens, columns: TokenColumns) -> tuple[Tensor, Metrics]:
        loss_N, metrics = self.inner.loss(tokens, columns)
        weight_N, capped_N = importance_weights(
            tokens.old, columns.sampler_logprob, tokens.row, self.correction, self.cap
        )
        own = {"importance_mean": Figure(weight_N.sum()), "importance_capped": Figure(capped_N.sum())}
        return weight_N * loss_N, metrics | own


def importance_weights(
    old_N: Float[Tensor, " N"],
    sampler_N: Float[Tensor, " N"],
    row_N: Int[Tensor, " N"],
    correction: Correction,
    cap: float,
) -> tuple[Float[Tensor, " N"], Bool[Tensor, " N"]]:
    """Return what makes up for tokens that another distribution drew, and where the cap changed it. [N], [N] bool

        c = exp(old - sampler),   truncated: min(c, cap)   or masked: c up to the cap, 0 above it

    of each token, or of each row: the product over its selected tokens, which all of them get. Truncating is V-trace's
    (arXiv 1802.01561); that the weight stands outside the clipped ratio to `old` is the decoupled objective's (arXiv
    2110.00641). Names, formulas and default cap are those of TRL's `vllm_importance_sampling_mode`. Without a cap a
    token's weight is exact for one token, a row's for any number, at the price of a variance that grows with it.

    >>> zero, ratio, row = torch.zeros(3), torch.tensor([0.5, 2.0, 6.0]), torch.tensor([0, 1, 1])
    >>> importance_weights(ratio.log(), zero, row, "token-truncate", 3.0)[0]
    tensor([0.5000, 2.0000, 3.0000])
    >>> importance_weights(ratio.log(), zero, row, "sequence-mask", 3.0)[0]
    tensor([0.5000, 0.0000, 0.0000])
    """
    log_ratio = old_N - sampler_N
    if correction.startswith("sequence"):
        log_ratio = row_sums(log_ratio, row_N)
    ratio = torch.exp(log_ratio)
    above = ratio > cap
    return ratio.masked_fill(above, 0.0 if correction.endswith("mask") else cap), above
