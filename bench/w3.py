"""W3: the step of the embedded default on the CPU: bench/results/w3.json.

    python bench/w3.py OUT SETTING

Eight steps of `shoestring train` as it comes, in one process; medians of the last five. Rows are added to the file, so
that another state of the code (PYTHONPATH) can be measured by the same script on the same machine.
"""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
from datetime import date
from pathlib import Path
from typing import Any

import torch

import shoestring
from shoestring import train
from shoestring.records.environment import device_name, versions


def main(out: str, setting: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        reports = train({"steps": 8, "save_every": 0, "out": f"{folder}/run"}, quiet=True).reports[3:]
    steps = [sum(report.seconds.values()) for report in reports]
    sample = statistics.median(report.seconds["sample"] for report in reports)
    row: dict[str, Any] = {
        "system": "shoestring",
        "setting": setting,
        "step_s": statistics.median(steps),
        "step_s_least": min(steps),
        "step_s_most": max(steps),
        "sample_s": sample,
        "train_s": statistics.median(report.seconds["train"] for report in reports),
        "tokens_per_s": statistics.median(r.tokens_sampled / r.seconds["sample"] for r in reports),
        "reward": statistics.mean(report.reward for report in reports),
        "runs": len(reports),
    }
    file = Path(out) / "w3.json"
    rows = json.loads(file.read_text(encoding="utf-8"))["rows"] if file.is_file() else []
    found = {
        "benchmark": "w3",
        "device": f"{device_name()}, {torch.get_num_threads()} threads",
        "versions": versions(),
        "date": date.today().isoformat(),
        "rows": [*rows, row],
    }
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(found, indent=1), encoding="utf-8")
    print(Path(shoestring.__file__).parent, json.dumps(row))


if __name__ == "__main__":
    main(*sys.argv[1:])
