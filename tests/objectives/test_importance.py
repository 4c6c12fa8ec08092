"""Importance correction: the weights, the gradient they give back, and a run with an engine of its own weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

from fake_engine import OwnWeights, OwnWeightsEngine
from shoestring import ConfigError, train
from shoestring.config import run as config
from shoestring.model.policy import Policy
from shoestring.objectives.base import Tokens
from shoestring.objectives.importance import importance_weights
from shoestring.objectives.loss import Objective, objective_loss
from shoestring.samplers import SAMPLERS
from shoestring.training.batch import single_rows
from shoestring.training.update import backward, update
from shoestring.types import Batch, TokenColumns
from tiny import VOCAB, prompt, random_policy

MODES = ("token-truncate", "token-mask", "sequence-truncate", "sequence-mask")


def objective(correction: Any, cap: float = 3.0, **changes: Any) -> Objective:
    settings = {"beta": 0.0, "clip_low": 0.2, "clip_high": 0.2, "updates": 1, "l2": 0.0, **changes}
    return Objective(**settings, importance_correction=correction, importance_cap=cap)


# --- the weights ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("correction", "cap", "weights", "above"),
    [
        ("token-truncate", 3.0, [0.5, 1.0, 3.0, 3.0, 2.0], [0, 0, 0, 1, 0]),
        ("token-mask", 3.0, [0.5, 1.0, 3.0, 0.0, 2.0], [0, 0, 0, 1, 0]),
        ("sequence-truncate", 3.0, [1.5, 1.5, 1.5, 3.0, 3.0], [0, 0, 0, 1, 1]),
        ("sequence-mask", 3.0, [1.5, 1.5, 1.5, 0.0, 0.0], [0, 0, 0, 1, 1]),
        ("sequence-truncate", 100.0, [1.5, 1.5, 1.5, 12.0, 12.0], [0, 0, 0, 0, 0]),
    ],
)
def test_weights_of_two_rows(correction: Any, cap: float, weights: list[float], above: list[int]) -> None:
    """Ratios 0.5, 1, 3 (not above the cap of 3) and 6, 2."""
    old = torch.tensor([0.2, 0.3, 0.6, 0.6, 0.4]).log()
    sampler = torch.tensor([0.4, 0.3, 0.2000001, 0.1, 0.2]).log()
    found, capped = importance_weights(old, sampler, torch.tensor([0, 0, 0, 1, 1]), correction, cap)
    assert found.tolist() == pytest.approx(weights, abs=1e-5)
    assert capped.tolist() == list(map(bool, above))


@pytest.mark.parametrize("correction", MODES)
def test_what_the_sampler_thought_impossible_stays_finite(correction: Any) -> None:
    found, capped = importance_weights(torch.zeros(1), torch.tensor([-1e4]), torch.zeros(1).long(), correction, 3.0)
    assert found.tolist() == [0.0 if "mask" in correction else 3.0]
    assert capped.item()


def places(advantage: list[float], sampler: list[float], row: list[int]) -> Batch:
    num = len(row)
    ones, zeros = torch.ones(num), torch.zeros(num, dtype=torch.int64)
    ids = torch.zeros(max(row) + 1, num, dtype=torch.int64)
    logprob = torch.tensor(sampler).log()
    names = tuple(f"p{r}" for r in range(max(row) + 1))
    return Batch(
        ids, torch.tensor(row), zeros, TokenColumns(zeros, torch.tensor(advantage), ones, ones, logprob), names
    )


def test_the_weight_multiplies_the_policy_part_and_not_the_kl() -> None:
    """Old probabilities 0.4 and 0.6, the sampler's 0.2 and 0.1, so weights 2 and 3 of 6; advantages 1 and -0.5."""
    batch = places([1.0, -0.5], [0.2, 0.1], [0, 0])
    logprob = torch.tensor([0.4, 0.6]).log().requires_grad_()
    reference = torch.tensor([0.4, 0.6]).log() + 0.1
    tokens = Tokens(logprob, logprob.detach(), reference, batch.row)
    loss, metrics = objective_loss(tokens, batch.columns, objective("token-truncate", beta=0.5))
    assert loss.item() == pytest.approx(-2 * 1.0 + 3 * 0.5 + 0.5 * 2 * 0.005171, abs=1e-5)
    assert metrics["importance_mean"].total.item() == pytest.approx(5.0)
    assert metrics["importance_capped"].total.item() == 1
    loss.backward()
    assert logprob.grad is not None
    assert logprob.grad.tolist() == pytest.approx([-2 - 0.5 * 0.105171, 1.5 - 0.5 * 0.105171], abs=1e-5)


