"""Evaluations during a run by its own rewards, and on rows of one's own."""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tests.run.test_loop import config, metrics, same_weights

from shoestring import ConfigError, DataError, train
from shoestring.config import run as configs
from shoestring.rollout.rollout import encode, roll_out
from shoestring.run.folder import model_settings
from shoestring.run.loading import load_policy
from shoestring.run.messages import where_it_lies
from shoestring.samplers import SAMPLERS, Sampling

ROWS = [{"prompt": f"{a}*3="} for a in range(10, 40)]
OTHERS = [{"prompt": f"{a}*4="} for a in range(20, 32)]


def longer(completions: list[Any], **others: Any) -> list[float]:
    """Below 0, as many rewards are; best for 40 letters."""
    return [-abs(40.0 - len(completion[0]["content"])) for completion in completions]


def evaluations(folder: str = "run") -> list[dict[str, Any]]:
    return [json.loads(line) for line in Path(folder, "evals.jsonl").read_text().splitlines()]


def own(**changes: Any) -> dict[str, Any]:
    return config(eval_every=2, **changes)


def test_the_mean_is_that_of_greedy_completions_of_the_last_weights(capsys: pytest.CaptureFixture[str]) -> None:
    run = train(own(), rewards=[longer], data=ROWS, eval_data=OTHERS)
    policy = load_policy(model_settings("run"))
    problems = run.config.task.problems("validation")
    prompts, _ = encode(policy, run.config.task, problems, 24)
    greedy = Sampling(max_new_tokens=24, temperature=0)
    texts = [
        r.texts[0] for r in roll_out(policy, SAMPLERS["hf"]().open(policy), prompts, num=1, sampling=greedy, seed=0)
    ]
    found = evaluations()
    assert [line["step"] for line in found] == [0, 2, 4]
    last = found[-1]
    assert last["reward"] == pytest.approx(statistics.mean(-abs(40.0 - len(text)) for text in texts))
    assert (last["problems"], last["split"]) == (12, "validation")
    assert last["low"] <= last["reward"] <= last["high"]
    assert "accuracy" not in last
    told = capsys.readouterr().out
    assert f"after step 4: validation reward {last['reward']:.3f} (" in told
    assert "shoestring eval" not in told  # it has nothing to judge by


def test_all_rows_are_looked_at_unless_fewer_are_asked_for_and_the_closing_hint_names_them() -> None:
    many = [{"prompt": f"{a}*4=", "answer": str(4 * a)} for a in range(100, 230)]
    train(own(steps=1), data=many[:40], eval_data=many, quiet=True)
    assert evaluations()[0]["problems"] == 130
    train(configs.settle(own(steps=1, out="settled")), data=many[:40], eval_data=many, quiet=True)
    assert evaluations("settled")[0]["problems"] == 130
    run = train(own(steps=1, evaluation={"num": 7}, out="few"), data=many[:40], eval_data=many, quiet=True)
    assert evaluations("few")[0]["problems"] == 7
    assert "--split validation" in where_it_lies(run)


def test_completions_that_are_late_are_said_and_left_out(capsys: pytest.CaptureFixture[str]) -> None:
    Path("late.py").write_text(
        "import time\n\n\ndef slow(prompts, **others):\n"
        "    time.sleep(90 if prompts[0][-1]['content'].startswith(('20', '21')) else 0)\n    return [1.0]\n"
    )
    rewards = {"functions": ["late:slow"], "workers": 2, "timeout": 4.0, "on_timeout": "unscored"}
    train(own(steps=1, rewards=rewards, task={"check": "none"}), data=ROWS[:8], eval_data=OTHERS[:4], quiet=True)
    assert [(line["problems"], line["timed_out"], line["reward"]) for line in evaluations()] == [(2, 2, 1.0)] * 2
    assert capsys.readouterr().err.count("took longer than rewards.timeout (4 s)") == 4


def test_a_function_that_fails_in_an_evaluation_is_said_so() -> None:
    def groups_only(completions: list[Any], **others: Any) -> list[float]:
        assert len(completions) % 4 == 0, "whole groups"
        return [0.5] * len(completions)

    with pytest.raises(DataError, match=r"in the evaluation after step 0 \(one completion a problem\) reward function"):
        train(own(), rewards=[groups_only], data=ROWS, eval_data=OTHERS[:3], quiet=True)


def test_eval_data_is_the_split_that_evaluations_look_at_and_nothing_else_is() -> None:
    run = train(own(steps=1, evaluation={"split": "test"}), rewards=[longer], data=ROWS, eval_data=OTHERS, quiet=True)
    task = run.config.task
    assert [p.question for p in task.problems("train")] == [row["prompt"] for row in ROWS]
    assert [p.question for p in task.problems("test")] == [row["prompt"] for row in OTHERS]
    with pytest.raises(DataError, match='no "validation" part'):
        task.problems("validation")


def test_answers_judge_where_there_are_any_unless_rewards_are_asked_for() -> None:
    rows = [{"prompt": f"{a}*3=", "answer": str(3 * a)} for a in range(10, 40)]
    train(own(steps=1), data=rows, eval_data=rows[:5], quiet=True)
    assert {"accuracy"} <= evaluations()[0].keys()
    train(own(steps=1, evaluation={"by": "rewards"}, out="asked"), data=rows, eval_data=rows[:5], quiet=True)
    assert evaluations("asked")[0]["reward"] == evaluations()[0]["accuracy"]
    assert "accuracy" not in evaluations("asked")[0]


