"""A model's shape, read from its config alone: how many layers, which linear layers they hold, how many parameters.

Nothing here imports torch, transformers or peft, so that a run's memory can be told before anything is loaded.
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from shoestring.errors import ConfigError, nearest
from shoestring.model.load import Source, locate
from shoestring.model.traits import Traits, traits_of


@dataclass(frozen=True)
class Linear:
    """One linear layer of a decoder layer, as the model's code names it ("q_proj"; "qkv_proj" where it is fused)."""

    name: str
    inputs: int
    outputs: int
    bias: bool = False

    @property
    def parameters(self) -> int:
        return self.inputs * self.outputs + self.outputs * self.bias


@dataclass(frozen=True)
class Shape:
    """The sizes of a decoder-only model; of a model for pictures and text, those of its text part."""

    family: str
    """Its `model_type`."""
    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    tied: bool
    """Whether the head is the embedding itself."""
    linears: tuple[Linear, ...]
    """Those of one decoder layer, in the order of the model's modules."""
    layer_norms: int
    """Parameters of one layer that are in no linear layer."""
    other: int
    """Parameters outside the layers, the embedding and the head."""
    context: int | None
    """The most tokens it was made for."""
    traits: Traits = field(default_factory=Traits, compare=False)
    """What decides whether our own layers know it."""

    @property
    def layer_parameters(self) -> int:
        """Of one decoder layer."""
        return sum(linear.parameters for linear in self.linears) + self.layer_norms

    @property
    def embedding(self) -> int:
        """Parameters of the embedding, V H."""
        return self.vocab * self.hidden

    @property
    def head(self) -> int:
        """Parameters of the head that are not the embedding's."""
        return 0 if self.tied else self.vocab * self.hidden

    @property
    def linear_parameters(self) -> int:
        """Weights and biases of the linear layers of all decoder layers."""
        return self.layers * sum(linear.parameters for linear in self.linears)

    @property
    def parameters(self) -> int:
        """All of them; tied ones count once."""
        return self.layers * self.layer_parameters + self.embedding + self.head + self.other


@dataclass(frozen=True)
class Family:
    """How the models of one `model_type` are built, and what transformers takes for keys that a config leaves out."""

    context: int
    tied: bool = False
    kv_heads: int | None = None
    """None: as many as heads."""
    head_dim: int | None = None
    """None: hidden / heads."""
    sizes: Mapping[str, int] = field(default_factory=dict)
    """Sizes that may be left out; the others must be given."""
    attention_bias: Literal["never", "qkv", "config"] = "config"
    """On which linear layers of the attention; "config": all four if `attention_bias` says so."""
    mlp_bias: bool = False
    """Whether `mlp_bias` is read at all."""
    fused: bool = False
    """One linear layer for q, k and v, and one for gate and up."""
    norms: int = 2
    """Norms of width hidden in one layer."""
    qk_norms: Literal["none", "head", "width"] = "none"
    """Norms of q and k: over each head, or over all heads at once."""
    wide_norms: bool = False
    """Whether a norm's weight multiplies fp32 numbers."""
    eager: bool = False
    """Whether attention is written out, since it caps its logits."""
    post: bool = False
    """Whether logits are changed behind the vocabulary matrix, as published configs have it."""


# The configs of published Gemma 3 models leave out the sizes that they share with the 2B one.
_GEMMA3_SIZES = {
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "num_hidden_layers": 26,
    "num_attention_heads": 8,
    "vocab_size": 262_208,
}

FAMILIES: dict[str, Family] = {
    "qwen2": Family(32768, kv_heads=32, attention_bias="qkv"),
    "qwen3": Family(32768, kv_heads=32, head_dim=128, qk_norms="head"),
    "llama": Family(2048, mlp_bias=True),
    "mistral": Family(131_072, kv_heads=8, attention_bias="never"),
    "gemma": Family(8192, tied=True, kv_heads=16, head_dim=256, wide_norms=True),
    "gemma2": Family(8192, tied=True, kv_heads=4, head_dim=256, norms=4, wide_norms=True, eager=True, post=True),
    "gemma3_text": Family(
        131_072, tied=True, kv_heads=4, head_dim=256, norms=4, qk_norms="head", wide_norms=True, sizes=_GEMMA3_SIZES
    ),
    "phi3": Family(4096, attention_bias="never", fused=True),
    "smollm3": Family(32768, tied=True, kv_heads=4, mlp_bias=True),
    "olmo2": Family(2048, qk_norms="width", wide_norms=True),
    "granite": Family(2048, mlp_bias=True, post=True),
}

