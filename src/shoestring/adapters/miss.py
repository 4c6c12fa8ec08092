"""MiSS (arXiv 2409.15371), by PEFT: the input is cut into blocks, and their sum meets one trained matrix."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import torch
from pydantic import Field
from torch import nn

from shoestring.adapters.base import AdapterCost
from shoestring.adapters.on_peft import PeftHandle, attached
from shoestring.adapters.placement import Layers, Modules, Placed
from shoestring.config.settings import Settings
from shoestring.model.adapter import Factors, Handle

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from shoestring.model.shapes import Shape


class MiSS(Placed, Settings):
    """W x + D^T s(x) with D [rank, out] trained and s(x) the sum of x's blocks of length `rank`; D starts at 0.

    That is a LoRA whose A is an identity repeated along the input, so no layer keeps its input for the backward pass.
    There is no alpha: learning rates are lower than those of LoRA.
    """

    name: Literal["miss"] = "miss"
    rank: int = Field(default=16, ge=1)
    modules: Modules = "all-linear"
    layers: Layers = "all"

    def cost(self, shape: Shape) -> AdapterCost:
        linears, layers = self.chosen(shape)
        of_layer = self.rank * sum(linear.outputs for linear in linears)
        names = frozenset(linear.name for linear in linears)
        return AdapterCost(
            of_layer * len(layers),
            layers[0],
            len(layers),
            names,
            self.rank,
            of_layer,
            down_trains=False,
            computed=of_layer * len(layers),
            kept_token={2: 2 * self.rank * len(linears), 4: 0},  # PEFT keeps the sums in fp32
        )

    def attach(self, model: PreTrainedModel, seed: int) -> Handle:
        from peft import MissConfig

        config = MissConfig(task_type="CAUSAL_LM", r=self.rank, **self.peft_targets(model))
        return MissHandle(self, *attached(model, config, seed))


class MissHandle(PeftHandle):
    def factors(self, linear: nn.Module) -> Factors | None:
        """`down` [r, in] is 1 at (k, j) where j mod r = k; `up` [out, r] is D^T."""
        block = getattr(linear, "miss_block", None)
        if block is None:
            return None
        up = block["default"].T
        place = torch.arange(linear.in_features, device=up.device) % up.shape[1]  # type: ignore[arg-type]
        down = (place == torch.arange(up.shape[1], device=up.device)[:, None]).to(up.dtype)
        return Factors(down, up, down_trains=False)
