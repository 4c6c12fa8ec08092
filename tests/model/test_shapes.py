"""Shapes read from configs: equal to the models that transformers builds from them, and what is refused and how."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import gguf
import huggingface_hub
import numpy as np
import pytest
import torch
from safetensors import safe_open
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from shoestring import ConfigError
from shoestring.model.shapes import FAMILIES, Linear, Shape, read_shape, shape_of
from shoestring.model.structure import decoder_layers
from tiny import TINY

SIZES: dict[str, Any] = {
    "hidden_size": 60,
    "intermediate_size": 59,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "vocab_size": 101,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GEMMA3 = {"model_type": "gemma3_text", "num_hidden_layers": 2, "hidden_size": 40, "intermediate_size": 90}
QWEN2_1B: dict[str, Any] = {
    "model_type": "qwen2",
    "hidden_size": 1536,
    "intermediate_size": 8960,
    "num_hidden_layers": 28,
    "num_attention_heads": 12,
    "num_key_value_heads": 2,
    "vocab_size": 151_936,
    "max_position_embeddings": 131_072,
    "tie_word_embeddings": True,
}
QWEN2_7B = QWEN2_1B | {
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "vocab_size": 152_064,
    "tie_word_embeddings": False,
}

# What each config adds to SIZES: biases and widths as they come, and what transformers takes where a key is left out.
EXTRAS: dict[str, dict[str, Any]] = {
    "as transformers takes them": {},
    "untied": {"tie_word_embeddings": False, "num_key_value_heads": 3},
    "tied": {"tie_word_embeddings": True, "num_key_value_heads": 1, "max_position_embeddings": 77},
    "biases": {"attention_bias": True, "mlp_bias": True, "num_key_value_heads": 2},
    "attention biases": {"attention_bias": True, "num_key_value_heads": 2},
    "wide heads": {"head_dim": 22, "num_key_value_heads": 3},
    "wide heads and biases": {"head_dim": 22, "attention_bias": True, "mlp_bias": True, "num_key_value_heads": 6},
}


def built(config: dict[str, Any]) -> Any:
    """The model that transformers makes of a config, without memory for its weights."""
    rest = {key: value for key, value in config.items() if key != "model_type"}
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(AutoConfig.for_model(config["model_type"], **rest))


def linears(layer: nn.Module) -> tuple[Linear, ...]:
    return tuple(
        Linear(name.split(".")[-1], module.in_features, module.out_features, module.bias is not None)
        for name, module in layer.named_modules()
        if isinstance(module, nn.Linear)
    )


def count(module: nn.Module) -> int:
    """Parameters of a module; tied ones count once."""
    return sum(parameter.numel() for parameter in module.parameters())


def assert_is_the_shape_of(shape: Shape, model: Any) -> None:
    layers = decoder_layers(model)[1]
    config = model.config
    assert [linears(layer) for layer in layers] == [shape.linears] * shape.layers
    assert [count(layer) for layer in layers] == [shape.layer_parameters] * shape.layers
    assert shape.parameters == count(model)
    assert shape.embedding == model.get_input_embeddings().weight.numel()
    assert shape.tied == (model.get_input_embeddings().weight is model.get_output_embeddings().weight)
    assert shape.head == (0 if shape.tied else model.get_output_embeddings().weight.numel())
    assert shape.linear_parameters == sum(linear.parameters for linear in linears(layers))
    assert shape.layer_norms == shape.layer_parameters - sum(linear.parameters for linear in shape.linears)
    assert shape.other == count(model) - shape.embedding - shape.head - count(layers)
    assert (shape.family, shape.heads, shape.kv_heads, shape.head_dim, shape.context) == (
        config.model_type,
        config.num_attention_heads,
        config.num_key_value_heads,
        layers[0].self_attn.head_dim,  # type: ignore[union-attr]
        config.max_position_embeddings,
    )
    assert (shape.hidden, shape.intermediate, shape.layers, shape.vocab) == (
        config.hidden_size,
        config.intermediate_size,
        config.num_hidden_layers,
        config.vocab_size,
    )


@pytest.mark.parametrize("extra", EXTRAS)
@pytest.mark.parametrize("family", FAMILIES)
def test_the_shape_is_that_of_the_model_that_transformers_builds(family: str, extra: str) -> None:
    config = {"model_type": family, **SIZES, **EXTRAS[extra]}
    assert_is_the_shape_of(shape_of(config), built(config))


@pytest.mark.parametrize("family", ["qwen2", "qwen3", "llama", "phi3", "smollm3", "olmo2", "granite"])
def test_no_number_of_key_heads_means_as_many_as_heads(family: str) -> None:
    config = {"model_type": family, **SIZES, "num_key_value_heads": None}
    assert shape_of(config).kv_heads == 6
    assert_is_the_shape_of(shape_of(config), built(config))


def test_a_head_dim_of_null_is_the_hidden_size_by_the_heads() -> None:
    assert shape_of({"model_type": "llama", **SIZES, "head_dim": None}).head_dim == 10


def test_a_config_of_gemma3_may_leave_out_the_sizes_that_all_share() -> None:
    assert_is_the_shape_of(shape_of(GEMMA3), built(GEMMA3))
    assert_is_the_shape_of(shape_of({"model_type": "gemma3_text"}), built({"model_type": "gemma3_text"}))


@pytest.mark.parametrize("tied", [None, True, False])
def test_of_a_model_for_pictures_and_text_the_text_part_counts(tied: bool | None) -> None:
    whole = {"model_type": "gemma3", "text_config": GEMMA3} | ({} if tied is None else {"tie_word_embeddings": tied})
    shape = shape_of(whole)
    model = built(whole)
    pictures = count(model.model.vision_tower) + count(model.model.multi_modal_projector)
    assert shape.family == "gemma3_text"
    assert shape.tied is (tied is not False)
    assert shape.parameters == count(model) - pictures
    assert linears(model.model.language_model.layers[0]) == shape.linears


def test_a_text_part_of_an_unknown_family_is_passed_over() -> None:
    config = {"model_type": "llama", **SIZES, "text_config": {"model_type": "palm"}}
    assert shape_of(config) == shape_of({"model_type": "llama", **SIZES})
    assert shape_of(config | {"text_config": {"model_type": ["llama"]}}).family == "llama"


def test_qwen2_1_5b_and_7b_are_told_to_the_parameter() -> None:
    small, large = shape_of(QWEN2_1B), shape_of(QWEN2_7B)
    assert (small.parameters, small.layer_parameters, small.embedding) == (1_543_714_304, 46_797_824, 233_373_696)
    assert (small.head, small.head_dim, small.context) == (0, 128, 131_072)
    assert large.parameters == 7_615_616_512
    assert large.head == large.embedding == 152_064 * 3584


def test_the_embedded_model_has_as_many_parameters_as_its_file() -> None:
    with safe_open(TINY / "model.safetensors", "pt") as weights:
        stored = sum(math.prod(weights.get_slice(key).get_shape()) for key in weights.keys())  # noqa: SIM118
    assert read_shape("tiny").parameters == stored
    assert_is_the_shape_of(read_shape("tiny"), AutoModelForCausalLM.from_pretrained(TINY))


# What a name leads to.


def write_config(folder: str, content: Any) -> str:
    Path(folder).mkdir(parents=True)
    text = content if isinstance(content, str) else json.dumps(content)
    (Path(folder) / "config.json").write_text(text)
    return folder


def test_folders_runs_and_adapters_lead_to_the_base_models_config() -> None:
    write_config("base", QWEN2_1B)
    write_config("sft/model", QWEN2_7B)
    for run, config in {"run": 'model = "base"', "other": '[model]\nname = "base"'}.items():
        (Path(run) / "adapter").mkdir(parents=True)
        (Path(run) / "adapter" / "adapter_config.json").write_text("{}")
        (Path(run) / "config.toml").write_text(config)
    assert read_shape("base") == read_shape("run") == read_shape("other") == shape_of(QWEN2_1B)
    assert read_shape("sft") == shape_of(QWEN2_7B)


def write_gguf(path: str, architecture: str, metadata: dict[str, int], tokens: int, untied: bool = False) -> str:
    writer = gguf.GGUFWriter(path, architecture)
    for key, value in metadata.items():
        writer.add_uint32(f"{architecture}.{key}", value)
    if tokens:
        writer.add_token_list([str(token) for token in range(tokens)])
    for name in ["token_embd.weight"] + ["output.weight"] * untied:
        writer.add_tensor(name, np.zeros((2, 2), dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


GGUF_SIZES = {
    "block_count": 3,
    "embedding_length": 60,
    "feed_forward_length": 59,
    "attention.head_count": 6,
    "attention.head_count_kv": 2,
    "context_length": 96,
}


@pytest.mark.parametrize(("there", "here"), [("llama", "llama"), ("qwen2", "qwen2"), ("gemma3", "gemma3_text")])
@pytest.mark.parametrize("untied", [False, True])
def test_a_gguf_files_metadata_is_read_as_a_config(there: str, here: str, untied: bool) -> None:
    config = {
        "model_type": here,
        **SIZES,
        "num_key_value_heads": 2,
        "max_position_embeddings": 96,
        "tie_word_embeddings": not untied,
    }
    assert read_shape(write_gguf("a.gguf", there, GGUF_SIZES, 101, untied)) == shape_of(config)
    wide = GGUF_SIZES | {"attention.key_length": 16, "vocab_size": 104}
    assert read_shape(write_gguf("b.gguf", there, wide, 101, untied)) == shape_of(
        config | {"head_dim": 16, "vocab_size": 104}
    )


def test_a_gguf_file_that_is_none_or_lacks_a_key_is_told() -> None:
    Path("broken.gguf").write_bytes(b"GGUF and no more")
    Path("empty.gguf").touch()
    write_gguf("short.gguf", "llama", {key: GGUF_SIZES[key] for key in GGUF_SIZES if key != "block_count"}, 9)
    write_gguf("words.gguf", "llama", GGUF_SIZES, 0)
    write_gguf("other.gguf", "mamba", GGUF_SIZES, 9)
    for name, says in {
        "broken.gguf": "its GGUF file cannot be read",
        "empty.gguf": "its GGUF file cannot be read",
        "short.gguf": "its config has no num_hidden_layers",
        "words.gguf": "its config has no vocab_size",
        "other.gguf": 'its model_type is "mamba"',
    }.items():
        with pytest.raises(ConfigError, match=says):
            read_shape(name)
    assert read_shape("other.gguf", family="llama").layers == 3


def test_a_gguf_file_without_the_package_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    write_gguf("a.gguf", "llama", GGUF_SIZES, 9)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="pip install gguf"):
        read_shape("a.gguf")


def test_a_hub_models_config_comes_from_the_cache_or_is_fetched(monkeypatch: pytest.MonkeyPatch) -> None:
    path = str(Path(write_config("cached", QWEN2_1B)) / "config.json")
    asked: list[Any] = []
    monkeypatch.setenv("SHOESTRING_MODELS", "none")

    def answer(found: Any) -> Any:
        return lambda *given, revision=None: asked.append((*given, revision)) or found

    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", answer(path))
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", answer(None))
    assert read_shape("me/mine", revision="v2") == shape_of(QWEN2_1B)
    assert asked == [("me/mine", "config.json", "v2")]
    for missing in (None, object()):
        monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", answer(missing))
        monkeypatch.setattr(huggingface_hub, "hf_hub_download", answer(path))
        assert read_shape("smollm2-135m") == shape_of(QWEN2_1B)
        assert asked[-2:] == [("HuggingFaceTB/SmolLM2-135M-Instruct", "config.json", None)] * 2


@pytest.mark.parametrize("name", ["nobody/nothing-at-all", "not an id", "smollm2-135m"])
def test_a_hub_model_that_is_not_here_is_told(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SHOESTRING_MODELS", "none")
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda *_, **__: None)
    with pytest.raises(ConfigError, match="is not on this machine and could not be fetched") as told:
        read_shape(name)
    assert told.value.given == f'model is "{name}"'
    assert told.value.write == "give a folder that holds config.json"


# What is refused.


def test_an_unknown_family_is_told_and_may_be_read_as_another() -> None:
    config = {"model_type": "yi", **SIZES}
    with pytest.raises(ConfigError) as told:
        shape_of(config, name="01-ai/yi")
    assert str(told.value) == (
        'model is "01-ai/yi"; its model_type is "yi", whose layer shapes are not known; '
        'write model.family = "llama" if its layers are those of a Llama, or leave out the memory setting.'
    )
    assert shape_of(config, family="llama") == shape_of(config | {"model_type": "llama"})
    assert read_shape(write_config("yi", config), family="llama").family == "llama"
    assert shape_of({"model_type": "pictures", "text_config": config}, family="llama").hidden == 60
    with pytest.raises(ConfigError, match="its config names no model_type"):
        shape_of(SIZES)


def test_a_family_that_is_none_is_told_with_the_nearest() -> None:
    with pytest.raises(ConfigError, match=r'model.family is "lama".*did you mean "llama"\?'):
        shape_of(QWEN2_1B, family="lama")
    with pytest.raises(ConfigError, match="use one of: gemma, gemma2"):
        read_shape("tiny", family="")


@pytest.mark.parametrize(
    "key", ["hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size"]
)
def test_a_size_that_is_left_out_is_named(key: str) -> None:
    for config in ({k: v for k, v in QWEN2_1B.items() if k != key}, QWEN2_1B | {key: None}):
        with pytest.raises(ConfigError) as told:
            shape_of(config, name="x")
        assert told.value.given == 'model is "x"'
        assert told.value.why == f"its config has no {key}"
        assert told.value.write == f"write {key} into it, or leave out the memory setting"


@pytest.mark.parametrize("value", ["12", 1.5, 4.0, True, 0, -3, [28], {"a": 1}, math.nan])
@pytest.mark.parametrize("key", ["hidden_size", "num_key_value_heads", "head_dim", "max_position_embeddings"])
def test_a_size_that_is_no_whole_number_is_named(key: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=f"its {key} is .*; write a whole number above 0 as {key}"):
        shape_of(QWEN2_1B | {key: value})


@pytest.mark.parametrize("key", ["tie_word_embeddings", "attention_bias", "mlp_bias"])
def test_a_switch_that_is_neither_true_nor_false_is_named(key: str) -> None:
    with pytest.raises(ConfigError, match=f'its {key} is "yes"; write true or false as {key}'):
        shape_of(QWEN2_1B | {"model_type": "llama", key: "yes"})


@pytest.mark.parametrize(
    ("content", "says"),
    [("{", "cannot be read"), ("", "cannot be read"), ("[1]", "holds no JSON object"), ('"qwen2"', "no JSON object")],
)
def test_a_broken_config_is_told(content: str, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        read_shape(write_config("broken", content))
    Path("broken/config.json").write_bytes(b"\xff\xfe{}")
    with pytest.raises(ConfigError, match="cannot be read"):
        read_shape("broken")


def test_reading_a_shape_imports_nothing_heavy() -> None:
    path = write_gguf("a.gguf", "llama", GGUF_SIZES, 9)
    code = (
        "import sys; from shoestring.errors import ConfigError; from shoestring.model.shapes import read_shape\n"
        f"read_shape('tiny'); read_shape({path!r})\n"
        "try: read_shape('nobody/nothing-at-all')\n"
        "except ConfigError: pass\n"
        "print([name for name in ('torch', 'transformers', 'peft') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    assert done.stdout.strip() == "[]"
