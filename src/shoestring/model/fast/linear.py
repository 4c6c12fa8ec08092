"""The linear modules of a layer that share an input, as one product with LoRA."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from shoestring.model.matmul import add_product

if TYPE_CHECKING:
    pass


# Rows of a storage are padded to this, to keep products on the tensor cores.
_ALIGNED = 8


def _base(module: Any) -> Any:
    return module.base_layer if hasattr(module, "base_layer") else module


@dataclass(frozen=True)
class _Thin:
    """LoRA of one linear module: A [r, in], B [out, r], both as they are trained."""

    down: nn.Parameter
    up: nn.Parameter
    scaling: float


def _thin(module: Any) -> _Thin | None:
    names = [name for name in getattr(module, "active_adapters", []) if name in getattr(module, "lora_A", {})]
    if not names:
        return None
    name = names[0]
    return _Thin(module.lora_A[name].weight, module.lora_B[name].weight, module.scaling[name])


class Product:
    """One product for the linear modules that share an input: [B, in] -> [B, sum of outs]."""

    def __init__(self, modules: Sequence[Any], dtype: torch.dtype):
        self._linears = [_base(module) for module in modules]
        self.outs = sum(linear.out_features for linear in self._linears)
        self.weight = self.bias = None
        if all(type(linear) is nn.Linear for linear in self._linears):
            biases = [linear.bias for linear in self._linears]
            self.weight = _joined([linear.weight for linear in self._linears])
            self.bias = _joined(biases) if all(bias is not None for bias in biases) else None
        ranks = sum(len(thin.down) for module in modules if (thin := _thin(module)) is not None)
        self._tail = -(-ranks // _ALIGNED) * _ALIGNED
        options: dict[str, Any] = {"dtype": dtype, "device": self._linears[0].weight.device}
        self.down = torch.zeros(self._tail, self._linears[0].in_features, **options)
        self.up = torch.zeros(self.outs, self._tail, **options)
        self._parts = self._cut(modules)

    def _cut(self, modules: Sequence[Any]) -> list[tuple[Tensor, nn.Parameter, Tensor, nn.Parameter, float]]:
        """Where each adapter's A and B go: (rows of `down`, A, block of `up`, B, scaling)."""
        parts, out, rank = [], 0, 0
        self._blocks: list[tuple[slice, slice]] = []
        for module in modules:
            size = _base(module).out_features
            thin = _thin(module)
            if thin is not None:
                outs, ranks = slice(out, out + size), slice(rank, rank + len(thin.down))
                self._blocks.append((outs, ranks))
                parts.append((self.down[ranks], thin.down, self.up[outs, ranks], thin.up, thin.scaling))
                rank += len(thin.down)
            out += size
        return parts

    @property
    def parts(self) -> list[tuple[Tensor, nn.Parameter, Tensor, nn.Parameter, float]]:
        return self._parts

    @property
    def weights(self) -> list[tuple[dict[str, Any], str, nn.Parameter, int]]:
        """What lies joined: the owner's parameters, the name there, the parameter and its address."""
        joined = [name for name, whole in (("weight", self.weight), ("bias", self.bias)) if whole is not None]
        found = [(linear._parameters, name) for linear in self._linears for name in joined]
        return [(owner, name, owner[name], owner[name].data_ptr()) for owner, name in found]

    def __call__(self, x: Tensor) -> Tensor:
        """The product for the few rows of a decode step: for these bitsandbytes has kernels."""
        if self.weight is not None:
            return self.run(x)[0]
        several = [linear(x) for linear in self._linears]
        found = torch.cat(several, -1) if len(several) > 1 else several[0]
        return found.addmm_(self.inner(x), self.up.T) if self._tail else found

    def add_to(self, x: Tensor, y: Tensor) -> None:
        """x += the product of y, of a decode step's few rows."""
        if self.weight is None or self.bias is not None:
            x.add_(self(y))
            return
        x.addmm_(y, self.weight.T)
        if self._tail:
            x.addmm_(self.inner(y), self.up.T)

    def run(self, x: Tensor, *, adapted: bool = True) -> tuple[Tensor, Tensor | None]:
        """The product, and what A gave, [B, tail], if there is an adapter; without it on request."""
        found = self._unpacked(x) if self.weight is None else F.linear(x, self.weight, self.bias)
        if not (self._tail and adapted):
            return found, None
        inner = self.inner(x)
        return found.addmm_(inner, self.up.T), inner

    def _unpacked(self, x: Tensor) -> Tensor:
        """The product with 4-bit weights, each of which goes straight to its columns."""
        found = x.new_empty(len(x), self.outs)
        for columns, linear in self._by_linear(found):
            weight = _dequantised(linear, x.dtype)
            if linear.bias is None:
                torch.mm(x, weight.T, out=columns)
            else:
                torch.addmm(linear.bias.to(x.dtype), x, weight.T, out=columns)
            del weight  # one at a time
        return found

    def _by_linear(self, whole: Tensor) -> Iterable[tuple[Tensor, Any]]:
        """The columns of [B, outs] that belong to each linear module."""
        return zip(whole.split([linear.out_features for linear in self._linears], -1), self._linears, strict=True)

    def inner(self, x: Tensor) -> Tensor:
        """What A gives, [B, tail]."""
        return F.linear(x, self.down)

    def back(self, grad: Tensor, *, adapted: bool = True, through: bool = True) -> tuple[Tensor | None, Tensor | None]:
        """From the gradient of the product, [B, outs], that of x, [B, in] (unless not `through`), and that of what A
        gave, [B, tail], if there is an adapter."""
        found = self._back_through(grad) if through else None
        if not (self._tail and adapted):
            return found, None
        pulled = grad @ self.up
        if found is not None:
            found.addmm_(pulled, self.down)
        return found, pulled

    def add_gradients(self, grad: Tensor, pulled: Tensor, x: Tensor, inner: Tensor) -> None:
        """Adds those of each A and B to the parameters' own, from those of the product and of what A gave."""
        ranks = sum(len(a) for _, a, *_ in self._parts)
        _add_gradient([a for _, a, *_ in self._parts], pulled[:, :ranks].T, x)
        for (out, rank), (*_, b, scaling) in zip(self._blocks, self._parts, strict=True):
            _add_gradient([b], grad[:, out].T, inner[:, rank], scaling)

    def _back_through(self, grad: Tensor) -> Tensor:
        """[B, in], through the base weights."""
        if self.weight is not None:
            return grad @ self.weight
        total: Tensor | None = None
        for part, linear in self._by_linear(grad):
            weight = _dequantised(linear, grad.dtype)
            total = part @ weight if total is None else total.addmm_(part, weight)
            del weight  # one at a time
        assert total is not None
        return total


