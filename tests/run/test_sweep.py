"""Sweeps: what is refused before anything runs, what is done once, what a table says of seeds."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import pytest
from tests.cli.test_cli import Shell

from shoestring.errors import ShoestringError
from shoestring.run import checkpoint, sweep
from shoestring.run.trials import Trial, axis, trials

SMALL = ["steps=2", "sampling.num_prompts=2", "sampling.num_completions=3", "sampling.max_new_tokens=16"]


class Here:
    """Carries a trial out in this process, as if in one of its own."""

    started: list[str]
    stdin = None
    returncode = 0

    def __init__(self, trial: Trial, card: str | None):
        self.started.append(trial.label)
        trial.folder.parent.mkdir(parents=True, exist_ok=True)
        with trial.log.open("w") as log, redirect_stdout(log), redirect_stderr(log):
            try:
                sweep._process(trial)
            except ShoestringError as error:
                print(f"Traceback\nConfigError: {error}\n")
                self.returncode = 1

    def poll(self) -> int:
        return self.returncode


@pytest.fixture
def shell(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Shell:
    return Shell(monkeypatch, capsys)


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    Here.started = []
    monkeypatch.setattr(sweep, "_started", Here)
    return Here.started


def written(out: str = "runs/sweep") -> dict[str, Any]:
    return json.loads(Path(out, "sweep.json").read_text())


MISTAKES: list[tuple[list[str], str]] = [
    (["--over", "optim.lrr=1,2"], 'did you mean "lr"'),
    (["--over", "optim.lr=1e-4,-1"], "optim.lr is -1"),
    (["--over", "algorithm=grpo,t-smpo"], 'did you mean "t-spmo"'),
    (["--over", "algorithm=grpo,s-grpo", "--over", "algorithm.alpha=1,2"], '"algorithm.alpha" is set'),
    (["--over", "optim.lr=1e-4,0.0001"], "they are one and the same run"),
    (["--seeds", "0,1,0"], "the sweep holds seed=0 and seed=0"),
    (["--seeds", "0,-1"], "seed is -1"),
    (["--seeds", "0;1"], 'seeds is "0;1"'),
    (["--over", "optim.lr"], "no setting with values"),
    (["--over", "optim.lr="], "no setting with values"),
    (["--over", "optim.lr=1e-4,,1e-5"], "no setting with values"),
    (["--over", "task.system=[a, b]"], "as a TOML list"),
    (["--over", "seed=0,1"], "use --seeds"),
    (["out=x"], "use --out"),
    (["optim.lr=1e-4", "--over", "optim.lr=1e-5"], "one would undo the other"),
    (["--over", "optim.lr=1e-4", "--over", "optim.lr=1e-5"], "one would undo the other"),
    (["algorithm=grpo", "--over", "algorithm=s-grpo,grpo"], "one would undo the other"),
    (["algorithm.alpha=2", "--over", 'algorithm=[{name="s-grpo", k=8}]'], "one would undo the other"),
    (["--over", "model=tiny,./nowhere"], "there is no such folder"),
    (["--over", "task=multiplication,file:none.jsonl"], "there is no such file"),
    (["--split", "exam"], "there is no such split"),
    (["--num", "0"], "num is 0"),
    (["--at-once", "0"], "at-once is 0"),
    (["eval_every=1", "evaluation.keep=best", "evaluation.split=test"], "cannot be judged on them"),
]


@pytest.mark.parametrize(
    ("arguments", "says"), MISTAKES, ids=lambda value: " ".join(value) if isinstance(value, list) else ""
)
def test_bad_input_is_told_before_anything_runs(
    shell: Shell,
    started: list[str],
    arguments: list[str],
    says: str,
) -> None:
    done = shell("sweep", *SMALL, *arguments)
    assert (done.code, done.out) == (2, "")
    assert says in done.err
    assert done.err.count(";") >= 2
    assert not started
    assert not Path("runs").exists()


def test_values_are_those_of_toml() -> None:
    assert axis("optim.lr = 1e-5, 3e-5") == ("optim.lr", [1e-5, 3e-5])
    assert axis("execution.trunk_cache=true,auto") == ("execution.trunk_cache", [True, "auto"])
    assert axis('task.system=["a, b", "c"]') == ("task.system", ["a, b", "c"])
    assert axis("model=tiny") == ("model.name", ["tiny"])
    tables = 'algorithm=[{name = "s-grpo", alpha = 4, k = 8}, {name = "grpo"}]'
    chosen = trials(None, SMALL, [tables, "optim.lr=1e-3,1e-4"], [0, 1], "out")
    assert [t.config.algorithm.name for t in chosen] == ["s-grpo"] * 4 + ["grpo"] * 4
    assert {t.config.algorithm.alpha for t in chosen[:4]} == {4}
    assert [t.config.seed for t in chosen[:4]] == [0, 1, 0, 1]
    assert len({t.folder for t in chosen}) == 8
    assert not any(set("= /") & set(t.name) for t in chosen)
    assert len({t.base for t in chosen}) == 1


def test_rows_means_and_intervals_and_nothing_twice(shell: Shell, started: list[str]) -> None:
    asked = ["sweep", *SMALL, "optim.lr=1e-2", "--over", "algorithm=grpo,t-spmo", "--seeds", "0,1", "--num", "20"]
    text = shell.fine(*asked)
    assert len(started) == 4
    found = written()
    assert found["failed"] == {}
    assert [(row["method"], row["seed"]) for row in found["rows"]] == [
        (name, seed) for name in ("grpo", "t-spmo") for seed in (0, 1)
    ]
    for row in found["rows"]:
        assert row["algorithm.name"] == row["method"]
        assert (row["split"], row["problems"], row["steps"]) == ("validation", 20, 2)
        assert row["low"] <= row["accuracy"] <= row["high"]
        assert row["tokens_sampled"] >= row["tokens_trained"]
        assert row["seconds"] > 0
        assert row["peak_allocated_gib"] == 0
    assert len({row["base_accuracy"] for row in found["rows"]}) == len(list(Path("runs/sweep").glob("base-*"))) == 1
    for means in found["combinations"]:
        first, second = (row["accuracy"] for row in found["rows"] if row["method"] == means["method"])
        assert means["accuracy"] == pytest.approx((first + second) / 2)
        half = 12.7062 * abs(first - second) / 2
        assert means["interval"] == pytest.approx(
            [max(means["accuracy"] - half, 0), min(means["accuracy"] + half, 1)], abs=1e-4
        )
    assert "95 % interval" in text
    again = shell.fine(*asked)
    assert len(started) == 4
    assert written() == found
    assert again.splitlines() == text.splitlines()[8:]  # the table alone
    shell.fine("eval", "runs/sweep/algorithm.name-grpo,seed-0", "--num", "5")
    single = shell.fine(*asked[:-3], "0", "--num", "20")
    assert len(started) == 4
    assert "single seed" in single
    other = shell.fine(*asked[:-3], "0", "--split", "test", "--num", "5")
    assert "multiplication, test" in other
    assert len(started) == 6


def test_runs_without_answers_are_compared_by_their_rewards(shell: Shell, started: list[str]) -> None:
    """Alone, a run's model gets the same mean; the table has it with three decimals."""
    Path("short.py").write_text(
        "def brief(completions, **others):\n    return [-len(c[0]['content']) / 8 for c in completions]\n"
    )
    for split, numbers in (("train", range(10, 40)), ("test", range(40, 50))):
        lines = [json.dumps({"prompt": f"{a}*3="}) for a in numbers]
        Path(f"rows-{split}.jsonl").write_text("\n".join(lines))
    Path("rows").mkdir()
    for split in ("train", "test"):
        Path(f"rows-{split}.jsonl").rename(f"rows/{split}.jsonl")
    own = ["task.name=file:rows", "task.check=none", 'rewards.functions=["short:brief"]', "optim.lr=1e-2"]
    text = shell.fine("sweep", *SMALL, *own, "--over", "algorithm=grpo,t-spmo", "--seeds", "0,1", "--split", "test")
    assert len(started) == 4
    found = written()
    for row in found["rows"]:
        assert row["low"] <= row["reward"] <= row["high"] < 0
        assert "accuracy" not in row
        assert row["problems"] == 10
    assert len({row["base_reward"] for row in found["rows"]}) == len(list(Path("runs/sweep").glob("base-*"))) == 1
    for means in found["combinations"]:
        first, second = (row["reward"] for row in found["rows"] if row["method"] == means["method"])
        assert means["reward"] == pytest.approx((first + second) / 2)
        assert f" {means['reward']:.3f} " in text
    assert "Greedy reward on" in text
    row = found["rows"][0]
    alone = json.loads(shell.fine("eval", row["run"], "--json", "--details", "each.json"))
    assert alone["reward"] == pytest.approx(row["reward"], abs=1e-9)
    each = json.loads(Path("each.json").read_text())["outcomes"]
    assert len(each) == 10
    assert sum(each.values()) / 10 == pytest.approx(row["reward"])
    assert f"{row['reward']:.3f}" in shell.fine("eval", row["run"])
    for asked in (["--k", "1,4"], ["--temperature", "0.9"]):
        told = shell("eval", row["run"], *asked)
        assert told.code == 2
        assert "rewards judge one greedy completion" in told.err
    by_answers = json.loads(shell.fine("eval", row["run"], "--task", "multiplication", "--num", "5", "--json"))
    assert "accuracy" in by_answers