def test_the_best_is_kept_though_all_rewards_are_below_zero() -> None:
    judged = [0]

    def worse_in_the_end(completions: list[Any], trainer_state: Any, **others: Any) -> list[float]:
        if len(completions) == len(OTHERS):
            judged[0] += 1
            return [-5.0 if judged[0] == 2 else -9.0] * len(completions)
        return longer(completions)

    kinds: dict[str, Any] = {"data": ROWS, "eval_data": OTHERS, "quiet": True}
    sampling = {"num_prompts": 2, "num_completions": 4}
    run = train(own(evaluation={"keep": "best"}, sampling=sampling), rewards=[worse_in_the_end], **kinds)
    found = evaluations()
    assert [line["reward"] for line in found] == [-9.0, -5.0, -9.0]
    best = found[1]
    assert run.best_step == best["step"] == 2
    kept = load_file("run/adapter/adapter_model.safetensors")
    of_step = load_file(f"run/best/step-{best['step']}/adapter_model.safetensors")
    assert all(torch.equal(kept[name], of_step[name]) for name in kept)
    last = load_file("run/checkpoints/step-4/weights.safetensors")
    assert not all(torch.equal(value, last[name.replace(".weight", ".default.weight")]) for name, value in kept.items())


def test_a_resumed_run_evaluates_as_one_that_never_stopped() -> None:
    kinds: dict[str, Any] = {"rewards": [longer], "data": ROWS, "eval_data": OTHERS, "quiet": True}
    train(own(evaluation={"keep": "best"}, out="whole"), **kinds)
    train(own(evaluation={"keep": "best"}, out="parts", steps=2), **kinds)
    train({"steps": 4}, resume="parts", rewards=[longer], quiet=True)
    assert metrics("whole") == metrics("parts")
    assert {line["step"]: line for line in evaluations("parts")} == {
        line["step"]: {**line, "task": evaluations("parts")[0]["task"]} for line in evaluations("whole")
    }
    assert same_weights("whole", "parts")


def test_workers_judge_alike() -> None:
    Path("own_rewards.py").write_text(
        "def longer(completions, **others):\n    return [-abs(40.0 - len(c[0]['content'])) for c in completions]\n"
    )
    for workers, out in ((0, "here"), (1, "there")):
        rewards = {"functions": ["own_rewards:longer"], "workers": workers}
        task = {"check": "none"}
        train(own(steps=1, rewards=rewards, task=task, out=out), data=ROWS, eval_data=OTHERS, quiet=True)
    assert [e["reward"] for e in evaluations("here")] == [e["reward"] for e in evaluations("there")]


def test_what_no_function_scores_is_left_out() -> None:
    def some(prompts: list[Any], completions: list[Any], **others: Any) -> list[float | None]:
        return [1.0 if prompt[-1]["content"] < "25" else None for prompt in prompts]

    train(own(steps=1), rewards=[some], data=ROWS, eval_data=OTHERS, quiet=True)
    assert [(line["problems"], line["reward"]) for line in evaluations()] == [(5, 1.0)] * 2


def test_an_evaluation_in_which_nothing_is_scored_is_said() -> None:
    with pytest.raises(DataError, match=r"none of the 12 problems of the evaluation got a reward \(0 not in time"):
        train(own(), rewards=[lambda completions, **_: [None] * len(completions)], data=ROWS, eval_data=OTHERS)


@pytest.mark.parametrize(
    ("given", "changes", "message"),
    [
        ({"eval_data": OTHERS}, {"eval_every": 2}, "eval_data is given without data"),
        ({"eval_data": OTHERS, "data": ROWS}, {}, "eval_every is 0; nothing would look at it"),
        ({"eval_data": [], "data": ROWS}, {"eval_every": 2}, "eval_data is empty"),
        ({"eval_data": [{"prompt": object()}], "data": ROWS}, {"eval_every": 2}, "eval_data holds a row that is not"),
        (
            {"eval_data": OTHERS, "data": ROWS},
            {"eval_every": 2, "evaluation": {"split": "train"}},
            'evaluation.split is "train"; it is what is held back',
        ),
        ({"data": ROWS}, {"eval_every": 2, "evaluation": {"by": "answers", "split": "train"}}, "count as wrong"),
    ],
)
def test_what_cannot_be_is_said(given: dict[str, Any], changes: dict[str, Any], message: str) -> None:
    with pytest.raises((ConfigError, DataError), match=message):
        train(config(**changes), rewards=[longer], quiet=True, **given)
    assert not Path("run").exists()


def test_eval_data_is_not_taken_when_a_run_goes_on() -> None:
    train(own(steps=1), rewards=[longer], data=ROWS, eval_data=OTHERS, quiet=True)
    with pytest.raises(ConfigError, match="data is given with resume"):
        train({"steps": 2}, resume="run", rewards=[longer], eval_data=OTHERS, quiet=True)