def _dequantised(linear: Any, dtype: torch.dtype) -> Tensor:
    """A 4-bit weight, [out, in]."""
    from bitsandbytes.functional import dequantize_4bit

    return dequantize_4bit(linear.weight.data, linear.weight.quant_state).to(dtype)


def _add_gradient(parameters: Sequence[nn.Parameter], a: Tensor, b: Tensor, scaling: float = 1.0) -> None:
    """Adds scaling a b, whose rows are those of the parameters, to their gradients, which come to lie joined."""
    grads = [parameter.grad for parameter in parameters if parameter.grad is not None]
    if len(grads) == len(parameters):
        total = _joined(grads) if len(grads) > 1 else grads[0]
        add_product(total, a, b, scale=scaling)
        return
    total = a.new_empty(len(a), b.shape[1], dtype=parameters[0].dtype)
    add_product(total, a, b, scale=scaling, fresh=True)
    for parameter, rows in zip(parameters, total.split([len(parameter) for parameter in parameters]), strict=True):
        if parameter.requires_grad:
            parameter.grad = rows if parameter.grad is None else parameter.grad + rows


def _joined(parts: Sequence[Tensor]) -> Tensor:
    """One storage for tensors of [n, ...] each, which become its rows. It has the size of what it takes the place of,
    so that the next layer's fits where this one's lay."""
    first = parts[0].data
    count = sum(map(len, parts))
    if _follow(parts):  # they were joined when they were loaded
        return first.as_strided((count, *first.shape[1:]), first.stride())
    return _shared_out(torch.cat([part.data for part in parts]), parts)


def _shared_out(joined: Tensor, parts: Sequence[Tensor]) -> Tensor:
    """Makes the parts the rows of `joined`, which holds what they do."""
    for part, rows in zip(parts, joined.split([len(part) for part in parts]), strict=True):
        part.data = rows
    return joined


def _follow(parts: Sequence[Tensor]) -> bool:
    """Whether tensors lie one behind the other in one storage."""
    storage, start = parts[0].untyped_storage().data_ptr(), parts[0].data_ptr()
    for part in parts:
        if part.untyped_storage().data_ptr() != storage or part.data_ptr() != start or not part.is_contiguous():
            return False
        start += part.nbytes
    return True
