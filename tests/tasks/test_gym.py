import copy
import json
import os
import pickle
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from shoestring.config.settings import pick
from shoestring.errors import ConfigError, DataError
from shoestring.tasks import gym
from shoestring.tasks.gym import EXCLUDED, Gym, available, final_answer, split_of
from shoestring.types import Problem

SRC = str(Path(gym.__file__).parents[2])


def make(name: str, **settings: Any) -> Gym:
    return pick({"gym": Gym}, "task", {"name": f"gym:{name}", **settings})


def run(code: str, **environment: str) -> str:
    env = {**os.environ, "PYTHONPATH": SRC, **environment}
    return subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True).stdout


def test_final_answer():
    assert final_answer("<answer>1</answer> no, <answer>\n2 \n</answer> done") == "2"
    assert final_answer("<answer>draft <answer>3</answer>") == "3"
    assert final_answer("<answer>4</answer> and <answer>cut o") == "4"
    assert final_answer("#### 1\n#### 5\n") == "5"
    assert final_answer(r"\boxed{1}, so \boxed{\frac{1}{2}}.") == r"\frac{1}{2}"
    assert final_answer(r"cut off \boxed{\frac{1}{2") == r"cut off \boxed{\frac{1}{2"
    assert final_answer(" 7\n") == "7"
    assert final_answer("") == ""


def test_import_and_listing_need_no_extra():
    code = "import sys; from shoestring.tasks import gym; print('reasoning_gym' in sys.modules)"
    assert run(code).split() == ["False"]
    blocked = "import sys; sys.modules['reasoning_gym'] = None\nfrom shoestring.tasks.gym import Gym, available\n"
    try_it = "try: Gym(name='gym:gcd')\nexcept ValueError as error: print(error)"
    assert 'pip install "shoestring[gym]"' in run(blocked + "print(available())\n" + try_it)


pytest.importorskip("reasoning_gym", reason='these tests make problems: pip install "shoestring[gym]"')
from reasoning_gym.factory import DATASETS, create_dataset  # noqa: E402

NONSENSE = [
    "",
    " ",
    "<answer></answer>",
    "<answer>",
    "\x00\ud800",
    "(" * 300,
    "[[1, 2], [",
    '{"a": ',
    "None",
    "-1e999",
    "a,b\n1",
]


def test_every_generator_is_available_or_excluded():
    assert set(available()) | set(EXCLUDED) == set(DATASETS)
    assert not set(available()) & set(EXCLUDED)
    assert set(DATASETS) >= gym.READABLE.keys() | gym.BUILT_ONCE


