"""What each part of a step takes, in bytes: one short formula each, from a model's shape and an adapter's.

Letters: H hidden, I intermediate, V vocabulary, d head size, e bytes of a number in the model's type. Checked on a GPU
(docs/memory.md holds the grid) and, where the count is exact, by tests that count saved tensors.
"""

from __future__ import annotations

import importlib.metadata
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from shoestring.model.draw import DRAW_TILE
from shoestring.model.fast.decoder import PRODUCTS
from shoestring.model.logprobs import head_bytes
from shoestring.model.shapes import FAMILIES, Shape
from shoestring.model.trees import rows_that_fit
from shoestring.samplers.graph import FIRST_ROWS, prompts_at_once
from shoestring.samplers.hf import PREFILL_SHARE

# Bytes of an NF4 weight with double quantisation (arXiv 2305.14314): 4 bits, a byte for each block of 64, and an fp32
# number for each 256 of those.
NF4 = 0.5 + 1 / 64 + 4 / (64 * 256)
# What each 4-bit layer holds beside that: its code tables and their rounding to the allocator's blocks.
NF4_TABLES = 2**12
# cuBLAS' workspace (32 MiB on an H100, less on older cards) and what else lies on the card all the time.
WORKSPACE = 34 * 2**20
# What the allocator maps at once: of its pool for large tensors and of that for small ones, each is filled in part.
_PAGE, _SMALL_PAGE = 20 * 2**20, 2**21
# The fp32 and fp64 numbers that a draw makes of each logit.
DRAW_BYTES = 24
CONTEXT = 800 * 2**20
"""About what the CUDA context and loaded kernels take of a card, outside every budget."""


@dataclass(frozen=True)
class Trained:
    """What an adapter (or none) trains, as the memory plan needs to know it."""

    parameters: int
    first_layer: int
    """Layers from this one up carry gradient."""
    adapted_layers: int
    """Layers that hold trained weights."""
    modules: frozenset[str] = field(default_factory=frozenset)
    """Linear layers whose input is kept for the gradient of a trained weight."""
    rank: int = 0
    layer_parameters: int = 0
    """Trained parameters of one adapted layer, which are cast to the model's type where theirs differs."""
    whole: bool = False
    """All weights of the model are trained, in its own type."""


@dataclass(frozen=True)
class Work:
    """One step's sizes, and how it is carried out."""

    shape: Shape
    trained: Trained
    itemsize: int
    nf4: bool
    prompt: int
    """Tokens of the longest prompt."""
    added: int
    """Tokens of a completion at most."""
    prompts: int
    rows: int
    """Completions of a step."""
    group: int
    """Completions of a prompt."""
    padded: bool
    """Prompts may differ in length, so that attention needs a mask while sampling."""
    gpu: bool
    state: float
    """Bytes of optimizer state for each trained parameter."""
    eager: int = 0
    """Attention that is written out: bytes that it keeps of each pair of tokens and head."""
    step_temporaries: int = 0
    """Bytes that an optimizer step takes for its while."""
    reference: Literal["none", "adapter", "copy"] = "none"
    """Where a KL term's reference comes from."""
    graph: bool = False
    """Sampled by our own decode step: prompts are cached once, and what its captured steps use stays."""
    trees: bool = False
    """What completions share is run once in training."""
    own_layers: bool = False
    """Training runs the layers by our own code, not by transformers'."""
    flash: bool = False
    """Attention of these runs without padding."""
    filtered: bool = False
    """Some draw is greedy or filtered (evaluations' are) or tells its entropy, and so needs probabilities of all
    tokens."""
    trunk_rows: int = 0
    """Completions whose residual stream is kept for training; 0 without a trunk cache."""

    @property
    def slots(self) -> int:
        return self.prompt + self.added

    @property
    def row_tokens(self) -> int:
        """Tokens of a row in training: the last one is predicted, never run."""
        return self.slots - 1


# --- what lies there all the time -----------------------------------------------------------------------------------


