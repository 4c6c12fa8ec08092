"""Ctrl-C and SIGTERM, held back until the step in hand is done."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any


@contextmanager
def held_back(notice: str) -> Iterator[list[int]]:
    """Ctrl-C and SIGTERM let the step in hand finish: the first fills the list and gives notice of it on the error
    output, a second interrupts at once."""
    received: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        if received:
            raise SystemExit(128 + number)
        received.append(number)
        with suppress(OSError):  # nobody may be reading any more
            os.write(2, f"\n{notice}; another Ctrl-C stops at once.\n".encode())

    if threading.current_thread() is not threading.main_thread():
        yield received
        return
    before: dict[int, Callable[..., Any] | int | None] = {
        number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)
    }
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
