"""Run folders: choosing one, refusing to write over another run, going on with one."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from shoestring.config import run as configs
from shoestring.config.files import differences, dump, read, saved
from shoestring.config.run import RunConfig
from shoestring.config.settings import Settings, build
from shoestring.errors import ConfigError, DataError
from shoestring.model import load as models
from shoestring.model.load import ModelSettings
from shoestring.rewards.settings import _PYTHON, refuse_python
from shoestring.tasks.file import File

# What a resumed run may change: how long it is and how it is carried out, not what it computes.
_CARRIED_OUT = ("rewards.workers", "rewards.timeout", "rewards.on_timeout")
_MAY_CHANGE = ("steps", "save_every", "save_total_limit", "memory", "execution.", "tracking.", *_CARRIED_OUT)


def open_run(
    config: RunConfig | Mapping[str, Any] | str | Path | None,
    *,
    data: Iterable[Mapping[str, Any]] | None,
    eval_data: Iterable[Mapping[str, Any]] | None = None,
    resume: str | Path | None,
    rewards: Sequence[Callable[..., Any] | str] = (),
) -> tuple[Path, RunConfig]:
    """The folder and the settled config of a new run, whose config.toml is written, or of one to go on with, whose is
    left as it is."""
    if resume is not None:
        if data is not None or eval_data is not None:
            raise ConfigError("data is given with resume", "a run goes on with its own data", "leave data out")
        settled = resumed_config(Path(resume), config)
        _check_rewards_are_back(Path(resume), settled, rewards)
        return Path(resume), settled
    if data is not None:
        values = config.model_dump(exclude_none=True) if isinstance(config, RunConfig) else _values(config)
        task = _data_task(values.get("task") or {}, bool(rewards) and "task" not in rewards)
        asked = configs.settle({**values, "task": {**task, "name": "file:data"}})  # mistakes come before the folder
        files = {"train": _data_lines(data)}
        if eval_data is not None:
            files[_evaluation_split(asked)] = lines = _data_lines(eval_data, "eval_data")
            given = config if isinstance(config, RunConfig) else asked
            if "num" not in given.evaluation.model_fields_set:
                values["evaluation"] = {**(values.get("evaluation") or {}), "num": lines.count("\n")}
        folder = _new_folder(values.get("out"), "file", _algorithm_name(values))
        own = (folder / "data").absolute()
        own.mkdir()
        for split, lines in files.items():
            (own / f"{split}.jsonl").write_text(lines, encoding="utf-8")
        settled = configs.settle({**values, "task": {**task, "name": f"file:{own}"}, "out": str(folder)})
    elif eval_data is not None:
        raise ConfigError(
            "eval_data is given without data", "a task has evaluation problems of its own", "give data too, or neither"
        )
    else:
        settled = config if isinstance(config, RunConfig) else configs.settle(_values(config))
        if not rewards:
            refuse_python("the config is that of a run from Python", settled.rewards, "train(..., rewards=[...])")
        folder = _new_folder(settled.out, settled.task.name, settled.algorithm.name)
        settled = settled.model_copy(update={"out": str(folder)})
    settled = _with_rewards(settled, rewards)
    write_config(folder, settled)
    return folder, settled


def _with_rewards(config: RunConfig, rewards: Sequence[Callable[..., Any] | str]) -> RunConfig:
    """The config with the names of Python functions in it, so that a resumed run can ask for them."""
    if not rewards:
        return config
    names = tuple(map(_reward_name, rewards))
    return config.model_copy(update={"rewards": config.rewards.model_copy(update={"functions": names})})


def _reward_name(function: Callable[..., Any] | str) -> str:
    return (
        function if isinstance(function, str) else f"{_PYTHON}{getattr(function, '__name__', type(function).__name__)}"
    )


def _check_rewards_are_back(folder: Path, config: RunConfig, rewards: Sequence[Any]) -> None:
    if rewards and _with_rewards(config, rewards) != config:
        raise ConfigError(
            f"the run to resume is {folder}, and the rewards are {', '.join(map(_reward_name, rewards))}",
            f"it was started with {', '.join(config.rewards.functions)}",
            "resume with the same rewards, or start a new run",
        )
    if not rewards:
        refuse_python(f"the run to resume is {folder}", config.rewards, "train(resume=..., rewards=[...])")


def discard_unused(folder: Path) -> None:
    """Removes a new run's folder if no step has come into it."""
    names = {path.name for path in folder.iterdir() if path.name != "metrics.jsonl" or path.stat().st_size}
    if names <= {"config.toml", "data", "tracking-name", "wandb", "tensorboard"}:
        with suppress(OSError):  # of a link, or of where the process is
            shutil.rmtree(folder)


