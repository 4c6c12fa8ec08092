"""Adapters as files: as a LoRA that any engine reads, and as our own settings and state next to it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from shoestring.errors import ConfigError
from shoestring.model.adapter import AdapterState, Factors, Handle
from shoestring.model.structure import quiet_peft

SETTINGS, STATE = "adapter_settings.json", "adapter_state.safetensors"


def save_own(handle: Handle, folder: Path) -> None:
    """Write an adapter's settings and its whole state."""
    folder.mkdir(parents=True, exist_ok=True)
    state = handle.state()
    values = {"adapter": handle.settings.model_dump(mode="json"), "values": dict(state.values)}
    (folder / SETTINGS).write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
    save_file(on_host(state.tensors), folder / STATE)


def read_own(folder: Path) -> tuple[dict[str, Any], AdapterState] | None:
    """The settings and the state that `save_own` wrote; None where it did not."""
    if not (folder / SETTINGS).is_file():
        return None
    values = json.loads((folder / SETTINGS).read_text(encoding="utf-8"))
    return values["adapter"], AdapterState(load_file(folder / STATE), values["values"])


def on_host(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}


def save_as_lora(handle: Handle, folder: Path) -> None:
    """Write the adapter's factors as a LoRA of PEFT's format: A = down, B = scaling up, alpha = rank.

    `PeftModel.from_pretrained` and other engines read it. Raises `ConfigError` where a layer has no factors.
    """
    from peft import LoraConfig

    found = adapted_factors(handle)
    ranks = {name: len(factors.down) for name, factors in found.items()}
    most = max(ranks.values())
    own = {name: rank for name, rank in ranks.items() if rank != most}
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=most,
        lora_alpha=most,
        target_modules=list(found),
        rank_pattern=dict(own),
        alpha_pattern=dict(own),
        base_model_name_or_path=base_name(handle),
        inference_mode=True,
        fan_in_fan_out=any(type(module).__name__ == "Conv1D" for module in handle.model.modules()),
    )
    folder.mkdir(parents=True, exist_ok=True)
    with quiet_peft():
        config.save_pretrained(str(folder))
    tensors = {}
    for name, factors in found.items():
        tensors[f"base_model.model.{name}.lora_A.weight"] = factors.down.float()
        tensors[f"base_model.model.{name}.lora_B.weight"] = factors.up.float() * factors.scaling
    save_file({name: tensor.clone() for name, tensor in on_host(tensors).items()}, folder / "adapter_model.safetensors")


def base_name(handle: Handle) -> str | None:
    """The base model's place, so that the adapter finds it from any folder."""
    configs = getattr(handle.model, "peft_config", {})
    name = configs["default"].base_model_name_or_path if "default" in configs else handle.base.config.name_or_path
    return name or None


@torch.no_grad()
def adapted_factors(handle: Handle) -> dict[str, Factors]:
    """The factors of every adapted linear module, by its full name in the base model."""
    found = {}
    for name, module in adapted_modules(handle.base).items():
        factors = handle.factors(module)
        if factors is None:
            raise ConfigError(
                f"the adapter is {getattr(handle.settings, 'name', 'of unknown settings')}",
                "its update is no product of two thin matrices, so no LoRA does the same",
                "merge it instead",
            )
        found[name] = factors
    return found


def adapted_modules(base: nn.Module) -> dict[str, nn.Module]:
    """The modules that an adapter has put around a linear layer, by their full name."""
    return {name: module for name, module in base.named_modules() if hasattr(module, "base_layer")}
