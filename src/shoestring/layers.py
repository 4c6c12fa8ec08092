"""The decoder layers in training, over the products of the decode step: each layer is one autograd function whose way
back is written out, so that little is kept and few operations are launched.

Nothing but LoRA matrices gets a gradient. The way through transformers is the reference.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from shoestring.samplers.decoder import Decoder, Layer
from shoestring.types import Paths

# Rows up to so many tokens are short.
_SHORT = 128


class Cache(Protocol):
    def take(self, keys: Tensor, values: Tensor) -> None:
        """The next layer's, [R, kv heads, L, D]."""
        ...


class Pass(NamedTuple):
    """What the layers of one forward pass share."""

    decoder: Decoder
    paths: Paths
    adapted: bool
    """With the adapter, or as the reference."""
    recompute: bool = False
    """Keep the input of each layer only."""
    cache: Cache | None = None
    """Takes the keys and values of each layer."""

    def run(self, x: Tensor, layers: Sequence[Layer]) -> Tensor:
        """The residual stream, [T, H], behind these layers."""
        for layer in layers:
            x = _Step.apply(x, layer, self, *parameters(layer))  # type: ignore[assignment]
        return x

    def last_norm(self, x: Tensor) -> Tensor:
        """What the vocabulary matrix is given, [N, H]."""
        return _Norm.apply(x, self.decoder.last_norm, self.decoder)  # type: ignore[return-value]

    def attention(self, qkv: Tensor, layer: Layer) -> Tensor:
        """[T, heads D] from [T, (heads + 2 kv) D], over the paths; torch's autograd knows the way back."""
        heads, (rows, longest) = self.decoder.heads, self.paths.nodes.shape
        counts = [heads.heads, heads.kv_heads, heads.kv_heads]
        if layer.head_norms is not None:
            q, k, v = qkv.unflatten(-1, (-1, heads.head_dim)).split(counts, 1)
            normed = (
                F.rms_norm(part, part.shape[-1:], gain, heads.eps)
                for part, gain in zip((q, k), layer.head_norms, strict=True)
            )
            qkv = torch.cat([*normed, v], 1).flatten(1)
        turned = _Rotate.apply(qkv, self)
        spread = turned.index_select(0, self.paths.nodes.flatten()).view(rows, longest, -1, heads.head_dim)  # type: ignore[union-attr]
        q, k, v = (part.transpose(1, 2) for part in spread.split(counts, 2))
        if self.cache is not None:
            self.cache.take(k, v)
        grouped = heads.heads != heads.kv_heads
        if layer.window is not None and layer.window < longest:
            seen = torch.ones(longest, longest, dtype=torch.bool, device=q.device).tril_().triu_(1 - layer.window)
            found = F.scaled_dot_product_attention(q, k, v, attn_mask=seen, enable_gqa=grouped)
        elif qkv.device.type == "cpu" and longest <= _SHORT:
            found = _short_attention(q, k, v)
        else:
            found = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=grouped)
        return found.transpose(1, 2).reshape(rows * longest, -1).index_select(0, self.paths.place)


def _short_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal attention with all scores at hand: for short rows on a CPU, twice as fast as torch's own."""
    rows, count, longest, size = q.shape
    stacked = q.reshape(rows, k.shape[1], -1, size) * size**-0.5
    ahead = torch.full((longest, longest), -torch.inf, dtype=q.dtype).triu_(1)
    scores = (stacked @ k.transpose(2, 3)).view(rows, -1, longest, longest) + ahead
    return (scores.softmax(-1).reshape(rows, k.shape[1], -1, longest) @ v).view(rows, count, longest, size)


def parameters(layer: Layer) -> list[nn.Parameter]:
    """A and B of each adapted module."""
    products = (layer.qkv, layer.out, layer.gate_up, layer.down)
    return [matrix for product in products for _, a, _, b, _ in product.parts for matrix in (a, b)]


class _Kept(NamedTuple):
    """What the way back needs beside a layer's input. [T, *] each."""

    qkv: Tensor
    qkv_inner: Tensor | None
    attended: Tensor
    out_inner: Tensor | None
    middle: Tensor
    """The residual stream between attention and MLP."""
    gate_up: Tensor
    gate_up_inner: Tensor | None


