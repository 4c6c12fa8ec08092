"""Makes the result files of SmolLM2-135M on a task of what bench/smollm2.sh left under runs/; rows of other runs stay.

python bench/smollm2.py TASK                          the result files
python bench/smollm2.py TASK rates|seeds METHOD       what the files lack
python bench/smollm2.py TASK best METHOD              the learning rate that did best
python bench/smollm2.py TASK runs METHOD              the folders of the final runs
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from sweeps import METHODS, ROOT, best_rate, read, row, write

RUNS, RESULTS = ROOT / "runs", ROOT / "bench" / "results"
RATES, SEEDS = (1e-4, 3e-4, 1e-3), (0, 1, 2)
PASSES = ("accuracy", "pass_at_k", "pass_at_k_interval", "samples", "truncated")


def tuning(task: str) -> list[dict[str, Any]]:
    return rows(f"{task}-smollm2-lr")


def final(task: str) -> list[dict[str, Any]]:
    return rows(f"{task}-smollm2")


def rows(name: str) -> list[dict[str, Any]]:
    """Those of a result file, if there is one."""
    path = RESULTS / f"{name}.json"
    return read(path)["rows"] if path.is_file() else []


def missing(task: str, what: str, method: str) -> str:
    if what == "rates":
        done = {r["lr"] for r in tuning(task) if r["method"] == method}
        return ",".join(f"{rate:g}" for rate in RATES if rate not in done)
    done = {r["seed"] for r in final(task) if r["method"] == method}
    return ",".join(str(seed) for seed in SEEDS if seed not in done)


def passes(path: Path) -> dict[str, Any]:
    """pass@k at temperature 1, as far as it was measured."""
    return {key: value for key, value in read(path).items() if key in PASSES} if path.is_file() else {}


def collect(task: str, name: str, file: str, split: str, **more: Any) -> None:
    """A result file of one sweep of each method, judged by that split. Device and versions are those of the last."""
    found = {(r["method"], r["lr"], r["seed"]): r for r in rows(name)}
    sweeps = [read(path) for method in METHODS if (path := RUNS / f"{task}-{method}" / file).is_file()]
    sweeps = [sweep for sweep in sweeps if any(figures["split"] == split for figures in sweep["rows"])]
    for figures in (figures for sweep in sweeps for figures in sweep["rows"]):
        own = {**row(figures), "at_temperature_1": passes(ROOT / figures["run"] / "passes.json")}
        found[own["method"], own["lr"], own["seed"]] = own
    if sweeps:
        order = sorted(found.values(), key=lambda r: (METHODS.index(r["method"]), r["lr"], r["seed"]))
        write(name, sweeps[-1], order, **more)


def main(task: str) -> None:
    name = f"{task}-smollm2"
    collect(task, f"{name}-lr", "rates.json", "validation")
    base = passes(RUNS / f"{task}-base.json")
    if not base and (RESULTS / f"{name}.json").is_file():
        base = read(RESULTS / f"{name}.json")["base_at_temperature_1"]
    collect(task, name, "sweep.json", "test", base_at_temperature_1=base)


if __name__ == "__main__":
    match sys.argv[1:]:
        case [task]:
            main(task)
        case [task, "best", method]:
            print(best_rate((r["accuracy"], r["lr"]) for r in tuning(task) if r["method"] == method))
        case [task, "runs", method]:
            path = RUNS / f"{task}-{method}" / "sweep.json"
            print(*(figures["run"] for figures in (read(path)["rows"] if path.is_file() else [])))
        case [task, what, method]:
            print(missing(task, what, method))
