"""Sizes of memory as people write them: "6GiB", "50%"."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from shoestring.errors import ConfigError

if TYPE_CHECKING:
    pass


_UNITS = {"b": 1, "kib": 2**10, "mib": 2**20, "gib": 2**30, "kb": 10**3, "mb": 10**6, "gb": 10**9}


_SIZE = re.compile(r"([0-9]*\.?[0-9]+)\s*([a-zA-Z]+|%)")


_HOW = 'write a size with its unit, such as "6GiB", or a share of the card, such as "50%"'


def parse_size(text: str) -> int | float:
    """Bytes as an int, or a share of the card as a float; raises `ConfigError`.

    >>> parse_size("1.5GiB"), parse_size("50%")
    (1610612736, 0.5)
    """
    given = f'memory is "{text}"'
    found = _SIZE.fullmatch(text.strip())
    if found is None:
        negative = text.strip().startswith("-")
        raise ConfigError(given, "a budget is more than nothing" if negative else "this is not a size", _HOW)
    number, unit = float(found[1]), found[2].lower()
    if unit != "%" and unit not in _UNITS:
        raise ConfigError(given, f'"{found[2]}" is no unit of memory', _HOW)
    if number == 0 or (unit != "%" and number * _UNITS[unit] < 1):
        raise ConfigError(given, "a budget is more than nothing", _HOW)
    if unit != "%":
        return int(number * _UNITS[unit])
    if number > 100:
        raise ConfigError(given, "a card has no more than 100 %", _HOW)
    return number / 100


def checked_size(value: object) -> object:
    """A `memory` setting as text, once it is known to be a size (for the config)."""
    if value is None:
        return None
    if not isinstance(value, str):
        raise ConfigError(f"memory is {value!r}", "it has no unit", _HOW)
    parse_size(value)
    return value


def size_text(count: float) -> str:
    """Bytes in words.

    >>> size_text(3.45 * 2**30), size_text(12_000_000)
    ('3.45 GiB', '11.4 MiB')
    """
    return f"{count / 2**30:.2f} GiB" if count >= 2**30 else f"{count / 2**20:.1f} MiB"
