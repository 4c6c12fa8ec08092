"""The main job on the embedded default, before and after: what `make demo` and `make demo-compare` run.

It uses nothing but the public interface, so it is also an example: settle a config, evaluate the base model, train,
evaluate again on held-out problems.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from shoestring import evaluate, load, load_policy, train
from shoestring.evaluation.evaluate import EvalSettings, Evaluation
from shoestring.model.policy import Policy
from shoestring.records.environment import device_name, versions
from shoestring.run.messages import where_it_lies
from shoestring.samplers import SAMPLERS

RECIPE = Path(__file__).parent.parent / "recipes" / "demo.toml"
PASSING = 0.70
console = Console(soft_wrap=True, highlight=False)


def measure(policy: Policy, config: Any) -> Evaluation:
    """Greedy accuracy on the held-out test problems."""
    engine = SAMPLERS["hf"]().open(policy)
    return evaluate(policy, engine, config.task, EvalSettings(max_new_tokens=config.sampling.max_new_tokens))


def run(algorithm: str, steps: int | None, seed: int, out: Path) -> tuple[dict[str, Any], str]:
    """Trains with one algorithm into `out`; the figures, before and after, and where the run lies."""
    shutil.rmtree(out, ignore_errors=True)  # the demo's own folder, made anew each time
    overrides = [f"algorithm.name={algorithm}", f"seed={seed}", f"out={out}"] + ([f"steps={steps}"] if steps else [])
    config = load(RECIPE, overrides)
    before = measure(load_policy(config.model), config)
    console.print(f"before: {before.accuracy:.1%} of {before.problems} held-out problems", end="")
    console.print(f" (95 % interval {before.low:.1%} to {before.high:.1%})")
    started = time.perf_counter()
    finished = train(config)
    seconds = time.perf_counter() - started
    if finished.stopped_by:
        sys.exit(128 + finished.stopped_by)
    after = measure(finished.policy, config)
    console.print(f"after:  {after.accuracy:.1%}", end="")
    console.print(f" (95 % interval {after.low:.1%} to {after.high:.1%}), {seconds:.0f} s of training\n")
    figures = {
        "algorithm": algorithm,
        "seed": seed,
        "before": before.accuracy,
        "after": after.accuracy,
        "low": after.low,
        "high": after.high,
        "problems": after.problems,
        "tokens_sampled": sum(report.tokens_sampled for report in finished.reports),
        "tokens_trained": sum(report.tokens_trained for report in finished.reports),
        "steps": len(finished.reports),
        "seconds": seconds,
    }
    return figures, where_it_lies(finished)


def demo(steps: int | None, seed: int) -> bool:
    """S-GRPO alone; writes runs/demo/result.json. Whether the accuracy is what it should be."""
    out = Path("runs/demo")
    result, place = run("s-grpo", steps, seed, out)
    kept = ("before", "after", "low", "high", "problems", "seconds")
    (out / "result.json").write_text(json.dumps({key: result[key] for key in kept}, indent=1) + "\n", encoding="utf-8")
    console.print(f"{place}\nresult:   {out / 'result.json'}")
    return result["after"] >= PASSING


def compare(steps: int | None, seed: int) -> bool:
    """All three algorithms from the same start; writes runs/demo-compare/result.json."""
    root = Path("runs/demo-compare")
    runs = [run(algorithm, steps, seed, root / algorithm) for algorithm in ("grpo", "s-grpo", "t-spmo")]
    results = [figures for figures, _ in runs]
    table = Table(title="2x2-digit multiplication, embedded model, greedy on held-out problems")
    for heading in (
        "algorithm",
        "before",
        "after",
        "95 % interval",
        "steps",
        "tokens sampled",
        "tokens trained",
        "seconds",
    ):
        table.add_column(heading, justify="right" if heading != "algorithm" else "left")
    for r in results:
        share = r["tokens_trained"] / r["tokens_sampled"]
        table.add_row(
            r["algorithm"],
            f"{r['before']:.1%}",
            f"{r['after']:.1%}",
            f"{r['low']:.1%} to {r['high']:.1%}",
            str(r["steps"]),
            f"{r['tokens_sampled']:,}",
            f"{r['tokens_trained']:,} ({share:.1%})",
            f"{r['seconds']:.0f}",
        )
    Console().print(table)
    written = {
        "benchmark": "demo-compare",
        "device": device_name(),
        "versions": versions(),
        "date": time.strftime("%Y-%m-%d"),
        "rows": results,
    }
    (root / "result.json").write_text(json.dumps(written, indent=1) + "\n", encoding="utf-8")
    for _, place in runs:
        console.print(f"{place}\n")
    console.print(f"result:   {root / 'result.json'}")
    return all(r["after"] >= PASSING for r in results)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, help="fewer steps than the recipe, for a quick look")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--compare", action="store_true", help="all three algorithms")
    arguments = parser.parse_args()
    good = (compare if arguments.compare else demo)(arguments.steps, arguments.seed)
    if not good and arguments.steps is None:
        sys.exit(f"A full run should end at {PASSING:.0%} or more, and this one did not.")


if __name__ == "__main__":
    main()