def test_the_weight_is_taken_to_the_old_policy_and_the_ratio_from_it() -> None:
    """Second update: old 0.4, now 0.44, sampler 0.2. Weight 2, ratio 1.1."""
    batch = places([1.0], [0.2], [0])
    tokens = Tokens(torch.tensor([0.44]).log(), torch.tensor([0.4]).log(), None, batch.row)
    loss, _ = objective_loss(tokens, batch.columns, objective(MODES[0]))
    assert loss.item() == pytest.approx(-2 * 1.1, abs=1e-5)


def test_without_correction_the_samplers_log_probs_do_not_count() -> None:
    logprob = torch.tensor([0.4, 0.6]).log()
    batches = [places([1.0, -0.5], sampler, [0, 0]) for sampler in ([0.2, 0.1], [0.4, 0.6])]
    reports = [
        objective_loss(Tokens(logprob, logprob, None, batch.row), batch.columns, objective("none")) for batch in batches
    ]
    assert reports[0] == reports[1]
    assert reports[0][1].keys() == {"clip_fraction", "loss"}


@pytest.mark.parametrize("correction", MODES)
def test_any_cut_has_the_same_gradient(correction: str) -> None:
    policy, whole = random_policy(), random_batch()
    grads = []
    for batches in ([whole], list(single_rows([whole]))):
        for index in range(len(batches)):
            backward(policy, batches, index, [None] * len(batches), objective(correction, 1.5), 1.0, False)
        grads.append(taken_gradient(policy))
    assert len(grads[0]) > 100
    torch.testing.assert_close(grads[0], grads[1], atol=1e-5, rtol=0)


def random_batch() -> Batch:
    """Three rows of four tokens each, with a sampler whose log-probs are a little off."""
    generator = torch.Generator().manual_seed(0)
    policy = random_policy()
    col = torch.arange(5, 9).repeat(3)
    row = torch.arange(3).repeat_interleave(4)
    target = torch.randint(0, VOCAB, (12,), generator=generator)
    ids = torch.randint(0, VOCAB, (3, 9), generator=generator)
    advantage = torch.randn(12, generator=generator)
    each = torch.full((12,), 1 / 12)
    batch = Batch(ids, row, col, TokenColumns(target, advantage, each, each, torch.zeros(12)), ("a", "b", "c"))
    with torch.no_grad():
        off = policy.logprobs(batch) + 0.5 * torch.randn(12, generator=generator)
    return Batch(ids, row, col, TokenColumns(target, advantage, each, each, off), ("a", "b", "c"))


def taken_gradient(policy: Policy) -> Tensor:
    """All trained gradients in one row; takes them away."""
    found = torch.cat([p.grad.flatten() for p in policy.trained().values() if p.grad is not None])
    for parameter in policy.trained().values():
        parameter.grad = None
    return found


def test_an_update_reports_the_mean_weight_and_the_capped_share() -> None:
    policy, batch = random_policy(), random_batch()
    old = policy.logprobs(batch).detach()
    weight, capped = importance_weights(old, batch.sampler_logprob, batch.row, "token-truncate", 1.5)
    optimizer = torch.optim.AdamW(policy.trained().values(), lr=1e-3)
    options: dict[str, Any] = {"temperature": 1.0, "max_grad_norm": 1.0, "checkpointing": False}
    found = update(policy, optimizer, [batch], objective("token-truncate", 1.5, updates=3), **options)
    assert found.importance_mean == pytest.approx(weight.mean().item(), abs=1e-6)
    assert found.importance_capped == capped.sum().item() / 12 > 0
    plain = update(policy, optimizer, [batch], objective("none"), **options)
    assert (plain.importance_mean, plain.importance_capped) == (1.0, 0.0)


# --- the gradient, in expectation -----------------------------------------------------------------------------------


