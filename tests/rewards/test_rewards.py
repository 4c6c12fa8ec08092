import asyncio
import contextlib
import functools
import inspect
import json
import re
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from shoestring.errors import ConfigError, DataError
from shoestring.rewards.base import Row, Scored, TrainerState
from shoestring.rewards.functions import Rewards, columns, load
from shoestring.tasks.base import Asking
from shoestring.tasks.file import File
from shoestring.types import Problem, Score

STATE = TrainerState(global_step=3, max_steps=10)


class Echo(Asking):
    """A task whose answer is right when it ends the text."""

    name: str = "echo"

    def problems(self, split: str) -> list[Problem]:
        return []

    def score(self, problem: Problem, text: str) -> Score:
        right = float(text.endswith(problem.answer))
        return Score(right, {"solved": right})

    def vote(self, text: str) -> str | None:
        return text

    def solution(self, problem: Problem) -> str | None:
        return None


TASK = Echo(system="Be brief.")
ROWS = [
    Row(Problem("a", "2*3=", "6", {"columns": {"level": 1}}), "It is 6", (1, 2, 3)),
    Row(Problem("a", "2*3=", "6", {"columns": {"level": 1}}), "5", (4,)),
    Row(Problem("b", "2*4=", "8", {"columns": {"ground_truth": "eight"}}), "8", (5, 6)),
    Row(Problem("b", "2*4=", "8", {"columns": {"ground_truth": "eight"}}), "9", (7,)),
]


def score(*functions, weights=None, rows=ROWS) -> Scored:
    return Rewards(functions, weights).score(TASK, rows, STATE)


def values(scored: Scored) -> list[float]:
    return [score.value for score in scored.scores]


# Functions as people write them for TRL.


def length_reward(completion_ids, **kwargs):
    return [float(len(ids)) for ids in completion_ids]


def format_reward(completions, **kwargs):
    return [1.0 if re.match(r"^\d+$", completion[0]["content"]) else 0.0 for completion in completions]


def answer_reward(completions, answer, **kwargs):
    return [1.0 if a in c[0]["content"] else 0.0 for c, a in zip(completions, answer, strict=True)]


def only_level_1(completions, level, **kwargs):
    return [float(len(c[0]["content"])) if x == 1 else None for c, x in zip(completions, level, strict=True)]


async def judge(prompts, completions, trainer_state, log_extra, log_metric, **kwargs):
    await asyncio.sleep(0.01)
    log_extra("judged", [prompt[-1]["content"] for prompt in prompts])
    log_metric("progress", trainer_state.global_step / trainer_state.max_steps)
    return [0.5] * len(completions)


class Judge:
    async def __call__(self, completions, **kwargs):
        return [2.0] * len(completions)


def test_functions_written_for_trl_work_unchanged():
    assert values(score(length_reward)) == [3.0, 1.0, 2.0, 1.0]
    assert values(score(format_reward)) == [0.0, 1.0, 1.0, 1.0]
    assert values(score(answer_reward)) == [1.0, 0.0, 1.0, 0.0]


def test_weighted_sum_leaves_out_none_and_parts_are_unweighted():
    scored = score(length_reward, only_level_1, weights=[1.0, 0.5])
    assert values(scored) == [3.0 + 3.5, 1.0 + 0.5, 2.0, 1.0]
    assert scored.scores[0].parts == {"length_reward": 3.0, "only_level_1": 7.0}
    assert scored.scores[2].parts == {"length_reward": 2.0}


def test_task_scorer_can_be_mixed_in_and_keeps_its_parts():
    scored = score("task", format_reward, weights=[1.0, 0.1])
    assert values(scored) == pytest.approx([1.0, 0.1, 1.1, 0.1])
    assert scored.scores[0].parts == {"solved": 1.0, "task": 1.0, "format_reward": 0.0}


