"""A config as TOML: read, overridden, written."""

from __future__ import annotations

import copy
import json
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from shoestring.config.settings import Settings
from shoestring.errors import ConfigError
from shoestring.optimizers import OPTIMIZERS
from shoestring.optimizers.base import OptimSettings

# The entry that a table without `name` holds settings of.
DEFAULTS = {
    "task": "multiplication",
    "algorithm": "s-grpo",
    "adapter": "lora",
    "sampler": "auto",
    "optim": "adamw",
    "tracking": "none",
}


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
            raise ConfigError(f'the recipe is "{recipe}"', f"it is not TOML ({error})", "fix that line") from None
    for override in sorted(overrides, key=lambda text: not _names_one(text)):  # these first
        values = overridden(values, override)
    return values


def _names_one(override: str) -> bool:
    """Whether it says which algorithm, task or the like: algorithm.name=grpo, or algorithm=grpo."""
    key = override.partition("=")[0]
    return key.endswith(".name") or is_named(key) or key.strip() in ("objective.policy", "objective.kl")


def is_named(key: str) -> bool:
    """Whether a bare text under the key is a name."""
    return key.strip() in (*DEFAULTS, "model")


def overridden(values: Mapping[str, Any], text: str) -> dict[str, Any]:
    """A nested mapping with `a.b.c=value` set in it. The value is read as TOML; what is not TOML is a string.

    A new `name` starts its table afresh, since the settings of one algorithm or task are not those of another. An
    optimizer keeps the settings that the old one shares with it.
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
    before = table.get("name", DEFAULTS.get(parents[0], value)) if last == "name" and len(parents) == 1 else value
    if before != value:
        kept = _shared(table, before, value) if parents == ["optim"] else {}
        table.clear()
        table.update(kept)
    table[last] = value
    return changed


def _shared(table: Mapping[str, Any], before: Any, name: Any) -> dict[str, Any]:
    """An optimizer's settings that another one has too; of a class from outside only the common ones are known."""
    old, new = (OPTIMIZERS.get(str(each), OptimSettings).model_fields for each in (before, name))
    return {key: value for key, value in table.items() if key in new or key not in old}


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


def saved(folder: Path) -> dict[str, Any]:
    """What a run's config.toml holds; rows that lie in the run's own folder are found where that is now."""
    values = read(folder / "config.toml")
    task, data = values.get("task"), folder / "data"
    if data.is_dir() and isinstance(task, dict):  # only the run itself makes a folder of that name there
        name = task.get("name", "")
        if name.startswith("file:") and Path(name).name == "data":
            values["task"] = {**task, "name": f"file:{data.absolute()}"}
    return values
