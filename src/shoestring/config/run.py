"""A run's settings: frozen, strict, read from TOML and dotted overrides, printed back whole."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, SerializeAsAny, model_validator

from shoestring.adapters import ADAPTERS
from shoestring.algorithms import ALGORITHMS
from shoestring.config.files import read
from shoestring.config.sections import EvaluationSettings, ExecutionSettings
from shoestring.config.settings import Settings, build, pick
from shoestring.config.sizes import checked_size
from shoestring.errors import ConfigError
from shoestring.model.load import ModelSettings
from shoestring.objectives.loss import Objective, over_defaults
from shoestring.optimizers import OPTIMIZERS
from shoestring.optimizers.base import OptimSettings
from shoestring.rewards.settings import RewardSettings
from shoestring.samplers import SAMPLERS, Sampling
from shoestring.tasks import TASKS
from shoestring.tasks.base import has_answers, parts
from shoestring.trackers import TRACKERS


def named_model(value: Any) -> Any:
    """`model = "x"` is short for a table with that name."""
    return {"name": value} if isinstance(value, str | os.PathLike) else value


# Printed with the settings of the entry that it is.
Optim = Annotated[SerializeAsAny[OptimSettings], BeforeValidator(partial(pick, OPTIMIZERS, "optim", default="adamw"))]


class RunConfig(Settings):
    """Everything a run depends on. With no argument: the embedded default."""

    model: Annotated[ModelSettings, BeforeValidator(named_model)] = ModelSettings()
    task: Annotated[Any, BeforeValidator(partial(pick, TASKS, "task", default="multiplication"))] = Field(
        default={"name": "multiplication"}
    )
    algorithm: Annotated[Any, BeforeValidator(partial(pick, ALGORITHMS, "algorithm", default="s-grpo"))] = Field(
        default={"name": "s-grpo"}
    )
    # Settled from the algorithm's defaults before anything else is checked.
    objective: Objective = Field(default=None)  # type: ignore[assignment]
    adapter: Annotated[Any, BeforeValidator(partial(pick, ADAPTERS, "adapter", default="lora"))] = Field(
        default={"name": "lora"}
    )
    sampler: Annotated[Any, BeforeValidator(partial(pick, SAMPLERS, "sampler", default="auto"))] = Field(
        default={"name": "auto"}
    )
    sampling: Sampling = Sampling()
    optim: Optim = Field(default={"name": "adamw"})  # type: ignore[assignment]
    rewards: RewardSettings = RewardSettings()
    evaluation: EvaluationSettings = EvaluationSettings()
    execution: ExecutionSettings = ExecutionSettings()
    tracking: Annotated[Any, BeforeValidator(partial(pick, TRACKERS, "tracking", default="none"))] = Field(
        default={"name": "none"}
    )
    """Where the figures of metrics.jsonl and evals.jsonl go besides."""
    memory: Annotated[str | None, BeforeValidator(checked_size)] = None
    """The most memory that the run may reserve on the card, such as "6GiB" or "50%"; without it, training may use what
    sampling needs. On the CPU it bounds what the plan predicts."""
    steps: int = Field(default=150, ge=1)
    seed: int = Field(default=0, ge=0)
    eval_every: int = Field(default=0, ge=0)
    """Evaluate every so many steps; 0 never."""
    save_every: int = Field(default=50, ge=0)
    """Save a checkpoint every so many steps; 0 only at the end."""
    save_total_limit: int | None = Field(default=None, ge=1)
    """Keep only so many checkpoints, the newest; default: all."""
    allow_truncated_prompts: bool = False
    """Cut prompts that do not fit the model's context from the left, and count them, instead of refusing them."""
    out: str | None = None
    """The run's folder; None takes runs/<task>-<algorithm>-<next free number>."""

    @model_validator(mode="before")
    @classmethod
    def _settle_objective(cls, data: Any) -> Any:
        """Puts the algorithm's own defaults where `[objective]` says nothing, and the sampler's."""
        if not isinstance(data, dict):
            return data
        algorithm = pick(ALGORITHMS, "algorithm", data.get("algorithm", {}), "s-grpo")
        given = data.get("objective") or {}
        given = given.model_dump(exclude_unset=True) if isinstance(given, Objective) else given
        if not isinstance(given, Mapping):
            raise ConfigError(
                f"objective is {given!r}", "it is a table", "write [objective] with keys such as beta = 0.04"
            )
        defaults = algorithm.objective._asdict()
        if not getattr(pick(ADAPTERS, "adapter", data.get("adapter", {}), "lora"), "zero_is_base", True):
            defaults["l2"] = 0.0  # an adapter of 0 is the base model as a rule; a model of 0 is none
        exact = pick(SAMPLERS, "sampler", data.get("sampler", {}), "auto").exact
        settled = over_defaults(given, {**defaults, "importance_correction": "auto"})
        if settled["importance_correction"] == "auto":
            settled["importance_correction"] = "none" if exact else "token-truncate"
        return {**data, "objective": settled}

    @model_validator(mode="after")
    def _fits_together(self) -> RunConfig:
        if self.sampling.num_completions < self.algorithm.least_completions:
            raise ConfigError(
                f"sampling.num_completions is {self.sampling.num_completions}",
                "a group of one has no mean to differ from, so every advantage would be 0",
                "use 2 or more",
            )
        if self.sampling.temperature == 0:
            raise ConfigError(
                "sampling.temperature is 0",
                "greedy completions of a prompt are all the same, so every advantage would be 0",
                "use 1.0",
            )
        if self.sampling.top_k == 1:
            raise ConfigError(
                "sampling.top_k is 1",
                "completions of a prompt are all the same then, so every advantage would be 0",
                "use 0 (no limit) or 2 or more",
            )
        if self.evaluation.keep == "best" and not self.eval_every:
            raise ConfigError(
                'evaluation.keep is "best" and eval_every 0',
                "without evaluations there is no best",
                "write eval_every = 20 or so, or leave evaluation.keep out",
            )
        if self.sampling.entropy:
            raise ConfigError(
                "sampling.entropy is true", "the algorithm says whether entropies are needed", "leave it out"
            )
        self.optim.check_trained(whole=self.adapter.name == "none")
        if self.adapter.name == "none":
            self._suits_training_all_weights()
        return self

    @property
    def evaluated_by(self) -> Literal["answers", "rewards"]:
        """What `evaluation.by` comes to."""
        if self.evaluation.by == "auto":
            return "answers" if has_answers(parts(self.task)[0]) else "rewards"
        return self.evaluation.by

    @property
    def drawing(self) -> Sampling:
        """How a step's completions are drawn: `sampling`, with entropies where the algorithm needs them."""
        needed = getattr(self.algorithm, "needs_entropy", False)
        return self.sampling.model_copy(update={"entropy": True}) if needed else self.sampling

    def _suits_training_all_weights(self) -> None:
        if self.objective.l2 > 0:
            raise ConfigError(
                f'objective.l2 is {self.objective.l2} and adapter.name "none"',
                "it would pull every weight of the model to 0",
                "write objective.l2 = 0; objective.beta holds the model near its start",
            )
        if self.model.dtype == "nf4":
            raise ConfigError(
                'model.dtype is "nf4" and adapter.name "none"',
                "a step is smaller than what lies between two values of a 4-bit weight",
                'use adapter.name = "lora", or another dtype',
            )
        if self.model.dtype == "fp16":
            raise ConfigError(
                'model.dtype is "fp16" and adapter.name "none"',
                "the weights' gradients would be fp16 too, in which most of them are 0",
                'use "bf16" or "fp32"',
            )


_OF_A_WARM_START = {"epochs", "batch_size", "max_length", "save_dtype"}


def settle(values: Mapping[str, Any]) -> RunConfig:
    """The config of a nested mapping; raises `ConfigError`."""
    for name in sorted(_OF_A_WARM_START & values.keys()):
        raise ConfigError(f'"{name}" is set', "that is a setting of a warm start", "use `shoestring sft`")
    return build(RunConfig, dict(values), "")


def load(recipe: str | Path | None, overrides: Sequence[str] = ()) -> RunConfig:
    """The config of a TOML recipe (None: the embedded default) with overrides such as "optim.lr=1e-4" on top."""
    return settle(read(recipe, overrides))
