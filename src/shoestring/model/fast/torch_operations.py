"""A decode step's operations in plain torch."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from shoestring.model.draw import draw, entropy
from shoestring.model.fast.operations import (
    DONE,
    LENGTH,
    LIMIT,
    PROMPT_LENGTH,
    SLOT,
    TOKEN,
    Heads,
    Product,
    Stream,
    Table,
)
from shoestring.model.sampling import Sampling
from shoestring.types import Paths


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

    def begin(self, rows: Tensor, table: Table, heads: Heads, embedding: Tensor) -> Tensor:
        self._step = _Step(rows, table, heads)
        return F.embedding(table.info[rows, TOKEN].long(), embedding)

    def norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        return F.rms_norm(x, weight.shape, weight, eps)

    def add_norm(self, x: Tensor, y: Tensor, weight: Tensor, eps: float) -> Tensor:
        return self.norm(x.add_(y), weight, eps)

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
        assert table.keys is not None
        step, own = self._step or _Step(rows, table, heads), table.keys.own[:, layer]
        q = self._placed(qkv, step, own, heads, norms)
        keys, values = step.read(own)
        asked = q.reshape(len(keys), -1, heads.head_dim)
        scores = torch.baddbmm(step.unseen(window), asked, keys.transpose(1, 2), alpha=heads.head_dim**-0.5)
        weights = scores.softmax(-1, dtype=_wide_dtype(q)).to(q.dtype)
        return (weights @ values).view(len(q), -1)

    def _placed(
        self, qkv: Tensor, step: _Step, own: Tensor, heads: Heads, norms: tuple[Tensor, Tensor] | None
    ) -> Tensor:
        """The queries, [B, heads, D]; keys and values go to their places."""
        count, size = heads.heads, heads.head_dim
        qk, v = qkv.unflatten(-1, (-1, size)).split([count + heads.kv_heads, heads.kv_heads], 1)
        if norms is not None:
            qk = torch.cat(
                [self.norm(qk[:, :count], norms[0], heads.eps), self.norm(qk[:, count:], norms[1], heads.eps)], 1
            )
        turned = _rotated(qk, step.cos, step.sin)
        both, places = torch.stack([turned[:, count:], v]).flatten(1, 2), step.places
        if step.going is not None:
            both, places = both[:, step.going], places[step.going]
        own.view(2, -1, size).index_copy_(1, places, both)
        return turned[:, :count]

    def normed_linear(self, stream: Stream, norm: Tensor, eps: float, product: Product) -> Tensor:
        return product(self.norm(stream.x, norm, eps))

    def normed_gated(self, stream: Stream, norm: Tensor, eps: float, product: Product) -> Tensor:
        return self.swiglu(self.normed_linear(stream, norm, eps, product))

    def add_linear(self, stream: Stream, y: Tensor, product: Product, norm: Tensor | None) -> None:
        stream.x.add_(product(y))

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

    def spread(self, qkv: Tensor, paths: Paths, heads: Heads) -> tuple[Tensor, Tensor, Tensor]:
        assert paths.unpadded is not None
        counts = [heads.heads, heads.kv_heads, heads.kv_heads]
        q, k, v = self.rotate(qkv, paths.positions, heads).unflatten(-1, (-1, heads.head_dim)).split(counts, 1)
        return q, k[paths.unpadded.nodes], v[paths.unpadded.nodes]

    def spread_back(self, of_q: Tensor, of_keys: Tensor, of_values: Tensor, paths: Paths, heads: Heads) -> Tensor:
        assert paths.unpadded is not None
        wide = torch.cat([of_keys, of_values], 1).to(_wide_dtype(of_q))
        of_kv = wide.new_zeros(len(of_q), *wide.shape[1:]).index_add_(0, paths.unpadded.nodes, wide).to(of_q.dtype)
        return self.rotate_back(torch.cat([of_q, of_kv], 1).flatten(1), paths.positions, heads)

    def attend_rows(
        self, q: Tensor, keys: Tensor, values: Tensor, paths: Paths, window: int | None
    ) -> tuple[Tensor, Tensor]:
        assert paths.unpadded is not None
        own, all_of_it = (at.diff().tolist() for at in (paths.unpadded.own, paths.unpadded.starts))
        parts = zip(q.split(own), keys.split(all_of_it), values.split(all_of_it), strict=True)
        rows = [_attend_row(*part, window) for part in parts]
        return torch.cat([found for found, _ in rows]), torch.cat([mass for _, mass in rows], 1)

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
        leaves = [x.detach().requires_grad_() for x in (q, keys, values)]
        with torch.enable_grad():
            again, _ = self.attend_rows(leaves[0], leaves[1], leaves[2], paths, window)
        of_q, of_keys, of_values = torch.autograd.grad(again, leaves, grad)
        return of_q, of_keys, of_values

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


def _attend_row(q: Tensor, keys: Tensor, values: Tensor, window: int | None) -> tuple[Tensor, Tensor]:
    """Attention of a row's last n tokens to all of it, [n, heads, D], and the logarithms of the sums, [heads, n]."""
    at = torch.arange(len(keys), device=q.device)
    before = at[len(keys) - len(q) :, None] - at
    unseen = (before < 0) | (before >= (len(keys) if window is None else window))
    keys, values = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (keys, values))
    scores = torch.einsum("nhd,mhd->hnm", _wide(q), _wide(keys)) * q.shape[2] ** -0.5
    scores = scores.masked_fill(unseen, -torch.inf)
    found = torch.einsum("hnm,mhd->nhd", scores.softmax(-1), _wide(values))
    return found.to(q.dtype), scores.logsumexp(-1)


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
