"""Makes the result files of a model on a task of what bench/tuned.sh left under runs/; rows of other runs stay.

python bench/tuned.py NAME                          the result files
python bench/tuned.py NAME rates METHOD             the rates that its file lacks
python bench/tuned.py NAME seeds METHOD SEEDS       which of these it lacks at the best rate
python bench/tuned.py NAME best METHOD              the learning rate that did best
python bench/tuned.py NAME runs METHOD              the folders of the final runs

NAME-longer, NAME-plain: its runs of more steps, or whose groups without signal are not replaced.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from sweeps import METHODS, ROOT, best_rate, read, row, write

RUNS, RESULTS = ROOT / "runs", ROOT / "bench" / "results"
RATES = (1e-4, 3e-4, 1e-3)
MORE = ("longer", "plain")
MORE_RATES = {"multiply-embedded-hard": (3e-3,)}
PASSES = ("accuracy", "pass_at_k", "pass_at_k_interval", "samples", "truncated")
GREEDY = ("accuracy", "low", "high", "problems")


def rows(name: str) -> list[dict[str, Any]]:
    """Those of a result file, if there is one."""
    path = RESULTS / f"{name}.json"
    return read(path)["rows"] if path.is_file() else []


def missing_rates(name: str, method: str) -> str:
    done = {r["lr"] for r in rows(f"{name}-lr") if r["method"] == method}
    return ",".join(f"{rate:g}" for rate in (*RATES, *MORE_RATES.get(name, ())) if rate not in done)


def missing_seeds(name: str, method: str, wanted: str) -> str:
    rate = best(name, method)
    done = {r["seed"] for r in rows(name) if r["method"] == method and r["lr"] == rate}
    return ",".join(seed for seed in wanted.split(",") if int(seed) not in done)


def best(name: str, method: str) -> float:
    for kind in MORE:
        name = name.removesuffix(f"-{kind}")
    tried = rows(f"{name}-lr")
    return best_rate((r["accuracy"], r["lr"]) for r in tried if r["method"] == method)


def passes(path: Path) -> dict[str, Any]:
    """pass@k at temperature 1, as far as it was measured."""
    return {key: value for key, value in read(path).items() if key in PASSES} if path.is_file() else {}


def elsewhere(begin: str) -> dict[str, Any]:
    """Greedy accuracy on other problems, by their name, of files that begin so."""
    folder, prefix = (ROOT / f"{begin}elsewhere-x").parent, (ROOT / f"{begin}elsewhere-").name
    return {
        path.stem.removeprefix(prefix): {key: value for key, value in read(path).items() if key in GREEDY}
        for path in sorted(folder.glob(f"{prefix}*.json"))
    }


def collect(name: str, target: str, file: str, split: str, **more: Any) -> None:
    """A result file of one sweep of each method, judged by that split. Device and versions are those of the last."""
    found = {(r["method"], r["lr"], r["seed"]): r for r in rows(target)}
    if split == "test":  # a rate that is no longer the best
        found = {key: r for key, r in found.items() if r["lr"] == best(name, r["method"])}
    sweeps = [read(path) for method in METHODS if (path := RUNS / f"{name}-{method}" / file).is_file()]
    sweeps = [sweep for sweep in sweeps if any(figures["split"] == split for figures in sweep["rows"])]
    for figures in (figures for sweep in sweeps for figures in sweep["rows"]):
        run = figures["run"]
        own = {
            **row(figures),
            "at_temperature_1": passes(ROOT / run / "passes.json"),
            "elsewhere": elsewhere(f"{run}/"),
        }
        found[own["method"], own["lr"], own["seed"]] = own
    if sweeps:
        order = sorted(found.values(), key=lambda r: (METHODS.index(r["method"]), r["lr"], r["seed"]))
        write(target, sweeps[-1], order, **more)


def main(name: str) -> None:
    collect(name, f"{name}-lr", "rates.json", "validation")
    before = read(RESULTS / f"{name}.json") if (RESULTS / f"{name}.json").is_file() else {}
    begin = f"runs/{name}-base-"
    base = {
        "base_at_temperature_1": passes(ROOT / f"{begin}passes.json"),
        "base_elsewhere": elsewhere(begin),
    }
    kept = {key: before[key] for key in base if key in before}
    collect(name, name, "sweep.json", "test", **base | kept if not any(base.values()) else base)
    for kind in MORE:
        collect(f"{name}-{kind}", f"{name}-{kind}", "sweep.json", "test")


if __name__ == "__main__":
    match sys.argv[1:]:
        case [name]:
            main(name)
        case [name, "best", method]:
            print(best(name, method))
        case [name, "runs", method]:
            path = RUNS / f"{name}-{method}" / "sweep.json"
            found = read(path)["rows"] if path.is_file() else []
            print(*(figures["run"] for figures in found if figures["split"] == "test"))
        case [name, "rates", method]:
            print(missing_rates(name, method))
        case [name, "seeds", method, wanted]:
            print(missing_seeds(name, method, wanted))