# GGUF names an architecture; transformers names it otherwise only here.
_OF_GGUF = {"gemma3": "gemma3_text"}
_GGUF_KEYS = {
    "hidden_size": "embedding_length",
    "intermediate_size": "feed_forward_length",
    "num_hidden_layers": "block_count",
    "num_attention_heads": "attention.head_count",
    "num_key_value_heads": "attention.head_count_kv",
    "head_dim": "attention.key_length",
    "max_position_embeddings": "context_length",
    "vocab_size": "vocab_size",
}


def read_shape(name: str, *, family: str | None = None, revision: str | None = None) -> Shape:
    """The shape of the model that `model.name` names; of a run or an adapter, that of its base model.

    `family` reads the config as if it had that `model_type`; `revision` is for hub ids. Raises `ConfigError` where no
    config is found, or where it cannot be read.
    """
    source = locate(name)
    config = _gguf_config(source, name) if source.gguf_file else _json_config(source, name, revision)
    return shape_of(config, name=name, family=family)


def shape_of(config: Mapping[str, Any], *, name: str = "", family: str | None = None) -> Shape:
    """The shape that a config.json's content describes; `name` is for messages, `family` as for `read_shape`."""
    config = _text_part(config, family)
    model_type = config.get("model_type") if family is None else family
    known = _family(model_type, name, given=family is not None)
    return _shape(str(model_type), known, _Reader(config, name))


def _text_part(config: Mapping[str, Any], family: str | None) -> Mapping[str, Any]:
    text = config.get("text_config")
    if not isinstance(text, Mapping) or (family is None and str(text.get("model_type")) not in FAMILIES):
        return config
    # The whole model's setting decides, whatever its text part says.
    return {**text, "tie_word_embeddings": config.get("tie_word_embeddings", True)}


def _family(model_type: Any, name: str, given: bool) -> Family:
    if isinstance(model_type, str) and model_type in FAMILIES:
        return FAMILIES[model_type]
    if given:
        why = "the layer shapes of that family are not known"
        raise ConfigError(f'model.family is "{model_type}"', why, nearest(str(model_type), FAMILIES))
    if model_type is None:
        why = "its config names no model_type"
    else:
        why = f'its model_type is "{model_type}", whose layer shapes are not known'
    write = 'write model.family = "llama" if its layers are those of a Llama, or leave out the memory setting'
    raise ConfigError(_model(name), why, write)


