"""Trackers: TensorBoard's files as they are read back, and the calls that Weights & Biases and Trackio get, by a
stand-in for their package (both were run by hand)."""

from __future__ import annotations

import importlib.util
import json
import math
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.run.test_loop import config

from shoestring import ConfigError, DataError, train
from shoestring.config import run as configs
from shoestring.trackers import TRACKERS

PACKAGE = """
import json
from pathlib import Path


class Run:
    def __init__(self, values):
        self.tell("init", values)

    def tell(self, what, values):
        with open("calls.jsonl", "a") as file:
            file.write(json.dumps([what, values]) + "\\n")

    def log(self, values, step):
        self.tell("log", [step, values])
        if Path("gone").exists():
            raise ConnectionError("no such server")

    def finish(self, exit_code=0):
        self.tell("finish", exit_code)
        if Path("gone").exists():
            raise ConnectionError("no such server")


def init(**values):
    if Path("refused").exists():
        raise RuntimeError("no key")
    return Run(values)
"""


@pytest.fixture(params=["wandb", "trackio"])
def package(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The name of a package that writes its calls down."""
    Path(f"{request.param}.py").write_text(PACKAGE)
    monkeypatch.syspath_prepend(".")
    sys.modules.pop(request.param, None)
    yield request.param
    sys.modules.pop(request.param, None)


def calls(what: str) -> list[Any]:
    lines = [json.loads(line) for line in Path("calls.jsonl").read_text().splitlines()]
    return [values for name, values in lines if name == what]


def lines(name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in Path("run", name).read_text().splitlines()]


def tracked(name: str, **changes: Any) -> dict[str, Any]:
    return config(tracking=name, eval_every=2, evaluation={"num": 5}, **changes)


def scalars() -> dict[str, list[tuple[int, float]]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator("run/tensorboard").Reload()
    return {name: [(e.step, e.value) for e in events.Scalars(name)] for name in events.Tags()["scalars"]}


@pytest.mark.parametrize("left", [["step-2"], []])
def test_tensorboard_holds_each_step_once_though_the_run_was_killed_and_resumed(left: list[str]) -> None:
    train(tracked("tensorboard"), quiet=True)
    whole = scalars()
    metrics, evaluations = lines("metrics.jsonl"), lines("evals.jsonl")
    for name in ("reward", "loss", "grad_norm", "length_mean", "groups_with_signal"):
        assert whole[f"train/{name}"] == [(m["step"], pytest.approx(m[name])) for m in metrics]
    assert whole["train/seconds/sample"] == [(m["step"], pytest.approx(m["seconds"]["sample"])) for m in metrics]
    assert whole["eval/accuracy"] == [(e["step"], pytest.approx(e["accuracy"])) for e in evaluations]
    assert not any(math.isnan(value) for points in whole.values() for _, value in points)
    for checkpoint in {"step-2", "step-4"} - {*left}:  # as if it had been killed before these
        shutil.rmtree(f"run/checkpoints/{checkpoint}")
    train({"steps": 4}, resume="run", quiet=True)
    assert [step for step, _ in scalars()["train/loss"]] == [0, 1, 2, 3]
    assert [step for step, _ in scalars()["eval/accuracy"]] == [0, 2, 4]


def test_a_package_hears_of_each_step_and_of_a_resumed_run_as_the_same(package: str) -> None:
    train(tracked(package, steps=2), quiet=True)
    train({"steps": 4}, resume="run", quiet=True)
    first, second = calls("init")
    same = ("name", "project", "resume", *(["id"] if package == "wandb" else []))
    assert {key: first[key] for key in same} == {key: second[key] for key in same}
    assert (first["config"]["steps"], second["config"]["steps"]) == (2, 4)
    logged = calls("log")
    steps = [step for step, _ in logged]
    assert steps == sorted(steps)
    rewards = [(step, values["train/reward"]) for step, values in logged if "train/reward" in values]
    assert rewards == [(m["step"], m["reward"]) for m in lines("metrics.jsonl")]
    assert [step for step, values in logged if "eval/accuracy" in values] == [0, 2, 2, 4]
    assert calls("finish") == [0, 0]


def test_two_runs_of_one_name_are_two(package: str) -> None:
    train(tracked(package, steps=1, out="a/run"), quiet=True)
    train(tracked(package, steps=1, out="b/run"), quiet=True)
    first, second = ({**call, "dir": "", "config": {}} for call in calls("init"))
    assert first != second


def test_a_server_that_is_gone_ends_no_run(package: str, capsys: pytest.CaptureFixture[str]) -> None:
    Path("gone").touch()
    train(tracked(package), quiet=True)
    assert len(lines("metrics.jsonl")) == 4
    assert len(calls("log")) == 1
    told = capsys.readouterr().err
    assert told.count("the run goes on without it: ConnectionError: no such server") == 1
    assert told.count("Tracking could not be closed: ConnectionError: no such server") == 1


def test_a_run_that_fails_is_failed_there_too_and_tells_its_own_error(package: str) -> None:
    Path("gone").touch()

    def breaks(completions: list[Any], trainer_state: Any, **others: Any) -> list[float]:
        return [1.0] * (len(completions) - trainer_state.global_step)

    with pytest.raises(DataError, match="breaks returned 11 values for 12 completions"):
        train(config(tracking=package), rewards=[breaks], quiet=True)
    assert calls("finish") == [int(package == "wandb")]


def test_a_run_that_ends_well_while_another_error_is_handled_is_no_failed_one(package: str) -> None:
    try:
        raise ValueError("of something else")
    except ValueError:
        train(config(steps=1, tracking=package), quiet=True)
    assert calls("finish") == [0]


def test_a_run_that_is_renamed_and_resumed_from_within_is_the_same(
    package: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(Path.cwd()))
    train(tracked(package, steps=2), quiet=True)
    first = calls("init")[0]
    Path("run").rename("renamed")
    monkeypatch.chdir("renamed")
    train({"steps": 4}, resume=".", quiet=True)
    second = calls("init")[0]
    assert (first["name"], first.get("id")) == (second["name"], second.get("id"))
    assert first["name"].startswith("run-")


def test_one_that_cannot_start_is_said_and_the_same_command_works_later(package: str) -> None:
    Path("refused").touch()
    with pytest.raises(ConfigError, match=rf'tracking.name is "{package}"; it cannot be started \(no key\)'):
        train(tracked(package), quiet=True)
    Path("refused").unlink()
    train(tracked(package, steps=1), quiet=True)


@pytest.mark.parametrize("name", [name for name in TRACKERS if name != "none"])
def test_a_missing_package_is_said_before_the_model_loads(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda package, *others: None)
    with pytest.raises(ConfigError, match=rf'tracking.name is "{name}"; .* pip install "shoestring\[{name}\]"'):
        train(tracked(name, model="nowhere/at-all"), quiet=True)
    assert not Path("run").exists()


def test_a_tracker_may_be_ones_own_and_may_change_when_a_run_goes_on() -> None:
    Path("own.py").write_text(
        "from contextlib import contextmanager\n"
        "from shoestring.trackers.base import NoTracker\n\n\n"
        "class Own(NoTracker):\n"
        "    name: str\n\n"
        "    @contextmanager\n"
        "    def opened(self, folder, config, done):\n"
        "        with open('own.txt', 'a') as file:\n"
        "            yield lambda step, values: print(step, *sorted(values), file=file)\n"
    )
    sys.modules.pop("own", None)
    train(config(steps=1), quiet=True)
    train({"steps": 3, "tracking": {"name": "own:Own"}}, resume="run", quiet=True)
    assert [line.split()[0] for line in Path("own.txt").read_text().splitlines()] == ["1", "2"]
    assert configs.load("run/config.toml").tracking.name == "own:Own"
