"""Makes the result files of multiplication with the embedded model of what bench/multiply.sh left under runs/.

    python bench/multiply.py                       the result files
    python bench/multiply.py SWEEP.JSON            the learning rate that did best in that sweep

Each row is a row of a sweep.json, with what its run's config and evaluations say besides.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from shoestring import config as configs
from shoestring.evaluation import paired, wilson

ROOT = Path(__file__).parent.parent
METHODS = ("grpo", "s-grpo", "t-spmo")
# A result file for each stage, and the sweeps whose rows it holds.
STAGES = {
    "multiply-embedded-lr": [f"multiply-{method}/rates.json" for method in METHODS],
    "multiply-embedded": [f"multiply-{method}/sweep.json" for method in METHODS],
    "multiply-embedded-long": [f"multiply-long-{method}/sweep.json" for method in ("s-grpo", "t-spmo")],
    "multiply-embedded-hard": ["multiply-hard/rates.json", "multiply-hard/sweep.json"],
}


def read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def row(figures: dict[str, Any]) -> dict[str, Any]:
    """A sweep's row, with the rate, the digits, the base's interval, and the evaluations during the run by step."""
    folder = ROOT / figures["run"]
    config = configs.load(folder / "config.toml")
    right = round(figures["base_accuracy"] * figures["problems"])
    found = {
        **{key: value for key, value in figures.items() if key not in ("optim.lr", "run", "overlap", "device")},
        "lr": config.optim.lr,
        "digits": config.task.digits,
        "prompts": config.sampling.num_prompts,
        "completions": config.sampling.num_completions,
        "base_low": wilson(right, figures["problems"])[0],
        "base_high": wilson(right, figures["problems"])[1],
    }
    found["gain"], (found["gain_low"], found["gain_high"]) = gain(folder, figures["split"])
    evaluations = folder / "evals.jsonl"
    if evaluations.is_file():
        lines = [json.loads(line) for line in evaluations.read_text(encoding="utf-8").splitlines()]
        found["curve_split"], found["curve_problems"] = lines[0]["split"], lines[0]["problems"]
        found["curve"] = {str(line["step"]): line["accuracy"] for line in lines}
    return found


def gain(folder: Path, split: str) -> tuple[float, tuple[float, float]]:
    """Paired over the problems, with a bootstrap over them."""
    after = read(folder / f"evaluation-{split}-all.json")["outcomes"]
    bases = [read(path)["outcomes"] for path in folder.parent.glob("base-*.json")]
    [before] = [outcomes for outcomes in bases if outcomes.keys() == after.keys()]
    return paired(before, after)


def best_rate(sweep: Path) -> float:
    """Of equals the lowest."""
    rows = read(sweep)["rows"]
    return max(rows, key=lambda figures: (figures["accuracy"], -figures["optim.lr"]))["optim.lr"]


def write(name: str, sweep: dict[str, Any], rows: list[dict[str, Any]]) -> None:
    found = {
        "benchmark": name,
        "device": sweep["rows"][0]["device"],
        "versions": sweep["versions"],
        "date": sweep["date"],
        "rows": rows,
    }
    target = ROOT / "bench" / "results" / f"{name}.json"
    target.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


def main() -> None:
    for name, paths in STAGES.items():
        sweeps = [read(ROOT / "runs" / path) for path in paths]
        rows = {figures["run"]: row(figures) for sweep in sweeps for figures in sweep["rows"]}
        write(name, sweeps[0], list(rows.values()))
        for r in rows.values():
            print(
                f"{name}: {r['method']} lr {r['lr']:g} seed {r['seed']}: {r['base_accuracy']:.1%} -> "
                f"{r['accuracy']:.1%} ({r['low']:.1%} to {r['high']:.1%}) on {r['problems']} {r['split']} problems, "
                f"{r['tokens_trained']:,} of {r['tokens_sampled']:,} tokens trained, {r['seconds']:.0f} s"
            )
    same_machine = read(ROOT / "runs" / STAGES["multiply-embedded"][0])
    base = {"method": "base", "digits": [3, 3], **read(ROOT / "runs" / "multiply-3x3.json")}
    write("multiply-embedded-3x3", same_machine, [base])


if __name__ == "__main__":
    if len(sys.argv) > 1:
        print(best_rate(Path(sys.argv[1])))
    else:
        main()
