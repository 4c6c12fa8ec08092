"""Runs `make demo-compare` over seeds and writes bench/results/demo-compare.json.

python bench/demo_compare.py [SEEDS]            three seeds by default; some two minutes each on two idle cores
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent


def main(num_seeds: int) -> None:
    rows = []
    for seed in range(num_seeds):
        command = [sys.executable, "examples/demo.py", "--compare", "--seed", str(seed)]
        subprocess.run(command, cwd=ROOT, check=True)
        result = json.loads((ROOT / "runs" / "demo-compare" / "result.json").read_text(encoding="utf-8"))
        rows += result["rows"]
        target = ROOT / "bench" / "results" / "demo-compare.json"
        target.write_text(json.dumps({**result, "rows": rows}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 3)
