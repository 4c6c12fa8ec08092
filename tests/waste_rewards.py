"""Reward functions for the tests of scoring in processes: they have to lie in a module."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any


def varied(completions: list[Any], **others: Any) -> list[float]:
    """Rewards that differ within every group."""
    return [float(sum(map(ord, completion[0]["content"])) % 11) for completion in completions]


def logs(completions: list[Any], log_extra: Any, log_metric: Any, **others: Any) -> list[float | None]:
    texts = [completion[0]["content"] for completion in completions]
    log_extra("length", [len(text) for text in texts])
    for text in texts:
        log_metric("mean length", len(text))
    return [None if len(text) % 3 == 0 else 0.5 for text in texts]


async def late(completions: list[Any], **others: Any) -> list[float]:
    await asyncio.sleep(0.001)
    return [float(len(completion[0]["content"]) % 2) for completion in completions]


def times(completions: list[Any], **others: Any) -> list[float]:
    """When and by which process each was scored goes to a file."""
    for _ in completions:
        with open("times.txt", "a") as file:
            file.write(f"{time.time()} {os.getpid()}\n")
    return varied(completions)


def hangs(completions: list[Any], trainer_state: Any, **others: Any) -> list[float]:
    """Never returns for texts of some lengths in the second step, and cannot be interrupted by an exception."""
    for completion in completions:
        while trainer_state.global_step == 1 and len(completion[0]["content"]) % 5 == 0:
            try:
                time.sleep(1000)
            except BaseException:
                continue
    return varied(completions)


def sleeps_once(completions: list[Any], **others: Any) -> list[float]:
    """Is slow, and leaves the numbers of its processes in a folder."""
    Path("workers").mkdir(exist_ok=True)
    (Path("workers") / str(os.getpid())).touch()
    time.sleep(0.02)
    return varied(completions)


def starts_a_program(completions: list[Any], **others: Any) -> list[float]:
    """Waits for a program that never ends, and leaves its number in a file."""
    program = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(1000)"])
    Path("program.txt").write_text(str(program.pid))
    return [float(program.wait())] * len(completions)


def dies(completions: list[Any], **others: Any) -> list[float]:
    os._exit(7)


def breaks(completions: list[Any], **others: Any) -> list[float]:
    raise KeyError("a bug of the user's own")


class Slow:
    """Takes so many seconds for each completion."""

    def __init__(self, seconds: float):
        self.seconds = seconds
        self.__name__ = "slow"

    def __call__(self, completions: list[Any], **others: Any) -> list[float]:
        time.sleep(self.seconds * len(completions))
        return varied(completions)
