"""Compare how fast two source trees are, on one machine in one call: OUT/compare.json.

    python bench/compare.py OLD NEW [OUT] [--rounds N] [--limit SECONDS] [--only w1,w2,decode,w3] [--tiny]

OLD and NEW hold src/ and bench/, as from `git archive`. The scripts w1, w2 and decode of each tree run with its own
package, each in a process of its own, old and new in turn; without a GPU it is w3. Each run gives the median of five
warm steps, and the table the median of these over the rounds. Weights are random, so no model is needed. No run starts
that would end behind the limit. --tiny takes a tiny model everywhere, to try the script.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from datetime import date
from pathlib import Path
from typing import Any, NamedTuple

SIDES = ("old", "new")
MEASURES = ("step_s", "sample_s")
"""What is compared of a row: the first of these that it has."""
SCRIPTS: dict[str, tuple[str, ...]] = {
    "w1": ("--only", "ours"),
    "w2": (),
    "decode": ("--only", "w1,w2,0.5b,135m"),
    "w3": (),
}
ON_GPU, ON_CPU = ("w1", "w2", "decode"), ("w3",)

Results = dict[str, dict[str, list[dict[str, Any]]]]
"""The rows of each workload and side, one a round."""


class Failed(Exception):
    """A script that gave no result, and why."""


class Asked(NamedTuple):
    trees: Mapping[str, Path]
    scripts: Sequence[str]
    rounds: int
    limit: float
    tiny: bool
    out: Path | None
    names: Mapping[str, str]


# --- running --------------------------------------------------------------------------------------------------------


def environment(tree: Path) -> dict[str, str]:
    paths = os.pathsep.join(str(path) for path in (tree / "src", tree / "bench", tree))
    return {**os.environ, "PYTHONPATH": paths, "HF_HUB_OFFLINE": "1"}


def printed(tree: Path, code: str) -> str:
    command = [sys.executable, "-c", code]
    return subprocess.run(command, env=environment(tree), check=True, capture_output=True, text=True).stdout.strip()


def script_of(tree: Path, name: str) -> Path:
    """Find the tree's script of that name in any folder under bench/."""
    found = sorted((tree / "bench").rglob(f"{name}.py"))
    if len(found) != 1:
        raise Failed(f"there are {len(found)} scripts {name}.py under bench/")
    return found[0]


def run_script(tree: Path, name: str, tiny: bool, timeout: float) -> dict[str, Any]:
    """Run a script once and return its result file."""
    with tempfile.TemporaryDirectory() as out:
        words = [out, "as it comes"] if name == "w3" else [out, *SCRIPTS[name], *["--tiny"] * tiny]
        command = [sys.executable, str(script_of(tree, name)), *words]
        try:
            subprocess.run(
                command, cwd=out, env=environment(tree), check=True, capture_output=True, text=True, timeout=timeout
            )
        except subprocess.TimeoutExpired:
            raise Failed(f"it took longer than {timeout:.0f} s") from None
        except subprocess.CalledProcessError as error:
            print(error.stdout, error.stderr, sep="\n", file=sys.stderr)
            raise Failed(f"it ended with {error.returncode}") from None
        files = sorted(Path(out).glob("*.json"))
        if len(files) != 1:
            raise Failed(f"it wrote {len(files)} result files")
        return json.loads(files[0].read_text(encoding="utf-8"))


def run_side(asked: Asked, side: str, script: str, started: float) -> dict[str, Any]:
    """Run a script of one tree in what is left of the limit."""
    rest = max(asked.limit - (time.monotonic() - started), 1.0)
    try:
        return run_script(asked.trees[side], script, asked.tiny, rest)
    except Failed as why:
        raise Failed(f"{side}: {why}") from None


def add(results: Results, side: str, script: str, found: Mapping[str, Any]) -> None:
    """Add the rows of a run that completed."""
    for row in found["rows"]:
        if row.get("completed", True):
            name = script if script in ("w1", "w3") else f"{script} {row['setting']}"
            results.setdefault(name, {side: [] for side in SIDES})[side].append(row)


def measure(asked: Asked) -> tuple[Results, dict[str, Any], dict[str, str]]:
    """Run all rounds. Return the results, the last file, and why scripts were left out."""
    results: Results = {}
    head: dict[str, Any] = {}
    left_out: dict[str, str] = {}
    took: dict[str, float] = {}
    started = time.monotonic()
    for number in range(1, asked.rounds + 1):
        for script in asked.scripts:
            before = time.monotonic()
            if before - started + took.get(script, 0.0) > asked.limit:
                left_out[f"{script}, round {number}"] = f"the limit of {asked.limit:.0f} s"
                continue
            try:
                pair = [run_side(asked, side, script, started) for side in SIDES]
            except Failed as why:
                left_out[f"{script}, round {number}"] = str(why)
                continue
            for side, found in zip(SIDES, pair, strict=True):
                add(results, side, script, found)
            head = pair[-1]
            took[script] = time.monotonic() - before
            print(f"round {number} of {asked.rounds}, {script}: {took[script]:.0f} s", file=sys.stderr, flush=True)
            write(asked, results, head, left_out)
    return results, head, left_out


# --- comparing ------------------------------------------------------------------------------------------------------


