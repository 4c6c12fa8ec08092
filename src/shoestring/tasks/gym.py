"""Problems made by reasoning-gym's generators, without any data: `name = "gym:chain_sum"` (the extra `gym`).

What is ours is where the problems come from. A data set of reasoning-gym makes item i from seed + i, so those of seeds
42 and 43 share all items but one. Here problem i of a split is made from a hash of (generator, seed, split, i), and a
hash of its text says to which split it belongs: one in five texts is test, one in five validation, the rest train. A
problem made for another split is thrown away and made again, so no text is in two splits, whatever their seeds. Within
a split texts may repeat, as they must in a small space.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import random
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import lru_cache
from importlib.util import find_spec
from typing import Any, overload

from pydantic import Field

from shoestring.errors import ConfigError, DataError, nearest
from shoestring.hashing import stable_hash
from shoestring.tasks.base import Asking, check_split
from shoestring.types import Problem, Score

EXCLUDED: dict[str, str] = {
    "boxnet": "it states no reference answer",
    "codeio": "it makes problems by running the programs of its data file, which need packages of their own",
    "composite": "it mixes other generators and makes nothing by itself",
    "graph_color": "it states no reference answer",
    "intermediate_integration": "its scorer runs the completion's text as Python code",
    "isomorphic_strings": "its problems change with Python's hash seed, so no run can be repeated",
    "polynomial_multiplication": "its problems change with Python's hash seed, so no run can be repeated",
    "propositional_logic": "it states no reference answer",
    "ransom_note": "its problems change with Python's hash seed, so no run can be repeated",
    "rubiks_cube": "it states no reference answer",
    "rush_hour": "it states no reference answer",
    "simple_integration": "its scorer runs the completion's text as Python code",
}
"""The generators that are left out, and why."""

_LISTS = re.compile(r"[A-Z0-9_\[\]\s,'\"]*")
_SUMS = re.compile(r"(?!.*\*\*)[0-9+\-*/().\s]{0,500}", re.DOTALL)

READABLE: dict[str, re.Pattern[str]] = {
    "binary_matrix": _LISTS,
    "countdown": _SUMS,
    "n_queens": _LISTS,
    "puzzle24": _SUMS,
    "spiral_matrix": _LISTS,
    "string_insertion": _LISTS,
}
"""These scorers evaluate the answer as Python, so they see only texts that cannot call a function or raise a power."""

BUILT_ONCE = frozenset({"arc_agi", "figlet_font", "group_anagrams", "spell_backward", "word_ladder"})
"""Their construction reads a large file and does not look at the seed; the others are built anew for each problem, for
some draw from their seed while they are built."""

MAX_TRIES = 150
"""A split that holds a fifth of the texts is missed so often in a row once in 3e14 problems."""


class Gym(Asking):
    """One generator of reasoning-gym, its options, and how many problems each split has."""

    prompt: str = "{question}\n\nWrite the final answer, and nothing else, between <answer> and </answer>."
    name: str
    """The generator, after "gym:"."""
    seed: int = 0
    """Which problems are made. No seed moves a text to another split."""
    num_train: int = Field(default=10_000, ge=1)
    num_validation: int = Field(default=300, ge=1)
    num_test: int = Field(default=300, ge=1)
    options: dict[str, Any] = Field(default_factory=dict)
    """The generator's own settings; what is not set keeps the generator's default."""

    def model_post_init(self, context: Any) -> None:
        super().model_post_init(context)
        _check_name(self.name, self.generator)
        _check_options(self.generator, self.options)

    @property
    def generator(self) -> str:
        return self.name.partition(":")[2]

    @property
    def source(self) -> Source:
        return Source(self.generator, json.dumps(self.options, sort_keys=True))

    def problems(self, split: str) -> Sequence[Problem]:
        """The split's problems, each made when it is asked for."""
        check_split(split)
        return Problems(self, split, {"train": self.num_train, "test": self.num_test}.get(split, self.num_validation))

    def score(self, problem: Problem, text: str) -> Score:
        """The generator's own score of the final answer, in [0, 1]; some generators give part of it for a near miss."""
        made, entry = _make(self.source, self.seed, problem.meta["split"], problem.meta["index"])
        if made.question != problem.question:
            raise DataError(
                f"problem {problem.id} is not the one that {self.name} makes now",
                "the options, the seed or the version of reasoning-gym changed since it was made",
                "start a new run",
            )
        value = _judge(self.source, final_answer(text), entry)
        return Score(value, {"solved": float(value == 1.0)})

    def vote(self, text: str) -> str | None:
        return " ".join(final_answer(text).split()) or None

    def solution(self, problem: Problem) -> str | None:
        return None


@dataclasses.dataclass(frozen=True)
class Source:
    """A generator and its options, which are JSON so that this can be the key of a cache."""

    generator: str
    options: str


@dataclasses.dataclass(frozen=True)
class Problems(Sequence[Problem]):
    """A split's problems. They can be had in any order: each is made from its own place alone."""

    gym: Gym
    split: str
    size: int

    def __len__(self) -> int:
        return self.size

    @overload
    def __getitem__(self, index: int) -> Problem: ...
    @overload
    def __getitem__(self, index: slice) -> list[Problem]: ...
    def __getitem__(self, index: int | slice) -> Problem | list[Problem]:
        places = range(self.size)[index]
        if isinstance(places, range):
            return [self[i] for i in places]
        return _make(self.gym.source, self.gym.seed, self.split, places)[0]


