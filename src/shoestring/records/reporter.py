"""What a run leaves behind and says: metrics.jsonl, samples.jsonl, evals.jsonl, and a line or a bar on the terminal."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from shoestring.rollout.rounds import Sampled
from shoestring.trackers.base import Log, Tracker
from shoestring.types import StepReport

LOGS = ("metrics.jsonl", "samples.jsonl", "evals.jsonl")


class Reporter:
    """Writes the run's logs and shows its progress; one line at a time, so that a killed run loses at most a line."""

    def __init__(self, folder: Path, steps: int, *, quiet: bool = False):
        self.folder, self.steps = folder, steps
        self.console = Console(quiet=quiet, soft_wrap=True)
        self._bar: Progress | None = None
        self._task: Any = None
        self._log: Log = _nowhere

    @contextmanager
    def tracking(self, tracker: Tracker, config: Mapping[str, Any], done: int) -> Iterator[None]:
        """The tracker hears of every step and evaluation. Once it is open, its failures end no run."""
        opened = tracker.opened(self.folder, config, done)
        self._log = opened.__enter__()

        def close(error: BaseException | None) -> None:
            try:
                opened.__exit__(type(error) if error else None, error, error.__traceback__ if error else None)
            except Exception as failed:
                self.warn(f"Tracking could not be closed: {type(failed).__name__}: {failed}")

        try:
            yield
        except BaseException as error:
            close(error)
            raise
        close(None)

    @contextmanager
    def running(self, done: int) -> Iterator[None]:
        """Shows a progress bar on a terminal, and nothing but lines elsewhere."""
        if not self.console.is_terminal or self.console.quiet:
            yield
            return
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        with Progress(*columns, console=self.console) as bar:
            self._bar, self._task = bar, bar.add_task("training", total=self.steps, completed=done)
            try:
                yield
            finally:
                self._bar = None

    def say(self, text: str) -> None:
        self.console.print(text, markup=False, highlight=False)

    def warn(self, text: str) -> None:
        """What must not be missed, said also by a quiet run."""
        Console(stderr=True, soft_wrap=True).print(text, markup=False, highlight=False)

    def step(self, report: StepReport) -> None:
        values = {name: value for name, value in vars(report).items() if name != "terms" or value}
        self._append("metrics.jsonl", {name: _finite(value) for name, value in values.items()})
        self._track(report.step, _figures("train", values))
        line = one_line(report, self.steps)
        if self._bar:
            self._bar.update(self._task, completed=report.step + 1, description=line)
        elif report.step % max(self.steps // 20, 1) == 0 or report.step == self.steps - 1:
            self.say(line)

    def evaluation(self, values: Mapping[str, Any]) -> None:
        self._append("evals.jsonl", values)
        self._track(values["step"], _figures("eval", values))
        name, form = ("accuracy", ".1%") if "accuracy" in values else ("reward", ".3f")
        figure, low, high = (format(values[key], form) for key in (name, "low", "high"))
        self.say(
            f"after step {values['step']}: {values['split']} {name} {figure} ({low} to {high}) on {values['problems']} "
            "problems"
        )

    def _track(self, step: int, figures: Mapping[str, float]) -> None:
        """A tracker that fails, such as one whose server is gone, ends no run."""
        try:
            self._log(step, figures)
        except Exception as error:
            self._log = _nowhere
            self.warn(f"Tracking has failed, and the run goes on without it: {type(error).__name__}: {error}")

    def samples(self, step: int, sampled: Sampled) -> None:
        """One line a completion: prompt, text, score and the credit of its selected tokens, [place, advantage]. Those
        of groups that dynamic sampling dropped are marked, and have no credit."""
        lines, row = [], 0
        extra = sampled.scored.columns
        credits = dict(zip(sampled.kept, sampled.credits, strict=True))
        for place, (rollout, group) in enumerate(zip(sampled.rollouts, sampled.groups, strict=True)):
            chosen: list[list[list[float]]] = [[] for _ in rollout.texts]
            if place in credits:
                parts = (credits[place].row, credits[place].col, credits[place].advantage)
                for g, col, advantage in zip(*(part.tolist() for part in parts), strict=True):
                    chosen[g].append([col, round(advantage, 6)])
            for g, (text, score) in enumerate(zip(rollout.texts, group.scores, strict=True)):
                completion = rollout.completions[g]
                record = {
                    "step": step,
                    "group": place,
                    "problem": rollout.prompt.problem.id,
                    "question": rollout.prompt.problem.question,
                    "answer": rollout.prompt.problem.answer,
                    "prefix_tokens": len(rollout.prompt.prefix),
                    "text": text,
                    "score": score.value,
                    "parts": dict(score.parts),
                    "tokens": len(completion.token_ids),
                    "token_ids": completion.token_ids,
                    "stop": completion.stop,
                    "credit": chosen[g],
                }
                if extra:
                    record["extra"] = {name: values[row] for name, values in extra.items()}
                if place not in sampled.kept:
                    record["dropped"] = True
                lines.append(record)
                row += 1
        self._append("samples.jsonl", *lines)

    def _append(self, name: str, *records: Mapping[str, Any]) -> None:
        text = "".join(json.dumps(record, ensure_ascii=False, default=str) + "\n" for record in records)
        with (self.folder / name).open("a", encoding="utf-8", errors="replace") as file:
            file.write(text)


def _nowhere(step: int, values: Mapping[str, float]) -> None:
    pass


def _figures(prefix: str, values: Mapping[str, Any]) -> dict[str, float]:
    """The numbers among the values and in their tables, by names such as "train/seconds/sample".

    >>> _figures("train", {"step": 3, "loss": 0.5, "applied": True, "seconds": {"sample": 1.0}, "split": "test"})
    {'train/loss': 0.5, 'train/applied': 1.0, 'train/seconds/sample': 1.0}
    """
    found: dict[str, float] = {}
    for name, value in values.items():
        if isinstance(value, Mapping):
            found |= _figures(f"{prefix}/{name}", value)
        elif isinstance(value, int | float) and math.isfinite(value) and name != "step":
            found[f"{prefix}/{name}"] = float(value)
    return found


def _finite(value: Any) -> Any:
    """The value with None for what is not finite: JSON knows no NaN."""
    if isinstance(value, Mapping):
        return {key: _finite(inner) for key, inner in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


def one_line(report: StepReport, steps: int) -> str:
    """The console line of a step."""
    seconds = sum(report.seconds.values())
    dropped = f" ({report.groups_dropped} more dropped)" if report.groups_dropped else ""
    return (
        f"step {report.step + 1:>{len(str(steps))}}/{steps}  reward {report.reward:.3f}  solved {report.solved:.1%}  "
        f"signal {report.groups_with_signal}/{report.groups}{dropped}  trained {report.tokens_trained:,} of "
        f"{report.tokens_sampled:,} tokens  length {report.length_mean:.0f}  loss {report.loss:+.4f}  "
        f"norm {report.grad_norm:.3f}  {seconds:.2f} s  {report.tokens_per_s:,.0f} tokens/s"
        + ("" if report.applied or not report.tokens_trained else "  NOT APPLIED")
    )


def cut_logs(folder: Path, steps: int, *, final: bool = False) -> None:
    """Drops what the logs hold of steps that a resumed run is going to do again, and lines that a kill left torn.

    The evaluation that is due at step `steps` is done again too; a `final` one is not, and stays.
    """
    for name in LOGS:
        path = folder / name
        if not path.is_file():
            continue
        text = path.read_text(encoding="utf-8", errors="replace")  # a torn line may end within a letter
        end = steps + (final and name == "evals.jsonl")
        kept = [line for line in text.split("\n") if line and _step_of(line) < end]
        draft = path.with_name(f".draft-{name}")
        draft.write_text("".join(f"{line}\n" for line in kept), encoding="utf-8")
        os.replace(draft, path)


def _step_of(line: str) -> float:
    try:
        return json.loads(line)["step"]
    except (json.JSONDecodeError, KeyError, TypeError):
        return float("inf")


def read_metrics(folder: Path) -> list[StepReport]:
    """The step reports of a run so far."""
    return [_step_report(line) for line in read_lines(folder / "metrics.jsonl")]


def read_lines(path: Path) -> Iterator[dict[str, Any]]:
    """The records of a log, without a last one that a kill has torn; none where there is no log."""
    if path.is_file():
        with path.open(encoding="utf-8", errors="replace") as file:
            yield from (json.loads(line) for line in file if line.endswith("\n"))


def _step_report(values: dict[str, Any]) -> StepReport:
    """None stands for what was not finite, but where there may be nothing."""
    may_be_none = ("wave_tokens", "micro_batch_tokens")
    filled: dict[str, Any] = {k: math.nan if v is None and k not in may_be_none else v for k, v in values.items()}
    return StepReport(**filled)
