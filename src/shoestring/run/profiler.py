"""Where a run's time goes: `train --profile` records one step, and writes into the run's folder

- `trace.json.gz`, a trace of that step that https://ui.perfetto.dev opens, with the phases as ranges of their names;
- `profile.json`: seconds by phase (means over the steps behind the first), tokens a second, and the operators of the
  recorded step that took most.

It changes no result. The recorded step is slower than the others, so it is left out of the means where others are left.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from rich.table import Table

from shoestring.errors import ConfigError
from shoestring.records.reporter import Reporter, read_metrics
from shoestring.types import StepReport

TRACE, SUMMARY = "trace.json.gz", "profile.json"
_TOP = 12
_WARM_UP = 1
"""Steps that the profiler itself takes to warm up."""


def check(steps: int, done: int) -> None:
    """Raises `ConfigError` if too few steps are left to record one of them."""
    if steps - done <= _WARM_UP:
        raise ConfigError(
            f"a profile is asked for with steps = {steps}" + (f", of which {done} are done" if done else ""),
            "the profiler warms up for a step before it records one",
            f"set steps = {done + _WARM_UP + 1} or more",
        )


@contextmanager
def recorded(reporter: Reporter, steps: int, device: torch.device, *, on: bool) -> Iterator[Callable[[], None]]:
    """Records one of the next `steps` steps, and writes both files when the context is left; gives the function to call
    after each step. Without `on`, nothing happens."""
    if not on:
        yield lambda: None
        return
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # else torch's profiler writes to standard error what it is doing
    first = len(read_metrics(reporter.folder))
    wait = min(steps - _WARM_UP - 1, 1)
    operators: list[dict[str, Any]] = []

    def ready(profile: torch.profiler.profile) -> None:
        _write(reporter.folder / TRACE, profile.export_chrome_trace)
        operators.extend(_operators(profile, device))

    activities = [torch.profiler.ProfilerActivity.CPU]
    if device.type == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    schedule = torch.profiler.schedule(wait=wait, warmup=_WARM_UP, active=1, repeat=1)
    with torch.profiler.profile(activities=activities, schedule=schedule, on_trace_ready=ready) as profile:
        yield profile.step
    found = summary(read_metrics(reporter.folder)[first:], wait + _WARM_UP, operators)
    _write(reporter.folder / SUMMARY, lambda path: Path(path).write_text(json.dumps(found, indent=1), encoding="utf-8"))
    _show(reporter, found)


def summary(reports: Sequence[StepReport], place: int, operators: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What profile.json holds. `place` is the recorded step's among the reports.

    The first step of a process is left out of the means (libraries load and tune in it), and the recorded one too, as
    long as any other is left.
    """
    plain = [report for i, report in enumerate(reports) if i not in (0, place)] or list(reports[-1:])
    totals = [sum(report.seconds.values()) for report in plain]
    phases = dict.fromkeys(name for report in plain for name in report.seconds)
    seconds = {name: _mean([report.seconds.get(name, 0.0) for report in plain]) for name in phases}
    sampling = sum(report.seconds["sample"] for report in plain)
    return {
        "steps": [report.step for report in plain],
        "step_recorded": reports[place].step if place < len(reports) else None,
        "step_s": _mean(totals),
        "seconds": seconds,
        "share": {name: value / (sum(seconds.values()) or 1.0) for name, value in seconds.items()},
        "tokens_per_s": sum(report.tokens_sampled for report in plain) / sampling if sampling else 0.0,
        "operators": list(operators),
    }


def _operators(profile: torch.profiler.profile, device: torch.device) -> list[dict[str, Any]]:
    """The operators of the recorded step with the most seconds of their own, on the device that did the work."""
    column = "self_device_time_total" if device.type == "cuda" else "self_cpu_time_total"
    own = sorted(profile.key_averages(), key=lambda event: -getattr(event, column))
    operators = [e for e in own if getattr(e, column) > 0 and not e.is_user_annotation]  # phases are no operators
    return [{"name": e.key, "calls": e.count, "seconds": getattr(e, column) / 1e6} for e in operators[:_TOP]]


def _write(path: Path, write: Callable[[str], Any]) -> None:
    """Under a temporary name first."""
    draft = path.with_name(f".draft-{path.name}")
    write(str(draft))
    os.replace(draft, path)


def _show(reporter: Reporter, found: Mapping[str, Any]) -> None:
    title = f"seconds by phase, means of {len(found['steps'])} steps; {found['tokens_per_s']:,.0f} tokens/s sampled"
    table = Table(title=title)
    for heading in ("phase or operator", "seconds", "share", "calls"):
        table.add_column(heading, justify="left" if heading == "phase or operator" else "right")
    for name, value in found["seconds"].items():
        table.add_row(name, f"{value:.4f}", f"{found['share'][name]:.1%}", "")
    table.add_section()
    for operator in found["operators"]:
        table.add_row(operator["name"][:60], f"{operator['seconds']:.4f}", "", f"{operator['calls']:,}")
    reporter.console.print(table)
    reporter.say(f"profile: {reporter.folder / SUMMARY}, {reporter.folder / TRACE} (opens in https://ui.perfetto.dev)")


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else 0.0
