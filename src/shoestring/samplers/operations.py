"""What one decode step does between its matrix products: norms, rotary embedding, cache, attention, draw.

Each operation stands here twice with one signature: `Plain` in torch, which runs anywhere and is the reference, and
`Fused` in Triton for CUDA. Letters: B rows of the batch, H hidden, D head size, V vocabulary.

A batch names its completions by their place in `Table.info`, so that rows come and go without anything being moved, and
`Fused` reads where the cache lies from `Table.where`, so that a captured graph outlives the cache's memory.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from shoestring.samplers.base import Sampling
from shoestring.samplers.draw import draw, entropy

# Columns of `Table.info`.
SLOT, LENGTH, PROMPT, PROMPT_LENGTH, LIMIT, DONE, TOKEN, COLUMNS = range(8)
# Logits that one program of the draw looks at.
_DRAW_BLOCK = 4096
# Products with LoRA are one kernel up to so many rows, and up to sizes that differ for few rows and for more: where it
# proved faster than three of cuBLAS, on an H100 with ranks of 16.
_FEW_ROWS, _MOST_ROWS, _MOST_RANKS = 64, 512, 64


class _Largest(NamedTuple):
    weights: int
    inputs: int


_LARGEST = (_Largest(2**25, 5_000), _Largest(2**23, 2_048))


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


class Operations(Protocol):
    """The two of them."""

    @property
    def whole_rows(self) -> bool:
        """Whether a completion's row of the cache begins with its prompt."""
        ...

    def begin(self, rows: Tensor, table: Table, heads: Heads) -> None:
        """A step of these rows, [B], begins."""
        ...

    def norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """RMS norm (arXiv 1910.07467) of [B, H]."""
        ...

    def add_norm(self, x: Tensor, y: Tensor, weight: Tensor, eps: float) -> Tensor:
        """x += y, and the norm of that. [B, H] each; `y` may be a view with longer rows."""
        ...

    def place(
        self, qkv: Tensor, rows: Tensor, table: Table, layer: int, heads: Heads, norms: tuple[Tensor, Tensor] | None
    ) -> Tensor:
        """Normed (if `norms` of q and k are given) and rotated queries, [B, heads, D], from [B, (heads + 2 kv) D]; keys
        and values go to the cache."""
        ...

    def attend(self, q: Tensor, rows: Tensor, table: Table, layer: int, heads: Heads, window: int | None) -> Tensor:
        """Attention of each row's query over its prompt and its own tokens: [B, heads D]."""
        ...

    def linear(self, x: Tensor, product: Product) -> Tensor:
        """The product of [B, inputs], with its adapter: [B, outs]."""
        ...

    def gated(self, x: Tensor, product: Product) -> Tensor:
        """`swiglu` of the product of gate and up: [B, I] of [B, H]."""
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


class _Step:
    """What the layers of one step share in `Plain`."""

    def __init__(self, rows: Tensor, table: Table, heads: Heads):
        assert table.keys is not None
        own = table.keys.own
        info = table.info[rows].long()
        self._at = info[:, PROMPT_LENGTH] + info[:, LENGTH]  # each token's position, and its place in its row
        self._deep, self._heads, self._dtype = int(self._at.max()) + 1, heads, own.dtype
        self.cos, self.sin = _turn(self._at, heads, own.dtype)
        slot, ended = info[:, SLOT], info[:, DONE] != 0
        # [B kv]: the cache's places, row by row and head by head
        head = slot[:, None] * heads.kv_heads + torch.arange(heads.kv_heads, device=own.device)
        self.places = (head * own.shape[4] + self._at[:, None]).flatten()
        self.going = (~ended).repeat_interleave(heads.kv_heads).nonzero().flatten() if bool(ended.any()) else None
        self._slot = None if bool((slot == torch.arange(len(slot), device=own.device)).all()) else slot
        self._unseen: dict[int | None, Tensor] = {}

    def read(self, own: Tensor) -> tuple[Tensor, Tensor]:
        """The rows' keys and values of one layer's `own`, as far as there are any, [B kv, deep, D] each."""
        here = own[:, : len(self._at)] if self._slot is None else own[:, self._slot]
        keys, values = here[:, :, :, : self._deep].flatten(1, 2)
        return keys, values

    def unseen(self, window: int | None) -> Tensor:
        """-inf where attention must not look, else 0, [B kv, 1, deep]."""
        if window not in self._unseen:
            place, at = torch.arange(self._deep, device=self._at.device), self._at[:, None]
            hidden = place > at if window is None else (place > at) | (place <= at - window)
            scores = torch.zeros(hidden.shape, dtype=self._dtype, device=at.device).masked_fill_(hidden, -torch.inf)
            self._unseen[window] = scores.repeat_interleave(self._heads.kv_heads, 0)[:, None]
        return self._unseen[window]


