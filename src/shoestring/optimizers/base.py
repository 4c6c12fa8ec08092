"""What the optimizers share."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn


def moments(parameters: Mapping[str, nn.Parameter], optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The optimizer's own tensors by "parameter name:what"."""
    return {
        f"{name}:{part}": tensor
        for name, parameter in parameters.items()
        for key, value in optimizer.state.get(parameter, {}).items()
        for part, tensor in _parts(key, value).items()
    }


def _parts(key: str, value: Tensor) -> dict[str, Tensor]:
    """A tensor, or the plain tensors that a quantised one is made of, such as "exp_avg.codes"."""
    if not hasattr(value, "__tensor_flatten__"):
        return {key: value.detach()}
    names, _ = value.__tensor_flatten__()  # type: ignore[attr-defined]
    return {part: t for name in names for part, t in _parts(f"{key}.{name}", getattr(value, name)).items()}


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    for group in optimizer.param_groups:
        if isinstance(group["lr"], Tensor):  # torchao's
            group["lr"].fill_(lr)
        else:
            group["lr"] = lr
