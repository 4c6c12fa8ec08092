"""Where the decoder layers of a model are."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import nn

from shoestring.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedModel
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def decoder_layers(model: PreTrainedModel) -> tuple[str, nn.ModuleList]:
    """The name and the list of the model's decoder layers."""
    count = model.config.get_text_config().num_hidden_layers
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) == count:
            return name, module
    raise ConfigError(
        f"the model is a {type(model).__name__}", f"no list of its {count} layers was found", "use a decoder-only model"
    )


def chosen_layers(layers: str | int | tuple[int, ...], count: int) -> list[int]:
    """Layer numbers, from 0, of a `layers` setting.

    >>> chosen_layers("last-third", 28)
    [19, 20, 21, 22, 23, 24, 25, 26, 27]
    """
    if layers == "all":
        return list(range(count))
    if layers == "last-third":
        layers = max(count // 3, 1)
    if isinstance(layers, int):
        if not 1 <= layers <= count:
            raise ConfigError(f"adapter.layers is {layers}", f"the model has {count} layers", f"use 1 to {count}")
        return list(range(count - layers, count))
    chosen = sorted({int(layer) for layer in layers})
    if not chosen or chosen[0] < 0 or chosen[-1] >= count:
        raise ConfigError(
            f"adapter.layers is {list(layers)}", f"the model's layers are 0 to {count - 1}", "list some of these"
        )
    return chosen


@contextmanager
def quiet_peft() -> Iterator[None]:
    """Keeps back three warnings of PEFT 0.21 that its users can do nothing about: a deprecation inside transformers,
    that a base model from a GGUF file has no config.json (it looks there for a changed vocabulary), and that a layer
    whose ranks AdaLoRA has all masked is empty."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Could not find a config file in", category=UserWarning)
        warnings.filterwarnings("ignore", message=r"Adapter .* LoRA tensor\(s\) have invalid shape")
        warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*", category=FutureWarning)
        yield
