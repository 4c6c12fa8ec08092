"""The optimizer, its schedule, and one update: micro-batches in, one applied step out, or none if a number is not
finite."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from shoestring.model.policy import Policy, to_device
from shoestring.objectives.loss import Objective, l2_loss, objective_loss
from shoestring.optimizers.base import OptimSettings, trained_parameters
from shoestring.training.batch import single_rows
from shoestring.types import Batch

# Gradients of activations in fp16 underflow below 6e-8; the loss is scaled up by this, and the gradient down again.
_FP16_SCALE = 2.0**10


def build_optimizer(parameters: Mapping[str, nn.Parameter], settings: OptimSettings) -> torch.optim.Optimizer:
    """The optimizer of the trained parameters, given by name."""
    return settings.build(trained_parameters(parameters))


def learning_rate(step: int, steps: int, settings: OptimSettings) -> float:
    """The rate of a step, counted from 0: a pure function of it, so that a resumed run needs no memory of a
    schedule."""
    if step < settings.warmup_steps:
        return settings.lr * (step + 1) / settings.warmup_steps
    done = (step - settings.warmup_steps) / max(steps - settings.warmup_steps, 1)
    match settings.schedule:
        case "constant":
            return settings.lr
        case "linear":
            return settings.lr * (1 - done)
        case "cosine":
            return settings.lr * 0.5 * (1 + math.cos(math.pi * done))


class UpdateReport(NamedTuple):
    """What an update did. `finite` is false where a loss or gradient was not, and that optimizer step and those behind
    it were not applied; `culprits` are the problems whose rows were at fault, if single ones were."""

    loss: float
    grad_norm: float
    kl: float
    clip_fraction: float
    sampler_gap: float
    applied: bool
    culprits: tuple[str, ...] = ()
    importance_mean: float = 1.0
    importance_capped: float = 0.0
    finite: bool = True


def update(
    policy: Policy,
    optimizer: torch.optim.Optimizer,
    batches: Sequence[Batch],
    objective: Objective,
    *,
    temperature: float,
    max_grad_norm: float,
    checkpointing: bool,
) -> UpdateReport:
    """`objective.updates` optimizer steps over the same micro-batches.

    The ratio is taken to the policy at the first of them, whose log-probs are its own detached, so no extra pass is
    needed. A step whose gradient is not finite is never applied, and neither are those after it.
    """
    parameters = list(policy.trained().values())
    old: list[Tensor | None] = [None] * len(batches)
    tokens = max(sum(len(batch.row) for batch in batches), 1)
    report = UpdateReport(0.0, 0.0, 0.0, 0.0, 0.0, applied=False)
    for number in range(objective.updates):
        with policy.unchanged():
            every = range(len(batches))
            sums = [backward(policy, batches, i, old, objective, temperature, checkpointing) for i in every]
        loss, kl, clipped, gap, importance, capped = torch.stack(sums).double().sum(0).tolist()
        unscale(parameters, _scale(policy))
        if objective.l2:
            penalty = l2_loss(parameters, objective.l2)
            take_gradient(penalty)
            loss += penalty.item()
        loss += penalise(policy)
        norm = float(clip_gradient(parameters, max_grad_norm))
        if not (math.isfinite(norm) and math.isfinite(loss)):
            optimizer.zero_grad(set_to_none=True)
            culprits = _culprits(policy, batches, objective, temperature, checkpointing)
            return report._replace(loss=loss, grad_norm=norm, applied=number > 0, culprits=culprits, finite=False)
        apply(policy, optimizer)
        parameters = list(policy.trained().values())
        report = UpdateReport(
            loss,
            norm,
            kl,
            clipped / tokens,
            report.sampler_gap,
            applied=True,
            importance_mean=importance / tokens,
            importance_capped=capped / tokens,
        )
        if number == 0:
            report = report._replace(sampler_gap=gap / tokens)
    return report


def backward(
    policy: Policy,
    batches: Sequence[Batch],
    index: int,
    old: list[Tensor | None],
    objective: Objective,
    temperature: float,
    checkpointing: bool,
) -> Tensor:
    """One micro-batch forward and backward; fills `old[index]` the first time. Six sums, [6], without waiting for the
    device: loss, KL, clipped tokens, sampler gap, importance weights, capped ones."""
    batch = to_device(batches[index], policy.device)
    reference = None
    if objective.beta:
        with policy.reference():
            reference = policy.logprobs(batch, temperature)
    with policy.checkpointing(checkpointing):
        logprob = policy.logprobs(batch, temperature)
        before = old[index]
        if before is None:
            before = old[index] = logprob.detach()
        found = objective_loss(logprob, before, reference, batch, objective)
        take_gradient(found.loss * _scale(policy))
    policy.pull_back()
    gap = (logprob.detach() - batch.sampler_logprob).abs().sum()
    sums = (found.loss.detach(), found.kl, found.clipped, gap, found.importance, found.capped)
    return torch.stack([part.to(policy.device, torch.float32) for part in sums])


def penalise(policy: Policy) -> float:
    """Add the gradient of the adapter's own term of the loss; return its value."""
    penalty = policy.handle.penalty() if policy.handle is not None else None
    if penalty is None:
        return 0.0
    take_gradient(penalty)
    return penalty.item()


