"""Generated word problems: every question of every story, the splits, and mixing them with a data set."""

from __future__ import annotations

import json
import operator
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random

import pytest

from shoestring.config.run import settle
from shoestring.evaluation.contamination import overlap
from shoestring.tasks.base import SPLITS
from shoestring.tasks.word_problems import WordProblems, split_of, tell
from shoestring.tasks.word_stories import STORIES, Story
from shoestring.types import Problem

OPERATORS: dict[str, Callable[[int, int], int]] = {
    "+": operator.add,
    "-": operator.sub,
    "*": operator.mul,
    "/": lambda a, b: a // b if a % b == 0 else -1,
}
EQUATION = re.compile(r"(\d+(?: [-+*/] \d+)+) = (\d+)")
SAID_IN_WORDS = {"dozen": 12, "days": 7, "twice": 2, "half": 2, "there and back": 2, "up and down": 2, "queue, with": 1}


def tellings(story: Story) -> Iterator[Problem]:
    """Each question after each body, a few times."""
    for body in story.bodies:
        for ask in story.asks:
            alone = Story(story.name, story.numbers, (body,), {ask: story.asks[ask]}, story.slots, story.where)
            yield from (tell(alone, ask, Random(seed)) for seed in range(6))


def work_out(left: str) -> int:
    """The value of "3 + 4 + 5", from the left; all its signs are the same."""
    first, *rest = left.split(" ")
    assert len(set(rest[::2])) == 1
    value = int(first)
    for sign, number in zip(rest[::2], rest[1::2], strict=True):
        value = OPERATORS[sign](value, int(number))
    return value


@pytest.mark.parametrize("story", STORIES, ids=lambda story: story.name)
def test_every_solution_is_right_and_uses_the_problems_numbers(story: Story) -> None:
    for problem in tellings(story):
        solution = problem.meta["solution"]
        *lines, last = solution.splitlines()
        equations = [found.groups() for line in lines for found in EQUATION.finditer(line)]
        assert 1 <= len(equations) <= 3, solution
        assert all(work_out(left) == int(right) > 0 for left, right in equations), solution
        assert last == f"#### {problem.answer}"
        assert equations[-1][1] == problem.answer
        known = {int(number) for number in re.findall(r"\d+", problem.question)}
        known |= {number for words, number in SAID_IN_WORDS.items() if words in problem.question}
        for left, right in equations:
            assert {int(number) for number in re.findall(r"\d+", left)} <= known, (problem.question, solution)
            known.add(int(right))
        if len(equations) > 1:
            assert equations[-2][1] in equations[-1][0].split(), "the last step builds on the one before"


@pytest.mark.parametrize("story", STORIES, ids=lambda story: story.name)
def test_every_text_is_whole_and_well_formed(story: Story) -> None:
    for problem in tellings(story):
        solution = problem.meta["solution"]
        assert problem.question.endswith("?")
        for text in (problem.question, solution):
            assert not re.search(
                r"[][{}()|_]|<|  | [.,?]|[.,?]{2}|[.,?][A-Za-z]|(?<!class )\b[Aa] [aeio]\w|\bNone\b", text
            ), text
            assert all(line[0].isupper() or line[0].isdigit() or line[0] == "#" for line in text.splitlines()), text
            assert not re.search(r"[.?] [a-z]", text), text
        assert all(int(number) >= 2 for number in re.findall(r"\d+", problem.question)), problem.question
        assert not re.search(r"= 1 (more |fewer )?\w+s\b(?<!bus)(?<!glass)", solution), solution
        assert solution.count("\n") <= 3


def test_there_are_many_stories_and_all_are_told() -> None:
    assert len(STORIES) == len({story.name for story in STORIES}) >= 60
    stream = WordProblems().problems("train")
    assert {stream[i].meta["story"] for i in range(2_000)} == {story.name for story in STORIES}


