"""The decoder layers in training, over the products of the decode step: each layer is one autograd function whose way
back is written out, so that little is kept and few operations are launched.

Nothing but an adapter's factors gets a gradient. The way through transformers is the reference.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from shoestring.model.fast.decoder import Decoder, Layer
from shoestring.types import Paths

# Rows up to so many tokens are short.
_SHORT = 128


class Cache(Protocol):
    def take(self, keys: Tensor, values: Tensor) -> None:
        """The next layer's, [R, kv heads, L, D]."""
        ...


class Blocks(NamedTuple):
    """A tree's nodes in K blocks of up to n, with all scores of attention inside a block at hand."""

    nodes: Tensor
    """[K, n]: the node at each place; behind a block's end, any."""
    place: Tensor
    """[T]: a place of each node, counted through the blocks."""
    unseen: Tensor
    """[K or 1, 1, 1, n, n], added to the scores: -inf where a place must not look, else 0."""


def blocks_of(paths: Paths) -> Blocks | None:
    """For short rows on a CPU, where this is quicker than torch's own attention: a block for each path, or for each
    prompt's whole tree where that makes fewer scores. A tree's nodes are numbered one after the other."""
    rows, longest = paths.nodes.shape
    if paths.nodes.device.type != "cpu" or longest > _SHORT:
        return None
    starts = paths.nodes[:, 0].unique()
    count = len(paths.place)
    sizes = starts.diff(append=torch.tensor([count]))
    widest = int(sizes.max())
    if len(starts) * widest**2 >= rows * longest**2:
        return Blocks(paths.nodes, paths.place, torch.full((1, 1, 1, longest, longest), -torch.inf).triu_(1))
    tree, every = torch.repeat_interleave(sizes), torch.arange(count)
    place = tree * widest + every - starts[tree]
    before = paths.nodes[paths.place // longest]  # the path that leads to each node, [T, L], and what follows on it
    before = torch.where(torch.arange(longest) <= paths.positions[:, None], before, every[:, None])
    unseen = torch.full((len(starts), widest, widest), -torch.inf)
    unseen.diagonal(dim1=1, dim2=2).zero_()  # places behind a block's end look at themselves
    unseen.view(-1)[(place[:, None] * widest + before - starts[tree, None]).flatten()] = 0
    nodes = (starts[:, None] + torch.arange(widest)).clamp(max=count - 1)
    return Blocks(nodes, place, unseen[:, None, None])


class Pass(NamedTuple):
    """What the layers of one forward pass share."""

    decoder: Decoder
    paths: Paths
    adapted: bool
    """With the adapter, or as the reference."""
    blocks: Blocks | None = None
    """Attends in these, where no layer has a window."""
    flash: bool = False
    """Attends over rows without padding, by `Operations.attend_rows`."""
    recompute: bool = False
    """Keep the input of each layer only."""
    cache: Cache | None = None
    """Takes the keys and values of each layer."""

    def run(self, x: Tensor, layers: Sequence[Layer]) -> Tensor:
        """The residual stream, [T, H], behind these layers."""
        for layer in layers:
            x = _Step.apply(x, layer, self, _trained(layer))  # type: ignore[assignment]
        return x

    def last_norm(self, x: Tensor) -> Tensor:
        """What the vocabulary matrix is given, [N, H]."""
        return _Norm.apply(x, self.decoder.last_norm, self.decoder)  # type: ignore[return-value]

    def attention(self, qkv: Tensor, layer: Layer) -> tuple[Tensor, Tensor | None]:
        """[T, heads D] from [T, (heads + 2 kv) D], and what its way back needs of rows without padding, [heads, T]."""
        normed = self._normed(qkv, layer)
        if not self.flash:
            return self._over_paths(normed, layer), None
        do = self.decoder.operations
        found, mass = do.attend_rows(*do.spread(normed, self.paths, self.decoder.heads), self.paths, layer.window)
        return found.flatten(1), mass

    def attention_back(
        self, grad: Tensor, qkv: Tensor, found: Tensor | None, mass: Tensor | None, layer: Layer
    ) -> Tensor:
        """The gradient of `qkv`, from that of what `attention` has `found`."""
        with torch.enable_grad():
            leaf = qkv.detach().requires_grad_()
            normed = self._normed(leaf, layer)
            again = self._over_paths(normed, layer) if mass is None else normed
        if mass is not None:
            assert found is not None
            do, heads = self.decoder.operations, self.decoder.heads
            given = do.spread(normed.detach(), self.paths, heads)
            grad, found = grad.view(given[0].shape), found.view(given[0].shape)
            parts = do.attend_rows_back(grad, *given, found, mass, self.paths, layer.window)
            grad = do.spread_back(*parts, self.paths, heads)
            if normed is leaf:
                return grad
        return torch.autograd.grad(again, leaf, grad)[0]

    def _normed(self, qkv: Tensor, layer: Layer) -> Tensor:
        """With the norms of queries and keys that some families have."""
        if layer.head_norms is None:
            return qkv
        heads = self.decoder.heads
        q, k, v = qkv.unflatten(-1, (-1, heads.head_dim)).split(heads.counts, 1)
        normed = (
            F.rms_norm(part, part.shape[-1:], gain, heads.eps)
            for part, gain in zip((q, k), layer.head_norms, strict=True)
        )
        return torch.cat([*normed, v], 1).flatten(1)

    def _over_paths(self, qkv: Tensor, layer: Layer) -> Tensor:
        """Attention over the padded paths; torch's autograd knows the way back."""
        heads = self.decoder.heads
        turned = _Rotate.apply(qkv, self)
        nodes, place = (self.blocks or self.paths)[:2]
        spread = turned.index_select(0, nodes.flatten()).view(*nodes.shape, -1, heads.head_dim)  # type: ignore[union-attr]
        q, k, v = (part.transpose(1, 2) for part in spread.split(heads.counts, 2))
        if self.cache is not None:
            self.cache.take(k, v)
        grouped = heads.heads != heads.kv_heads
        if self.blocks is not None:
            found = _attention(q, k, v, self.blocks.unseen)
        elif layer.window is not None and layer.window < q.shape[2]:
            seen = torch.ones(q.shape[2], q.shape[2], dtype=torch.bool, device=q.device)
            seen = seen.tril_().triu_(1 - layer.window)
            found = F.scaled_dot_product_attention(q, k, v, attn_mask=seen, enable_gqa=grouped)
        else:
            found = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=grouped)
        return found.transpose(1, 2).reshape(nodes.numel(), -1).index_select(0, place)


