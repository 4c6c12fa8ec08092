"""What stays the same from step to step of a run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from shoestring.config.run import RunConfig
from shoestring.hashing import stable_hash
from shoestring.memory.plan import Plan
from shoestring.model.policy import Policy
from shoestring.records.reporter import Reporter
from shoestring.rollout.prompts import FreshPrompts
from shoestring.rollout.workers import Scoring
from shoestring.run import checkpoint
from shoestring.run.checkpoint import State
from shoestring.samplers.base import Engine
from shoestring.types import Problem


@dataclass(frozen=True)
class Session:
    """What stays the same from step to step."""

    folder: Path
    config: RunConfig
    problems: Sequence[Problem]
    fresh: FreshPrompts
    scoring: Scoring
    policy: Policy
    engine: Engine
    optimizer: torch.optim.Optimizer
    reporter: Reporter
    plan: Plan | None
    """None for a model whose shape is not known."""
    first_step: int
    trunk_layer: int | None = None
    """The layer in front of which sampling keeps the residual stream for training."""

    def save(self, state: State) -> None:
        checkpoint.save(self.folder, self.policy.trained(), self.optimizer, state, self.policy.handle)
        if self.config.save_total_limit:
            checkpoint.prune(self.folder, self.config.save_total_limit)

    def seed(self, step: int, *purpose: object) -> int:
        """63 bits for one purpose of one step."""
        return stable_hash(self.config.seed, step, *purpose) >> 1
