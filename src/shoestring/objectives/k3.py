"""The KL estimate to the reference."""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from shoestring.config.settings import Settings
from shoestring.objectives.base import Metrics, Role, Tokens, log_ratio
from shoestring.types import TokenColumns


class K3(Settings):
    """The estimate exp(d) - d - 1 of the KL to the reference, as in GRPO (arXiv 2402.03300)."""

    name: Literal["k3"] = "k3"

    role: ClassVar[Role] = "kl"

    def loss(self, tokens: Tokens, columns: TokenColumns) -> tuple[Tensor, Metrics]:
        assert tokens.reference is not None
        return k3(tokens.logprob, tokens.reference), {}


def k3(logprob_N: Float[Tensor, " N"], reference_N: Float[Tensor, " N"]) -> Float[Tensor, " N"]:
    """Return exp(d) - d - 1 with d = reference - logprob of each token; it is never negative. [N]"""
    d = log_ratio(reference_N, logprob_N)
    return torch.expm1(d) - d