class Plain:
    """Plain torch: the reference, and what runs on the CPU. Attention over whole rows gathers nothing."""

    whole_rows = True

    def __init__(self) -> None:
        self._step: _Step | None = None
        self._turn: tuple[Tensor, Tensor, Tensor] | None = None
        """Positions that were last rotated, and their `_turn`."""

    def begin(self, rows: Tensor, table: Table, heads: Heads) -> None:
        self._step = _Step(rows, table, heads)

    def norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        return F.rms_norm(x, weight.shape, weight, eps)

    def add_norm(self, x: Tensor, y: Tensor, weight: Tensor, eps: float) -> Tensor:
        return self.norm(x.add_(y), weight, eps)

    def place(
        self, qkv: Tensor, rows: Tensor, table: Table, layer: int, heads: Heads, norms: tuple[Tensor, Tensor] | None
    ) -> Tensor:
        assert table.keys is not None
        count, size = heads.heads, heads.head_dim
        qk, v = qkv.unflatten(-1, (-1, size)).split([count + heads.kv_heads, heads.kv_heads], 1)
        if norms is not None:
            qk = torch.cat(
                [self.norm(qk[:, :count], norms[0], heads.eps), self.norm(qk[:, count:], norms[1], heads.eps)], 1
            )
        step = self._step or _Step(rows, table, heads)
        turned = _rotated(qk, step.cos, step.sin)
        both, places = torch.stack([turned[:, count:], v]).flatten(1, 2), step.places
        if step.going is not None:
            both, places = both[:, step.going], places[step.going]
        table.keys.own[:, layer].view(2, -1, size).index_copy_(1, places, both)
        return turned[:, :count]

    def attend(self, q: Tensor, rows: Tensor, table: Table, layer: int, heads: Heads, window: int | None) -> Tensor:
        assert table.keys is not None
        step = self._step or _Step(rows, table, heads)
        keys, values = step.read(table.keys.own[:, layer])
        asked = q.reshape(len(keys), -1, heads.head_dim)
        scores = torch.baddbmm(step.unseen(window), asked, keys.transpose(1, 2), alpha=heads.head_dim**-0.5)
        weights = scores.softmax(-1, dtype=_wide_dtype(q)).to(q.dtype)
        return (weights @ values).view(len(q), -1)

    def linear(self, x: Tensor, product: Product) -> Tensor:
        return product(x)

    def gated(self, x: Tensor, product: Product) -> Tensor:
        return self.swiglu(product(x))

    def norm_back(
        self, grad: Tensor, x: Tensor, weight: Tensor, eps: float, add: Tensor, *, again: bool = False
    ) -> Tensor:
        wide, pulled = _wide(x), _wide(grad) * _wide(weight)
        scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
        along = (pulled * wide).mean(-1, keepdim=True)
        if again:
            grad.copy_(self.norm(x, weight, eps))
        return add + (scale * (pulled - wide * scale.square() * along)).to(x.dtype)

    def rotate(self, qkv: Tensor, positions: Tensor, heads: Heads) -> Tensor:
        return self._turned(qkv.clone(), positions, heads, 1)

    def rotate_back(self, grad: Tensor, positions: Tensor, heads: Heads) -> Tensor:
        return self._turned(grad, positions, heads, -1)

    def _turned(self, qkv: Tensor, positions: Tensor, heads: Heads, sign: int) -> Tensor:
        if self._turn is None or self._turn[0] is not positions:
            self._turn = positions, *_turn(positions, heads, qkv.dtype)
        _, cos, sin = self._turn
        qk = qkv[:, : (heads.heads + heads.kv_heads) * heads.head_dim].unflatten(-1, (-1, heads.head_dim))
        qk.copy_(_rotated(qk, cos, sin if sign > 0 else -sin))
        return qkv

    def swiglu(self, gate_up: Tensor) -> Tensor:
        gate, up = gate_up.chunk(2, -1)
        return F.silu(gate).mul_(up)

    def swiglu_back(self, grad: Tensor, gate_up: Tensor) -> None:
        gate, up = gate_up.chunk(2, -1)
        wide = _wide(gate)
        share = wide.sigmoid()
        of_gate = _wide(grad) * _wide(up) * share * (1 + wide * (1 - share))
        active = self.swiglu(gate_up)
        up.copy_((_wide(grad) * wide).mul_(share))
        gate.copy_(of_gate)
        grad.copy_(active)

    def pick(self, logits: Tensor, rows: Tensor, table: Table, sampling: Sampling) -> tuple[Tensor, Tensor]:
        return draw(logits, table.uniform[rows, _next(table, rows)], sampling)

    def keep(self, x: Tensor, rows: Tensor, table: Table) -> None:
        assert table.keys is not None
        assert table.keys.trunk is not None
        info = table.info[rows].long()
        going = info[:, DONE] == 0
        table.keys.trunk[rows[going], info[going, LENGTH]] = x[going]

    def advance(self, token: Tensor, logprob: Tensor, rows: Tensor, table: Table) -> None:
        info = table.info[rows]
        ended = info[:, DONE] != 0
        if bool(ended.any()):
            rows, token, logprob, info = (x[~ended] for x in (rows, token, logprob, info))
        place = info[:, LENGTH] + 1
        table.tokens[rows, place] = token
        table.logprobs[rows, place] = logprob
        info[:, LENGTH] = place
        info[:, TOKEN] = token
        info[:, DONE] = table.ends[token] | (place + 1 >= info[:, LIMIT])
        table.info[rows] = info


