"""How far the trunk cache moves a step's gradient: bench/results/trunk.json.

    python bench/trunk.py OUT [MODEL ...]

For each model (a name or folder, or "random:" and a shape of `common.SHAPES`) in bf16, LoRA on q and v of its last
third: completions are sampled once, and their gradient is taken through all layers with all rows in one micro-batch,
with a row in each, and from the trunk cache. Rounding alone parts the first two; the truth is the same in fp32.
"""

from __future__ import annotations

import dataclasses
import random
import sys
from typing import Any

import torch
from common import clean, random_model, write

from shoestring.adapters import ADAPTERS
from shoestring.algorithms import ALGORITHMS
from shoestring.config.run import settle
from shoestring.model.load import ModelSettings
from shoestring.model.policy import Policy
from shoestring.run.loading import load_policy
from shoestring.samplers import SAMPLERS, Sampling
from shoestring.training.batch import training_rows
from shoestring.training.micro_batching import micro_batches
from shoestring.training.update import backward
from shoestring.types import Group, Problem, Prompt, Score

PROMPTS, NUM, ADDED = 4, 4, 32


def sampled(policy: Policy, seed: int) -> list[Group]:
    chosen = random.Random(seed)
    prompts = []
    for p in range(PROMPTS):
        ids = tuple(chosen.choices(range(10, 250), k=20 + 9 * p))
        prompts.append(Prompt(Problem(str(p), "", ""), ids, len(ids)))
    sampling = Sampling(max_new_tokens=ADDED, ignore_eos=True)
    layer = policy.first_gradient_layer
    found = SAMPLERS["graph"]().open(policy).sample(prompts, num=NUM, sampling=sampling, seed=seed, trunk_layer=layer)
    return [Group(p, c, tuple(Score(float(i % 2)) for i in range(NUM))) for p, c in zip(prompts, found, strict=True)]


def gradient(policy: Policy, groups: list[Group], *, trunk: bool = False, plain: bool = False, rows: int = 0) -> Any:
    """Of the step, flat, in fp64; `plain` through transformers' layers, `rows` to a micro-batch (0: all)."""
    bare = [[dataclasses.replace(c, trunk=c.trunk if trunk else None) for c in group.completions] for group in groups]
    groups = [dataclasses.replace(group, completions=tuple(found)) for group, found in zip(groups, bare, strict=True)]
    credits = [ALGORITHMS["grpo"]().credit(group, torch.Generator()) for group in groups]
    policy.plain = plain
    policy.__dict__.pop("own_layers", None)
    batches = micro_batches(training_rows(groups, credits), rows or 10**9, trees=policy.takes_trees)
    for index in range(len(batches)):
        backward(policy, batches, index, [None] * len(batches), settle({}).objective, 1.0, False)
    found = torch.cat([p.grad.flatten().double().cpu() for p in policy.trained().values() if p.grad is not None])
    for parameter in policy.trained().values():
        parameter.grad = None
    return found


def measured(model: str, seed: int) -> dict[str, Any]:
    shape = model.removeprefix("random:")
    settings = ModelSettings(name=str(random_model(shape)) if model != shape else model, dtype="bf16")
    adapter: Any = {"modules": ("q_proj", "v_proj"), "layers": "last-third"}
    torch.manual_seed(seed)
    policy = load_policy(settings, adapter=ADAPTERS["lora"](**adapter))
    with torch.no_grad():
        for name, parameter in policy.trained().items():
            if "lora_B" in name:
                parameter.normal_(std=0.01)
    groups = sampled(policy, seed)
    whole, rows = gradient(policy, groups, plain=True), gradient(policy, groups, plain=True, rows=1)
    cached = gradient(policy, groups, trunk=True)
    (policy.adapted or policy.base).float()
    true = gradient(policy, groups, plain=True)

    def apart(a: torch.Tensor, b: torch.Tensor) -> float:
        return float((a - b).norm() / true.norm())

    return {
        "model": model.rsplit("/", 1)[-1],
        "seed": seed,
        "two_micro_batch_sizes": apart(whole, rows),
        "cached_to_whole": apart(cached, whole),
        "ratio": apart(cached, whole) / apart(whole, rows),
        "whole_to_fp32": apart(whole, true),
        "cached_to_fp32": apart(cached, true),
    }


def main(out: str, models: list[str]) -> None:
    rows = []
    for model in models or ["random:qwen2-0.5b"]:
        for seed in range(3):
            rows.append(measured(model, seed))
            write(out, "trunk", rows, prompts=PROMPTS, completions=NUM, new_tokens=ADDED)
            clean()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
