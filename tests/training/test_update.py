"""One update: the norm, the clip, the schedule, and what keeps a broken gradient out of the weights."""

from __future__ import annotations

import pytest
import torch
from tests.model.test_policy import batches_of, sampled_groups
from torch import nn

from shoestring.objectives.loss import Objective
from shoestring.optimizers.adamw import AdamW
from shoestring.training.update import clip_gradient, learning_rate, update
from tiny import FAMILIES, random_policy


def with_gradient(*values: float) -> nn.Parameter:
    parameter = nn.Parameter(torch.ones(len(values)))
    parameter.grad = torch.tensor(values)
    return parameter


def test_clipping_scales_to_the_limit_and_says_the_norm_before() -> None:
    a, b = with_gradient(3.0), with_gradient(0.0, 4.0)
    assert clip_gradient([a, b], 1.0).item() == pytest.approx(5.0)
    assert (a.grad.item(), b.grad[1].item()) == (pytest.approx(0.6), pytest.approx(0.8))
    small = with_gradient(0.3)
    clip_gradient([small], 1.0)
    assert small.grad.item() == pytest.approx(0.3)


def test_an_infinite_entry_spreads_no_nan() -> None:
    """The library's own clipping turns it into NaN, which a step would then write into the weights."""
    theirs, ours = with_gradient(float("inf"), 1.0), with_gradient(float("inf"), 1.0)
    nn.utils.clip_grad_norm_([theirs], 1.0)
    assert theirs.grad.isnan().any()
    assert not torch.isfinite(clip_gradient([ours], 1.0))
    assert not ours.grad.isnan().any()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_padding_masks_no_row_whole(family: str, attention: str) -> None:
    """Rows of very different length in one batch: finite log-probs and gradients in both attention paths."""
    if family == "gemma2" and attention == "sdpa":
        pytest.skip("Gemma 2's attention soft-cap has no sdpa path in transformers")
    policy = random_policy(family)
    policy.base.set_attn_implementation(attention)
    [batch] = batches_of(sampled_groups(policy, lengths=(1, 60), new=8))
    logprob = policy.logprobs(batch)
    logprob.sum().backward()
    assert torch.isfinite(logprob).all()
    assert all(torch.isfinite(p.grad).all() for p in policy.trained().values() if p.grad is not None)


def test_the_rate_rises_then_follows_its_schedule() -> None:
    constant = AdamW(lr=1.0, warmup_steps=4)
    assert [learning_rate(s, 10, constant) for s in (0, 1, 3, 4, 9)] == [0.25, 0.5, 1.0, 1.0, 1.0]
    linear = AdamW(lr=1.0, warmup_steps=0, schedule="linear")
    assert [learning_rate(s, 4, linear) for s in range(4)] == [1.0, 0.75, 0.5, 0.25]
    cosine = AdamW(lr=1.0, warmup_steps=0, schedule="cosine")
    assert [round(learning_rate(s, 4, cosine), 4) for s in range(4)] == [1.0, 0.8536, 0.5, 0.1464]


def test_the_penalty_on_the_weights_reaches_the_update() -> None:
    """Beside the same step without it: the loss grows by l2 times the sum of squares, the gradient by 2 l2 times the
    weights."""
    policy = random_policy("llama")
    trained = policy.trained().values()
    generator = torch.Generator().manual_seed(0)
    start = [torch.randn(p.shape, generator=generator) * 0.1 for p in trained]
    batches = batches_of(sampled_groups(policy, lengths=(5, 9), new=6))
    losses, moved = [], []
    for l2 in (0.0, 0.01):
        with torch.no_grad():
            for parameter, value in zip(trained, start, strict=True):
                parameter.copy_(value)
        plain = torch.optim.SGD(list(trained), lr=1.0)
        objective = Objective(beta=0.0, clip_low=0.2, clip_high=0.2, updates=1, l2=l2)
        report = update(policy, plain, batches, objective, temperature=1.0, max_grad_norm=1e9, checkpointing=False)
        losses.append(report.loss)
        moved.append([parameter.detach() - value for parameter, value in zip(trained, start, strict=True)])
    squares = sum(value.square().sum().item() for value in start)
    assert losses[1] - losses[0] == pytest.approx(0.01 * squares, rel=1e-4)
    for without, with_it, value in zip(*moved, start, strict=True):
        torch.testing.assert_close(with_it - without, -2 * 0.01 * value, atol=1e-5, rtol=1e-3)
