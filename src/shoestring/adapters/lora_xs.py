"""LoRA-XS (arXiv 2405.17604): frozen frames from the weight's SVD around one small trained matrix."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from shoestring.adapters.base import AdapterCost
from shoestring.adapters.factored import Factored, attach_factored
from shoestring.adapters.placement import Layers, Modules, Placed
from shoestring.config.settings import Settings
from shoestring.model.adapter import Factors, Handle

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from shoestring.model.shapes import Shape


class LoRAXS(Placed, Settings):
    """W x + (alpha / rank) U R (S V^T x) with U, S, V the leading singular triplets of W and R [rank, rank] trained.

    R starts at 0, so step 0 is the base model; the paper draws it from N(0, 1e-10). The frames are frozen, so no layer
    keeps its input for the backward pass. Learning rates are about ten times those of LoRA.
    """

    name: Literal["lora-xs"] = "lora-xs"
    rank: int = Field(default=64, ge=1)
    alpha: float = Field(default=64, gt=0)
    modules: Modules = "all-linear"
    layers: Layers = "all"

    def cost(self, shape: Shape) -> AdapterCost:
        linears, layers = self.chosen(shape)
        ranks = [min(self.rank, linear.inputs, linear.outputs) for linear in linears]
        frames = sum(r * (linear.inputs + linear.outputs) for r, linear in zip(ranks, linears, strict=True))
        up = sum(r * linear.outputs for r, linear in zip(ranks, linears, strict=True))
        of_layer = sum(r * r for r in ranks)
        return AdapterCost(
            of_layer * len(layers),
            layers[0],
            len(layers),
            frozenset(linear.name for linear in linears),
            max(ranks),
            of_layer,
            down_trains=False,
            computed=up * len(layers),
            frozen_values=frames * len(layers),
            kept_token={2: 0, 4: 0},
            kept_layer={2: 6 * up, 4: 4 * up},
        )

    def attach(self, model: PreTrainedModel, seed: int) -> Handle:
        def module(linear: nn.Module, weight: Tensor) -> Factored:
            return LoRAXSLinear(linear, weight, self.rank, self.alpha / self.rank, model.dtype)

        return attach_factored(self, model, seed, module)


class LoRAXSLinear(Factored):
    """`left` [out, r] and `right` [r, in] are frozen, `core` [r, r] is trained."""

    left: Tensor
    right: Tensor

    def __init__(self, linear: nn.Module, weight: Tensor, rank: int, scaling: float, dtype: torch.dtype):
        super().__init__(linear)
        left, right = leading_frames(weight, rank)
        self.scaling = scaling
        self.core = nn.Parameter(torch.zeros(len(right), len(right), device=weight.device))
        self.register_buffer("left", left.to(dtype))
        self.register_buffer("right", right.to(dtype))

    def factors(self) -> Factors:
        return Factors(self.right, self.left.float() @ self.core, down_trains=False, scaling=self.scaling)


def leading_frames(weight: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """U [out, r] and S V^T [r, in] of the r largest singular values, by a randomised SVD where r is small."""
    weight, rank = weight.float(), min(rank, *weight.shape)
    if 4 * rank < min(weight.shape):
        u, s, v = torch.svd_lowrank(weight, q=rank + 8, niter=10)
    else:
        u, s, vh = torch.linalg.svd(weight, full_matrices=False)
        v = vh.T
    return u[:, :rank].contiguous(), (s[:rank, None] * v[:, :rank].T).contiguous()
