"""What a run opens before its first step."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from shoestring.allocator import give_back
from shoestring.config.run import RunConfig
from shoestring.evaluation.contamination import overlap
from shoestring.evaluation.evaluate import first_problems
from shoestring.model.policy import Policy
from shoestring.records import reporter as report
from shoestring.records.reporter import Reporter
from shoestring.rollout.prompts import FreshPrompts, order
from shoestring.rollout.rollout import Encoded, encode
from shoestring.rollout.workers import Scoring
from shoestring.run import checkpoint
from shoestring.run import preflight as budgets
from shoestring.run.checkpoint import State
from shoestring.run.messages import describe
from shoestring.run.session import Session
from shoestring.training.update import build_optimizer
from shoestring.types import Problem, Prompt


def opened(
    folder: Path, config: RunConfig, problems: Sequence[Problem], scoring: Scoring, *, quiet: bool
) -> tuple[Session, State, Prompt]:
    """Everything that stays from step to step, the state to go on from, and the longest prompt there is."""
    torch.manual_seed(config.seed)  # for code of the user's own; everything of ours draws from hashes of the seed
    policy = budgets.loaded(config)
    longest = budgets.longest_prompt(config, policy, problems)
    plan = budgets.planned(config, policy, longest)
    optimizer = build_optimizer(policy.trained(), config.optim)
    last = checkpoint.latest(folder)
    state = checkpoint.restore(last, policy.trained(), optimizer, problems, policy.handle) if last else State()
    budgets.settle_pieces(state, config, plan)
    goes_on = state.step < config.steps
    report.cut_logs(folder, state.step, final=goes_on and bool(config.eval_every and state.step % config.eval_every))

    reporter = Reporter(folder, config.steps, quiet=quiet)
    engine = config.sampler.open(policy, state.wave_tokens)
    give_back(policy.device)  # joining weights leaves holes
    fresh = _fresh_prompts(config, policy, problems)
    if not last and policy.handle is not None and policy.handle.wants_prompts:
        policy.handle.prepare(policy, fresh.take(0, config.sampling.num_prompts)[0])
    trunk_layer, why_none = budgets.trunk_layer(config, policy, engine, plan)
    session = Session(
        folder, config, problems, fresh, scoring, policy, engine, optimizer, reporter, plan, state.step, trunk_layer
    )
    reporter.say(describe(config, policy, folder, state))
    if config.eval_every:
        judging = first_problems(config.task, config.evaluation.split, config.evaluation.num)
        budgets.check_lengths(config, policy, judging)
        shared = overlap(judging, config.task)
        if shared and shared.shared:
            reporter.warn(f"Evaluations: {shared.describe()}.")
    if plan is not None:
        reporter.say(budgets.describe(plan))
    if why_none:
        reporter.say(f"trunk cache: off, since {why_none}")
    return session, state, longest


def _fresh_prompts(config: RunConfig, policy: Policy, problems: Sequence[Problem]) -> FreshPrompts:
    """The run's problems as prompts, in its order."""

    def encoded(index: int) -> Encoded:
        return encode(
            policy,
            config.task,
            [problems[index]],
            config.sampling.max_new_tokens,
            max_prompt_tokens=config.sampling.max_prompt_tokens,
            allow_truncated=config.allow_truncated_prompts,
        )

    return FreshPrompts(lambda start, num: order(len(problems), config.seed, start, num), encoded)
