"""A run's settings: frozen, strict, read from TOML and dotted overrides, printed back whole."""

from __future__ import annotations

import copy
import json
import os
import tomllib
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from shoestring.adapters import ADAPTERS
from shoestring.algorithms import ALGORITHMS
from shoestring.config.settings import Settings, as_tuple, build, pick
from shoestring.errors import ConfigError
from shoestring.memory.budget import checked_size
from shoestring.model.load import ModelSettings
from shoestring.objectives.loss import Objective
from shoestring.samplers import SAMPLERS, Sampling
from shoestring.tasks import TASKS
from shoestring.tasks.base import has_answers, parts
from shoestring.trackers import TRACKERS


class OptimSettings(Settings):
    """AdamW (arXiv 1711.05101) over the trained weights."""

    name: Literal["adamw", "adamw-8bit", "adamw-cpu"] = "adamw"
    """Where its state lies: in fp32 beside the weights, in 8 bits (needs the extra `full`), or in the host's memory."""
    lr: float = Field(default=3e-4, gt=0)
    betas: tuple[float, float] = (0.9, 0.99)
    eps: float = Field(default=1e-8, gt=0)
    weight_decay: float = Field(default=0.0, ge=0)
    warmup_steps: int = Field(default=5, ge=0)
    """Steps over which the rate rises linearly to `lr`."""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """What the rate does after that; the last two end at 0 with the run."""
    max_grad_norm: float = Field(default=1.0, gt=0)


class RewardSettings(Settings):
    """Which functions score a completion: dotted paths in TRL's form, and "task" for the task's own score."""

    functions: Annotated[tuple[str, ...], BeforeValidator(as_tuple)] = ("task",)
    weights: tuple[float, ...] | None = None
    workers: int = Field(default=0, ge=0)
    """Processes that score, each completion by itself, while others are sampled; 0 scores in the loop's own thread."""
    timeout: float | None = Field(default=None, gt=0)
    """Seconds that a completion may take to score in a worker; None waits."""
    on_timeout: Literal["stop", "zero", "unscored"] = "stop"
    """What a completion does that takes longer: stop the run, count 0, or count as its prompt's others do in the mean,
    like one that every function passes over."""

    @model_validator(mode="after")
    def _a_timeout_can_act(self) -> RewardSettings:
        if self.timeout is not None and self.workers == 0:
            raise ConfigError(
                f"rewards.timeout is {self.timeout:g} and rewards.workers 0",
                "a function that runs in the loop's own thread cannot be stopped",
                "set rewards.workers to 1 or more, or leave the timeout out",
            )
        if self.on_timeout != "stop" and self.timeout is None:
            raise ConfigError(
                f'rewards.on_timeout is "{self.on_timeout}" without rewards.timeout',
                "nothing ever takes too long",
                "set rewards.timeout, in seconds a completion",
            )
        return self

    @model_validator(mode="after")
    def _a_weight_each(self) -> RewardSettings:
        if not self.functions:
            raise ConfigError("rewards.functions is empty", "nothing would be scored", 'write ["task"] or your own')
        named = (
            "functions" in self.model_fields_set
        )  # else they may come as Python functions, with `train(rewards=...)`
        if named and self.weights is not None and len(self.weights) != len(self.functions):
            raise ConfigError(
                f"rewards.weights has {len(self.weights)} values and rewards.functions {len(self.functions)}",
                "each function needs one weight",
                "make them equally long, or leave the weights out",
            )
        return self


class EvaluationSettings(Settings):
    """The evaluations during a run (`eval_every`)."""

    split: str = "validation"
    num: int = Field(default=100, ge=1)
    """Problems, the first ones of the split."""
    by: Literal["auto", "answers", "rewards"] = "auto"
    """What judges: whether answers are right, or the mean of the run's own rewards; "auto" takes the latter where the
    task has no answers."""
    keep: Literal["last", "best"] = "last"
    """Which weights the run ends with: the last, or the best in these evaluations."""


class ExecutionSettings(Settings):
    """How a step is carried out. Nothing here changes its result beyond rounding."""

    device: Annotated[str, Field(pattern=r"^(auto|cpu|cuda(:\d+)?)$")] = "auto"
    """"auto", "cpu", "cuda" or "cuda:N"."""
    wave_tokens: int | None = Field(default=None, ge=1)
    """Cache slots that sampling fills at once; None leaves it to the memory plan."""
    micro_batch_tokens: int | None = Field(default=None, ge=1)
    """Padded tokens that the training forward takes at once; None leaves it to the memory plan."""
    plain: bool = False
    """Train through transformers' own layers, each completion behind a copy of its prompt: slower, and the reference of
    what is faster."""
    trunk_cache: bool | Literal["auto"] = "auto"
    """Keep, from sampling to training, what the layers below the lowest trained one gave for each token, so that they
    are not run again. "auto" leaves it to the memory plan."""
    checkpointing: bool | Literal["auto"] = "auto"
    """Recompute the layers that carry gradient in the backward pass: less memory, more time. "auto" leaves it to the
    memory plan."""


def named_model(value: Any) -> Any:
    """`model = "x"` is short for a table with that name."""
    return {"name": value} if isinstance(value, str | os.PathLike) else value


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
    optim: OptimSettings = OptimSettings()
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
        if pick(ADAPTERS, "adapter", data.get("adapter", {}), "lora").name == "none":
            defaults["l2"] = 0.0  # an adapter of 0 is the base model; a model of 0 is none
        exact = pick(SAMPLERS, "sampler", data.get("sampler", {}), "auto").exact
        settled = {**defaults, "importance_correction": "auto", **given}
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


