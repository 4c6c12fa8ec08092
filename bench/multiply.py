"""Makes the result files of multiplication with the embedded model of what bench/multiply.sh left under runs/.

python bench/multiply.py                       the result files
python bench/multiply.py SWEEP.JSON            the learning rate that did best in that sweep
"""

from __future__ import annotations

import sys
from pathlib import Path

from sweeps import METHODS, ROOT, best_rate, read, row, write

from shoestring.config import run as configs

# A result file for each stage, and the sweeps whose rows it holds.
STAGES = {
    "multiply-embedded-lr": [f"multiply-{method}/rates.json" for method in METHODS],
    "multiply-embedded": [f"multiply-{method}/sweep.json" for method in METHODS],
    "multiply-embedded-long": [f"multiply-long-{method}/sweep.json" for method in ("s-grpo", "t-spmo")],
    "multiply-embedded-worked": [f"multiply-embedded-worked-{method}/sweep.json" for method in METHODS],
}


def trained_on(name: str) -> dict[str, float]:
    """Greedy accuracy on problems of the training split."""
    found = read(ROOT / "runs" / "worked" / f"{name}-trained.json")
    return {key: found[key] for key in ("accuracy", "low", "high", "problems")}


def main() -> None:
    for name, paths in STAGES.items():
        if not all((ROOT / "runs" / path).is_file() for path in paths):
            print(f"{name}: not all of its runs are done, its file stays")
            continue
        sweeps = [read(ROOT / "runs" / path) for path in paths]
        runs = {figures["run"]: figures for sweep in sweeps for figures in sweep["rows"]}
        digits = {run: configs.load(ROOT / run / "config.toml").task.digits for run in runs}
        rows = [{**row(figures), "digits": digits[run]} for run, figures in runs.items()]
        if name == "multiply-embedded-worked":
            for r in rows:
                r |= {"base_trained_on": trained_on("base"), "trained_on": trained_on(r["method"])}
        write(name, sweeps[0], rows)
    same_machine, judged = (ROOT / "runs" / path for path in (STAGES["multiply-embedded"][0], "multiply-3x3.json"))
    if same_machine.is_file() and judged.is_file():
        write("multiply-embedded-3x3", read(same_machine), [{"method": "base", "digits": [3, 3], **read(judged)}])


if __name__ == "__main__":
    if len(sys.argv) > 1:
        print(best_rate((r["accuracy"], r["optim.lr"]) for r in read(Path(sys.argv[1]))["rows"]))
    else:
        main()
