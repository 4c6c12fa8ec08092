"""No wasted work: groups without signal are not trained, dynamic sampling refills them, prompts are encoded ahead."""

from __future__ import annotations

import json
import threading
from pathlib import Path
from typing import Any

import pytest
from tests.run.test_loop import ALGORITHMS, config, metrics, same_weights

from shoestring import ConfigError, DataError, train
from shoestring.model.policy import Policy
from shoestring.records import reporter as report
from shoestring.rewards.base import Scored, joined_scored
from shoestring.rollout import rollout
from shoestring.rollout.prompts import FreshPrompts
from shoestring.rollout.rollout import Encoded
from shoestring.run import opening
from shoestring.types import Batch, Problem, Prompt, Score


def rare(completions: list[Any], answer: list[str], **others: Any) -> list[float]:
    """Rewards that differ within the groups of a third of the problems, and are 0.5 everywhere else."""
    lengths = [len(completion[0]["content"]) for completion in completions]
    return [length % 7 if int(a) % 3 == 0 else 0.5 for length, a in zip(lengths, answer, strict=True)]


def samples(folder: str = "run") -> list[dict[str, Any]]:
    return [json.loads(line) for line in Path(folder, "samples.jsonl").read_text().splitlines()]


def dynamic(factor: float, **changes: Any) -> dict[str, Any]:
    return config(**{"steps": 3, **changes}, sampling={"num_prompts": 4, "dynamic_sampling": factor})


