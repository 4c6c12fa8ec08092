"""What models do to their logits behind the vocabulary matrix."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Head = Callable[[Tensor], Tensor]


def _same(logits: Tensor) -> Tensor:
    return logits


def _plain(config: Any) -> Head:
    return _same


def _soft_cap(config: Any) -> Head:
    cap = getattr(config, "final_logit_softcapping", None)
    return (lambda logits: torch.tanh(logits / cap) * cap) if cap else _plain(config)


def _divided(config: Any) -> Head:
    return lambda logits: logits / config.logits_scaling


def _multiplied(config: Any) -> Head:
    return lambda logits: logits * config.logit_scale


# What a family does to its logits behind the vocabulary matrix, by the model_type of its config. A contract test
# compares each with the family's own `model(...).logits`.
POST_HEAD: dict[str, Callable[[Any], Head]] = {
    "qwen2": _plain,
    "qwen3": _plain,
    "llama": _plain,
    "mistral": _plain,
    "phi3": _plain,
    "smollm3": _plain,
    "olmo2": _plain,
    "gemma": _plain,
    "gemma2": _soft_cap,
    "gemma3_text": _soft_cap,
    "granite": _divided,
    "cohere": _multiplied,
}
