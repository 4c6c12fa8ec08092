"""Carries out a sweep: each run is a process of its own, so that none touches another, and its files say what is
done."""

from __future__ import annotations

import itertools
import json
import os
import signal
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import torch

from shoestring.config import run as configs
from shoestring.config.files import dump
from shoestring.evaluation.contamination import overlap
from shoestring.evaluation.evaluate import EvalSettings, first_problems
from shoestring.evaluation.evaluator import Judge
from shoestring.evaluation.intervals import t_interval
from shoestring.model import load as models
from shoestring.records import reporter as report
from shoestring.records.environment import device_name, versions
from shoestring.run import checkpoint
from shoestring.run import folder as runs
from shoestring.run.signals import held_back
from shoestring.run.trials import Trial, all_but_out


def carry_out(trials: Sequence[Trial], say: Callable[[str], None], at_once: int = 1) -> tuple[dict[str, str], int]:
    """Runs what is not done, `at_once` processes a card; why runs failed, by label, and the signal that ended it all,
    or 0."""
    waiting = [trial for trial in trials if not trial.done]
    free = [card for _ in range(at_once) for card in _cards(trials)]
    running: list[tuple[Trial, subprocess.Popen[bytes], str | None]] = []
    failed: dict[str, str] = {}
    with held_back("Stopping as soon as each run has finished and saved its step") as stopped:
        while running or (waiting and not stopped):
            while free and waiting and not stopped:
                trial, card = waiting.pop(0), free.pop(0)
                say(f"{trial.label}: {_comes_to(trial)}")
                running.append((trial, _started(trial, card), card))
            for place in list(running):
                trial, process, card = place
                if stopped and process.stdin:
                    process.stdin.close()  # which tells it to stop after its step
                if process.poll() is None:
                    continue
                running.remove(place)
                free.append(card)
                if trial.done:
                    say(f"{trial.label}: {in_words(row(trial))}")
                elif not stopped:
                    failed[trial.label] = _last_line(trial.log) or f"exit status {process.returncode}"
                    say(f"{trial.label}: FAILED: {failed[trial.label]} ({trial.log})")
            time.sleep(0.1)
    return failed, stopped[0] if stopped else 0


def _comes_to(trial: Trial) -> str:
    if not trial.folder.is_dir():
        return "starts"
    return "goes on" if checkpoint.steps_done(trial.folder) < trial.config.steps else "is evaluated"


def _cards(trials: Sequence[Trial]) -> Sequence[str | None]:
    """The GPUs to share out, where there are several and no config names one; else a place for one run."""
    count = torch.cuda.device_count()
    if count < 2 or any(trial.config.execution.device not in ("auto", "cuda") for trial in trials):
        return [None]
    return list((os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(count)))).split(","))[:count]


def _last_line(path: Path) -> str:
    return next((line for line in reversed(path.read_text(errors="replace").splitlines()) if line.strip()), "")


def _started(trial: Trial, card: str | None) -> subprocess.Popen[bytes]:
    """A process for the trial. It lives as long as the pipe to it is open, so it does not outlive this one."""
    recipe = Path(f"{trial.folder}.toml")
    recipe.parent.mkdir(parents=True, exist_ok=True)
    recipe.write_text(dump(trial.config), encoding="utf-8")
    command = [sys.executable, "-m", "shoestring.run.sweep", str(recipe), trial.split, str(trial.num or "")]
    environment = {**os.environ, **({"CUDA_VISIBLE_DEVICES": card} if card else {})}
    with trial.log.open("wb") as log:
        return subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=log, stderr=log, env=environment, start_new_session=True
        )


def _process(trial: Trial) -> None:
    """Trains, or goes on, and evaluates greedily: first what the trial started from, then what came of it."""
    from shoestring.allocator import give_back
    from shoestring.run.loop import carried_out

    config, folder = trial.config, trial.folder
    if checkpoint.steps_done(folder) < config.steps:
        for outdated in folder.glob("evaluation-*.json"):
            outdated.unlink()
    goes_on = (folder / "config.toml").is_file()
    run = carried_out(all_but_out(config), resume=folder) if goes_on else carried_out(config)
    if run.stopped_by:
        raise SystemExit(128 + run.stopped_by)
    wave_tokens, device = run.reports[-1].wave_tokens, run.policy.device
    del run
    give_back(device)
    if not trial.base.is_file():
        _evaluate(trial, config.model, trial.base, wave_tokens)
    _evaluate(trial, runs.model_settings(str(folder)), trial.result, wave_tokens)


