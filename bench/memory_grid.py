"""Predicted against measured memory, on a grid of configurations: bench/results/memory-grid.json.

    python bench/memory_grid.py OUT [--tiny] [--rows 2,3]
    python bench/memory_grid.py --again FILE        predicts anew what FILE has measured

Each row is measured on the real code path with a real model: short completions by two full steps, long ones by the
rehearsal that every run begins with (longest prompt, keys and values of full-length completions in place, a full
micro-batch forward and backward, optimizer state in place), and one of those by full steps as well. Prompts differ in
length. `above` is what lies above the weights.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from common import GIB, SHAPES, clean, our_run, random_model, write

from shoestring.allocator import capped, give_back
from shoestring.config import run as configs
from shoestring.memory import sampling as sampling_bytes
from shoestring.memory.plan import Plan, predict
from shoestring.records.clock import Clock
from shoestring.run import preflight as budgets
from shoestring.run.checkpoint import State
from shoestring.run.loading import load_policy
from shoestring.training import micro_batching as pieces
from shoestring.training.update import build_optimizer
from shoestring.types import Problem, Prompt

THIRD, ALL = "q,v of the last third", "all linear layers"
ADAPTERS = {THIRD: {"modules": ["q_proj", "v_proj"], "layers": "last-third"}, ALL: {}}
# model, adapter, checkpointing, group, completion, dtype, rows in a micro-batch
GRID = [
    ("qwen2-0.5b", THIRD, False, 8, 128, "bf16", 8),
    ("qwen2-0.5b", ALL, False, 16, 128, "bf16", 8),
    ("qwen2-0.5b", ALL, True, 8, 128, "bf16", 16),
    ("qwen2-0.5b", THIRD, True, 16, 128, "nf4", 16),
    ("qwen2-0.5b", THIRD, False, 16, 1024, "bf16", 4),
    ("qwen2-0.5b", THIRD, True, 8, 1024, "bf16", 8),
    ("qwen2-0.5b", ALL, False, 8, 1024, "bf16", 2),
    ("qwen2-0.5b", ALL, True, 16, 1024, "nf4", 4),
    ("qwen2-0.5b", ALL, False, 16, 1024, "nf4", 2),
    ("qwen2-1.5b", THIRD, False, 8, 128, "bf16", 8),
    ("qwen2-1.5b", THIRD, True, 16, 128, "bf16", 16),
    ("qwen2-1.5b", ALL, False, 8, 128, "nf4", 4),
    ("qwen2-1.5b", ALL, True, 16, 128, "bf16", 8),
    ("qwen2-1.5b", THIRD, False, 8, 1024, "bf16", 2),
    ("qwen2-1.5b", THIRD, True, 8, 1024, "nf4", 4),
    ("qwen2-1.5b", ALL, False, 16, 1024, "bf16", 1),
    ("qwen2-1.5b", ALL, True, 16, 1024, "bf16", 4),
    ("qwen2-1.5b", ALL, True, 8, 1024, "nf4", 2),
    ("qwen2-1.5b", THIRD, False, 16, 1024, "nf4", 2),
]
FULL_TOO = (4,)  # a long one that is measured by full steps as well
PROMPT, PROMPTS = 128, 2


def config_of(row: tuple[Any, ...], model: str, tiny: bool = False) -> dict[str, Any]:
    _, adapter, checkpointing, group, completion, dtype, micro_rows = row
    completion = completion // 16 if tiny else completion
    return {
        "model": {"name": model, "dtype": dtype},
        "algorithm": {"name": "grpo"},
        "adapter": {"rank": 16, **ADAPTERS[adapter]},
        "sampling": {
            "num_prompts": PROMPTS,
            "num_completions": group,
            "max_new_tokens": completion,
            "max_prompt_tokens": PROMPT,
            "ignore_eos": True,
        },
        "execution": {
            "wave_tokens": PROMPTS * group * (PROMPT + completion),
            "micro_batch_tokens": micro_rows * (PROMPT + completion - 1),
            "checkpointing": checkpointing,
        },
        "steps": 2,
    }


def rehearsed(values: dict[str, Any]) -> tuple[Clock, Plan]:
    """The rehearsal of a run, with the optimizer's state in place."""
    config = configs.settle(values)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with capped(device, None):
        policy = load_policy(config.model, adapter=config.adapter)
        optimizer = build_optimizer(policy.trained(), config.optim)
        ids = [16 + i % 9 for i in range(PROMPT)]
        asked = [Prompt(Problem(str(n), "", ""), tuple(ids[:n]), n) for n in (PROMPT, PROMPT - 9)]
        plan = budgets.planned(config, policy, asked[0])
        assert plan is not None
        state = State()
        budgets.settle_pieces(state, config, plan)
        engine = config.sampler.open(policy, state.wave_tokens)
        trunk, _ = budgets.trunk_layer(config, policy, engine, plan)

        def sample() -> None:
            num, sampling = config.sampling.num_completions, config.sampling
            engine.rehearse(asked, num=num, sampling=sampling, trunk_layer=trunk)
            give_back(device)

        def learn() -> object:
            spare = pieces.rehearse(policy, optimizer, asked[0], config, state.pieces, trunk)
            give_back(device)
            return spare

        learn()
        sample()  # captured steps stay, so what counts is the second time
        clock = Clock(device)
        with clock.phase("train"):
            spare = learn()
        with clock.phase("sample"):
            sample()  # with the state of `spare` in place
        del spare
    return clock, plan


