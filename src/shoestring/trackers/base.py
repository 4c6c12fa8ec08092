"""The tracker seam: where a run's figures go beside its own files, to be looked at while it runs."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, Literal, Protocol

from shoestring.config.settings import Settings


class Log(Protocol):
    """An open tracker."""

    def __call__(self, step: int, values: Mapping[str, float]) -> None:
        """Takes the figures of one step, by name; `step` never falls."""
        ...


class Tracker(Protocol):
    """Says where figures go. A frozen settings object."""

    name: str

    def check(self) -> None:
        """Raises `ConfigError` if its package is not installed; called before the model loads."""
        ...

    def opened(self, folder: Path, config: Mapping[str, Any], done: int) -> AbstractContextManager[Log]:
        """The tracker of the run in `folder`, of which `done` steps are done. What it holds of later ones, which a
        killed run has left, is about to be done again."""
        ...


class NoTracker(Settings):
    """Nothing but the run's own files."""

    name: Literal["none"] = "none"

    def check(self) -> None:
        pass

    def opened(self, folder: Path, config: Mapping[str, Any], done: int) -> AbstractContextManager[Log]:
        return nullcontext(lambda step, values: None)
