"""The term seam of the objective: what a term reads, and what it returns."""

from __future__ import annotations

from typing import ClassVar, Literal, NamedTuple, Protocol

import torch
from jaxtyping import Float, Int
from torch import Tensor

from shoestring.types import TokenColumns

# A log-ratio beyond this changes nothing that matters and could overflow: exp(20) is 5e8 already.
MAX_LOG_RATIO = 20.0


Role = Literal["policy", "kl"]


class Tokens(NamedTuple):
    """The log-probs of the N selected tokens of a micro-batch."""

    logprob: Tensor
    """[N]: those of the policy, with gradient."""
    old: Tensor
    """[N]: those of the policy before the step's first update, without gradient."""
    reference: Tensor | None
    """[N]: those of the reference, without gradient; there if beta is above 0."""
    row: Tensor
    """[N] int64: the row of each token. All selected tokens of a row are in one micro-batch."""


class Figure(NamedTuple):
    """A sum over the tokens of a micro-batch, for the report. A scalar without gradient."""

    total: Tensor
    mean: bool = True
    """Whether the report divides the step's sum by its number of tokens."""


Metrics = dict[str, Figure]


class Term(Protocol):
    """The loss of single tokens. A frozen settings object.

    A term with the role "policy" is weighed by `columns.weight`, one with the role "kl" by beta and
    `columns.kl_weight`. The objective is the plain sum of the weighed losses, so any cut of a step into micro-batches
    gives the same gradient.
    """

    role: ClassVar[Role]

    @property
    def name(self) -> str: ...

    def loss(self, tokens: Tokens, columns: TokenColumns) -> tuple[Tensor, Metrics]:
        """Return the loss of each token, [N], and figures by name."""
        ...


def log_ratio(of_N: Tensor, to_N: Tensor) -> Tensor:
    """Return log(p / q) of each token from two log-probs, bounded so that its exponential is finite. [N]"""
    return (of_N - to_N).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)


def row_sums(values_N: Float[Tensor, " N"], row_N: Int[Tensor, " N"]) -> Float[Tensor, " N"]:
    """Give each token the sum over its row. Every row has a token, so there are at most N rows. [N]

    >>> row_sums(torch.tensor([1.0, 2.0, 4.0]), torch.tensor([0, 1, 1]))
    tensor([1., 6., 6.])
    """
    return torch.zeros_like(values_N).index_add(0, row_N, values_N)[row_N]