def _evaluate(trial: Trial, model: models.ModelSettings, path: Path, wave_tokens: int | None) -> None:
    from shoestring.run.loading import load_policy
    from shoestring.samplers import SAMPLERS

    config = trial.config
    policy = load_policy(model, device=config.execution.device)
    settings = EvalSettings(
        split=trial.split,
        num=trial.num,
        max_new_tokens=config.sampling.max_new_tokens,
        allow_truncated_prompts=config.allow_truncated_prompts,
    )
    found = Judge.of(config).judged(policy, SAMPLERS["auto"]().open(policy, wave_tokens), settings)
    shared = overlap(first_problems(config.task, trial.split, trial.num), config.task)
    values = {**found.as_json(), "device": device_name(), "outcomes": found.outcomes}
    values["overlap"] = vars(shared) if shared else None
    draft = path.with_name(f".{os.getpid()}-{path.name}")
    draft.write_text(json.dumps(values), encoding="utf-8")
    os.replace(draft, path)


def row(trial: Trial) -> dict[str, Any]:
    """The figures of a run that is done. Tokens, seconds and memory are those of all its steps."""
    before, after = (json.loads(path.read_text(encoding="utf-8")) for path in (trial.base, trial.result))
    steps, own, name = report.read_metrics(trial.folder), trial.config.evaluation, Judge.of(trial.config).figure
    return {
        "method": trial.config.algorithm.name,
        **trial.swept,
        "seed": trial.config.seed,
        **{key: after[key] for key in (name, "low", "high")},
        f"base_{name}": before[name],
        **({"unscored": after["unscored"]} if name == "reward" else {}),
        **{key: after[key] for key in ("task", "split", "problems", "overlap", "device")},
        "steps": len(steps),
        "chosen_on": own.split if trial.config.eval_every and own.keep == "best" else None,
        "tokens_sampled": sum(step.tokens_sampled for step in steps),
        "tokens_trained": sum(step.tokens_trained for step in steps),
        "peak_allocated_gib": max(step.peak_bytes for step in steps) / 2**30,
        "seconds": sum(sum(step.seconds.values()) for step in steps),
        "run": str(trial.folder),
    }


def summary(trials: Sequence[Trial], failed: dict[str, str]) -> dict[str, Any]:
    """All figures as one JSON object: a row for each run that is done, and their means over seeds."""
    rows = [(trial.swept, row(trial)) for trial in trials if trial.done]
    groups = [(swept, [figures for _, figures in group]) for swept, group in itertools.groupby(rows, lambda r: r[0])]
    return {
        "benchmark": "sweep",
        "date": time.strftime("%Y-%m-%d"),
        "versions": versions(),
        "rows": [figures for _, figures in rows],
        "combinations": [{**swept, **_over_seeds(group)} for swept, group in groups],
        "failed": failed,
    }


def figure_of(figures: dict[str, Any]) -> str:
    """By what a run, or a combination, was judged."""
    return "accuracy" if "accuracy" in figures else "reward"


def in_words(figures: dict[str, Any], which: Literal["after", "base", "interval"] = "after") -> str:
    """What that came to: in the end, before, or its interval over seeds."""
    name = figure_of(figures)
    key = {"after": name, "base": f"base_{name}", "interval": "interval"}[which]
    values = figures[key] if which == "interval" else [figures[key]]
    return " to ".join(f"{value:.1%}" if name == "accuracy" else f"{value:.3f}" for value in values)


def _over_seeds(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    name = figure_of(rows[0])
    over_seeds = t_interval([figures[name] for figures in rows])
    if over_seeds and name == "accuracy":
        over_seeds = max(over_seeds[0], 0.0), min(over_seeds[1], 1.0)
    means = (name, f"base_{name}", "tokens_sampled", "tokens_trained", "peak_allocated_gib", "seconds")
    return {
        "method": rows[0]["method"],
        "seeds": [figures["seed"] for figures in rows],
        **{key: statistics.mean(figures[key] for figures in rows) for key in means},
        "interval": over_seeds,
    }


def _stop_with_the_sweep() -> None:
    os.read(0, 1)  # returns when the other end is closed
    os.kill(os.getpid(), signal.SIGTERM)


if __name__ == "__main__":
    threading.Thread(target=_stop_with_the_sweep, daemon=True).start()
    _recipe, _split, _num = sys.argv[1:]
    _process(Trial(configs.load(_recipe), {}, _split, int(_num) if _num else None))
