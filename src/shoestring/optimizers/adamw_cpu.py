"""AdamW with its state in the host's memory (as ZeRO-Offload does, arXiv 2101.06840)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from shoestring.optimizers.adamw import update_in_place
from shoestring.optimizers.base import OptimSettings, TrainedParameter, TrainedSizes
from shoestring.optimizers.rounding import TILE_BYTES, PerWeight


class AdamWCpu(OptimSettings):
    """AdamW on the host, with an fp32 copy of the weights: no bytes on the card, 12 a trained weight on the host."""

    name: Literal["adamw-cpu"] = "adamw-cpu"  # type: ignore[assignment]
    betas: tuple[float, float] = (0.9, 0.99)
    eps: float = Field(default=1e-8, gt=0)

    def build(self, parameters: Sequence[TrainedParameter]) -> torch.optim.Optimizer:
        return HostAdamW(
            [each.parameter for each in parameters],
            lr=self.lr,
            betas=self.betas,
            eps=self.eps,
            weight_decay=self.weight_decay,
        )

    def state_bytes(self, sizes: TrainedSizes) -> int:
        return 0

    def step_bytes(self, sizes: TrainedSizes) -> int:
        return TILE_BYTES if sizes.whole and sizes.gpu else 0


class HostAdamW(PerWeight):
    """AdamW that runs on the host: its state, an fp32 copy of the weights included, lies there, and a step brings each
    gradient down and each new weight up. Nothing is rounded by chance.

    torchao's CPUOffloadOptimizer copies gradients down while the backward pass makes them, so before they are clipped,
    and keeps weights and moments in the type of the weights.
    """

    state_on_host = True

    def update(self, parameter: nn.Parameter, grad: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
        if not state:
            state["step"] = torch.zeros(())
            state["weight"] = parameter.detach().to("cpu", torch.float32, copy=True)
            state["exp_avg"] = torch.zeros_like(state["weight"])
            state["exp_avg_sq"] = torch.zeros_like(state["weight"])
        slope = grad.to("cpu").float()
        update_in_place(state["weight"], slope, state["exp_avg"], state["exp_avg_sq"], state["step"], group)
        parameter.copy_(state["weight"])