def compared(workload: str, sides: Mapping[str, Sequence[Mapping[str, Any]]]) -> dict[str, Any]:
    """Make a row of the result: medians over the rounds, their ratio, and the ratios of each round.

    >>> sides = {"old": [{"step_s": 1.0}, {"step_s": 2.0}], "new": [{"step_s": 1.5}, {"step_s": 1.0}]}
    >>> found = compared("w1", sides)
    >>> found["old"], found["new"], round(found["ratio"], 3), found["ratio_least"], found["ratio_most"]
    (1.5, 1.25, 0.833, 0.5, 1.5)
    """
    key = next(name for name in MEASURES if name in sides["old"][0])
    seconds = {side: [row[key] for row in sides[side]] for side in SIDES}
    medians = {side: statistics.median(seconds[side]) for side in SIDES}
    ratios = [new / old for old, new in zip(*(seconds[side] for side in SIDES), strict=True)]
    return {
        "workload": workload,
        "measure": key,
        **medians,
        "ratio": medians["new"] / medians["old"],
        "ratio_least": min(ratios),
        "ratio_most": max(ratios),
        "rounds": len(ratios),
        "warm_steps": [row.get("runs") for side in SIDES for row in sides[side]],
        **{f"{side}_medians": seconds[side] for side in SIDES},
        **{f"{side}_least": min(row.get(f"{key}_least", row[key]) for row in sides[side]) for side in SIDES},
        **{f"{side}_most": max(row.get(f"{key}_most", row[key]) for row in sides[side]) for side in SIDES},
        **{f"{side}_peak_gib": max(row.get("peak_allocated_gib", 0.0) for row in sides[side]) for side in SIDES},
    }


def rows_of(results: Results) -> list[dict[str, Any]]:
    """Make a row for each workload that both sides have in every round."""
    return [compared(name, sides) for name, sides in results.items() if len(sides["old"]) == len(sides["new"])]


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Set the rows as text. The spread is from the least to the largest ratio of a round."""
    lines = [("workload", "old s", "new s", "new/old", "spread", "peak GiB")]
    for row in rows:
        spread = f"{row['ratio_least']:.3f} to {row['ratio_most']:.3f}"
        peaks = f"{row['old_peak_gib']:.2f}, {row['new_peak_gib']:.2f}"
        lines.append((row["workload"], f"{row['old']:.4f}", f"{row['new']:.4f}", f"{row['ratio']:.3f}", spread, peaks))
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines
    )


def write(asked: Asked, results: Results, head: Mapping[str, Any], left_out: Mapping[str, str]) -> None:
    """Write compare.json, where a folder is given. Each pair writes it, so that a cut-off run leaves what it has."""
    if asked.out is None:
        return
    found = {
        "benchmark": "compare",
        "device": head.get("device"),
        "versions": head.get("versions"),
        "date": date.today().isoformat(),
        **asked.names,
        "tiny": asked.tiny,
        "left_out": dict(left_out),
        "rows": rows_of(results),
    }
    asked.out.mkdir(parents=True, exist_ok=True)
    (asked.out / "compare.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


# --- asking ---------------------------------------------------------------------------------------------------------


def read(words: Sequence[str] | None) -> Asked:
    parser = argparse.ArgumentParser(description="Compare how fast two source trees are.")
    for side in SIDES:
        parser.add_argument(side, type=lambda text: Path(text).resolve())
        parser.add_argument(f"--{side}-name", help="What the result file calls it; default: its folder.")
    parser.add_argument("out", type=Path, nargs="?")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--limit", type=float, default=450.0, help="Seconds in all.")
    parser.add_argument("--only", type=lambda text: text.split(","), help="Scripts, as in w1,decode.")
    parser.add_argument("--tiny", action="store_true")
    given = parser.parse_args(words)
    if unknown := set(given.only or ()) - SCRIPTS.keys():
        parser.error(f"--only knows {', '.join(SCRIPTS)}, and not {', '.join(sorted(unknown))}")
    trees = {"old": given.old, "new": given.new}
    names = {"old": given.old_name or given.old.name, "new": given.new_name or given.new.name}
    scripts = given.only or default_scripts(given.new, given.tiny)
    return Asked(trees, scripts, given.rounds, given.limit, given.tiny, given.out, names)


def default_scripts(tree: Path, tiny: bool) -> tuple[str, ...]:
    """Choose W3 where there is no GPU; with `tiny`, the others too."""
    if printed(tree, "import torch; print(torch.cuda.is_available())") == "True":
        return ON_GPU
    return (*ON_GPU, *ON_CPU) if tiny else ON_CPU


def main(words: Sequence[str] | None = None) -> None:
    asked = read(words)
    for tree in asked.trees.values():
        found = Path(printed(tree, "import shoestring; print(shoestring.__file__)"))
        if not found.is_relative_to(tree / "src"):
            raise SystemExit(f"{found} was imported, and not the package in {tree / 'src'}")
    results, head, left_out = measure(asked)
    write(asked, results, head, left_out)
    print(table(rows_of(results)))
    for name, why in left_out.items():
        print(f"left out: {name}: {why}")
    for name, sides in results.items():
        if len(sides["old"]) != len(sides["new"]):
            print(f"left out: {name}: the two trees do not both have it")
    if not results:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
