"""Adapters by PEFT: how a config is attached, and the handle over a `PeftModel`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from shoestring.adapters.base import BaseHandle, tensor_ids
from shoestring.adapters.export import save_own
from shoestring.adapters.placement import is_transposed
from shoestring.errors import ConfigError
from shoestring.model.adapter import Factors
from shoestring.model.structure import quiet_peft

if TYPE_CHECKING:
    from peft import PeftConfig, PeftModel
    from transformers import PreTrainedModel

    from shoestring.model.adapter import Handle


class PeftHandle(BaseHandle):
    """An adapter in a `PeftModel`. Plain LoRA has factors: its own parameters."""

    def __init__(self, settings: Any, model: PeftModel, own: frozenset[int]):
        super().__init__(settings, model.get_base_model(), model, own)  # type: ignore[arg-type]

    def factors(self, linear: nn.Module) -> Factors | None:
        return plain_lora(linear)

    def save(self, folder: Path) -> None:
        """Write PEFT's files; next to them our own settings and state, if plain LoRA is not all there is."""
        with quiet_peft():
            self.model.save_pretrained(folder)  # type: ignore[operator]
        if self.settings is not None and self.settings.name != "lora":
            save_own(self, folder)


def attached(model: PreTrainedModel, config: PeftConfig, seed: int) -> tuple[PeftModel, frozenset[int]]:
    """The model with a PEFT adapter, and the ids of the tensors that it had before.

    Random numbers come from `seed` alone. Raises `ConfigError` for what PEFT refuses, and for an initialiser that
    changes the base weights: the reference of the KL term and the checkpoints rely on them.
    """
    from peft import get_peft_model

    if hasattr(config, "fan_in_fan_out"):
        config.fan_in_fan_out = any(is_transposed(module) for module in model.modules())  # type: ignore[attr-defined]
    own, weights = tensor_ids(model), list(model.parameters())
    before = _versions(weights)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            with quiet_peft():
                adapted = get_peft_model(model, config)
        except (ValueError, TypeError, NotImplementedError) as error:
            name = str(getattr(config.peft_type, "value", config.peft_type))
            raise ConfigError(
                f"the adapter is PEFT's {name}", f"PEFT refuses it: {error}", "change the adapter's settings"
            ) from error
    if _versions(weights) != before:
        raise ConfigError(
            "the adapter's first values are taken out of the base weights",
            "the model with the adapter off would no longer be the model before training",
            "use an initialiser that leaves the base weights as they are",
        )
    return adapted, own  # type: ignore[return-value]


def _versions(weights: Sequence[Tensor]) -> list[tuple[int, int]]:
    """The address and the version of each weight: one that has been written to has another."""
    return [(weight.data_ptr(), weight._version) for weight in weights]


def plain_lora(module: Any) -> Factors | None:
    """The matrices of a module that holds one plain LoRA and nothing else; None for any other."""
    names = list(getattr(module, "active_adapters", []))
    plain = type(module).__name__ in ("Linear", "Linear4bit") and hasattr(module, "lora_A")
    if not plain or len(names) != 1 or getattr(module, "lora_variant", {}) or module.merged:
        return None
    name = names[0]
    if name not in module.lora_A or module.lora_B[name].bias is not None:
        return None
    up = module.lora_B[name].weight
    return Factors(module.lora_A[name].weight, up, scaling=module.scaling[name])


class InInputType(nn.Linear):
    """A linear layer whose weight is cast to its input's type, where PEFT would cast the input to the weight's."""

    def forward(self, input: Tensor) -> Tensor:
        return nn.functional.linear(input, self.weight.to(input.dtype))


def used_in_input_type(model: nn.Module) -> None:
    """Have every LoRA matrix of a PEFT model used in the type of its input. Names and weights stay as they are."""
    from peft.tuners.lora import LoraLayer

    for layer in model.modules():
        if isinstance(layer, LoraLayer):
            layer.cast_input_dtype_enabled = False
            for thin in (*layer.lora_A.values(), *layer.lora_B.values()):
                assert type(thin) in (nn.Linear, InInputType), f"a LoRA matrix is a {type(thin).__name__}"
                thin.__class__ = InInputType


def from_folder(folder: Path, base: PreTrainedModel, attach: Callable[[Any], Handle]) -> Handle:
    """The adapter that `save` wrote: by `attach` from its own settings, else as PEFT reads it."""
    from peft import PeftModel

    from shoestring.adapters.export import read_own

    own = read_own(folder)
    if own is not None:
        settings, state = own
        handle = attach(settings)
        handle.load_state(state)
        return handle
    ids = tensor_ids(base)
    with quiet_peft():
        return PeftHandle(None, PeftModel.from_pretrained(base, str(folder)), ids)  # type: ignore[arg-type]