def _attention(q: Tensor, k: Tensor, v: Tensor, unseen: Tensor) -> Tensor:
    """With all scores at hand, [K, heads, n, D]."""
    (blocks, heads, width, size), kv = q.shape, k.shape[1]
    scores = (q * size**-0.5).reshape(blocks, kv, -1, size) @ k.transpose(2, 3)
    weights = scores.view(blocks, kv, -1, width, width).add_(unseen).softmax(-1)
    return (weights.view(blocks, kv, -1, width) @ v).view(blocks, heads, width, size)


def _trained(layer: Layer) -> Tensor | None:
    """A leaf of a layer's trained factors: for it autograd comes back to a layer whose input needs no gradient."""
    products = (layer.qkv, layer.out, layer.gate_up, layer.down)
    leaves = (part.leaf() for product in products for part in product.parts)
    return next((leaf for leaf in leaves if leaf is not None), None)


class _Kept(NamedTuple):
    """What the way back needs beside a layer's input. [T, *] each."""

    qkv: Tensor
    qkv_inner: Tensor | None
    attended: Tensor | None
    """Left out where neither the way back through attention nor a factor needs it."""
    mass: Tensor | None
    """[heads, T], of `Operations.attend_rows`."""
    out_inner: Tensor | None
    middle: Tensor
    """The residual stream between attention and MLP."""
    gate_up: Tensor
    gate_up_inner: Tensor | None


def _forward(x: Tensor, layer: Layer, how: Pass) -> _Kept:
    """A layer up to gate and up."""
    do, eps = how.decoder.operations, how.decoder.eps
    qkv, qkv_inner = layer.qkv.run(do.norm(x, layer.first_norm, eps), adapted=how.adapted)
    attended, mass = how.attention(qkv, layer)
    out, out_inner = layer.out.run(attended, adapted=how.adapted)
    normed = do.add_norm(out, x, layer.second_norm, eps)
    gate_up, gate_up_inner = layer.gate_up.run(normed, adapted=how.adapted)
    kept = attended if mass is not None or layer.out.keeps_input else None
    return _Kept(qkv, qkv_inner, kept, mass, out_inner, out, gate_up, gate_up_inner)


