"""From hidden states to log-probs of chosen tokens, without ever holding the logits of all of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.utils.checkpoint import checkpoint

# Elements of a logits tile: 2^25 are 128 MiB in fp32. Below 2^22 a backward pass keeps them instead of recomputing.
_TILE = 2**25
_KEPT = 2**22

Head = Callable[[Tensor], Tensor]


def _plain(config: Any) -> Head:
    return lambda logits: logits


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


def selected_logprobs(
    logits_of: Callable[[Tensor], Tensor],
    hidden: Float[Tensor, "N H"],
    target: Int[Tensor, " N"],
    temperature: float,
    vocab_size: int,
) -> Float[Tensor, " N"]:
    """log-softmax(logits / temperature) at the targets, in fp32, in tiles of rows.

    `logits_of` maps hidden rows [n, H] to logits [n, V]. With gradient, tiles are recomputed in the backward pass,
    unless all of them together are small.
    """
    if hidden.shape[0] == 0:
        return hidden.new_zeros(0, dtype=torch.float32)

    def tile(rows: Tensor, wanted: Tensor) -> Tensor:
        return gathered_logprobs(logits_of(rows), wanted, temperature)

    if hidden.shape[0] * vocab_size <= _KEPT:
        return tile(hidden, target)
    size = max(_TILE // vocab_size, 16)
    parts = [
        checkpoint(tile, rows, wanted, use_reentrant=False) if torch.is_grad_enabled() else tile(rows, wanted)
        for rows, wanted in zip(hidden.split(size), target.split(size), strict=True)
    ]
    return torch.cat(parts)


def gathered_logprobs(
    logits: Float[Tensor, "N V"], target: Int[Tensor, " N"], temperature: float
) -> Float[Tensor, " N"]:
    """The slow, obvious form: all logits at hand."""
    scaled = logits.float() / temperature
    return scaled.gather(-1, target[:, None]).squeeze(-1) - scaled.logsumexp(-1)
