"""What a run asks of a handle: first values from prompts, other parameters on the way, and a reference."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.adapters.test_contracts import RUN, batches_of
from tests.model.test_trees import gradients

from shoestring import ConfigError, train
from shoestring.run.loading import load_policy
from shoestring.training.update import apply
from tiny import random_policy

MINE = """
from shoestring.adapters.lora_xs import LoRAXS
from shoestring.adapters.factored import FactoredHandle

class Mine(LoRAXS):
    name: str = "mine:Mine"
    rank: int = 4

    def attach(self, model, seed):
        handle = super().attach(model, seed)
        return Handle(self, handle.base, handle.model, handle._own)

class Handle(FactoredHandle):
    off_is_reference = False
    wants_prompts = True
    seen = []

    def prepare(self, policy, prompts):
        self.seen.append(len(prompts))
"""


@pytest.fixture
def mine(monkeypatch: pytest.MonkeyPatch) -> Any:
    Path("mine.py").write_text(MINE)
    monkeypatch.syspath_prepend(".")
    return import_module("mine")


def test_a_new_run_prepares_the_adapter_once(mine: Any) -> None:
    train({**RUN, "adapter": "mine:Mine", "out": "run", "steps": 1}, quiet=True)
    train({"steps": 2}, resume="run", quiet=True)
    assert mine.Handle.seen == [RUN["sampling"]["num_prompts"]]


def test_an_adapter_that_is_no_reference_when_off_refuses_a_kl_term(mine: Any) -> None:
    with pytest.raises(ConfigError, match="is not the model before training, so there is no reference"):
        load_policy("tiny", adapter=mine.Mine(), keep_reference=True, device="cpu")
    policy = load_policy("tiny", adapter=mine.Mine(), device="cpu")
    with pytest.raises(ConfigError, match="turned off is not the first model"), policy.reference():
        pass


def test_other_parameters_are_trained_where_an_update_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    """One matrix is let go after the first update, and the others keep their optimizer state."""
    policy = random_policy(adapter={"name": "lora-xs", "rank": 4})
    handle: Any = policy.handle
    optimizer = torch.optim.AdamW(policy.trained().values(), lr=1e-2)
    name, dropped = next(iter(policy.trained().items()))

    def drop(step: int) -> bool:
        dropped.requires_grad_(False)
        return step == 0

    monkeypatch.setattr(handle, "after_step", drop)
    batches = batches_of(policy)
    gradients(policy, batches)
    apply(policy, optimizer)
    assert name not in policy.trained()
    assert dropped not in optimizer.state
    assert set(optimizer.param_groups[0]["params"]) == set(policy.trained().values()) == set(optimizer.state)
    before = dropped.detach().clone()
    assert name not in gradients(policy, batches)
    apply(policy, optimizer)
    assert torch.equal(dropped, before)
