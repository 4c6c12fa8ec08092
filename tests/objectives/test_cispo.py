"""CISPO: the worked numbers, the gradient, and a run that caps."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from shoestring import train
from shoestring.objectives.base import Tokens
from shoestring.objectives.cispo import CISPO
from shoestring.types import TokenColumns


def three(advantage: list[float]) -> tuple[Tokens, TokenColumns]:
    """Ratios 0.5, 1 and 6 at log-probs -1, -2 and -0.5, in float64."""
    logprob = torch.tensor([-1.0, -2.0, -0.5], dtype=torch.float64)
    old = logprob - torch.tensor([0.5, 1.0, 6.0], dtype=torch.float64).log()
    thirds = torch.full((3,), 1 / 3, dtype=torch.float64)
    columns = TokenColumns(
        torch.zeros(3).long(), torch.tensor(advantage, dtype=torch.float64), thirds, thirds, torch.zeros(3)
    )
    return Tokens(logprob.requires_grad_(), old, None, torch.zeros(3).long()), columns


def test_worked_numbers() -> None:
    tokens, columns = three([1.0, 1.0, 1.0])
    loss, metrics = CISPO().loss(tokens, columns)
    total = (columns.weight * loss).sum()
    total.backward()
    assert total.item() == pytest.approx(1.666667, abs=1e-6)
    assert tokens.logprob.grad is not None
    assert tokens.logprob.grad.tolist() == pytest.approx([-0.166667, -0.333333, -1.666667], abs=1e-6)
    assert metrics["clip_fraction"].total.item() == 1


@pytest.mark.parametrize("cap", [5.0, 0.8, 10.0])
def test_the_gradient_is_that_of_finite_differences(cap: float) -> None:
    """Of -w A logprob, where the weight w = min(rho, cap) stays as it is at this log-prob."""
    tokens, columns = three([1.0, -0.5, 2.0])
    loss, _ = CISPO(cap=cap).loss(tokens, columns)
    [found] = torch.autograd.grad((columns.weight * loss).sum(), tokens.logprob)
    weight = torch.tensor([0.5, 1.0, 6.0], dtype=torch.float64).clamp(max=cap)

    def total(logprob: Tensor) -> Tensor:
        return -(columns.weight * weight * columns.advantage * logprob).sum()

    with torch.no_grad():
        assert total(tokens.logprob).item() == pytest.approx((columns.weight * loss).sum().item())
        steps = 1e-6 * torch.eye(3, dtype=torch.float64)
        slopes = [(total(tokens.logprob + step) - total(tokens.logprob - step)) / 2e-6 for step in steps]
    torch.testing.assert_close(found, torch.stack(slopes), atol=1e-8, rtol=0)


def test_a_run_with_two_mini_batches_caps() -> None:
    config: dict[str, Any] = {
        "algorithm": "grpo",
        "objective": {"policy": {"name": "cispo", "cap": 1.02}, "mini_batches": 2},
        "steps": 2,
        "sampling": {"num_prompts": 4, "num_completions": 4, "max_new_tokens": 32},
        "optim": {"lr": 1e-3, "warmup_steps": 0},
        "execution": {"device": "cpu"},
        "out": "run",
    }
    train(config, quiet=True)
    lines = [json.loads(line) for line in Path("run/metrics.jsonl").read_text().splitlines()]
    assert all(line["applied"] for line in lines)
    assert max(line["clip_fraction"] for line in lines) > 0