def available() -> list[str]:
    """The generators that can follow "gym:"; none if the extra is not installed."""
    return sorted(_generators().keys() - EXCLUDED.keys()) if find_spec("reasoning_gym") else []


def final_answer(text: str) -> str:
    r"""What the last <answer> mark holds; else what follows the last "#### "; else the last \boxed{}; else the text.

    >>> final_answer("3 <answer>4</answer>"), final_answer("so\n#### 4"), final_answer(r"is \boxed{4}")
    ('4', '4', '4')
    """
    end = text.rfind("</answer>")
    start = text.rfind("<answer>", 0, end) if end >= 0 else -1
    if start >= 0:
        return text[start + len("<answer>") : end].strip()
    if "#### " in text:
        return text.rpartition("#### ")[2].strip()
    return (_boxed(text) or text).strip()


def split_of(question: str) -> str:
    """The split to which a problem's text belongs."""
    return {0: "test", 1: "validation"}.get(stable_hash("split", question) % 5, "train")


def _boxed(text: str) -> str | None:
    _, mark, rest = text.rpartition(r"\boxed{")
    depth = 1
    for i, letter in enumerate(rest if mark else ""):
        depth += (letter == "{") - (letter == "}")
        if depth == 0:
            return rest[:i]
    return None


@lru_cache(maxsize=4096)
def _make(source: Source, seed: int, split: str, index: int) -> tuple[Problem, dict[str, Any]]:
    """Problem `index` of the split, and the generator's entry, which its scorer wants to see."""
    fault = f"none of {MAX_TRIES} tries gave a problem for this split whose own answer scores 1"
    for attempt in range(MAX_TRIES):
        try:
            entry = _entry(source, stable_hash(source.generator, seed, split, index, attempt) % 2**31)
        except Exception as error:  # some generators give up on some seeds, each with an exception of its own
            fault = f"{type(error).__name__}: {error}"
            continue
        # Rarely, an item's own answer is empty or wrong; it would teach that nothing is right.
        if split_of(entry["question"]) == split and _judge(source, entry["answer"].strip(), entry) == 1.0:
            name = f"{source.generator}-{split}-{index}"
            return Problem(name, entry["question"], entry["answer"], {"split": split, "index": index}), entry
    raise DataError(
        f"gym:{source.generator} with options {source.options} has no problem {index} for split {split}",
        fault,
        "choose options under which it can make more problems",
    )


def _entry(source: Source, seed: int) -> dict[str, Any]:
    with _global_randomness(seed):
        if source.generator in BUILT_ONCE:
            generator = copy.copy(_shared(source))
            generator.seed = seed
        else:
            generator = _build(source, seed)
        return generator[0]


def _judge(source: Source, answer: str, entry: Mapping[str, Any]) -> float:
    readable = READABLE.get(source.generator)
    seen = answer if answer and (readable is None or readable.fullmatch(answer)) else None
    try:
        value = float(_shared(source).score_answer(seen, entry))
    except Exception:  # some scorers trip over odd texts; that they know a right one was seen when it was made
        return 0.0
    return min(1.0, max(0.0, value))


@lru_cache(maxsize=128)
def _shared(source: Source) -> Any:
    """A generator to score with, which does not depend on the seed."""
    return _build(source, 0)


def _build(source: Source, seed: int) -> Any:
    from reasoning_gym.factory import create_dataset

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)  # arc_agi leaves its data file open
        return create_dataset(source.generator, seed=seed, size=1, **json.loads(source.options))


@contextmanager
def _global_randomness(seed: int) -> Iterator[None]:
    """Python's and NumPy's global generators seeded inside and as before outside: some generators draw from them."""
    import numpy as np

    before = random.getstate(), np.random.get_state()
    random.seed(seed)
    np.random.seed(seed)
    try:
        yield
    finally:
        random.setstate(before[0])
        np.random.set_state(before[1])


def _generators() -> dict[str, Any]:
    """Generator name -> (class, config class), which importing reasoning-gym (a second or two) fills."""
    try:
        from reasoning_gym.factory import DATASETS
    except ImportError as error:
        raise ConfigError(
            "the task is one of reasoning-gym's", f"it cannot be imported ({error})", 'pip install "shoestring[gym]"'
        ) from error
    return DATASETS


def _check_name(name: str, generator: str) -> None:
    given = f'task.name is "{name}"'
    if generator in EXCLUDED:
        raise ConfigError(given, f"{generator} is left out, for {EXCLUDED[generator]}", "use another generator")
    if generator not in _generators():
        why = f'reasoning-gym has no generator "{generator}"' if generator else "it does not name a generator"
        raise ConfigError(given, why, nearest(generator, available()))


def _check_options(generator: str, options: dict[str, Any]) -> None:
    known = {field.name for field in dataclasses.fields(_generators()[generator][1])} - {"seed", "size"}
    for option in options:
        if option not in known:
            why = (
                f"{generator} has no such option"
                if option not in ("seed", "size")
                else "it is not the generator's here"
            )
            raise ConfigError(f'task.options has "{option}"', why, nearest(option, known))
    try:
        _build(Source(generator, json.dumps(options)), 0)
    except Exception as error:  # the generators check with assert, and what else goes wrong depends on the value
        why = f"{generator} refuses them ({type(error).__name__}: {error})"
        raise ConfigError(
            f"task.options is {options!r}", why, "see the generator's config class for what it takes"
        ) from error
