"""Stochastic gradient descent with momentum, as torch's SGD."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from shoestring.optimizers.base import OptimSettings, TrainedParameter, TrainedSizes
from shoestring.optimizers.rounding import TILE_BYTES, PerWeight, put, tiles


class SGD(OptimSettings):
    """SGD with momentum: 4 bytes a trained weight, none without momentum. Steps are as large as the gradient."""

    name: Literal["sgd"] = "sgd"  # type: ignore[assignment]
    lr: float = Field(default=0.1, gt=0)
    momentum: float = Field(default=0.9, ge=0, lt=1)

    def build(self, parameters: Sequence[TrainedParameter]) -> torch.optim.Optimizer:
        return RoundedSGD(
            [each.parameter for each in parameters],
            lr=self.lr,
            momentum=self.momentum,
            weight_decay=self.weight_decay,
        )

    def state_bytes(self, sizes: TrainedSizes) -> int:
        return 4 * sizes.parameters if self.momentum else 0

    def step_bytes(self, sizes: TrainedSizes) -> int:
        return min(TILE_BYTES, 8 * sizes.largest)


class RoundedSGD(PerWeight):
    """SGD: v <- momentum v + (g + decay w), w <- w - lr v, in fp32. New bf16 weights are rounded by chance."""

    def update(self, parameter: nn.Parameter, grad: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
        if group["momentum"] and not state:
            state["momentum"] = torch.zeros_like(parameter, dtype=torch.float32)
        for weight, slope, *rest in tiles(parameter, grad, *state.values()):
            new = weight.to(torch.float32, copy=True)
            change = slope.float().add(new, alpha=group["weight_decay"])
            if rest:
                change = rest[0].mul_(group["momentum"]).add_(change)
            put(weight, new.add_(change, alpha=-group["lr"]))
