"""Scoring in processes: the same scores, begun while others are sampled, and a row that hangs ends only its process."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.rewards.test_rewards import ROWS, TASK
from tests.run.test_loop import config, metrics, same_weights

import waste_rewards as functions
from shoestring import ConfigError, DataError, train
from shoestring.rewards.base import Row, TrainerState
from shoestring.rewards.functions import Rewards
from shoestring.rewards.settings import RewardSettings
from shoestring.rollout.workers import opened
from shoestring.run import preflight as budgets
from shoestring.samplers.hf import HfEngine
from shoestring.types import Completion, Problem

STATE = TrainerState(global_step=1, max_steps=4)
HERE = RewardSettings()


def pool(**settings: Any) -> RewardSettings:
    return RewardSettings(workers=2, **settings)


def rows(*texts: str) -> list[Row]:
    return [Row(Problem(f"p{i}", "1+1=", "2"), text, (i,)) for i, text in enumerate(texts)]


def gone(pid: int) -> bool:
    """Whether a process has ended (a dead one that nobody has asked for yet counts)."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] in "ZX"
    except FileNotFoundError:
        return True


def soon(true: Callable[[], bool], seconds: float = 20) -> bool:
    limit = time.monotonic() + seconds
    while not true() and time.monotonic() < limit:
        time.sleep(0.05)
    return true()


@pytest.fixture(autouse=True)
def _no_process_is_left() -> Any:
    yield
    assert not [p for p in multiprocessing.active_children() if p.name == "shoestring-rewards"]


def test_scores_metrics_and_columns_are_the_same_in_the_same_order() -> None:
    rewards = Rewards(["task", functions.varied, functions.logs, functions.late], [1.0, 0.1, 0.5, 2.0])
    many = [row._replace(text=f"{row.text}{'!' * i}", completion_ids=(i,)) for i in range(5) for row in ROWS]
    with opened(rewards, TASK, HERE) as here, opened(rewards, TASK, pool()) as there:
        expected = here.score(many, STATE)
        assert there.score(many, STATE) == expected
        there.begin(many[:7], STATE)
        there.begin(many[:7], STATE)  # as where sampling is done again
        there.begin(many[12:], STATE)
        assert there.score(many, STATE) == expected
        assert there.score([], STATE).scores == []


def test_a_run_with_workers_is_the_same_run() -> None:
    """With an engine of several waves, so that groups are told of one after another."""
    changes: dict[str, Any] = {"execution": {"wave_tokens": 160}, "sampling": {"dynamic_sampling": 2}}
    rewards = ["task", "waste_rewards:logs"]
    train(config(out="here", **changes), rewards=rewards, quiet=True)
    train(config(out="there", rewards={"workers": 2, "timeout": 60.0}, **changes), rewards=rewards, quiet=True)
    assert metrics("here") == metrics("there")
    assert Path("here/samples.jsonl").read_text() == Path("there/samples.jsonl").read_text()
    assert same_weights("here", "there")


def test_scoring_begins_while_others_are_sampled(monkeypatch: pytest.MonkeyPatch) -> None:
    ended: list[float] = []
    real = HfEngine._sample_wave

    def slow(self: HfEngine, *args: Any, **options: Any) -> list[Completion]:
        found = real(self, *args, **options)
        time.sleep(0.3)
        ended.append(time.time())
        return found

    monkeypatch.setattr(HfEngine, "_sample_wave", slow)
    waves = {"sampler": "hf", "execution": {"wave_tokens": 160}}
    train(config(steps=1, rewards={"workers": 1}, **waves), rewards=[functions.times], quiet=True)
    begun = [float(line.split()[0]) for line in Path("times.txt").read_text().splitlines()]
    assert len(ended) > 2
    assert len(begun) == 12
    assert min(begun) < ended[-1] - 0.3


