"""AdamW with its state in 8 bits (arXiv 2110.02861), by torchao."""

from __future__ import annotations

import importlib.util
import shutil
from collections.abc import Sequence
from typing import Any, Literal

import torch
from pydantic import Field
from torch import nn

from shoestring.config.extras import need
from shoestring.errors import ConfigError
from shoestring.optimizers.base import OptimSettings, TrainedParameter, TrainedSizes

# Values of a quantised moment that share one fp32 scale.
_BLOCK = 256


class AdamW8bit(OptimSettings):
    """AdamW with moments in 8 bits: 2 bytes a trained weight. It needs the extra `full` (torchao)."""

    name: Literal["adamw-8bit"] = "adamw-8bit"  # type: ignore[assignment]
    betas: tuple[float, float] = (0.9, 0.99)
    eps: float = Field(default=1e-8, gt=0)

    def build(self, parameters: Sequence[TrainedParameter]) -> torch.optim.Optimizer:
        return in_8_bits(
            [each.parameter for each in parameters],
            lr=self.lr,
            betas=self.betas,
            eps=self.eps,
            weight_decay=self.weight_decay,
        )

    def check(self, device: torch.device) -> None:
        given = f'optim.name is "{self.name}"'
        need("torchao", "full", given)
        if device.type == "cuda":  # where torchao compiles it
            if importlib.util.find_spec("triton") is None:
                raise ConfigError(
                    given, "on a GPU that needs the package triton", 'run: pip install triton, or use "adamw"'
                )
            if not any(map(shutil.which, ("cc", "gcc", "clang"))):
                raise ConfigError(given, "on a GPU that needs a C compiler", 'install gcc, or use "adamw"')

    def state_bytes(self, sizes: TrainedSizes) -> int:
        """That of weights of 4096 values or more whose number is a multiple of 256."""
        return int((2 + 2 * 4 / _BLOCK) * sizes.parameters)

    def step_bytes(self, sizes: TrainedSizes) -> int:
        return 8 * sizes.largest


def in_8_bits(parameters: Sequence[nn.Parameter], **options: Any) -> torch.optim.Optimizer:
    """torchao's 8-bit AdamW: moments in blocks of 256 with one scale each, fp32 arithmetic, bf16 weights rounded by
    chance. The moments of a weight under 4096 values, or of a number of them that is no multiple of 256, are of the
    weight's type.

    On a GPU torchao compiles it at the first step, for half a minute. A step then has temporaries of 8 bytes for each
    value of the largest weight; without compiling, of 57."""
    from torchao.optim import AdamW8bit

    class Eager(AdamW8bit):
        """Not compiled: for a CPU that takes ten seconds for each shape of weight, and a C++ compiler."""

        @torch.compiler.set_stance("force_eager")
        def step(self, closure: None = None) -> None:
            super().step(closure)

    compiled = all(parameter.is_cuda for parameter in parameters)
    return (AdamW8bit if compiled else Eager)(parameters, **options, bf16_stochastic_round=True)