class Enumerated(NamedTuple):
    """Every one-token completion of a prompt as a row of its own, with its chance under the sampler as its weight."""

    policy: Policy
    batch: Batch
    reward: Tensor

    def expected_gradient(self, correction: str) -> Tensor:
        backward(self.policy, [self.batch], 0, [None], objective(correction, 1e6), 1.0, False)
        return -taken_gradient(self.policy)

    def exact_gradient(self) -> Tensor:
        """Of the expected reward under the policy itself."""
        (self.policy.logprobs(self.batch).exp() * self.reward).sum().backward()
        return taken_gradient(self.policy)


def enumerated() -> Enumerated:
    policy, asked = random_policy(), prompt(6)
    engine: OwnWeightsEngine = OwnWeights(noise=0.1).open(policy)
    ids, every = torch.tensor([asked.token_ids]), torch.arange(VOCAB)
    with torch.no_grad():
        logprob = engine._adapted(input_ids=ids).logits[0, -1].log_softmax(-1)
    reward = torch.randn(VOCAB, generator=torch.Generator().manual_seed(3))
    last = torch.full((VOCAB,), ids.shape[1] - 1)
    names = tuple(map(str, every.tolist()))
    chance = logprob.exp()
    batch = Batch(ids.expand(VOCAB, -1), every, last, TokenColumns(every, reward, chance, chance, logprob), names)
    return Enumerated(policy, batch, reward)


@pytest.mark.parametrize("correction", ["token-truncate", "token-mask", "sequence-truncate", "sequence-mask"])
def test_the_expected_gradient_over_all_tokens_is_the_on_policy_one(correction: str) -> None:
    """Importance sampling is exact where completions are one token long and the cap is never reached."""
    case = enumerated()
    exact = case.exact_gradient()
    bias = (case.expected_gradient("none") - exact).norm() / exact.norm()
    assert bias > 0.05
    torch.testing.assert_close(case.expected_gradient(correction), exact, atol=1e-5, rtol=0)


def table_logprobs(first: Tensor, second: Tensor) -> Tensor:
    """Log-probs of both tokens of all nine two-token completions over three tokens. [9 * 2]"""
    a, b = first.log_softmax(-1), second.log_softmax(-1)
    return torch.stack([a.repeat_interleave(3), b.flatten()], dim=1).flatten()


def test_only_the_rows_own_weight_is_exact_for_longer_completions() -> None:
    """Two tokens, each table of logits apart from the policy's: the tokens' weights help, the rows' are exact."""
    generator = torch.Generator().manual_seed(0)
    first, second, off, off2 = (torch.randn(shape, generator=generator) for shape in (3, (3, 3), 3, (3, 3)))
    tables = nn.ParameterList([nn.Parameter(first), nn.Parameter(second)])
    sampler = table_logprobs(first + 0.5 * off, second + 0.5 * off2)
    reward = torch.randn(9, generator=generator).repeat_interleave(2)
    row = torch.arange(9).repeat_interleave(2)
    chance = sampler.view(9, 2).sum(1).exp().repeat_interleave(2)
    zeros = torch.zeros(18, dtype=torch.int64)
    batch = Batch(
        torch.zeros(9, 2).long(), row, zeros, TokenColumns(zeros, reward, chance, chance, sampler), ("p",) * 9
    )

    def gradient(loss: Tensor) -> Tensor:
        return torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(tables))])

    def expected(correction: str) -> Tensor:
        logprob = table_logprobs(*tables)
        tokens = Tokens(logprob, logprob.detach(), None, row)
        return gradient(-objective_loss(tokens, batch.columns, objective(correction, 1e6))[0])

    exact = gradient((table_logprobs(*tables).view(9, 2).sum(1).exp() * reward[::2]).sum())
    bias = {name: (expected(name) - exact).norm().item() for name in ("none", "token-truncate", "sequence-truncate")}
    assert bias["sequence-truncate"] < 1e-6
    assert 1e-3 < bias["token-truncate"] < bias["none"]


# --- the config and the loop ----------------------------------------------------------------------------------------


@pytest.fixture
def _in_the_table(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SAMPLERS, "own-weights", OwnWeights)


def settled(**values: Any) -> Objective:
    return config.settle(values).objective


