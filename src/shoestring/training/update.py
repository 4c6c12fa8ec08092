"""The optimizer, its schedule, and one update: micro-batches in, one applied step out, or none if a number is not
finite."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from random import Random
from types import MappingProxyType
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from shoestring.errors import ConfigError, nearest
from shoestring.model.policy import Policy, to_device
from shoestring.objectives.base import Figure, Metrics, Tokens
from shoestring.objectives.loss import Objective, l2_loss, objective_loss
from shoestring.optimizers.base import OptimSettings, trained_parameters
from shoestring.training.batch import single_rows
from shoestring.types import Batch

# Gradients of activations in fp16 underflow below 6e-8; the loss is scaled up by this, and the gradient down again.
_FP16_SCALE = 2.0**10


def check_update(objective: Objective) -> None:
    """Raise `ConfigError` if `objective.update` names none."""
    if objective.update not in UPDATES:
        raise ConfigError(
            f'objective.update is "{objective.update}"', "there is no such update", nearest(objective.update, UPDATES)
        )


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
    """What an update did, in its last pass over the step's mini-batches.

    `loss`, `grad_norm` and `kl` are means over optimizer steps; the other figures are means over tokens. `finite` is
    false where a loss or gradient was not, and that optimizer step and those behind it were not applied; `culprits` are
    the problems whose rows were at fault, if single ones were. `terms` holds what else the objective's terms report.
    """

    loss: float = 0.0
    grad_norm: float = 0.0
    kl: float = 0.0
    clip_fraction: float = 0.0
    sampler_gap: float = 0.0
    applied: bool = False
    culprits: tuple[str, ...] = ()
    importance_mean: float = 1.0
    importance_capped: float = 0.0
    finite: bool = True
    terms: Mapping[str, float] = MappingProxyType({})


class Update(Protocol):
    """One step's change of the trained weights. What it draws comes from torch's own generators, which are seeded."""

    def __call__(
        self,
        policy: Policy,
        optimizer: torch.optim.Optimizer,
        batches: Sequence[Batch],
        objective: Objective,
        *,
        temperature: float,
        max_grad_norm: float,
        checkpointing: bool,
    ) -> UpdateReport: ...


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
    """Pass `objective.updates` times over the micro-batches, with an optimizer step for each mini-batch.

    The ratio is taken to the policy before the first optimizer step. The first mini-batch's log-probs of that policy
    are those of its own first pass; those of the others take an extra pass without gradient. A step whose gradient is
    not finite is never applied, and neither are those after it.
    """
    shares = _shares(batches)
    old = _old_logprobs(policy, batches, {i for share in shares[1:] for i in share}, temperature)
    tokens = max(sum(len(batch.row) for batch in batches), 1)
    report = UpdateReport()
    for number in range(objective.updates):
        done: list[_Gradient] = []
        for share in _in_order(shares, number):
            with policy.unchanged():
                own = [backward(policy, batches, i, old, objective, temperature, checkpointing) for i in share]
            found = _finished(policy, reduced(own), objective.l2, max_grad_norm)
            if not (math.isfinite(found.norm) and math.isfinite(found.loss)):
                optimizer.zero_grad(set_to_none=True)
                here = [batches[i] for i in share]
                culprits = _culprits(policy, here, objective, temperature, checkpointing)
                report = report._replace(applied=report.applied or bool(done), culprits=culprits, finite=False)
                return report._replace(loss=found.loss, grad_norm=found.norm)
            apply(policy, optimizer)
            done.append(found)
        report = _reported(done, tokens)
    return report


UPDATES: dict[str, Update] = {"backward": update}
"""How a step changes the weights, by the name in `objective.update`."""


def _shares(batches: Sequence[Batch]) -> list[list[int]]:
    """List the places of each mini-batch's micro-batches."""
    numbers = dict.fromkeys(batch.mini_batch for batch in batches)
    return [[i for i, batch in enumerate(batches) if batch.mini_batch == number] for number in numbers]


