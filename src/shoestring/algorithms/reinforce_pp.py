"""REINFORCE++ (arXiv 2501.03262): advantages are standardised over all tokens of the step, not over a group."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from shoestring.algorithms.base import Memory, ObjectiveDefaults, every_token, relative_advantages, rewards
from shoestring.config.settings import Settings
from shoestring.types import Credit, Group


class ReinforcePP(Settings):
    """Returns of every token, standardised over the step.

        A_t  = (R_t - mean(R)) / (std(R) + eps)        over all tokens t of all groups of the step
        Loss = mean over tokens of  max(-A rho, -A clip(rho))

    R_t is the reward of the token's completion; with `baseline = "group"` the group's mean is taken off it first
    (REINFORCE++-baseline). Longer completions weigh more in mean and deviation. Groups with rewards 1, 0 and 1, 1 and
    lengths 2, 4, 3, 1 give 1.5213, -1.0142, 0.2535, 0.2535 with the baseline. The paper's KL stands in the reward; here
    `objective.beta` puts it into the loss.
    """

    name: Literal["reinforce++"] = "reinforce++"
    baseline: Literal["none", "group"] = "none"
    """What is taken off a reward before the step is standardised: nothing, or the mean of its group."""
    eps: float = Field(default=1e-8, gt=0)
    """Added to the sample deviation."""

    objective: ClassVar = ObjectiveDefaults()
    normalise: ClassVar[Literal["groups", "tokens"]] = "tokens"
    replay: ClassVar[None] = None

    @property
    def least_completions(self) -> int:
        return 2 if self.baseline == "group" else 1

    def credit_step(
        self, groups: Sequence[Group], memory: Memory, generator: torch.Generator
    ) -> tuple[Sequence[Credit], Memory]:
        places = [every_token(group) for group in groups]
        returns = [self._returns(group)[row] for group, (row, _) in zip(groups, places, strict=True)]
        advantages = _standardised(torch.cat(returns), self.eps).split([len(own) for own in returns]) if groups else ()
        return [
            Credit(row, col, own.float(), torch.ones(len(row)))
            for (row, col), own in zip(places, advantages, strict=True)
        ], memory

    def credit(self, group: Group, generator: torch.Generator) -> Credit:
        """Give the credit of a step of one group."""
        return self.credit_step([group], {}, generator)[0][0]

    def _returns(self, group: Group) -> Tensor:
        """What each completion earned, over the baseline, [G] in float64."""
        return rewards(group) if self.baseline == "none" else relative_advantages(rewards(group), "centred", 0.0)


def _standardised(values: Tensor, eps: float) -> Tensor:
    """The values minus their mean, over their sample deviation; 0 where all are equal. [N]"""
    if len(values) < 2 or bool((values == values[0]).all()):
        return torch.zeros_like(values)
    return (values - values.mean()) / (values.std() + eps)
