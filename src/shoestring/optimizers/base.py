"""The optimizer seam: settings that build a torch optimizer, and what the memory plan asks of them."""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import prod
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from shoestring.config.settings import Settings
from shoestring.errors import ConfigError

Role = Literal["A", "B", "weight"]
# What peft calls the two matrices of a LoRA product.
_A, _B = ".lora_A.", ".lora_B."


@dataclass(frozen=True)
class TrainedParameter:
    """A trained parameter, and what it is in the model."""

    name: str
    parameter: nn.Parameter
    role: Role = "weight"
    """A and B are the matrices of a LoRA product; "weight" is everything else."""
    partner: str | None = None
    """The name of the other matrix of the product."""

    @property
    def is_matrix(self) -> bool:
        """Whether it is a matrix of a decoder layer, and no embedding or head: layers are numbered in the names."""
        return self.parameter.ndim == 2 and any(part.isdigit() for part in self.name.split("."))


def trained_parameters(named: Mapping[str, nn.Parameter]) -> list[TrainedParameter]:
    """The parameters with their roles, which peft's names tell."""
    found = []
    for name, parameter in named.items():
        role: Role = "A" if _A in name else "B" if _B in name else "weight"
        partner = name.replace(_A, _B) if role == "A" else name.replace(_B, _A)
        found.append(
            TrainedParameter(name, parameter, role, partner if role != "weight" and partner in named else None)
        )
    return found


@dataclass(frozen=True)
class TrainedSizes:
    """The sizes of the trained parameters, for the memory plan."""

    matrices: Sequence[tuple[int, ...]]
    """Shapes of the matrices inside the decoder layers."""
    others: Sequence[tuple[int, ...]]
    """Shapes of all other parameters. Several parameters may stand in one shape where only their number counts."""
    itemsize: int
    """Bytes of a value of a parameter."""
    whole: bool
    """All weights of the model are trained."""
    gpu: bool

    @cached_property
    def parameters(self) -> int:
        return sum(map(prod, (*self.matrices, *self.others)))

    @cached_property
    def largest(self) -> int:
        """Values of the largest one."""
        return max(map(prod, (*self.matrices, *self.others)), default=1)


class OptimSettings(Settings):
    """Base of all optimizers' settings. Each also has the field `name` and says how it is built."""

    name: str
    lr: float = Field(default=3e-4, gt=0)
    weight_decay: float = Field(default=0.0, ge=0)
    warmup_steps: int = Field(default=5, ge=0)
    """Steps over which the rate rises linearly to `lr`."""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """What the rate does after that; the last two end at 0 with the run."""
    max_grad_norm: float = Field(default=1.0, gt=0)

    def build(self, parameters: Sequence[TrainedParameter]) -> torch.optim.Optimizer:
        """The optimizer of these parameters. A group's entry `lr_scale` multiplies the rate of the group."""
        raise NotImplementedError

    def check(self, device: torch.device) -> None:
        """Raise `ConfigError` if a package that the optimizer needs is not installed."""

    def check_trained(self, *, whole: bool) -> None:
        """Raise `ConfigError` if the optimizer is not made for what is trained: all weights of the model, or an
        adapter's."""

    def state_bytes(self, sizes: TrainedSizes) -> int:
        """Bytes of the state on the device. Step counters and lookup tables are left out."""
        raise NotImplementedError

    def step_bytes(self, sizes: TrainedSizes) -> int:
        """Bytes on the device that a step takes for its duration."""
        return 0

    def takes_no_memory(self, optimizer: torch.optim.Optimizer) -> bool:
        """Whether the next step takes no memory, so that it cannot run out half-way."""
        return False


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Set the rate of every group: `lr` times the group's `lr_scale`, if it has one."""
    for group in optimizer.param_groups:
        scaled = lr * group.get("lr_scale", 1.0)
        if isinstance(group["lr"], Tensor):  # torchao's
            group["lr"].fill_(scaled)
        else:
            group["lr"] = scaled


# --- the whole state ------------------------------------------------------------------------------------------------

# How torch carries a step out. A resumed run may lie on another device, so the optimizer's own choice stays.
_CARRIED_OUT = {"fused", "foreach", "capturable", "differentiable"}