def apply(policy: Policy, optimizer: torch.optim.Optimizer) -> None:
    """One step of the optimizer, with the adapter's own part before and after it; the gradients are gone then."""
    handle = policy.handle
    if handle is not None:
        handle.after_backward(handle.updates)
    optimizer.step()
    if handle is not None:
        handle.updates += 1
        if handle.after_step(handle.updates - 1):
            policy.parameters_changed()
            _train_instead(optimizer, list(policy.trained().values()))
    optimizer.zero_grad(set_to_none=True)


def _train_instead(optimizer: torch.optim.Optimizer, parameters: list[nn.Parameter]) -> None:
    """Have the optimizer train other parameters: those that stay keep their state, new ones start without any."""
    optimizer.param_groups[0]["params"] = parameters
    kept = {id(parameter) for parameter in parameters}
    for parameter in [p for p in optimizer.state if id(p) not in kept]:
        del optimizer.state[parameter]


def take_gradient(loss: Tensor) -> None:
    """Adds the loss's gradient to the parameters', on this thread: one of autograd's own would have a cuBLAS workspace
    of its own, 32 MiB on an H100."""
    with torch.autograd.set_multithreading_enabled(False):
        loss.backward()


def _scale(policy: Policy) -> float:
    return _FP16_SCALE if policy.base.dtype == torch.float16 else 1.0


def unscale(parameters: Iterable[nn.Parameter], scale: float) -> None:
    """Undoes the scale that the loss was multiplied with."""
    for parameter in parameters:
        if scale != 1.0 and parameter.grad is not None:
            parameter.grad.div_(scale)


def clip_gradient(parameters: Sequence[nn.Parameter], max_norm: float) -> Tensor:
    """Scales the gradient to at most `max_norm`; returns its norm before, taken in fp32. A norm that is not finite
    scales nothing."""
    grads = [p.grad for p in parameters if p.grad is not None]
    short = any(grad.dtype != torch.float32 for grad in grads)
    norm = nn.utils.get_total_norm(
        [torch.linalg.vector_norm(g, dtype=torch.float32) for g in grads] if short else grads
    )
    if bool(torch.isfinite(norm)):
        nn.utils.clip_grads_with_norm_(parameters, max_norm, norm)
    return norm


def _culprits(
    policy: Policy, batches: Sequence[Batch], objective: Objective, temperature: float, checkpointing: bool
) -> tuple[str, ...]:
    """The problems whose row alone has a loss or gradient that is not finite: run again row by row, to be named."""
    found = []
    parameters = list(policy.trained().values())
    for batch in single_rows(batches):
        loss = float(backward(policy, [batch], 0, [None], objective, temperature, checkpointing)[0])
        grads = [p.grad for p in parameters if p.grad is not None]
        if not (math.isfinite(loss) and all(bool(torch.isfinite(grad).all()) for grad in grads)):
            found.append(batch.problem_ids[0])
        policy.drop_gradients()
    return tuple(dict.fromkeys(found))