def test_one_body_is_asked_different_things() -> None:
    """In most stories more than one question follows the same text, and many texts hold a number that is not needed."""
    assert sum(len(story.asks) > 1 for story in STORIES) > len(STORIES) / 2
    stream = WordProblems().problems("train")
    spare = 0
    for i in range(1_000):
        needed = {number for left, _ in EQUATION.findall(stream[i].meta["solution"]) for number in left.split()}
        spare += bool(set(re.findall(r"\d+", stream[i].question)) - needed)
    assert 300 < spare < 800


def test_splits_share_no_problem_whatever_the_seeds() -> None:
    held_out = [{p.question for p in WordProblems(num_held_out=1_000).problems(split)} for split in SPLITS[1:]]
    assert [len(texts) for texts in held_out] == [1_000, 1_000]
    assert not held_out[0] & held_out[1]
    numbers = {tuple(sorted(re.findall(r"\d+", text))) for texts in held_out for text in texts}
    for seed in range(2):
        stream = WordProblems(seed=seed).problems("train")
        for i in range(3_000):
            text = stream[i].question
            assert tuple(sorted(re.findall(r"\d+", text))) not in numbers, text


def test_a_split_is_a_hash_of_the_numbers_alone() -> None:
    places = [split_of(f"{a} and {b}") for a in range(100) for b in range(a, 100)]
    assert 0.88 < places.count("train") / len(places) < 0.92
    assert 0.04 < places.count("test") / len(places) < 0.06
    assert all(split_of(f"{a} and {b}") == split_of(f"{b} of {a}") for a in range(30) for b in range(30))


def test_texts_hardly_repeat_and_the_seed_decides() -> None:
    first, again, other = (WordProblems(seed=seed).problems("train") for seed in (0, 0, 1))
    texts = [first[i].question for i in range(5_000)]
    assert len(set(texts)) > 4_950
    assert [again[i] for i in reversed(range(50))] == [first[i] for i in range(50)][::-1]
    assert len({other[i].question for i in range(500)} & set(texts)) < 5
    assert len(first) == 100_000
    with pytest.raises(IndexError):
        first[100_000]


def test_the_first_problem_stays_the_same() -> None:
    """Another Python or another machine draws it too."""
    problem = WordProblems().draw("train", 0)
    assert problem.question == (
        "Diego has 6 white and 30 black lilies. He ties them into bunches of 6. How many bunches does Diego get?"
    )
    assert problem.meta["solution"] == "Diego has 6 + 30 = 36 lilies.\nThey make 36 / 6 = 6 bunches.\n#### 6"


def test_a_right_answer_scores_and_a_wrong_one_does_not() -> None:
    task = WordProblems()
    for problem in task.problems("test")[:50]:
        solution = task.solution(problem)
        assert task.score(problem, solution).value == 1
        wrong = solution.replace(f"#### {problem.answer}", f"#### {int(problem.answer) + 1}")
        assert task.score(problem, wrong).value == 0


def test_they_mix_with_a_data_set(tmp_path: Path) -> None:
    for split in ("train", "test"):
        rows = [{"id": f"{split}{i}", "question": f"{split} {i}?", "answer": str(i)} for i in range(10)]
        (tmp_path / f"{split}.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    svamp = {"name": "svamp", "data": str(tmp_path), "validation": 2}
    task = settle({"task": {"name": "mixture", "of": [svamp, "word-problems"], "num": [5, 20]}}).task
    found = task.problems("train")
    assert len({problem.id for problem in found}) == len(found) == 25
    assert [problem.question for problem in found[5:]] == [WordProblems().draw("train", i).question for i in range(20)]
    sentence = task.ask(found[0])[-1]["content"].partition("\n")[2]
    assert "####" in sentence
    assert all(task.ask(problem)[-1]["content"] == f"{problem.question}\n{sentence}" for problem in found)
    assert all(task.score(problem, task.solution(problem)).value == 1 for problem in found[5:])
    assert [problem.question for problem in task.problems("test")] == [f"test {i}?" for i in range(10)]
    found_twice = overlap(task.problems("test"), task)
    assert found_twice is not None, "only what is read from files is compared"
    assert found_twice.shared == 0