def state_of(
    optimizer: torch.optim.Optimizer, parameters: Mapping[str, nn.Parameter]
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The whole state: its tensors by "parameter name:key" (not copied), and all of the rest, which JSON can hold.

    A quantised tensor is given as the plain ones that it consists of, such as "exp_avg.codes".
    """
    own = optimizer.state_dict()
    called = {id(parameter): name for name, parameter in parameters.items()}
    order = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    tensors: dict[str, Tensor] = {}
    values: dict[str, Any] = {"state": {}, "keyed": [], "groups": []}
    for key, state in own["state"].items():
        if isinstance(key, int):
            name, home = called[id(order[key])], order[key].device
            values["state"][name] = {part: _packed(f"{name}:{part}", state[part], tensors, home) for part in state}
        else:
            values["keyed"].append([key, _packed(f"keyed:{key}", state, tensors)])
    for number, group in enumerate(own["param_groups"]):
        rest = {key: value for key, value in group.items() if key != "params"}
        packed = {key: _packed(f"groups:{number}:{key}", value, tensors) for key, value in rest.items()}
        values["groups"].append({"params": [called[id(order[i])] for i in group["params"]], "settings": packed})
    other = {key: value for key, value in own.items() if key not in ("state", "param_groups")}
    values["other"] = {key: _packed(f"other:{key}", value, tensors) for key, value in other.items()}
    return tensors, values


def load_state(
    optimizer: torch.optim.Optimizer,
    parameters: Mapping[str, nn.Parameter],
    tensors: Mapping[str, Tensor],
    values: Mapping[str, Any],
) -> None:
    """Put a whole state back, with the types that its tensors have. Tensors that fit are written into, so that they
    need no new memory; state that was not there is gone."""
    if [group["params"] for group in values["groups"]] != _grouped(optimizer, parameters):
        raise ValueError("the optimizer's groups hold other weights")
    if values["other"]:
        other = {key: _unpacked(value, None, tensors) for key, value in values["other"].items()}
        optimizer.load_state_dict({**optimizer.state_dict(), **other})
    on_host, state = getattr(optimizer, "state_on_host", False), {}
    for group, saved in zip(optimizer.param_groups, values["groups"], strict=True):
        for key, value in saved["settings"].items():
            if key not in _CARRIED_OUT:
                group[key] = _unpacked(value, group.get(key), tensors)
        for name in saved["params"]:
            parameter, counted_on_device = parameters[name], group.get("fused") or group.get("capturable")
            there = optimizer.state.get(parameter, {})
            if name in values["state"]:
                state[parameter] = {}
            for key, value in values["state"].get(name, {}).items():
                host = on_host or (key == "step" and not counted_on_device)  # as torch has it
                places = torch.device("cpu") if host else parameter.device, parameter.device
                state[parameter][key] = _unpacked(value, there.get(key), tensors, places)
    for key, value in values["keyed"]:
        state[key] = _unpacked(value, optimizer.state.get(key), tensors)
    optimizer.state.clear()
    optimizer.state.update(state)


def _grouped(optimizer: torch.optim.Optimizer, parameters: Mapping[str, nn.Parameter]) -> list[list[str]]:
    """The names of the parameters of each group."""
    called = {id(parameter): name for name, parameter in parameters.items()}
    return [[called[id(parameter)] for parameter in group["params"]] for group in optimizer.param_groups]


def _packed(name: str, value: Any, tensors: dict[str, Tensor], home: torch.device | None = None) -> Any:
    """A value as JSON has it; its tensors go into `tensors`. `home` is where their parameter lies."""
    if isinstance(value, Tensor) and hasattr(value, "__tensor_flatten__"):
        parts, context = value.__tensor_flatten__()  # type: ignore[attr-defined]
        return {
            "quantised": f"{type(value).__module__}:{type(value).__qualname__}",
            "context": _packed(name, list(context), tensors),
            "parts": {part: _packed(f"{name}.{part}", getattr(value, part), tensors, home) for part in parts},
        }
    if isinstance(value, Tensor):
        tensors[name] = value.detach()
        known = home is not None and home.type != "cpu"  # where all lies on the host, the place says nothing
        return {"tensor": name, "on_host": value.device.type == "cpu" if known else None}
    if isinstance(value, torch.dtype):
        return {"dtype": str(value).removeprefix("torch.")}
    if isinstance(value, dict):
        return {
            "dict": [[_packed(name, k, tensors), _packed(f"{name}.{k}", v, tensors, home)] for k, v in value.items()]
        }
    if isinstance(value, list | tuple):
        kind = "list" if isinstance(value, list) else "tuple"
        return {kind: [_packed(f"{name}.{number}", item, tensors, home) for number, item in enumerate(value)]}
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise ConfigError(
        f"the optimizer's state holds a {type(value).__name__} ({name})",
        "a checkpoint has tensors, numbers and texts, in lists and dicts",
        "use another optimizer",
    )


def _unpacked(
    packed: Any, there: Any, tensors: Mapping[str, Tensor], places: tuple[torch.device, torch.device] | None = None
) -> Any:
    """The value; a tensor that is `there` and fits is written into. Of the places the first is for tensors that were
    saved where all lay on the host, the second for those of the device."""
    if not isinstance(packed, dict):
        return packed
    if "tensor" in packed:
        saved, host = tensors[packed["tensor"]], packed["on_host"]
        place = places[host is not None] if places and not host else torch.device("cpu")
        fits = isinstance(there, Tensor) and (there.shape, there.dtype, there.device) == (
            saved.shape,
            saved.dtype,
            place,
        )
        if not fits:
            return saved.to(place, copy=True)
        there.detach().copy_(saved)
        return there
    if "quantised" in packed:
        cls = _quantised(packed["quantised"])
        same = there if type(there) is cls else None
        items = packed["parts"].items()
        parts = {name: _unpacked(part, getattr(same, name, None), tensors, places) for name, part in items}
        if same is not None and all(parts[name] is getattr(same, name) for name in parts):
            return same
        return cls.__tensor_unflatten__(parts, _unpacked(packed["context"], None, tensors))
    if "dtype" in packed:
        return getattr(torch, packed["dtype"])
    if "dict" in packed:
        old = there if isinstance(there, dict) else {}
        keyed = ((_unpacked(key, None, tensors), value) for key, value in packed["dict"])
        return {key: _unpacked(value, old.get(key), tensors, places) for key, value in keyed}
    [(kind, items)] = packed.items()
    old = there if isinstance(there, list | tuple) and len(there) == len(items) else [None] * len(items)
    found = [_unpacked(item, before, tensors, places) for item, before in zip(items, old, strict=True)]
    return found if kind == "list" else tuple(found)


def _quantised(name: str) -> Any:
    """A class of torchao's: no file names any other to load."""
    module, _, cls = name.partition(":")
    if not module.startswith("torchao."):
        raise ValueError(f"{name} is no class of torchao")
    return getattr(importlib.import_module(module), cls)
