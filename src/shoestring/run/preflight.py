"""The memory plan at work in a run: checked before the model loads, rehearsed, and compared with what was measured."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from shoestring.allocator import OutOfMemory, free_bytes, give_back, is_out_of_memory, total_bytes
from shoestring.config.run import RunConfig
from shoestring.config.sizes import size_text
from shoestring.errors import ConfigError
from shoestring.memory.budget import budget_bytes, check_room, context_bytes
from shoestring.memory.plan import Plan, check, predict
from shoestring.memory.prompt_length import longest_problems
from shoestring.model.chat import Reader
from shoestring.model.fast.decoder import unsupported
from shoestring.model.load import load_tokenizer
from shoestring.model.policy import Policy
from shoestring.model.shapes import read_shape
from shoestring.records.clock import Clock
from shoestring.rollout.rollout import encode
from shoestring.run.checkpoint import State
from shoestring.run.loading import load_policy
from shoestring.samplers.base import Engine
from shoestring.training import micro_batching as pieces
from shoestring.training.micro_batching import Pieces
from shoestring.types import Problem, Prompt

if TYPE_CHECKING:
    from shoestring.run.session import Session

log = logging.getLogger("shoestring")

# Micro-batches where there is no plan.
_UNPLANNED_TOKENS = Pieces.micro_batch_tokens
# Part of the free memory that a run without a budget plans with.
_ROOM = 0.92


def checked_before_loading(config: RunConfig, problems: Sequence[Problem], device: torch.device) -> int | None:
    """The budget in bytes; raises `ConfigError` if it is not there, or if the run cannot work with it."""
    budget = budget_bytes(config.memory, total_bytes(device))
    if budget is not None:
        check_room(budget, device)
        shape = read_shape(config.model.name, family=config.model.family, revision=config.model.revision)
        reader = Reader(load_tokenizer(config.model), config.model.name, shape.context)
        check(predict(config, prompt_tokens=len(longest_prompt(config, reader, problems).token_ids)))
    return budget


def longest_prompt(config: RunConfig, reader: Policy | Reader, problems: Sequence[Problem]) -> Prompt:
    """The longest of the prompts with the longest text: one too long is told now and not in the middle of the run.

    Of data that are made as they are read, the longest of some.
    """
    prompts, _ = encode(
        reader,
        config.task,
        longest_problems(config.task, problems),
        config.sampling.max_new_tokens,
        max_prompt_tokens=config.sampling.max_prompt_tokens,
        allow_truncated=config.allow_truncated_prompts,
    )
    return max(prompts, key=lambda prompt: len(prompt.token_ids))


def check_lengths(config: RunConfig, reader: Policy | Reader, judging: Sequence[Problem]) -> None:
    """Raises `DataError` if a prompt of the evaluations is too long, now and not in the middle of the run."""
    most = config.sampling.max_new_tokens
    encode(
        reader,
        config.task,
        longest_problems(config.task, judging),
        most,
        allow_truncated=config.allow_truncated_prompts,
    )


def loaded(config: RunConfig) -> Policy:
    """The policy; raises `OutOfMemory` if the card is too small for its weights."""
    try:
        policy = load_policy(
            config.model,
            adapter=config.adapter,
            seed=config.seed,
            keep_reference=config.objective.beta > 0,
            device=config.execution.device,
        )
        policy.plain = config.execution.plain
        return policy
    except Exception as error:
        if not is_out_of_memory(error):
            raise
    raise OutOfMemory(
        f"memory ran out while loading {config.model.name}",
        "the weights alone do not fit",
        'set model.dtype = "nf4" or "bf16", use a smaller model, or end what else uses the card',
    )


def planned(config: RunConfig, policy: Policy, longest: Prompt) -> Plan | None:
    """The plan with the real prompts' length; None for a model whose shape is not known and a run without a budget."""
    room = None
    if policy.device.type == "cuda":
        held = torch.cuda.memory_allocated(policy.device)
        room = int((free_bytes(policy.device) + held) * _ROOM)
    try:
        plan = predict(config, prompt_tokens=len(longest.token_ids), room=room)
    except ConfigError as error:
        if config.memory is not None:
            raise
        log.warning("There is no memory plan: %s", error)
        return None
    check(plan)
    return plan


