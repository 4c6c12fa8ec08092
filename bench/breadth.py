"""Makes bench/results/multiply-embedded-breadth.json of what bench/breadth.sh left under runs/: a row for each model.

python bench/breadth.py
"""

from __future__ import annotations

from typing import Any

from sweeps import METHODS, ROOT, read, write

RUNS = ROOT / "runs"
GREEDY = ("accuracy", "low", "high", "problems")
DIGITS = ("2x2", "1x3", "2x3", "3x2")


def judged(name: str) -> dict[str, Any]:
    """Greedy accuracy by digits and on the training split, with Wilson's interval, and pass@k at temperature 1."""
    found: dict[str, Any] = {"digits": {}}
    for digits in DIGITS:
        seen = read(RUNS / "breadth" / f"{name}-{digits}.json")
        found["digits"][digits] = {key: seen[key] for key in GREEDY}
    seen = read(RUNS / "breadth" / f"{name}-trained.json")
    found["trained_on"] = {key: seen[key] for key in GREEDY}
    passes = read(RUNS / "breadth" / f"{name}-passes.json")
    return found | {key: passes[key] for key in ("pass_at_k", "pass_at_k_interval", "samples", "problems")}


def main() -> None:
    sweeps = {method: read(RUNS / f"breadth-{method}" / "sweep.json") for method in METHODS}
    rows: list[dict[str, Any]] = [{"method": "base", **judged("base")}]
    for method, sweep in sweeps.items():
        for figures in sweep["rows"]:
            cost = {key: figures[key] for key in ("base_accuracy", "accuracy", "tokens_sampled", "tokens_trained")}
            rows.append(
                {"method": method, "run_seed": figures["seed"], **cost, **judged(f"{method}-{figures['seed']}")}
            )
    write("multiply-embedded-breadth", sweeps[METHODS[0]], rows)


if __name__ == "__main__":
    main()
