"""The allocator of the device: what it has, its limit, and a second try in smaller pieces."""

from __future__ import annotations

import gc
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import TYPE_CHECKING, TypeVar

from shoestring.errors import ShoestringError

if TYPE_CHECKING:
    import torch


T = TypeVar("T")


# The allocator asks its cap about the bytes that are wanted, and then maps whole pages of this size: it may end so far
# above a cap (seen: 1386 MiB reserved under one of 1382).
_PAGE = 20 * 2**20


class OutOfMemory(ShoestringError):
    """The smallest piece of a step does not fit."""


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
