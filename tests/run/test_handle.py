"""What can be done with a run that train() hands back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tests.run.test_loop import config

from shoestring import ConfigError, Run, load_policy, train
from shoestring.evaluation.evaluate import Evaluation, RewardEvaluation
from shoestring.run.folder import model_settings

ROWS = [{"prompt": f"{a}*3=", "answer": str(3 * a)} for a in range(10, 40)]
OTHERS = [{"prompt": f"{a}*4=", "answer": str(4 * a)} for a in range(20, 32)]


def longer(completions: list[Any], **others: Any) -> list[float]:
    return [float(len(completion[0]["content"])) for completion in completions]


def half(completions: list[Any], **others: Any) -> list[float]:
    return [0.5 for _ in completions]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("finished"))
        found = train(config(eval_every=2), data=ROWS, eval_data=OTHERS, quiet=True)
        return Run(found.folder.absolute(), found.config, found.reports, found.policy, best_step=found.best_step)


def test_it_is_judged_by_answers_as_its_own_evaluations_do(run: Run) -> None:
    found = run.evaluate()
    assert isinstance(found, Evaluation)
    assert found.problems == len(OTHERS)
    own = (run.folder / "evals.jsonl").read_text().splitlines()[-1]
    assert f'"accuracy": {found.accuracy}' in own
    several = run.evaluate("train", num=5, ks=(1, 2), samples=4, seed=3)
    assert isinstance(several, Evaluation)
    assert (several.problems, several.samples, set(several.pass_at_k)) == (5, 4, {1, 2})


def test_it_is_judged_by_rewards_that_are_handed_over(run: Run) -> None:
    found = run.evaluate(rewards=longer, num=4)
    assert isinstance(found, RewardEvaluation)
    texts = [row[0] for row in run.sample([row["prompt"] for row in OTHERS[:4]], temperature=0.0)]
    assert found.reward == pytest.approx(sum(map(len, texts)) / 4)
    both = run.evaluate(rewards=["task", half], num=4)
    assert isinstance(both, RewardEvaluation)
    by_answers = run.evaluate(num=4)
    assert isinstance(by_answers, Evaluation)
    assert both.reward == pytest.approx(by_answers.accuracy + 0.5)


def test_a_run_by_python_rewards_asks_for_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    rows = [{"prompt": row["prompt"]} for row in ROWS]
    made = config(eval_every=2, rewards={"weights": [2.0]})
    found = train(made, data=rows, eval_data=rows[:6], rewards=[longer], quiet=True)
    with pytest.raises(ConfigError, match=r"longer.*run\.evaluate\(rewards=\[\.\.\.\]\)"):
        found.evaluate()
    judged = found.evaluate(rewards=longer)
    alone = found.evaluate(rewards=[longer, half])
    assert isinstance(judged, RewardEvaluation)
    assert isinstance(alone, RewardEvaluation)
    assert judged.reward == pytest.approx(2 * (alone.reward - 0.5))  # weighted as in the run, or each by 1
    with pytest.raises(ConfigError, match="one greedy completion"):
        found.evaluate(rewards=longer, ks=(4,))


def test_it_answers(run: Run) -> None:
    found = run.sample(["12*3=", "7*8="], num=3, seed=1)
    assert [len(texts) for texts in found] == [3, 3]
    assert found == run.sample(["12*3=", "7*8="], num=3, seed=1)
    whole, short = (run.sample("12*3=", temperature=0.0, max_new_tokens=n)[0][0] for n in (None, 2))
    assert short == whole[:2]  # a token is a letter
    with pytest.raises(ConfigError, match="num is 0"):
        run.sample("1+1", num=0)


def test_its_model_is_written(run: Run, tmp_path: Path) -> None:
    merged = load_policy(model_settings(str(run.merge(tmp_path / "merged"))))
    ids = torch.tensor([[5, 6, 7, 8]])
    with torch.no_grad():
        found, wanted = merged.base(input_ids=ids).logits, run.policy.base(input_ids=ids).logits
    torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-4)
