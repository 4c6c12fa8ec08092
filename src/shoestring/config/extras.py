"""Packages that only some settings need."""

from __future__ import annotations

import importlib.util

from shoestring.errors import ConfigError


def need(package: str, extra: str, given: str) -> None:
    """Raises `ConfigError` with the install command if a package of an extra is missing."""
    if importlib.util.find_spec(package) is None:
        raise ConfigError(given, f"that needs the package {package}", f'run: pip install "shoestring[{extra}]"')
