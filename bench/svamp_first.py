"""Makes bench/results/svamp-first.json of what bench/svamp_first.sh left in a folder.

    python bench/svamp_first.py FOLDER DEVICE "VERSIONS AS JSON" DATE

Each row is one run of one seed: the checkpoint was chosen on 100 held-back training problems, and the 300 test problems
were evaluated once for the sft model and once for the choice. The gain is paired over the test problems.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from shoestring.evaluation import paired, wilson


def read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def row(folder: Path, method: str) -> dict[str, Any]:
    base, chosen = read(folder / "sft.json"), read(folder / f"{method}.json")
    steps, evaluations = lines(folder / method / "metrics.jsonl"), lines(folder / method / "evals.jsonl")
    best = max(evaluations, key=lambda e: (e["accuracy"], -e["step"]))
    used = [s for s in steps if s["step"] < best["step"]]
    gain, (gain_low, gain_high) = paired(base["outcomes"], chosen["outcomes"])
    low, high = wilson(sum(chosen["outcomes"].values()), chosen["problems"])
    return {
        "method": method,
        "seed": 0,
        "accuracy": chosen["accuracy"],
        "low": low,
        "high": high,
        "base_accuracy": base["accuracy"],
        "gain": gain,
        "gain_low": gain_low,
        "gain_high": gain_high,
        "problems": chosen["problems"],
        "steps_run": len(steps),
        "step_chosen": best["step"],
        "validation": {str(e["step"]): e["accuracy"] for e in evaluations},
        "tokens_sampled": sum(s["tokens_sampled"] for s in used),
        "tokens_trained": sum(s["tokens_trained"] for s in used),
        "peak_allocated_gib": max(s["peak_bytes"] for s in steps) / 2**30,
        "seconds": sum(sum(s["seconds"].values()) for s in used),
        "seconds_per_step": sorted(sum(s["seconds"].values()) for s in steps)[len(steps) // 2],
        "steps_not_applied": sum(s["tokens_trained"] > 0 and not s["applied"] for s in steps),
    }


def main(folder: Path, device: str, versions: str, date: str) -> None:
    methods = [m for m in ("grpo", "s-grpo", "t-spmo") if (folder / f"{m}.json").is_file()]
    result = {
        "benchmark": "svamp-first",
        "device": device,
        "versions": json.loads(versions),
        "date": date,
        "rows": [row(folder, method) for method in methods],
    }
    target = Path(__file__).parent / "results" / "svamp-first.json"
    target.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    for r in result["rows"]:
        print(
            f"{r['method']}: {r['base_accuracy']:.1%} -> {r['accuracy']:.1%} on {r['problems']} problems, gain "
            f"{100 * r['gain']:+.1f} points ({100 * r['gain_low']:+.1f} to {100 * r['gain_high']:+.1f}), step "
            f"{r['step_chosen']} of {r['steps_run']}, {r['tokens_trained']:,} of {r['tokens_sampled']:,} tokens "
            f"trained, {r['seconds_per_step']:.1f} s a step, peak {r['peak_allocated_gib']:.2f} GiB"
        )


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:5])
