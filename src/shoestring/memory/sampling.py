"""What sampling takes."""

from __future__ import annotations

import importlib.metadata

from shoestring.memory.footprint import (
    Work,
    captured,
    dequantised,
    draw_tile,
    forward_own,
    forward_token,
    static,
)
from shoestring.samplers.capture import FIRST_ROWS, prompts_at_once
from shoestring.samplers.hf import PREFILL_SHARE


def kv_cache(work: Work, rows: int) -> int:
    shape = work.shape
    return 2 * shape.layers * shape.kv_heads * shape.head_dim * work.itemsize * cache_slots(work, rows)


def cache_slots(work: Work, rows: int) -> int:
    """Tokens that the cache has room for."""
    if not work.graph:
        return rows * work.slots
    prompts = prompts_at_once(rows, work.prompts, max(work.rows // work.prompts, 1))
    own = work.added if work.gpu else work.slots  # on the CPU a completion's row begins with its prompt
    return prompts * work.prompt + rows * own


def prefill_tokens(work: Work, rows: int) -> int:
    """Prompt tokens that are run at once for a wave of `rows`."""
    whole, rest = divmod(rows, max(work.rows // work.prompts, 1))
    distinct = min(work.prompts, whole + 2 * (rest > 0))  # a wave that ends inside a group may also begin inside one
    most = max(cache_slots(work, rows) // PREFILL_SHARE, work.prompt)
    return min(distinct, max(most // work.prompt, 1)) * work.prompt


def prefill(work: Work, rows: int) -> int:
    """Running a wave's prompts; the logits behind them are a row each."""
    if work.graph:
        return prefill_tokens(work, rows) * forward_own(work) + dequantised(work)
    return (
        prefill_tokens(work, rows) * forward_token(work) + dequantised(work) + work.itemsize * work.shape.vocab * rows
    )


def decode(work: Work, rows: int) -> int:
    """One token a row: logits, what the draw makes of a tile of them, and the heads of keys that a mask multiplies."""
    shape, e = work.shape, work.itemsize
    tile = draw_tile(work, rows)
    if work.graph and work.gpu:
        return e * shape.vocab * min(rows, FIRST_ROWS) + captured(work, rows)
    return e * shape.vocab * rows + max(
        tile, repeated_heads(work, rows), rows * forward_token(work) + dequantised(work)
    )


def repeated_heads(work: Work, rows: int) -> int:
    """With a mask, older versions of transformers repeat keys and values for every query head, one layer at a time."""
    shape = work.shape
    if work.graph or not work.padded or shape.heads == shape.kv_heads or _packs_heads():
        return 0
    return 2 * shape.heads * shape.head_dim * work.itemsize * rows * work.slots


def _packs_heads() -> bool:
    found = importlib.metadata.version("transformers").split(".")[:2]
    return tuple(int(part) for part in found) >= (5, 23)


def sample_peak(work: Work, rows: int) -> int:
    first = prefill(work, rows) + captured(work, rows)
    return static(work) + kv_cache(work, rows) + max(first, decode(work, rows))
