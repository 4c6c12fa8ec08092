"""Lion (arXiv 2302.06675): every weight moves by the same amount, in the direction of a sign."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from shoestring.optimizers.base import OptimSettings, TrainedParameter, TrainedSizes
from shoestring.optimizers.rounding import TILE_BYTES, PerWeight, put, tiles


class Lion(OptimSettings):
    """Lion: 4 bytes a trained weight. Its rate is 3 to 10 times less than AdamW's, since every step is a full one."""

    name: Literal["lion"] = "lion"  # type: ignore[assignment]
    lr: float = Field(default=1e-4, gt=0)
    betas: tuple[float, float] = (0.9, 0.99)

    def build(self, parameters: Sequence[TrainedParameter]) -> torch.optim.Optimizer:
        return RoundedLion(
            [each.parameter for each in parameters], lr=self.lr, betas=self.betas, weight_decay=self.weight_decay
        )

    def state_bytes(self, sizes: TrainedSizes) -> int:
        return 4 * sizes.parameters

    def step_bytes(self, sizes: TrainedSizes) -> int:
        return min(TILE_BYTES, 8 * sizes.largest)


class RoundedLion(PerWeight):
    """Lion: w <- w - lr (sign(b1 m + (1 - b1) g) + decay w), then m <- b2 m + (1 - b2) g, in fp32. New bf16 weights are
    rounded by chance."""

    def update(self, parameter: nn.Parameter, grad: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
        if not state:
            state["momentum"] = torch.zeros_like(parameter, dtype=torch.float32)
        beta1, beta2 = group["betas"]
        for weight, slope, momentum in tiles(parameter, grad, state["momentum"]):
            new, slope = weight.to(torch.float32, copy=True), slope.float()
            new.mul_(1 - group["lr"] * group["weight_decay"])
            new.add_(momentum.lerp(slope, 1 - beta1).sign_(), alpha=-group["lr"])
            put(weight, new)
            momentum.lerp_(slope, 1 - beta2)