def _values(config: Mapping[str, Any] | str | Path | None) -> dict[str, Any]:
    if isinstance(config, Mapping):
        return dict(config)
    if not isinstance(config, str | Path | None):
        raise ConfigError(f"the config is {config!r}", "it holds no settings", "give a mapping or a recipe's path")
    return read(config)


def _algorithm_name(values: Mapping[str, Any]) -> str:
    algorithm = values.get("algorithm", "s-grpo")
    return algorithm if isinstance(algorithm, str) else algorithm.get("name", "s-grpo")


def _new_folder(out: str | None, task: str, algorithm: str) -> Path:
    while not out:  # another run may take the number first
        folder = _next_free(Path("runs"), f"{task}-{algorithm}")
        check_free(folder)
        folder.parent.mkdir(exist_ok=True)
        with suppress(FileExistsError):
            folder.mkdir()
            return folder
    folder = Path(out)
    check_free(folder, "choose another folder, or go on with a run by --resume")
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def check_free(folder: Path, write: str = "choose another folder") -> None:
    """Raises `ConfigError` if anything lies in the folder already, or it cannot be made."""
    there = next(path for path in (folder.absolute(), *folder.absolute().parents) if os.path.lexists(path))
    if there == folder.absolute() and not (there.is_dir() and not any(there.iterdir())):
        raise ConfigError(f"out is {folder}", "something lies there already, and nothing is written over", write)
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        why = "cannot be written to" if there.is_dir() else "is no folder"
        raise ConfigError(f"out is {folder}", f"{there} {why}", "choose another folder")


def _next_free(parent: Path, name: str) -> Path:
    """runs/<name>-<number>, the number one above the highest there is."""
    clean = "".join(c if c.isalnum() or c in "-_." else "-" for c in name).strip("-")
    numbers = [int(tail) for p in parent.glob(f"{clean}-*") if (tail := p.name[len(clean) + 1 :]).isdigit()]
    return parent / f"{clean}-{max(numbers, default=0) + 1}"


def _evaluation_split(config: RunConfig) -> str:
    """The split that evaluations look at, of which `eval_data` are the rows."""
    if not config.eval_every:
        raise ConfigError(
            "eval_data is given and eval_every is 0", "nothing would look at it", "write eval_every = 20 or so"
        )
    split = config.evaluation.split
    if split not in ("validation", "test"):
        raise ConfigError(
            f'eval_data is given and evaluation.split is "{split}"',
            "it is what is held back from training",
            'leave evaluation.split out, or write "test"',
        )
    return split


def _data_lines(data: Iterable[Mapping[str, Any]], name: str = "data") -> str:
    """The rows as JSONL, to be kept in the run's folder, so that the run can be resumed."""
    try:
        lines = [json.dumps(dict(row), ensure_ascii=False) + "\n" for row in data]
    except (TypeError, ValueError) as error:
        raise DataError(
            f"{name} holds a row that is not plain", f"it cannot be kept as JSON ({error})", "use text and numbers"
        ) from None
    if not lines:
        raise DataError(f"{name} is empty", "there is nothing in it to ask", "give at least one row with a prompt")
    return "".join(lines)


