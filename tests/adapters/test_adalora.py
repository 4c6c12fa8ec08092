"""AdaLoRA: its budget, its regulariser, and a plan that does not fall short."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tests.adapters.test_contracts import batches_of, disturb
from tests.memory.test_plan import DTYPES
from tests.model.test_trees import gradients
from tests.peaks import as_near_as_lora, not_short

from shoestring.adapters import ADAPTERS
from shoestring.adapters.on_peft import from_folder
from shoestring.model.policy import Policy
from shoestring.training.update import apply, penalise
from tiny import random_model, random_policy


def ranks(policy: Policy) -> int:
    return sum(int(p.count_nonzero()) for name, p in policy.trained().items() if "lora_E" in name)


def test_ranks_fall_to_the_target_and_stay_there() -> None:
    """With the budget of 21 layers: 6 ranks each in the beginning, 2 at the end."""
    policy = random_policy(adapter={"name": "adalora", "rank": 6, "target_rank": 2, "total_steps": 4})
    assert policy.handle is not None
    disturb(policy.handle)
    optimizer = torch.optim.AdamW(policy.trained().values(), lr=1e-2)
    batches, seen = batches_of(policy), []
    for _ in range(6):
        gradients(policy, batches)
        apply(policy, optimizer)
        seen.append(ranks(policy))
    assert seen[0] == 21 * 6
    assert sorted(seen, reverse=True) == seen
    assert seen[-2:] == [21 * 2] * 2
    again = random_policy(adapter={"name": "adalora", "rank": 6, "target_rank": 2, "total_steps": 4})
    assert again.handle is not None
    again.handle.load_state(policy.handle.state())
    assert again.handle.updates == 6
    assert again.handle.moving().values == policy.handle.moving().values
    policy.handle.save(Path("adapter"))

    def attach(given: dict[str, Any]) -> Any:
        return ADAPTERS["adalora"](**given).attach(random_model(), 0)

    loaded = from_folder(Path("adapter"), random_model(), attach)
    assert ranks(Policy(loaded.base, policy.tokenizer, loaded)) == 21 * 2


def test_the_regulariser_pulls_towards_orthogonal_matrices() -> None:
    policy = random_policy(adapter={"name": "adalora", "rank": 3, "orthogonality": 2.0})
    first = penalise(policy)
    half = random_policy(adapter={"name": "adalora", "rank": 3, "orthogonality": 1.0})
    assert first == pytest.approx(2 * penalise(half))
    a = next(p for name, p in policy.trained().items() if "lora_A" in name)
    assert a.grad is not None
    optimizer = torch.optim.SGD(policy.trained().values(), lr=0.05)
    for _ in range(20):
        optimizer.step()
        optimizer.zero_grad()
        last = penalise(policy)
    assert last < first
    assert penalise(random_policy(adapter={"name": "adalora", "orthogonality": 0.0})) == 0


@pytest.mark.parametrize("on", [False, True], ids=["kept", "recomputed"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_plan_does_not_fall_short(dtype: str, on: bool) -> None:
    not_short({"name": "adalora"}, dtype, on=on)
    as_near_as_lora({"name": "adalora", "rank": 8}, dtype, on=on)
