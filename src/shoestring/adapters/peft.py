"""Any adapter of PEFT by the name of its type, such as `type = "loha"`."""

from __future__ import annotations

import dataclasses
from functools import cache
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from shoestring.adapters.base import AdapterCost, tensor_ids
from shoestring.adapters.on_peft import PeftHandle, attached, plain_lora, used_in_input_type
from shoestring.adapters.placement import Layers, Modules, Placed
from shoestring.config.settings import Settings
from shoestring.errors import ConfigError, nearest
from shoestring.model.adapter import Handle
from shoestring.model.structure import quiet_peft

if TYPE_CHECKING:
    from peft import PeftConfig
    from transformers import PreTrainedModel

    from shoestring.model.shapes import Linear, Shape


class PeftSettings(Placed, Settings):
    """What every adapter wrapped from PEFT shares: a subclass says the config."""

    zero_is_base: ClassVar[bool] = True
    modules: Modules = "all-linear"
    layers: Layers = "all"

    def config(self, targets: dict[str, Any], seed: int) -> PeftConfig:
        """PEFT's config over the given targets."""
        raise NotImplementedError

    def cost(self, shape: Shape) -> AdapterCost:
        return _measured(type(self), self.model_dump_json(), shape)

    def attach(self, model: PreTrainedModel, seed: int) -> Handle:
        adapted, own = attached(model, self.config(self.peft_targets(model), seed), seed)
        if all(plain_lora(module) for module in adapted.modules() if hasattr(module, "base_layer")):
            used_in_input_type(adapted)
        return PeftHandle(self, adapted, own)


class Peft(PeftSettings):
    """The adapter that PEFT calls `type`, with `settings` as the fields of its config. Nothing is dropped out."""

    name: Literal["peft"] = "peft"
    zero_is_base: ClassVar[bool] = False
    type: str
    settings: dict[str, Any] = Field(default_factory=dict)

    def config(self, targets: dict[str, Any], seed: int) -> PeftConfig:
        from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING as KNOWN

        kinds = {str(kind.value).lower(): config for kind, config in KNOWN.items()}
        given = f'adapter.type is "{self.type}"'
        if self.type.lower() not in kinds:
            raise ConfigError(given, "PEFT has no adapter of that type", nearest(self.type.lower(), kinds))
        kind: Any = kinds[self.type.lower()]
        fields = {field.name for field in dataclasses.fields(kind)}
        if "target_modules" not in fields:
            raise ConfigError(given, "it adapts no linear layers", "use a type with target_modules")
        if "layers_to_transform" not in fields and self.layers != "all":
            raise ConfigError(given, "PEFT cannot place it in some layers only", 'write adapter.layers = "all"')
        for key in self.settings.keys() - fields:
            raise ConfigError(
                f"adapter.settings holds {key}", f"PEFT's {self.type} has no such field", nearest(key, fields)
            )
        quiet = {field: 0.0 for field in fields if field.endswith("dropout")}
        if any(self.settings.get(field) for field in quiet):
            raise ConfigError("a dropout is set", "it would part the sampler from the trainer", "leave it out")
        values = {**quiet, **{k: v for k, v in targets.items() if k in fields}, **self.settings}
        try:
            return kind(task_type="CAUSAL_LM", **values)
        except (ValueError, TypeError) as error:
            raise ConfigError(given, f"PEFT refuses its settings: {error}", "change adapter.settings") from error


# --- what it costs, without a model ---------------------------------------------------------------------------------


class _Layers(nn.Module):
    """The linear layers of a model of that shape, without values."""

    def __init__(self, shape: Shape, dtype: torch.dtype):
        super().__init__()
        self.config = SimpleNamespace(model_type="custom", tie_word_embeddings=False, to_dict=dict)

        def linear(one: Linear) -> nn.Linear:
            return nn.Linear(one.inputs, one.outputs, one.bias, device="meta", dtype=dtype)

        layers = ({one.name: linear(one) for one in shape.linears} for _ in range(shape.layers))
        self.layers = nn.ModuleList(nn.ModuleDict(layer) for layer in layers)


@cache
def _measured(kind: type[PeftSettings], values: str, shape: Shape) -> AdapterCost:
    """The cost of an adapter, counted on layers without values: the very modules that PEFT makes."""
    settings = kind.model_validate_json(values)
    linears, layers = settings.chosen(shape)
    names = [linear.name for linear in linears]
    found = {
        dtype.itemsize: _adapted(settings, shape, names, layers, dtype) for dtype in (torch.bfloat16, torch.float32)
    }
    model, own = found[4]
    trained = [p for p in model.parameters() if id(p) not in own and p.requires_grad]
    others = [t for t in [*model.parameters(), *model.buffers()] if id(t) not in own and not t.requires_grad]
    factors = [plain_lora(model.layers[layers[0]][name]) for name in names]  # type: ignore[index]
    plain = all(factors)
    kept = {size: [_kept(model, layers[0], names, rows) for rows in (1, 2)] for size, (model, _) in found.items()}
    count = sum(p.numel() for p in trained)
    return AdapterCost(
        count,
        layers[0],
        len(layers),
        frozenset(names),
        max(len(factor.down) for factor in factors if factor) if plain else 0,
        count // len(layers),
        down_trains=plain,
        slow="" if plain else "the adapter's update is no product of two thin matrices",
        frozen_floats=sum(t.numel() for t in others),
        kept_token={} if plain else {size: two - one for size, (one, two) in kept.items()},
        kept_layer={} if plain else {size: 2 * one - two for size, (one, two) in kept.items()},
    )


def _adapted(
    settings: PeftSettings, shape: Shape, names: list[str], layers: list[int], dtype: torch.dtype
) -> tuple[_Layers, frozenset[int]]:
    """Layers with the adapter in them, its weights in fp32, and the ids of the tensors that are not the adapter's."""
    from peft import inject_adapter_in_model

    model = _Layers(shape, dtype)
    own = tensor_ids(model)
    targets = {"target_modules": names, "layers_to_transform": layers, "layers_pattern": "layers"}
    with quiet_peft(), torch.random.fork_rng(devices=[]):
        inject_adapter_in_model(settings.config(targets, 0), model)
    for parameter in model.parameters():
        if id(parameter) in own:
            parameter.requires_grad_(False)
        else:
            parameter.data = parameter.data.float()
    return model, own


def _kept(model: _Layers, layer: int, names: list[str], rows: int) -> int:
    """Bytes that the adapted linear layers of one layer save of `rows` tokens for the backward pass."""
    own = {tensor.untyped_storage()._cdata for tensor in model.state_dict().values()}
    total = 0
    for name in names:
        module: Any = model.layers[layer][name]  # type: ignore[index]
        seen: dict[int, Tensor] = {}

        def pack(x: Tensor, seen: dict[int, Tensor] = seen) -> Tensor:
            seen[x.untyped_storage()._cdata] = x
            return x

        base = module.base_layer
        x = torch.empty(rows, base.in_features, device="meta", dtype=base.weight.dtype, requires_grad=True)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            module.to("meta")(x)
        total += sum(x.untyped_storage().nbytes() for place, x in seen.items() if place not in own)
    return total