def keep_entropy(logits: Tensor, rows: Tensor, table: Table, sampling: Sampling) -> None:
    """Writes down the entropy behind each row's next token, from logits, [B, V]. Ended rows stay as they are, and the
    GPU is not waited for."""
    assert table.entropies is not None
    place = _next(table, rows).clamp(max=table.entropies.shape[1] - 1)
    ended = table.info[rows, DONE] != 0
    table.entropies[rows, place] = torch.where(ended, table.entropies[rows, place], entropy(logits, sampling))


def _next(table: Table, rows: Tensor) -> Tensor:
    """The place in its completion of each row's next token, [B]. (-1 tokens are in the cache before the first is
    drawn.)"""
    return (table.info[rows, LENGTH] + 1).long()


def _wide(x: Tensor) -> Tensor:
    return x.to(_wide_dtype(x))


def _wide_dtype(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _turn(positions: Tensor, heads: Heads, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Cosines, and sines with the sign that they have in each half, [B, 1, D] each."""
    angle = positions[:, None, None] * heads.inv_freq
    cos, sin = (angle.cos() * heads.scaling).to(dtype), (angle.sin() * heads.scaling).to(dtype)
    return torch.cat([cos, cos], -1), torch.cat([-sin, sin], -1)


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """By the angles of `_turn`."""
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, -1), sin)


class Fused:
    """Triton, for CUDA. Attention is cut into `splits` parts of each row's tokens where rows are few."""

    whole_rows = False

    def __init__(self, programs: int = 264, shared: int = 227 * 2**10):
        """`programs` is how many keep the card busy, two a multiprocessor, and `shared` the bytes of shared memory that
        one can have: both by default an H100's."""
        self._programs, self._shared = programs, shared

    @classmethod
    def on(cls, device: torch.device) -> Fused:
        card = torch.cuda.get_device_properties(device)
        return cls(2 * card.multi_processor_count, card.shared_memory_per_multiprocessor - 2**10)

    def stages(self, size: int, most: int) -> int:
        """How many steps of `size` bytes a kernel can load ahead, with a fifth of shared memory left for the rest."""
        return max(min(self._shared * 4 // 5 // size, most), 1)

    def begin(self, rows: Tensor, table: Table, heads: Heads) -> None:
        """Kernels read what they need from the table."""

    def norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        return self._norm(x, x, weight, eps, add=False)

    def add_norm(self, x: Tensor, y: Tensor, weight: Tensor, eps: float) -> Tensor:
        return self._norm(x, y, weight, eps, add=True)

    def _norm(self, x: Tensor, y: Tensor, weight: Tensor, eps: float, *, add: bool) -> Tensor:
        out = torch.empty_like(x)
        count, width = x.shape
        block = _power(width)
        kernels().add_norm[(count,)](
            x,
            y,
            weight,
            out,
            x.stride(0),
            y.stride(0),
            width,
            eps,
            ADD=add,
            BLOCK=block,
            num_warps=8 if block > 1024 else 4,
        )
        return out

    def place(
        self, qkv: Tensor, rows: Tensor, table: Table, layer: int, heads: Heads, norms: tuple[Tensor, Tensor] | None
    ) -> Tensor:
        q = qkv.new_empty(len(qkv), heads.heads, heads.head_dim)
        first, second = norms if norms is not None else (heads.inv_freq, heads.inv_freq)
        kernels().place[(len(qkv), heads.heads + 2 * heads.kv_heads)](
            qkv, q, table.info, rows, table.where, heads.inv_freq, first, second, layer, qkv.stride(0), heads.eps,
            heads.scaling, HEADS=heads.heads, KV=heads.kv_heads, D=heads.head_dim, NORM=norms is not None, num_warps=1,
        )  # fmt: skip
        return q

    def attend(self, q: Tensor, rows: Tensor, table: Table, layer: int, heads: Heads, window: int | None) -> Tensor:
        count, d = len(q), heads.head_dim
        block = 64 if q.element_size() == 2 else 32
        splits = self._splits(count * heads.kv_heads, table, block)
        out = q.new_empty(count, heads.heads * d)
        part = q.new_empty((count, heads.heads, splits, d), dtype=torch.float32) if splits > 1 else out
        mass = q.new_empty((count, heads.heads, splits), dtype=torch.float32) if splits > 1 else out
        repeat = heads.heads // heads.kv_heads
        kernels().attend[(count, heads.kv_heads, splits)](
            q, part, mass, table.info, rows, table.where, layer, d**-0.5, 2**30 if window is None else window,
            KV=heads.kv_heads, REPEAT=repeat, PADDED=max(_power(repeat), 16), D=d, BLOCK=block, SPLITS=splits,
            num_warps=4, num_stages=self.stages(2 * block * d * q.element_size(), 3 if q.element_size() == 2 else 2),
        )  # fmt: skip
        if splits > 1:
            kernels().combine[(count, heads.heads)](part, mass, out, D=d, SPLITS=splits, PADDED=_power(splits))
        return out

    def _splits(self, programs: int, table: Table, block: int) -> int:
        """Parts of each row's tokens, by the longest that it can get."""
        longest = table.tokens.shape[1] // block + 2
        return max(min(self._programs // max(programs, 1), longest, 16), 1)

    def linear(self, x: Tensor, product: Product) -> Tensor:
        return self._product(x, product) if self.one_kernel(x, product) else product(x)

    def gated(self, x: Tensor, product: Product) -> Tensor:
        return self._product(x, product, gated=True) if self.one_kernel(x, product) else self.swiglu(product(x))

    def one_kernel(self, x: Tensor, product: Product) -> bool:
        """Whether base product, A and B are better one kernel than three: beside a large weight or for a long sum,
        cuBLAS is faster."""
        if product.weight is None or not 0 < len(product.down) <= _MOST_RANKS:
            return False
        (outs, inputs), most = product.weight.shape, _LARGEST[len(x) > _FEW_ROWS]
        return len(x) <= _MOST_ROWS and outs * inputs <= most.weights and inputs <= most.inputs

    def _product(self, x: Tensor, product: Product, *, gated: bool = False) -> Tensor:
        weight, down, bias = product.weight, product.down, product.bias
        assert weight is not None
        (outs, inputs), rows = weight.shape, len(x)
        outs = outs // 2 if gated else outs
        out = x.new_empty(rows, outs)
        block_m = min(max(_power(rows), 16), 64)
        block_n, block_k, ahead = _blocks(rows, outs, x.element_size())
        ranks = max(_power(len(down)), 16)
        size = (block_m + block_n * (1 + gated) + ranks) * block_k * x.element_size()
        kernels().product[(-(-outs // block_n), -(-rows // block_m))](
            x, weight, bias if bias is not None else weight, down, product.up, out, rows, outs, inputs, len(down),
            x.stride(0), BIAS=bias is not None, RANK=ranks, GATED=gated,
            BLOCK_M=block_m, BLOCK_N=block_n, BLOCK_K=block_k, num_warps=4, num_stages=self.stages(size, ahead),
        )  # fmt: skip
        return out

    def norm_back(
        self, grad: Tensor, x: Tensor, weight: Tensor, eps: float, add: Tensor, *, again: bool = False
    ) -> Tensor:
        out = torch.empty_like(x)
        count, width = x.shape
        block = _power(width)
        kernels().norm_back[(count,)](
            grad, x, weight, add, out, grad.stride(0), x.stride(0), add.stride(0), width, eps, AGAIN=again, BLOCK=block,
            num_warps=8 if block > 1024 else 4,
        )  # fmt: skip
        return out

    def rotate(self, qkv: Tensor, positions: Tensor, heads: Heads) -> Tensor:
        return self._turned(qkv, torch.empty_like(qkv), positions, heads, 1)

    def rotate_back(self, grad: Tensor, positions: Tensor, heads: Heads) -> Tensor:
        return self._turned(grad, grad, positions, heads, -1)

    def _turned(self, qkv: Tensor, out: Tensor, positions: Tensor, heads: Heads, sign: float) -> Tensor:
        turned = heads.heads + heads.kv_heads
        count = turned if out is qkv else turned + heads.kv_heads
        kernels().rotate[(len(qkv),)](
            qkv, out, positions, heads.inv_freq, qkv.stride(0), out.stride(0), heads.scaling, sign,
            TURNED=turned, HEADS=count, PADDED=_power(count), D=heads.head_dim, num_warps=4,
        )  # fmt: skip
        return out

    def swiglu_back(self, grad: Tensor, gate_up: Tensor) -> None:
        count, width = grad.shape
        kernels().swiglu_back[(count, -(-width // 1024))](
            grad, gate_up, grad.stride(0), gate_up.stride(0), width, BLOCK=1024, num_warps=4
        )

    def swiglu(self, gate_up: Tensor) -> Tensor:
        count, width = gate_up.shape[0], gate_up.shape[1] // 2
        out = gate_up.new_empty(count, width)
        kernels().swiglu[(count, -(-width // 1024))](gate_up, out, gate_up.stride(0), width, BLOCK=1024, num_warps=4)
        return out

    def pick(self, logits: Tensor, rows: Tensor, table: Table, sampling: Sampling) -> tuple[Tensor, Tensor]:
        if sampling.temperature == 0 or sampling.top_k or sampling.top_p < 1 or sampling.min_p:
            return Plain().pick(logits, rows, table, sampling)
        count, vocab_size = logits.shape
        blocks = -(-vocab_size // _DRAW_BLOCK)
        top, mass = logits.new_empty((2, count, blocks), dtype=torch.float32)
        token = torch.empty(count, dtype=torch.int64, device=logits.device)
        logprob = torch.empty(count, dtype=torch.float32, device=logits.device)
        sizes = (logits.stride(0), vocab_size, blocks, 1 / sampling.temperature)
        kernels().draw_stats[(count, blocks)](logits, top, mass, *sizes, BLOCK=_DRAW_BLOCK, num_warps=4)
        kernels().draw_pick[(count,)](
            logits, top, mass, token, logprob, table.uniform, table.info, rows, *sizes, table.uniform.stride(0),
            BLOCK=_DRAW_BLOCK, BLOCKS=_power(blocks), num_warps=8,
        )  # fmt: skip
        return token, logprob

    def keep(self, x: Tensor, rows: Tensor, table: Table) -> None:
        width = x.shape[1]
        kernels().keep[(len(rows),)](x, rows, table.info, table.where, width, BLOCK=_power(width), num_warps=4)

    def advance(self, token: Tensor, logprob: Tensor, rows: Tensor, table: Table) -> None:
        kernels().advance[(len(rows),)](
            token,
            logprob,
            rows,
            table.info,
            table.tokens,
            table.logprobs,
            table.ends,
            table.tokens.stride(0),
            num_warps=1,
        )


def _blocks(rows: int, outs: int, itemsize: int) -> tuple[int, int, int]:
    """Columns and terms that a program of `product` takes at once, and how many such steps it loads ahead: small ones
    where there would be too few programs, as measured on an H100."""
    if itemsize == 4:
        return 32, 32, 2
    if rows > _FEW_ROWS:
        return 32, 128, 3
    return (16, 128, 4) if outs <= 16 * 160 else (64, 64, 4)


def _power(count: int) -> int:
    """The next power of two."""
    return 1 << max(count - 1, 0).bit_length()


@cache
def kernels() -> Any:
    """The compiled kernels' module, imported at their first use: it needs Triton."""
    from shoestring.kernels import decode

    return decode
