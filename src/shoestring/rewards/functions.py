"""A user's own reward functions, under the contract of TRL 1.16's `GRPOTrainer`: a function written for it works here.

A function is called once a step, for all completions of all groups, with keyword arguments only:

- `prompts` (message lists), `completions` ([{"role": "assistant", "content": text}] each) and `completion_ids`;
- every column of the data rows as a list, None where a row lacks it, and always `answer` (the row's own column of that
  name if it has one, else the task's reference);
- `trainer_state`, `log_extra(column, values)` and `log_metric(name, value)`.

It is a plain or an async function and returns a float or None for each completion; None means that the function has
nothing to say about it. Left out of the contract: reward models, and TRL's environments.
"""

from __future__ import annotations

import asyncio
import atexit
import functools
import inspect
import math
import threading
import traceback
from collections import defaultdict
from collections.abc import Coroutine, Mapping, Sequence
from typing import Any

from shoestring.config import dotted
from shoestring.errors import ConfigError, DataError
from shoestring.model.chat import plain_text
from shoestring.rewards.base import Judged, RewardFunction, Row, Scored, TrainerState
from shoestring.tasks.base import Task, has_answers, parts
from shoestring.types import Problem, Score

RESERVED = {
    "prompt",
    "prompts",
    "completion",
    "completions",
    "completion_ids",
    "trainer_state",
    "log_extra",
    "log_metric",
}
"""Data columns of these names are not passed: the names are taken."""


_PARTS = ("correct", "solved")
"""What a task calls the parts of its own score, by which the share of solved problems is counted."""


def check_task(functions: Sequence[str], task: Task) -> None:
    """Raises `ConfigError` if the task's own score is among the rewards of one that has no answers."""
    if "task" in functions and not all(map(has_answers, parts(task))):
        raise ConfigError(
            'task.check is "none"',
            '"task" is among the rewards, and it has nothing to compare answers with',
            'write task.check = "math" or "text", or give rewards of your own',
        )


class Rewards:
    """Reward functions and their weights. A string is a function's place ("package.module:function"), or "task": the
    task's own scorer.

    >>> def short(completions, **others):
    ...     return [1.0 if len(completion[0]["content"]) < 20 else 0.0 for completion in completions]
    >>> Rewards(["task", short], weights=[1.0, 0.2]).names
    ('task', 'short')
    """

    def __init__(self, functions: Sequence[RewardFunction | str], weights: Sequence[float] | None = None):
        if not functions:
            raise ConfigError("rewards is empty", "nothing would be rewarded", 'name a function, or "task"')
        if weights is not None and len(weights) != len(functions):
            raise ConfigError(
                f"there are {len(weights)} reward weights for {len(functions)} reward functions",
                "each function's reward is multiplied by its own weight",
                f"write {len(functions)} weights, or none for 1.0 each",
            )
        self.given = tuple(functions)
        self.functions = tuple(load(f) if isinstance(f, str) and f != "task" else f for f in functions)
        self.weights = tuple(map(float, weights)) if weights is not None else (1.0,) * len(functions)
        own = _PARTS if "task" in self.functions else ()
        self.names = _unique([f if isinstance(f, str) else _unwrapped_name(f) for f in self.functions], own)

    def score(self, task: Task, rows: Sequence[Row], state: TrainerState) -> Scored:
        """Scores all completions of a step.

        `value` is the weighted sum over the functions that did not return None. `parts` has the unweighted reward of
        each of these by its name, and with "task" also the parts that the task itself reports.

        A completion that every function passed over gets the mean value of its problem's other completions, or 0.0 if
        they have none either, so that every reward is a number. It teaches nothing
        (`shoestring.training.credit`). In a step that has such completions the part "unscored" says which they are.
        """
        return self.weigh(rows, self.judge(task, rows, state)) if rows else Scored([])

    def judge(self, task: Task, rows: Sequence[Row], state: TrainerState) -> Judged:
        """Calls each function once, for all of the rows."""
        own = [task.score(row.problem, row.text) for row in rows] if "task" in self.functions else []
        calls = [_Call(name, task, rows, state) for name in self.names]
        rewards: dict[str, list[float | None]] = {}
        for function, call in zip(self.functions, calls, strict=True):
            if isinstance(function, str):
                rewards[call.name] = [score.value for score in own]
            elif not _is_async(function):
                rewards[call.name] = call.run(function)
        late = [(f, call) for f, call in zip(self.functions, calls, strict=True) if call.name not in rewards]
        results = _wait([call.run_async(function) for function, call in late])
        rewards |= {call.name: result for (_, call), result in zip(late, results, strict=True)}
        parts = [dict(score.parts) for score in own] or [{} for _ in rows]
        return Judged(rewards, parts, _metrics(calls), _columns(calls))

    def weigh(self, rows: Sequence[Row], judged: Judged, timed_out: Sequence[str] = ()) -> Scored:
        """The scores of a step's rows from what the functions said of them."""
        metrics = {name: _mean(logged) for name, logged in judged.metrics.items()}
        return Scored(self._scores(rows, judged), metrics, _named(judged.columns), timed_out)

    def _scores(self, rows: Sequence[Row], judged: Judged) -> list[Score]:
        """Adds the functions' rewards to each row's parts, and their weighted sum."""
        rewards, parts = judged.rewards, [dict(part) for part in judged.parts]
        values: list[float | None] = []
        of_problem: dict[str, list[float]] = defaultdict(list)
        for i, row in enumerate(rows):
            given = {name: reward for name in self.names if (reward := rewards[name][i]) is not None}
            parts[i] |= given
            value = sum(w * given[name] for name, w in zip(self.names, self.weights, strict=True) if name in given)
            values.append(value if given else None)
            of_problem[row.problem.id] += [value] if given else []
        if None in values:
            parts = [{**part, "unscored": float(value is None)} for part, value in zip(parts, values, strict=True)]
        means = {problem: _mean(scored) for problem, scored in of_problem.items()}
        filled = [means[row.problem.id] if v is None else v for row, v in zip(rows, values, strict=True)]
        return [Score(value, part) for value, part in zip(filled, parts, strict=True)]


