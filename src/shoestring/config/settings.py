"""What every table entry is made of: a frozen record whose fields are settings, checked when it is built."""

from __future__ import annotations

import difflib
import os
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError, model_validator

from shoestring.config import dotted
from shoestring.errors import ConfigError, nearest

S = TypeVar("S", bound="Settings")

# Of these, which all algorithms of the table have, one is enough for a class from outside.
_EITHER = {"credit", "credit_step"}


class Settings(BaseModel):
    """Base of all settings: frozen, and strict about names and types."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=False, validate_default=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _paths_are_text(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        return {key: os.fspath(value) if isinstance(value, os.PathLike) else value for key, value in values.items()}


def as_tuple(value: Any) -> Any:
    """One text where several may stand."""
    return (value,) if isinstance(value, str) else value


def pick(table: dict[str, type[Any]], kind: str, value: Any, default: str = "") -> Any:
    """The entry of `table` that `value` (a table with `name`, or the bare name) asks for, built from its settings.

    A table without `name` holds settings of the `default` entry, where there is one. A `name` such as
    "package.module:Class" asks for a class from outside this package.
    """
    if isinstance(value, BaseModel):
        return _named_so(table, kind, value)
    if isinstance(value, str):
        value = {"name": value}
    if isinstance(value, dict) and default:
        value = {"name": default, **value}
    if not isinstance(value, dict) or not isinstance(value.get("name"), str):
        raise ConfigError(
            f"[{kind}] is {value!r}", "it does not say which one", f'write name = "..."; {nearest("", table)}'
        )
    return build(_class_named(table, kind, value["name"]), value, kind)


def _class_named(table: dict[str, type[Any]], kind: str, name: str) -> type[Any]:
    key, colon, _ = name.partition(":")
    if key in table and (not colon or table[key].model_fields["name"].annotation is str):  # such as gym:<generator>
        return table[key]
    if colon:
        return _from_outside(name, table, kind)
    of_ones_own = 'write "package.module:Class" for a class of your own' if "." in name else ""
    if kind == "task" and of_ones_own:
        of_ones_own = f'write "file:{name}" for a file, or "package.module:Class" for a class of your own'
    raise ConfigError(f'{kind}.name is "{name}"', f"there is no such {kind}", of_ones_own or nearest(key, table))


def _named_so(table: dict[str, type[Any]], kind: str, value: Any) -> Any:
    """The value, if a run's config.toml can name its class, since otherwise the run could not be resumed."""
    cls, name = type(value), getattr(value, "name", "")
    try:
        named = _class_named(table, kind, name)
    except ConfigError:
        named = None
    elsewhere = cls.__module__ != "__main__" and "<locals>" not in cls.__qualname__
    if named is not cls or not elsewhere:
        raise ConfigError(
            f'{kind} is a {cls.__name__} whose name is "{name}"',
            "by that name it would not be found again, so a run could not be resumed",
            f'let the field name be a text, and give it name="{cls.__module__}:{cls.__qualname__}"'
            if elsewhere
            else "put the class into a module of its own, not into a function or the script that runs",
        )
    return value


def _from_outside(name: str, table: dict[str, type[Any]], kind: str) -> type[Any]:
    """The class that "package.module:Class" names; it has to have whatever all entries of the table have."""
    given, write = f'{kind}.name is "{name}"', 'write "package.module:Class"'
    close = difflib.get_close_matches(name.partition(":")[0], table, n=1)
    cls = dotted.load(name, given, f'write "{close[0]}" or "package.module:Class"' if close else write)
    if not (isinstance(cls, type) and issubclass(cls, Settings)):
        raise ConfigError(given, "it is no subclass of shoestring.config.settings.Settings", "make it one")
    field = cls.model_fields.get("name")
    if field is None or field.annotation is not str:
        raise ConfigError(
            given,
            "its settings have no text called name, which a run's config names it by",
            "write name: str in the class",
        )
    own = _public(cls)
    missing = sorted(
        set.intersection(*map(_public, table.values())) - own - (_EITHER if own & _EITHER else {"credit_step"})
    )
    if missing:
        raise ConfigError(given, f"the class has no {', '.join(missing)}", "add what docs/extending.md says of it")
    return cls


