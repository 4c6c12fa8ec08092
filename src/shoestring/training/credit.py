"""A step's credit as training may take it: from the completions that were scored, and checked."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields, replace
from typing import Any

import torch
from torch import Tensor

from shoestring.algorithms.base import Algorithm, Memory, StepGenerator, scored_part
from shoestring.errors import ConfigError
from shoestring.types import Credit, Group


def credit_step(
    algorithm: Algorithm, groups: Sequence[Group], memory: Memory, generator: StepGenerator
) -> tuple[list[Credit], Memory]:
    """The algorithm's credit of a step's groups, from the completions that were scored, and what it remembers.

    Raises `ConfigError` if a credit is not of its group. Completions that no function scored teach nothing. As in TRL
    they are no part of a mean or a deviation, but count in the average over the group: weights are those of the others,
    times their share of the group. A group with fewer scored completions than the algorithm needs gets no credit.
    """
    parts = [scored_part(group) for group in groups]
    used = [i for i, (places, _) in enumerate(parts) if len(places) >= algorithm.least_completions]
    own = StepGenerator.seeded(generator.initial_seed(), [generator.seeds[i] for i in used])
    scored = [parts[i][1] for i in used]
    if hasattr(algorithm, "credit_step"):
        found, memory = algorithm.credit_step(scored, memory, own)
    else:  # a class from outside that looks at one group at a time
        grouped: Any = algorithm
        found = [grouped.credit(part, own.of(i)) for i, part in enumerate(scored)]
    none = torch.zeros(0)
    credits = [Credit(none.long(), none.long(), none, none)] * len(groups)
    for i, credit in zip(used, found, strict=True):
        places, part = parts[i]
        _check(credit, part, algorithm.name)
        credits[i] = credit if part is groups[i] else _of_the_whole(credit, places, groups[i])
    return credits, memory


def _of_the_whole(credit: Credit, places: Sequence[int], group: Group) -> Credit:
    """Credit of the completions at these places as credit of their group."""
    share = len(places) / len(group.completions)
    kl_weight = None if credit.kl_weight is None else credit.kl_weight * share
    return replace(credit, row=torch.tensor(places)[credit.row], weight=credit.weight * share, kl_weight=kl_weight)


def _check(credit: Credit, group: Group, name: str) -> None:
    what = _wrong_with(credit, group)
    if what:
        raise ConfigError(
            f"algorithm {name} gave credit whose {what}",
            "credit names tokens of the group's completions, each at most once, with finite numbers",
            "fix its `credit`: row, col, advantage and weight are tensors of one length (see shoestring.types.Credit)",
        )


def _wrong_with(credit: object, group: Group) -> str:
    """What cannot be, if anything."""
    if not isinstance(credit, Credit):
        return f"type is {type(credit).__name__}"
    parts = {f.name: value for f in fields(credit) if (value := getattr(credit, f.name)) is not None}
    for name, value in parts.items():
        if not isinstance(value, Tensor) or value.dim() != 1:
            return f"{name} is {f'of shape {list(value.shape)}' if isinstance(value, Tensor) else repr(value)}"
        if len(value) != len(credit.row):
            return f"{name} has {len(value)} numbers, and row {len(credit.row)}"
        if name in ("row", "col") and value.dtype != torch.int64:
            return f"{name} is of {value.dtype}, not torch.int64"
        if not bool(value.isfinite().all()):
            return f"{name} is not finite"
    row, col = credit.row, credit.col
    lengths = torch.tensor([len(completion.token_ids) for completion in group.completions])
    outside = (row < 0) | (row >= len(lengths))
    if bool(outside.any()):
        return f"row is {int(row[outside][0])}, in a group of {len(lengths)} completions"
    outside = (col < 0) | (col >= lengths[row])
    if bool(outside.any()):
        at = int(row[outside][0])
        return f"col is {int(col[outside][0])}, in completion {at}, which has {int(lengths[at])} tokens"
    if len((row * (int(lengths.max()) + 1) + col).unique()) < len(row):
        return "row and col name a token twice"
    return ""
