"""What only a GPU can show: a budget that holds, memory that really runs out, one gradient at every budget."""

from __future__ import annotations

import gc
import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch

from shoestring import train
from shoestring.allocator import OutOfMemory, capped, free_bytes, total_bytes
from shoestring.config.run import settle
from shoestring.config.sizes import parse_size
from shoestring.memory.plan import predict
from shoestring.model.matmul import add_product
from shoestring.model.policy import Policy
from shoestring.run.loading import load_policy
from shoestring.training.batch import training_rows
from shoestring.training.micro_batching import micro_batches
from shoestring.training.update import backward
from shoestring.types import Completion, Credit, Group
from tiny import prompt

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]

CUDA = torch.device("cuda")
CONFIG: dict[str, Any] = {
    "model": {"dtype": "fp32"},
    "algorithm": {"name": "grpo"},
    "sampling": {"num_prompts": 8, "num_completions": 64, "max_new_tokens": 256, "max_prompt_tokens": 64},
    "save_every": 0,
    "out": "run",
}


def metrics() -> list[dict[str, Any]]:
    return [json.loads(line) for line in Path("run/metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def clean() -> None:
    gc.collect()
    torch._C._cuda_clearCublasWorkspaces()  # of other tests' streams
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()


@pytest.mark.parametrize("trees", [False, True])
def test_the_gradient_is_the_same_at_three_budgets(trees: bool) -> None:
    policy = adapted("fp32")
    groups, credits = made()
    whole = gradient(policy, groups, credits, 10**9, False, trees=trees)
    sizes = set()
    for memory in ("112MiB", "200MiB", "1GiB"):
        plan = predict({**CONFIG, "memory": memory})
        assert plan.fits
        sizes.add((plan.micro_batch, plan.sizes.checkpointing))
        cut = gradient(policy, groups, credits, plan.micro_batch, plan.sizes.checkpointing, trees=trees)
        assert (cut - whole).abs().max() <= 1e-5 * whole.abs().max()
    assert len(sizes) == 3


@pytest.mark.parametrize(("dtype", "tolerance"), [("fp32", 5e-5), ("bf16", 3e-2)])
def test_trees_in_our_own_layers_have_the_gradient_of_rows_in_those_of_transformers(
    dtype: str, tolerance: float
) -> None:
    policy = adapted(dtype)
    groups, credits = made()
    rows = gradient(policy, groups, credits, 10**9, False, trees=False)
    for max_tokens, checkpointing in ((10**9, False), (1500, True)):
        found = gradient(policy, groups, credits, max_tokens, checkpointing, trees=True)
        assert (found - rows).norm() <= tolerance * rows.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_product_is_added_to_what_is_there_and_to_nothing_where_it_is_fresh(dtype: torch.dtype) -> None:
    a, b = (torch.randn(40, n, device=CUDA).to(dtype) for n in (24, 16))
    wanted = 2 * (a[:, 8:].double().T @ b.double())
    total = torch.full((16, 16), torch.nan, device=CUDA)
    add_product(total, a[:, 8:].T, b, scale=2.0, fresh=True)
    assert (total - wanted).abs().max() < 1e-4
    add_product(total, a[:, 8:].T, b, scale=2.0)
    assert (total - 2 * wanted).abs().max() < 2e-4


def adapted(dtype: str) -> Policy:
    """The embedded model with an adapter that does something."""
    config = settle({**CONFIG, "model": {"dtype": dtype}})
    policy = load_policy(config.model, adapter=config.adapter, device="cuda")
    torch.manual_seed(1)
    for name, parameter in policy.trained().items():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.02)
    return policy


def made() -> tuple[list[Group], list[Credit]]:
    generator = random.Random(0)
    groups, credits = [], []
    for p in range(4):
        completions = [
            Completion(tuple(generator.choices(range(250), k=n)), (-1.0,) * n, "length")
            for n in generator.choices(range(5, 128), k=8)
        ]
        row = torch.cat([torch.full((len(c.token_ids),), g) for g, c in enumerate(completions)])
        col = torch.cat([torch.arange(len(c.token_ids)) for c in completions])
        advantage = torch.randn(len(row), generator=torch.Generator().manual_seed(p))
        groups.append(Group(prompt(20 + 9 * p, p), tuple(completions), ()))
        credits.append(Credit(row, col, advantage, torch.full((len(row),), 1 / len(row))))
    return groups, credits


def gradient(
    policy: Policy, groups: list[Group], credits: list[Credit], max_tokens: int, checkpointing: bool, *, trees: bool
) -> torch.Tensor:
    """Of one step, in padded rows or in trees."""
    rows = training_rows(groups, credits, normalise="groups", beta=0.0)
    batches = micro_batches(rows, max_tokens, trees=trees)
    objective = settle(CONFIG).objective
    for index in range(len(batches)):
        backward(policy, batches, index, [None] * len(batches), objective, 1.0, checkpointing)
    found = torch.cat([p.grad.flatten() for p in policy.trained().values() if p.grad is not None])
    for parameter in policy.trained().values():
        parameter.grad = None
    return found


@pytest.mark.parametrize("memory", ["112MiB", "160MiB"])
def test_no_more_than_the_budget_is_ever_reserved(memory: str) -> None:
    clean()
    train({**CONFIG, "steps": 2, "memory": memory, "eval_every": 1, "evaluation": {"num": 64}}, quiet=True)
    assert 0 < max(line["reserved_bytes"] for line in metrics()) <= parse_size(memory)
    assert torch.cuda.max_memory_reserved() <= parse_size(memory)
    assert torch.empty(2**28, device=CUDA).numel()  # the cap is gone with the run


@pytest.mark.parametrize("mib", [101, 118, 139])
def test_the_cap_holds_to_the_byte(mib: int) -> None:
    """The allocator maps whole pages: left alone, it would pass its own cap by up to one."""
    clean()
    budget = mib * 2**20
    with capped(CUDA, budget):
        with pytest.raises(torch.OutOfMemoryError):
            [torch.empty(3 * 2**20, dtype=torch.uint8, device=CUDA) for _ in range(100)]
        assert budget - 45 * 2**20 < torch.cuda.memory_reserved() <= budget


def test_memory_that_runs_out_makes_pieces_smaller() -> None:
    """Another allocation takes what the plan counted on; the run goes on in smaller waves and micro-batches."""
    clean()
    ballast = torch.empty(200 * 2**20, dtype=torch.uint8, device=CUDA)
    cap = torch.cuda.memory_reserved() + 200 * 2**20
    torch.cuda.set_per_process_memory_fraction(cap / total_bytes(CUDA), 0)
    planned = predict(CONFIG)
    assert planned.peak > 250 * 2**20
    try:
        train({**CONFIG, "steps": 2}, quiet=True)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, 0)
    last = metrics()[-1]
    assert last["applied"]
    smaller = last["wave_tokens"] < planned.wave_tokens, last["micro_batch_tokens"] < planned.micro_batch
    assert any(smaller), last
    assert torch.cuda.max_memory_reserved() <= cap + 20 * 2**20  # whole pages
    del ballast


def test_a_run_that_cannot_fit_fails_before_its_first_step() -> None:
    clean()
    torch.cuda.set_per_process_memory_fraction(52 * 2**20 / total_bytes(CUDA), 0)
    sampling = {**CONFIG["sampling"], "max_new_tokens": 900}
    try:
        with pytest.raises((OutOfMemory, torch.OutOfMemoryError)):
            train({**CONFIG, "sampling": sampling, "steps": 2}, quiet=True)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, 0)
    assert not metrics_exist()


def metrics_exist() -> bool:
    return Path("run/metrics.jsonl").is_file()


def test_a_card_in_use_is_told_by_how_much() -> None:
    whole = f"{total_bytes(CUDA)}B"
    assert free_bytes(CUDA) < total_bytes(CUDA)
    with pytest.raises(ValueError, match="in use by other processes and by the CUDA context"):
        train({**CONFIG, "steps": 1, "memory": whole}, quiet=True)