def _in_order(shares: list[list[int]], number: int) -> list[list[int]]:
    """Order the mini-batches of a pass. The first pass keeps the order of the cut, which is drawn already."""
    return Random(number).sample(shares, len(shares)) if number else shares


def _old_logprobs(
    policy: Policy, batches: Sequence[Batch], wanted: Collection[int], temperature: float
) -> list[Tensor | None]:
    """Run the policy without gradient over the wanted micro-batches, [N] each; None at the others."""
    old: list[Tensor | None] = [None] * len(batches)
    if not wanted:
        return old
    with policy.unchanged(), torch.no_grad():
        for index in wanted:
            old[index] = policy.logprobs(to_device(batches[index], policy.device), temperature)
    return old


class Sum(NamedTuple):
    """A figure summed over micro-batches."""

    total: float
    mean: bool


class _Gradient(NamedTuple):
    """What an optimizer step is taken with: the loss, the gradient's norm before it was clipped, and the figures."""

    loss: float
    norm: float
    sums: Mapping[str, Sum]


def reduced(figures: Sequence[Metrics]) -> dict[str, Sum]:
    """Sum the figures of micro-batches by name, waiting for the device once."""
    first = figures[0]
    stacked = torch.stack([torch.stack([own[name].total for name in first]) for own in figures])
    totals = stacked.double().sum(0).tolist()
    return {name: Sum(total, first[name].mean) for name, total in zip(first, totals, strict=True)}


def _finished(policy: Policy, sums: Mapping[str, Sum], l2: float, max_grad_norm: float) -> _Gradient:
    """Add the penalty to the gradient of a mini-batch, and clip it."""
    parameters, loss = list(policy.trained().values()), sums["loss"].total
    unscale(parameters, _scale(policy))
    if l2:
        penalty = l2_loss(parameters, l2)
        take_gradient(penalty)
        loss += penalty.item()
    loss += penalise(policy)
    return _Gradient(loss, float(clip_gradient(parameters, max_grad_norm)), sums)


def _reported(done: Sequence[_Gradient], tokens: int) -> UpdateReport:
    """Report a pass: means over its tokens, or over its optimizer steps."""
    values = {
        name: sum(step.sums[name].total for step in done) / (tokens if figure.mean else len(done))
        for name, figure in done[0].sums.items()
    }
    values["loss"] = sum(step.loss for step in done) / len(done)
    own: dict[str, Any] = {name: values.pop(name) for name in list(values) if name in UpdateReport._fields}
    norm = sum(step.norm for step in done) / len(done)
    return UpdateReport(**own, grad_norm=norm, applied=True, terms=values)


def backward(
    policy: Policy,
    batches: Sequence[Batch],
    index: int,
    old: list[Tensor | None],
    objective: Objective,
    temperature: float,
    checkpointing: bool,
) -> Metrics:
    """Run a micro-batch forward and backward, and fill `old[index]` where it is None.

    The figures are fp32 scalars on the policy's device; nothing waits for it.
    """
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
        loss, metrics = objective_loss(Tokens(logprob, before, reference, batch.row), batch.columns, objective)
        take_gradient(loss * _scale(policy))
    policy.pull_back()
    metrics["sampler_gap"] = Figure((before - batch.sampler_logprob).abs().sum())
    return {
        name: figure._replace(total=figure.total.to(policy.device, torch.float32)) for name, figure in metrics.items()
    }


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
        figures = backward(policy, [batch], 0, [None], objective, temperature, checkpointing)
        grads = [p.grad for p in parameters if p.grad is not None]
        if not (
            math.isfinite(float(figures["loss"].total)) and all(bool(torch.isfinite(grad).all()) for grad in grads)
        ):
            found.append(batch.problem_ids[0])
        policy.drop_gradients()
    return tuple(dict.fromkeys(found))