def measured(values: dict[str, Any], full: bool) -> dict[str, Any]:
    clean()
    if full:
        plan = predict(values, prompt_tokens=PROMPT)
        reports = our_run(values, [PROMPT, PROMPT - 9])
        peaks = {name: max(r.peaks.get(name, 0) for r in reports) for name in ("sample", "train")}
        reserved = max(r.reserved_bytes for r in reports)
    else:
        clock, plan = rehearsed(values)
        peaks, reserved = {"sample": 0, "train": 0} | clock.peaks, clock.reserved
    clean()
    return compared(plan, peaks, reserved) | {"measured_by": "two full steps" if full else "rehearsal"}


def compared(plan: Plan, peaks: dict[str, int], reserved: int) -> dict[str, Any]:
    said = {phase.phase: phase.bytes for phase in plan.phases}
    base, peak = said["weights"], max(peaks["sample"], peaks["train"])
    return {
        "weights_gib": base / GIB,
        "predicted_gib": plan.peak / GIB,
        "measured_gib": peak / GIB,
        "ratio": plan.peak / max(peak, 1),
        "ratio_above": (plan.peak - base) / max(peak - base, 1),
        "predicted_sample_gib": said["peak while sampling"] / GIB,
        "measured_sample_gib": peaks["sample"] / GIB,
        "predicted_train_gib": said["peak while training"] / GIB,
        "measured_train_gib": peaks["train"] / GIB,
        "reserved_gib": reserved / GIB,
        "reserved_ratio": reserved / plan.peak,
    }


def said_again(found: dict[str, Any], folder: Path) -> dict[str, Any]:
    """The same file with the predictions of today's formulas, made on any machine; `folder` takes config files."""
    packs = tuple(map(int, found["versions"]["transformers"].split(".")[:2])) >= (5, 23)
    sampling_bytes._packs_heads = lambda: packs
    numbers = ("model", "adapter", "checkpointing", "group", "completion", "dtype", "micro_rows")
    for line in found["rows"]:
        model = folder / line["model"]
        model.mkdir(parents=True, exist_ok=True)
        (model / "config.json").write_text(json.dumps({"model_type": "qwen2", **SHAPES[line["model"]]}))
        values = config_of(tuple(line[name] for name in numbers), str(model))
        values["execution"]["device"] = "cuda"
        plan = predict(values, total=80 * GIB)
        peaks = {name: int(line[f"measured_{name}_gib"] * GIB) for name in ("sample", "train")}
        reserved = line["reserved_gib"]
        line |= compared(plan, peaks, int((reserved or 0) * GIB))
        if reserved is None:
            line |= {"reserved_gib": None, "reserved_ratio": None}
    return found


def main(out: str, tiny: bool, chosen: set[int]) -> None:
    rows: list[dict[str, Any]] = []
    jobs = [(i, row[4] == 128) for i, row in enumerate(GRID)] + [(i, True) for i in FULL_TOO]
    jobs = [(i, full) for i, full in jobs if i in chosen or not chosen]
    for i, full in jobs:
        names = ("model", "adapter", "checkpointing", "group", "completion", "dtype", "micro_rows")
        rows.append(
            dict(zip(names, GRID[i], strict=True))
            | measured(config_of(GRID[i], str(random_model("tiny" if tiny else GRID[i][0])), tiny), full)
        )
        write(out, "memory-grid", rows, prompt=PROMPT, prompts=PROMPTS)


if __name__ == "__main__" and sys.argv[1] == "--again":
    file = Path(sys.argv[2])
    with tempfile.TemporaryDirectory() as made:
        text = json.dumps(said_again(json.loads(file.read_text()), Path(made)), indent=1)
    file.write_text(text, encoding="utf-8")
elif __name__ == "__main__":
    words = sys.argv[1:]
    numbers = words[words.index("--rows") + 1].split(",") if "--rows" in words else []
    main(words[0], "--tiny" in words, set(map(int, numbers)))