def test_a_row_that_all_pass_over_gets_its_problems_mean():
    def first(completions, **kwargs):
        return [4.0, None, None, None]

    scored = score(first)
    assert values(scored) == [4.0, 4.0, 0.0, 0.0]
    assert [row.parts.get("unscored") for row in scored.scores] == [0.0, 1.0, 1.0, 1.0]
    assert "first" not in scored.scores[1].parts


def test_what_a_function_is_given():
    seen = {}

    def spy(**kwargs):
        seen.update(kwargs)
        return [0.0] * 4

    score(spy)
    assert seen["prompts"][0] == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "2*3="},
    ]
    assert seen["completions"][1] == [{"role": "assistant", "content": "5"}]
    assert seen["completion_ids"] == [[1, 2, 3], [4], [5, 6], [7]]
    assert seen["answer"] == ["6", "6", "8", "8"]
    assert seen["level"] == [1, 1, None, None]
    assert seen["ground_truth"] == [None, None, "eight", "eight"]
    assert seen["trainer_state"].global_step == 3
    assert set(seen) == {"prompts", "completions", "completion_ids", "answer", "level", "ground_truth"} | {
        "trainer_state",
        "log_extra",
        "log_metric",
    }


def test_own_answer_column_wins_and_taken_names_are_not_passed():
    row = Problem("1", "q", "18", {"columns": {"answer": "9+9=18 #### 18", "prompt": "x", "completions": "y"}})
    assert columns([row, Problem("2", "q", "7")]) == {"answer": ["9+9=18 #### 18", "7"]}


def test_one_function_cannot_change_anothers_arguments():
    def vandal(completions, completion_ids, answer, **kwargs):
        num = len(completions)
        for given in (completions, completion_ids, answer):
            given.clear()
        return [0.0] * num

    assert values(score(vandal, length_reward)) == [3.0, 1.0, 2.0, 1.0]


def test_async_functions_and_what_is_logged():
    scored = score(judge, length_reward, Judge(), functools.partial(judge))
    assert values(scored) == [6.0, 4.0, 5.0, 4.0]
    assert list(scored.scores[0].parts) == ["judge", "length_reward", "Judge", "judge-2"]
    assert scored.metrics == {"progress": 0.3}
    assert scored.columns["judged"] == ["2*3=", "2*3=", "2*4=", "2*4="]
    assert scored.columns["judge-2/judged"] == scored.columns["judged"]


def test_async_functions_run_side_by_side():
    async def slow(completions, **kwargs):
        await asyncio.sleep(0.2)
        return [1.0] * len(completions)

    start = time.perf_counter()
    score(slow, slow, slow, slow)
    assert time.perf_counter() - start < 0.6


def test_async_functions_inside_a_running_loop():
    async def notebook():
        return score(judge)

    assert values(asyncio.run(notebook())) == [0.5] * 4


def test_a_client_bound_to_its_loop_lives_from_step_to_step():
    loops = []

    async def client(completions, **kwargs):
        loops.append(asyncio.get_running_loop())
        return [1.0] * len(completions)

    score(client)
    score(client)
    assert loops[0] is loops[1]
    assert not loops[0].is_closed()


def test_metrics_are_averaged_and_columns_may_come_in_pieces():
    def logs(completions, log_extra, log_metric, **kwargs):
        for i, completion in enumerate(completions):
            log_extra("text", [completion[0]["content"]])
            log_metric("row", i)
        return [None] * len(completions)

    scored = score(logs)
    assert scored.metrics == {"row": 1.5}
    assert scored.columns == {"text": ["It is 6", "5", "8", "9"]}


@pytest.mark.parametrize(
    "returned", [[1, 0, True, None], np.array([1.0, 2, 3, 4], np.float32), torch.ones(4), (1.0,) * 4]
)
def test_numbers_of_all_kinds(returned):
    assert all(type(value) is float for value in values(score(lambda **_: returned)))


