"""W1: one step on a Qwen2-1.5B shape, ours and TRL 1.16.0 in one run: bench/results/w1.json.

    python bench/w1.py OUT [--tiny] [--only ours|budgets|trl]

8 prompts of exactly 128 tokens x 8 completions of exactly 256 (ends ignored), bf16, LoRA r=16 on q,v of the last 9 of
28 layers, `grpo` over every completion token, one update, beta 0, a reward of seeded noise. Ours as it comes,
without a budget and under several; TRL with its defaults (checkpointing on) and with checkpointing off.
"""

from __future__ import annotations

import gc
import statistics
import sys
import tempfile
import time
import traceback
from typing import Any

import torch
from common import GIB, Noise, clean, our_run, prompts, random_model, row, write

from shoestring.errors import ShoestringError

# setting, what differs, warm steps
OURS: list[tuple[str, dict[str, Any], int]] = [("no budget", {}, 5)]
BUDGETS: list[tuple[str, dict[str, Any], int]] = [
    ("memory 3.6GiB", {"memory": "3.6GiB"}, 0),
    ("nf4, memory 1.9GiB", {"memory": "1.9GiB", "dtype": "nf4"}, 0),
    ("memory 3.1GiB", {"memory": "3.1GiB"}, 0),
    ("nf4, memory 1.35GiB", {"memory": "1.35GiB", "dtype": "nf4"}, 0),
]
# Where these did not complete, the larger ones are tried.
FALLBACK = {
    "memory 3.1GiB": ("memory 3.2GiB", {"memory": "3.2GiB"}, 0),
    "nf4, memory 1.35GiB": ("nf4, memory 1.5GiB", {"memory": "1.5GiB", "dtype": "nf4"}, 0),
}


def sizes(tiny: bool) -> tuple[int, int]:
    return (16, 12) if tiny else (128, 256)


def our_config(more: dict[str, Any], warm: int, tiny: bool) -> dict[str, Any]:
    prompt, added = sizes(tiny)
    config: dict[str, Any] = {
        "model": {"name": str(random_model("tiny" if tiny else "qwen2-1.5b")), "dtype": more.get("dtype", "bf16")},
        "algorithm": {"name": "grpo"},
        "objective": {"beta": 0.0, "updates": 1},
        "adapter": {"rank": 16, "modules": ["q_proj", "v_proj"], "layers": "last-third"},
        "sampling": {
            "num_prompts": 8,
            "num_completions": 8,
            "max_new_tokens": added,
            "max_prompt_tokens": prompt,
            "ignore_eos": True,
        },
        "optim": {"lr": 1e-5},
        "steps": warm + 1,
    }
    return {**config, "memory": more["memory"]} if "memory" in more and not tiny else config


def ours(setting: str, more: dict[str, Any], warm: int, tiny: bool) -> dict[str, Any]:
    try:
        reports = our_run(our_config(more, warm, tiny), [sizes(tiny)[0]] * 16)
    except Exception as error:  # a row that fails must not take the others with it
        if not isinstance(error, ShoestringError):
            traceback.print_exc()
        print(f"{setting}: {error}", flush=True)
        return {"system": "shoestring", "setting": setting, "completed": False, "why": str(error)}
    return row("shoestring", setting, reports) | {"completed": True}


