"""A policy from settings, a run or a checkpoint."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import TYPE_CHECKING

from torch import nn

from shoestring.config.settings import pick
from shoestring.errors import ConfigError
from shoestring.model import load as models
from shoestring.model.policy import Policy
from shoestring.model.structure import quiet_peft

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from shoestring.adapters.base import Adapter


def load_policy(
    settings: models.ModelSettings | str | Path,
    *,
    adapter: Adapter | None = None,
    keep_reference: bool = False,
    device: str = "auto",
) -> Policy:
    """The policy that `settings` (or a name, or a folder) name: with a new `adapter`, or with the run's (or
    checkpoint's) own one, or without any.

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
    adapted: nn.Module | None = None
    first: PreTrainedModel | None = None
    if source.checkpoint is not None:
        adapted = _as_of(source.checkpoint, base)
    elif source.adapter is not None:
        from peft import PeftModel

        with quiet_peft():
            adapted = PeftModel.from_pretrained(base, str(source.adapter))
        adapted.requires_grad_(False)
    elif adapter is not None:
        model = adapter.attach(base)
        if model is base:
            first = copy.deepcopy(base).requires_grad_(False) if keep_reference else None
        else:
            adapted = model
            whence = Path(settings.name if source.gguf_file else source.path).expanduser()
            if whence.exists():  # so that the adapter finds it from any folder
                base_name = str(whence.absolute())
                adapted.peft_config["default"].base_model_name_or_path = base_name  # type: ignore[index,union-attr]
    (adapted or base).eval()
    return Policy(base, tokenizer, adapted, settings.name, first)


def _as_of(path: Path, base: PreTrainedModel) -> nn.Module | None:
    """The base with what a checkpoint's run trained of it, or in it, as it was then, frozen; None where the base itself
    is what was trained."""
    from shoestring.adapters import ADAPTERS
    from shoestring.config.files import read
    from shoestring.run.checkpoint import restore_weights

    model = pick(ADAPTERS, "adapter", read(models.run_of(path) / "config.toml")["adapter"]).attach(base)
    restore_weights(path, {name: p for name, p in model.named_parameters() if p.requires_grad})
    model.requires_grad_(False)
    return None if model is base else model