def _public(cls: type[Any]) -> set[str]:
    return {name for name in (*dir(cls), *cls.model_fields) if not name.startswith("_")}


def build(cls: type[S], value: dict[str, Any], where: str) -> S:
    """`cls(**value)`, with the library's error turned into a `ConfigError`."""
    try:
        return cls.model_validate(value)
    except ValidationError as error:
        raise as_config_error(error, cls, where) from None


def as_config_error(error: ValidationError, cls: type[BaseModel], where: str = "") -> ConfigError:
    """The first fault that pydantic found, in three parts."""
    faults = error.errors(include_url=False)
    fault = faults[0]
    path = [str(part) for part in fault["loc"]]
    tag = next((i for i, part in enumerate(path) if i and not part.isidentifier()), None)
    path = path[:tag]  # no tags of unions
    name = ".".join(([where] if where else []) + path) or cls.__name__
    if fault["type"] == "extra_forbidden":
        known = _elsewhere(path[-1], cls) if len(path) == 1 or path[-1] in _OF_TRL else ""
        write = f"write {known}" if known else nearest(path[-1], _fields(cls, path[:-1]))
        return ConfigError(f'"{name}" is set', "there is no such setting", write)
    if fault["type"] == "missing" and isinstance(fault["loc"][-1], int):
        places = [f["loc"][-1] for f in faults if f["type"] == "missing" and f["loc"][:-1] == fault["loc"][:-1]]
        needed = 1 + max(place for place in places if isinstance(place, int))
        return ConfigError(f"{name} is {fault['input']!r}", f"it needs {needed} values", "write them all")
    if fault["type"] == "missing":
        return ConfigError(f'"{name}" is not set', "it has no default", f"write {name} = ...")
    cause = fault.get("ctx", {}).get("error")
    if isinstance(cause, ConfigError):
        return cause
    return ConfigError(f"{name} is {fault['input']!r}", "it cannot be used", fault["msg"].removeprefix("Value error, "))


# What TRL's GRPOConfig and PEFT's LoraConfig call it, where that is not our name.
_OF_TRL = {
    "bf16": "model.dtype",
    "epsilon": "objective.clip_low",
    "epsilon_high": "objective.clip_high",
    "eval_steps": "eval_every",
    "gradient_checkpointing": "execution.checkpointing",
    "learning_rate": "optim.lr",
    "lora_alpha": "adapter.alpha",
    "lr_scheduler_type": "optim.schedule",
    "max_completion_length": "sampling.max_new_tokens",
    "max_prompt_length": "sampling.max_prompt_tokens",
    "max_steps": "steps",
    "num_generations": "sampling.num_completions",
    "num_iterations": "objective.updates",
    "output_dir": "out",
    "reward_funcs": "rewards.functions",
    "reward_weights": "rewards.weights",
    "save_steps": "save_every",
    "target_modules": "adapter.modules",
}


def _elsewhere(name: str, cls: type[BaseModel]) -> str:
    """Where a setting stands that was looked for at the top, by our name or TRL's; empty if nowhere."""
    if name in _OF_TRL:
        return _OF_TRL[name]
    for table, field in cls.model_fields.items():
        inner = field.annotation
        if isinstance(inner, type) and issubclass(inner, BaseModel) and name in inner.model_fields:
            return f"{table}.{name}"
    return ""


def _fields(cls: type[BaseModel], path: list[str]) -> list[str]:
    """The field names of the settings class found by walking `path` from `cls`."""
    for part in path:
        annotation = cls.model_fields[part].annotation if part in cls.model_fields else None
        if not (isinstance(annotation, type) and issubclass(annotation, BaseModel)):
            return []
        cls = annotation
    return list(cls.model_fields)
