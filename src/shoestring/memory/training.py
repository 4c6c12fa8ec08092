"""What training takes."""

from __future__ import annotations

from typing import NamedTuple

from shoestring.memory.footprint import (
    Work,
    _casts,
    backward_token,
    captured,
    computed,
    dequantised,
    forward_own,
    forward_token,
    gradient,
    kept_layers,
    kept_own,
    kept_token,
    static,
)
from shoestring.model.logit_tiles import head_bytes
from shoestring.model.shapes import FAMILIES
from shoestring.model.trees import rows_that_fit


class MicroBatch(NamedTuple):
    """The largest that a step has."""

    nodes: int
    """Tokens that are run."""
    places: int
    """Tokens of its padded paths, which attention runs over."""
    scored: int
    alone: bool
    """It holds all of the step's rows."""


def micro_batch(work: Work, rows: int) -> MicroBatch:
    """Of as many tokens as `rows` padded rows have, with every row at full length."""
    if not work.trees:
        tokens = rows * work.row_tokens
        return MicroBatch(tokens, tokens, rows * work.added, rows >= work.rows)
    count, nodes = rows_that_fit(rows * work.row_tokens, work.prompt, work.added - 1, work.group, work.rows)
    return MicroBatch(nodes, count * work.row_tokens, count * work.added, count >= work.rows)


def activations(work: Work, batch: MicroBatch, checkpointing: bool) -> int:
    """What the layers that carry gradient hold, at the worst moment of forward and backward."""
    return kept(work, batch.nodes, checkpointing) + on_the_way_back(work, batch, checkpointing)


def kept(work: Work, tokens: int, checkpointing: bool) -> int:
    layers = kept_layers(work)
    if checkpointing:
        return layers * work.itemsize * work.shape.hidden * tokens
    if work.own_layers:
        return layers * (kept_own(work) + work.itemsize * work.shape.hidden) * tokens
    adapted = min(work.trained.adapted_layers, layers)
    plain = layers - adapted
    per_token = adapted * kept_token(work) + plain * kept_token(work, adapted=False)
    return per_token * tokens + adapted * _casts(work)


def on_the_way_back(work: Work, batch: MicroBatch, checkpointing: bool) -> int:
    tokens = batch.nodes
    if work.own_layers:
        again = kept_own(work) * tokens if checkpointing else 0
        return back_own(work, batch, checkpointing) + again + dequantised(work)
    back = backward_token(work) * tokens + dequantised(work)
    if checkpointing:  # one layer is there again
        back += (kept_token(work) + 2 * work.itemsize * work.shape.hidden) * tokens + _casts(work)
    return back


def back_own(work: Work, batch: MicroBatch, checkpointing: bool) -> int:
    """Beside what is kept of one of our own layers: on the way back through the MLP, where gate and up are overwritten,
    or through attention."""
    shape = work.shape
    width, kv_width = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    mlp = work.itemsize * (shape.intermediate + shape.hidden) * batch.nodes
    beside = 2 * shape.hidden
    if checkpointing:  # what was computed again is let go after use; autograd lets go of nothing before the end
        beside -= 2 * shape.intermediate
    attention = work.itemsize * beside * batch.nodes
    if work.flash:
        attention += _flash(work, batch)
    else:
        path = 4 * (width + 2 * kv_width) + 2 * width
        attention += work.itemsize * ((width + 2 * kv_width) * batch.nodes + path * batch.places)
    return max(mlp, attention)


def _flash(work: Work, batch: MicroBatch) -> int:
    """The way back through attention over rows without padding: q, its gradient twice (once in fp32, each row with 128
    tokens more) and that of what was found; keys, values and their gradients, these for each query head first."""
    shape, e = work.shape, work.itemsize
    width, kv_width = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    node = (3 * e + 4) * width + 4 * shape.heads
    place = 4 * e * kv_width + 2 * e * width * (shape.heads != shape.kv_heads)
    return node * batch.nodes + place * batch.places + 4 * 128 * width * -(-batch.places // work.row_tokens)


def head(work: Work, scored: int) -> int:
    """The tiled log-probs of `scored` tokens, forward and backward, their hidden states and gradients included."""
    shape = work.shape
    post = FAMILIES[shape.family].post
    how = {"frozen": not work.trained.whole, "post": post, "kernel": work.gpu and not post}
    own = head_bytes(scored, shape.vocab, shape.hidden, work.itemsize, **how)
    return own + 2 * work.itemsize * shape.hidden * scored


def train_peak(work: Work, batch: MicroBatch, checkpointing: bool, rows: int = 0) -> int:
    """With micro-batches like this, behind samplings of `rows` at once."""
    tokens, wide = batch.nodes, work.itemsize * work.shape.hidden
    below = forward_token(work) * tokens + dequantised(work)  # the layers that carry no gradient
    behind = wide * tokens  # the last layer's output
    if work.own_layers:
        below = 0 if work.trunk_rows else forward_own(work) * tokens + dequantised(work)
    there = kept(work, tokens, checkpointing)
    back = there + on_the_way_back(work, batch, checkpointing) + (0 if work.own_layers else behind)
    before = gradient(work) * (not batch.alone or work.trained.whole)  # of micro-batches before this one
    above = max(
        before + max(below, back, there + behind + head(work, batch.scored)),
        gradient(work) + max(work.step_temporaries, computed(work)),
    )
    dense = (
        work.itemsize * work.shape.embedding if work.trained.whole else 0
    )  # the embedding's gradient, before it is added
    return static(work) + captured(work, rows) + above + dense
