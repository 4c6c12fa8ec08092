"""The adapter seam: what is trained, such as small weights next to a frozen base model.

An adapter is a settings class (`Adapter`) whose `attach` returns a handle. `BaseHandle` implements every method of the
handle; a new adapter overrides the few in which it differs. Two ready ones exist: `factored.FactoredHandle` for modules
of our own, and `on_peft.PeftHandle` for PEFT's.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn

from shoestring.model.adapter import AdapterState, Factors, Handle

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from shoestring.model.shapes import Shape


class Adapter(Protocol):
    """Say which weights are trained, and add them where they are new. A frozen settings object."""

    name: str

    def cost(self, shape: Shape) -> AdapterCost:
        """Return what would be trained and held of a model of that shape, for the memory plan."""
        ...

    def attach(self, model: PreTrainedModel, seed: int) -> Handle:
        """Put the adapter into a model whose weights are frozen; `seed` decides every random first value."""
        ...


@dataclass(frozen=True)
class AdapterCost:
    """What an adapter (or none) trains and holds, as the memory plan needs to know it."""

    parameters: int
    first_layer: int
    """Layers from this one up carry gradient."""
    adapted_layers: int
    """Layers that hold trained weights."""
    modules: frozenset[str] = field(default_factory=frozenset)
    """Linear layers that are adapted."""
    rank: int = 0
    """Rows of `down` of each adapted linear layer."""
    layer_parameters: int = 0
    """Trained parameters of one adapted layer, which are cast to the model's type where theirs differs."""
    whole: bool = False
    """All weights of the model are trained, in its own type."""
    down_trains: bool = True
    """Whether the input of an adapted linear layer is kept for the gradient of `down`."""
    off_is_reference: bool = True
    slow: str = ""
    """Why the update of some linear layer has no factors; empty if all have them."""
    computed: int = 0
    """Numbers of the trained factors that are computed from parameters and not parameters themselves."""
    frozen_values: int = 0
    """Numbers that the adapter holds and does not train, in the model's type."""
    frozen_floats: int = 0
    """The same, in fp32."""
    kept_token: Mapping[int, int] = field(default_factory=dict)
    """Bytes that a slow adapter keeps of a token in one layer, by the bytes of the model's type."""
    kept_layer: Mapping[int, int] = field(default_factory=dict)
    """Bytes that a slow adapter keeps in one layer whatever the number of tokens."""

    def trained(self, itemsize: int) -> int:
        """Bytes of the trained weights; adapters hold theirs in fp32."""
        return self.parameters * (itemsize if self.whole else 4)

    def frozen(self, itemsize: int) -> int:
        """Bytes of the frozen weights that the adapter adds."""
        return self.frozen_values * itemsize + 4 * self.frozen_floats


class BaseHandle:
    """Defaults of `Handle`. State is every tensor of `model` that `base` did not have before."""

    off_is_reference = True
    starts_as_base = True
    wants_prompts = False

    def __init__(self, settings: Any, base: PreTrainedModel, model: nn.Module, own: frozenset[int]):
        """`own` are the ids of the tensors that `base` had before the adapter came."""
        self.settings = settings
        self.base = base
        self.model = model
        self.updates = 0
        self._own = own

    def factors(self, linear: nn.Module) -> Factors | None:
        return None

    @contextmanager
    def off(self) -> Iterator[None]:
        with self.model.disable_adapter():  # type: ignore[operator]
            yield

    def parameters(self) -> dict[str, nn.Parameter]:
        return {name: p for name, p in self.model.named_parameters() if p.requires_grad}

    def tensors(self) -> dict[str, Tensor]:
        """The adapter's parameters and buffers, trained or frozen, by their names in `model`."""
        named = [*self.model.named_parameters(), *self.model.named_buffers()]
        return {name: tensor for name, tensor in named if id(tensor) not in self._own}

    def state(self) -> AdapterState:
        moving = self.moving()
        return AdapterState({**self.tensors(), **moving.tensors}, moving.values)

    def load_state(self, state: AdapterState) -> None:
        own = self.tensors()
        if not own.keys() <= state.tensors.keys():
            raise KeyError("the saved adapter has other tensors than the settings ask for")
        with torch.no_grad():
            for name, tensor in own.items():
                tensor.copy_(state.tensors[name])
        self.load_moving(state)

    def moving(self) -> AdapterState:
        return AdapterState({}, {"updates": self.updates})

    def load_moving(self, state: AdapterState) -> None:
        self.updates = state.values.get("updates", 0)

    def prepare(self, policy: Any, prompts: Sequence[Any]) -> None:
        """Nothing depends on data."""

    def after_backward(self, step: int) -> None:
        """Nothing looks at gradients."""

    def after_step(self, step: int) -> bool:
        return False

    def penalty(self) -> Tensor | None:
        return None

    def save(self, folder: Path) -> None:
        raise NotImplementedError

    def export_lora(self, folder: Path) -> None:
        from shoestring.adapters.export import save_as_lora

        save_as_lora(self, folder)

    def merged(self) -> PreTrainedModel:
        return self.model.merge_and_unload()  # type: ignore[operator]


def tensor_ids(model: nn.Module) -> frozenset[int]:
    """The ids of a model's parameters and buffers."""
    return frozenset(id(tensor) for tensor in [*model.parameters(), *model.buffers()])
