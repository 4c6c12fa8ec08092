"""LoRA+ (arXiv 2402.12354): AdamW with a higher rate for the matrices B of LoRA."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from pydantic import Field

from shoestring.errors import ConfigError
from shoestring.optimizers.adamw import AdamW, in_fp32
from shoestring.optimizers.base import TrainedParameter


class LoRAPlus(AdamW):
    """AdamW with a rate of `ratio` times `lr` for the matrices B of LoRA: 8 bytes a trained weight."""

    name: Literal["lora-plus"] = "lora-plus"  # type: ignore[assignment]
    ratio: float = Field(default=16.0, gt=0)
    """The rate of B, divided by that of A and of everything else."""

    def build(self, parameters: Sequence[TrainedParameter]) -> torch.optim.Optimizer:
        self.check_trained(whole=not any(each.role == "B" for each in parameters))
        groups = [
            {"params": [each.parameter for each in parameters if each.role != "B"]},
            {
                "params": [each.parameter for each in parameters if each.role == "B"],
                "lr": self.lr * self.ratio,
                "lr_scale": self.ratio,
            },
        ]
        return in_fp32([group for group in groups if group["params"]], **self._options)

    def check_trained(self, *, whole: bool) -> None:
        if whole:
            raise ConfigError(
                f'optim.name is "{self.name}"',
                "its higher rate is for the matrices B of LoRA, and none is trained",
                'use "adamw", or adapter.name = "lora"',
            )