def _data_task(task: str | Mapping[str, Any], own_rewards: bool) -> dict[str, Any]:
    """The settings of the task that reads the rows: those of the config that any rows can have."""
    given = {} if isinstance(task, str) else task
    settings = {key: value for key, value in given.items() if key in File.model_fields and key not in ("name", "data")}
    return {"check": "none", **settings} if own_rewards else settings


def split_hint(config: RunConfig) -> str:
    """What `eval` needs to be told about a run on rows of one's own that have no test part."""
    files = config.task.files() if isinstance(config.task, File) else {}
    if not files or "test" in files:
        return ""
    return f" --split {'validation' if 'validation' in files else min(files)}"


def to_resume(folder: Path) -> dict[str, Any]:
    """What the config.toml of a run to resume holds."""
    if not (folder / "config.toml").is_file():
        raise ConfigError(f"the run to resume is {folder}", "it holds no config.toml", "give the folder of a run")
    return saved(folder)


def resumed_config(folder: Path, config: RunConfig | Mapping[str, Any] | str | Path | None) -> RunConfig:
    """The config with which a run goes on: its own, with what may change changed. Raises `ConfigError` for the rest."""
    old = configs.settle(to_resume(folder))
    if config is None:
        return old
    asked = config if isinstance(config, RunConfig) else configs.settle(over(old, _values(config)))
    changed = changes(old, asked)
    if asked.steps != old.steps and old.optim.schedule != "constant":
        changed.append("steps (the schedule of the learning rate depends on it)")
    refuse_changes(folder, changed)
    return asked.model_copy(update={"out": old.out})


def changes(old: Settings, asked: Settings) -> list[str]:
    """The settings that two configs of one run differ in and must not."""
    return [key for key in differences(old, asked) if not key.startswith(_MAY_CHANGE)]


def refuse_changes(folder: Path, changed: Sequence[str]) -> None:
    if changed:
        raise ConfigError(
            f"the run to resume is {folder}, and the config changes {', '.join(changed)}",
            "what it computes would be neither the old run nor a new one",
            "resume without these changes, or start a new run",
        )


def over(old: Settings, values: Mapping[str, Any]) -> dict[str, Any]:
    """The old config with the given values laid over it. A table with another `name` takes the old one's place."""
    merged = old.model_dump(exclude_none=True)
    for key, value in values.items():
        own = merged.get(key)
        if (
            isinstance(value, Mapping)
            and isinstance(own, Mapping)
            and value.get("name", own.get("name")) == own.get("name")
        ):
            value = {**own, **value}
        merged[key] = value
    return merged


def model_settings(name: str) -> ModelSettings:
    """The model settings behind a run's folder or checkpoint (its own dtype and the like), or those of a bare model
    name."""
    path = models.run_of(Path(name)) / "config.toml"
    if not path.is_file():
        return ModelSettings(name=name)
    values = read(path).get("model", {})
    own = values if isinstance(values, dict) else {"name": values}
    return build(ModelSettings, {**own, "name": name}, "model")


def write_config(folder: Path, config: Settings) -> None:
    draft = folder / ".draft-config.toml"
    draft.write_text(dump(config), encoding="utf-8")
    os.replace(draft, folder / "config.toml")


def remove_folder(target: Path) -> None:
    """Takes its name from a folder before its files go, so that no half-removed one is ever seen."""
    old = target.with_name(f".old-{target.name}")
    shutil.rmtree(old, ignore_errors=True)
    os.replace(target, old)
    shutil.rmtree(old, ignore_errors=True)


def replace_folder(target: Path, write: Callable[[Path], None]) -> None:
    """Fills a temporary folder by `write` and puts it in the target's place, so that no half-written one is ever
    seen."""
    draft, old = target.with_name(f".draft-{target.name}"), target.with_name(f".old-{target.name}")
    for path in (draft, old):
        shutil.rmtree(path, ignore_errors=True)
    draft.mkdir(parents=True)
    write(draft)
    if target.exists():
        os.replace(target, old)
    os.replace(draft, target)
    shutil.rmtree(old, ignore_errors=True)
