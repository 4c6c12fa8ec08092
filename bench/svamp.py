"""Makes the result files of SVAMP with SmolLM2-135M of what bench/svamp.sh left under runs/.

python bench/svamp.py                          the result files
python bench/svamp.py SWEEP.JSON               the learning rate that did best in that sweep
python bench/svamp.py SWEEP.JSON runs          the folders of its runs
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from sweeps import METHODS, ROOT, best_rate, read, row, write

RUNS = ROOT / "runs"
PASSES = ("accuracy", "pass_at_k", "pass_at_k_interval", "samples", "truncated")


def passes(path: Path) -> dict[str, Any]:
    """pass@k at temperature 1, as far as it was measured."""
    return {key: value for key, value in read(path).items() if key in PASSES} if path.is_file() else {}


def rows(name: str) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Of one sweep of each method; the first sweep stands for the machine."""
    sweeps = [read(path) for method in METHODS if (path := RUNS / f"svamp-{method}" / name).is_file()]
    found = [
        {**row(figures), "at_temperature_1": passes(ROOT / figures["run"] / "passes.json")}
        for sweep in sweeps
        for figures in sweep["rows"]
    ]
    return sweeps[0], found


def main() -> None:
    write("svamp-smollm2-lr", *rows("rates.json"))
    write("svamp-smollm2", *rows("sweep.json"), base_at_temperature_1=passes(RUNS / "svamp-base.json"))


if __name__ == "__main__":
    if len(sys.argv) > 2:
        print(*(figures["run"] for figures in read(Path(sys.argv[1]))["rows"]))
    elif len(sys.argv) > 1:
        print(best_rate(Path(sys.argv[1])))
    else:
        main()
