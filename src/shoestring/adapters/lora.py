"""LoRA (arXiv 2106.09685), by PEFT: each chosen linear layer gets a product of two thin matrices added."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field
from torch import nn

from shoestring.adapters.base import chosen_layers, decoder_layers, quiet_peft
from shoestring.errors import ConfigError, nearest
from shoestring.settings import Settings

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class LoRA(Settings):
    """W x + (alpha / rank) B A x with A [rank, in] and B [out, rank]; B starts at 0, so step 0 is the base model.

    The matrices are fp32 whatever the base's type, and there is no dropout: it would part the sampler from the trainer.
    """

    name: Literal["lora"] = "lora"
    rank: int = Field(default=16, ge=1)
    alpha: float = Field(default=32, gt=0)
    modules: Literal["all-linear"] | Annotated[tuple[str, ...], Field(min_length=1)] = "all-linear"
    """Which linear layers inside the decoder layers, by the end of their name, such as ["q_proj", "v_proj"]."""
    layers: Literal["all", "last-third"] | int | tuple[int, ...] = "all"
    """"all", "last-third", a number n (the last n), or a list of layer numbers from 0. What lies below the lowest one
    stores nothing for the backward pass."""

    def attach(self, model: PreTrainedModel) -> nn.Module:
        from peft import LoraConfig, get_peft_model

        path, layers = decoder_layers(model)
        wanted = chosen_layers(self.layers, len(layers))
        names = sorted({name.split(".")[-1] for layer in layers for name, m in layer.named_modules() if _linear(m)})
        modules = names if self.modules == "all-linear" else list(self.modules)
        for module in modules:
            if module not in names:
                raise ConfigError(
                    f'adapter.modules holds "{module}"',
                    "no layer has a linear module of that name",
                    nearest(module, names),
                )
        config = LoraConfig(
            task_type="CAUSAL_LM",
            r=self.rank,
            lora_alpha=self.alpha,  # type: ignore[arg-type]  # PEFT divides it by r; a fraction is as good
            lora_dropout=0.0,
            target_modules=modules,
            layers_to_transform=wanted,
            fan_in_fan_out=any(type(m).__name__ == "Conv1D" for m in layers.modules()),
            layers_pattern=path.split(".")[-1],
        )
        with quiet_peft():
            return get_peft_model(model, config)


def _linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"  # GPT-2's own transposed linear