def _forward(x: Tensor, layer: Layer, how: Pass) -> tuple[Tensor, _Kept]:
    """A layer's MLP input and what is kept, up to gate and up."""
    do, eps = how.decoder.operations, how.decoder.eps
    qkv, qkv_inner = layer.qkv.run(do.norm(x, layer.first_norm, eps), adapted=how.adapted)
    attended = how.attention(qkv, layer)
    out, out_inner = layer.out.run(attended, adapted=how.adapted)
    middle = x.clone()
    normed = do.add_norm(middle, out, layer.second_norm, eps)
    gate_up, gate_up_inner = layer.gate_up.run(normed, adapted=how.adapted)
    return normed, _Kept(qkv, qkv_inner, attended, out_inner, middle, gate_up, gate_up_inner)


class _Step(torch.autograd.Function):
    """One decoder layer, [T, H] to [T, H]."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: Layer, how: Pass, *matrices: nn.Parameter) -> Tensor:
        _, kept = _forward(x, layer, how)
        ctx.layer, ctx.how = layer, how
        ctx.save_for_backward(x, *(() if how.recompute else kept))
        down, _ = layer.down.run(how.decoder.operations.swiglu(kept.gate_up), adapted=how.adapted)
        return kept.middle + down

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Any) -> tuple[Any, ...]:  # type: ignore[override]
        (grad,) = grad_outputs
        layer, how = ctx.layer, ctx.how
        x, *saved = ctx.saved_tensors
        kept = _Kept(*saved) if saved else _forward(x, layer, how)[1]
        middle, of_mlp = _back_through_mlp(grad, kept, layer, how)
        kept = kept._replace(middle=x, gate_up=x, gate_up_inner=None)  # these are done with
        del saved
        found, of_attention = _back_through_attention(middle, x, kept, layer, how, through=ctx.needs_input_grad[0])
        return found, None, None, *of_attention, *of_mlp


def _back_through_mlp(grad: Tensor, kept: _Kept, layer: Layer, how: Pass) -> tuple[Tensor, list[Tensor]]:
    """The gradient of the residual stream in front of the MLP, and those of its adapters."""
    do, eps = how.decoder.operations, how.decoder.eps
    inner: Tensor | None = None
    active = grad
    if layer.down.parts and how.adapted:
        active = do.swiglu(kept.gate_up)
        inner = layer.down.inner(active)
    pulled, of_down = layer.down.back(grad, active, inner)
    del active, inner
    assert pulled is not None
    of_gate_up = do.swiglu_back(pulled, kept.gate_up)
    del pulled
    normed = do.norm(kept.middle, layer.second_norm, eps) if kept.gate_up_inner is not None else grad
    pulled, of_parts = layer.gate_up.back(of_gate_up, normed, kept.gate_up_inner)
    assert pulled is not None
    return do.norm_back(pulled, kept.middle, layer.second_norm, eps, grad), of_parts + of_down


def _back_through_attention(
    grad: Tensor, x: Tensor, kept: _Kept, layer: Layer, how: Pass, *, through: bool
) -> tuple[Tensor | None, list[Tensor]]:
    """The gradient of a layer's input (if it goes `through`), and those of its adapters in front of the MLP."""
    do, eps = how.decoder.operations, how.decoder.eps
    pulled, of_out = layer.out.back(grad, kept.attended, kept.out_inner)
    with torch.enable_grad():
        leaf = kept.qkv.detach().requires_grad_()
        attended = how.attention(leaf, layer)
    (of_qkv,) = torch.autograd.grad(attended, leaf, pulled)
    del attended, leaf, pulled
    normed = do.norm(x, layer.first_norm, eps) if kept.qkv_inner is not None else x
    pulled, of_parts = layer.qkv.back(of_qkv, normed, kept.qkv_inner, through=through)
    found = do.norm_back(pulled, x, layer.first_norm, eps, grad) if pulled is not None else None
    return found, of_parts + of_out


class _Rotate(torch.autograd.Function):
    """Rotary embedding of a copy."""

    @staticmethod
    def forward(ctx: Any, qkv: Tensor, how: Pass) -> Tensor:
        ctx.how = how
        return how.decoder.operations.rotate(qkv.clone(), how.paths.positions, how.decoder.heads)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Any) -> tuple[Tensor, None]:  # type: ignore[override]
        how = ctx.how
        grad = grad_outputs[0].contiguous()
        return how.decoder.operations.rotate(grad, how.paths.positions, how.decoder.heads, back=True), None


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
