"""T-SPMO, token-specific prefix matching optimisation (arXiv 2504.20834): credit for the tokens at which completions
part."""

from __future__ import annotations

from typing import ClassVar, Literal, NamedTuple

import torch
from pydantic import Field

from shoestring.algorithms.base import ObjectiveDefaults, PerGroup, Replay
from shoestring.config.settings import Settings
from shoestring.types import Credit, Group


class Pair(NamedTuple):
    """A distinct (prefix, token) pair of a group, and the first place (row, col) where it stands."""

    row: int
    col: int
    advantage: float
    branching: bool


class TSPMO(PerGroup, Settings):
    """Each distinct (prefix p, next token v) of a group is credited once with what v does to the mean reward.

        A(v|p) = E[R | p followed by v] - E[R | p]         means over the completions that start so
        Loss   = -(1/|U|) sum over pairs of  rho A(v|p)  +  l2 ||adapter||^2

    Behind the last place where a completion shares its prefix with another, A is 0; so few tokens train, and early
    ones. There is no KL term. `u_count` says what |U| counts: "all" distinct pairs, or those at which completions part
    ("branching"); the second makes the policy's part larger against `objective.l2`.

    Replay reaches later tokens: an earlier completion of a group with signal is cut somewhere, and new completions of
    question + prefix make a trie of their own. What of it the paper leaves open are settings here.
    """

    name: Literal["t-spmo"] = "t-spmo"
    u_count: Literal["all", "branching"] = "all"
    replay_from: Literal["none", "success", "failure", "both"] = "none"
    """Which completions give prefixes: the best of their group, the worst, or one of each."""
    replay_fraction: float = Field(default=0.5, gt=0, le=1)
    """The largest share of a step's prompts that may be replayed prefixes."""
    replay_completions: int | None = Field(default=None, ge=2)
    """Completions of a replayed prefix; None takes sampling.num_completions."""
    replay_cut: Literal["uniform", "half"] = "uniform"
    """Where a completion is cut: anywhere with equal chance, or in its middle."""

    objective: ClassVar = ObjectiveDefaults(l2=1e-6)
    least_completions: ClassVar[int] = 2
    normalise: ClassVar[Literal["groups", "tokens"]] = "groups"

    @property
    def replay(self) -> Replay | None:
        if self.replay_from == "none":
            return None
        return Replay(self.replay_from, self.replay_fraction, self.replay_completions, self.replay_cut)

    def credit(self, group: Group, generator: torch.Generator) -> Credit:
        pairs = distinct_pairs(group)
        counted = len(pairs) if self.u_count == "all" else sum(pair.branching for pair in pairs)
        trained = [pair for pair in pairs if pair.advantage != 0.0]
        return Credit(
            torch.tensor([pair.row for pair in trained], dtype=torch.int64),
            torch.tensor([pair.col for pair in trained], dtype=torch.int64),
            torch.tensor([pair.advantage for pair in trained], dtype=torch.float32),
            torch.full((len(trained),), 1.0 / max(counted, 1)),
        )


def distinct_pairs(group: Group) -> list[Pair]:
    """The group's distinct pairs in the order of their first appearance, from one walk over a trie of the completions.

    A node is the list [completions through it, sum of their rewards]; its number stands for the prefix that leads to
    it.
    """
    values = [score.value for score in group.scores]
    nodes: list[list[float]] = [[len(values), sum(values)]]
    children: dict[tuple[int, int], int] = {}
    first: list[tuple[int, int, int]] = []  # (parent, row, col) of each node but the root
    for row, (completion, value) in enumerate(zip(group.completions, values, strict=True)):
        parent = 0
        for col, token in enumerate(completion.token_ids):
            child = children.get((parent, token))
            if child is None:
                child = children[parent, token] = len(nodes)
                nodes.append([0, 0.0])
                first.append((parent, row, col))
            nodes[child][0] += 1
            nodes[child][1] += value
            parent = child
    means = [total / count if count else 0.0 for count, total in nodes]
    rounding = 1e-12 * max(map(abs, values), default=0.0)  # a smaller difference is that of two sums' last digits
    return [
        Pair(row, col, _difference(means[child], means[parent], rounding), nodes[child][0] < nodes[parent][0])
        for child, (parent, row, col) in enumerate(first, start=1)
    ]


def _difference(child: float, parent: float, rounding: float) -> float:
    """child - parent, and exactly 0 where only rounding tells them apart."""
    return 0.0 if abs(child - parent) <= rounding else child - parent
