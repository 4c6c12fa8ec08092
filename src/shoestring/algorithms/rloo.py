"""RLOO (arXiv 2402.14740): each completion is compared with the mean of the others."""

from __future__ import annotations

from typing import ClassVar, Literal

import torch

from shoestring.algorithms.base import ObjectiveDefaults, PerGroup, every_token, relative_advantages, rewards
from shoestring.config.settings import Settings
from shoestring.types import Credit, Group


class RLOO(PerGroup, Settings):
    """REINFORCE with a leave-one-out baseline, over the whole completion.

        A_i  = R_i - mean of the other rewards = G / (G - 1) (R_i - mean(R))
        Loss = mean over completions of the sum over tokens of  -A_i rho

    Rewards 1, 0, 0 give advantages 1, -0.5, -0.5. The paper's KL stands in the reward; here `objective.beta` puts it
    into the loss.
    """

    name: Literal["rloo"] = "rloo"

    objective: ClassVar = ObjectiveDefaults()
    least_completions: ClassVar[int] = 2
    normalise: ClassVar[Literal["groups", "tokens"]] = "groups"
    replay: ClassVar[None] = None

    def credit(self, group: Group, generator: torch.Generator) -> Credit:
        num = len(group.completions)
        advantage_G = relative_advantages(rewards(group), "centred", 0.0) * num / (num - 1)
        row, col = every_token(group)
        return Credit(row, col, advantage_G[row].float(), torch.full((len(row),), 1 / num))
