"""Mini-batches: the cut of a step's rows, the weights of a share, and a run that takes several optimizer steps."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tests.model.test_trees import some_step

from shoestring import ConfigError, train
from shoestring.objectives.loss import Objective
from shoestring.training.batch import mini_batches, training_rows
from shoestring.training.micro_batching import cut_shares
from shoestring.training.update import UPDATES, backward, update
from shoestring.types import Row
from tiny import random_policy


def rows(**options: Any) -> list[Row]:
    return training_rows(*some_step(), **options)


def test_one_mini_batch_is_the_step_as_it_is() -> None:
    step = rows()
    [only] = mini_batches(step, 1, seed=3)
    assert all(own is row for own, row in zip(only, step, strict=True))
    assert mini_batches([], 4, seed=3) == []


def test_a_cut_holds_every_row_once_and_keeps_groups_together() -> None:
    step = rows()
    cuts = mini_batches(step, 3, seed=1)
    assert [len(cut) for cut in cuts] == [8, 8, 8]
    found = sorted((row.group, row.token_ids, row.col.tolist()) for cut in cuts for row in cut)
    assert found == sorted((row.group, row.token_ids, row.col.tolist()) for row in step)
    order = [row.group for cut in cuts for row in cut]
    assert len([1 for a, b in pairwise(order) if a != b]) == len(set(order)) - 1
    again, other = mini_batches(step, 3, seed=1), mini_batches(step, 3, seed=2)
    assert [row.group for cut in again for row in cut] == order
    assert [row.group for cut in other for row in cut] != order
    assert [len(cut) for cut in mini_batches(step[:2], 5, seed=1)] == [1, 1]


@pytest.mark.parametrize("normalise", ["groups", "tokens"])
def test_each_share_has_the_weight_of_the_whole(normalise: Any) -> None:
    """So that its optimizer step sees the mean over its own share."""
    step = rows(normalise=normalise)
    whole = sum(float(row.columns.weight.sum()) for row in step)
    for cut in mini_batches(step, 3, seed=1):
        for name in ("weight", "kl_weight"):
            assert sum(float(getattr(row.columns, name).sum()) for row in cut) == pytest.approx(whole, rel=1e-5)


def test_a_token_counts_as_one_of_its_own_share() -> None:
    """24 rows of one token each in five shares: of five rows, 1/5 each, and of four, 1/4 each, times W = 24."""
    ones = [row._replace(columns=replace(row.columns.take(torch.tensor([0])), weight=torch.ones(1))) for row in rows()]
    cuts = mini_batches(ones, 5, seed=1)
    assert sorted(len(cut) for cut in cuts) == [4, 5, 5, 5, 5]
    for cut in cuts:
        assert [float(row.columns.weight) for row in cut] == pytest.approx([24 / len(cut)] * len(cut))


def objective(**values: Any) -> Objective:
    return Objective(**{"beta": 0.0, "updates": 1, "l2": 0.0, **values})


def test_ratios_are_taken_to_the_policy_before_the_first_optimizer_step() -> None:
    """Two mini-batches by `update`, and by hand with the log-probs of the untouched policy."""
    policy, by_hand = random_policy(), random_policy()
    batches = cut_shares(mini_batches(rows(), 2, seed=0), 60, trees=policy.takes_trees)
    assert [batch.mini_batch for batch in batches] == sorted(batch.mini_batch for batch in batches)
    assert len(batches) > 2
    optimizer = torch.optim.SGD(policy.trained().values(), lr=0.5)
    report = update(policy, optimizer, batches, objective(), temperature=1.0, max_grad_norm=1e9, checkpointing=False)

    optimizer = torch.optim.SGD(by_hand.trained().values(), lr=0.5)
    old: list[Any] = [by_hand.logprobs(batch).detach() for batch in batches]
    figures = []
    for number in range(2):
        here = [i for i, batch in enumerate(batches) if batch.mini_batch == number]
        figures += [backward(by_hand, batches, i, old, objective(), 1.0, False) for i in here]
        optimizer.step()
        optimizer.zero_grad()
    clipped = sum(own["clip_fraction"].total.item() for own in figures)
    assert clipped > 0
    assert report.clip_fraction == clipped / sum(len(batch.row) for batch in batches)
    assert report.loss == pytest.approx(sum(own["loss"].total.item() for own in figures) / 2, abs=1e-6)
    for name, parameter in policy.trained().items():
        torch.testing.assert_close(parameter, by_hand.trained()[name], atol=1e-6, rtol=0)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_the_extra_pass_finds_the_log_probs_of_the_training_pass(family: str) -> None:
    """Through our own layers, and through a model's own logits: a ratio is 1 where nothing has moved."""
    policy = random_policy(family)
    batches = cut_shares(mini_batches(rows(), 2, seed=0), 10**6, trees=policy.takes_trees)
    report = update(
        policy,
        torch.optim.SGD(policy.trained().values(), lr=0.0),
        batches,
        objective(policy={"name": "cispo", "cap": 1 + 1e-6}),
        temperature=0.9,
        max_grad_norm=1.0,
        checkpointing=True,
    )
    assert report.applied
    assert report.clip_fraction == 0