def settle_pieces(state: State, config: RunConfig, plan: Plan | None) -> None:
    """The pieces that the plan asks for; a resumed run goes on with those that proved to fit, unless the plan is
    another."""
    execution = config.execution
    micro = plan.micro_batch if plan else execution.micro_batch_tokens or _UNPLANNED_TOKENS
    on = plan.sizes.checkpointing if plan else execution.checkpointing is True
    planned = [plan.wave_tokens if plan else execution.wave_tokens, micro, on]
    if state.planned != planned:
        state.planned = planned
        state.wave_tokens = planned[0]
        state.pieces = Pieces(micro, on)
    state.pieces.may_checkpoint = execution.checkpointing == "auto"
    if execution.checkpointing is False:
        state.pieces.checkpointing = False


def trunk_layer(config: RunConfig, policy: Policy, engine: Engine, plan: Plan | None) -> tuple[int | None, str]:
    """The layer that training may start from with what sampling saw there, or None and why not.

    That is exact as long as nothing below is trained or random and the layers above see nothing but the residual
    stream of the same tokens at the same places. Modules are in evaluation mode for good, so nothing is random.
    """
    first = policy.first_gradient_layer
    if config.execution.trunk_cache is False:
        return None, ""
    if first == 0:
        return None, "the lowest layer is trained" if policy.adapted is not None else "all layers are trained"
    if not getattr(engine, "keeps_trunk", False):
        return None, "this sampler keeps nothing but tokens"
    if policy.plain:
        return None, "execution.plain is on"
    if not policy.takes_trees:
        return None, "the layers of this model see more than the residual stream of all tokens before"
    if plan is not None and not plan.work.trunk_rows:
        return None, "the budget has no room for it"
    return first, ""


def rehearse(session: Session, state: State, longest: Prompt) -> None:
    """The largest pieces of a step, done once and thrown away, so that a run that cannot fit fails in its first minute:
    on a GPU, and wherever a budget is set."""
    config, sampling = session.config, session.config.drawing
    if session.policy.device.type != "cuda" and config.memory is None:
        return
    spare = pieces.rehearse(session.policy, session.optimizer, longest, config, state.pieces, session.trunk_layer)
    give_back(session.policy.device)
    shorter = Prompt(longest.problem, longest.token_ids[1:] or longest.token_ids, longest.answer_start - 1)
    prompts = [longest, *[shorter] * (sampling.num_prompts - 1)]  # of two lengths, so that attention needs its mask
    keeping: dict[str, Any] = {} if session.trunk_layer is None else {"trunk_layer": session.trunk_layer}
    session.engine.rehearse(prompts, num=sampling.num_completions, sampling=sampling, **keeping)
    del spare  # until here its state took the place of the optimizer's
    give_back(session.policy.device)


def describe(plan: Plan) -> str:
    """The opening line about memory."""
    work, sizes = plan.work, plan.sizes
    budget = f" of {size_text(plan.budget)}" if plan.budget is not None else ""
    return (
        f"memory: {size_text(plan.peak)}{budget} predicted; {work.rows} completions in {plan.waves} "
        f"wave{'s' if plan.waves > 1 else ''}, micro-batches of {plan.micro_batch:,} tokens"
        + (", layers recomputed" if sizes.checkpointing else "")
    )


def other_paths(plan: Plan, policy: Policy, engine: Engine) -> str:
    """Where a run went another way than the memory plan assumed; empty if nowhere."""
    work = plan.work
    pairs = {
        "sampling by our own decode step": (work.graph, getattr(engine, "keeps_trunk", False)),
        "training by our own layers": (work.own_layers, policy.own_layers),
        "training over token trees": (work.trees, policy.takes_trees),
    }
    differ = [name for name, (planned, taken) in pairs.items() if planned != taken]
    if not differ:
        return ""
    return (
        f"The memory plan is off: {' and '.join(differ)} was planned otherwise than it was done "
        f"(plan: {work.slow or 'the fast path'}; done: {unsupported(policy.base, policy.handle) or 'the fast path'}). "
        "Please report the model and the adapter."
    )


def compare(session: Session, clock: Clock) -> None:
    """Compare what was planned with what happened, after the first step: the paths taken, and on a GPU the memory."""
    plan, device = session.plan, session.policy.device
    if plan is None:
        return
    if differ := other_paths(plan, session.policy, session.engine):
        session.reporter.warn(differ)
    if device.type != "cuda":
        return
    predicted = {phase.phase: phase.bytes for phase in plan.phases}
    rows = [
        ("sampling", predicted["peak while sampling"], clock.peaks.get("sample", 0)),
        ("training", predicted["peak while training"], clock.peaks.get("train", 0)),
        ("reserved", plan.peak, clock.reserved),
        ("context", predicted["context"], context_bytes(device)),
    ]
    text = "; ".join(f"{name} {size_text(got)} (predicted {size_text(said)})" for name, said, got in rows)
    session.reporter.say(f"memory measured: {text}")
