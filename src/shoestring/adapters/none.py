"""No adapter: all weights of the model are trained."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from shoestring.adapters.base import Trained
from shoestring.config.settings import Settings
from shoestring.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from shoestring.model.shapes import Shape


class NoAdapter(Settings):
    """Trains all weights of the model, in the type they are loaded in; the run ends with a model folder."""

    name: Literal["none"] = "none"

    def trained(self, shape: Shape) -> Trained:
        return Trained(
            shape.parameters, 0, shape.layers, frozenset(linear.name for linear in shape.linears), whole=True
        )

    def attach(self, model: PreTrainedModel) -> PreTrainedModel:
        if not all(parameter.is_floating_point() for parameter in model.parameters()):
            raise ConfigError(
                'adapter.name is "none"',
                "the model's weights are quantised, and a step is smaller than what lies between two of their values",
                'use adapter.name = "lora", or a model that is not quantised',
            )
        return model.requires_grad_(True)
