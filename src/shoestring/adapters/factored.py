"""Adapters by modules of our own: a linear layer with two factors next to it, and the handle over them.

A new adapter is a `Factored` subclass (its tensors and `factors`) and a settings class that calls `attach_factored`.
Sampling, training, saving, export and merging need nothing more.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from shoestring.adapters.base import BaseHandle, tensor_ids
from shoestring.adapters.export import save_own
from shoestring.adapters.placement import is_transposed
from shoestring.model.adapter import Factors

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Factored(nn.Module):
    """A linear layer whose update is a product of two thin matrices: y = W x + b + scaling up (down x).

    Trained parameters are fp32; frozen frames are buffers in the type of the base weight.
    """

    def __init__(self, base_layer: nn.Module):
        super().__init__()
        self.base_layer = base_layer
        self.on = True

    def factors(self) -> Factors:
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        y = self.base_layer(x)
        if not self.on:
            return y
        down, up, _, scaling = self.factors()
        return y + scaling * F.linear(F.linear(x, down.to(x.dtype)), up.to(x.dtype))


class Adapted(nn.Module):
    """A model with `Factored` modules in it, with the methods of a `PeftModel` that the package uses."""

    def __init__(self, model: PreTrainedModel):
        super().__init__()
        self.model = model

    def forward(self, *args: Any, **options: Any) -> Any:
        return self.model(*args, **options)

    def get_base_model(self) -> PreTrainedModel:
        return self.model

    def modules_by_name(self) -> dict[str, Factored]:
        return {name: module for name, module in self.model.named_modules() if isinstance(module, Factored)}

    @contextmanager
    def disable_adapter(self) -> Iterator[None]:
        modules = self.modules_by_name().values()
        for module in modules:
            module.on = False
        try:
            yield
        finally:
            for module in modules:
                module.on = True

    @torch.no_grad()
    def merge_and_unload(self) -> PreTrainedModel:
        """Add every update to its base weight, in fp32 and rounded once, and put the plain layers back."""
        for name, module in self.modules_by_name().items():
            down, up, _, scaling = module.factors()
            update = scaling * (up.float() @ down.float())
            linear: Any = module.base_layer
            weight = linear.weight
            assert weight.is_floating_point(), "4-bit weights are merged as the weights they were made from"
            weight.data = (weight.float() + (update.T if is_transposed(linear) else update)).to(weight.dtype)
            self.model.set_submodule(name, linear)
        return self.model


class FactoredHandle(BaseHandle):
    def factors(self, linear: nn.Module) -> Factors | None:
        return linear.factors() if isinstance(linear, Factored) else None

    def save(self, folder: Path) -> None:
        """Write a LoRA that does the same, for PEFT and other engines, and our own settings and state next to it."""
        self.export_lora(folder)
        save_own(self, folder)


def attach_factored(
    settings: Any, model: PreTrainedModel, seed: int, make: Callable[[nn.Module, Tensor], Factored]
) -> FactoredHandle:
    """Replace the linear modules that the settings choose by what `make` gives for each and its weight, [out, in]."""
    own = tensor_ids(model)
    model.requires_grad_(False)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for name, linear in settings.targets(model).items():
            model.set_submodule(name, make(linear, weight_of(linear)))
    return FactoredHandle(settings, model, Adapted(model), own)


def weight_of(linear: Any) -> Tensor:
    """A linear layer's weight, [out, in]; that of a 4-bit layer in fp32."""
    if type(linear).__name__ == "Linear4bit":
        from bitsandbytes.functional import dequantize_4bit

        return dequantize_4bit(linear.weight.data, linear.weight.quant_state).float()
    return linear.weight.data.T if is_transposed(linear) else linear.weight.data
