"""The profiler: a trace with the phases in it, seconds by phase, and the same run as without."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest
from tests.run.test_loop import config, metrics, same_weights

from shoestring import ConfigError, train
from shoestring.run import preflight as budgets
from shoestring.run.profiler import summary
from shoestring.types import StepReport

PHASES = {"sample", "score", "credit", "train"}

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:torch")


def test_a_profiled_run_is_the_same_run_with_a_trace_and_a_table(capsys: pytest.CaptureFixture[str]) -> None:
    train(config(out="plain", steps=3), quiet=True)
    train(config(steps=3), profile=True)
    assert metrics() == metrics("plain")
    assert Path("run/samples.jsonl").read_text() == Path("plain/samples.jsonl").read_text()
    assert same_weights("run", "plain")
    with gzip.open("run/trace.json.gz") as file:
        events = json.load(file)["traceEvents"]
    ranges = [e["name"] for e in events if e.get("cat") == "user_annotation" and e.get("ph") == "X"]
    assert {name: ranges.count(name) for name in PHASES} == dict.fromkeys(PHASES, 1)
    assert any(e.get("cat") == "cpu_op" for e in events)
    found = json.loads(Path("run/profile.json").read_text())
    assert found["steps"] == [1]
    assert found["step_recorded"] == 2
    assert found["seconds"].keys() == found["share"].keys() == PHASES
    assert sum(found["share"].values()) == pytest.approx(1)
    assert found["operators"][0]["seconds"] >= found["operators"][-1]["seconds"] > 0
    assert not PHASES & {operator["name"] for operator in found["operators"]}
    out = capsys.readouterr().out
    assert all(phase in out for phase in PHASES)
    assert "trace.json.gz" in out


def test_a_resumed_run_can_be_profiled() -> None:
    train(config(steps=1), quiet=True)
    train({"steps": 3}, resume="run", quiet=True, profile=True)
    found = json.loads(Path("run/profile.json").read_text())
    assert (found["step_recorded"], found["steps"]) == (2, [2])  # two steps: none but the recorded one is warm


def test_too_few_steps_are_told_before_the_model_loads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(budgets, "load_policy", lambda *_, **__: pytest.fail("the model was loaded"))
    with pytest.raises(ConfigError, match=r"with steps = 1; .* set steps = 2 or more"):
        train(config(steps=1), quiet=True, profile=True)
    assert not Path("run").exists()


def line(step: int, sample: float, train: float) -> StepReport:
    numbers = dict.fromkeys(("loss", "grad_norm", "kl", "clip_fraction", "sampler_gap", "lr", "reward", "solved"), 0.0)
    counts = dict.fromkeys(
        ("groups", "groups_with_signal", "tokens_trained", "tokens_run", "truncated", "prompts_truncated"), 0
    )
    seconds = {"sample": sample, "train": train}
    return StepReport(
        step=step, reward_parts={}, tokens_sampled=100, applied=True, seconds=seconds, peak_bytes=0, **numbers, **counts
    )


def test_means_leave_out_the_first_step_and_the_recorded_one() -> None:
    found = summary([line(4, 9, 9), line(5, 2, 1), line(6, 8, 8), line(7, 4, 1)], 2, [])
    assert found["steps"] == [5, 7]
    assert found["step_recorded"] == 6
    assert found["seconds"] == {"sample": 3.0, "train": 1.0}
    assert found["step_s"] == 4.0
    assert found["tokens_per_s"] == pytest.approx(200 / 6)
    assert found["share"] == {"sample": 0.75, "train": 0.25}
