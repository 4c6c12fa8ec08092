"""How fast tokens are sampled, and where a decode step's time goes: bench/results/decode.json.

    python bench/decode.py OUT [--tiny] [--profile] [--only NAME]

The sampling of W1 and of W2's shape by itself, and of 64 completions of two smaller models: sampler `graph`, ends
ignored, five samplings after a first one. With --profile, the kernels of a decode step by their time.
"""

from __future__ import annotations

import statistics
import sys
import time
from typing import Any

import torch
from common import clean, prompts, random_model, write

from shoestring.adapters import ADAPTERS
from shoestring.model.load import ModelSettings
from shoestring.run.loading import load_policy
from shoestring.samplers import SAMPLERS, Sampling
from shoestring.types import Problem, Prompt

# name: shape, dtype, adapter, prompts, completions, prompt tokens, new tokens
CASES: dict[str, tuple[str, str, dict[str, Any], int, int, int, int]] = {
    "w1": ("qwen2-1.5b", "bf16", {"modules": ("q_proj", "v_proj"), "layers": "last-third"}, 8, 8, 128, 256),
    "w2": ("smollm2-135m", "bf16", {}, 16, 16, 128, 96),
    "0.5b": ("qwen2-0.5b", "bf16", {"modules": ("q_proj", "v_proj"), "layers": "last-third"}, 4, 16, 128, 256),
    "135m": ("smollm2-135m", "bf16", {"modules": ("q_proj", "v_proj"), "layers": "last-third"}, 4, 16, 128, 256),
    "w1 nf4": ("qwen2-1.5b", "nf4", {"modules": ("q_proj", "v_proj"), "layers": "last-third"}, 8, 8, 128, 256),
}


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def measured(name: str, tiny: bool, profile: bool) -> dict[str, Any]:
    shape, dtype, adapter, num_prompts, num, length, added = CASES[name]
    if tiny:
        shape, dtype, length, added = "tiny", "fp32", 16, 12
    settings = ModelSettings(name=str(random_model(shape)), dtype=dtype)  # type: ignore[arg-type]
    policy = load_policy(settings, adapter=ADAPTERS["lora"](**adapter))
    engine = SAMPLERS["graph"]().open(policy)
    texts = [row["prompt"] for row in prompts([length] * num_prompts)]
    asked = []
    for i, text in enumerate(texts):
        ids = tuple(policy.tokenizer(text)["input_ids"])[:length]  # type: ignore[index]
        asked.append(Prompt(Problem(str(i), text, "0"), ids, len(ids)))
    sampling = Sampling(max_new_tokens=added, ignore_eos=True)
    seconds = []
    for seed in range(6):
        synchronize()
        started = time.perf_counter()
        engine.sample(asked, num=num, sampling=sampling, seed=seed)
        synchronize()
        seconds.append(time.perf_counter() - started)
    if profile:
        show_kernels(engine, asked, num, sampling)
    peak = torch.cuda.max_memory_allocated() / 2**30 if torch.cuda.is_available() else 0.0
    warm = statistics.median(seconds[1:])
    return {
        "system": "shoestring",
        "setting": name,
        "sample_s": warm,
        "sample_s_least": min(seconds[1:]),
        "sample_s_most": max(seconds[1:]),
        "first_s": seconds[0],
        "tokens_per_s": num_prompts * num * added / warm,
        "ms_a_step": 1000 * warm / added,
        "peak_allocated_gib": peak,
        "runs": len(seconds) - 1,
    }


def show_kernels(engine: Any, asked: list[Prompt], num: int, sampling: Sampling) -> None:
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as profiler

    short = sampling.model_copy(update={"max_new_tokens": 20})
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * torch.cuda.is_available()
    with profiler(activities=activities) as found:
        engine.sample(asked, num=num, sampling=short, seed=0)
        synchronize()
    by = "self_cuda_time_total" if torch.cuda.is_available() else "self_cpu_time_total"
    print(found.key_averages().table(sort_by=by, row_limit=25, max_name_column_width=90))


def main(out: str, tiny: bool, profile: bool, only: str) -> None:
    rows = []
    for name in CASES:
        if only and name not in only.split(","):
            continue
        if "nf4" in name and not tiny and not torch.cuda.is_available():
            continue
        rows.append(measured(name, tiny, profile))
        write(out, "decode", rows)
        clean()


if __name__ == "__main__":
    words = sys.argv[1:]
    only = words[words.index("--only") + 1] if "--only" in words else ""
    main(words[0], "--tiny" in words, "--profile" in words, only)
