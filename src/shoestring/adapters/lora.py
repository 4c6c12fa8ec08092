"""LoRA (arXiv 2106.09685), by PEFT: each chosen linear layer gets a product of two thin matrices added."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import BeforeValidator, Field
from torch import Tensor, nn

from shoestring.adapters.base import Trained
from shoestring.config.settings import Settings, as_tuple
from shoestring.errors import ConfigError, nearest
from shoestring.model.structure import chosen_layers, decoder_layers, quiet_peft

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from shoestring.model.shapes import Shape


class LoRA(Settings):
    """W x + (alpha / rank) B A x with A [rank, in] and B [out, rank]; B starts at 0, so step 0 is the base model.

    The matrices are kept and updated in fp32, and used in the type of the layer's input: so the backward pass keeps no
    fp32 copies of inputs. There is no dropout: it would part the sampler from the trainer.
    """

    name: Literal["lora"] = "lora"
    rank: int = Field(default=16, ge=1)
    alpha: float = Field(default=32, gt=0)
    modules: Annotated[
        Literal["all-linear"] | Annotated[tuple[str, ...], Field(min_length=1)],
        BeforeValidator(lambda value: value if value == "all-linear" else as_tuple(value)),
    ] = "all-linear"
    """Which linear layers inside the decoder layers, by the end of their name, such as ["q_proj", "v_proj"]."""
    layers: Literal["all", "last-third"] | int | tuple[int, ...] = "all"
    """"all", "last-third", a number n (the last n), or a list of layer numbers from 0. What lies below the lowest one
    stores nothing for the backward pass."""

    def trained(self, shape: Shape) -> Trained:
        names = sorted(linear.name for linear in shape.linears)
        modules = self._modules(names)
        layers = chosen_layers(self.layers, shape.layers)
        of_layer = self.rank * sum(linear.inputs + linear.outputs for linear in shape.linears if linear.name in modules)
        return Trained(of_layer * len(layers), layers[0], len(layers), frozenset(modules), self.rank, of_layer)

    def _modules(self, names: Sequence[str]) -> list[str]:
        """Those of a layer's linear modules that get matrices."""
        modules = list(names) if self.modules == "all-linear" else list(self.modules)
        for module in modules:
            if module not in names:
                raise ConfigError(
                    f'adapter.modules holds "{module}"',
                    "no layer has a linear module of that name",
                    nearest(module, names),
                )
        return modules

    def attach(self, model: PreTrainedModel) -> nn.Module:
        from peft import LoraConfig, get_peft_model

        path, layers = decoder_layers(model)
        wanted = chosen_layers(self.layers, len(layers))
        names = sorted({name.split(".")[-1] for layer in layers for name, m in layer.named_modules() if _linear(m)})
        config = LoraConfig(
            task_type="CAUSAL_LM",
            r=self.rank,
            lora_alpha=self.alpha,  # type: ignore[arg-type]  # PEFT divides it by r; a fraction is as good
            lora_dropout=0.0,
            target_modules=self._modules(names),
            layers_to_transform=wanted,
            fan_in_fan_out=any(type(m).__name__ == "Conv1D" for m in layers.modules()),
            layers_pattern=path.split(".")[-1],
        )
        with quiet_peft():
            return used_in_input_type(get_peft_model(model, config))


class _InInputType(nn.Linear):
    """A linear layer whose weight is cast to its input's type, where PEFT would cast the input to the weight's."""

    def forward(self, input: Tensor) -> Tensor:
        return nn.functional.linear(input, self.weight.to(input.dtype))


def used_in_input_type(model: nn.Module) -> nn.Module:
    """Has every LoRA matrix of a PEFT model used in the type of its input. Names and weights stay as they are."""
    from peft.tuners.lora import LoraLayer

    for layer in model.modules():
        if isinstance(layer, LoraLayer):
            layer.cast_input_dtype_enabled = False
            for thin in (*layer.lora_A.values(), *layer.lora_B.values()):
                assert type(thin) in (nn.Linear, _InInputType), f"a LoRA matrix is a {type(thin).__name__}"
                thin.__class__ = _InInputType
    return model


def _linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"  # GPT-2's own transposed linear
