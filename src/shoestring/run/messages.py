"""The opening and closing lines of a run."""

from __future__ import annotations

from pathlib import Path

from shoestring.config.run import RunConfig
from shoestring.errors import NonFiniteError
from shoestring.model.policy import Policy
from shoestring.records.environment import command, quoted
from shoestring.rewards.settings import is_python
from shoestring.run import folder as runs
from shoestring.run.checkpoint import State
from shoestring.run.handle import Run

# A step whose gradient is not finite is skipped; so many in a row are no accident.
MAX_SKIPPED = 3


def to_go_on(folder: Path, config: RunConfig) -> str:
    if any(is_python(name) for name in config.rewards.functions):
        return f"train(resume={str(folder)!r}, rewards=[...])"
    return f"{command()} train --resume {quoted(folder)}"


def never_finite(state: State, folder: Path) -> NonFiniteError:
    return NonFiniteError(
        f"{MAX_SKIPPED} steps in a row (the last was {state.step - 1}) had a loss or gradient that is not finite, "
        f"and none was applied whole; problems: {state.culprits or 'no single one'}. A checkpoint is in {folder}."
    )


def describe(config: RunConfig, policy: Policy, folder: Path, state: State) -> str:
    """The opening lines of a run."""
    total = sum(p.numel() for p in policy.base.parameters())
    trained = sum(p.numel() for p in policy.trained().values())
    start = f"resumed at step {state.step}" if state.step else "new run"
    return (
        f"{config.algorithm.name} on {config.task.name}: {config.model.name} "
        f"({total:,} parameters, {str(policy.base.dtype).removeprefix('torch.')}, {policy.device}), "
        f"{trained:,} trained ({trained / total:.2%}); {start} in {folder}"
    )


def where_it_lies(run: Run) -> str:
    """The closing lines of a run: its files, and the commands for what comes next."""
    best = run.config.evaluation.keep == "best" and run.best_step >= 0
    kept = f" (best of the evaluations: step {run.best_step})" if best else ""
    lines = [
        f"{run.policy.result + ':':<9} {run.result}{kept}",
        f"metrics:  {run.folder / 'metrics.jsonl'}",
        f"samples:  {run.folder / 'samples.jsonl'}",
    ]
    if run.reports:
        lines.append(f"report:   {command()} report {quoted(run.folder)}")
    python = any(map(is_python, run.config.rewards.functions))
    if run.config.evaluated_by == "answers" or not python:
        lines.append(f"evaluate: {command()} eval {quoted(run.folder)}{runs.split_hint(run.config)}")
    if len(run.reports) < run.config.steps:
        lines.append(f"go on:    {to_go_on(run.folder, run.config)}")
    return "\n".join(lines)