def test_a_wave_that_runs_out_of_memory_is_scored_once_more_and_changes_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Groups of the waves before it are told of twice."""
    real = HfEngine._sample_wave
    calls: list[int] = []

    def fails_once(self: HfEngine, *args: Any, **options: Any) -> list[Completion]:
        calls.append(1)
        if len(calls) == 3:
            raise torch.OutOfMemoryError("planted")
        return real(self, *args, **options)

    monkeypatch.setattr(HfEngine, "_sample_wave", fails_once)
    for out, workers in (("here", 0), ("there", 2)):
        calls.clear()
        changes: dict[str, Any] = {"rewards": {"workers": workers}, "execution": {"wave_tokens": 160}, "sampler": "hf"}
        train(config(out=out, steps=2, **changes), rewards=[functions.varied], quiet=True)
    assert metrics("here") == metrics("there")
    assert metrics("here")[0]["wave_tokens"] < 160
    assert len(calls) > 3
    assert Path("here/samples.jsonl").read_text() == Path("there/samples.jsonl").read_text()


def test_rows_are_scored_side_by_side() -> None:
    with opened(Rewards([functions.Slow(0.4)]), TASK, pool()) as scoring:
        scoring.score(rows("x", "x"), STATE)  # both workers are up
        started = time.perf_counter()
        scoring.score(rows("a", "bb", "ccc", "dddd"), STATE)
        assert time.perf_counter() - started < 1.3


def test_a_row_that_hangs_counts_0_and_the_others_are_scored() -> None:
    settings = pool(timeout=0.5, on_timeout="zero")
    texts = rows("a", "bbbbb", "c", "d" * 10, "eee")
    with opened(Rewards([functions.hangs, functions.logs]), TASK, settings) as scoring:
        started = time.perf_counter()
        scored = scoring.score(texts, STATE)
        assert time.perf_counter() - started < 20
        assert list(scored.timed_out) == ["p1", "p3"]
        assert scored.scores[1].value == scored.scores[3].value == 0.0
        assert scored.columns["length"] == [1, None, 1, None, 3]
        rest = [texts[i] for i in (0, 2, 4)]
        expected = Rewards([functions.hangs, functions.logs]).score(TASK, rest, STATE).scores
        assert [scored.scores[i] for i in (0, 2, 4)] == expected
        assert scoring.score(texts, TrainerState(global_step=2)).timed_out == ()  # new processes took their places


def test_a_row_that_hangs_may_count_as_the_others_of_its_prompt() -> None:
    same = [row._replace(problem=Problem("p", "1+1=", "2")) for row in rows("a", "bbbbb", "cc")]
    with opened(Rewards([functions.hangs, functions.logs]), TASK, pool(timeout=2.0, on_timeout="unscored")) as scoring:
        scored = scoring.score(same, STATE)
    assert list(scored.timed_out) == ["p"]
    first, late, last = scored.scores
    assert first.value != last.value
    assert late.value == (first.value + last.value) / 2
    assert [score.parts["unscored"] for score in scored.scores] == [0.0, 1.0, 0.0]


def test_a_program_that_a_row_hangs_in_ends_with_it() -> None:
    settings = pool(timeout=2.0, on_timeout="zero")
    with opened(Rewards([functions.starts_a_program]), TASK, settings) as scoring:
        assert len(scoring.score(rows("a"), STATE).timed_out) == 1
        assert soon(lambda: gone(int(Path("program.txt").read_text())))


def test_a_row_that_hangs_stops_the_run_which_can_go_on(capsys: pytest.CaptureFixture[str]) -> None:
    """The step and the problem are named; with another setting the same run goes on."""
    given = {"functions": ["waste_rewards:hangs"], "workers": 2, "timeout": 0.5}
    with pytest.raises(DataError, match=r"multiplication-\S+ was not scored within 0.5 s in step 1 \(by hangs\)"):
        train(config(rewards=given, steps=3), quiet=True)
    assert len(metrics()) == 1
    run = train({"rewards": {"on_timeout": "zero"}}, resume="run", quiet=True)
    assert [bool(report.timed_out) for report in run.reports] == [False, True, False]
    assert "took longer than rewards.timeout (0.5 s)" in capsys.readouterr().err


def test_faults_in_a_worker_name_the_problem() -> None:
    with (
        opened(Rewards([functions.breaks]), TASK, pool()) as scoring,
        pytest.raises(DataError, match=r"breaks raised KeyError: .*bug.*scoring problem p0") as raised,
    ):
        scoring.score(rows("a", "b"), STATE)
    assert "waste_rewards.py" in str(raised.value.__cause__)
    with (
        opened(Rewards([functions.dies]), TASK, pool()) as scoring,
        pytest.raises(DataError, match=r"worker ended while scoring a completion of problem p0; .*exit code 7"),
    ):
        scoring.score(rows("a"), STATE)


def test_what_cannot_be_sent_is_told_before_the_model_loads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(budgets, "load_policy", lambda *_, **__: pytest.fail("the model was loaded"))

    def inner(completions: list[Any], **others: Any) -> list[float]:
        return [0.0] * len(completions)

    with pytest.raises(ConfigError, match=r"and inner is to score in another process; it cannot be sent there"):
        train(config(rewards={"workers": 1}), rewards=[inner], quiet=True)
    monkeypatch.setitem(sys.modules, "only_here", type(sys)("only_here"))
    exec("def f(completions, **others): return [0.0] * len(completions)", vars(sys.modules["only_here"]))
    with pytest.raises(ConfigError, match=r"a worker could not start \(ModuleNotFoundError: .*only_here"):
        train(config(rewards={"workers": 1}), rewards=[vars(sys.modules["only_here"])["f"]], quiet=True)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"timeout": 2.0}, r"rewards.timeout is 2 and rewards.workers 0; .* cannot be stopped; set rewards.workers"),
        ({"workers": 1, "on_timeout": "zero"}, r"without rewards.timeout; nothing ever takes too long"),
        ({"workers": -1}, r"rewards.workers is -1"),
        ({"workers": 1, "timeout": 0}, r"rewards.timeout is 0"),
        ({"workers": 1, "timeout": 1, "on_timeout": "skip"}, r"rewards.on_timeout is 'skip'"),
    ],
)
def test_settings_that_cannot_work(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        train(config(rewards=settings), quiet=True)
    assert not Path("run").exists()


SCRIPT = """
from shoestring import train
{guard}train({{"steps": 500, "out": "run", "save_every": 0, "sampling": {{"num_prompts": 2, "num_completions": 4}},
       "rewards": {{"workers": 2}}}}, rewards=["waste_rewards:sleeps_once"], quiet=True)