@pytest.mark.parametrize("bad", ["1.0", float("nan"), float("inf"), [1.0], torch.ones(2), object()])
def test_what_is_not_a_number_names_function_row_and_problem(bad):
    def mine(**kwargs):
        return [0.0, 0.0, bad, 0.0]

    with pytest.raises(DataError, match=r"reward function mine returned .* for row 2, problem b; each completion"):
        score(mine)


def test_wrong_lengths():
    def short(**kwargs):
        return [1.0] * 3

    def nothing(**kwargs):
        return None

    def logs(log_extra, **kwargs):
        log_extra("a", [1])
        return [1.0] * 4

    async def late(**kwargs):
        return [1.0]

    with pytest.raises(DataError, match=r"short returned 3 values for 4 completions; each .* float or None per"):
        score(short)
    with pytest.raises(DataError, match="nothing returned None"):
        score(nothing)
    with pytest.raises(DataError, match="logs logged 1 values in column a for 4 completions"):
        score(logs)
    with pytest.raises(DataError, match="late returned 1 values for 4"):
        score(late)


def test_a_function_that_raises_stops_the_run():
    def broken(**kwargs):
        raise KeyError("gold")

    async def lost(**kwargs):
        raise TimeoutError("no answer")

    for function, cause in ((broken, KeyError), (lost, TimeoutError)):
        line = function.__code__.co_firstlineno + 1
        says = rf"{function.__name__} raised {cause.__name__}: .*test_rewards\.py, line {line}\); .*problem a, b;"
        with pytest.raises(DataError, match=says) as raised:
            score(judge, function)
        assert isinstance(raised.value.__cause__, cause)


def test_no_rows_call_nothing():
    assert Rewards([length_reward]).score(TASK, [], STATE).scores == []


def test_a_name_is_used_once():
    assert Rewards([length_reward, length_reward, "task"]).names == ("length_reward", "length_reward-2", "task")


def test_a_functions_name_does_not_take_the_place_of_the_tasks_own_parts():
    def correct(completions, **kwargs):
        return [0.5] * len(completions)

    assert Rewards([correct]).names == ("correct",)
    assert Rewards(["task", correct]).names == ("task", "correct-2")


def test_weights_and_functions_must_agree():
    with pytest.raises(ConfigError, match="1 reward weights for 2 reward functions"):
        Rewards(["task", length_reward], [1.0])
    with pytest.raises(ConfigError, match="rewards is empty"):
        Rewards([])


