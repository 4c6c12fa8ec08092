"""Adapters of PEFT that are often asked for: DoRA, rsLoRA and VeRA."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field
from torch import nn

from shoestring.adapters.base import AdapterCost
from shoestring.adapters.on_peft import PeftHandle, attached
from shoestring.adapters.peft import PeftSettings
from shoestring.model.adapter import Factors, Handle

if TYPE_CHECKING:
    from peft import PeftConfig
    from transformers import PreTrainedModel

    from shoestring.model.shapes import Shape


class DoRA(PeftSettings):
    """The direction of W + (alpha / rank) B A, with its length in each output trained apart (arXiv 2402.09353).

    It has no factors: sampling and training run through transformers' layers.
    """

    name: Literal["dora"] = "dora"
    zero_is_base: ClassVar[bool] = False
    rank: int = Field(default=16, ge=1)
    alpha: float = Field(default=32, gt=0)

    def config(self, targets: dict[str, Any], seed: int) -> PeftConfig:
        from peft import LoraConfig

        alpha: Any = self.alpha
        return LoraConfig(task_type="CAUSAL_LM", r=self.rank, lora_alpha=alpha, use_dora=True, **targets)


class RsLoRA(PeftSettings):
    """LoRA scaled by alpha / sqrt(rank), so that a larger rank does not slow learning (arXiv 2312.03732)."""

    name: Literal["rslora"] = "rslora"
    rank: int = Field(default=16, ge=1)
    alpha: float = Field(default=8, gt=0)

    def config(self, targets: dict[str, Any], seed: int) -> PeftConfig:
        from peft import LoraConfig

        alpha: Any = self.alpha
        return LoraConfig(task_type="CAUSAL_LM", r=self.rank, lora_alpha=alpha, use_rslora=True, **targets)


class VeRA(PeftSettings):
    """b * (B (d * (A x))) with random A and B, frozen and shared by all layers, and b, d trained (arXiv 2310.11454).

    Its factors are A and b B d. The second is computed, so the fast path holds it and its gradient in fp32: rank times
    outputs for each linear layer.
    """

    name: Literal["vera"] = "vera"
    rank: int = Field(default=256, ge=1)

    def config(self, targets: dict[str, Any], seed: int) -> PeftConfig:
        from peft import VeraConfig

        return VeraConfig(task_type="CAUSAL_LM", r=self.rank, projection_prng_key=seed, **targets)

    def cost(self, shape: Shape) -> AdapterCost:
        linears, layers = self.chosen(shape)
        of_layer = sum(self.rank + linear.outputs for linear in linears)
        up = self.rank * sum(linear.outputs for linear in linears)
        widest = max(linear.inputs for linear in linears) + max(linear.outputs for linear in linears)
        rows = sum(linear.inputs + linear.outputs + 2 * self.rank for linear in linears)
        return AdapterCost(
            of_layer * len(layers),
            layers[0],
            len(layers),
            frozenset(linear.name for linear in linears),
            self.rank,
            of_layer,
            down_trains=False,
            computed=up * len(layers),
            frozen_floats=self.rank * widest,
            kept_token={2: 4 * rows, 4: 4 * rows},
        )

    def attach(self, model: PreTrainedModel, seed: int) -> Handle:
        return VeraHandle(self, *attached(model, self.config(self.peft_targets(model), seed), seed))


class VeraHandle(PeftHandle):
    def factors(self, linear: nn.Module) -> Factors | None:
        """`down` is A [rank, in]; `up` [out, rank] is b B d."""
        module: Any = linear
        if not hasattr(module, "vera_lambda_b"):
            return None
        b, d = module.vera_lambda_b["default"], module.vera_lambda_d["default"]
        down = module.vera_A["default"][:, : module.in_features]
        up = b[:, None] * module.vera_B["default"][: module.out_features] * d
        return Factors(down, up, down_trains=False)
