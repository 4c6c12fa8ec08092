"""How a step's cost grows, beside what the card could do at best: bench/results/growth.json.

    python bench/growth.py OUT [--tiny] [--only group|length|size]

What a growth.json in OUT holds, of the same card, is not measured again.

A step of one workload in which one number changes: completions of a prompt (4 to 64), new tokens (64 to 2,048), size of
the model (135M, 0.5B, 1.5B, 7B shapes, random weights, bf16). Four prompts of 128 tokens, LoRA r=16 on q and v of the
last third, ends ignored.

The roofline is what this card reached in the first call, in two loops of its own: bytes a second of a large copy, and
operations a second of a large product in bf16. Sampling: for each token, weights and the cache as it is then are read
once, or the operations of the products, whichever takes longer; training: the operations of the layers that carry
gradient and of the head, forward and backward, without what is computed again.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
from common import SHAPES, our_run, random_model, row, write

from shoestring.memory.plan import predict
from shoestring.records.environment import device_name

PROMPTS, PROMPT = 4, 128
BASE = {"shape": "qwen2-0.5b", "group": 16, "length": 256}
AXES: dict[str, list[dict[str, Any]]] = {
    "group": [{"group": n} for n in (4, 8, 16, 32, 64)],
    "length": [{"length": n} for n in (64, 256, 1024, 2048)],
    "size": [{"shape": shape} for shape in ("smollm2-135m", "qwen2-0.5b", "qwen2-1.5b", "qwen2.5-7b")],
}
STEPS = 4
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def fastest(job: Any, runs: int = 5) -> float:
    """Seconds of the quickest of some runs."""

    def once() -> float:
        started = time.perf_counter()
        job()
        if DEVICE == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - started

    return min(once() for _ in range(runs))


def reached(tiny: bool) -> tuple[float, float]:
    """Bytes and operations a second of this device."""
    count, size = (2**20, 256) if tiny else (2**31, 8192)
    numbers, copy = (torch.ones(count // 2, dtype=torch.bfloat16, device=DEVICE) for _ in range(2))
    square = torch.randn(size, size, device=DEVICE).bfloat16()
    bandwidth = 2 * numbers.nbytes / fastest(lambda: copy.copy_(numbers))
    return bandwidth, 2 * size**3 / fastest(lambda: square @ square)


def roofline(config: dict[str, Any], bandwidth: float, operations: float) -> tuple[float, float]:
    """Least seconds of sampling and of training a step."""
    work = predict(config, prompt_tokens=config["sampling"]["max_prompt_tokens"]).work
    shape, rows = work.shape, work.rows
    matrices = shape.layers * sum(linear.inputs * linear.outputs for linear in shape.linears)
    head = shape.vocab * shape.hidden
    a_token = 2 * (matrices + head)
    slot = 2 * shape.layers * shape.kv_heads * shape.head_dim * work.itemsize
    sampling = 0.0
    for length in range(work.added):
        cache = slot * (work.prompts * work.prompt + rows * length)
        sampling += max((work.itemsize * (matrices + head) + cache) / bandwidth, rows * a_token / operations)
    nodes = work.prompts * work.prompt + rows * (work.added - 1)
    part = (shape.layers - work.trained.first_layer) / shape.layers
    layers = nodes * 2 * matrices * part * (2 if work.trunk_rows else 2 + (1 - part) / max(part, 1e-9))
    attention = 3 * 2 * 2 * rows * (work.prompt + work.added) ** 2 / 2 * shape.heads * shape.head_dim
    training = (layers + part * shape.layers * attention + 2 * rows * work.added * 2 * head) / operations
    return sampling, training


def config_of(point: dict[str, Any], tiny: bool) -> dict[str, Any]:
    length = point["length"] // 16 if tiny else point["length"]
    return {
        "model": {"name": str(random_model("tiny" if tiny else point["shape"])), "dtype": "bf16"},
        "algorithm": {"name": "grpo"},
        "adapter": {"rank": 16, "modules": ["q_proj", "v_proj"], "layers": "last-third"},
        "sampling": {
            "num_prompts": PROMPTS,
            "num_completions": point["group"],
            "max_new_tokens": length,
            "max_prompt_tokens": 16 if tiny else PROMPT,
            "ignore_eos": True,
        },
        "steps": STEPS,
    }


def main(out: str, tiny: bool, only: str) -> None:
    assert all(point.get("shape", "tiny") in SHAPES for points in AXES.values() for point in points)
    before = Path(out) / "growth.json"
    found: dict[str, Any] = json.loads(before.read_text(encoding="utf-8")) if before.is_file() else {"rows": []}
    assert found.get("device", device_name()) == device_name(), f"{before} is of another card: write elsewhere"
    if not found["rows"]:
        found["bytes_per_s"], found["operations_per_s"] = reached(tiny)
    more = {key: found[key] for key in ("bytes_per_s", "operations_per_s")}
    rows: list[dict[str, Any]] = found["rows"]
    done = {tuple(row[key] for key in BASE): row for row in rows}
    for axis, changes in AXES.items():
        for change in changes if only in ("", axis) else []:
            point = BASE | change
            if tuple(point.values()) not in done:
                config = config_of(point, tiny)
                made = row("shoestring", axis, our_run(config, [config["sampling"]["max_prompt_tokens"]] * PROMPTS))
                sampling, training = roofline(config, *more.values())
                best = {"roofline_sample_s": sampling, "roofline_train_s": training}
                both = made["sample_s"] + made["train_s"]
                rows.append(made | best | {"times_roofline": both / (sampling + training)} | point)
                done[tuple(point.values())] = rows[-1]
                write(out, "growth", rows, **more, prompts=PROMPTS, prompt_tokens=PROMPT)


if __name__ == "__main__":
    words = sys.argv[1:]
    main(words[0], "--tiny" in words, words[words.index("--only") + 1] if "--only" in words else "")
