"""What a config.json says of the arithmetic inside a model's layers, and which of it our own code knows."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from typing import Any, NamedTuple

# Families whose layer is: norm, q k v, rotary embedding, attention, o, norm, SwiGLU.
MODELS = ("qwen2", "qwen3", "llama", "mistral")
# Rotary embeddings whose frequencies do not change with the length of the text.
_ROPE = ("default", "linear", "llama3", "yarn")
# Sizes of a head that the GPU kernels take.
_HEADS = (16, 32, 64, 128, 256)


class Traits(NamedTuple):
    model_type: str = ""
    """The config's own, even where `model.family` has its layers read as another's."""
    activation: str = "silu"
    rope: str = "default"
    rotary_share: float = 1.0
    """The part of each head that the rotary embedding turns."""
    full_attention: bool = True
    """Whether no layer is of another kind, such as a sliding one."""
    window: bool = False
    """Whether attention reaches back over a window only, in every layer (Mistral)."""
    quantised: str = ""
    """The method by which the stored weights are quantised."""


def traits_of(config: Mapping[str, Any]) -> Traits:
    """Read a config.json's content, or `to_dict()` of a loaded config."""
    model_type = str(config.get("model_type") or "")
    rope: Any = config.get("rope_parameters") or config.get("rope_scaling") or {}
    kinds = set(config.get("layer_types") or ["full_attention"])
    if not config.get("layer_types") and config.get("use_sliding_window"):
        kinds.add("sliding_attention")
    quantised: Any = config.get("quantization_config") or {}
    return Traits(
        model_type,
        str(config.get("hidden_act") or config.get("hidden_activation") or "silu"),
        str(rope.get("rope_type") or rope.get("type") or "default"),
        float(config.get("partial_rotary_factor") or rope.get("partial_rotary_factor") or 1.0),
        kinds == {"full_attention"},
        model_type == "mistral" and config.get("sliding_window") is not None,
        str(quantised.get("quant_method") or "") if isinstance(quantised, Mapping) else "",
    )


def unknown_layers(traits: Traits, head_dim: int, *, gpu: bool) -> str:
    """Why our own layers and decode step do not know the layers of a model; empty if they do."""
    if traits.model_type not in MODELS:
        return f'models of type "{traits.model_type}" are not among {", ".join(MODELS)}'
    if traits.rope not in _ROPE:
        return f'its rotary embedding is of type "{traits.rope}"'
    if traits.activation not in ("silu", "swish"):
        return f'its activation is "{traits.activation}"'
    if traits.rotary_share != 1.0:
        return "its rotary embedding turns a part of each head only"
    if gpu and not has_triton():
        return "Triton is not installed"
    if gpu and head_dim not in _HEADS:
        return f"its heads have {head_dim} places"
    return ""


def has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None
