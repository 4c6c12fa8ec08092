"""What the benchmarks make of a sweep's files: rows with the rate, the curve and the paired gain, and result files."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
METHODS = ("grpo", "s-grpo", "t-spmo")


def read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def row(figures: dict[str, Any]) -> dict[str, Any]:
    """A sweep's row, with what was sampled, the base's interval, and the evaluations during the run by step."""
    from shoestring.config import (
        run as configs,  # here, since torch takes seconds and most questions need no run's config
    )
    from shoestring.evaluation.intervals import wilson

    folder = ROOT / figures["run"]
    config = configs.load(folder / "config.toml")
    right = round(figures["base_accuracy"] * figures["problems"])
    found = {
        **{key: value for key, value in figures.items() if key not in ("optim.lr", "run")},
        "lr": config.optim.lr,
        "prompts": config.sampling.num_prompts,
        "completions": config.sampling.num_completions,
        "base_low": wilson(right, figures["problems"])[0],
        "base_high": wilson(right, figures["problems"])[1],
    }
    found["gain"], (found["gain_low"], found["gain_high"]) = gain(folder, figures["split"])
    evaluations = folder / "evals.jsonl"
    if evaluations.is_file():
        lines = [json.loads(line) for line in evaluations.read_text(encoding="utf-8").splitlines()]
        found["curve_split"], found["curve_problems"] = lines[0]["split"], lines[0]["problems"]
        found["curve"] = {str(line["step"]): line["accuracy"] for line in lines}
    return found


def gain(folder: Path, split: str) -> tuple[float, tuple[float, float]]:
    """Paired over the problems, with a bootstrap over them."""
    from shoestring.evaluation.intervals import paired

    after = read(folder / f"evaluation-{split}-all.json")["outcomes"]
    bases = [read(path)["outcomes"] for path in folder.parent.glob("base-*.json")]
    [before] = [outcomes for outcomes in bases if outcomes.keys() == after.keys()]
    return paired(before, after)


def best_rate(rates: Iterable[tuple[float, float]]) -> float:
    """Of (accuracy, rate); of equals the lowest rate."""
    return max(rates, key=lambda pair: (pair[0], -pair[1]))[1]


def write(name: str, sweep: dict[str, Any], rows: list[dict[str, Any]], **more: Any) -> None:
    found = {
        "benchmark": name,
        "device": sweep["rows"][0]["device"],
        "versions": sweep["versions"],
        "date": sweep["date"],
        **more,
        "rows": rows,
    }
    target = ROOT / "bench" / "results" / f"{name}.json"
    draft = target.with_suffix(f".{os.getpid()}")  # others read the file at any time
    draft.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    os.replace(draft, target)
    for r in rows:
        if "seed" in r:
            print(
                f"{name}: {r['method']} lr {r['lr']:g} seed {r['seed']}: {r['base_accuracy']:.1%} -> "
                f"{r['accuracy']:.1%} ({r['low']:.1%} to {r['high']:.1%}) on {r['problems']} {r['split']} problems, "
                f"{r['tokens_trained']:,} of {r['tokens_sampled']:,} tokens trained, {r['seconds']:.0f} s"
            )
