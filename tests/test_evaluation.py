"""Evaluation: known values of each figure, and the whole on the embedded model."""

from __future__ import annotations

import itertools
import math

import pytest

from shoestring.errors import ConfigError
from shoestring.evaluation import EvalSettings, bootstrap, evaluate, majority, paired, pass_at_k, wilson
from shoestring.models import ModelSettings
from shoestring.policy import load_policy
from shoestring.samplers import SAMPLERS
from shoestring.tasks.multiplication import Multiplication


def test_pass_at_k_is_the_share_of_subsets_with_a_right_one() -> None:
    for n in range(1, 7):
        for c in range(n + 1):
            for k in range(1, n + 1):
                subsets = list(itertools.combinations(range(n), k))
                share = sum(any(i < c for i in subset) for subset in subsets) / len(subsets)
                assert pass_at_k(n, c, k) == pytest.approx(share)


@pytest.mark.parametrize(
    ("successes", "trials", "low", "high"),
    [(0, 10, 0.0, 0.277533), (10, 10, 0.722467, 1.0), (50, 100, 0.403832, 0.596168), (8, 10, 0.490162, 0.943318)],
)
def test_wilson_against_known_values(successes: int, trials: int, low: float, high: float) -> None:
    assert wilson(successes, trials) == pytest.approx((low, high), abs=1e-5)


def test_bootstrap_is_near_the_normal_interval_and_repeats() -> None:
    values = [1.0] * 120 + [0.0] * 180
    low, high = bootstrap(values)
    half = 1.96 * math.sqrt(0.4 * 0.6 / 300)
    assert (low, high) == pytest.approx((0.4 - half, 0.4 + half), abs=0.01)
    assert bootstrap(values) == (low, high)
    assert bootstrap([1.0, 1.0]) == (1.0, 1.0)


def test_paired_gains_use_shared_problems_only() -> None:
    gain, (low, high) = paired({"a": 0, "b": 1, "c": 0}, {"a": 1, "b": 1, "d": 1})
    assert gain == 0.5
    assert 0 <= low <= 0.5 <= high <= 1


def test_majority() -> None:
    assert majority(["7", "8", "8"], [True, False, False], 1) == 1.0
    assert majority(["7", "8", "8"], [True, False, False], 3) == 0.0
    assert majority(["7", "8"], [True, False], 2) == 1.0  # of equals the earliest
    assert majority([None, None, "8"], [False, False, True], 3) == 1.0
    assert majority([None], [False], 1) == 0.0


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"ks": (0,)}, "at least one completion"),
        ({"num": -5}, "num is -5"),
        ({"max_new_tokens": 0}, "it counts something"),
        ({"temperature": -1.0}, "it divides the logits"),
        ({"ks": (4,), "samples": 2}, "at least 4 samples"),
        ({"ks": (4,), "temperature": 0.0}, "greedy completions are all the same"),
    ],
)
def test_nonsense_is_refused(settings: dict, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        EvalSettings(**settings).check()


def test_the_embedded_model_greedy_and_sampled() -> None:
    """A model that mostly guesses: low accuracy, and pass@k that grows with k."""
    policy, task = load_policy(ModelSettings(), device="cpu"), Multiplication()
    engine = SAMPLERS["hf"]().open(policy)
    greedy = evaluate(policy, engine, task, EvalSettings(max_new_tokens=64, batch_rows=100))
    assert greedy.problems == 300
    assert greedy.accuracy <= 0.35
    assert greedy.low < greedy.accuracy < greedy.high
    assert greedy.accuracy == sum(greedy.outcomes.values()) / 300
    whole = evaluate(policy, engine, task, EvalSettings(max_new_tokens=64, batch_rows=300))
    assert whole.outcomes == greedy.outcomes  # the size of a batch chooses nothing
    sampled = evaluate(policy, engine, task, EvalSettings(num=40, ks=(1, 4), max_new_tokens=64))
    assert sampled.pass_at_k[1][0] == pytest.approx(sampled.accuracy)
    other = evaluate(policy, engine, task, EvalSettings(num=40, ks=(1, 4), max_new_tokens=64, batch_rows=12))
    assert other.outcomes == sampled.outcomes
    assert sampled.pass_at_k[4][0] > sampled.pass_at_k[1][0]
    values = sampled.as_json()
    assert {"task", "split", "problems", "accuracy", "low", "high", "pass_at_k", "maj_at_k"} <= values.keys()
    assert values["pass_at_k"].keys() == {"1", "4"}
