"""Where an adapter goes: the settings `modules` and `layers`, which most adapters share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BeforeValidator, Field
from torch import nn

from shoestring.config.settings import as_tuple
from shoestring.errors import ConfigError, nearest
from shoestring.model.structure import chosen_layers, decoder_layers

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from shoestring.model.shapes import Linear, Shape

Modules = Annotated[
    Literal["all-linear"] | Annotated[tuple[str, ...], Field(min_length=1)],
    BeforeValidator(lambda value: value if value == "all-linear" else as_tuple(value)),
]
"""Which linear layers inside the decoder layers, by the end of their name, such as ["q_proj", "v_proj"]."""
Layers = Literal["all", "last-third"] | int | tuple[int, ...]
""""all", "last-third", a number n (the last n), or a list of layer numbers from 0."""


class Placed:
    """Methods over the settings `modules` and `layers`."""

    modules: Any
    layers: Any

    def chosen(self, shape: Shape) -> tuple[list[Linear], list[int]]:
        """The adapted linear layers of a decoder layer, and the numbers of the adapted decoder layers."""
        modules = self.module_names(sorted(linear.name for linear in shape.linears))
        linears = [linear for linear in shape.linears if linear.name in modules]
        return linears, chosen_layers(self.layers, shape.layers)

    def module_names(self, names: Sequence[str]) -> list[str]:
        """Those of a layer's linear modules that are adapted."""
        modules = list(names) if self.modules == "all-linear" else list(self.modules)
        for module in modules:
            if module not in names:
                raise ConfigError(
                    f'adapter.modules holds "{module}"',
                    "no layer has a linear module of that name",
                    nearest(module, names),
                )
        return modules

    def targets(self, model: PreTrainedModel) -> dict[str, nn.Module]:
        """The linear modules of a model that are adapted, by their full name."""
        path, layers = decoder_layers(model)
        modules = self.module_names(linear_names(layers))
        return {
            f"{path}.{number}.{name}": module
            for number in chosen_layers(self.layers, len(layers))
            for name, module in layers[number].named_modules()
            if is_linear(module) and name.split(".")[-1] in modules
        }

    def peft_targets(self, model: PreTrainedModel) -> dict[str, Any]:
        """The same as the arguments of a PEFT config."""
        path, layers = decoder_layers(model)
        return {
            "target_modules": self.module_names(linear_names(layers)),
            "layers_to_transform": chosen_layers(self.layers, len(layers)),
            "layers_pattern": path.split(".")[-1],
        }


def linear_names(layers: nn.Module) -> list[str]:
    """The last part of the names of all linear modules, sorted."""
    return sorted({name.split(".")[-1] for name, module in layers.named_modules() if is_linear(module)})


def is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) or is_transposed(module)


def is_transposed(module: nn.Module) -> bool:
    """Whether it is GPT-2's own linear layer, whose weight is [in, out]."""
    return type(module).__name__ == "Conv1D"
