"""Arithmetic word problems of one to three steps, made from the stories of word_stories.py: problems without end, and
none shared between splits.

They are there to be mixed with small data sets of such problems, which a model soon knows by heart.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from random import Random
from typing import Any, Literal

from pydantic import Field

from shoestring import answers
from shoestring.hashing import stable_hash
from shoestring.tasks.base import Asking, check_split
from shoestring.tasks.generated import Stream, distinct
from shoestring.tasks.word_stories import PEOPLE, STORIES, Story
from shoestring.types import Problem, Score

Numbers = dict[str, int]

_CHOICE = re.compile(r"\(([^()|]*\|[^()]*)\)")  # (now|in all): one of these, each as likely
_STEP = re.compile(r"\[(?:(\w+): )?([^\]]+)\]")  # [n: a + b]: worked out, and remembered as n
_ONE = re.compile(r"= 1 ((?:more |fewer )?)(?:\{(\w+)\}|(\w+)s\b)")
_START = re.compile(r"(?m)(^|[.?!] )([a-z])")


class WordProblems(Asking):
    """Generated problems with worked solutions. Many hold more numbers than are needed: the question says which count.

    A problem's split is a hash of its numbers in ascending order and of nothing else, about 90 % train, 5 % validation
    and 5 % test, so no seed brings a problem of "test" into training, nor the same one told of other people. Item i of
    a split is drawn by a hash of (seed, split, i). "train" repeats itself as any random stream does, but rarely; the
    problems of the other two are distinct.
    """

    name: Literal["word-problems"] = "word-problems"
    prompt: str = "{question}\nThink step by step, then write the final answer as #### followed by the number."
    seed: int = 0
    """Which stream of problems is drawn. No seed moves a problem to another split."""
    num_train: int = Field(default=100_000, ge=1)
    """Length of the train split."""
    num_held_out: int = Field(default=300, ge=1)
    """Number of problems in "validation" and in "test"."""

    def problems(self, split: str) -> Sequence[Problem]:
        check_split(split)
        return Stream(self) if split == "train" else distinct(self, split)

    def draw(self, split: str, index: int) -> Problem:
        """Item `index` of the endless stream of `split`: the first problem of its own random numbers that belongs
        there."""
        random = Random(stable_hash("word-problems", self.seed, split, index))
        while True:
            story = random.choice(STORIES)
            problem = tell(story, random.choice(list(story.asks)), random)
            if split_of(problem.question) == split:
                return problem

    def score(self, problem: Problem, text: str) -> Score:
        right = float(answers.is_correct(text, problem.answer))
        return Score(right, {"correct": right})

    def vote(self, text: str) -> str | None:
        return answers.extract(text)

    def solution(self, problem: Problem) -> str:
        return problem.meta["solution"]


def split_of(text: str) -> str:
    """The split of a problem, from its sorted numbers alone.

    >>> split_of("Ann has 12 pens and 34 cups.") == split_of("34 of 12")
    True
    """
    place = stable_hash("word-problems", *sorted(map(int, re.findall(r"\d+", text)))) % 100
    return "train" if place < 90 else "validation" if place < 95 else "test"


def tell(story: Story, ask: str, random: Random) -> Problem:
    """The story with one of its questions, in words and numbers drawn at random."""
    body = _choose(f"{random.choice(story.bodies)} {ask}", random)
    solution = _choose(story.asks[ask], random)
    words = _words(story, random)
    while True:
        numbers = _numbers(story.numbers, random)
        worked = _work_out(solution, numbers)
        if worked and _fits(story, numbers):
            break
    lines, answer = worked
    question = _sentences(body, words | numbers)
    solved = _sentences(lines, words | numbers).replace(". ", ".\n") + f"\n#### {answer}"
    identity = f"word-problems-{stable_hash(question):016x}"
    return Problem(identity, question, str(answer), {"solution": solved, "story": story.name})


def _choose(text: str, random: Random) -> str:
    """One of the words for every (this|that); the inner ones first."""
    while found := _CHOICE.search(text):
        text = text[: found.start()] + random.choice(found[1].split("|")) + text[found.end() :]
    return text


def _words(story: Story, random: Random) -> dict[str, Any]:
    """Three people, and a word for each slot; slots with the same pool get different ones."""
    words: dict[str, Any] = dict(zip("ABC", random.sample(PEOPLE, 3), strict=True))
    for name, pool in story.slots.items():
        words[name] = random.choice([word for word in pool if word not in words.values()])
    return words


def _numbers(rules: str, random: Random) -> Numbers:
    """The numbers by their rules: `low..high`, or `low..high..top` once in ten times, or a formula of those before.

    >>> _numbers("a=3..9, b=4..6..700, c=a*b", Random(0))
    {'a': 6, 'b': 4, 'c': 24}
    """
    numbers: Numbers = {}
    large, small = random.random() < 0.1, random.random() < 0.45
    for rule in rules.split(", "):
        name, value = rule.split("=")
        if ".." not in value:
            numbers[name] = _value(value, numbers)
            continue
        low, high, *top = map(int, value.split(".."))
        high = top[0] if top and large else min(high, low + 9) if small else high
        numbers[name] = random.randint(low, high)
    return numbers


def _value(formula: str, numbers: Numbers) -> int:
    """Formulas are the stories' own, never a model's or a user's."""
    return eval(formula, {"__builtins__": {}}, numbers)


def _fits(story: Story, numbers: Numbers) -> bool:
    """Numbers of a story are two or more, so that its nouns can be in the plural."""
    return min(numbers.values()) >= 2 and bool(_value(story.where, numbers))


def _work_out(solution: str, numbers: Numbers) -> tuple[str, int] | None:
    """The solution with its steps worked out and the last one's result; None if a result is no whole number above 0.

    >>> _work_out("She has [n: a + b] pens. Each gets [n / 2] pens.", {"a": 3, "b": 5})
    ('She has 3 + 5 = 8 pens. Each gets 8 / 2 = 4 pens.', 4)
    """
    known, text, end, value = dict(numbers), "", 0, 0
    for step in _STEP.finditer(solution):
        exact = _value(step[2], known)
        value = int(exact)
        if value != exact or value < 1:
            return None
        shown = re.sub(r"[a-z]\w*", lambda name: str(known[name[0]]), step[2])
        text += f"{solution[end : step.start()]}{shown} = {value}"
        end = step.end()
        if step[1]:
            known[step[1]] = value
    return _ONE.sub(_singular, text + solution[end:]), value


def _singular(found: re.Match[str]) -> str:
    return f"= 1 {found[1]}" + (f"{{{found[2]}.one}}" if found[2] else found[3])


def _sentences(text: str, words: Mapping[str, Any]) -> str:
    """The text with its words and numbers in place, each sentence with a capital."""
    text = re.sub(r" {2,}", " ", text.format_map(words)).strip()
    return _START.sub(lambda found: found[1] + found[2].upper(), text)