# --- groups without signal ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ALGORITHMS)
def test_groups_without_signal_are_not_trained(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With beta = 0 none of their rows is run; with a KL term, which acts on every group, all are."""
    run_rows: list[str] = []
    real = Policy.logprobs

    def watched(self: Policy, batch: Batch, temperature: float = 1.0) -> Any:
        run_rows.extend(batch.problem_ids)
        return real(self, batch, temperature)

    monkeypatch.setattr(Policy, "logprobs", watched)
    changes = {**ALGORITHMS[name], "objective": {"beta": 0.0}}
    train(config(steps=1, sampling={"num_prompts": 8}, **changes), rewards=[rare], quiet=True)
    own = {s["problem"] for s in samples() if int(s["answer"]) % 3 == 0}
    assert 0 < len(own) < 8
    assert 0 < len(set(run_rows)) == metrics()[0]["groups_with_signal"] < 8
    assert set(run_rows) <= own


# --- dynamic sampling -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ALGORITHMS)
def test_groups_without_signal_are_refilled_within_the_budget(name: str) -> None:
    train(dynamic(4, **ALGORITHMS[name]), rewards=[rare], quiet=True)
    plain = dynamic(1, **ALGORITHMS[name])
    train({**plain, "out": "plain"}, rewards=[rare], quiet=True)
    for line, drawn in zip(metrics(), (samples_of(step) for step in range(3)), strict=True):
        groups = line["groups"] + line["groups_dropped"]
        assert line["groups"] == 4
        assert groups <= 16
        assert line["groups_with_signal"] == 4 or groups == 16  # it stops for no other reason
        kept = [s for s in drawn if not s.get("dropped")]
        assert line["tokens_sampled"] == sum(s["tokens"] for s in drawn)
        assert line["tokens_dropped"] == sum(s["tokens"] for s in drawn) - sum(s["tokens"] for s in kept)
        assert not any(advantage for s in drawn if s.get("dropped") for _, advantage in s["credit"])
        assert line["reward"] == pytest.approx(sum(s["score"] for s in drawn) / len(drawn))
    assert sum(m["groups_with_signal"] for m in metrics()) > sum(m["groups_with_signal"] for m in metrics("plain"))
    assert sum(m["groups_dropped"] for m in metrics()) > 0 == sum(m["groups_dropped"] for m in metrics("plain"))
    assert "dropped" not in Path("plain/samples.jsonl").read_text()


def samples_of(step: int, folder: str = "run") -> list[dict[str, Any]]:
    return [s for s in samples(folder) if s["step"] == step]


def test_fresh_prompts_follow_each_other_and_none_is_drawn_twice() -> None:
    train(dynamic(3), rewards=[rare], quiet=True)
    questions = list(dict.fromkeys((s["step"], s["question"]) for s in samples()))
    drawn = sum(m["groups"] + m["groups_dropped"] for m in metrics())
    state = json.loads(Path("run/checkpoints/step-3/state.json").read_text())
    assert state["cursor"] == drawn == len(questions)
    train(config(out="one", steps=1, sampling={"num_prompts": drawn}), rewards=[rare], quiet=True)
    assert [q for _, q in questions] == list(dict.fromkeys(s["question"] for s in samples("one")))


def test_a_later_round_draws_what_one_large_round_would_have_drawn() -> None:
    """The noise of a completion depends on its prompt's place in the step and not on the round."""
    train(dynamic(3, steps=1), rewards=[rare], quiet=True)
    num = metrics()[0]["groups"] + metrics()[0]["groups_dropped"]
    assert num > 4
    train(config(out="one", steps=1, sampling={"num_prompts": num}), rewards=[rare], quiet=True)
    assert [s["text"] for s in samples()] == [s["text"] for s in samples("one")]


@pytest.mark.parametrize("name", ALGORITHMS)
def test_a_stopped_run_with_dynamic_sampling_goes_on_as_if_it_had_never_stopped(name: str) -> None:
    changes = {**ALGORITHMS[name], "steps": 4}
    train({**dynamic(2.5, **changes), "out": "whole"}, rewards=[rare], quiet=True)
    train({**dynamic(2.5, **changes), "out": "parts", "steps": 2}, rewards=[rare], quiet=True)
    train({"steps": 4}, resume="parts", rewards=[rare], quiet=True)
    assert metrics("whole") == metrics("parts")
    assert samples("whole") == samples("parts")
    assert same_weights("whole", "parts")
    assert sum(m["groups_dropped"] for m in metrics("whole"))


def test_no_signal_at_all_spends_the_budget_and_is_no_error() -> None:
    train(dynamic(2, steps=1), rewards=[lambda completions, **_: [0.0] * len(completions)], quiet=True)
    line = metrics()[0]
    assert (line["groups"], line["groups_dropped"], line["groups_with_signal"], line["applied"]) == (4, 4, 0, False)


def test_what_it_costs_is_on_the_console(capsys: pytest.CaptureFixture[str]) -> None:
    run = train(dynamic(2, steps=1), rewards=[lambda completions, **_: [0.0] * len(completions)])
    assert "signal 0/4 (4 more dropped)" in capsys.readouterr().out
    assert report.one_line(run.reports[0], 1).endswith(" tokens/s")
    assert run.reports[0].tokens_per_s == run.reports[0].tokens_sampled / run.reports[0].seconds["sample"]


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (True, "is true; it is how many times num_prompts a step may sample; write a number such as 3"),
        (0.5, r"sampling.dynamic_sampling is 0.5"),
        (1.2, "less than one prompt to sample beyond them; write 1.25 or more"),
    ],
)
def test_budgets_that_cannot_work(value: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        train(dynamic(value), quiet=True)


def test_metrics_and_columns_of_rounds_are_joined() -> None:
    first = Scored([Score(1.0)] * 3, {"a": 1.0, "b": 4.0}, {"x": [1, 2, 3]}, ("p",))
    second = Scored([Score(0.0)], {"a": 5.0}, {"y": [4]})
    found = joined_scored([first, second])
    assert found.scores == [Score(1.0)] * 3 + [Score(0.0)]
    assert found.metrics == {"a": 2.0, "b": 4.0}
    assert found.columns == {"x": [1, 2, 3, None], "y": [None, None, None, 4]}
    assert found.timed_out == ("p",)


# --- prompts encoded ahead ------------------------------------------------------------------------------------------


def prompts(calls: list[tuple[int, str]], broken: int = -1) -> FreshPrompts:
    """Problem 10 + i stands at place i; `broken` is one that cannot be encoded."""

    def encode(problem: int) -> Encoded:
        calls.append((problem, threading.current_thread().name))
        if problem == broken:
            raise DataError(f"the prompt of {problem}", "no", "no")
        return Encoded([Prompt(Problem(str(problem), "", ""), (problem,), 1)], problem % 2)

    return FreshPrompts(lambda start, num: list(range(10 + start, 10 + start + num)), encode)


def test_prompts_are_encoded_once_in_a_thread_and_taken_in_order() -> None:
    calls: list[tuple[int, str]] = []
    fresh = prompts(calls)
    with fresh.ahead(2, 3):
        pass
    taken = fresh.take(2, 2)
    assert [p.token_ids for p in taken.prompts] == [(12,), (13,)]
    assert taken.num_truncated == 1
    with fresh.ahead(4, 2):  # place 4 is there already
        pass
    assert [p.token_ids for p in fresh.take(4, 3).prompts] == [(14,), (15,), (16,)]
    assert calls == [(12, "prompts"), (13, "prompts"), (14, "prompts"), (15, "prompts"), (16, "MainThread")]


def test_a_prompt_that_cannot_be_encoded_raises_in_the_step_that_wants_it() -> None:
    fresh = prompts([], broken=12)
    with fresh.ahead(0, 4):
        pass
    assert len(fresh.take(0, 2).prompts) == 2
    with pytest.raises(DataError, match="prompt of 12"):
        fresh.take(2, 2)


def test_the_next_steps_prompts_are_encoded_while_a_step_trains(monkeypatch: pytest.MonkeyPatch) -> None:
    threads: list[str] = []
    real = rollout.encode

    def watched(*args: Any, **options: Any) -> Encoded:
        threads.append(threading.current_thread().name)
        return real(*args, **options)

    monkeypatch.setattr(opening, "encode", watched)
    train(config(), quiet=True)
    assert threads == ["MainThread"] * 3 + ["prompts"] * 12


def test_a_large_sampling_budget_encodes_no_more_ahead(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only what the next step takes for certain: a step may draw four million prompts here, and hardly draws eight."""
    encoded: list[int] = []
    real = rollout.encode

    def counted(*args: Any, **options: Any) -> Encoded:
        encoded.append(1)
        assert len(encoded) < 1000
        return real(*args, **options)

    monkeypatch.setattr(opening, "encode", counted)
    run = train(dynamic(1_000_000), rewards=[rare], quiet=True)
    drawn = sum(m["groups"] + m["groups_dropped"] for m in metrics())
    assert len(run.reports) == 3
    assert len(encoded) <= drawn + 4