class _Call:
    """One function's call in one step: its arguments, what it logs, and the check of what it returns."""

    def __init__(self, name: str, task: Task, rows: Sequence[Row], state: TrainerState):
        self.name, self.task, self.rows, self.state = name, task, rows, state
        self.extra: dict[str, list[Any]] = defaultdict(list)
        self.metrics: dict[str, list[float]] = defaultdict(list)

    def run(self, function: RewardFunction) -> list[float | None]:
        try:
            result = function(**self._arguments())
        except Exception as error:
            raise self._raised(error) from error
        return self._checked(result)

    async def run_async(self, function: Any) -> list[float | None]:
        try:
            result = await function(**self._arguments())
        except Exception as error:
            raise self._raised(error) from error
        return self._checked(result)

    def _arguments(self) -> dict[str, Any]:
        """Made anew for each function, so that one that changes its lists does not change another's.

        A task that asks in plain text passes plain text, one that asks in messages passes messages, as TRL does.
        """
        rows, plain = self.rows, self.task.format == "plain"
        return {
            **columns([row.problem for row in self.rows]),
            "prompts": [
                plain_text(self.task.ask(row.problem)) if plain else self.task.ask(row.problem) for row in rows
            ],
            "completions": [row.text if plain else [{"role": "assistant", "content": row.text}] for row in rows],
            "completion_ids": [list(row.completion_ids) for row in self.rows],
            "trainer_state": self.state,
            "log_extra": lambda column, values: self.extra[column].extend(values),
            "log_metric": lambda name, value: self.metrics[name].append(float(value)),
        }

    def _checked(self, result: Any) -> list[float | None]:
        try:
            values = list(result)
        except TypeError:
            raise self._wrong(f"returned {result!r}") from None
        if len(values) != len(self.rows):
            raise self._wrong(f"returned {len(values)} values for {len(self.rows)} completions")
        for column, logged in self.extra.items():
            if len(logged) != len(self.rows):
                what = f"logged {len(logged)} values in column {column} for {len(self.rows)} completions"
                why = "the column has one place for each completion"
                write = "give log_extra a list with one value per completion"
                raise DataError(f"reward function {self.name} {what}", why, write)
        return [self._number(i, value) for i, value in enumerate(values)]

    def _number(self, i: int, value: Any) -> float | None:
        if value is None:
            return None
        try:
            number = math.nan if isinstance(value, str | bytes) else float(value)
        except (TypeError, ValueError, RuntimeError):  # RuntimeError: a tensor of several numbers
            number = math.nan
        if not math.isfinite(number):
            raise self._wrong(f"returned {value!r} for row {i}, problem {self.rows[i].problem.id}")
        return number

    def _wrong(self, what: str) -> DataError:
        return DataError(
            f"reward function {self.name} {what}",
            "each completion needs one finite number",
            "return a list with one float or None per completion",
        )

    def _raised(self, error: Exception) -> DataError:
        ids = list(dict.fromkeys(row.problem.id for row in self.rows))
        return DataError(
            f"reward function {self.name} raised {type(error).__name__}: {error}{_place(error)}",
            f"it was scoring problem {', '.join(ids[:3])}" + (f" and {len(ids) - 3} more" if len(ids) > 3 else ""),
            "fix the function, or let it return None for the rows that it cannot score",
        )


