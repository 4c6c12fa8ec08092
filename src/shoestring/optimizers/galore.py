"""GaLore (arXiv 2403.03507): Adam in a subspace of each weight's gradient, while the whole weight is trained."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from shoestring.errors import ConfigError
from shoestring.optimizers.adamw import RoundedAdamW
from shoestring.optimizers.base import OptimSettings, TrainedParameter, TrainedSizes
from shoestring.optimizers.rounding import TILE, TILE_BYTES, put


class GaLore(OptimSettings):
    """GaLore: the moments of a matrix [m, n] take 8 r max(m, n) bytes, its subspace 4 r min(m, n). For whole weights.

    Norms, biases, the embedding and the head have plain AdamW.
    """

    name: Literal["galore"] = "galore"  # type: ignore[assignment]
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = Field(default=1e-8, gt=0)
    rank: int = Field(default=128, ge=1)
    """Dimensions r of the subspace; the smaller side of a matrix, where that is less."""
    update_every: int = Field(default=200, ge=1)
    """Steps after which the subspace is taken from the gradient again."""
    scale: float = Field(default=0.25, gt=0)
    """What a step of the matrices is multiplied by, alpha in the paper."""

    def build(self, parameters: Sequence[TrainedParameter]) -> torch.optim.Optimizer:
        self.check_trained(whole=all(each.role == "weight" for each in parameters))
        groups = [
            {"params": [each.parameter for each in parameters if each.is_matrix], "rank": self.rank},
            {"params": [each.parameter for each in parameters if not each.is_matrix], "rank": 0},
        ]
        return ProjectedAdamW(
            [group for group in groups if group["params"]],
            lr=self.lr,
            betas=self.betas,
            eps=self.eps,
            weight_decay=self.weight_decay,
            update_every=self.update_every,
            scale=self.scale,
        )

    def check_trained(self, *, whole: bool) -> None:
        if not whole:
            raise ConfigError(
                f'optim.name is "{self.name}"',
                "it projects the gradients of whole weights, and an adapter's are thin already",
                'use "adamw", or adapter.name = "none"',
            )

    def state_bytes(self, sizes: TrainedSizes) -> int:
        projected = sum(min(self.rank, *shape) * (8 * max(shape) + 4 * min(shape)) for shape in sizes.matrices)
        return projected + 8 * sum(map(prod, sizes.others))

    def step_bytes(self, sizes: TrainedSizes) -> int:
        """Those of a singular value decomposition, as measured on an H200, and the gradient in fp32."""
        values = (4 * m * n + min(m, n) * (m + n) + 2 * min(m, n) ** 2 for m, n in sizes.matrices)
        return 4 * max(values, default=0) + TILE_BYTES


class ProjectedAdamW(RoundedAdamW):
    """Adam on P's image of the gradient for the groups with a rank, AdamW for the others.

    With G [m, n] and m >= n: R = G P^T, and W <- W - scale lr_t N(R) P, where the rows of P [r, n] are the first right
    singular vectors of a gradient. With m < n, P [m, r] holds left ones and stands on the other side. The moments stay
    as they are where P is replaced. A gradient of 0 spans nothing: P is taken from the next one that is not.
    """

    def update(self, parameter: nn.Parameter, grad: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
        if not group["rank"]:
            super().update(parameter, grad, state, group)
            return
        slope, tall = grad.float(), parameter.shape[0] >= parameter.shape[1]
        if not state or state["age"] >= group["update_every"]:
            if bool(slope.any()):
                state["projector"], state["age"] = projector(slope, group["rank"]), 0
            elif not state:
                return
        p = state["projector"]
        image = slope @ p.T if tall else p.T @ slope
        del slope
        if "step" not in state:
            state |= {"step": 0, "exp_avg": torch.zeros_like(image), "exp_avg_sq": torch.zeros_like(image)}
        state["step"] += 1
        state["age"] += 1
        beta1, beta2 = group["betas"]
        state["exp_avg"].lerp_(image, 1 - beta1)
        state["exp_avg_sq"].lerp_(image.square_(), 1 - beta2)
        normal = state["exp_avg"] / state["exp_avg_sq"].sqrt().add_(group["eps"])
        corrected = (1 - beta2 ** state["step"]) ** 0.5 / (1 - beta1 ** state["step"])
        left, right = (normal, p) if tall else (p, normal)
        _move(parameter, left, right, group["scale"] * group["lr"] * corrected, group["lr"] * group["weight_decay"])


def projector(slope: Tensor, rank: int) -> Tensor:
    """The first singular vectors of a gradient, on its smaller side: [r, n] or [m, r]."""
    left, _, right = torch.linalg.svd(slope, full_matrices=False)
    # A copy, since a part of a tensor holds all of its memory.
    return (right[:rank] if slope.shape[0] >= slope.shape[1] else left[:, :rank]).contiguous().clone()


def _move(weight: Tensor, left: Tensor, right: Tensor, rate: float, decay: float) -> None:
    """weight <- (1 - decay) (weight - rate left right), some rows at a time."""
    rows = max(TILE // weight.shape[1], 1)
    for part, some in zip(weight.detach().split(rows), left.split(rows), strict=True):
        new = part.to(torch.float32, copy=True)
        put(part, new.addmm_(some, right, alpha=-rate).mul_(1 - decay))