class _Step(torch.autograd.Function):
    """One decoder layer, [T, H] to [T, H]. Its way back adds the adapter's gradients to the parameters' own."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: Layer, how: Pass, trained: Tensor | None) -> Tensor:
        kept = _forward(x, layer, how)
        ctx.layer, ctx.how = layer, how
        ctx.save_for_backward(x, *(() if how.recompute else kept))
        down, _ = layer.down.run(how.decoder.operations.swiglu(kept.gate_up), adapted=how.adapted)
        return down.add_(kept.middle)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Any) -> tuple[Any, ...]:  # type: ignore[override]
        (grad,) = grad_outputs
        layer, how = ctx.layer, ctx.how
        x, *saved = ctx.saved_tensors
        kept = _Kept(*saved) if saved else _forward(x, layer, how)
        middle = _back_through_mlp(grad, kept, layer, how)
        kept = kept._replace(middle=x, gate_up=x, gate_up_inner=None)  # these are done with
        del saved
        found = _back_through_attention(middle, x, kept, layer, how, through=ctx.needs_input_grad[0])
        return found, None, None, None


def _back_through_mlp(grad: Tensor, kept: _Kept, layer: Layer, how: Pass) -> Tensor:
    """The gradient of the residual stream in front of the MLP."""
    do, eps = how.decoder.operations, how.decoder.eps
    active, of_inner = layer.down.back(grad, adapted=how.adapted)
    assert active is not None
    do.swiglu_back(active, kept.gate_up)  # which are their gradients from here on
    if of_inner is not None:
        layer.down.add_gradients(grad, of_inner, active, layer.down.inner(active))
    del active
    normed, of_inner = layer.gate_up.back(kept.gate_up, adapted=how.adapted)
    assert normed is not None
    again = of_inner is not None and layer.gate_up.keeps_input
    found = do.norm_back(normed, kept.middle, layer.second_norm, eps, grad, again=again)
    if of_inner is not None:
        assert kept.gate_up_inner is not None
        layer.gate_up.add_gradients(kept.gate_up, of_inner, normed, kept.gate_up_inner)
    return found


def _back_through_attention(
    grad: Tensor, x: Tensor, kept: _Kept, layer: Layer, how: Pass, *, through: bool
) -> Tensor | None:
    """The gradient of a layer's input, if it goes `through`."""
    do, eps = how.decoder.operations, how.decoder.eps
    pulled, of_inner = layer.out.back(grad, adapted=how.adapted)
    assert pulled is not None
    if of_inner is not None:
        assert kept.out_inner is not None
        layer.out.add_gradients(grad, of_inner, kept.attended, kept.out_inner)
    of_qkv = how.attention_back(pulled, kept.qkv, kept.attended, kept.mass, layer)
    del pulled
    normed, of_inner = layer.qkv.back(of_qkv, adapted=how.adapted, through=through)
    found = None
    if normed is not None:
        again = of_inner is not None and layer.qkv.keeps_input
        found = do.norm_back(normed, x, layer.first_norm, eps, grad, again=again)
    if of_inner is not None:
        assert kept.qkv_inner is not None
        if normed is None and layer.qkv.keeps_input:
            normed = do.norm(x, layer.first_norm, eps)
        layer.qkv.add_gradients(of_qkv, of_inner, normed, kept.qkv_inner)
    return found


class _Rotate(torch.autograd.Function):
    """Rotary embedding of queries and keys."""

    @staticmethod
    def forward(ctx: Any, qkv: Tensor, how: Pass) -> Tensor:
        ctx.how = how
        return how.decoder.operations.rotate(qkv, how.paths.positions, how.decoder.heads)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Any) -> tuple[Tensor, None]:  # type: ignore[override]
        how = ctx.how
        grad = grad_outputs[0].contiguous()
        return how.decoder.operations.rotate_back(grad, how.paths.positions, how.decoder.heads), None


class _Norm(torch.autograd.Function):
    """RMS norm with a frozen weight."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, decoder: Decoder) -> Tensor:
        ctx.save_for_backward(x)
        ctx.weight, ctx.decoder = weight, decoder
        return decoder.operations.norm(x, weight, decoder.eps)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Any) -> tuple[Tensor, None, None]:  # type: ignore[override]
        (x,) = ctx.saved_tensors
        grad, decoder = grad_outputs[0].contiguous(), ctx.decoder
        return decoder.operations.norm_back(grad, x, ctx.weight, decoder.eps, torch.zeros_like(x)), None, None
