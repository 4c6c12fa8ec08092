"""The optimizers of `[optim] name`: AdamW (arXiv 1711.05101) with its state in fp32, in 8 bits, or in the host's
memory. The table is the list.

Near 0.02 the neighbours of a bf16 number are 1.2e-4 away, so a step of 1e-6 that is rounded to the nearest is lost.
Weights in bf16 are therefore rounded up or down by chance, or have an fp32 copy on the host.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.adamw import adamw

# Weights that are updated at once: each of the few temporaries, in fp32 or int32, takes 16 MiB.
_TILE = 2**22


def in_fp32(parameters: Sequence[nn.Parameter], **options: Any) -> torch.optim.Optimizer:
    """torch's AdamW for fp32 weights (on a GPU the fused one, which has no temporaries), else `RoundedAdamW`."""
    if any(parameter.dtype != torch.float32 for parameter in parameters):
        return RoundedAdamW(parameters, **options)
    fused = all(parameter.is_cuda for parameter in parameters)
    return torch.optim.AdamW(parameters, **options, fused=fused or None)


def takes_no_memory(optimizer: torch.optim.Optimizer) -> bool:
    """Whether a step needs none beside what is there, and so cannot run out of it half-way: torch's fused AdamW, once
    its state is made."""
    groups = optimizer.param_groups
    fused = isinstance(optimizer, torch.optim.AdamW) and all(group["fused"] for group in groups)
    return fused and all(parameter in optimizer.state for group in groups for parameter in group["params"])


def in_8_bits(parameters: Sequence[nn.Parameter], **options: Any) -> torch.optim.Optimizer:
    """torchao's 8-bit AdamW (arXiv 2110.02861): moments in blocks of 256 with one scale each, fp32 arithmetic, bf16
    weights rounded by chance. The moments of a weight under 4096 values, or of a number of them that is no multiple of
    256, are of the weight's type.

    On a GPU torchao compiles it at the first step, for half a minute. A step then has temporaries of 8 bytes for each
    value of the largest weight; without compiling, of 57."""
    from torchao.optim import AdamW8bit

    class Eager(AdamW8bit):
        """Not compiled: for a CPU that takes ten seconds for each shape of weight, and a C++ compiler."""

        @torch.compiler.set_stance("force_eager")
        def step(self, closure: None = None) -> None:
            super().step(closure)

    compiled = all(parameter.is_cuda for parameter in parameters)
    return (AdamW8bit if compiled else Eager)(parameters, **options, bf16_stochastic_round=True)


# Changes a weight by its gradient, its state (empty at first) and the settings of its group.
Update = Callable[[nn.Parameter, Tensor, dict[str, Any], dict[str, Any]], None]


@torch.no_grad()
def _one_after_the_other(optimizer: torch.optim.Optimizer, update: Update) -> None:
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if parameter.grad is not None:
                update(parameter, parameter.grad, optimizer.state[parameter], group)


class RoundedAdamW(torch.optim.Optimizer):
    """AdamW for bf16 weights: fp32 moments, fp32 arithmetic, and the new weight rounded by chance.

    It goes through a weight in tiles, so that its temporaries are small, and draws from the device's own generator:
    whoever wants the same steps again seeds it before each.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], **options: Any):
        super().__init__(parameters, options)

    def step(self, closure: None = None) -> None:  # type: ignore[override]
        _one_after_the_other(self, self._update)

    def _update(self, parameter: nn.Parameter, grad: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
        if not state:
            state["step"] = torch.zeros((), device=parameter.device)
            state["exp_avg"] = torch.zeros_like(parameter, dtype=torch.float32)
            state["exp_avg_sq"] = torch.zeros_like(parameter, dtype=torch.float32)
        whole = parameter.detach(), grad, state["exp_avg"], state["exp_avg_sq"]
        for weight, slope, mean, square in zip(*(t.view(-1).split(_TILE) for t in whole), strict=True):
            new = weight.to(torch.float32, copy=True)
            _update_in_place(new, slope.float(), mean, square, state["step"].clone(), group)
            weight.copy_(rounded_by_chance(new) if weight.dtype == torch.bfloat16 else new)
        state["step"] += 1


class HostAdamW(torch.optim.Optimizer):
    """AdamW that runs on the host: its state, an fp32 copy of the weights included, lies there, and a step brings each
    gradient down and each new weight up (as ZeRO-Offload does, arXiv 2101.06840). Nothing is rounded by chance.

    torchao's CPUOffloadOptimizer copies gradients down while the backward pass makes them, so before they are clipped,
    and keeps weights and moments in the type of the weights.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], **options: Any):
        super().__init__(parameters, options)

    def step(self, closure: None = None) -> None:  # type: ignore[override]
        _one_after_the_other(self, self._update)

    def _update(self, parameter: nn.Parameter, grad: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
        if not state:
            state["step"] = torch.zeros(())
            state["weight"] = parameter.detach().to("cpu", torch.float32, copy=True)
            state["exp_avg"] = torch.zeros_like(state["weight"])
            state["exp_avg_sq"] = torch.zeros_like(state["weight"])
        slope = grad.to("cpu").float()
        _update_in_place(state["weight"], slope, state["exp_avg"], state["exp_avg_sq"], state["step"], group)
        parameter.copy_(state["weight"])


def _update_in_place(
    weight: Tensor, grad: Tensor, mean: Tensor, square: Tensor, step: Tensor, group: dict[str, Any]
) -> None:
    """One step of AdamW in one pass over fp32 tensors of one shape; `step`, a scalar beside them, is counted up."""
    beta1, beta2 = group["betas"]
    adamw(
        [weight],
        [grad],
        [mean],
        [square],
        [],
        [step],
        fused=True,
        amsgrad=False,
        maximize=False,
        beta1=beta1,
        beta2=beta2,
        lr=group["lr"],
        weight_decay=group["weight_decay"],
        eps=group["eps"],
    )


def rounded_by_chance(values: Tensor) -> Tensor:
    """fp32 values as bf16: each becomes one of its two neighbours, the nearer the likelier, so that the mean is the
    value (stochastic rounding, arXiv 2010.06192). Overwrites `values`.

    A bf16 number is the upper half of an fp32 one. A random number added to the lower half carries into the upper with
    just the chance wanted.

    >>> rounded_by_chance(torch.tensor([0.5, -0.375]))
    tensor([ 0.5000, -0.3750], dtype=torch.bfloat16)
    """
    bits = values.view(torch.int32)
    bits += torch.randint(0, 2**16, bits.shape, dtype=torch.int32, device=bits.device)
    bits &= -(2**16)
    return values.to(torch.bfloat16)


OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "adamw": in_fp32,
    "adamw-8bit": in_8_bits,
    "adamw-cpu": HostAdamW,
}
