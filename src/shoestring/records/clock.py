"""Seconds and peak memory by phase of a step."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch


class Clock:
    """Seconds, and on a GPU the peak of allocated bytes, of each phase, which may come several times in a step;
    `reserved` is the peak that the allocator has asked the driver for. In a profiler's trace, a phase is a range of its
    name."""

    def __init__(self, device: torch.device):
        self.device = device
        self.seconds: dict[str, float] = {}
        self.peaks: dict[str, int] = {}
        # Counted from the end of the last phase of the step before: loading, the rehearsal and evaluations included.
        self.reserved = torch.cuda.max_memory_reserved(device) if device.type == "cuda" else 0

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        gpu = self.device.type == "cuda"
        if gpu:
            torch.cuda.synchronize(self.device)
            torch.cuda.reset_peak_memory_stats(self.device)
        started = time.perf_counter()
        with torch.profiler.record_function(name):
            yield
        if gpu:
            torch.cuda.synchronize(self.device)
            self.peaks[name] = max(self.peaks.get(name, 0), torch.cuda.max_memory_allocated(self.device))
            self.reserved = max(self.reserved, torch.cuda.max_memory_reserved(self.device))
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - started
