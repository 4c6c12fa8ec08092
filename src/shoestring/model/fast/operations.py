"""What one decode step does: norms and products, rotary embedding, cache, attention, draw.

Each operation stands twice, with the signature that it has here: in `plain`, in torch, which runs anywhere and is the
reference, and in `fused`, in Triton for CUDA. Letters: B rows of the batch, H hidden, D head size, V vocabulary.

A batch names its completions by their place in `Table.info`, so that rows come and go without anything being moved, and
`fused` reads where the cache lies from `Table.where`, so that a captured graph outlives the cache's memory.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from shoestring.model.sampling import Sampling
from shoestring.types import Paths

# Columns of `Table.info`.
SLOT, LENGTH, PROMPT, PROMPT_LENGTH, LIMIT, DONE, TOKEN, COLUMNS = range(8)


@dataclass
class Keys:
    """Keys and values of a sampling: each prompt once, [2, L, prompts, kv heads, prompt slots, D], and what each
    completion adds, [2, L, rows, kv heads, own slots, D] (with `Operations.whole_rows` behind a copy of its prompt)."""

    prompt: Tensor
    own: Tensor
    trunk: Tensor | None = None
    """The residual stream in front of one layer, for each completion of the sampling, [R + 1, own slots, H]."""


@dataclass
class Table:
    """The completions of a sampling, R of them and one behind them that stands for none, and where they are at."""

    info: Tensor
    """[R + 1, COLUMNS] int32: cache slot, tokens of it in the cache, prompt slot and length, limit, whether it has
    ended, and the token to run next."""
    tokens: Tensor
    """[R + 1, T] int64, as drawn."""
    logprobs: Tensor
    """[R + 1, T] fp32."""
    uniform: Tensor
    """[R + 1, T] fp64, the noise of each draw."""
    ends: Tensor
    """Whether a token ends a completion, [V] bool."""
    where: Tensor
    """[10] int64: addresses of prompt keys, prompt values, own keys and own values; prompt slots, own slots, prompts
    and rows of these; address and slots of the trunk."""
    keys: Keys | None = None
    entropies: Tensor | None = None
    """[R + 1, T] fp32, where a sampling has asked for them."""

    @classmethod
    def empty(cls, rows: int, width: int, vocab_size: int, device: torch.device) -> Table:
        """For so many completions of up to `width` tokens."""
        info = torch.zeros(rows + 1, COLUMNS, dtype=torch.int32, device=device)
        info[rows, DONE] = 1
        shape = (rows + 1, width)
        return cls(
            info,
            torch.zeros(shape, dtype=torch.int64, device=device),
            torch.zeros(shape, dtype=torch.float32, device=device),
            torch.zeros(shape, dtype=torch.float64, device=device),
            torch.zeros(vocab_size, dtype=torch.bool, device=device),
            torch.zeros(10, dtype=torch.int64, device=device),
        )

    def hold(self, keys: Keys | None) -> None:
        """Takes this cache in use, or none."""
        self.keys = keys
        if keys is None:
            return
        sizes = [keys.prompt.shape[4], keys.own.shape[4], keys.prompt.shape[2], keys.own.shape[2]]
        addresses = [part[kind].data_ptr() for part in (keys.prompt, keys.own) for kind in (0, 1)]
        trunk = [0, 0] if keys.trunk is None else [keys.trunk.data_ptr(), keys.trunk.shape[1]]
        self.where.copy_(torch.tensor([*addresses, *sizes, *trunk]))


@dataclass(frozen=True)
class Heads:
    """What attention looks like."""

    heads: int
    kv_heads: int
    head_dim: int
    inv_freq: Tensor
    """[D / 2] fp32."""
    scaling: float
    """Of the rotary embedding."""
    eps: float

    @property
    def counts(self) -> list[int]:
        """Of queries, keys and values, as they lie beside each other."""
        return [self.heads, self.kv_heads, self.kv_heads]


class Product(Protocol):
    """One product for the linear modules that share an input, with LoRA beside it."""

    weight: Tensor | None
    """[outs, inputs]; None where it is not one tensor of numbers, as in 4 bits."""
    bias: Tensor | None
    down: Tensor
    """[tail, inputs]: the A matrices, and zeros up to a multiple of 8."""
    up: Tensor
    """[outs, tail]: the B matrices, scaled, each in its own block."""

    def __call__(self, x: Tensor) -> Tensor: ...

    def add_to(self, x: Tensor, y: Tensor) -> None:
        """x += the product of y."""
        ...


@dataclass
class Stream:
    """The residual stream of a batch, and what a kernel that has added to it found out for the next norm."""

    x: Tensor
    """[B, H]."""
    norm: Tensor | None = None
    """That norm's weight, [H]."""
    gained: Tensor | None = None
    """[B, H]: x times it; None where nobody has taken the product."""
    squares: Tensor | None = None
    """[n, B] fp32: what blocks of each row's numbers have for the sum of their squares."""


