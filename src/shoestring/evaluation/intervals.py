"""Intervals and other statistics of evaluations."""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Sequence

import torch

_RESAMPLES = 2_000


Interval = tuple[float, float]


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


_Z95 = 1.959963984540054
