"""Makes bench/results/ablations.json of what bench/ablations.sh left under runs/ablations/: a row for each run.

python bench/ablations.py
"""

from __future__ import annotations

from typing import Any

from sweeps import ROOT, read, row, write

# An ablation, the sweeps it is made of, and what their rows are called: the swept value, where nothing is said.
ABLATIONS: dict[str, dict[str, str]] = {
    "alpha": {"alpha": ""},
    "k": {"k": ""},
    "p": {"p": ""},
    "choice": {"choice-first": "first", "choice-random": "random", "choice-entropy": "highest entropy"},
    "group": {f"group-{size}": "" for size in (4, 8, 16, 32)},
    "rank": {
        f"rank-{rank}{rate}": f"{rank}{', lr 1e-3' if rate else ''}" for rank in (1, 4, 16) for rate in ("", "-fast")
    },
    "layers": {"layers": ""},
    "replay": {"replay": ""},
}


def labelled(ablation: str, figures: dict[str, Any], label: str) -> dict[str, Any]:
    [swept] = [key for key in figures if "." in key]
    value = label or str(figures[swept])
    return {"ablation": ablation, "value": value, **row({k: v for k, v in figures.items() if k != swept})}


def main() -> None:
    folder, rows, sweep = ROOT / "runs" / "ablations", [], None
    for ablation, parts in ABLATIONS.items():
        for part, label in parts.items():
            path = folder / part / "sweep.json"
            if not path.is_file():
                continue
            sweep = read(path)
            rows += [labelled(ablation, figures, label) for figures in sweep["rows"]]
    assert sweep is not None, f"{folder} holds no sweep"
    write("ablations", sweep, rows)


if __name__ == "__main__":
    main()