@pytest.mark.parametrize("name", available())
def test_contract(name: str):
    task, later = make(name), make(name)
    problems = task.problems("train")
    first, second, test = problems[0], problems[1], task.problems("test")[0]
    gym._make.cache_clear()
    random.seed(7)
    np.random.seed(7)
    before = random.getstate(), str(np.random.get_state())
    again = later.problems("train")[1], later.problems("train")[0]  # the other way round, and with nothing kept
    assert before == (random.getstate(), str(np.random.get_state()))
    assert [p.question for p in again] == [second.question, first.question]
    assert split_of(first.question) == split_of(second.question) == "train"
    assert split_of(test.question) == "test"
    assert task.ask(first)[-1]["content"].startswith(first.question)
    for problem in (again[1], test):
        saved = Problem(**json.loads(json.dumps(vars(problem))))
        assert task.score(saved, f"So it is <answer>{problem.answer}</answer>").parts == {"solved": 1.0}
        assert task.score(saved, problem.answer[: len(problem.answer) // 2]).value <= 1.0
        for text in NONSENSE:
            assert 0.0 <= task.score(saved, text).value <= 1.0


def test_splits_are_disjoint_whatever_the_seed():
    questions = {}
    for split in ("train", "validation", "test"):
        streams = [make("gcd", seed=seed, options={"max_value": 9}).problems(split)[:60] for seed in (0, 1)]
        questions[split] = {problem.question for stream in streams for problem in stream}
    assert not questions["train"] & questions["test"]
    assert not questions["train"] & questions["validation"]
    assert not questions["validation"] & questions["test"]


def test_seeds_share_no_stream():
    one, two = ({p.question for p in make("chain_sum", seed=s).problems("train")[:200]} for s in (42, 43))
    assert len(one & two) < 4
    assert len(one) > 195


def test_problems_are_a_lazy_sequence():
    problems = make("chain_sum", num_train=10**9).problems("train")
    assert len(problems) == 10**9
    assert problems[-1] == problems[10**9 - 1] == problems[-2:][1]
    assert problems[7].id == "chain_sum-train-7"
    assert [len(make("gcd", num_test=4, num_validation=5).problems(s)) for s in ("test", "validation")] == [4, 5]
    with pytest.raises(IndexError):
        problems[10**9]
    with pytest.raises(ConfigError, match='split is "dev"'):
        make("gcd").problems("dev")
    task = pickle.loads(pickle.dumps(make("gcd")))
    assert copy.deepcopy(task).problems("test")[0] == task.problems("test")[0]


@pytest.mark.parametrize("name", sorted(gym.BUILT_ONCE))
def test_what_is_built_once_makes_what_a_new_one_makes(name: str):
    source = make(name).source
    for seed in (3, 5):
        fresh = gym._build(source, seed)[0]
        entry = gym._entry(source, seed)
        assert (entry["question"], entry["metadata"]) == (fresh["question"], fresh["metadata"])


def test_partial_credit_is_kept_and_is_not_solved():
    task = make("countdown")
    problem = task.problems("train")[0]
    near = task.score(problem, "<answer>1 + 1</answer>")
    assert 0 < near.value < 0.1
    assert near.parts == {"solved": 0.0}


@pytest.mark.parametrize("name", sorted(gym.READABLE))
def test_an_answer_is_never_run_as_a_program(name: str, tmp_path: Path):
    task, mark = make(name), tmp_path / "ran"
    problem = task.problems("train")[0]
    for text in (f"__import__('pathlib').Path({str(mark)!r}).touch()", "9**9**9**9**9", "9" * 5000, "1 +" * 5000):
        assert task.score(problem, f"<answer>{text}</answer>").value < 0.1
    assert not mark.exists()


@pytest.mark.parametrize("name", sorted(gym.READABLE))
def test_lists_and_sums_are_still_read(name: str):
    task = make(name)
    for problem in task.problems("train")[:3]:
        rows = [line.split() for line in problem.answer.splitlines()]
        text = {"string_insertion": str(list(problem.answer)), "spiral_matrix": str(rows[0])}.get(name, str(rows))
        if gym.READABLE[name] is gym._SUMS:
            text = f"( {problem.answer} )"
        assert task.score(problem, f"<answer>{text}</answer>").value >= 0.1


def test_vote():
    task = make("gcd")
    assert task.vote("I say <answer> 1  2\n3 </answer>") == task.vote("1 2 3") == "1 2 3"
    assert task.vote("<answer></answer>") is None
    assert task.solution(task.problems("train")[0]) is None


def test_excluded_for_the_stated_reason():
    for name, why in EXCLUDED.items():
        if "no reference answer" in why:
            assert create_dataset(name, seed=1, size=1)[0]["answer"] is None
    with pytest.raises(AssertionError):
        create_dataset("composite", seed=1, size=1)


def test_excluded_scorers_run_the_text(tmp_path: Path):
    for name in (name for name, why in EXCLUDED.items() if "runs the completion's text" in why):
        mark = tmp_path / name
        generator = create_dataset(name, seed=1, size=1)
        generator.score_answer(f"__import__('pathlib').Path({str(mark)!r}).touch()", generator[0])
        assert mark.exists()


def test_hash_seeds_change_only_the_excluded():
    code = """from reasoning_gym.factory import create_dataset
for name in {!r}:
    print(create_dataset(name, seed=1, size=1)[0]["question"].encode().hex())"""
    hashed = [name for name, why in EXCLUDED.items() if "hash seed" in why]
    kept = ["word_ladder", "group_anagrams", "family_relationships", "needle_haystack"]
    one, two = (run(code.format(hashed + kept), PYTHONHASHSEED=seed).split() for seed in "12")
    assert all(a != b for a, b in zip(one[: len(hashed)], two, strict=False))
    assert one[len(hashed) :] == two[len(hashed) :]


def test_errors():
    with pytest.raises(ConfigError, match=r'no generator "chain_sums"; did you mean "chain_sum"'):
        make("chain_sums")
    with pytest.raises(ConfigError, match="rush_hour is left out, for it states no reference answer"):
        make("rush_hour")
    with pytest.raises(ConfigError, match="does not name a generator"):
        make("")
    with pytest.raises(ConfigError, match=r'"max_term"; .*; did you mean "max_terms"'):
        make("chain_sum", options={"max_term": 3})
    with pytest.raises(ConfigError, match='"seed"; it is not the generator'):
        make("chain_sum", options={"seed": 3})
    with pytest.raises(ConfigError, match="max_terms must be >= min_terms"):
        make("chain_sum", options={"min_terms": 5, "max_terms": 2})
    with pytest.raises(ConfigError, match="refuses them"):
        make("chain_sum", options={"min_terms": "two"})


def test_a_split_that_cannot_be_filled():
    task = make("count_bits", options={"min_n": 5, "max_n": 5})
    only = gym._entry(task.source, 0)["question"]
    for split in ("train", "validation", "test"):
        if split == split_of(only):
            assert {problem.question for problem in task.problems(split)[:3]} == {only}
        else:
            with pytest.raises(
                DataError, match=rf"no problem 0 for split {split}; none of 150 tries .*; choose options"
            ):
                task.problems(split)[0]


def test_a_problem_of_other_options_is_refused():
    problem = make("chain_sum").problems("train")[0]
    with pytest.raises(DataError, match="is not the one that gym:chain_sum makes now"):
        make("chain_sum", seed=1).score(problem, "1")
