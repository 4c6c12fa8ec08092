"""Judges a model as a run's own evaluations do: by its task's answers, or by its rewards."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

from shoestring import pool, runs
from shoestring.config import RunConfig
from shoestring.errors import ConfigError
from shoestring.evaluation import (
    EvalSettings,
    Evaluation,
    RewardEvaluation,
    check_judges,
    evaluate,
    evaluate_by_rewards,
)
from shoestring.policy import Policy
from shoestring.rewards import Rewards, TrainerState, check_task
from shoestring.rollout import rows
from shoestring.samplers.base import Engine


def check(config: RunConfig, settings: EvalSettings | None = None) -> None:
    """Raises `ConfigError` for what cannot be judged in a process of its own."""
    if config.evaluated_by == "answers":
        check_judges(config.task)
        return
    if settings is not None and settings.num_samples > 1:
        raise ConfigError(
            f"k is {list(settings.ks)} with {settings.num_samples} completions of a problem",
            "rewards judge one greedy completion of each",
            "leave k and samples out, or name the task, as in --task svamp, to judge by its answers",
        )
    check_task(config.rewards.functions, config.task)
    runs.refuse_python("it is judged by its rewards", config, "train(..., eval_data=[...]) evaluates as it trains")
    Rewards(config.rewards.functions, config.rewards.weights)


def judged(
    policy: Policy,
    engine: Engine,
    config: RunConfig,
    settings: EvalSettings,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Evaluation | RewardEvaluation:
    """What the config's task, or its rewards, make of what the policy writes to the problems that `settings` names."""
    if config.evaluated_by == "answers":
        return evaluate(policy, engine, config.task, settings, progress)
    rewards = Rewards(config.rewards.functions, config.rewards.weights)
    with pool.opened(rewards, config.task, config.rewards) as scoring:
        state = TrainerState(max_steps=config.steps)
        return evaluate_by_rewards(
            policy, engine, config.task, settings, lambda found: scoring.score(rows(found), state), progress
        )


def figure(config: RunConfig) -> Literal["accuracy", "reward"]:
    """What the judgement's figure is called."""
    return "accuracy" if config.evaluated_by == "answers" else "reward"
