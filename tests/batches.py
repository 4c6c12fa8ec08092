"""Micro-batches of padded rows straight from groups and their credit, for tests that train nothing else."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from shoestring.training.batch import training_rows
from shoestring.training.micro_batching import micro_batches
from shoestring.types import Batch, Credit, Group


def collate(
    groups: Sequence[Group],
    credits: Sequence[Credit],
    *,
    normalise: Literal["groups", "tokens"] = "groups",
    beta: float = 0.0,
    max_tokens: int = 16_384,
) -> list[Batch]:
    """At most `max_tokens` padded tokens each (a longer row stands alone), longest rows first."""
    return micro_batches(training_rows(groups, credits, normalise=normalise, beta=beta), max_tokens, trees=False)