def test_load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "my_rewards.py").write_text(
        "def two(completions, **kwargs):\n    return [2.0] * len(completions)\nlimit = 3\n"
    )
    (tmp_path / "my_broken.py").write_text("raise RuntimeError('no key')\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [p for p in sys.path if p])
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    assert load("json:JSONDecoder.decode") is json.JSONDecoder.decode
    assert load("my_rewards.two") is load("my_rewards:two")
    assert values(score("my_rewards:two")) == [2.0] * 4
    with pytest.raises(ConfigError, match=r'"my_rewards:tow"; .* no attribute .*; did you mean "two"'):
        load("my_rewards:tow")
    with pytest.raises(ConfigError, match="limit is a int, which cannot be called"):
        load("my_rewards.limit")
    with pytest.raises(ConfigError, match="importing my_broken raised RuntimeError: no key") as raised:
        load("my_broken:two")
    assert isinstance(raised.value.__cause__, RuntimeError)
    with pytest.raises(ConfigError, match="importing no_such_module raised ModuleNotFoundError"):
        load("no_such_module:f")
    for path in ("alone", "", "json:", ":dumps"):
        with pytest.raises(ConfigError, match="does not name a module"):
            load(path)


def test_functions_are_called_as_trl_calls_them(monkeypatch: pytest.MonkeyPatch):
    trl = pytest.importorskip("trl", reason="compares with TRL's own trainer: pip install trl==1.16.0")
    if trl.__version__ != "1.16.0":
        pytest.skip(f"reads the inside of TRL 1.16.0's trainer; this is {trl.__version__}")
    from trl.trainer import grpo_trainer

    monkeypatch.setattr(grpo_trainer, "profiling_context", lambda *_: contextlib.nullcontext())
    monkeypatch.setattr(grpo_trainer, "gather", lambda rewards: rewards)
    theirs, ours = {}, {}

    def spy(into, **kwargs):
        into.update(kwargs)
        return [1.0, None, 2.0, 3.0]

    trainer = SimpleNamespace(
        accelerator=SimpleNamespace(device="cpu"),
        state="state",
        environments=None,
        _log_completion_extra=print,
        _log_metric=print,
        reward_funcs=[functools.partial(spy, theirs), length_reward],
        reward_processing_classes=[None, None],
        reward_func_names=["spy", "length_reward"],
    )
    rows = [row._replace(problem=Problem(row.problem.id, row.problem.question, row.problem.answer)) for row in ROWS]
    inputs = [{"prompt": TASK.ask(row.problem), "answer": row.problem.answer} for row in rows]
    completions = [[{"role": "assistant", "content": row.text}] for row in rows]
    ids = [list(row.completion_ids) for row in rows]
    call = inspect.unwrap(grpo_trainer.GRPOTrainer._calculate_rewards)
    found = call(trainer, inputs, [row["prompt"] for row in inputs], completions, ids)
    scored = score(functools.partial(spy, ours), length_reward, rows=rows)
    for name in ("prompts", "completions", "completion_ids", "answer"):
        assert ours[name] == theirs[name]
    assert set(ours) == set(theirs)
    assert [row.parts.get("spy") for row in scored.scores] == [None if r.isnan() else r.item() for r in found[:, 0]]
    assert values(scored) == found.nansum(dim=1).tolist()


def test_trls_own_reward_functions():
    trl = pytest.importorskip("trl.rewards", reason="compares with TRL's own functions: pip install trl==1.16.0")
    solution = {"columns": {"solution": r"$\frac{1}{3}$"}}
    texts = [r"<think>1/3</think> It is $\boxed{\frac{1}{3}}$", r"<think>1/2</think> $\boxed{\frac{1}{2}}$"]
    rows = [Row(Problem("1", "q", "1/3", solution), text, range(90 + i)) for i, text in enumerate(texts)]

    def values_of(function):
        return values(score(function, rows=rows))

    assert values_of(trl.accuracy_reward) == [1.0, 0.0]
    assert values_of(trl.reasoning_accuracy_reward) == [1.0, 0.0]
    assert values_of(trl.think_format_reward) == [1.0, 1.0]
    assert values_of(trl.get_soft_overlong_punishment(100, 20)) == [-0.5, -0.55]
    assert values_of(trl.get_repetition_penalty_reward(2)) == [0.0, 0.0]
    assert values_of(trl.get_cosine_scaled_reward(100))[0] > 0 > values_of(trl.get_cosine_scaled_reward(100))[1]
    both = score(
        trl.accuracy_reward, trl.reasoning_accuracy_reward, trl.get_soft_overlong_punishment(100, 20), rows=rows
    )
    assert list(both.scores[0].parts) == [
        "accuracy_reward",
        "reasoning_accuracy_reward",
        "soft_overlong_punishment_reward",
    ]
    assert both.columns["solution"] == both.columns["reasoning_accuracy_reward/solution"] == [r"$\frac{1}{3}$"] * 2


def test_answers_come_as_they_stand_in_the_row():
    """As any other column, and as in TRL; the reference where a task's problems come from no row."""
    rows = [{"prompt": "6*7=", "answer": 42}, {"prompt": "1+1=", "answer": [2, 3]}, {"prompt": "Hi.", "answer": None}]
    Path("own").mkdir()
    Path("own/train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    problems = File(name="file:own", check="none").problems("train")
    assert columns([*problems, Problem("x", "2*3=", "6")])["answer"] == [42, [2, 3], None, "6"]
