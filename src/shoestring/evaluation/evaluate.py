"""Accuracy, pass@k and maj@k on a split, or the mean reward, with 95 % intervals."""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from shoestring.errors import ConfigError, DataError
from shoestring.model.policy import Policy
from shoestring.rewards.functions import Scored
from shoestring.rollout.rollout import Rollout, encode, roll_out
from shoestring.samplers.base import Engine, Sampling
from shoestring.tasks.base import Task, has_answers, parts, stable_hash
from shoestring.types import Problem

_Z95 = 1.959963984540054
_RESAMPLES = 2_000
_GREEDY = ("accuracy", "low", "high", "truncated", "tokens")

Interval = tuple[float, float]


@dataclass(frozen=True)
class EvalSettings:
    """What an evaluation does. `ks` are the k of pass@k and maj@k; `samples` completions of each problem (None: max
    k)."""

    split: str = "test"
    num: int | None = None
    ks: tuple[int, ...] = (1,)
    samples: int | None = None
    temperature: float | None = None
    max_new_tokens: int = 256
    top_p: float = 1.0
    seed: int = 0
    batch_rows: int = 256
    """Completions sampled at once."""
    allow_truncated_prompts: bool = False
    greedy: bool = False
    """Beside sampled completions, the accuracy of one greedy completion of each problem."""

    @property
    def num_samples(self) -> int:
        return self.samples or max(self.ks)

    @property
    def settled_temperature(self) -> float:
        """Greedy for one completion a problem, else 1."""
        return self.temperature if self.temperature is not None else (0.0 if self.num_samples == 1 else 1.0)

    def check(self) -> None:
        """Raises `ConfigError` for what cannot be evaluated."""
        for name in ("num", "max_new_tokens", "batch_rows", "samples"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{name} is {value}", "it counts something", "use 1 or more")
        if self.temperature is not None and self.temperature < 0:
            raise ConfigError(f"temperature is {self.temperature}", "it divides the logits", "use 0 (greedy) or more")
        if not self.ks or min(self.ks) < 1:
            raise ConfigError(
                f"k is {list(self.ks)}", "pass@k needs at least one completion", "use 1 or more, as in 1,4,16"
            )
        if self.num_samples < max(self.ks):
            raise ConfigError(
                f"samples is {self.samples} and the largest k {max(self.ks)}",
                "pass@k needs k completions",
                f"use at least {max(self.ks)} samples",
            )
        if self.num_samples > 1 and self.settled_temperature == 0:
            raise ConfigError(
                f"temperature is 0 with {self.num_samples} completions of a problem",
                "greedy completions are all the same",
                "use a temperature above 0, or k = 1",
            )


@dataclass(frozen=True)
class Evaluation:
    """The figures, and `outcomes`: how many of each problem's completions solved it, by problem id."""

    task: str
    split: str
    problems: int
    accuracy: float
    low: float
    high: float
    pass_at_k: dict[int, tuple[float, Interval]]
    maj_at_k: dict[int, tuple[float, Interval]]
    samples: int
    temperature: float
    truncated: float
    """Share of completions that were cut off."""
    tokens: int
    outcomes: dict[str, int]
    greedy: Evaluation | None = None
    """The same problems with one greedy completion each, where that was asked for beside sampled ones."""

    def as_json(self) -> dict[str, Any]:
        """The figures for `--json`: k as text, values and intervals apart."""
        return {
            "task": self.task,
            "split": self.split,
            "problems": self.problems,
            "accuracy": self.accuracy,
            "low": self.low,
            "high": self.high,
            "pass_at_k": {str(k): value for k, (value, _) in self.pass_at_k.items()},
            "maj_at_k": {str(k): value for k, (value, _) in self.maj_at_k.items()},
            "pass_at_k_interval": {str(k): list(interval) for k, (_, interval) in self.pass_at_k.items()},
            "maj_at_k_interval": {str(k): list(interval) for k, (_, interval) in self.maj_at_k.items()},
            "samples": self.samples,
            "temperature": self.temperature,
            "truncated": self.truncated,
            "tokens": self.tokens,
            **({"greedy": {key: getattr(self.greedy, key) for key in _GREEDY}} if self.greedy else {}),
        }


def evaluate(
    policy: Policy,
    engine: Engine,
    task: Task,
    settings: EvalSettings,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Evaluation:
    """Samples every problem of the split (or its first `num`) and scores the texts with the task itself."""
    settings.check()
    check_judges(task)
    if settings.greedy and settings.settled_temperature > 0:
        one_each = replace(settings, ks=(1,), samples=1, temperature=0.0)
        greedy = evaluate(policy, engine, task, one_each, progress)
        return replace(evaluate(policy, engine, task, replace(settings, greedy=False), progress), greedy=greedy)
    problems, rollouts = answered(policy, engine, task, settings, progress)
    return summarise(task, problems, rollouts, settings)


def answered(
    policy: Policy,
    engine: Engine,
    task: Task,
    settings: EvalSettings,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> tuple[list[Problem], list[Rollout]]:
    """The problems of the split (or its first `num`), and what the policy writes to each."""
    problems = first_problems(task, settings.split, settings.num)
    prompts, _ = encode(
        policy, task, problems, settings.max_new_tokens, allow_truncated=settings.allow_truncated_prompts
    )
    sampling = Sampling(
        max_new_tokens=settings.max_new_tokens, temperature=settings.settled_temperature, top_p=settings.top_p
    )
    rollouts: list[Rollout] = []
    size = max(settings.batch_rows // settings.num_samples, 1)
    seed = stable_hash("evaluate", settings.seed)
    for start in range(0, len(prompts), size):
        chunk = prompts[start : start + size]
        rollouts += roll_out(policy, engine, chunk, num=settings.num_samples, sampling=sampling, seed=seed, first=start)
        progress(len(rollouts), len(prompts))
    return problems, rollouts


@dataclass(frozen=True)
class RewardEvaluation:
    """The mean reward of greedy completions, over the problems whose completion any function scored."""

    task: str
    split: str
    problems: int
    reward: float
    low: float
    high: float
    truncated: float
    """Share of completions that were cut off."""
    tokens: int
    unscored: int
    """The others."""
    outcomes: dict[str, float]
    """The reward of each that was scored, by problem id."""
    timed_out: tuple[str, ...] = ()
    """The problems whose completion was not scored in time; `rewards.on_timeout` says what they count."""

    def as_json(self) -> dict[str, Any]:
        """The figures for `--json` and evals.jsonl."""
        figures = {key: value for key, value in vars(self).items() if key != "outcomes"}
        return {**figures, "timed_out": len(self.timed_out)}


def evaluate_by_rewards(
    policy: Policy,
    engine: Engine,
    task: Task,
    settings: EvalSettings,
    scored: Callable[[Sequence[Rollout]], Scored],
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> RewardEvaluation:
    """As `evaluate`, with one greedy completion a problem, and by what `scored` makes of them all."""
    settings.check()
    problems, rollouts = answered(
        policy, engine, task, replace(settings, ks=(1,), samples=1, temperature=0.0), progress
    )
    found = scored(rollouts)
    pairs = [(p.id, s.value) for p, s in zip(problems, found.scores, strict=True) if not s.parts.get("unscored")]
    if not pairs:
        raise DataError(
            f"none of the {len(problems)} problems of the evaluation got a reward ({len(found.timed_out)} not in time, "
            "the others None)",
            "there is nothing to take a mean of",
            "let a function score them; a run can do without evaluations (eval_every = 0)",
        )
    values = [value for _, value in pairs]
    low, high = bootstrap(values)
    completions = [completion for rollout in rollouts for completion in rollout.completions]
    return RewardEvaluation(
        task=task.name,
        split=settings.split,
        problems=len(values),
        reward=statistics.mean(values),
        low=low,
        high=high,
        truncated=sum(c.stop == "length" for c in completions) / len(completions),
        tokens=sum(len(c.token_ids) for c in completions),
        unscored=len(problems) - len(pairs),
        outcomes=dict(pairs),
        timed_out=tuple(found.timed_out),
    )


def check_judges(task: Task) -> None:
    """Raises `ConfigError` for a task that has no answers to judge by: every completion would count as wrong."""
    judge = parts(task)[0]
    if not has_answers(judge):
        raise ConfigError(
            f'task.check of {judge.name} is "none", and evaluations judge by it',
            "with nothing to compare answers with, every completion would count as wrong",
            'name the column of right answers "answer" and write task.check = "math" or "text"; the rewards of '
            'a run judge instead, with evaluation.by = "rewards"',
        )


def first_problems(task: Task, split: str, num: int | None = None) -> list[Problem]:
    """The first `num` problems of a split (None: all), as far as there are so many."""
    problems = task.problems(split)
    return [problems[i] for i in range(min(num or len(problems), len(problems)))]


def summarise(
    task: Task, problems: Sequence[Problem], rollouts: Sequence[Rollout], settings: EvalSettings
) -> Evaluation:
    solved = [[is_solved(task, p, text) for text in r.texts] for p, r in zip(problems, rollouts, strict=True)]
    counts = [sum(row) for row in solved]
    samples = settings.num_samples
    accuracy = sum(counts) / (len(counts) * samples)
    low, high = interval([count / samples for count in counts])
    votes = [[task.vote(text) for text in rollout.texts] for rollout in rollouts]
    passes = {k: [pass_at_k(samples, count, k) for count in counts] for k in settings.ks}
    majorities = {k: [_majorities(v, s, k) for v, s in zip(votes, solved, strict=True)] for k in settings.ks}
    completions = [completion for rollout in rollouts for completion in rollout.completions]
    return Evaluation(
        task=task.name,
        split=settings.split,
        problems=len(problems),
        accuracy=accuracy,
        low=low,
        high=high,
        pass_at_k={k: (sum(v) / len(v), interval(v)) for k, v in passes.items()},
        maj_at_k={k: (sum(v) / len(v), interval(v)) for k, v in majorities.items()},
        samples=samples,
        temperature=settings.settled_temperature,
        truncated=sum(c.stop == "length" for c in completions) / len(completions),
        tokens=sum(len(c.token_ids) for c in completions),
        outcomes={p.id: count for p, count in zip(problems, counts, strict=True)},
    )


def is_solved(task: Task, problem: Problem, text: str) -> bool:
    """Whether the text earns the task's full score (a score of parts is solved where its part "solved" says so)."""
    score = task.score(problem, text)
    return score.parts.get("solved", score.value) >= 1.0


def pass_at_k(n: int, c: int, k: int) -> float:
    """The chance that k of n completions, c of them right, hold a right one: 1 - C(n-c, k) / C(n, k) (arXiv
    2107.03374).

    >>> round(pass_at_k(4, 1, 2), 6)
    0.5
    """
    return 1.0 - math.comb(n - c, k) / math.comb(n, k)


def majority(votes: Sequence[str | None], solved: Sequence[bool], k: int) -> float:
    """Whether the most frequent answer of the first k completions is right (arXiv 2203.11171); of equals the earliest.

    >>> majority(["7", "8", "8"], [True, False, False], 3)
    0.0
    """
    counted = Counter(vote for vote in votes[:k] if vote is not None)
    if not counted:
        return 0.0
    winner, _ = counted.most_common(1)[0]
    return float(solved[list(votes).index(winner)])


def _majorities(votes: Sequence[str | None], solved: Sequence[bool], k: int) -> float:
    """The mean over as many k completions as there are, each used once."""
    starts = range(0, len(votes) - k + 1, k)
    return statistics.mean(majority(votes[i : i + k], solved[i : i + k], k) for i in starts)


def wilson(successes: int, trials: int) -> Interval:
    """The Wilson score interval of a share, 95 %.

    >>> [round(x, 4) for x in wilson(50, 100)]
    [0.4038, 0.5962]
    """
    share, z2 = successes / trials, _Z95**2
    centre = (share + z2 / (2 * trials)) / (1 + z2 / trials)
    half = _Z95 / (1 + z2 / trials) * math.sqrt(share * (1 - share) / trials + z2 / (4 * trials**2))
    return centre - half if successes else 0.0, centre + half if successes < trials else 1.0


def interval(values: Sequence[float]) -> Interval:
    """The 95 % interval of the mean of shares: Wilson's where each is 0 or 1, else a bootstrap over problems."""
    if all(value in (0.0, 1.0) for value in values):
        return wilson(round(sum(values)), len(values))
    return bootstrap(values)


def bootstrap(values: Sequence[float], seed: int = 0) -> Interval:
    """The 95 % percentile interval of the mean, from 2,000 resamples of the problems with a fixed seed."""
    generator = torch.Generator().manual_seed(seed)
    data = torch.tensor(values, dtype=torch.float64)
    picks = torch.randint(len(data), (_RESAMPLES, len(data)), generator=generator)
    low, high = data[picks].mean(1).quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return low, high


def t_interval(values: Sequence[float]) -> Interval | None:
    """The 95 % interval of the mean of runs, by Student's t; None for a single run.

    >>> [round(x, 4) for x in t_interval([0.90, 0.92, 0.94])]
    [0.8703, 0.9697]
    """
    if len(values) < 2:
        return None
    mean = statistics.mean(values)
    half = t_quantile(len(values) - 1) * statistics.stdev(values) / math.sqrt(len(values))
    return mean - half, mean + half


def t_quantile(degrees: int) -> float:
    """What 95 % of the draws of Student's t stay within, by bisection.

    >>> [round(t_quantile(degrees), 3) for degrees in (1, 2, 4, 10)]
    [12.706, 4.303, 2.776, 2.228]
    """
    low, high = 1.0, 13.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if _within(middle, degrees) < 0.95 else (low, middle)
    return low


def _within(t: float, degrees: int) -> float:
    """P(|T| < t) for whole degrees of freedom (Abramowitz and Stegun 26.7.3 and 26.7.4)."""
    angle = math.atan(t / math.sqrt(degrees))
    odd = degrees % 2
    term, total = math.cos(angle) ** odd, 0.0
    for power in range(odd, degrees - 1, 2):
        total += term
        term *= math.cos(angle) ** 2 * (power + 1) / (power + 2)
    share = math.sin(angle) * total
    return 2 / math.pi * (angle + share) if odd else share


def paired(before: dict[str, int], after: dict[str, int]) -> tuple[float, Interval]:
    """The mean gain over the problems that two evaluations share, and its bootstrap interval over problems.

    >>> paired({"a": 0, "b": 1}, {"a": 1, "b": 1})[0]
    0.5
    """
    gains = [float(after[key] - before[key]) for key in before if key in after]
    return sum(gains) / len(gains), bootstrap(gains)
