"""The adapter seam: what is trained, such as small weights beside a frozen base model."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

from torch import nn

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from shoestring.model.shapes import Shape


class Adapter(Protocol):
    """Says which weights are trained, and adds them where they are new. A frozen settings object."""

    name: str

    def trained(self, shape: Shape) -> Trained:
        """What would be trained of a model of that shape, for the memory plan."""
        ...

    def attach(self, model: PreTrainedModel) -> nn.Module:
        """The model with the adapter in it: a `peft.PeftModel` whose base weights are frozen; or `model` itself, if
        weights of its own are what is trained."""
        ...


@dataclass(frozen=True)
class Trained:
    """What an adapter (or none) trains, as the memory plan needs to know it."""

    parameters: int
    first_layer: int
    """Layers from this one up carry gradient."""
    adapted_layers: int
    """Layers that hold trained weights."""
    modules: frozenset[str] = field(default_factory=frozenset)
    """Linear layers whose input is kept for the gradient of a trained weight."""
    rank: int = 0
    layer_parameters: int = 0
    """Trained parameters of one adapted layer, which are cast to the model's type where theirs differs."""
    whole: bool = False
    """All weights of the model are trained, in its own type."""
