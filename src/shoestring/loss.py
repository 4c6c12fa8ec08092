"""The objective over selected tokens: clipped surrogate, KL to the reference, L2 on the adapter. Plain weighted
sums."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from shoestring.settings import Settings
from shoestring.types import Batch

# A log-ratio beyond this changes nothing that matters and could overflow: exp(20) is 5e8 already.
_MAX_LOG_RATIO = 20.0


class Objective(Settings):
    """`[objective]` with every value settled (an algorithm's own defaults stand where the user said nothing)."""

    beta: float
    clip_low: float
    clip_high: float
    updates: int
    l2: float


class LossReport(NamedTuple):
    """The loss of a micro-batch, a scalar with gradient, and two sums for the report: KL shares and clipped tokens."""

    loss: Tensor
    kl: Tensor
    clipped: Tensor


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


def objective_loss(
    logprob_N: Float[Tensor, " N"],
    old_N: Float[Tensor, " N"],
    reference_N: Float[Tensor, " N"] | None,
    batch: Batch,
    objective: Objective,
) -> LossReport:
    """The micro-batch's part of the step's loss: a sum over its N tokens, so that any cut gives the same gradient.

    `old_N` are the log-probs of the policy that the ratio is taken to, without gradient; `reference_N` those of the
    reference, needed when beta is above 0.
    """
    pg_N, clipped_N = policy_loss(logprob_N, old_N, batch.advantage, objective.clip_low, objective.clip_high)
    loss = (batch.weight * pg_N).sum()
    kl = torch.zeros_like(loss)
    if reference_N is not None:
        kl = (batch.kl_weight * k3(logprob_N, reference_N)).sum()
        loss = loss + objective.beta * kl
    return LossReport(loss, kl.detach(), clipped_N.sum())


def l2_loss(parameters: Iterable[Tensor], l2: float) -> Tensor:
    """l2 times the sum of squares of the trained weights, as a part of the loss and not as a decay of the weights.

    >>> l2_loss([torch.tensor([0.1, -0.2])], 0.01).item()  # doctest: +ELLIPSIS
    0.0005...
    """
    return l2 * torch.stack([p.float().square().sum() for p in parameters]).sum()
