"""The memory budget: sizes as people write them, what a card has, its cap, and a second try in smaller pieces."""

from __future__ import annotations

import gc
import os
import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import TYPE_CHECKING, TypeVar

from shoestring.errors import ConfigError, ShoestringError

if TYPE_CHECKING:
    import torch

T = TypeVar("T")

_UNITS = {"b": 1, "kib": 2**10, "mib": 2**20, "gib": 2**30, "kb": 10**3, "mb": 10**6, "gb": 10**9}
_SIZE = re.compile(r"([0-9]*\.?[0-9]+)\s*([a-zA-Z]+|%)")
# The allocator asks its cap about the bytes that are wanted, and then maps whole pages of this size: it may end so far
# above a cap (seen: 1386 MiB reserved under one of 1382).
_PAGE = 20 * 2**20
_HOW = 'write a size with its unit, such as "6GiB", or a share of the card, such as "50%"'


class OutOfMemory(ShoestringError):
    """The smallest piece of a step does not fit."""


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


def budget_bytes(text: str | None, total: int | None) -> int | None:
    """The budget that `memory` sets on a card (or machine) of `total` bytes; None without the setting.

    A share needs a card to be a share of: without one (`total` None) it cannot be told in bytes.
    """
    if text is None:
        return None
    size = parse_size(text)
    if isinstance(size, float):
        if total is None:
            raise ConfigError(f'memory is "{text}"', "there is no card here to take a share of", 'write "6GiB" or such')
        return int(size * total)
    if total is not None and size > total:
        raise ConfigError(f'memory is "{text}"', f"there are {size_text(total)} in all", "write no more than that")
    return size


def total_bytes(device: torch.device) -> int:
    """The memory of the card, or of the machine."""
    import torch

    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def free_bytes(device: torch.device) -> int:
    """What this process can still reserve: free on the card, or what it holds already and does not use."""
    import torch

    if device.type != "cuda":
        return total_bytes(device)
    free, _ = torch.cuda.mem_get_info(device)
    return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)


def check_room(budget: int, device: torch.device) -> None:
    """Raises `ConfigError` if other processes hold so much of the card that the budget is not there."""
    import torch

    if device.type != "cuda":
        return
    torch.cuda.synchronize(device)  # so that the context of this process is counted already
    total, free = total_bytes(device), free_bytes(device)
    held = torch.cuda.memory_allocated(device)
    if free + held < budget:
        raise ConfigError(
            f"memory is {size_text(budget)}",
            f"of the card's {size_text(total)} only {size_text(free + held)} are left; "
            f"{size_text(total - free - held)} are in use by other processes and by the CUDA context",
            f'end those processes, or write memory = "{(free + held) / 2**30 * 0.98:.1f}GiB" at most',
        )


def context_bytes(device: torch.device) -> int:
    """What this process and others hold of the card outside this process's allocator: CUDA context, loaded kernels."""
    import torch

    free, total = torch.cuda.mem_get_info(device)
    return total - free - torch.cuda.memory_reserved(device)


@contextmanager
def capped(device: torch.device, budget: int | None) -> Iterator[None]:
    """Holds the allocator of this process to `budget` reserved bytes, and has it grow its segments in place; on a
    stream of its own.

    Segments of fixed size would reserve more than the tensors need. The cap is the allocator's own: it frees what it
    keeps for later use before it passes the cap, and refuses what would not fit.
    """
    import torch

    if device.type != "cuda":
        yield
        return
    index = torch.cuda.current_device() if device.index is None else device.index
    with warnings.catch_warnings():  # torch 2.11 has another name for it, which is not public either
        warnings.simplefilter("ignore", FutureWarning)
        torch.cuda.memory._set_allocator_settings("expandable_segments:True")
    torch.cuda.empty_cache()
    before = torch.cuda.get_per_process_memory_fraction(index)
    share = before if budget is None else min(max(budget - _PAGE, 0) / total_bytes(device), before)
    torch.cuda.set_per_process_memory_fraction(share, index)
    try:
        # Steps can be captured on any stream but the default one, and a second stream would have a second workspace.
        with torch.cuda.stream(_run_stream(index)):
            torch.cuda.current_blas_handle()  # takes its workspace now: it stays, so it should lie below all else
            yield
    finally:
        torch.cuda.synchronize(index)
        torch.cuda.set_per_process_memory_fraction(before, index)


@cache
def _run_stream(index: int) -> torch.cuda.Stream:
    """The stream of this process's runs on a card."""
    import torch

    return torch.cuda.Stream(index)


def give_back(device: torch.device) -> None:
    """Returns what the allocator keeps for later use: once a phase, since asking the driver again takes time."""
    import torch

    if device.type == "cuda":
        torch.cuda.empty_cache()


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out (the allocator's own error, or a library's that could not allocate)."""
    import torch

    if isinstance(error, torch.OutOfMemoryError):
        return True
    text = str(error)
    words = ("CUBLAS_STATUS_ALLOC_FAILED", "CUDA out of memory", "DefaultCPUAllocator: can't allocate memory")
    return isinstance(error, RuntimeError) and any(word in text for word in words)


def shrinking(
    attempt: Callable[[int], T], size: int, least: int, *, undo: Callable[[], None] = lambda: None
) -> tuple[T, int]:
    """`attempt(size)`, or, as long as that runs out of memory, all of it again at half the size; and the size that
    fitted.

    `undo` takes back what a failed attempt has changed. At `least` or below the error goes on to the caller.

    >>> def attempt(size):
    ...     if size > 30:
    ...         raise torch.OutOfMemoryError("no")
    ...     return "done"
    >>> import torch
    >>> shrinking(attempt, 100, 1)
    ('done', 25)
    """
    while True:
        try:
            return attempt(size), size
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            last = error if size <= least else None
        # Outside of `except`, where nothing holds the failed attempt's tensors by its traceback any more.
        undo()
        if last is not None:
            raise last
        gc.collect()
        _empty_caches()
        size = max(size // 2, least)


def _empty_caches() -> None:
    import torch

    if torch.cuda.is_available() and torch.cuda.is_initialized():
        torch.cuda.empty_cache()
