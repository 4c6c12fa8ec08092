"""The runs of a sweep: what `--over` and `--seeds` ask for, each combination checked before any of them starts."""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from shoestring.config import run as configs
from shoestring.config.files import is_named, literal, parsed, read
from shoestring.config.run import RunConfig
from shoestring.errors import ConfigError
from shoestring.evaluation.evaluator import Judge
from shoestring.hashing import stable_hash
from shoestring.model import load as models
from shoestring.run import checkpoint
from shoestring.run import folder as runs


@dataclass(frozen=True)
class Trial:
    """One run: its config, the swept values in it (but for the seed), and what judges it (`num` None: all problems)."""

    config: RunConfig
    swept: dict[str, Any]
    split: str
    num: int | None

    @property
    def label(self) -> str:
        return " ".join(f"{key}={value}" for key, value in self._values.items())

    @property
    def name(self) -> str:
        """The label as the name of a folder that can be given as an argument."""
        return ",".join(f"{key}-{_plain(value)}" for key, value in self._values.items())

    @property
    def _values(self) -> dict[str, Any]:
        return {**self.swept, "seed": self.config.seed}

    @property
    def folder(self) -> Path:
        return Path(str(self.config.out))

    @property
    def result(self) -> Path:
        """The evaluation of what came of it."""
        return self.folder / f"evaluation-{self.split}-{self.num or 'all'}.json"

    @property
    def base(self) -> Path:
        """The evaluation of what it started from; trials share it."""
        config = self.config
        same: tuple[Any, ...] = (config.model, config.task, config.sampling.max_new_tokens)
        same += (config.allow_truncated_prompts,)
        if config.evaluated_by == "rewards":
            same += (config.rewards.functions, config.rewards.weights, config.steps)
        return self.folder.parent / f"base-{stable_hash(*same, self.split, self.num):016x}.json"

    @property
    def log(self) -> Path:
        return Path(f"{self.folder}.log")

    @property
    def done(self) -> bool:
        files = self.result.is_file() and self.base.is_file()
        return files and checkpoint.steps_done(self.folder) == self.config.steps


def axis(text: str) -> tuple[str, list[Any]]:
    """A setting and its values, as `--over` has them.

    >>> axis("optim.lr=1e-5,3e-5"), axis("algorithm=grpo,t-spmo"), axis("task.digits=[[2, 2], [1, 3]]")
    (('optim.lr', [1e-05, 3e-05]), ('algorithm.name', ['grpo', 't-spmo']), ('task.digits', [[2, 2], [1, 3]]))
    """
    key, _, raw = (part.strip() for part in text.partition("="))
    whole = parsed(raw)
    values = whole if isinstance(whole, list) else [parsed(part.strip()) for part in raw.split(",")]
    if not key or not values or "" in values or (raw.startswith(("[", "{")) and not isinstance(whole, list)):
        raise ConfigError(
            f'--over is "{text}"',
            "it is no setting with values",
            'write one such as optim.lr=1e-5,3e-5; values with commas as a TOML list: task.system=["a, b", "c"]',
        )
    bare = is_named(key) and all(isinstance(value, str) for value in values)
    return f"{key}.name" if bare else key, values


def trials(
    recipe: str | None,
    overrides: Sequence[str],
    over: Sequence[str],
    seeds: Sequence[int] | None,
    out: str,
    split: str | None = None,
    num: int | None = None,
) -> list[Trial]:
    """Every run of the sweep, those that differ in the seed side by side; raises `ShoestringError` for what cannot
    run, as far as that needs no model."""
    axes = [axis(text) for text in over]
    _refuse_clashes([key for key, _ in axes], [text.partition("=")[0].strip() for text in overrides])
    axes.append(("seed", list(seeds) if seeds is not None else [read(recipe).get("seed", 0)]))
    found: dict[str, Trial] = {}
    for values in itertools.product(*(values for _, values in axes)):
        swept = {key: value for (key, _), value in zip(axes, values, strict=True)}
        config = configs.load(recipe, [*overrides, *(f"{key}={literal(v)}" for key, v in swept.items())])
        del swept["seed"]
        own = config.evaluation
        trial = Trial(config, swept, split or own.split, num if split or num else own.num)
        other = found.setdefault(config.model_dump_json(exclude={"out"}), trial)
        if other is not trial:
            given = f"the sweep holds {other.label} and {trial.label}"
            raise ConfigError(given, "they are one and the same run", "leave one of them out")
    placed = [replace(t, config=t.config.model_copy(update={"out": f"{out}/{t.name}"})) for t in found.values()]
    _check(placed)
    return placed


def _refuse_clashes(swept: list[str], fixed: list[str]) -> None:
    for key, option in (("seed", "--seeds"), ("out", "--out")):
        if key in (*swept, *fixed):
            raise ConfigError(f"{key} is given", "each run of a sweep has its own", f"use {option}")
    for place, key in enumerate(swept):
        for other in (*swept[:place], *fixed):
            if f"{key}.".startswith(f"{other}.") or f"{other}.".startswith(f"{key}."):
                raise ConfigError(
                    f"{key} is swept and {other} given beside it", "one would undo the other", "leave one of them out"
                )


def _check(trials: Sequence[Trial]) -> None:
    splits: dict[tuple[str, str], Any] = {}
    for trial in trials:
        config, own, folder = trial.config, trial.config.evaluation, trial.folder
        models.locate(config.model.name)
        if config.eval_every and (own.keep, own.split) == ("best", "test"):
            raise ConfigError(
                'evaluation.keep is "best" and evaluation.split "test"',
                "what is chosen on the test problems cannot be judged on them",
                'write evaluation.split = "validation"',
            )
        Judge.of(config).check()
        for split in ("train", trial.split, *([own.split] if config.eval_every else [])):
            splits[repr(config.task), split] = config.task
        if (folder / "config.toml").is_file():
            runs.resumed_config(folder, all_but_out(config))
        if checkpoint.steps_done(folder) > config.steps:
            raise ConfigError(
                f"{folder} has done more than {config.steps} steps", "they stay done", "use another --out"
            )
    for (_, split), task in splits.items():
        task.problems(split)


def all_but_out(config: RunConfig) -> dict[str, Any]:
    """What a run is resumed with; its folder may be spelt in another way."""
    return config.model_dump(exclude={"out"})


def _plain(value: Any) -> str:
    """
    >>> _plain(1e-05), _plain("t-spmo"), _plain("runs/sft model")
    ('1e-05', 't-spmo', 'runs-sft-model-5ac41b')
    """
    text = str(value)
    plain = re.sub(r"[^\w.+-]+", "-", text)[:40]
    return plain if plain == text else f"{plain}-{stable_hash(text) % 16**6:06x}"