def test_every_pass_takes_one_optimizer_step_a_mini_batch() -> None:
    policy = random_policy()
    optimizer = torch.optim.SGD(policy.trained().values(), lr=0.1)
    taken: list[bool] = []
    optimizer.register_step_pre_hook(lambda *_: taken.append(True))
    batches = cut_shares(mini_batches(rows(), 3, seed=0), 10**6, trees=True)
    report = update(
        policy, optimizer, batches, objective(updates=2), temperature=1.0, max_grad_norm=1.0, checkpointing=False
    )
    assert len(taken) == 6
    assert report.applied
    assert report.clip_fraction > 0


# --- a run ----------------------------------------------------------------------------------------------------------

RUN: dict[str, Any] = {
    "algorithm": "grpo",
    "objective": {"mini_batches": 2},
    "steps": 4,
    "sampling": {"num_prompts": 4, "num_completions": 4, "max_new_tokens": 32},
    "optim": {"lr": 3e-3, "warmup_steps": 0},
    "execution": {"device": "cpu"},
}


def metrics(folder: str) -> list[dict[str, Any]]:
    aside = {"seconds", "tokens_per_s", "peak_bytes", "peaks", "reserved_bytes"}
    lines = [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key not in aside} for line in lines]


def test_a_resumed_run_is_the_uninterrupted_one() -> None:
    train({**RUN, "out": "whole"}, quiet=True)
    train({**RUN, "out": "halves", "steps": 2}, quiet=True)
    train({"steps": 4}, resume="halves", quiet=True)
    assert metrics("halves") == metrics("whole")
    assert any(line["clip_fraction"] > 0 for line in metrics("whole"))
    assert metrics("whole")[0]["sampler_gap"] < 1e-4


def test_memory_that_runs_out_behind_an_optimizer_step_undoes_the_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """The whole step is done again in smaller micro-batches, and comes out the same."""
    once = {**RUN, "steps": 1, "save_every": 1}
    train({**once, "out": "whole"}, quiet=True)
    real, calls = torch.Tensor.backward, []

    def backward_once_without_memory(self: torch.Tensor, *args: Any, **options: Any) -> None:
        real(self, *args, **options)
        calls.append(self)
        if len(calls) == 2:
            raise torch.OutOfMemoryError("planted behind the first optimizer step")

    monkeypatch.setattr(torch.Tensor, "backward", backward_once_without_memory)
    train({**once, "out": "again"}, quiet=True)
    assert len(calls) > 4
    [whole], [again] = metrics("whole"), metrics("again")
    assert again["micro_batch_tokens"] < whole["micro_batch_tokens"]
    for name in ("loss", "grad_norm", "clip_fraction"):
        assert again[name] == pytest.approx(whole[name], abs=2e-4), name
    left, right = (load_file(f"{folder}/adapter/adapter_model.safetensors") for folder in ("whole", "again"))
    for name, tensor in left.items():
        torch.testing.assert_close(tensor, right[name], atol=1e-4, rtol=0, msg=name)


COUNTED = """
import torch
from shoestring.objectives.base import Figure
from shoestring.objectives.ppo import PPO


class Counted(PPO):
    name: str

    def loss(self, tokens, columns):
        loss_N, found = super().loss(tokens, columns)
        return loss_N, found | {"ones": Figure(torch.ones(len(loss_N)).sum())}
"""


def test_a_term_from_outside_reports_its_own_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    Path("counted_term.py").write_text(COUNTED)
    monkeypatch.syspath_prepend(".")
    run = train({**RUN, "steps": 2, "objective": {"policy": "counted_term:Counted"}, "out": "run"}, quiet=True)
    assert [line["terms"] for line in metrics("run")] == [{"ones": 1.0}] * 2
    assert [report.terms for report in run.reports] == [{"ones": 1.0}] * 2
    assert 'name = "counted_term:Counted"' in Path("run", "config.toml").read_text()


def test_an_update_that_is_not_there_is_named_before_the_model_loads() -> None:
    with pytest.raises(ConfigError, match="there is no such update"):
        train({**RUN, "objective": {"update": "backwards"}, "out": "run"}, quiet=True)
    assert set(UPDATES) == {"backward"}
