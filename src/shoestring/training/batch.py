"""Groups and their credit -> padded micro-batches. Every cut of a step gives the same gradient."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import chain
from random import Random
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from shoestring.types import Batch, Credit, Group, Row, TokenColumns


def training_rows(
    groups: Sequence[Group],
    credits: Sequence[Credit],
    *,
    normalise: Literal["groups", "tokens"] = "groups",
    beta: float = 0.0,
) -> list[Row]:
    """The completions that train, with their share of the step's loss.

    Weights are divided once by the number of groups, those without signal included, or by the number of selected
    tokens. Places with advantage 0 can act only through a KL term, so with `beta` 0 they, and rows without any other,
    are left out.
    """
    selected = sum(len(credit.row) for credit in credits)
    divisor = max(len(groups) if normalise == "groups" else selected, 1)
    pairs = enumerate(zip(groups, credits, strict=True))
    return [row for place, (group, credit) in pairs for row in _rows(place, group, credit, divisor, beta != 0)]


def _rows(place: int, group: Group, credit: Credit, divisor: int, with_kl: bool) -> Iterator[Row]:
    prompt, completions = group.prompt.token_ids, group.completions
    kl_weight = credit.weight if credit.kl_weight is None else credit.kl_weight
    acts = credit.advantage * credit.weight != 0
    if with_kl:
        acts |= kl_weight != 0
    chosen = acts.nonzero().flatten()
    chosen = chosen[credit.row[chosen].argsort(stable=True)]  # completion by completion
    row, col = credit.row[chosen], credit.col[chosen]
    lengths = torch.tensor([len(completion.token_ids) for completion in completions])
    at = (lengths.cumsum(0) - lengths)[row] + col
    columns = TokenColumns(
        target=_flat([completion.token_ids for completion in completions], np.int64)[at],
        advantage=credit.advantage[chosen],
        weight=credit.weight[chosen] / divisor,
        kl_weight=kl_weight[chosen] / divisor,
        sampler_logprob=_flat([completion.logprobs for completion in completions], np.float32)[at],
    )
    counts = torch.bincount(row, minlength=len(completions)).tolist()
    last = torch.zeros_like(lengths).scatter_reduce(0, row, col, "amax").tolist()
    cols = (len(prompt) - 1 + col).split(counts)
    for index, own in enumerate(columns.split(counts)):
        if not counts[index]:
            continue
        yield Row(
            group.prompt.problem.id,
            # The last selected token is predicted from the one before it; what follows need not be run.
            prompt + completions[index].token_ids[: last[index]],
            cols[index],
            own,
            group=place,
            prompt_tokens=len(prompt),
            trunk=completions[index].trunk,
        )


def _flat(parts: Sequence[Sequence[float]], dtype: type) -> Tensor:
    return torch.from_numpy(np.fromiter(chain.from_iterable(parts), dtype, sum(map(len, parts))))


def mini_batches(rows: Sequence[Row], num: int, seed: int) -> list[list[Row]]:
    """Cut a step's rows into `num` mini-batches of as many rows (one more or less), or into fewer if rows are few.

    Groups come in an order drawn from the seed, and stay together except where a cut falls. Weights are scaled so that
    an optimizer step sees the mean over its own mini-batch: with W the sum of the step's weights and W_m that of the
    mini-batch, each of its weights is multiplied by W / W_m, and so for the KL weights. With one mini-batch the rows
    are returned as they are.
    """
    num = min(num, len(rows))
    if num <= 1:
        return [list(rows)] if rows else []
    groups = sorted({row.group for row in rows})
    place = dict(zip(Random(seed).sample(groups, len(groups)), range(len(groups)), strict=True))
    ordered = sorted(rows, key=lambda row: place[row.group])
    cuts = [ordered[len(rows) * i // num : len(rows) * (i + 1) // num] for i in range(num)]
    return [_as_a_mean(cut, rows) for cut in cuts]


def _as_a_mean(cut: Sequence[Row], rows: Sequence[Row]) -> list[Row]:
    """The rows of a mini-batch with the weights of all of them."""
    scales = {}
    for name in ("weight", "kl_weight"):
        own, whole = (sum(float(getattr(row.columns, name).sum()) for row in part) for part in (cut, rows))
        scales[name] = whole / own if own else 1.0

    def scaled(columns: TokenColumns) -> TokenColumns:
        return replace(columns, **{name: getattr(columns, name) * scale for name, scale in scales.items()})

    return [row._replace(columns=scaled(row.columns)) for row in cut]


def cut_rows(rows: Iterable[Row], max_tokens: int) -> Iterator[list[Row]]:
    """Runs of rows (already longest first) whose padded size keeps within the limit."""
    cut: list[Row] = []
    for row in rows:
        if cut and len(cut[0].token_ids) * (len(cut) + 1) > max_tokens:
            yield cut
            cut = []
        cut.append(row)
    if cut:
        yield cut


def pad_rows(rows: list[Row]) -> Batch:
    """Right-padded, with id 0: behind a causal row's end no token can see it, so neither mask nor pad token is
    needed."""
    ids = torch.zeros(len(rows), len(rows[0].token_ids), dtype=torch.int64)
    for index, row in enumerate(rows):
        ids[index, : len(row.token_ids)] = torch.tensor(row.token_ids)
    counts = torch.tensor([len(row.col) for row in rows])
    return Batch(
        input_ids=ids,
        row=torch.repeat_interleave(torch.arange(len(rows)), counts),
        col=torch.cat([row.col for row in rows]),
        columns=TokenColumns.cat([row.columns for row in rows]),
        problem_ids=tuple(row.problem_id for row in rows),
    )


def single_rows(batches: Iterable[Batch]) -> Iterator[Batch]:
    """The same batches, a row each (to find the row that a fault comes from)."""
    for batch in batches:
        for index, problem_id in enumerate(batch.problem_ids):
            here = batch.row == index
            ids = batch.input_ids[index] if batch.paths is None else batch.input_ids[0, batch.paths.nodes[index]]
            yield Batch(
                ids[None],
                torch.zeros_like(batch.row[here]),
                batch.col[here],
                batch.columns.take(here),
                problem_ids=(problem_id,),
            )
