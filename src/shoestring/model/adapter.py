"""An adapter as the engine sees it: factors for each linear layer, and what an update asks of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from torch import Tensor, nn

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Factors(NamedTuple):
    """The update of one linear layer as two thin matrices: y += scaling up (down x)."""

    down: Tensor
    """[r, in]"""
    up: Tensor
    """[out, r]"""
    down_trains: bool = True
    """Whether `down` gets a gradient. If not, no layer keeps its input for it."""
    scaling: float = 1.0


class AdapterState(NamedTuple):
    """Everything that an adapter is: its tensors (frozen ones too) by name, and its numbers, fit for JSON."""

    tensors: Mapping[str, Tensor]
    values: Mapping[str, Any]


class Handle(Protocol):
    """An adapter that is attached to a model. `shoestring.adapters.base.BaseHandle` has defaults."""

    settings: Any
    """The settings that it was attached from; None for a PEFT folder from elsewhere."""
    base: PreTrainedModel
    model: nn.Module
    """`base` with the adapter in it; `base` itself where its own weights are trained."""
    updates: int
    """Updates that were applied."""
    off_is_reference: bool
    """Whether the model with the adapter off is the model before training."""
    starts_as_base: bool
    """Whether the first step's policy is the base model."""
    wants_prompts: bool
    """Whether `prepare` looks at prompts."""

    def factors(self, linear: nn.Module) -> Factors | None:
        """The factors of an adapted linear layer; None for an update that has no such form.

        A factor is a parameter itself or is computed from parameters. The engine calls this again whenever it needs
        the values, and once more, with gradient, to pull gradients back.
        """
        ...

    def off(self) -> AbstractContextManager[None]:
        """Turn the adapter off inside."""
        ...

    def parameters(self) -> dict[str, nn.Parameter]:
        """The trained parameters by name, in the model's order."""
        ...

    def state(self) -> AdapterState: ...

    def load_state(self, state: AdapterState) -> None: ...

    def moving(self) -> AdapterState:
        """The part of the state that an update changes and that is no trained parameter."""
        ...

    def load_moving(self, state: AdapterState) -> None: ...

    def prepare(self, policy: Any, prompts: Sequence[Any]) -> None:
        """Set first values that depend on data; called once, before a new run's first step."""
        ...

    def after_backward(self, step: int) -> None:
        """Look at the gradients of an update, which are complete; `step` counts updates from 0."""
        ...

    def after_step(self, step: int) -> bool:
        """Act on an applied update whose gradients are still there; return whether other parameters are trained now."""
        ...

    def penalty(self) -> Tensor | None:
        """A term of the loss that depends on the parameters alone; None without one."""
        ...

    def save(self, folder: Path) -> None:
        """Write the adapter, in PEFT's own format where it has one."""
        ...

    def export_lora(self, folder: Path) -> None:
        """Write a LoRA in PEFT's format that gives the same logits; raise `ConfigError` where there is none."""
        ...

    def merged(self) -> PreTrainedModel:
        """The base model with the adapter added into its weights; the handle is of no use afterwards."""
        ...