class Operations(Protocol):
    """The two of them."""

    @property
    def whole_rows(self) -> bool:
        """Whether a completion's row of the cache begins with its prompt."""
        ...

    def begin(self, rows: Tensor, table: Table, heads: Heads, embedding: Tensor) -> Tensor:
        """A step of these rows, [B], begins: the embeddings of their next tokens, [B, H] of [V, H]."""
        ...

    def norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """RMS norm (arXiv 1910.07467) of [B, H]."""
        ...

    def add_norm(self, x: Tensor, y: Tensor, weight: Tensor, eps: float) -> Tensor:
        """x += y, and the norm of that. [B, H] each; `y` may be a view with longer rows."""
        ...

    def attend(
        self,
        qkv: Tensor,
        rows: Tensor,
        table: Table,
        layer: int,
        heads: Heads,
        norms: tuple[Tensor, Tensor] | None,
        window: int | None,
    ) -> Tensor:
        """Attention of each row's newest token, [B, (heads + 2 kv) D], over its prompt, its own tokens and itself:
        [B, heads D]. Queries and keys are normed (if `norms` of both are given) and rotated; key and value go to the
        cache."""
        ...

    def normed_linear(self, stream: Stream, norm: Tensor, eps: float, product: Product) -> Tensor:
        """The product of the stream's norm, with its adapter: [B, outs]."""
        ...

    def normed_gated(self, stream: Stream, norm: Tensor, eps: float, product: Product) -> Tensor:
        """`swiglu` of the same of gate and up: [B, I]."""
        ...

    def add_linear(self, stream: Stream, y: Tensor, product: Product, norm: Tensor | None) -> None:
        """Adds the product of y, [B, inputs], with its adapter, to the stream; `norm` is the weight of the norm that
        comes next, if one does."""
        ...

    def norm_back(
        self, grad: Tensor, x: Tensor, weight: Tensor, eps: float, add: Tensor, *, again: bool = False
    ) -> Tensor:
        """`add` and the gradient of x in `norm`, from that of its output. [B, H] each. `again` overwrites `grad` with
        that output."""
        ...

    def rotate(self, qkv: Tensor, positions: Tensor, heads: Heads) -> Tensor:
        """A copy of queries, keys and values, [B, (heads + 2 kv) D], with rotary embedding (arXiv 2104.09864) of the
        first two, at positions [B]."""
        ...

    def rotate_back(self, grad: Tensor, positions: Tensor, heads: Heads) -> Tensor:
        """Overwrites the gradient of `rotate`'s output with that of its input."""
        ...

    def spread(self, qkv: Tensor, paths: Paths, heads: Heads) -> tuple[Tensor, Tensor, Tensor]:
        """Of the nodes of a tree, [T, (heads + 2 kv) D]: each one's rotated query, [T, heads, D], and at each place of
        its unpadded rows the rotated key and the value, [P, kv, D] both."""
        ...

    def spread_back(self, of_q: Tensor, of_keys: Tensor, of_values: Tensor, paths: Paths, heads: Heads) -> Tensor:
        """The gradient of `qkv` in `spread`, from those of what it gave."""
        ...

    def attend_rows(
        self, q: Tensor, keys: Tensor, values: Tensor, paths: Paths, window: int | None
    ) -> tuple[Tensor, Tensor]:
        """Causal attention of what `spread` gave, [T, heads, D], and the logarithms of its sums, [heads, T]."""
        ...

    def attend_rows_back(
        self,
        grad: Tensor,
        q: Tensor,
        keys: Tensor,
        values: Tensor,
        found: Tensor,
        mass: Tensor,
        paths: Paths,
        window: int | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The gradients of q, keys and values, from that of what was `found`."""
        ...

    def swiglu(self, gate_up: Tensor) -> Tensor:
        """silu(gate) up, [B, I], of [B, 2 I]."""
        ...

    def swiglu_back(self, grad: Tensor, gate_up: Tensor) -> None:
        """Overwrites gate and up, [B, 2 I], with their gradients, from that of `swiglu`'s output, [B, I], and `grad`
        with that output."""
        ...

    def pick(self, logits: Tensor, rows: Tensor, table: Table, sampling: Sampling) -> tuple[Tensor, Tensor]:
        """The next token of each row, [B] int64, and its log-prob, [B] fp32, from logits, [B, V]."""
        ...

    def keep(self, x: Tensor, rows: Tensor, table: Table) -> None:
        """Takes the residual stream of the rows' tokens, [B, H], to the trunk."""
        ...

    def advance(self, token: Tensor, logprob: Tensor, rows: Tensor, table: Table) -> None:
        """Writes down what was drawn; ends rows at an end token or their limit. Ended rows stay as they are."""
        ...