def _shape(model_type: str, family: Family, read: _Reader) -> Shape:
    hidden, heads = read.size("hidden_size", family), read.size("num_attention_heads", family)
    head_dim = read.integer("head_dim") or family.head_dim or max(hidden // heads, 1)
    kv_default = heads if read.is_null("num_key_value_heads") else family.kv_heads or heads
    kv_heads = read.integer("num_key_value_heads") or kv_default
    intermediate = read.size("intermediate_size", family)
    attention = _attention(family, hidden, heads * head_dim, kv_heads * head_dim, read.flag("attention_bias"))
    mlp = _mlp(family, hidden, intermediate, family.mlp_bias and read.flag("mlp_bias"))
    qk_norms = {"none": 0, "head": 2 * head_dim, "width": (heads + kv_heads) * head_dim}[family.qk_norms]
    return Shape(
        family=model_type,
        hidden=hidden,
        intermediate=intermediate,
        layers=read.size("num_hidden_layers", family),
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        vocab=read.size("vocab_size", family),
        tied=read.flag("tie_word_embeddings", family.tied),
        linears=attention + mlp,
        layer_norms=family.norms * hidden + qk_norms,
        other=hidden,
        context=read.integer("max_position_embeddings") or family.context,
        traits=traits_of(read.config),
    )


def _attention(family: Family, hidden: int, q: int, kv: int, configured: bool) -> tuple[Linear, ...]:
    """The attention's linear layers; `q` and `kv` are the widths of all query heads and of all key heads."""
    if family.fused:
        return Linear("o_proj", q, hidden), Linear("qkv_proj", hidden, q + 2 * kv)
    every = family.attention_bias == "config" and configured
    bias = every or family.attention_bias == "qkv"
    return (
        Linear("q_proj", hidden, q, bias),
        Linear("k_proj", hidden, kv, bias),
        Linear("v_proj", hidden, kv, bias),
        Linear("o_proj", q, hidden, every),
    )


def _mlp(family: Family, hidden: int, intermediate: int, bias: bool) -> tuple[Linear, ...]:
    down = Linear("down_proj", intermediate, hidden, bias)
    if family.fused:
        return Linear("gate_up_proj", hidden, 2 * intermediate, bias), down
    return Linear("gate_proj", hidden, intermediate, bias), Linear("up_proj", hidden, intermediate, bias), down


@dataclass(frozen=True)
class _Reader:
    """Takes checked values out of a config; each method raises `ConfigError` naming the key."""

    config: Mapping[str, Any]
    name: str

    def is_null(self, key: str) -> bool:
        """Whether the key is there, with nothing in it."""
        return key in self.config and self.config[key] is None

    def integer(self, key: str) -> int | None:
        value = self.config.get(key)
        if value is None or (type(value) is int and value > 0):
            return value
        raise self._wrong(f"its {key} is {json.dumps(value, default=str)}", f"write a whole number above 0 as {key}")

    def size(self, key: str, family: Family) -> int:
        """A size that must be known: the config's, else the family's."""
        value = self.integer(key) or family.sizes.get(key)
        if value is None:
            raise self._wrong(f"its config has no {key}", f"write {key} into it")
        return value

    def flag(self, key: str, default: bool = False) -> bool:
        value = self.config.get(key)
        if value is None:
            return default
        if isinstance(value, bool):
            return value
        raise self._wrong(f"its {key} is {json.dumps(value, default=str)}", f"write true or false as {key}")

    def _wrong(self, why: str, write: str) -> ConfigError:
        return ConfigError(_model(self.name), why, f"{write}, or leave out the memory setting")


def _model(name: str) -> str:
    return f'model is "{name}"' if name else "a model's config was given"


def _json_config(source: Source, name: str, revision: str | None) -> Mapping[str, Any]:
    path = Path(source.path) / "config.json"
    if not path.is_file():
        path = _from_hub(source.path, name, revision)
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise _unreadable(name, f"its config.json cannot be read ({_first_line(error)})") from None
    if not isinstance(config, dict):
        raise _unreadable(name, "its config.json holds no JSON object")
    return config


def _from_hub(repository: str, name: str, revision: str | None) -> Path:
    """Where a hub model's config.json lies on this machine, once it is fetched; HF_HUB_OFFLINE forbids fetching."""
    import huggingface_hub

    try:
        cached = huggingface_hub.try_to_load_from_cache(repository, "config.json", revision=revision)
        if isinstance(cached, str):
            return Path(cached)
        return Path(huggingface_hub.hf_hub_download(repository, "config.json", revision=revision))
    except Exception as error:  # a bad id, no network, no such repository and no permission are as many kinds
        why = f"its config.json is not on this machine and could not be fetched ({_first_line(error)})"
        raise ConfigError(_model(name), why, "give a folder that holds config.json") from None


def _gguf_config(source: Source, name: str) -> Mapping[str, Any]:
    """What the file's metadata says, under the names that config.json has for it."""
    if importlib.util.find_spec("gguf") is None:
        raise ConfigError(_model(name), "reading GGUF needs the package gguf", "run: pip install gguf")
    import gguf

    try:
        reader = gguf.GGUFReader(Path(source.path) / str(source.gguf_file))
        values = {key: entry.contents() for key, entry in reader.fields.items() if not key.startswith("tokenizer.")}
    except Exception as error:  # the reader checks little: a broken file ends in any kind of error
        raise _unreadable(name, f"its GGUF file cannot be read ({_first_line(error)})") from None
    architecture = str(values.get("general.architecture"))
    found = {key: values.get(f"{architecture}.{there}") for key, there in _GGUF_KEYS.items()}
    config = {key: value for key, value in found.items() if value is not None}
    tokens = reader.fields.get("tokenizer.ggml.tokens")
    if tokens is not None:
        config.setdefault("vocab_size", len(tokens.data))
    tied = all(tensor.name != "output.weight" for tensor in reader.tensors)
    return {"model_type": _OF_GGUF.get(architecture, architecture), "tie_word_embeddings": tied, **config}


def _unreadable(name: str, why: str) -> ConfigError:
    return ConfigError(_model(name), why, "fix the file, or leave out the memory setting")


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__).rstrip(".")
