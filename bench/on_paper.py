"""Three runs that the plan says fit, each done once under its budget: bench/results/on-paper.json.

    python bench/on_paper.py OUT [--tiny]

A 1.5B shape under 4 GiB, a 7B shape in NF4 under 6.25 GiB and in bf16 under 15.25 GiB (a 16 GB card); one prompt of 256
tokens x 8 completions of 512, LoRA r=16 on q,v of the last third.
"""

from __future__ import annotations

import sys
from typing import Any

from common import GIB, our_run, random_model, row, write

from shoestring.memory.plan import predict

RUNS = [("qwen2.5-7b", "nf4", "6.25GiB"), ("qwen2.5-7b", "bf16", "15.25GiB"), ("qwen2-1.5b", "bf16", "4GiB")]


def main(out: str, tiny: bool) -> None:
    rows: list[dict[str, Any]] = []
    prompt, added = (16, 12) if tiny else (256, 512)
    for shape, dtype, memory in RUNS:
        config: dict[str, Any] = {
            "model": {"name": str(random_model("tiny" if tiny else shape)), "dtype": dtype},
            "algorithm": {"name": "grpo"},
            "adapter": {"rank": 16, "modules": ["q_proj", "v_proj"], "layers": "last-third"},
            "sampling": {
                "num_prompts": 1,
                "num_completions": 8,
                "max_new_tokens": added,
                "max_prompt_tokens": prompt,
                "ignore_eos": True,
            },
            "memory": memory,
            "steps": 1,
        }
        plan = predict(config)
        line = row("shoestring", f"{shape} {dtype}, memory {memory}", our_run(config, [prompt]))
        rows.append(
            line | {"budget_gib": (plan.budget or 0) / GIB, "predicted_gib": plan.peak / GIB, "waves": plan.waves}
        )
        write(out, "on-paper", rows)


if __name__ == "__main__":
    main(sys.argv[1], "--tiny" in sys.argv)