def trl(setting: str, checkpointing: bool, warm: int, tiny: bool) -> dict[str, Any]:
    """TRL's trainer on the same prompts. Sampling is what `_generate` takes; completions have 256 tokens each."""
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    prompt, added = sizes(tiny)
    clean()
    gpu = torch.cuda.is_available()
    started: list[float] = []
    sampled: list[float] = []
    peaks: list[int] = []

    class Timer(TrainerCallback):
        def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
            synchronize()
            started.append(time.perf_counter())

        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            synchronize()
            started.append(time.perf_counter())

    def synchronize() -> None:
        if gpu:
            torch.cuda.synchronize()

    class Timed(GRPOTrainer):
        def _generate(self, *args: Any, **kwargs: Any) -> Any:
            synchronize()
            before = time.perf_counter()
            found = super()._generate(*args, **kwargs)
            synchronize()
            sampled.append(time.perf_counter() - before)
            peaks.append(torch.cuda.max_memory_allocated() if gpu else 0)
            return found

    if gpu:  # as TRL finds them
        torch.cuda.memory._set_allocator_settings("expandable_segments:False")
        torch.backends.cuda.enable_cudnn_sdp(True)
    with tempfile.TemporaryDirectory() as out:
        trainer = Timed(
            model=str(random_model("tiny" if tiny else "qwen2-1.5b")),
            args=GRPOConfig(
                output_dir=out,
                per_device_train_batch_size=8,
                gradient_accumulation_steps=8,
                num_generations=8,
                max_completion_length=added,
                max_steps=warm + 1,
                learning_rate=1e-5,
                beta=0.0,
                gradient_checkpointing=checkpointing,
                model_init_kwargs={"dtype": "bfloat16"},
                generation_kwargs={"min_new_tokens": added},
                bf16=gpu,
                use_cpu=not gpu,
                report_to="none",
                save_strategy="no",
                logging_steps=1000,
                disable_tqdm=True,
            ),
            reward_funcs=[Noise()],
            train_dataset=Dataset.from_list(prompts([prompt] * 64)),
            peft_config=LoraConfig(
                task_type="CAUSAL_LM",
                r=16,
                lora_alpha=32,
                target_modules=["q_proj", "v_proj"],
                layers_to_transform=list(range(4, 6) if tiny else range(19, 28)),
            ),
            callbacks=[Timer()],
        )
        trainer.train()
    steps = [b - a for a, b in zip(started[::2], started[1::2], strict=True)]
    peak = torch.cuda.max_memory_allocated() if gpu else 0
    reserved = torch.cuda.max_memory_reserved() if gpu else 0
    del trainer
    gc.collect()
    clean()
    timed = steps[1:] or steps
    sample = statistics.median(sampled[1:] or sampled)
    return {
        "system": "trl-1.16.0",
        "setting": setting,
        "step_s": statistics.median(timed),
        "step_s_least": min(timed),
        "step_s_most": max(timed),
        "sample_s": sample,
        "train_s": statistics.median(timed) - sample,
        "tokens_per_s": 64 * added / sample,
        "peak_allocated_gib": peak / GIB,
        "peak_sample_gib": peaks[0] / GIB,
        "peak_reserved_gib": reserved / GIB,
        "runs": len(timed),
    }


def main(out: str, tiny: bool, only: str) -> None:
    rows: list[dict[str, Any]] = []

    def add(line: dict[str, Any]) -> None:
        rows.append(line)
        write(out, "w1", rows)

    if only in ("", "ours", "budgets"):
        for setting, more, warm in OURS:
            warm = 1 if only == "budgets" else warm
            add(ours(setting, more, warm, tiny))
        if not rows[0]["completed"]:
            raise SystemExit(3)
    if only in ("", "trl"):
        add(trl("defaults (checkpointing on)", True, 5, tiny))
        add(trl("checkpointing off", False, 1, tiny))
    if only in ("", "budgets"):
        for setting, more, warm in BUDGETS:
            line = ours(setting, more, warm, tiny)
            add(line)
            if not line["completed"] and setting in FALLBACK:
                add(ours(*FALLBACK[setting], tiny))
    mine = [r for r in rows if r["system"] == "shoestring" and r.get("completed")]
    theirs = [r for r in rows if r["system"].startswith("trl")]
    if mine and theirs:
        print(f"step: TRL / ours = {theirs[0]['step_s'] / mine[0]['step_s']:.2f}")
        for line in mine:
            part = line["peak_allocated_gib"] / max(theirs[0]["peak_allocated_gib"], 1e-9)
            print(f"peak allocated, {line['setting']}: {part:.2f} of TRL's")


if __name__ == "__main__":
    words = sys.argv[1:]
    main(words[0], "--tiny" in words, words[words.index("--only") + 1] if "--only" in words else "")
