"""Finds and loads base models: the embedded default, hub ids, local folders, GGUF files, and runs of our own."""

from __future__ import annotations

import importlib.util
import json
import logging
import os
import tomllib
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from shoestring.allocator import give_back
from shoestring.config.extras import need
from shoestring.config.settings import Settings
from shoestring.errors import ConfigError

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

TINY = "tiny"
# Names that stand for a folder made by `make smollm2` where there is one, and for a hub id elsewhere.
LOCAL_OR_HUB = {"smollm2-135m": "HuggingFaceTB/SmolLM2-135M-Instruct"}


_OF_A_RUN = ("checkpoints", "best")  # the folders of a run in which weights lie, as step-N


class ModelSettings(Settings):
    """`model`: a string is short for a table with that `name`."""

    name: str = TINY
    """"tiny" (the embedded default), "smollm2-135m", a hub id, a folder, a .gguf file; where nothing is to be trained,
    also the folder of a run, or one of its checkpoints."""
    dtype: Literal["auto", "bf16", "fp16", "fp32", "nf4"] = "auto"
    """Type of the base weights; "auto" is bf16 on a GPU and fp32 on the CPU. "nf4" holds the layers' matrices in 4 bits
    (arXiv 2305.14314) and computes in the type of "auto"; it needs the extra nf4."""
    revision: str | None = None
    attn_implementation: str | None = None
    trust_remote_code: bool = False
    family: str | None = None
    """For the memory plan of a model_type that it does not know: the known one whose layers it is built like."""


class Source(NamedTuple):
    """Where a model lies: what transformers is to load, and the adapter folder or the checkpoint to put on top, if
    any."""

    path: str
    gguf_file: str | None = None
    adapter: Path | None = None
    checkpoint: Path | None = None


def models_folder() -> Path:
    """Where prepared models lie: SHOESTRING_MODELS, else the user's cache folder."""
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("SHOESTRING_MODELS") or Path(cache) / "shoestring" / "models")


def locate(name: str) -> Source:
    """Where the model of that name lies; raises `ConfigError` for a path that is not a model. Loads nothing."""
    if name == TINY:
        return Source(str(Path(__file__).parents[1] / "tiny" / "model"))
    if name in LOCAL_OR_HUB:
        folder = models_folder() / name
        return Source(str(folder) if (folder / "config.json").is_file() else LOCAL_OR_HUB[name])
    path = Path(name).expanduser()
    if path.suffix == ".gguf":
        if not path.is_file():
            raise ConfigError(f'model is "{name}"', "there is no such file", "give the path of a GGUF file")
        return Source(str(path.parent), path.name)
    if path.is_dir():
        return _locate_folder(path, name)
    local = name.startswith(("/", "./", "../", "~", *(f"{folder}/" for folder in _OF_A_RUN)))
    if path.exists() or local or name.count("/") > 1 or not name:
        why = "this file is not a GGUF file" if path.is_file() else "there is no such folder"
        raise ConfigError(f'model is "{name}"', why, "give a hub id, a model folder, a .gguf file or a run folder")
    return Source(name)


def _locate_folder(path: Path, name: str) -> Source:
    if (path / "config.json").is_file():
        return Source(str(path))
    if (path / "model" / "config.json").is_file():  # a run of sft
        return Source(str(path / "model"))
    for adapter in (path, path / "adapter"):
        if (adapter / "adapter_config.json").is_file():
            return locate(_base_name(path, adapter))._replace(adapter=adapter)
    if (path / "weights.safetensors").is_file() and (run := run_of(path)) != path:
        return locate(_base_name(run, run / "adapter"))._replace(checkpoint=path)
    if (path / "checkpoints").is_dir():
        why = "that run has not come to its end, which writes its model"
        raise ConfigError(
            f'model is "{name}"', why, f"go on with it first (--resume), or give one of {path}/checkpoints"
        )
    raise ConfigError(
        f'model is "{name}"',
        "the folder holds no config.json, no model/ and no adapter/",
        "give the folder of a model, of an adapter or of a finished run",
    )


