"""Evaluation: known values of each figure, and the whole on the embedded model."""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path
from typing import Any

import pytest

from shoestring.errors import ConfigError
from shoestring.evaluation.contamination import overlap
from shoestring.evaluation.evaluate import EvalSettings, evaluate
from shoestring.evaluation.intervals import (
    _majorities,
    bootstrap,
    interval,
    majority,
    paired,
    pass_at_k,
    t_interval,
    t_quantile,
    wilson,
)
from shoestring.model.load import ModelSettings
from shoestring.run.loading import load_policy
from shoestring.samplers import SAMPLERS
from shoestring.tasks.file import File
from shoestring.tasks.multiplication import Multiplication
from shoestring.types import Problem


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


@pytest.mark.parametrize(
    ("successes", "trials", "low", "high"),
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_wilson_against_the_examples_of_newcombe_1998(successes: int, trials: int, low: float, high: float) -> None:
    """Statistics in Medicine 17, 857-872, Table I, method 3."""
    assert wilson(successes, trials) == pytest.approx((low, high), abs=5e-5)


@pytest.mark.parametrize("k", [1, 4, 16, 64, 100])
def test_pass_at_k_is_the_product_of_its_paper(k: int) -> None:
    """arXiv 2107.03374, figure 3: 1 - prod(1 - k / i) over i from n - c + 1 to n."""
    for n, c in [(100, 0), (100, 1), (100, 7), (128, 64), (200, 199), (200, 200)]:
        product = 0.0 if n - c < k else math.prod(1 - k / i for i in range(n - c + 1, n + 1))
        assert pass_at_k(n, c, k) == pytest.approx(1 - product, abs=1e-12)


def test_bootstrap_resamples_problems() -> None:
    """Of two problems a resample takes the lower one twice with 1/4, so both ends are reached. Of 64 with pass@k 1/4
    and 64 with 3/4 the mean's deviation is 1/4 / sqrt(128)."""
    assert bootstrap([0.25, 0.75]) == pytest.approx((0.25, 0.75))
    half = 1.96 * 0.25 / math.sqrt(128)
    assert interval([0.25, 0.75] * 64) == pytest.approx((0.5 - half, 0.5 + half), abs=0.004)
    assert interval([0.0, 1.0] * 50) == wilson(50, 100)


@pytest.mark.parametrize(
    ("degrees", "value"),
    [(1, 12.706), (2, 4.303), (3, 3.182), (4, 2.776), (5, 2.571), (9, 2.262), (10, 2.228), (30, 2.042), (120, 1.980)],
)
def test_t_quantiles_are_those_of_the_printed_tables(degrees: int, value: float) -> None:
    assert t_quantile(degrees) == pytest.approx(value, abs=5e-4)


def test_t_interval_of_runs() -> None:
    """Mean 0.2, sample deviation 0.1: 4.303 * 0.1 / sqrt(3) on either side. One run has no interval."""
    assert t_interval([0.1, 0.2, 0.3]) == pytest.approx((0.2 - 0.24841, 0.2 + 0.24841), abs=1e-4)
    assert t_interval([0.5, 0.5]) == (0.5, 0.5)
    assert t_interval([0.5]) is None


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


def test_majority_of_one_is_the_accuracy_and_all_completions_count() -> None:
    votes, solved = ["7", "8", "8", "8", "7", "8"], [False, True, True, True, False, True]
    assert _majorities(votes, solved, 1) == pytest.approx(4 / 6)
    assert _majorities(votes, solved, 3) == 1.0
    assert _majorities(votes, solved, 4) == 1.0
    assert _majorities(votes, [not s for s in solved], 2) == pytest.approx(2 / 3)  # of equals the earliest


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
    assert "greedy" not in values
    both = evaluate(policy, engine, task, EvalSettings(num=40, ks=(1, 4), max_new_tokens=64, greedy=True))
    assert both.outcomes == sampled.outcomes
    assert both.greedy is not None
    assert both.greedy.outcomes == dict(list(greedy.outcomes.items())[:40])
    assert both.as_json()["greedy"]["accuracy"] == both.greedy.accuracy


def test_overlap_is_of_texts_but_for_case_and_space(tmp_path: Path) -> None:
    def written(split: str, prompts: list[Any]) -> None:
        rows = [json.dumps({"prompt": prompt, "answer": "1", "id": f"{split}-{i}"}) for i, prompt in enumerate(prompts)]
        (tmp_path / f"{split}.jsonl").write_text("\n".join(rows))

    def chat(*texts: str) -> list[dict[str, str]]:
        return [{"role": "user", "content": text} for text in texts]

    written("train", ["What is 2 - 1?", "What is 3 - 2?", chat("Look.", "How many?")])
    written("test", ["What is 5 - 4?", "what  is 2 - 1?\n", chat("Look.", "How many?"), chat("Count.", "How many?")])
    task = File(name=f"file:{tmp_path}")
    found = overlap(task.problems("test"), task)
    assert found is not None
    assert (found.problems, found.shared, found.sample) == (4, 2, "test-1: what is 2 - 1?")
    assert overlap([Problem("a", "What is 9 - 8?", "1")], task).describe().startswith("0 of 1 ")  # type: ignore[union-attr]
    assert overlap(task.problems("test"), File(name="file:nowhere")) is None
    assert overlap(task.problems("test"), Multiplication()) is None
    (tmp_path / "train.jsonl").unlink()
    assert overlap(task.problems("test"), task) is None
