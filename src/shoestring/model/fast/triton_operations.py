"""A decode step's operations as Triton kernels, and which of them fit a card."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from shoestring.model.fast.operations import Heads, Product, Stream, Table
from shoestring.model.fast.tiles import _FEW_ROWS, Tile, _blocks
from shoestring.model.fast.torch_operations import Plain
from shoestring.model.fast.triton_training import TrainingOperations, _power, kernels
from shoestring.model.sampling import Sampling

# Logits that one program of the draw looks at.
_DRAW_BLOCK = 4096
# Blocks of tokens that a part of attention has at least.
_LEAST_BLOCKS = 4
# A product is one kernel up to so many multiplications and rows, with an A and a B beside it up to twice as many, of at
# most so many ranks: where it proved faster than norm, cuBLAS and SwiGLU, on an H200.
_MOST_WORK, _MOST_ROWS, _MOST_RANKS = 2**30, 512, 64
# Weights of at most so many numbers are brought to the L2 cache while the kernel before still runs.
_FETCHED = 2**21
# Programs that share the terms of a long sum, where that leaves each at least one step and a half.
_SPLITS = 4


class Fused(TrainingOperations):
    """Triton, for CUDA. Long sums, and the tokens of attention where rows are few, are shared by several programs. One
    of these serves one step at a time: its counters, and what `begin` found out, are its own."""

    whole_rows = False

    def __init__(self, programs: int = 264, shared: int = 227 * 2**10, *, early: bool = False):
        """`programs` is how many keep the card busy, two a multiprocessor, and `shared` the bytes of shared memory that
        one can have: both by default an H100's. `early` kernels are launched before the one in front of them ends."""
        self._programs, self._shared = programs, shared
        self._start: dict[str, bool] = {"EARLY": True, "launch_pdl": True} if early else {"EARLY": False}
        self._arrived: Tensor | None = None
        self._begun: tuple[Tensor, ...] = ()

    @classmethod
    def on(cls, device: torch.device) -> Fused:
        card = torch.cuda.get_device_properties(device)
        early = torch.version.cuda is not None and (card.major, card.minor) >= (9, 0)
        return cls(2 * card.multi_processor_count, card.shared_memory_per_multiprocessor - 2**10, early=early)

    def stages(self, size: int, most: int) -> int:
        """How many steps of `size` bytes a kernel can load ahead, with a fifth of shared memory left for the rest."""
        return max(min(self._shared * 4 // 5 // size, most), 1)

    def tile(self, rows: int, outs: int, inputs: int, ranks: int, itemsize: int, *, gated: bool) -> Tile:
        """For a product of these sizes. Steps are shorter where there is too little shared memory for two."""
        block_m = min(max(_power(rows), 16), 64)
        block_n, block_k, ahead = _blocks(rows, inputs, itemsize, gated=gated)
        a_term = (block_m + block_n * (1 + gated) + ranks) * itemsize
        while block_k > 32 and self.stages(a_term * block_k, ahead) < 2:
            block_k //= 2
        tiles = -(-outs // block_n) * -(-rows // block_m)
        shared = not gated and tiles * _SPLITS * 4 <= self._programs * 3 and 2 * inputs >= 3 * _SPLITS * block_k
        return Tile(block_m, block_n, block_k, self.stages(a_term * block_k, ahead), _SPLITS if shared else 1)

    def attention(self, programs: int, size: int, itemsize: int) -> tuple[int, int, int]:
        """Warps of a program of `attend`, tokens that it takes at once, and how many steps it loads ahead, by the size
        of heads: many where there are too few programs for all multiprocessors."""
        warps, block, ahead = 4, 64, 3
        if itemsize == 4:
            block, ahead = 32, 2
        elif 2 * programs <= self._programs:
            warps, block = 8, 128
        while block > 16 and self.stages(2 * block * size * itemsize, ahead) < 2:
            block //= 2
        return warps, block, self.stages(2 * block * size * itemsize, ahead)

    def begin(self, rows: Tensor, table: Table, heads: Heads, embedding: Tensor) -> Tensor:
        width, d = embedding.shape[1], heads.head_dim
        x = embedding.new_empty(len(rows), width)
        records = torch.empty(len(rows), kernels().RECORD.value, dtype=torch.int64, device=rows.device)
        turns = torch.empty(len(rows), 2, d, dtype=torch.float32, device=rows.device)
        kernels().begin[(len(rows),)](
            table.info, rows, table.where, heads.inv_freq, embedding, x, records, turns, heads.scaling, width,
            KV=heads.kv_heads, D=d, WIDTH=_power(width), num_warps=4,
        )  # fmt: skip
        self._begun = records, turns
        return x

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
        count, d = len(qkv), heads.head_dim
        programs = count * heads.kv_heads
        warps, block, stages = self.attention(programs, d, qkv.element_size())
        splits = self._splits(programs, table, block)
        out = qkv.new_empty(count, heads.heads * d)
        part = qkv.new_empty((count, heads.heads, splits, d), dtype=torch.float32) if splits > 1 else out
        mass = qkv.new_empty((count, heads.heads, splits), dtype=torch.float32) if splits > 1 else out
        repeat = heads.heads // heads.kv_heads
        first, second = norms if norms is not None else (heads.inv_freq, heads.inv_freq)
        assert self._begun, "attend comes behind begin"
        kernels().attend[(count, heads.kv_heads, splits)](
            qkv, part, mass, *self._begun, first, second, layer, qkv.stride(0), math.log2(math.e) * d**-0.5,
            2**30 if window is None else window, heads.eps, KV=heads.kv_heads, REPEAT=repeat,
            PADDED=max(_power(repeat), 8), D=d, BLOCK=block, SPLITS=splits, NORM=norms is not None,
            num_warps=warps, num_stages=stages, **self._start,
        )  # fmt: skip
        if splits > 1:
            kernels().combine[(count, heads.heads)](
                part, mass, out, D=d, SPLITS=splits, PADDED=_power(splits), **self._start
            )
        return out

    def _splits(self, programs: int, table: Table, block: int) -> int:
        """Parts of each row's tokens, by the most that the cache has room for: enough to keep the card busy, none so
        small that putting them together costs more."""
        assert table.keys is not None
        most = table.keys.prompt.shape[4] + table.keys.own.shape[4]
        return max(min(self._programs // max(programs, 1), most // (_LEAST_BLOCKS * block), 16), 1)

    def normed_linear(self, stream: Stream, norm: Tensor, eps: float, product: Product) -> Tensor:
        if not self.one_kernel(stream.x, product):
            return product(self.norm(stream.x, norm, eps))
        out = stream.x.new_empty(len(stream.x), product.up.shape[0])
        self._normed(stream, norm, eps, product, out, gated=False)
        return out

    def normed_gated(self, stream: Stream, norm: Tensor, eps: float, product: Product) -> Tensor:
        if not self.one_kernel(stream.x, product):
            return self.swiglu(product(self.norm(stream.x, norm, eps)))
        out = stream.x.new_empty(len(stream.x), product.up.shape[0] // 2)
        self._normed(stream, norm, eps, product, out, gated=True)
        return out

    def _normed(self, stream: Stream, norm: Tensor, eps: float, product: Product, out: Tensor, *, gated: bool) -> None:
        """Where the kernel before has left what a norm needs, the product's own norms as well."""
        if stream.gained is None or stream.norm is not norm:
            self._product(self.norm(stream.x, norm, eps), product, out, gated=gated)
        else:
            self._product(stream.gained, product, out, gated=gated, squares=stream.squares, eps=eps)

    def add_linear(self, stream: Stream, y: Tensor, product: Product, norm: Tensor | None) -> None:
        stream.norm, stream.gained, stream.squares = norm, None, None
        if self.one_kernel(y, product):
            self._product(y, product, stream.x, stream=stream, norm=norm)
        else:
            product.add_to(stream.x, y)

    def one_kernel(self, x: Tensor, product: Product) -> bool:
        """Whether base product, A and B are better one kernel than several: beside a large weight cuBLAS is faster, and
        taken to be so for fp32 without an A, which was not measured."""
        if product.weight is None or len(product.down) > _MOST_RANKS or len(x) > _MOST_ROWS:
            return False
        if x.dtype == torch.float32 and not len(product.down):
            return False
        return max(len(x), _FEW_ROWS) * product.weight.numel() <= _MOST_WORK * (2 if len(product.down) else 1)

    def _product(
        self,
        x: Tensor,
        product: Product,
        out: Tensor,
        *,
        gated: bool = False,
        squares: Tensor | None = None,
        eps: float = 0.0,
        stream: Stream | None = None,
        norm: Tensor | None = None,
    ) -> None:
        """`squares` belong to an x that is to be normed. With `stream`, `out` is its x, to which the product is added,
        and what the next `norm` needs is left there; but not in fp16, which may not hold x times its weight."""
        weight, down, bias = product.weight, product.down, product.bias
        assert weight is not None
        (rows, outs), inputs = out.shape, weight.shape[1]
        ranks = max(_power(len(down)), 16) if len(down) else 0
        tile = self.tile(rows, outs, inputs, ranks, x.element_size(), gated=gated)
        columns = -(-outs // tile.columns)
        part = out.new_empty((tile.splits, rows, outs), dtype=torch.float32) if tile.splits > 1 else out
        gained = sums = None
        if stream is not None and norm is not None and out.dtype != torch.float16:
            gained, sums = torch.empty_like(out), out.new_empty((columns, rows), dtype=torch.float32)
            stream.gained, stream.squares = gained, sums
        kernels().product[(columns, -(-rows // tile.rows), tile.splits)](
            x, weight if squares is None else squares, weight, weight if bias is None else bias, down, product.up, out,
            weight if norm is None else norm, out if gained is None else gained, out if sums is None else sums, part,
            self._counters(out.device), rows, outs, inputs,
            len(down), 0 if squares is None else len(squares), x.stride(0), eps, NORM=squares is not None,
            BIAS=bias is not None, RANK=ranks, GATED=gated, ADD=stream is not None, GAIN=gained is not None,
            PARTS=1 if squares is None else _power(len(squares)), SPLITS=tile.splits, EVEN=inputs % tile.terms == 0,
            FETCH=self._start["EARLY"] and weight.numel() <= _FETCHED, BLOCK_M=tile.rows, BLOCK_N=tile.columns,
            BLOCK_K=tile.terms, num_warps=4, num_stages=tile.stages, **self._start,
        )  # fmt: skip

    def _counters(self, device: torch.device) -> Tensor:
        """Of programs that share a sum, one for each tile: zeros between two kernels."""
        if self._arrived is None:
            self._arrived = torch.zeros(self._programs, dtype=torch.int32, device=device)
        return self._arrived

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