def run_of(path: Path) -> Path:
    """The folder of the run that a checkpoint, or the weights that did best, lie in; any other path as it is."""
    place = path.expanduser().resolve()
    run = place.parent.parent
    inside = place.parent.name in _OF_A_RUN and place.name.startswith("step-") and place.name[5:].isdigit()
    return run if inside and (run / "config.toml").is_file() else path


def _named_in(run: Path) -> str:
    """The model in a run's own config."""
    model = tomllib.loads((run / "config.toml").read_text(encoding="utf-8")).get("model", TINY)
    return model if isinstance(model, str) else model.get("name", TINY)


def _base_name(run: Path, adapter: Path) -> str:
    """The base model of an adapter: what the run's own config says, else what PEFT wrote down, which is taken too for a
    config's path that leads nowhere from here."""
    try:
        noted = json.loads((adapter / "adapter_config.json").read_text(encoding="utf-8"))["base_model_name_or_path"]
    except (OSError, json.JSONDecodeError, KeyError, TypeError):
        noted = None
    if (run / "config.toml").is_file():
        name = _named_in(run)
        there = name in (TINY, *LOCAL_OR_HUB) or Path(name).expanduser().exists()
        return noted if not there and isinstance(noted, str) and Path(noted).exists() else name
    if not isinstance(noted, str) or not noted:
        raise ConfigError(
            f'model is "{run}"',
            "its adapter_config.json does not say which model it belongs to",
            "write that model's name there, under base_model_name_or_path",
        )
    return noted


# What these say when PEFT imports them is of no use to who runs a model without them.
_CHATTY = ("torchao", "torchao.utils", "torch.utils._pytree", "bitsandbytes.backends.cpu.ops", "bitsandbytes")


def load_tokenizer(settings: ModelSettings) -> PreTrainedTokenizerBase:
    """The model's tokenizer; raises `ConfigError`."""
    from transformers import AutoTokenizer

    for name in _CHATTY:
        logging.getLogger(name).setLevel(logging.ERROR)
    source = locate(settings.name)
    try:
        tokenizer = AutoTokenizer.from_pretrained(source.path, **_options(settings, source))
    except Exception as error:  # readers of half a dozen formats raise as many kinds
        raise _load_error(settings.name, error) from error
    if not tokenizer("1")["input_ids"]:
        raise ConfigError(
            f'model is "{settings.name}"', "its tokenizer turns text into nothing", "put tokenizer.json into its folder"
        )
    tokenizer.clean_up_tokenization_spaces = False  # it would take spaces out of what the model wrote
    return tokenizer


def _options(settings: ModelSettings, source: Source) -> dict[str, Any]:
    """What transformers' loaders are told."""
    options: dict[str, Any] = {"revision": settings.revision, "trust_remote_code": settings.trust_remote_code}
    if source.gguf_file:
        if importlib.util.find_spec("gguf") is None:
            raise ConfigError(
                f'model is "{settings.name}"', "reading GGUF needs the package gguf", "run: pip install gguf"
            )
        options["gguf_file"] = source.gguf_file
    return options


def load(settings: ModelSettings, device: torch.device) -> tuple[PreTrainedModel, PreTrainedTokenizerBase, Source]:
    """The base model in evaluation mode on `device`, its tokenizer, and where they came from."""
    from transformers import AutoModelForCausalLM
    from transformers.utils.logging import disable_progress_bar

    from shoestring.model.fast.decoder import join_on

    disable_progress_bar()
    source = locate(settings.name)
    check_quantisation(settings)
    tokenizer = load_tokenizer(settings)
    options = _options(settings, source)
    try:
        model = AutoModelForCausalLM.from_pretrained(
            source.path,
            dtype=torch_dtype(settings.dtype, device),
            attn_implementation=settings.attn_implementation,
            use_safetensors=None if source.gguf_file else True,
            **options,
        )
        if source.gguf_file:
            model = _plain_copy(model)
            _take_end_token(tokenizer, model.config.eos_token_id)
    except Exception as error:  # readers of half a dozen formats raise as many kinds
        raise _load_error(settings.name, error) from error
    if device.type == "cuda":
        _without_plans_for_each_length()
    if settings.dtype == "nf4":
        quantise(model, device)
    elif device.type == "cuda":
        join_on(model, device)
    model.to(device)  # type: ignore[arg-type]
    return model.eval(), tokenizer, source


