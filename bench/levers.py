"""Makes bench/results/svamp-levers.json of what bench/levers.sh left under runs/levers/; rows of other levers stay.

python bench/levers.py
"""

from __future__ import annotations

from sweeps import ROOT, read, row, write

NAME = "svamp-levers"


def main() -> None:
    result = ROOT / "bench" / "results" / f"{NAME}.json"
    rows = {r["lever"]: r for r in read(result)["rows"]} if result.is_file() else {}
    sweep = None
    for path in sorted((ROOT / "runs" / "levers").glob("*/sweep.json")):
        found, train = read(path), path.parent / "train.json"
        if not (found["rows"] and train.is_file()):
            continue
        sweep = found
        [figures] = found["rows"]
        seen = {"train_accuracy": read(train)["accuracy"], "train_problems": read(train)["problems"]}
        rows[path.parent.name] = {"lever": path.parent.name, **row(figures), **seen}
    assert sweep is not None, "no lever is done: run bench/levers.sh"
    write(NAME, sweep, list(rows.values()))


if __name__ == "__main__":
    main()
