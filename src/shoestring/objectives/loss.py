"""The objective over selected tokens: clipped surrogate, KL to the reference, L2 on the adapter. Plain weighted
sums."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from pydantic import Field
from torch import Tensor

from shoestring.config.settings import Settings
from shoestring.types import Batch

# A log-ratio beyond this changes nothing that matters and could overflow: exp(20) is 5e8 already.
_MAX_LOG_RATIO = 20.0

Correction = Literal["none", "token-truncate", "token-mask", "sequence-truncate", "sequence-mask"]


class Objective(Settings):
    """`[objective]` with every value settled (an algorithm's own defaults stand where the user said nothing)."""

    beta: float
    clip_low: float
    clip_high: float
    updates: int
    l2: float
    importance_correction: Correction = "none"
    """How a token's policy part is weighed when the sampler is not quite the policy; see `importance_weights`. Left out
    or "auto": "none" for a sampler that draws from the policy itself, else "token-truncate"."""
    importance_cap: float = Field(default=3.0, ge=1)
    """The largest such weight."""


class LossReport(NamedTuple):
    """The loss of a micro-batch, a scalar with gradient, and sums for the report: KL shares, clipped tokens, importance
    weights (1 each without correction) and those that the cap changed."""

    loss: Tensor
    kl: Tensor
    clipped: Tensor
    importance: Tensor
    capped: Tensor


def policy_loss(
    logprob_N: Float[Tensor, " N"],
    old_N: Float[Tensor, " N"],
    advantage_N: Float[Tensor, " N"],
    clip_low: float,
    clip_high: float,
) -> tuple[Float[Tensor, " N"], Bool[Tensor, " N"]]:
    """The clipped surrogate of each token and where clipping took its gradient (arXiv 1707.06347). [N], [N] bool

        max(-A rho, -A clip(rho, 1 - low, 1 + high)),   rho = exp(logprob - old)

    >>> pg, clipped = policy_loss(torch.tensor([1.3]).log(), torch.zeros(1), torch.tensor([2.0]), 0.2, 0.2)
    >>> round(pg.item(), 4), clipped.item()
    (-2.4, True)
    """
    ratio = torch.exp((logprob_N - old_N).clamp(-_MAX_LOG_RATIO, _MAX_LOG_RATIO))
    free, held = -advantage_N * ratio, -advantage_N * ratio.clamp(1 - clip_low, 1 + clip_high)
    return torch.maximum(free, held), held > free


def k3(logprob_N: Float[Tensor, " N"], reference_N: Float[Tensor, " N"]) -> Float[Tensor, " N"]:
    """The KL estimate exp(d) - d - 1 with d = reference - logprob of each token; never negative. [N]"""
    d = (reference_N - logprob_N).clamp(-_MAX_LOG_RATIO, _MAX_LOG_RATIO)
    return torch.expm1(d) - d


def importance_weights(
    old_N: Float[Tensor, " N"],
    sampler_N: Float[Tensor, " N"],
    row_N: Int[Tensor, " N"],
    correction: Correction,
    cap: float,
) -> tuple[Float[Tensor, " N"], Bool[Tensor, " N"]]:
    """What makes up for tokens that another distribution drew, and where the cap changed it. [N], [N] bool

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
    if correction.startswith("sequence"):  # every row of a batch has a selected token, so there are at most N
        log_ratio = torch.zeros_like(log_ratio).index_add(0, row_N, log_ratio)[row_N]
    ratio = torch.exp(log_ratio)
    above = ratio > cap
    return ratio.masked_fill(above, 0.0 if correction.endswith("mask") else cap), above


def objective_loss(
    logprob_N: Float[Tensor, " N"],
    old_N: Float[Tensor, " N"],
    reference_N: Float[Tensor, " N"] | None,
    batch: Batch,
    objective: Objective,
) -> LossReport:
    """The micro-batch's part of the step's loss: a sum over its N tokens, so that any cut gives the same gradient.

    `old_N` are the log-probs of the policy that the ratio is taken to, without gradient; `reference_N` those of the
    reference, needed when beta is above 0. Importance weights act on the policy part alone.
    """
    pg_N, clipped_N = policy_loss(logprob_N, old_N, batch.advantage, objective.clip_low, objective.clip_high)
    importance, capped = torch.tensor(float(len(old_N))), torch.tensor(0)
    if objective.importance_correction != "none":
        weight_N, capped_N = importance_weights(
            old_N, batch.sampler_logprob, batch.row, objective.importance_correction, objective.importance_cap
        )
        pg_N, importance, capped = weight_N * pg_N, weight_N.sum(), capped_N.sum()
    loss = (batch.weight * pg_N).sum()
    kl = torch.zeros_like(loss)
    if reference_N is not None:
        kl = (batch.kl_weight * k3(logprob_N, reference_N)).sum()
        loss = loss + objective.beta * kl
    return LossReport(loss, kl.detach(), clipped_N.sum(), importance, capped)


def l2_loss(parameters: Iterable[Tensor], l2: float) -> Tensor:
    """l2 times the sum of squares of the trained weights, as a part of the loss and not as a decay of the weights.

    >>> l2_loss([torch.tensor([0.1, -0.2])], 0.01).item()  # doctest: +ELLIPSIS
    0.0005...
    """
    return l2 * torch.stack([p.float().square().sum() for p in parameters]).sum()
