"""What each part of a step takes, in bytes: one short formula each, from a model's shape and an adapter's.

Letters: H hidden, I intermediate, V vocabulary, d head size, e bytes of a number in the model's type. Checked on a GPU
(docs/memory.md holds the grid) and, where the count is exact, by tests that count saved tensors.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from shoestring.adapters.base import AdapterCost
from shoestring.model.draw import DRAW_TILE
from shoestring.model.fast.decoder import PRODUCTS
from shoestring.model.shapes import FAMILIES, Shape

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
class Work:
    """One step's sizes, and how it is carried out."""

    shape: Shape
    trained: AdapterCost
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
    state: int
    """Bytes of optimizer state."""
    eager: int = 0
    """Attention that is written out: bytes that it keeps of each pair of tokens and head."""
    step_temporaries: int = 0
    """Bytes that an optimizer step takes for its while."""
    reference: Literal["none", "adapter", "copy"] = "none"
    """Where a KL term's reference comes from."""
    slow: str = ""
    """Why our own decode step and layers do not take it; empty if they do."""
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
    own = 0 if work.trained.whole else work.trained.trained(work.itemsize)
    return own + work.trained.frozen(work.itemsize) + work.state


def gradient(work: Work) -> int:
    """Of the trained weights; and of computed factors, which gather theirs until the update ends."""
    return work.trained.trained(work.itemsize) + computed(work)


def computed(work: Work) -> int:
    """Factors that are computed from parameters, in fp32."""
    return 4 * work.trained.computed * work.own_layers


def workspace(work: Work) -> int:
    return WORKSPACE if work.gpu else 0


def pages(work: Work) -> int:
    """What the allocator reserves beside what it gives out; where steps are captured, these fill up to whole pages."""
    return _SMALL_PAGE + (0 if work.graph else _PAGE) if work.gpu else 0


def static(work: Work) -> int:
    return weights(work) + held(work) + workspace(work) + pages(work) + fused(work) + trunk_cache(work)


def fused(work: Work) -> int:
    """An adapter's factors once more, in the model's type, as the decode step and our own layers use them."""
    if not (work.graph or work.own_layers) or work.trained.whole:
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


# --- sampling -------------------------------------------------------------------------------------------------------


def forward_token(work: Work) -> int:
    """Bytes for each token of a forward pass without gradient: the widest place of a layer."""
    shape, e = work.shape, work.itemsize
    wide = 4 if work.trained.modules & {"up_proj", "gate_up_proj"} and not work.trained.whole else 3
    scores = (4 + 2 * e) * shape.heads * work.slots if work.eager else 0
    return max(wide * e * shape.intermediate, scores) + 4 * e * shape.hidden + _in_fp32(work)


def _in_fp32(work: Work) -> int:
    """Bytes of a token's input and output of a linear layer, which an adapter of PEFT makes in fp32, twice."""
    if not work.trained.kept_token:
        return 0
    return 8 * max(linear.inputs + linear.outputs for linear in work.shape.linears)


def dequantised(work: Work) -> int:
    """The largest matrix, for a product with more than a few rows: 4-bit weights unpacked, and three times in fp32 for
    an adapter without factors."""
    largest = max(linear.inputs * linear.outputs for linear in work.shape.linears)
    return largest * (work.itemsize * work.nf4 + 12 * bool(work.trained.slow))


# --- training -------------------------------------------------------------------------------------------------------


def kept_token(work: Work, adapted: bool = True) -> int:
    """Bytes that one layer keeps of each token for its backward pass (transformers' code, no dropout).

    Qwen2-1.5B in bf16 with rank 16 on q and v: 76,408.
    """
    shape, trained, e = work.shape, work.trained, work.itemsize
    here = trained.modules if adapted else frozenset()
    kept = _kept_by_norms(work) + _kept_by_attention(
        work, out=trained.whole or ("o_proj" in here and trained.down_trains)
    )
    kept += 3 * e * shape.intermediate
    rows = e * trained.rank * len(here) + (trained.kept_token.get(e, 0) if adapted else 0)
    if not trained.down_trains:  # no input is kept for an adapter
        return kept + rows
    if trained.whole or here & {"q_proj", "k_proj", "v_proj", "qkv_proj"}:
        kept += e * shape.hidden
    if trained.whole or here & {"gate_proj", "up_proj", "gate_up_proj"}:
        kept += e * shape.hidden
    if trained.whole or "down_proj" in here:
        kept += e * shape.intermediate
    return kept + rows


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
    """Adapter matrices of one layer in the model's type, and what else an adapter keeps of its own weights there."""
    trained = work.trained
    cast = 0 if trained.whole or work.itemsize == 4 else trained.layer_parameters * work.itemsize
    return cast + trained.kept_layer.get(work.itemsize, 0)


def backward_token(work: Work) -> int:
    """Bytes for each token on the way back through the MLP: three wide tensors, one of them kept already if down_proj
    is adapted."""
    shape, e = work.shape, work.itemsize
    kept_already = work.trained.whole or ("down_proj" in work.trained.modules and work.trained.down_trains)
    scores = (4 + 2 * e) * shape.heads * work.slots if work.eager else 0
    return max((2 if kept_already else 3) * e * shape.intermediate, scores) + e * shape.hidden + _in_fp32(work)


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


def forward_own(work: Work) -> int:
    """Bytes for each token of a pass through our own layers without gradient."""
    return _own(work) + work.itemsize * (work.shape.intermediate + 2 * work.shape.hidden)


def kept_own(work: Work) -> int:
    """Bytes that one of our own layers keeps of each token beyond its input."""
    trained = work.trained
    attended = work.flash or ("o_proj" in trained.modules and trained.down_trains)
    return _own(work) - (0 if attended else work.itemsize * work.shape.heads * work.shape.head_dim)


def _own(work: Work) -> int:
    """q, k, v, the attention's output, the residual stream behind it, gate and up, what the A matrices in front of
    these give, and of attention over rows without padding its sums."""
    shape = work.shape
    width, kv_width = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    inner = work.trained.rank * len(work.trained.modules - {"down_proj"})
    sums = 4 * shape.heads * work.flash
    return work.itemsize * (2 * width + 2 * kv_width + shape.hidden + 2 * shape.intermediate + inner) + sums