def check_quantisation(settings: ModelSettings) -> None:
    """Raises `ConfigError` if 4-bit weights are asked for and cannot be had here."""
    if settings.dtype != "nf4":
        return
    need("bitsandbytes", "nf4", 'model.dtype is "nf4"')


def _without_plans_for_each_length() -> None:
    """Keeps torch from cuDNN's attention, for this process: it makes a plan for each new shape, and while sampling
    every token is a new one."""
    import torch

    torch.backends.cuda.enable_cudnn_sdp(False)


def quantise(model: PreTrainedModel, device: torch.device) -> None:
    """Puts the matrices of the decoder layers on `device` as NF4 with double quantisation (arXiv 2305.14314).

    One after the other: the device never holds more than one whole matrix, which the loader of transformers does not
    promise. The 4-bit weights wait on the host, so that they lie there without holes in the end.
    """
    from bitsandbytes.nn.modules import Linear4bit, Params4bit
    from torch import nn

    from shoestring.model.structure import decoder_layers

    _, layers = decoder_layers(model)
    for parent in layers.modules():
        for name, linear in list(parent.named_children()):
            if type(linear) is not nn.Linear:
                continue
            bias = linear.bias is not None
            small = Linear4bit(
                linear.in_features, linear.out_features, bias, linear.weight.dtype, quant_type="nf4", device="meta"
            )
            small.weight = Params4bit(linear.weight.data, requires_grad=False, quant_type="nf4", module=small)  # type: ignore[call-arg]
            small.bias = linear.bias
            # Else it lays weights out for the CPU's inference kernel, from which no gradient comes back.
            small.support_avx512bf16_for_cpu = False  # type: ignore[assignment]
            setattr(parent, name, small.to(device).to("cpu"))
    give_back(device)
    layers.to(device)
    model.is_loaded_in_4bit = True  # type: ignore[attr-defined]  # by which PEFT knows


def _load_error(name: str, error: Exception) -> ConfigError:
    text = str(error).strip()
    if "trust_remote_code" in text:
        return ConfigError(
            f'model is "{name}"',
            "it brings code of its own, which is not run unasked",
            "read that code, then set model.trust_remote_code = true",
        )
    first = text.splitlines()[0] if text else type(error).__name__
    return ConfigError(
        f'model is "{name}"', f"it could not be loaded ({first})", "give a model that transformers can load"
    )


def _plain_copy(model: PreTrainedModel) -> PreTrainedModel:
    """A model from GGUF is dequantised but still counts as quantised, and refuses to be cast and saved; its copy does
    not."""
    from transformers import AutoModelForCausalLM

    config = model.config
    if hasattr(config, "quantization_config"):
        delattr(config, "quantization_config")
    plain = AutoModelForCausalLM.from_config(config, dtype=model.dtype)
    plain.load_state_dict(model.state_dict())
    plain.generation_config = model.generation_config
    return plain


def _take_end_token(tokenizer: PreTrainedTokenizerBase, end: Any) -> None:
    """The end token that the file itself names: transformers 5.17 puts the begin token in its place."""
    if isinstance(end, int) and tokenizer.eos_token_id != end:
        tokenizer.eos_token = tokenizer.convert_ids_to_tokens(end)


def stored_dtype(name: str) -> Any:
    """The type that a model's weights are stored in, by its config; None for a GGUF file."""
    from transformers import AutoConfig

    source = locate(name)
    return None if source.gguf_file else AutoConfig.from_pretrained(source.path).dtype


def torch_dtype(name: str, device: torch.device) -> torch.dtype:
    import torch

    if name in ("auto", "nf4"):
        name = "bf16" if device.type == "cuda" else "fp32"
    return {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[name]


def pick_device(name: str = "auto") -> torch.device:
    import torch

    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ConfigError(
            f'execution.device is "{name}"', "there is no such device", 'use "cpu", "cuda" or "auto"'
        ) from None
    if device.type not in ("cpu", "cuda"):
        raise ConfigError(
            f'execution.device is "{name}"', "it runs on the CPU or on an NVIDIA GPU", 'use "cpu" or "cuda"'
        )
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError(f'execution.device is "{name}"', "torch finds no GPU here", 'use "cpu" or "auto"')
    return device
