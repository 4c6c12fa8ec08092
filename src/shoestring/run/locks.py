"""A run's folder is one process's at a time."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from shoestring.errors import ConfigError

_locks: set[int] = set()


def _close_locks() -> None:
    for place in _locks:
        os.close(place)
    _locks.clear()


os.register_at_fork(after_in_child=_close_locks)  # a child must not hold a run that its parent has left


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Holds a run's folder for this process, as long as it lives; raises `ConfigError` where another one does. On a
    file system without such locks it holds nothing."""
    place = os.open(folder, os.O_RDONLY)
    _locks.add(place)
    try:
        with suppress(OSError):
            try:
                fcntl.flock(place, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise ConfigError(
                    f"the run is {folder}",
                    "another process is at it, and two would write over each other",
                    "wait for that one, or stop it",
                ) from None
        yield
    finally:
        if place in _locks:  # not in a child
            _locks.discard(place)
            with suppress(OSError):
                fcntl.flock(place, fcntl.LOCK_UN)  # for children too, which may not have closed it yet
            os.close(place)
