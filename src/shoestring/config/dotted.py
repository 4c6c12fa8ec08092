"""What a setting names as "package.module:thing": functions and classes from outside this package."""

from __future__ import annotations

import importlib
import operator
import os
import sys
from collections.abc import Callable
from typing import Any

from shoestring.errors import ConfigError, nearest


def load(path: str, given: str, write: str) -> Callable[..., Any]:
    """The function or class at "package.module:thing" or "package.module.thing"; modules in the current directory
    count. Raises `ConfigError` that says what was `given` and what to `write`.

    >>> load("math:sqrt", "", "")(9)
    3.0
    """
    module_name, _, attribute = path.partition(":") if ":" in path else path.rpartition(".")
    if not module_name or not attribute:
        raise ConfigError(given, "it does not name a module and what to take from it", write)
    if not {"", os.getcwd()} & set(sys.path):  # a console script, unlike `python -m`, starts without it
        sys.path.insert(0, os.getcwd())
    try:
        module = importlib.import_module(module_name)
    except Exception as error:
        why = f"importing {module_name} raised {type(error).__name__}: {error}"
        raise ConfigError(given, why, f"{write}, with the module installed or in this directory") from error
    try:
        found = operator.attrgetter(attribute)(module)
    except AttributeError as error:
        known = [name for name, value in vars(module).items() if callable(value)]
        raise ConfigError(given, str(error), nearest(attribute, known, otherwise=write)) from error
    if not callable(found):
        raise ConfigError(given, f"{attribute} is a {type(found).__name__}, which cannot be called", write)
    return found
