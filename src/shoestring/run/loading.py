"""A policy from settings, a run or a checkpoint."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shoestring.adapters import ADAPTERS
from shoestring.adapters.on_peft import from_folder
from shoestring.config.files import read
from shoestring.config.settings import pick
from shoestring.errors import ConfigError
from shoestring.model import load as models
from shoestring.model.adapter import Handle
from shoestring.model.policy import Policy
from shoestring.run.checkpoint import read_adapter

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from shoestring.adapters.base import Adapter


def load_policy(
    settings: models.ModelSettings | str | Path,
    *,
    adapter: Adapter | None = None,
    seed: int = 0,
    keep_reference: bool = False,
    device: str = "auto",
) -> Policy:
    """The policy that `settings` (or a name, or a folder) name: with a new `adapter`, whose first values `seed`
    decides, or with the run's (or checkpoint's) own one, or without any.

    Without `adapter` nothing is trained: a run's own comes frozen (it is there to be evaluated). To train on top of a
    run, merge it first. `keep_reference` keeps a copy of the weights, if it is they that are trained.
    """
    if not isinstance(settings, models.ModelSettings):
        from shoestring.run.folder import model_settings

        settings = model_settings(str(settings))
    source = models.locate(settings.name)
    if adapter is not None and (source.adapter or source.checkpoint):
        raise ConfigError(
            f'model is "{settings.name}"',
            "it is what a run has trained, and a new one needs a whole model to start from",
            f"make it one: shoestring merge {settings.name} OUT",
        )
    base, tokenizer, source = models.load(settings, models.pick_device(device))
    base.requires_grad_(False)
    if adapter is None:
        handle = _trained_before(source, base)
        (handle.model if handle is not None else base).eval()
        return Policy(base, tokenizer, handle, settings.name)
    handle = adapter.attach(base, seed)
    handle.model.eval()
    first: PreTrainedModel | None = None
    if handle.model is base:
        first = copy.deepcopy(base).requires_grad_(False) if keep_reference else None
    else:
        _name_base(handle, source, settings.name)
        if keep_reference and not handle.off_is_reference:
            raise _no_reference(adapter)
    return Policy(base, tokenizer, handle, settings.name, first)


def _trained_before(source: models.Source, base: PreTrainedModel) -> Handle | None:
    """The adapter of a run or a checkpoint in the base, frozen; None where there is none, or the base itself is what
    was trained."""
    if source.checkpoint is not None:
        handle = _as_of(source.checkpoint, base)
    elif source.adapter is not None:
        handle = from_folder(source.adapter, base, lambda given: pick(ADAPTERS, "adapter", given).attach(base, 0))
    else:
        return None
    handle.model.requires_grad_(False)
    return None if handle.model is base else handle


def _name_base(handle: Handle, source: models.Source, name: str) -> None:
    """Note the base model's place in an adapter of PEFT, so that the adapter finds it from any folder."""
    path = Path(name if source.gguf_file else source.path).expanduser()
    configs: Any = getattr(handle.model, "peft_config", {})
    if path.exists() and "default" in configs:
        configs["default"].base_model_name_or_path = str(path.absolute())


def _no_reference(adapter: Adapter) -> ConfigError:
    return ConfigError(
        f'objective.beta is above 0 and adapter.name "{adapter.name}"',
        "the model with this adapter turned off is not the model before training, so there is no reference",
        "set objective.beta = 0, or use another adapter",
    )


def _as_of(path: Path, base: PreTrainedModel) -> Handle:
    """The adapter of a checkpoint's run in the base, or the base trained whole, as it was then."""
    settings = read(models.run_of(path) / "config.toml")["adapter"]
    handle = pick(ADAPTERS, "adapter", settings).attach(base, 0)
    read_adapter(path, handle)
    return handle
