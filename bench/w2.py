"""W2: one step on SmolLM2-135M's shape, many completions and an adapter everywhere: bench/results/w2.json.

    python bench/w2.py OUT [--tiny] [--only ALGORITHM]

16 prompts of exactly 128 tokens x 16 completions of exactly 96 (ends ignored), LoRA r=16 on all linear layers,
otherwise as W1. Weights are random: with ends ignored, time does not ask for skill.
"""

from __future__ import annotations

import sys
from typing import Any

from common import our_run, random_model, row, write
from w1 import our_config

ALGORITHMS = ("grpo", "s-grpo")


def config_of(algorithm: str, tiny: bool) -> dict[str, Any]:
    base = our_config({}, 5, tiny)
    sizes = {"num_prompts": 16, "num_completions": 16, "max_new_tokens": 12 if tiny else 96}
    return base | {
        "model": base["model"] | ({} if tiny else {"name": str(random_model("smollm2-135m"))}),
        "algorithm": {"name": algorithm},
        "adapter": {"rank": 16},
        "sampling": base["sampling"] | sizes,
    }


def main(out: str, tiny: bool, only: str) -> None:
    rows: list[dict[str, Any]] = []
    for algorithm in (asked for asked in ALGORITHMS if only in ("", asked)):
        reports = our_run(config_of(algorithm, tiny), [16 if tiny else 128] * 32)
        rows.append(row("shoestring", algorithm, reports) | {"first_step_s": sum(reports[0].seconds.values())})
        write(out, "w2", rows)


if __name__ == "__main__":
    words = sys.argv[1:]
    main(words[0], "--tiny" in words, words[words.index("--only") + 1] if "--only" in words else "")