def weights(work: Work) -> int:
    """The base model, once; a second time for a frozen copy."""
    shape, e = work.shape, work.itemsize
    plain = shape.parameters * e
    if work.nf4:
        matrices = shape.layers * sum(linear.inputs * linear.outputs for linear in shape.linears)
        tables = NF4_TABLES * shape.layers * len(shape.linears)
        plain = int(matrices * NF4) + tables + (shape.parameters - matrices) * e
    return plain * (2 if work.reference == "copy" else 1)


def held(work: Work) -> int:
    """Trained weights beside the base model, and the optimizer's state."""
    own = 0 if work.trained.whole else 4 * work.trained.parameters
    return own + int(work.state * work.trained.parameters)


def gradient(work: Work) -> int:
    return work.trained.parameters * (work.itemsize if work.trained.whole else 4)


def workspace(work: Work) -> int:
    return WORKSPACE if work.gpu else 0


def pages(work: Work) -> int:
    """What the allocator reserves beside what it gives out; where steps are captured, these fill up to whole pages."""
    return _SMALL_PAGE + (0 if work.graph else _PAGE) if work.gpu else 0


def static(work: Work) -> int:
    return weights(work) + held(work) + workspace(work) + pages(work) + fused(work) + trunk_cache(work)


def fused(work: Work) -> int:
    """LoRA matrices once more, in the model's type, as the decode step uses them."""
    if not work.graph or work.trained.whole:
        return 0
    ranks = -(-work.trained.rank // 8) * 8
    blocks = 0
    for names in PRODUCTS:
        linears = [linear for linear in work.shape.linears if linear.name in names]
        count = sum(linear.name in work.trained.modules for linear in linears)
        if count:  # A of each, and B in a block of all
            blocks += ranks * count * (linears[0].inputs + sum(linear.outputs for linear in linears))
    return work.itemsize * blocks * work.trained.adapted_layers


def trunk_cache(work: Work) -> int:
    """The residual stream in front of the first layer that is trained, from sampling to training."""
    prompts = -(-work.trunk_rows * work.prompts // work.rows) if work.rows else 0
    return work.itemsize * work.shape.hidden * (work.trunk_rows * work.added + prompts * work.prompt)


def captured(work: Work, rows: int) -> int:
    """What captured decode steps of up to `rows` hold between samplings, in pages of their own: logits, and a layer's
    tensors."""
    if not (work.graph and work.gpu):
        return 0
    drawn = draw_tile(work, rows) if work.filtered else 0
    taken = rows * (work.itemsize * work.shape.vocab + forward_token(work)) + dequantised(work) + drawn
    return -(-taken // _PAGE) * _PAGE + _SMALL_PAGE


def draw_tile(work: Work, rows: int) -> int:
    """What a draw in plain torch makes of the logits that it takes at once."""
    return max(min(rows, DRAW_TILE // work.shape.vocab), 1) * work.shape.vocab * DRAW_BYTES


# --- sampling -------------------------------------------------------------------------------------------------------


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


def forward_token(work: Work) -> int:
    """Bytes for each token of a forward pass without gradient: the widest place of a layer."""
    shape, e = work.shape, work.itemsize
    wide = 4 if work.trained.modules & {"up_proj", "gate_up_proj"} and not work.trained.whole else 3
    scores = (4 + 2 * e) * shape.heads * work.slots if work.eager else 0
    return max(wide * e * shape.intermediate, scores) + 4 * e * shape.hidden


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


def dequantised(work: Work) -> int:
    """The largest 4-bit matrix, unpacked for a product with more than a few rows."""
    if not work.nf4:
        return 0
    return max(linear.inputs * linear.outputs for linear in work.shape.linears) * work.itemsize


def sample_peak(work: Work, rows: int) -> int:
    first = prefill(work, rows) + captured(work, rows)
    return static(work) + kv_cache(work, rows) + max(first, decode(work, rows))


# --- training -------------------------------------------------------------------------------------------------------


def kept_token(work: Work, adapted: bool = True) -> int:
    """Bytes that one layer keeps of each token for its backward pass (transformers' code, no dropout).

    Qwen2-1.5B in bf16 with rank 16 on q and v: 76,408.
    """
    shape, trained, e = work.shape, work.trained, work.itemsize
    here = trained.modules if adapted else frozenset()
    kept = _kept_by_norms(work) + _kept_by_attention(work, out=trained.whole or "o_proj" in here)
    kept += 3 * e * shape.intermediate
    if trained.whole or here & {"q_proj", "k_proj", "v_proj", "qkv_proj"}:
        kept += e * shape.hidden
    if trained.whole or here & {"gate_proj", "up_proj", "gate_up_proj"}:
        kept += e * shape.hidden
    if trained.whole or "down_proj" in here:
        kept += e * shape.intermediate
    return kept + e * trained.rank * len(here)


def _kept_by_norms(work: Work) -> int:
    """Each norm keeps its input in fp32 and its scale; and what its weight multiplies, if that is trained."""
    shape, family = work.shape, FAMILIES[work.shape.family]
    wide = family.norms * shape.hidden
    scales = family.norms
    if family.qk_norms != "none":
        wide += (shape.heads + shape.kv_heads) * shape.head_dim
        scales += shape.heads + shape.kv_heads if family.qk_norms == "head" else 2
    multiplied = (4 if family.wide_norms else work.itemsize) * work.trained.whole
    return (4 + multiplied) * wide + 4 * scales


def _kept_by_attention(work: Work, out: bool) -> int:
    """q, k, v and the output, with SDPA; written out, the repeated heads of k and v and the scores of a whole row.
    `out`: the output is kept for a trained o_proj."""
    shape, e = work.shape, work.itemsize
    width, kv_width = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    if work.eager:
        return 3 * e * width + work.eager * shape.heads * work.row_tokens + e * width * out
    kept = 2 * e * (width + kv_width) + 4 * shape.heads
    if FAMILIES[shape.family].fused:  # the fused output stays whole behind its views
        kept += e * (width + kv_width) + e * width * out
    return kept


def kept_layers(work: Work) -> int:
    """Layers that carry gradient."""
    return work.shape.layers - work.trained.first_layer


def _casts(work: Work) -> int:
    """Adapter matrices of one layer in the model's type."""
    trained = work.trained
    return 0 if trained.whole or work.itemsize == 4 else trained.layer_parameters * work.itemsize


def backward_token(work: Work) -> int:
    """Bytes for each token on the way back through the MLP: three wide tensors, one of them kept already if down_proj
    is adapted."""
    shape, e = work.shape, work.itemsize
    kept_already = work.trained.whole or "down_proj" in work.trained.modules
    scores = (4 + 2 * e) * shape.heads * work.slots if work.eager else 0
    return max((2 if kept_already else 3) * e * shape.intermediate, scores) + e * shape.hidden


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


def kept_own(work: Work) -> int:
    """Bytes that one of our own layers keeps of each token beside its input: q, k, v, the attention's output, the
    residual stream behind it, gate and up, what the A matrices in front of these give, and of attention over rows
    without padding its sums."""
    shape = work.shape
    width, kv_width = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    inner = work.trained.rank * len(work.trained.modules - {"down_proj"})
    sums = 4 * shape.heads * work.flash
    return work.itemsize * (2 * width + 2 * kv_width + shape.hidden + 2 * shape.intermediate + inner) + sums


def forward_own(work: Work) -> int:
    """Bytes for each token of a pass through our own layers without gradient."""
    return kept_own(work) + work.itemsize * (work.shape.intermediate + 2 * work.shape.hidden)


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
        gradient(work) + work.step_temporaries,
    )
    dense = (
        work.itemsize * work.shape.embedding if work.trained.whole else 0
    )  # the embedding's gradient, before it is added
    return static(work) + captured(work, rows) + above + dense