def _place(error: Exception) -> str:
    """Where in the function's own file it was raised."""
    frames = traceback.extract_tb(error.__traceback__)[1:]  # without the call of it
    inside = [frame for frame in frames if frame.filename == frames[0].filename]
    return f" ({inside[-1].filename}, line {inside[-1].lineno})" if inside else ""


def columns(problems: Sequence[Problem]) -> dict[str, list[Any]]:
    """The data columns of the problems' rows, one value a problem.

    >>> columns([Problem("1", "2*3=", "6", {"columns": {"level": 1}}), Problem("2", "2*4=", "8")])
    {'answer': ['6', '8'], 'level': [1, None]}
    """
    rows = [{"answer": problem.answer or None, **problem.meta.get("columns", {})} for problem in problems]
    names = dict.fromkeys(name for row in rows for name in row if name not in RESERVED)
    return {name: [row.get(name) for row in rows] for name in names}


def load(path: str) -> RewardFunction:
    """The function at "package.module:function" or "package.module.function"."""
    return dotted.load(path, f'reward function is "{path}"', 'write "package.module:function"')


def _unwrapped(function: RewardFunction) -> RewardFunction:
    while isinstance(function, functools.partial):
        function = function.func
    return function


def _unwrapped_name(function: RewardFunction) -> str:
    function = _unwrapped(function)
    return getattr(function, "__name__", type(function).__name__)


def _unique(names: Sequence[str], taken: Sequence[str] = ()) -> tuple[str, ...]:
    """The names, with the second of a kind called "name-2" and so on: a part of a score needs a name of its own."""
    found: list[str] = []
    for name in names:
        count = 1
        while (new := name if count == 1 else f"{name}-{count}") in (*taken, *found):
            count += 1
        found.append(new)
    return tuple(found)


def _is_async(function: RewardFunction) -> bool:
    function = _unwrapped(function)
    return inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(type(function).__call__)


def _metrics(calls: Sequence[_Call]) -> dict[str, list[float]]:
    """What all calls of `log_metric` gave, by name."""
    values: dict[str, list[float]] = defaultdict(list)
    for call in calls:
        for name, logged in call.metrics.items():
            values[name] += logged
    return dict(values)


def _columns(calls: Sequence[_Call]) -> dict[tuple[str, str], list[Any]]:
    return {(call.name, column): values for call in calls for column, values in call.extra.items()}


def _named(columns: Mapping[tuple[str, str], list[Any]]) -> dict[str, list[Any]]:
    """The logged columns; where two functions log one name, the second's is called "function/column"."""
    found: dict[str, list[Any]] = {}
    for (function, column), values in columns.items():
        found[f"{function}/{column}" if column in found else column] = values
    return found


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else 0.0


def _wait(coroutines: Sequence[Coroutine[Any, Any, list[float | None]]]) -> list[list[float | None]]:
    """Runs them side by side, as TRL does: most of them wait for a server."""

    async def gather() -> list[list[float | None]]:
        return await asyncio.gather(*coroutines)

    return asyncio.run_coroutine_threadsafe(gather(), _loop()).result() if coroutines else []


@functools.cache
def _loop() -> asyncio.AbstractEventLoop:
    """One event loop in a thread for the whole run. So it does not matter whether the caller is inside a loop (a
    notebook is), and a client that a function keeps from step to step still has its loop.
    """
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, name="rewards", daemon=True)
    thread.start()

    def close() -> None:
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()

    atexit.register(close)
    return loop
