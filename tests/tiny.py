"""Tiny random models of every family, and policies over them, for tests that need weights but no skill."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

import shoestring
from shoestring.adapters import ADAPTERS
from shoestring.model.policy import Policy
from shoestring.types import Problem, Prompt

TINY = Path(shoestring.__file__).parent / "tiny" / "model"
VOCAB = 261

COMMON: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "pad_token_id": 256,
    "bos_token_id": None,
    "eos_token_id": 257,
}

# What each family needs beside that; a window shorter than the texts makes sliding layers do something.
FAMILIES: dict[str, dict[str, Any]] = {
    "qwen2": {},
    "qwen3": {"head_dim": 8},
    "llama": {},
    "mistral": {"sliding_window": 6},
    "phi3": {"sliding_window": None},
    "smollm3": {},
    "olmo2": {},
    "gemma": {"head_dim": 8},
    "gemma2": {"head_dim": 8, "sliding_window": 6, "final_logit_softcapping": 0.5, "query_pre_attn_scalar": 8},
    "gemma3_text": {"head_dim": 8, "sliding_window": 6, "final_logit_softcapping": 0.5, "query_pre_attn_scalar": 8},
    "granite": {"logits_scaling": 3.0},
    "cohere": {"logit_scale": 0.25},
}


def random_model(
    family: str = "qwen2", seed: int = 0, dtype: torch.dtype = torch.float32, sizes: dict[str, Any] | None = None
) -> Any:
    """A random model; its weights are larger than usual, so that its distributions are far from flat."""
    torch.manual_seed(seed)
    config = AutoConfig.for_model(family, **{**COMMON, **FAMILIES.get(family, {}), **(sizes or {})})
    model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(4)
    model.generation_config.eos_token_id = 257
    return model.eval()


def random_policy(
    family: str = "qwen2", *, adapter: dict[str, Any] | None = None, seed: int = 0, **options: Any
) -> Policy:
    """A policy over a random model with an adapter (LoRA unless named) whose weights are random, so that it does
    something."""
    base = random_model(family, seed, **options)
    base.requires_grad_(False)
    tokenizer = AutoTokenizer.from_pretrained(TINY)
    given = {"name": "lora", **(adapter or {})}
    if given["name"] == "lora":
        given = {"rank": 4, **given}
    handle = ADAPTERS[given["name"]](**given).attach(base, seed)
    handle.model.eval()
    _draw_on(handle.model, base.dtype)
    torch.manual_seed(seed + 1)
    with torch.no_grad():
        for name, parameter in handle.model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.2)
    return Policy(base, tokenizer, handle, family)


@torch.no_grad()
def _draw_on(model: Any, dtype: torch.dtype) -> None:
    """Draws LoRA's A as if the stream of the model's own random numbers had gone on: tests hold to these values."""
    for module in model.modules():
        if hasattr(module, "lora_A") and isinstance(module.lora_A, torch.nn.ModuleDict):
            a, b = module.lora_A["default"], module.lora_B["default"]
            torch.nn.Linear(a.in_features, a.out_features, bias=False)
            torch.nn.Linear(b.in_features, b.out_features, bias=False)
            drawn = torch.nn.init.kaiming_uniform_(torch.empty(a.weight.shape), a=5**0.5)
            a.weight.copy_(drawn.to(dtype))


def prompt(length: int, seed: int = 0, prefix: int = 0) -> Prompt:
    """A prompt of random ids with a forced prefix of random ids behind it."""
    generator = torch.Generator().manual_seed(seed)
    ids = tuple(torch.randint(0, 250, (length + prefix,), generator=generator).tolist())
    return Prompt(Problem(f"p{seed}", "?", "1", {}), ids, length)
