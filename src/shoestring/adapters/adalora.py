"""AdaLoRA (arXiv 2303.10512), by PEFT: a budget of ranks moves to the layers where it matters."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from shoestring.adapters.base import AdapterCost
from shoestring.adapters.on_peft import PeftHandle, attached
from shoestring.adapters.peft import PeftSettings
from shoestring.model.adapter import AdapterState, Factors, Handle

if TYPE_CHECKING:
    from peft import PeftConfig
    from transformers import PreTrainedModel

    from shoestring.model.shapes import Shape


class AdaLoRA(PeftSettings):
    """W x + (alpha / rank) B (E * A) x with A [rank, in], E [rank, 1] and B [out, rank] trained; E starts at 0.

    After each update the least important entries of all E are set to 0, until `target_rank` a layer is left. Masked
    ranks keep their memory. `total_steps` are the optimizer steps of the run.
    """

    name: Literal["adalora"] = "adalora"
    rank: int = Field(default=12, ge=1)
    target_rank: int = Field(default=8, ge=1)
    alpha: float = Field(default=24, gt=0)
    total_steps: int = Field(default=150, ge=1)
    first_steps: int = Field(default=0, ge=0)
    """Steps with the full rank."""
    last_steps: int = Field(default=0, ge=0)
    """Steps at the end in which no rank comes or goes."""
    every: int = Field(default=1, ge=1)
    """Steps between two choices."""
    orthogonality: float = Field(default=0.5, ge=0)
    """Weight in the loss of mean ||P^T P - I|| over all A and B."""

    def config(self, targets: dict[str, Any], seed: int) -> PeftConfig:
        from peft import AdaLoraConfig

        alpha: Any = self.alpha
        return AdaLoraConfig(
            task_type="CAUSAL_LM",
            init_r=self.rank,
            target_r=min(self.target_rank, self.rank),
            lora_alpha=alpha,
            lora_dropout=0.0,
            total_step=self.total_steps,
            tinit=self.first_steps,
            tfinal=self.last_steps,
            deltaT=self.every,
            orth_reg_weight=self.orthogonality,
            **targets,
        )

    def cost(self, shape: Shape) -> AdapterCost:
        linears, layers = self.chosen(shape)
        inputs = sum(linear.inputs for linear in linears)
        of_layer = self.rank * sum(linear.inputs + linear.outputs + 1 for linear in linears)
        kept = 4 * (inputs + 3 * self.rank * len(linears))
        return AdapterCost(
            of_layer * len(layers),
            layers[0],
            len(layers),
            frozenset(linear.name for linear in linears),
            self.rank,
            of_layer,
            computed=self.rank * inputs * len(layers),
            frozen_floats=(3 * of_layer + len(linears)) * len(layers),  # three averages of each weight, and a rank
            kept_token={2: kept, 4: kept},
            kept_layer={2: 8 * of_layer, 4: 8 * of_layer},
        )

    def attach(self, model: PreTrainedModel, seed: int) -> Handle:
        return AdaLoraHandle(self, *attached(model, self.config(self.peft_targets(model), seed), seed))


class AdaLoraHandle(PeftHandle):
    """Keeps PEFT's rank allocator in the state, and has it act after each update."""

    def __init__(self, settings: Any, model: Any, own: frozenset[int]):
        super().__init__(settings, model, own)
        self._tuner = model.base_model
        self._allocator = self._tuner.rankallocator
        for name, parameter in self._tuner.model.named_parameters():
            if ".ranknum." in name:  # PEFT 0.21 has it trained where the base is in half precision
                parameter.requires_grad_(False)
            elif "lora_" in name:
                for average in self._averages().values():
                    average[name] = torch.zeros_like(parameter, requires_grad=False)

    def _averages(self) -> dict[str, dict[str, Tensor]]:
        allocator = self._allocator
        return {"ipt": allocator.ipt, "mean": allocator.exp_avg_ipt, "spread": allocator.exp_avg_unc}

    def factors(self, linear: nn.Module) -> Factors | None:
        module: Any = linear
        if not hasattr(module, "lora_E"):
            return None
        down = module.lora_A["default"] * module.lora_E["default"]
        scaling = module.scaling["default"] / (self.settings.rank + 1e-5)
        return Factors(down, module.lora_B["default"], scaling=scaling)

    def moving(self) -> AdapterState:
        """The averages of importance by weight, and the mask that the last steps keep."""
        averages = self._averages().items()
        tensors = {f"{kind}:{name}": t for kind, by_name in averages for name, t in by_name.items()}
        pattern = self.model.peft_config["default"].rank_pattern  # type: ignore[index,union-attr]
        return AdapterState(tensors, {"updates": self.updates, "rank_pattern": pattern})

    def load_moving(self, state: AdapterState) -> None:
        super().load_moving(state)
        for kind, by_name in self._averages().items():
            by_name.clear()
            own = {key.partition(":")[2]: t for key, t in state.tensors.items() if key.startswith(f"{kind}:")}
            by_name.update({name: t.to(self.base.device, copy=True) for name, t in own.items()})
        self.model.peft_config["default"].rank_pattern = state.values.get("rank_pattern")  # type: ignore[index,union-attr]

    def after_step(self, step: int) -> bool:
        self._tuner.update_and_allocate(step)
        return False

    def penalty(self) -> Tensor | None:
        """orthogonality mean ||P^T P - I||_F, with A's rows and B's columns as P's columns."""
        weight = self.settings.orthogonality
        pairs = [(name, p) for name, p in self.parameters().items() if "lora_A" in name or "lora_B" in name]
        if not weight or not pairs:
            return None
        terms = []
        for name, p in pairs:
            gram = p @ p.T if "lora_A" in name else p.T @ p
            terms.append(torch.linalg.matrix_norm(gram - torch.eye(len(gram), device=p.device)))
        return weight * torch.stack(terms).mean()
