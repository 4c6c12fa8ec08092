"""The algorithm seam, and the group statistics that several algorithms share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar, Literal, NamedTuple, Protocol

import torch
from torch import Tensor

from shoestring.errors import ConfigError
from shoestring.types import Credit, Group


class ObjectiveDefaults(NamedTuple):
    """What an algorithm wants of `[objective]` where the user says nothing."""

    beta: float = 0.0
    clip_low: float = 0.2
    clip_high: float = 0.2
    updates: int = 1
    l2: float = 0.0


class Replay(NamedTuple):
    """How an algorithm wants earlier completions to be continued; see `shoestring.curricula.replay`."""

    source: Literal["success", "failure", "both"]
    fraction: float
    completions: int | None
    cut: Literal["uniform", "half"]


class Algorithm(Protocol):
    """Turns a group's scores into credit for single tokens. A frozen settings object.

    The loop knows nothing else of an algorithm: the credit's `weight` holds the average over the group, and
    `normalise` says whether the step divides by its groups or by its selected tokens. With a `needs_entropy` that is
    true, completions come with their entropies.
    """

    name: str
    objective: ClassVar[ObjectiveDefaults]
    least_completions: ClassVar[int]

    @property
    def normalise(self) -> Literal["groups", "tokens"]: ...

    @property
    def replay(self) -> Replay | None: ...

    def credit_step(
        self, groups: Sequence[Group], memory: Memory, generator: torch.Generator
    ) -> tuple[Sequence[Credit], Memory]:
        """Give the credit of each group of a step, and what to remember for the next step; all randomness comes from
        `generator`. `PerGroup` does it for algorithms that look at one group at a time."""
        ...


Memory = Mapping[str, Any]
"""What an algorithm remembers from step to step: a table of JSON values, saved in every checkpoint."""


class StepGenerator(torch.Generator):
    """The random numbers of a step's credit, with a generator for each group: what one group draws does not depend on
    the others."""

    seeds: tuple[int, ...] = ()

    @classmethod
    def seeded(cls, seed: int, seeds: Sequence[int]) -> StepGenerator:
        """For a step, and for each of its groups."""
        own = cls()
        own.manual_seed(seed)
        own.seeds = tuple(seeds)
        return own

    def of(self, place: int) -> torch.Generator:
        """The generator of the group at a place."""
        return torch.Generator().manual_seed(self.seeds[place])


class PerGroup:
    """`credit_step` for an algorithm with `credit(group, generator) -> Credit`, which remembers nothing."""

    def credit(self, group: Group, generator: torch.Generator) -> Credit:
        """Give the credit of one group; all randomness comes from `generator`."""
        raise NotImplementedError

    def credit_step(
        self, groups: Sequence[Group], memory: Memory, generator: torch.Generator
    ) -> tuple[Sequence[Credit], Memory]:
        own = [generator.of(i) if isinstance(generator, StepGenerator) else generator for i in range(len(groups))]
        return [self.credit(group, one) for group, one in zip(groups, own, strict=True)], memory


def is_informative(group: Group) -> bool:
    """Whether a group's rewards tell completions apart: two that were scored differ."""
    return len({score.value for score in scored_part(group)[1].scores}) > 1


def rewards(group: Group) -> Tensor:
    """The group's rewards, [G], in float64."""
    return torch.tensor([score.value for score in group.scores], dtype=torch.float64)


def relative_advantages(values_G: Tensor, kind: Literal["standardised", "centred"], eps: float) -> Tensor:
    """Each reward minus the group's mean, over the sample deviation if standardised. [G]

    Equal rewards give exactly 0, whatever rounding does to their mean.

    >>> relative_advantages(torch.tensor([1.0, 0.0, 0.0, 1.0]), "standardised", 1e-6).tolist()[0]  # doctest: +ELLIPSIS
    0.86602...
    """
    if len(values_G) < 2:
        raise ConfigError(
            f"a group has {len(values_G)} completion",
            "a group of one has no mean to differ from, so every advantage would be 0",
            "set sampling.num_completions to 2 or more",
        )
    if bool((values_G == values_G[0]).all()):
        return torch.zeros_like(values_G)
    centred = values_G - values_G.mean()
    return centred / (values_G.std() + eps) if kind == "standardised" else centred


def chosen_credit(
    group: Group,
    chosen: Tensor,
    advantage_G: Tensor,
    *,
    mask_truncated: bool,
    kl_scope: Literal["selected", "all"] = "selected",
) -> Credit:
    """Credit for the chosen tokens, given row by row as [sum of lengths] bool: each has its completion's advantage, and
    the average is over the chosen tokens of each completion, then over completions.

    With `kl_scope` "all" the KL term averages over every token.
    """
    row, col = every_token(group)
    if mask_truncated:
        kept = ~cut_off(group)[row]
        row, col, chosen = row[kept], col[kept], chosen[kept]
    num = len(group.completions)
    share = 1 / (num * torch.bincount(row[chosen], minlength=num).clamp(min=1).double())
    if kl_scope == "selected":
        row, col = row[chosen], col[chosen]
        return Credit(row, col, advantage_G[row].float(), share[row].float())
    kl_share = 1 / (num * torch.bincount(row, minlength=num).clamp(min=1).double())
    weight = torch.where(chosen, share[row], 0.0)
    advantage = torch.where(chosen, advantage_G[row], 0.0)
    return Credit(row, col, advantage.float(), weight.float(), kl_share[row].float())


def every_token(group: Group) -> tuple[Tensor, Tensor]:
    """Row and column of every completion token, row by row. [N], [N]"""
    lengths = torch.tensor([len(completion.token_ids) for completion in group.completions])
    row = torch.repeat_interleave(torch.arange(len(lengths)), lengths)
    starts = torch.repeat_interleave(lengths.cumsum(0) - lengths, lengths)
    return row, torch.arange(len(row)) - starts


def cut_off(group: Group) -> Tensor:
    """Which completions were cut off at the length limit. [G], bool"""
    return torch.tensor([completion.stop == "length" for completion in group.completions], dtype=torch.bool)


def scored_part(group: Group) -> tuple[list[int], Group]:
    """The places of the completions that were scored, and a group of these."""
    places = [i for i, score in enumerate(group.scores) if not score.parts.get("unscored")]
    if len(places) == len(group.scores):
        return places, group
    completions, scores = (tuple(all_of[i] for i in places) for all_of in (group.completions, group.scores))
    return places, replace(group, completions=completions, scores=scores)
