"""Several tasks as one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from shoestring import train
from shoestring.config.run import load, settle
from shoestring.errors import ConfigError
from shoestring.evaluation.contamination import overlap

SUMS = [("1+1=", "2"), ("2+5=", "7"), ("3+3=", "6"), ("4+4=", "8")]
PRODUCTS = [("2*3=", "6"), ("2*4=", "8")]


@pytest.fixture
def folders(tmp_path: Path) -> tuple[str, str]:
    for name, rows in (("sums", SUMS), ("products", PRODUCTS)):
        (tmp_path / name).mkdir()
        for split in ("train", "test"):
            lines = [json.dumps({"prompt": q, "answer": a}) for q, a in (rows if split == "train" else rows[:1])]
            (tmp_path / name / f"{split}.jsonl").write_text("\n".join(lines), encoding="utf-8")
    return str(tmp_path / "sums"), str(tmp_path / "products")


def mixture(folders: tuple[str, str], **more: Any) -> dict[str, Any]:
    parts = [{"name": f"file:{folder}", "format": "plain"} for folder in folders]
    return {"name": "mixture", "of": parts, **more}


def test_the_problems_of_all_train_and_those_of_the_first_judge(folders: tuple[str, str]) -> None:
    task = settle({"task": mixture(folders)}).task
    found = task.problems("train")
    assert [problem.question for problem in found] == [q for q, _ in (*SUMS, *PRODUCTS)]
    assert len({problem.id for problem in found}) == len(found)
    assert [problem.question for problem in task.problems("test")] == ["1+1="]
    assert found[-1].meta["part"] == 1
    assert task.score(found[-1], "8").value == 1
    assert task.score(found[0], "8").value == 0
    assert task.ask(found[-1])[-1]["content"].strip().startswith("2*4=")


def test_each_problem_is_asked_and_scored_by_its_own_task() -> None:
    of = [{"name": "multiplication"}, {"name": "multiplication", "digits": [3, 3], "prompt": "Work out {question}"}]
    task = settle({"task": {"name": "mixture", "of": of, "num": [2, 2]}}).task
    found = task.problems("train")
    assert [task.ask(p)[-1]["content"].startswith("Work out") for p in found] == [False, False, True, True]
    assert [task.solution(p) for p in found] == [task.of[i // 2].solution(p) for i, p in enumerate(found)]


def test_the_first_so_many_of_each(folders: tuple[str, str]) -> None:
    task = settle({"task": mixture(folders, num=[3, 1])}).task
    assert [problem.question for problem in task.problems("train")] == ["1+1=", "2+5=", "3+3=", "2*3="]


def test_a_run_goes_through_all_of_it_and_its_config_can_be_read_again(folders: tuple[str, str]) -> None:
    sampling = {"num_prompts": 6, "num_completions": 2, "max_new_tokens": 6}
    run = train({"task": mixture(folders), "sampling": sampling, "steps": 1, "out": "run"}, quiet=True)
    samples = [json.loads(line) for line in (run.folder / "samples.jsonl").read_text(encoding="utf-8").splitlines()]
    assert len({sample["problem"] for sample in samples}) == 6
    assert load(run.folder / "config.toml").task == run.config.task
    longer = train({"steps": 2}, resume=run.folder, quiet=True)
    assert [report.step for report in longer.reports] == [0, 1]


def test_an_overlap_is_found_in_every_part(folders: tuple[str, str]) -> None:
    task = settle({"task": mixture(folders)}).task
    found = overlap(task.of[1].problems("test"), task)
    assert found is not None
    assert found.shared == 1


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"of": ["svamp"]}, "two tasks or more"),
        ({"of": "svamp"}, "two tasks or more"),
        ({"of": ["svamp", "nothing"]}, "there is no such task.of"),
        ({"of": ["svamp", {"name": "gsm8k", "format": "plain"}]}, "in different ways"),
        ({"of": ["svamp", "gsm8k"], "num": [1]}, "there are 2 tasks"),
    ],
)
def test_what_cannot_be_mixed(changes: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        settle({"task": {"name": "mixture", **changes}})


def test_a_task_without_end_needs_a_number() -> None:
    task = settle({"task": {"name": "mixture", "of": ["multiplication", "multiplication"]}}).task
    with pytest.raises(ConfigError, match=r"task\.num"):
        task.problems("train")
