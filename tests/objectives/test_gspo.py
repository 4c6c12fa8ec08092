"""GSPO: the worked numbers, the gradient, and a run that clips."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from shoestring import train
from shoestring.objectives.base import Tokens
from shoestring.objectives.gspo import GSPO
from shoestring.types import TokenColumns


def of(log_ratio: list[float], advantage: float, row: list[int], weight: list[float] | None = None) -> Any:
    """Tokens whose old log-probs are all -1.5, and their columns, in float64."""
    num = len(log_ratio)
    old = torch.full((num,), -1.5, dtype=torch.float64)
    logprob = (old + torch.tensor(log_ratio, dtype=torch.float64)).requires_grad_()
    weights = torch.tensor(weight or [1 / num] * num, dtype=torch.float64)
    columns = TokenColumns(
        torch.zeros(num).long(), torch.full((num,), advantage, dtype=torch.float64), weights, weights, old
    )
    return Tokens(logprob, old, None, torch.tensor(row)), columns


@pytest.mark.parametrize(
    ("log_ratio", "advantage", "ratio", "clipped"),
    [
        ([0.1, -0.2, 0.3], 1.0, 1.0004, True),  # s = 1.068939
        ([0.1, -0.2, 0.3], -1.0, 1.068939, False),  # a bad completion that became likelier is free to come back
        ([0.0003, 0.0009, 0.0], 1.0, 1.0004, True),  # s = 1.00040008, just above
        ([0.0003, 0.0009, 0.0], -1.0, 1.00040008, False),
        ([-0.0006, -0.0006, -0.0006], -1.0, 0.9997, True),
        ([-0.0006, -0.0006, -0.0006], 1.0, 0.99940018, False),
    ],
)
def test_worked_numbers(log_ratio: list[float], advantage: float, ratio: float, clipped: bool) -> None:
    tokens, columns = of(log_ratio, advantage, [0, 0, 0])
    loss, metrics = GSPO().loss(tokens, columns)
    assert loss.tolist() == pytest.approx([-advantage * ratio] * 3, abs=1e-6 if abs(ratio - 1) > 0.01 else 1e-8)
    assert metrics["clip_fraction"].total.item() == 3 * clipped
    loss.mean().backward()
    assert tokens.logprob.grad.tolist() == pytest.approx([0 if clipped else -advantage * ratio / 3] * 3, abs=1e-6)


def test_each_row_has_the_ratio_of_its_own_tokens() -> None:
    """Tokens that are selected for the KL alone, whose weight is 0, are no part of it."""
    tokens, columns = of([0.1, 2.0, -0.2, 0.3], -1.0, [0, 1, 0, 0])
    loss, _ = GSPO().loss(tokens, columns)
    assert loss.tolist() == pytest.approx([1.068939, 7.389056, 1.068939, 1.068939], abs=1e-6)
    tokens, columns = of([0.1, 2.0, -0.2, 0.3], -1.0, [0, 0, 0, 0], weight=[1 / 3, 0.0, 1 / 3, 1 / 3])
    assert GSPO().loss(tokens, columns)[0].tolist() == pytest.approx([1.068939] * 4, abs=1e-6)


@pytest.mark.parametrize("advantage", [1.0, -1.0])
def test_the_gradient_is_that_of_finite_differences(advantage: float) -> None:
    """Two rows, one of them clipped, with the even weights of their rows."""
    tokens, columns = of([0.1, -0.2, 0.3, -0.4, 0.1], advantage, [0, 0, 0, 1, 1], [1 / 6] * 3 + [1 / 4] * 2)

    def total(logprob: Tensor) -> Tensor:
        loss, _ = GSPO(clip_low=0.02, clip_high=0.02).loss(tokens._replace(logprob=logprob), columns)
        return (columns.weight * loss).sum()

    [found] = torch.autograd.grad(total(tokens.logprob), tokens.logprob)
    with torch.no_grad():
        steps = 1e-6 * torch.eye(5, dtype=torch.float64)
        slopes = [(total(tokens.logprob + step) - total(tokens.logprob - step)) / 2e-6 for step in steps]
    torch.testing.assert_close(found, torch.stack(slopes), atol=1e-8, rtol=0)
    assert (found == 0).tolist() == ([True] * 3 + [False] * 2 if advantage > 0 else [False] * 3 + [True] * 2)


def test_a_run_with_two_mini_batches_clips() -> None:
    config: dict[str, Any] = {
        "algorithm": "grpo",
        "objective": {"policy": "gspo", "mini_batches": 2},
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
