"""The few exceptions that a user meets. Each message has three parts: what was given, why it cannot work, what to
write."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class ShoestringError(ValueError):
    """A mistake that the user can mend; the command line prints it without a traceback and exits with 2."""

    def __init__(self, given: str, why: str, write: str):
        self.given, self.why, self.write = given, why, write
        super().__init__(f"{given}; {why}; {write}" + ("" if write.endswith("?") else "."))


class ConfigError(ShoestringError):
    """A setting, path or name that cannot work.

    >>> print(ConfigError("num_completions is 1", "a group of one has no mean to differ from", "use 2 or more"))
    num_completions is 1; a group of one has no mean to differ from; use 2 or more.
    """


class DataError(ShoestringError):
    """A data file or row that cannot be used."""


class NonFiniteError(RuntimeError):
    """Several steps in a row had a loss or gradient that is not a number; none of them was applied."""


def nearest(given: str, known: Iterable[str], *, otherwise: str = "") -> str:
    """What to write instead of an unknown name: the nearest known one, or all of them.

    >>> nearest("s-gpro", ["grpo", "s-grpo", "t-spmo"])
    'did you mean "s-grpo"?'
    """
    names = sorted(known)
    close = difflib.get_close_matches(given, names, n=1, cutoff=0.6)
    if close:
        return f'did you mean "{close[0]}"?'
    return otherwise or "use one of: " + ", ".join(names)
