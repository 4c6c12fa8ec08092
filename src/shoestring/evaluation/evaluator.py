"""Judges a model as a run's own evaluations do: by its task's answers, or by its rewards."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from shoestring.config.run import RunConfig, settle
from shoestring.errors import ConfigError
from shoestring.evaluation.evaluate import (
    EvalSettings,
    Evaluation,
    RewardEvaluation,
    check_judges,
    evaluate,
    evaluate_by_rewards,
)
from shoestring.model.policy import Policy
from shoestring.rewards.base import RewardFunction, TrainerState
from shoestring.rewards.functions import Rewards, check_task
from shoestring.rewards.settings import RewardSettings, refuse_python
from shoestring.rollout import workers as pool
from shoestring.rollout.rollout import rows
from shoestring.samplers.base import Engine
from shoestring.tasks.base import Task

_BY_ANSWERS = "name the task, as in --task svamp, to judge by its answers"


@dataclass(frozen=True)
class Judge:
    """A task's answers, or the rewards named (None: the answers), whose place `functions` may take. To these it is the
    last of `steps` steps, whatever is judged, so that before and after compare."""

    task: Task
    rewards: RewardSettings | None = None
    steps: int = 0
    functions: tuple[RewardFunction | str, ...] = ()

    @classmethod
    def of(cls, config: RunConfig, functions: tuple[RewardFunction | str, ...] = ()) -> Judge:
        by_rewards = functions or config.evaluated_by == "rewards"
        return cls(config.task, config.rewards if by_rewards else None, config.steps, functions)

    @classmethod
    def of_run(cls, saved: Mapping[str, Any], task: Task) -> Judge:
        """That of what a run's config.toml holds, of which nothing else need be valid here; a model that is no run of
        ours is judged by answers."""
        needed = {key: saved[key] for key in ("steps", "eval_every", "evaluation", "rewards") if key in saved}
        if not {"evaluation", "rewards"} <= needed.keys():
            return cls(task)
        return cls.of(settle(needed).model_copy(update={"task": task}))

    @property
    def figure(self) -> str:
        """What the judgement's figure is called."""
        return "accuracy" if self.rewards is None else "reward"

    def check(
        self,
        settings: EvalSettings | None = None,
        call: str = f"train(..., eval_data=[...]) evaluates as it trains; or {_BY_ANSWERS}",
    ) -> None:
        """Raises `ConfigError` for what cannot be judged; `call` can, where the rewards are not at hand."""
        if self.rewards is None:
            check_judges(self.task)
            return
        if settings is not None and (settings.num_samples > 1 or settings.temperature):
            raise ConfigError(
                f"it is judged by its rewards, and k is {list(settings.ks)}, samples {settings.num_samples}, "
                f"temperature {settings.settled_temperature:g}",
                "rewards judge one greedy completion of each problem",
                f"leave these out, or {_BY_ANSWERS}",
            )
        if not self.functions:
            refuse_python("it is judged by its rewards", self.rewards, call)
        scorer = self._scorer(self.rewards)
        check_task([name for name in scorer.given if isinstance(name, str)], self.task)

    def judged(
        self,
        policy: Policy,
        engine: Engine,
        settings: EvalSettings,
        progress: Callable[[int, int], None] = lambda done, total: None,
    ) -> Evaluation | RewardEvaluation:
        """What comes of what the policy writes to the problems that `settings` names."""
        if self.rewards is None:
            return evaluate(policy, engine, self.task, settings, progress)
        state = TrainerState(global_step=self.steps, max_steps=self.steps)
        with pool.opened(self._scorer(self.rewards), self.task, self.rewards) as scoring:
            return evaluate_by_rewards(
                policy, engine, self.task, settings, lambda found: scoring.score(rows(found), state), progress
            )

    def _scorer(self, rewards: RewardSettings) -> Rewards:
        """The weights are the run's, if there are as many."""
        functions = self.functions or rewards.functions
        weights = rewards.weights
        return Rewards(functions, weights if weights is None or len(weights) == len(functions) else None)
