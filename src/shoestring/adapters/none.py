"""No adapter: all weights of the model are trained."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal

from shoestring.adapters.base import AdapterCost, BaseHandle
from shoestring.config.settings import Settings
from shoestring.errors import ConfigError
from shoestring.model.adapter import Handle

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from shoestring.model.shapes import Shape


class NoAdapter(Settings):
    """Train all weights of the model, in the type they are loaded in; the run ends with a model folder."""

    name: Literal["none"] = "none"
    zero_is_base: ClassVar[bool] = False

    def cost(self, shape: Shape) -> AdapterCost:
        every = frozenset(linear.name for linear in shape.linears)
        return AdapterCost(shape.parameters, 0, shape.layers, every, whole=True, off_is_reference=False)

    def attach(self, model: PreTrainedModel, seed: int) -> Handle:
        if not all(parameter.is_floating_point() for parameter in model.parameters()):
            raise ConfigError(
                'adapter.name is "none"',
                "the model's weights are quantised, and a step is smaller than what lies between two of their values",
                'use adapter.name = "lora", or a model that is not quantised',
            )
        model.requires_grad_(True)
        return WholeModel(self, model, model, frozenset(id(buffer) for buffer in model.buffers()))


class WholeModel(BaseHandle):
    """The model's own weights."""

    off_is_reference = False

    @contextmanager
    def off(self) -> Iterator[None]:
        raise ConfigError("there is no adapter", "the reference is the model without it", "set objective.beta = 0")
        yield

    def save(self, folder: Path) -> None:
        self.base.save_pretrained(folder)

    def export_lora(self, folder: Path) -> None:
        raise ConfigError('adapter.name is "none"', "whole weights are no LoRA", "use the model folder")

    def merged(self) -> PreTrainedModel:
        return self.base