@pytest.mark.usefixtures("_in_the_table")
def test_a_sampler_that_is_not_exact_is_corrected_unless_told_otherwise() -> None:
    own = {"sampler": {"name": "own-weights"}}
    assert settled().importance_correction == "none"
    assert settled(objective={"importance_correction": "auto"}).importance_correction == "none"
    assert settled(**own).importance_correction == "token-truncate"
    assert settled(**own, objective={"importance_correction": "auto"}).importance_correction == "token-truncate"
    assert settled(**own, objective={"importance_correction": "none"}).importance_correction == "none"
    mask = {"importance_correction": "sequence-mask", "importance_cap": 2}
    assert settled(objective=mask).importance_correction == "sequence-mask"
    assert settled(**own, objective=Objective(beta=0, clip_low=0.1, clip_high=0.1, updates=1, l2=0)) == objective(
        "token-truncate", clip_low=0.1, clip_high=0.1
    )


@pytest.mark.parametrize(
    ("values", "part"),
    [
        ({"importance_correction": "tokens"}, "token-truncate"),
        ({"importance_cap": 0.5}, "greater than or equal to 1"),
        ({"importance_correction": ["none"]}, "token-truncate"),
    ],
)
def test_mistakes_are_told(values: dict[str, Any], part: str) -> None:
    with pytest.raises(ConfigError, match=part):
        settled(objective=values)


@pytest.mark.usefixtures("_in_the_table")
def test_such_an_engine_wants_an_adapter() -> None:
    with pytest.raises(ConfigError, match="the adapter is what this engine is sent"):
        train({"sampler": {"name": "own-weights"}, "adapter": {"name": "none"}, **SMALL}, quiet=True)


SMALL: dict[str, Any] = {
    "steps": 4,
    "save_every": 2,
    "sampling": {"num_prompts": 3, "num_completions": 4, "max_new_tokens": 24},
    "optim": {"lr": 1e-3},
    "execution": {"device": "cpu"},
}


def metrics(folder: str) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in ("seconds", "tokens_per_s", "peak_bytes")} for line in lines]


@pytest.mark.usefixtures("_in_the_table")
@pytest.mark.parametrize("algorithm", ["grpo", "s-grpo", "t-spmo"])
@pytest.mark.parametrize("correction", ["auto", "sequence-mask"])
def test_a_run_with_an_engine_of_its_own_weights(algorithm: str, correction: str) -> None:
    """It is corrected, reported, and goes on as if it had never stopped: the engine gets the restored adapter."""
    values: dict[str, Any] = {
        **SMALL,
        "algorithm": {"name": algorithm},
        "sampler": {"name": "own-weights", "noise": 0.05},
        "objective": {"importance_correction": correction, "importance_cap": 1.05, "updates": 2},
    }
    train({**values, "out": "whole"}, quiet=True)
    train({**values, "out": "parts", "steps": 2}, quiet=True)
    train({"steps": 4}, resume="parts", quiet=True)
    assert metrics("whole") == metrics("parts")
    trained = [line for line in metrics("whole") if line["tokens_trained"]]
    assert trained
    assert all(line["applied"] for line in trained)
    assert all(1e-4 < line["sampler_gap"] < 1 for line in trained)
    assert all(0 < line["importance_mean"] < 1.05 for line in trained)
    assert any(0 < line["importance_capped"] < 1 for line in trained)
    untrained = [line for line in metrics("whole") if not line["tokens_trained"]]
    assert all((line["importance_mean"], line["importance_capped"]) == (1.0, 0.0) for line in untrained)


@pytest.mark.usefixtures("_in_the_table")
def test_an_exact_copy_runs_as_the_policy_does() -> None:
    """With no noise the second copy draws the same tokens, step after step, so `sync` misses nothing."""
    train({**SMALL, "out": "hf"}, quiet=True)
    train({**SMALL, "out": "own", "sampler": {"name": "own-weights", "noise": 0}}, quiet=True)
    assert Path("hf/samples.jsonl").read_text() == Path("own/samples.jsonl").read_text()
    for ours, theirs in zip(metrics("own"), metrics("hf"), strict=True):
        assert ours["importance_mean"] == pytest.approx(1.0, abs=1e-5)
        assert ours["loss"] == pytest.approx(theirs["loss"], abs=1e-5)
