"""Makes a result file of what bench/levers.sh or bench/t_spmo.sh left under runs/; rows of other levers stay.

python bench/levers.py svamp-levers levers
python bench/levers.py multiply-embedded-hard-settings t-spmo
"""

from __future__ import annotations

import sys

from sweeps import ROOT, read, row, write


def main(name: str, folder: str) -> None:
    result = ROOT / "bench" / "results" / f"{name}.json"
    rows = {(r["lever"], r["seed"]): r for r in read(result)["rows"]} if result.is_file() else {}
    sweep = None
    for path in sorted((ROOT / "runs" / folder).glob("*/sweep.json")):
        lever, train = path.parent.name, path.parent / "train.json"
        seen = {}
        if train.is_file():
            seen = {"train_accuracy": read(train)["accuracy"], "train_problems": read(train)["problems"]}
        for figures in read(path)["rows"]:
            sweep = read(path)
            rows[lever, figures["seed"]] = {"lever": lever, **row(figures), **seen}
    assert sweep is not None, f"nothing is done under runs/{folder}"
    write(name, sweep, [rows[key] for key in sorted(rows, key=lambda key: (key[0] != "none", key))])


if __name__ == "__main__":
    main(*sys.argv[1:])