# The entry that a table without `name` holds settings of.
DEFAULTS = {"task": "multiplication", "algorithm": "s-grpo", "adapter": "lora", "sampler": "auto", "tracking": "none"}


_OF_A_WARM_START = {"epochs", "batch_size", "max_length", "save_dtype"}


def settle(values: Mapping[str, Any]) -> RunConfig:
    """The config of a nested mapping; raises `ConfigError`."""
    for name in sorted(_OF_A_WARM_START & values.keys()):
        raise ConfigError(f'"{name}" is set', "that is a setting of a warm start", "use `shoestring sft`")
    return build(RunConfig, dict(values), "")


def load(recipe: str | Path | None, overrides: Sequence[str] = ()) -> RunConfig:
    """The config of a TOML recipe (None: the embedded default) with overrides such as "optim.lr=1e-4" on top."""
    return settle(read(recipe, overrides))


def read(recipe: str | Path | None, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """The nested mapping that a recipe and overrides spell out."""
    values: dict[str, Any] = {}
    if recipe is not None:
        path = Path(recipe)
        if not path.is_file():
            raise ConfigError(f'the recipe is "{recipe}"', "there is no such file", "give the path of a TOML recipe")
        try:
            values = tomllib.loads(path.read_text(encoding="utf-8"))
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise ConfigError(f'the recipe is "{recipe}"', f"it is not TOML ({error})", "mend that line") from None
    for override in sorted(overrides, key=lambda text: not _names_one(text)):  # these first
        values = overridden(values, override)
    return values


def _names_one(override: str) -> bool:
    """Whether it says which algorithm, task or the like: algorithm.name=grpo, or algorithm=grpo."""
    key = override.partition("=")[0]
    return key.endswith(".name") or is_named(key)


def is_named(key: str) -> bool:
    """Whether a bare text under the key is a name."""
    return key.strip() in (*DEFAULTS, "model")


def overridden(values: Mapping[str, Any], text: str) -> dict[str, Any]:
    """A nested mapping with `a.b.c=value` set in it. The value is read as TOML; what is not TOML is a string.

    A new `name` starts its table afresh, since the settings of one algorithm or task are not those of another.
    `algorithm=grpo` is short for `algorithm.name=grpo`, and so with the others that have names.
    """
    key, equals, raw = text.partition("=")
    if not equals or not key.strip():
        raise ConfigError(
            f'the override is "{text}"', "it has no key and value", "write key=value, such as optim.lr=1e-4"
        )
    *parents, last = key.strip().split(".")
    value = parsed(raw.strip())
    if is_named(key) and isinstance(value, str):
        parents, last = [last], "name"
    changed = copy.deepcopy(dict(values))
    table: dict[str, Any] = changed
    for part in parents:
        inner = table.setdefault(part, {})
        if isinstance(inner, str):  # model = "x", then model.dtype=...
            inner = table[part] = {"name": inner}
        if not isinstance(inner, dict):
            raise ConfigError(f'the override is "{text}"', f"{part} is not a table", "write a key of a table")
        table = inner
    fresh = last == "name" and len(parents) == 1 and parents != ["optim"]  # the optimizers share their settings
    if fresh and table.get("name", DEFAULTS.get(parents[0], value)) != value:
        table.clear()
    table[last] = value
    return changed


def parsed(raw: str) -> Any:
    """The value that a text stands for in TOML; what is not TOML is the text itself."""
    try:
        return tomllib.loads(f"x = {raw}")["x"]
    except tomllib.TOMLDecodeError:
        return raw


def dump(config: Settings) -> str:
    """The config as TOML; `load` reads it back to the same config. Keys that are None are left out."""
    return _table(config.model_dump(mode="json", exclude_none=True), "")


def _table(values: dict[str, Any], path: str) -> str:
    plain = {key: value for key, value in values.items() if not isinstance(value, dict)}
    tables = {key: value for key, value in values.items() if isinstance(value, dict) and value}
    text = "".join(f"{_key(key)} = {literal(value)}\n" for key, value in plain.items())
    for key, value in tables.items():
        name = f"{path}{_key(key)}"
        text += f"\n[{name}]\n{_table(value, name + '.')}"
    return text


def _key(key: str) -> str:
    return key if key.replace("_", "a").replace("-", "a").isalnum() and key.isascii() else json.dumps(key)


def literal(value: Any) -> str:
    """A value as TOML writes it. JSON's strings and numbers are TOML's too."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list):
        return "[" + ", ".join(literal(item) for item in value) + "]"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{_key(key)} = {literal(item)}" for key, item in value.items()) + "}"
    return json.dumps(value)


def differences(left: Settings, right: Settings) -> list[str]:
    """Dotted names of the settings in which two configs differ."""
    a, b = _flat(left.model_dump(mode="json")), _flat(right.model_dump(mode="json"))
    return sorted(key for key in {*a, *b} if a.get(key) != b.get(key))


def _flat(values: dict[str, Any], path: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat.update(_flat(value, f"{path}{key}.") if isinstance(value, dict) else {f"{path}{key}": value})
    return flat
