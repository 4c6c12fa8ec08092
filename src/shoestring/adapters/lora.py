"""LoRA (arXiv 2106.09685), by PEFT: each chosen linear layer gets a product of two thin matrices added."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field

from shoestring.adapters.base import AdapterCost
from shoestring.adapters.on_peft import PeftHandle, attached, used_in_input_type
from shoestring.adapters.placement import Layers, Modules, Placed
from shoestring.config.settings import Settings
from shoestring.model.adapter import Handle

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from shoestring.model.shapes import Shape


class LoRA(Placed, Settings):
    """W x + (alpha / rank) B A x with A [rank, in] and B [out, rank]; B starts at 0, so step 0 is the base model.

    The matrices are kept and updated in fp32, and used in the type of the layer's input: so the backward pass keeps no
    fp32 copies of inputs. There is no dropout: it would part the sampler from the trainer.
    """

    name: Literal["lora"] = "lora"
    rank: int = Field(default=16, ge=1)
    alpha: float = Field(default=32, gt=0)
    modules: Modules = "all-linear"
    """Which linear layers inside the decoder layers, by the end of their name, such as ["q_proj", "v_proj"]."""
    layers: Layers = "all"
    """"all", "last-third", a number n (the last n), or a list of layer numbers from 0. What lies below the lowest one
    stores nothing for the backward pass."""

    def cost(self, shape: Shape) -> AdapterCost:
        linears, layers = self.chosen(shape)
        of_layer = self.rank * sum(linear.inputs + linear.outputs for linear in linears)
        names = frozenset(linear.name for linear in linears)
        return AdapterCost(of_layer * len(layers), layers[0], len(layers), names, self.rank, of_layer)

    def attach(self, model: PreTrainedModel, seed: int) -> Handle:
        from peft import LoraConfig

        config = LoraConfig(
            task_type="CAUSAL_LM",
            r=self.rank,
            lora_alpha=self.alpha,  # type: ignore[arg-type]  # PEFT divides it by r; a fraction is as good
            lora_dropout=0.0,
            **self.peft_targets(model),
        )
        adapted, own = attached(model, config, seed)
        used_in_input_type(adapted)
        return PeftHandle(self, adapted, own)
