"""Which path a model, with an adapter in it, takes, by config.json and settings alone, before anything loads.

The memory plan goes by these functions. `shoestring.model.fast.decoder.unsupported` looks at the loaded modules by the
same rules, and a run compares the two after its first step.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from shoestring.model.traits import unknown_layers
from shoestring.model.trees import TREE_MODELS

if TYPE_CHECKING:
    from shoestring.model.load import ModelSettings
    from shoestring.model.shapes import Shape


def fast_path(shape: Shape, model: ModelSettings, adapter: Any, *, gpu: bool = False) -> str:
    """Why a model with an adapter is not sampled by our own decode step and trained by our own layers; "" if it is.

    `adapter` are its settings. All weights of a model can be sampled so, but train through transformers' layers.
    """
    reason = unknown_layers(shape.traits, shape.head_dim, gpu=gpu)
    if not reason and shape.traits.quantised:
        reason = f'its weights are quantised by "{shape.traits.quantised}"'
    return reason or adapter.cost(shape).slow


def plain_attention(shape: Shape, model: ModelSettings) -> str:
    """Why training cannot put its own attention into a model's layers; "" if it can.

    It can where the attention is torch's own and looks back over all tokens, or over Mistral's window.
    """
    if shape.traits.model_type not in TREE_MODELS:
        return f'models of type "{shape.traits.model_type}" are not among {", ".join(TREE_MODELS)}'
    if not shape.traits.full_attention:
        return "some layers attend in another way"
    if model.attn_implementation not in (None, "sdpa"):
        return f'model.attn_implementation is "{model.attn_implementation}"'
    return ""
