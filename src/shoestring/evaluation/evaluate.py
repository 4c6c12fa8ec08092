"""Accuracy, pass@k and maj@k on a split, or the mean reward, with 95 % intervals."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from shoestring.errors import ConfigError, DataError
from shoestring.evaluation.intervals import Interval, _majorities, bootstrap, interval, pass_at_k
from shoestring.hashing import stable_hash
from shoestring.model.policy import Policy
from shoestring.model.sampling import Sampling
from shoestring.rewards.base import Scored
from shoestring.rollout.rollout import Rollout, encode, roll_out
from shoestring.samplers.base import Engine
from shoestring.tasks.base import Task, has_answers, parts
from shoestring.types import Problem

_GREEDY = ("accuracy", "low", "high", "truncated", "tokens")


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