def test_more_steps_go_on_where_a_run_was_and_are_judged_anew(shell: Shell, started: list[str]) -> None:
    shell.fine("sweep", *SMALL, "--num", "5", "--out", "grown")
    shell.fine("sweep", "steps=4", *SMALL[1:], "--num", "5", "--out", "grown")
    shell.fine("sweep", "steps=4", *SMALL[1:], "--num", "5", "--out", "whole")
    grown, whole = (Path(out, "seed-0", "samples.jsonl").read_text() for out in ("grown", "whole"))
    assert grown == whole
    left_out = {"seconds": 0, "run": ""}
    assert [row | left_out for row in written("grown")["rows"]] == [row | left_out for row in written("whole")["rows"]]
    assert len(started) == 3
    for change, says in (("steps=2", "has done more than 2 steps"), ("optim.lr=1", "the config changes optim.lr")):
        done = shell("sweep", "steps=4", *SMALL[1:], change, "--num", "5", "--out", "grown")
        assert (done.code, len(started)) == (2, 3)
        assert says in done.err


def test_a_run_that_fails_is_told_and_tried_again(
    shell: Shell,
    started: list[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    asked = ["sweep", *SMALL, "--over", 'rewards.functions=[["written_later:f"], ["task"]]', "--num", "5"]
    done = shell(*asked)
    assert done.code == 1
    assert len(started) == 2  # the sweep went on
    assert [row["rewards.functions"] for row in written()["rows"]] == [["task"]]
    (why,) = written()["failed"].values()
    assert "importing written_later raised" in why
    assert f"FAILED: {why}" in done.out
    Path("written_later.py").write_text("def f(completions, **others):\n    return [1.0 for _ in completions]\n")
    shell.fine(*asked)
    assert len(started) == 3
    assert (len(written()["rows"]), written()["failed"]) == (2, {})


@pytest.mark.parametrize("at_once", [1, 2])
def test_each_card_has_so_many_runs_at_a_time(monkeypatch: pytest.MonkeyPatch, at_once: int) -> None:
    chosen = trials(None, SMALL, [], range(5), "out")
    seen: list[tuple[str | None, int]] = []
    busy: list[str | None] = []
    most = 0

    class Busy:
        stdin = None
        returncode = 0

        def __init__(self, trial: Trial, card: str | None):
            nonlocal most
            busy.append(card)
            assert busy.count(card) <= at_once
            most = max(most, len(busy))
            seen.append((card, trial.config.seed))
            self.card, self.polls = card, 0
            trial.log.parent.mkdir(exist_ok=True)
            trial.log.write_text("no result")

        def poll(self) -> int | None:
            self.polls += 1
            if self.polls < 2:
                return None
            busy.remove(self.card)
            return 0

    monkeypatch.setattr(sweep, "_started", Busy)
    monkeypatch.setattr(sweep.time, "sleep", lambda seconds: None)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,7")
    failed, stopped = sweep.carry_out(chosen, print, at_once)
    assert seen == [("4", 0), ("7", 1), ("4", 2), ("7", 3), ("4", 4)]
    assert most == 2 * at_once
    assert (set(failed.values()), stopped) == ({"no result"}, 0)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    assert sweep._cards(chosen) == ["0", "1"]
    assert sweep._cards(trials(None, [*SMALL, "execution.device=cuda:1"], [], None, "out")) == [None]


def test_a_sweep_that_is_stopped_stops_its_run_after_a_step_and_goes_on_later(shell: Shell, started: list[str]) -> None:
    """The first call is the command itself, with processes of its own."""
    asked = ["sweep", *SMALL[1:], "--num", "5", "steps=20"]
    folder = Path("runs/sweep/seed-0")
    command = [sys.executable, "-m", "shoestring", *asked]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as process:
        deadline = time.monotonic() + 60
        while not (folder / "metrics.jsonl").is_file() and time.monotonic() < deadline:
            time.sleep(0.05)
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM
    done = checkpoint.steps_done(folder)
    assert 0 < done < 20
    assert (written()["rows"], written()["failed"]) == ([], {})
    assert "seed=0: goes on" in shell.fine(*asked)
    assert f"resumed at step {done}" in Path(f"{folder}.log").read_text()
    assert written()["rows"][0]["steps"] == 20
