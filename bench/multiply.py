"""Makes the result files of multiplication with the embedded model of what bench/multiply.sh left under runs/.

python bench/multiply.py                       the result files
python bench/multiply.py SWEEP.JSON            the learning rate that did best in that sweep
"""

from __future__ import annotations

import sys
from pathlib import Path

from sweeps import METHODS, ROOT, best_rate, read, row, write

from shoestring import config as configs

# A result file for each stage, and the sweeps whose rows it holds.
STAGES = {
    "multiply-embedded-lr": [f"multiply-{method}/rates.json" for method in METHODS],
    "multiply-embedded": [f"multiply-{method}/sweep.json" for method in METHODS],
    "multiply-embedded-long": [f"multiply-long-{method}/sweep.json" for method in ("s-grpo", "t-spmo")],
}


def main() -> None:
    for name, paths in STAGES.items():
        sweeps = [read(ROOT / "runs" / path) for path in paths]
        runs = {figures["run"]: figures for sweep in sweeps for figures in sweep["rows"]}
        digits = {run: configs.load(ROOT / run / "config.toml").task.digits for run in runs}
        write(name, sweeps[0], [{**row(figures), "digits": digits[run]} for run, figures in runs.items()])
    same_machine = read(ROOT / "runs" / STAGES["multiply-embedded"][0])
    base = {"method": "base", "digits": [3, 3], **read(ROOT / "runs" / "multiply-3x3.json")}
    write("multiply-embedded-3x3", same_machine, [base])


if __name__ == "__main__":
    if len(sys.argv) > 1:
        print(best_rate((r["accuracy"], r["optim.lr"]) for r in read(Path(sys.argv[1]))["rows"]))
    else:
        main()
