"""What holds for every term of the table: the contract that lets a step be cut anywhere."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests.objectives.test_importance import random_batch, taken_gradient

from shoestring.config.run import settle
from shoestring.errors import ConfigError
from shoestring.objectives import TERMS
from shoestring.objectives.base import Tokens
from shoestring.objectives.loss import Objective
from shoestring.training.batch import single_rows
from shoestring.training.update import backward
from tiny import random_policy

POLICIES = [name for name, term in TERMS.items() if term.role == "policy"]
KLS = [name for name, term in TERMS.items() if term.role == "kl"]


def objective(**values: Any) -> Objective:
    return Objective(**{"beta": 0.0, "updates": 1, "l2": 0.0, **values})


@pytest.mark.parametrize(
    "values", [{"policy": name} for name in POLICIES] + [{"kl": name, "beta": 0.3} for name in KLS]
)
def test_any_cut_has_the_same_gradient(values: dict[str, Any]) -> None:
    """Rows one by one, behind an update that moved the policy by a lot."""
    policy, whole = random_policy(), random_batch()
    old = policy.logprobs(whole).detach() + 0.3 * torch.randn(12, generator=torch.Generator().manual_seed(5))
    grads, clipped = [], []
    for batches in ([whole], list(single_rows([whole]))):
        olds: list[torch.Tensor | None] = list(old.split([len(batch.row) for batch in batches]))
        every = range(len(batches))
        found = [backward(policy, batches, i, olds, objective(**values), 1.0, False) for i in every]
        clipped.append(sum(own["clip_fraction"].total.item() for own in found))
        grads.append(taken_gradient(policy))
    assert clipped[0] == clipped[1]
    assert grads[0].abs().max() > 1e-3
    assert (grads[0] - grads[1]).norm() < 1e-5 * grads[0].norm()


@pytest.mark.parametrize("name", TERMS)
@pytest.mark.parametrize("logprob", [0.0, -50.0, -1e4, -1e30])
@pytest.mark.parametrize("other", [0.0, -50.0, -1e4, -1e30])
@pytest.mark.parametrize("advantage", [2.0, -2.0])
def test_extreme_log_ratios_stay_finite(name: str, logprob: float, other: float, advantage: float) -> None:
    batch = random_batch()
    columns = batch.columns.take(torch.tensor([0]))
    columns.advantage.fill_(advantage)
    value, fixed = torch.tensor([logprob], requires_grad=True), torch.tensor([other])
    loss, metrics = TERMS[name]().loss(Tokens(value, fixed, fixed, torch.tensor([0])), columns)
    loss.sum().backward()
    assert loss.shape == (1,)
    assert loss.isfinite().all()
    assert value.grad is not None
    assert value.grad.isfinite().all()
    assert all(figure.total.shape == () and not figure.total.requires_grad for figure in metrics.values())


# --- the config -----------------------------------------------------------------------------------------------------


def test_the_old_keys_are_those_of_the_policy_term() -> None:
    config = settle({"objective": {"clip_high": 0.28}})
    assert (config.objective.policy.clip_low, config.objective.policy.clip_high) == (0.2, 0.28)
    assert (config.objective.clip_low, config.objective.clip_high) == (0.2, 0.28)
    assert config.objective == settle({"objective": {"policy": {"name": "ppo", "clip_high": 0.28}}}).objective


@pytest.mark.parametrize("name", POLICIES)
def test_a_term_has_its_own_defaults(name: str) -> None:
    """The clips of an algorithm are those of "ppo", and no other term's."""
    config = settle({"objective": {"policy": name}})
    assert config.objective.policy == TERMS[name]()
    assert settle(config.model_dump(exclude_none=True)) == config


@pytest.mark.parametrize(
    ("values", "part"),
    [
        ({"policy": "pp"}, 'objective.policy.name is "pp"'),
        ({"policy": "k3"}, 'objective.policy.name is "k3"'),
        ({"policy": {"name": "ppo", "clip_hi": 1}}, '"objective.policy.clip_hi" is set'),
        ({"mini_batches": 0}, "objective.mini_batches is 0"),
    ],
)
def test_mistakes_are_named(values: dict[str, Any], part: str) -> None:
    with pytest.raises(ConfigError) as raised:
        settle({"objective": values})
    assert part in str(raised.value)
