"""Makes the result files of SVAMP with SmolLM2-135M of what bench/svamp.sh left under runs/; rows of other runs stay.

python bench/svamp.py                          the result files
python bench/svamp.py rates|seeds METHOD       what the files lack
python bench/svamp.py best METHOD              the learning rate that did best
python bench/svamp.py runs METHOD              the folders of the final runs
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from sweeps import METHODS, ROOT, best_rate, read, row, write

RUNS, RESULTS = ROOT / "runs", ROOT / "bench" / "results"
TUNING, FINAL = "svamp-smollm2-lr", "svamp-smollm2"
RATES, SEEDS = (1e-4, 3e-4, 1e-3), (0, 1, 2)
PASSES = ("accuracy", "pass_at_k", "pass_at_k_interval", "samples", "truncated")


def rows(name: str) -> list[dict[str, Any]]:
    """Those of a result file, if there is one."""
    path = RESULTS / f"{name}.json"
    return read(path)["rows"] if path.is_file() else []


def missing(what: str, method: str) -> str:
    if what == "rates":
        done = {r["lr"] for r in rows(TUNING) if r["method"] == method}
        return ",".join(f"{rate:g}" for rate in RATES if rate not in done)
    done = {r["seed"] for r in rows(FINAL) if r["method"] == method}
    return ",".join(str(seed) for seed in SEEDS if seed not in done)


def passes(path: Path) -> dict[str, Any]:
    """pass@k at temperature 1, as far as it was measured."""
    return {key: value for key, value in read(path).items() if key in PASSES} if path.is_file() else {}


def collect(name: str, file: str, **more: Any) -> None:
    """A result file of one sweep of each method. Device and versions are those of the last sweep."""
    found = {(r["method"], r["lr"], r["seed"]): r for r in rows(name)}
    sweeps = [read(path) for method in METHODS if (path := RUNS / f"svamp-{method}" / file).is_file()]
    for figures in (figures for sweep in sweeps for figures in sweep["rows"]):
        own = {**row(figures), "at_temperature_1": passes(ROOT / figures["run"] / "passes.json")}
        found[own["method"], own["lr"], own["seed"]] = own
    if sweeps:
        order = sorted(found.values(), key=lambda r: (METHODS.index(r["method"]), r["lr"], r["seed"]))
        write(name, sweeps[-1], order, **more)


def main() -> None:
    collect(TUNING, "rates.json")
    base = passes(RUNS / "svamp-base.json")
    if not base and (RESULTS / f"{FINAL}.json").is_file():
        base = read(RESULTS / f"{FINAL}.json")["base_at_temperature_1"]
    collect(FINAL, "sweep.json", base_at_temperature_1=base)


if __name__ == "__main__":
    match sys.argv[1:]:
        case []:
            main()
        case ["best", method]:
            print(best_rate((r["accuracy"], r["lr"]) for r in rows(TUNING) if r["method"] == method))
        case ["runs", method]:
            path = RUNS / f"svamp-{method}" / "sweep.json"
            print(*(figures["run"] for figures in (read(path)["rows"] if path.is_file() else [])))
        case [what, method]:
            print(missing(what, method))
