"""AdamW (arXiv 1711.05101) with its state in fp32 on the device."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.optim.adamw import adamw

from shoestring.optimizers.base import OptimSettings, TrainedParameter, TrainedSizes
from shoestring.optimizers.rounding import TILE_BYTES, PerWeight, put, tiles


class AdamW(OptimSettings):
    """AdamW with fp32 moments: 8 bytes a trained weight. Weights in bf16 are rounded by chance."""

    name: Literal["adamw"] = "adamw"  # type: ignore[assignment]
    betas: tuple[float, float] = (0.9, 0.99)
    eps: float = Field(default=1e-8, gt=0)

    @property
    def _options(self) -> dict[str, Any]:
        return {"lr": self.lr, "betas": self.betas, "eps": self.eps, "weight_decay": self.weight_decay}

    def build(self, parameters: Sequence[TrainedParameter]) -> torch.optim.Optimizer:
        return in_fp32([{"params": [each.parameter for each in parameters]}], **self._options)

    def state_bytes(self, sizes: TrainedSizes) -> int:
        return 8 * sizes.parameters

    def step_bytes(self, sizes: TrainedSizes) -> int:
        return TILE_BYTES if sizes.whole and sizes.gpu else 0

    def takes_no_memory(self, optimizer: torch.optim.Optimizer) -> bool:
        """torch's fused AdamW takes none, once its state is made."""
        groups = optimizer.param_groups
        fused = isinstance(optimizer, torch.optim.AdamW) and all(group["fused"] for group in groups)
        return fused and all(parameter in optimizer.state for group in groups for parameter in group["params"])


def in_fp32(groups: list[dict[str, Any]], **options: Any) -> torch.optim.Optimizer:
    """torch's AdamW for fp32 weights (on a GPU the fused one, which has no temporaries), else `RoundedAdamW`."""
    parameters = [parameter for group in groups for parameter in group["params"]]
    if any(parameter.dtype != torch.float32 for parameter in parameters):
        return RoundedAdamW(groups, **options)
    fused = all(parameter.is_cuda for parameter in parameters)
    return torch.optim.AdamW(groups, **options, fused=fused or None)


class RoundedAdamW(PerWeight):
    """AdamW for bf16 weights: fp32 moments, fp32 arithmetic, and the new weight rounded by chance."""

    def update(self, parameter: nn.Parameter, grad: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
        if not state:
            state["step"] = torch.zeros((), device=parameter.device)
            state["exp_avg"] = torch.zeros_like(parameter, dtype=torch.float32)
            state["exp_avg_sq"] = torch.zeros_like(parameter, dtype=torch.float32)
        for weight, slope, mean, square in tiles(parameter, grad, state["exp_avg"], state["exp_avg_sq"]):
            new = weight.to(torch.float32, copy=True)
            step = state["step"].to(weight.device, copy=True)
            update_in_place(new, slope.float(), mean, square, step, group)
            put(weight, new)
        state["step"] += 1


def update_in_place(
    weight: Tensor, grad: Tensor, mean: Tensor, square: Tensor, step: Tensor, group: dict[str, Any]
) -> None:
    """One step of AdamW in one pass over fp32 tensors of one shape; `step`, a scalar, is counted up."""
    beta1, beta2 = group["betas"]
    adamw(
        [weight],
        [grad],
        [mean],
        [square],
        [],
        [step],
        fused=True,
        amsgrad=False,
        maximize=False,
        beta1=beta1,
        beta2=beta2,
        lr=group["lr"],
        weight_decay=group["weight_decay"],
        eps=group["eps"],
    )
