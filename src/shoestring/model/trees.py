"""Completions of one prompt as a tree: what they share is run once.

The completions that train in a micro-batch are merged into a trie behind their prompt. Everything that treats tokens
one by one (products, norms, MLP) runs over its T nodes; attention runs over the R paths, each a plain causal row of at
most L nodes. That is exact: a node's keys and values are those of every path through it. For rows without a common
prefix it is the shared prompt of arXiv 2506.05433.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor

from shoestring.types import Batch, Paths, Row, TokenColumns, Unpadded

# Families whose attention transformers lets us take the place of, with keys and queries as they are.
TREE_MODELS = ("qwen2", "qwen3", "llama", "mistral", "smollm3", "olmo2", "gemma", "phi3", "granite", "cohere")
_NAME = "shoestring-paths"
# What a place of a path takes beside a node of the tree: it is there while one layer attends, a node in each layer.
_PATH_SHARE = 32


def cut_tree(rows: Sequence[Row], max_tokens: int) -> Iterator[list[Row]]:
    """Runs of rows that take no more memory, merged, than `max_tokens` padded tokens (or one row alone)."""
    cut: list[Row] = []
    nodes = longest = 0
    for row in sorted(rows, key=lambda row: (row.group, row.token_ids)):
        fresh = len(row.token_ids) - (_shared(cut[-1], row) if cut else 0)
        wide = max(longest, len(row.token_ids))
        if cut and cost(nodes + fresh, (len(cut) + 1) * wide) > max_tokens:
            yield cut
            cut, nodes, fresh, wide = [], 0, len(row.token_ids), len(row.token_ids)
        cut.append(row)
        nodes, longest = nodes + fresh, wide
    if cut:
        yield cut


def cost(nodes: int, places: int) -> int:
    """What a tree of so many nodes, with so many places in its padded paths, takes: in padded tokens.

    >>> cost(nodes=400, places=480)
    402
    """
    return nodes + max(places - nodes, 0) // _PATH_SHARE


def rows_that_fit(max_tokens: int, prompt: int, own: int, group: int, most: int) -> tuple[int, int]:
    """Of full-length rows that share no more than their group's prompt, how many `cut_tree` puts together, and the
    nodes of their tree. A row has `prompt` tokens and `own` ones behind them.

    >>> rows_that_fit(1250, prompt=100, own=100, group=4, most=64)
    (9, 1200)
    """
    rows = nodes = 0
    while rows < most:
        fresh = own + (0 if rows % group else prompt)
        if rows and cost(nodes + fresh, (rows + 1) * (prompt + own)) > max_tokens:
            break
        rows, nodes = rows + 1, nodes + fresh
    return rows, nodes


def pack_rows(rows: Sequence[Row]) -> Batch:
    """The rows' tree as a micro-batch, input_ids [1, T]. Rows of a group must stand in the order of their tokens."""
    longest = max(len(row.token_ids) for row in rows)
    paths = np.zeros((len(rows), longest), dtype=np.int64)
    ids: list[int] = []
    places: list[np.ndarray] = []
    trunk: list[Tensor] = []
    for index, row in enumerate(rows):
        length, start = len(row.token_ids), len(ids)
        shared = _shared(rows[index - 1], row) if index else 0
        if shared:
            paths[index, :shared] = paths[index - 1, :shared]
        paths[index, shared:length] = np.arange(start, start + length - shared)
        paths[index, length:] = paths[index, length - 1]
        ids.extend(row.token_ids[shared:])
        places.append(np.arange(index * longest + shared, index * longest + length))
        trunk += _trunk_of(row, shared)
    owner = torch.from_numpy(np.repeat(np.arange(len(rows)), [len(row.col) for row in rows]))
    lengths = np.array([len(row.token_ids) for row in rows])
    place = np.concatenate(places)
    return Batch(
        torch.from_numpy(np.array(ids))[None],
        owner,
        torch.cat([row.col for row in rows]),
        TokenColumns.cat([row.columns for row in rows]),
        problem_ids=tuple(row.problem_id for row in rows),
        paths=_paths(paths, place, lengths),
        trunk=tuple(trunk) if all(row.trunk is not None for row in rows) else (),
    )


def _paths(paths: np.ndarray, place: np.ndarray, lengths: np.ndarray) -> Paths:
    """Of rows of these lengths, [R], from the nodes at their places, [R, L], and a place of each node, [T]."""
    longest = paths.shape[1]
    own = np.bincount(place // longest, minlength=len(paths))
    kept = own > 0  # a row like the one before it owns nothing
    within = np.arange(longest) < lengths[kept, None]
    nodes = paths[kept][within]

    def starts(sizes: np.ndarray) -> np.ndarray:
        return np.concatenate([[0], sizes.cumsum()])

    owner = np.repeat(np.arange(kept.sum()), own[kept])
    parts = (nodes, starts(lengths[kept]), starts(own[kept]), owner, np.bincount(nodes))
    unpadded = Unpadded(*(torch.from_numpy(part.astype(np.int32)) for part in parts))
    return Paths(torch.from_numpy(paths), torch.from_numpy(place), torch.from_numpy(place % longest), unpadded)


def _shared(before: Row, row: Row) -> int:
    """Tokens at which two rows of a group begin alike; 0 of different groups."""
    if before.group != row.group:
        return 0
    most = min(len(before.token_ids), len(row.token_ids))
    count = min(row.prompt_tokens, most)
    while count < most and before.token_ids[count] == row.token_ids[count]:
        count += 1
    return count


def _trunk_of(row: Row, start: int) -> list[Tensor]:
    """What the frozen layers gave for a row's tokens from `start` on, [*, H] each."""
    if row.trunk is None:
        return []
    prompt, length = row.prompt_tokens, len(row.token_ids)
    parts = [row.trunk.prompt[start:prompt], row.trunk.own[max(start - prompt, 0) : length - prompt]]
    return [part for part in parts if len(part)]


def attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
) -> tuple[Tensor, None]:
    """Attention over the paths of a tree, in the form that transformers asks for: query [1, heads, T, D] and the same
    of key and value, to [1, T, heads, D]. `options["paths"]` says how they lie; without it, torch's own attention."""
    paths: Paths | None = options.get("paths")
    if paths is None:
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        return sdpa_attention_forward(module, query, key, value, attention_mask, **options)
    rows, longest = paths.nodes.shape
    flat = paths.nodes.flatten()

    def spread(x: Tensor) -> Tensor:
        """[1, n, T, D] -> [R, n, L, D]"""
        return x[0].transpose(0, 1).index_select(0, flat).unflatten(0, (rows, longest)).transpose(1, 2)

    found = torch.nn.functional.scaled_dot_product_attention(
        spread(query),
        spread(key),
        spread(value),
        is_causal=True,
        scale=options.get("scaling"),
        enable_gqa=query.shape[1] != key.shape[1],
    )
    return found.transpose(1, 2).flatten(0, 1).index_select(0, paths.place)[None], None


@contextmanager
def attention_over_paths(config: Any) -> Iterator[None]:
    """Has a model of transformers attend by `attention`, without a mask."""
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface

    AttentionInterface.register(_NAME, attention)  # type: ignore[arg-type]
    AttentionMaskInterface.register(_NAME, _no_mask)
    before = config._attn_implementation
    config._attn_implementation = _NAME
    try:
        yield
    finally:
        config._attn_implementation = before


def _no_mask(*args: Any, **options: Any) -> None:
    return None
