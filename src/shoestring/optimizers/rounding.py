"""Optimizers of our own: they change one weight after the other, in tiles, and round bf16 weights by chance.

Near 0.02 the neighbours of a bf16 number are 1.2e-4 away, so a step of 1e-6 that is rounded to the nearest is lost.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

TILE = 2**22
"""Values that are updated at once: each of the few temporaries, in fp32 or int32, takes 16 MiB."""
TILE_BYTES = 2**25
"""What these temporaries take."""


class PerWeight(torch.optim.Optimizer):
    """Calls `update` for each weight that has a gradient.

    Rounding by chance draws from the device's own generator: seed it before each step to get the same steps again.
    """

    state_on_host = False
    """Whether the state lies in the host's memory, wherever the weights lie."""

    def __init__(self, parameters: Any, **options: Any):
        super().__init__(parameters, options)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self.update(parameter, parameter.grad, self.state[parameter], group)

    def update(self, parameter: nn.Parameter, grad: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
        """Change a weight by its gradient, its state (empty at first) and the settings of its group."""
        raise NotImplementedError


def tiles(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Views of tensors of one size, cut alike."""
    return zip(*(tensor.detach().view(-1).split(TILE) for tensor in tensors), strict=True)


def put(weight: Tensor, new: Tensor) -> None:
    """Write fp32 values into a weight, rounded by chance where it is bf16. Overwrites `new`."""
    weight.copy_(rounded_by_chance(new) if weight.dtype == torch.bfloat16 else new)


def rounded_by_chance(values: Tensor) -> Tensor:
    """fp32 values as bf16: each becomes one of its two neighbours, the nearer the likelier, so that the mean is the
    value (stochastic rounding, arXiv 2010.06192). Overwrites `values`.

    A bf16 number is the upper half of an fp32 one. A random number added to the lower half carries into the upper with
    just the chance wanted.

    >>> rounded_by_chance(torch.tensor([0.5, -0.375]))
    tensor([ 0.5000, -0.3750], dtype=torch.bfloat16)
    """
    bits = values.view(torch.int32)
    bits += torch.randint(0, 2**16, bits.shape, dtype=torch.int32, device=bits.device)
    bits &= -(2**16)
    return values.to(torch.bfloat16)
