"""Dynamic sampling: further prompts in place of groups without signal, within a budget (DAPO, arXiv 2503.14476).

A group without signal, in which all completions score the same, trains nothing. Left out of DAPO:
it samples whole batches and throws surplus groups away; here a round samples as many prompts as are still missing, so
that no group with signal is ever dropped.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import MappingProxyType
from typing import NamedTuple

from shoestring.algorithms.base import Memory, is_informative
from shoestring.model.sampling import Sampling
from shoestring.rewards.base import Scored, joined_scored
from shoestring.rollout.rollout import Rollout
from shoestring.types import Credit, Group


class Round(NamedTuple):
    """Prompts of a step that were sampled together, each with its group."""

    rollouts: Sequence[Rollout]
    groups: Sequence[Group]
    scored: Scored
    num_cut: int
    """Prompts that were truncated."""


class Sampled(NamedTuple):
    """All that a step sampled, in the order of sampling, and the places in it of the groups that the step keeps."""

    rollouts: Sequence[Rollout]
    groups: Sequence[Group]
    scored: Scored
    num_cut: int
    kept: Sequence[int]
    credits: Sequence[Credit] = ()
    """Of the groups that are kept, in their order."""
    memory: Memory = MappingProxyType({})
    """What the algorithm remembers of the step."""

    @property
    def kept_groups(self) -> list[Group]:
        return [self.groups[place] for place in self.kept]


def wanted(rounds: Sequence[Round], sampling: Sampling) -> int:
    """Prompts that the next round samples: the step's at first, then as many as lack signal, while the budget lasts."""
    num_signal = sum(is_informative(group) for a_round in rounds for group in a_round.groups)
    budget = sampling.most_prompts if rounds else sampling.num_prompts
    return min(sampling.num_prompts - num_signal, budget - sum(len(a_round.groups) for a_round in rounds))


def joined(rounds: Sequence[Round], num_prompts: int) -> Sampled:
    """The rounds as one. Kept are all groups with signal, and as many of the first ones without as are missing."""
    groups = [group for a_round in rounds for group in a_round.groups]
    return Sampled(
        rollouts=[rollout for a_round in rounds for rollout in a_round.rollouts],
        groups=groups,
        scored=joined_scored([a_round.scored for a_round in rounds]),
        num_cut=sum(a_round.num_cut for a_round in rounds),
        kept=kept(list(map(is_informative, groups)), num_prompts),
    )


def kept(signals: Sequence[bool], num: int) -> list[int]:
    """The places of `num` groups: those with signal, then the first without, in the order of sampling.

    >>> kept([False, True, False, True, False], 4)
    [0, 1, 2, 3]
    >>> kept([False, False, True, True, True], 4)
    [0, 2, 3, 4]
    """
    return sorted(sorted(range(len(signals)), key=lambda place: not signals[place])[:num])