"""


def started(guard: str) -> subprocess.Popen[str]:
    Path("script.py").write_text(SCRIPT.format(guard=guard))
    path = os.pathsep.join([str(Path(__file__).parents[1]), *filter(None, sys.path)])
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    return subprocess.Popen(
        [sys.executable, "script.py"], stderr=subprocess.PIPE, text=True, env=env, start_new_session=True
    )


def workers() -> list[int]:
    return [int(path.name) for path in Path("workers").glob("*")]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_no_worker_outlives_the_run(number: signal.Signals) -> None:
    """Ctrl-C goes to the whole group, as from a terminal: the step in hand is scored to its end and saved."""
    process = started('if __name__ == "__main__": ')
    assert soon(lambda: Path("run/metrics.jsonl").is_file() and len(metrics()) > 1, 120)
    if number == signal.SIGINT:
        os.killpg(process.pid, number)
    else:
        process.kill()
    _, errors = process.communicate(timeout=60)
    assert soon(lambda: all(map(gone, workers())))
    assert len(workers()) == 2
    if number == signal.SIGINT:
        assert process.returncode != 0  # what the script did after it must not go on
        assert "steps are saved; to go on: " in errors
        assert errors.rstrip().endswith("KeyboardInterrupt")
        state = json.loads(Path(f"run/checkpoints/step-{len(metrics())}/state.json").read_text())
        assert state["step"] == len(metrics())


def test_a_script_that_trains_when_it_is_read_is_told_so() -> None:
    _, errors = (process := started("")).communicate(timeout=120)
    assert process.returncode == 1
    assert '`if __name__ == "__main__":`' in errors
    assert "a worker could not start" in errors
    assert not Path("run").exists()


def test_a_worker_that_does_not_start_in_time_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shoestring.rollout.workers._START", 0.001)
    with pytest.raises(ConfigError, match="a worker could not start"), opened(Rewards([functions.logs]), TASK, pool()):
        pass
