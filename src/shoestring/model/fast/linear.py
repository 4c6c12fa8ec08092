"""The linear modules of a layer that share an input, as one product with the factors of an adapter."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from shoestring.model.matmul import add_product

if TYPE_CHECKING:
    from shoestring.model.adapter import Factors, Handle


# Rows of a storage are padded to this, to keep products on the tensor cores.
_ALIGNED = 8


def _base(module: Any) -> Any:
    return module.base_layer if hasattr(module, "base_layer") else module


@torch.enable_grad()
def _factors(module: Any, handle: Handle | None) -> Factors | None:
    """With gradient, which says what of them is trained."""
    return handle.factors(module) if handle is not None and hasattr(module, "base_layer") else None


class Gathered:
    """Stands for a factor that is computed from parameters, and gathers its gradient."""

    def __init__(self, factor: Tensor, trains: bool):
        self._rows = len(factor)
        self.dtype = factor.dtype
        self.requires_grad = trains and factor.requires_grad
        self.grad: Tensor | None = None
        self.leaf = torch.empty(0, requires_grad=self.requires_grad)

    def __len__(self) -> int:
        return self._rows


Slot = nn.Parameter | Gathered


@dataclass(frozen=True)
class Part:
    """Where the factors of one linear module lie in a product, and where their gradients go."""

    module: Any
    outs: slice
    ranks: slice
    down_rows: Tensor
    """Rows of the product's `down`, [r, in]."""
    up_block: Tensor
    """A block of the product's `up`, [out, r]."""
    down: Slot
    up: Slot
    scaling: float
    down_trains: bool

    @property
    def computed(self) -> bool:
        """Whether a factor is no parameter."""
        return isinstance(self.down, Gathered) or isinstance(self.up, Gathered)

    def fill(self, factors: Factors) -> None:
        """Copy the values of the factors."""
        self.down_rows.copy_(factors.down)
        self.up_block.copy_(factors.up)
        if factors.scaling != 1.0:
            self.up_block.mul_(factors.scaling)

    @property
    def gathered(self) -> bool:
        return any(isinstance(slot, Gathered) and slot.grad is not None for slot in (self.down, self.up))

    def gradients(self, factors: Factors) -> list[tuple[Tensor, Tensor]]:
        """The computed factors that have gathered a gradient, each with it."""
        pairs = ((factors.down, self.down), (factors.up, self.up))
        return [(f, slot.grad) for f, slot in pairs if isinstance(slot, Gathered) and slot.grad is not None]

    def drop_gradients(self) -> None:
        for slot in (self.down, self.up):
            if isinstance(slot, Gathered):
                slot.grad = None

    def leaf(self) -> Tensor | None:
        """A tensor for which autograd comes back to this part; None if nothing of it is trained."""
        trained = (slot for slot in (self.down, self.up) if slot.requires_grad)
        return next((slot.leaf if isinstance(slot, Gathered) else slot for slot in trained), None)


def _slot(factor: Tensor, trains: bool = True) -> Slot:
    return factor if isinstance(factor, nn.Parameter) and trains else Gathered(factor, trains)


class Product:
    """One product for the linear modules that share an input: [B, in] -> [B, sum of outs]."""

    def __init__(self, modules: Sequence[Any], dtype: torch.dtype, handle: Handle | None = None):
        self._linears = [_base(module) for module in modules]
        self.outs = sum(linear.out_features for linear in self._linears)
        self.weight = self.bias = None
        if all(type(linear) is nn.Linear for linear in self._linears):
            biases = [linear.bias for linear in self._linears]
            self.weight = _joined([linear.weight for linear in self._linears])
            self.bias = _joined(biases) if all(bias is not None for bias in biases) else None
        adapted = [_factors(module, handle) for module in modules]
        ranks = sum(len(factors.down) for factors in adapted if factors is not None)
        self._tail = -(-ranks // _ALIGNED) * _ALIGNED
        options: dict[str, Any] = {"dtype": dtype, "device": self._linears[0].weight.device}
        self.down = torch.zeros(self._tail, self._linears[0].in_features, **options)
        self.up = torch.zeros(self.outs, self._tail, **options)
        self.parts = self._cut(modules, adapted)
        self.keeps_input = any(part.down_trains for part in self.parts)
        """Whether some gradient needs the product's input."""

    def _cut(self, modules: Sequence[Any], adapted: Sequence[Factors | None]) -> list[Part]:
        """Where each module's factors go."""
        parts, out, rank = [], 0, 0
        for module, factors in zip(modules, adapted, strict=True):
            size = _base(module).out_features
            if factors is not None:
                outs, ranks = slice(out, out + size), slice(rank, rank + len(factors.down))
                down, up = _slot(factors.down, factors.down_trains), _slot(factors.up)
                views = self.down[ranks], self.up[outs, ranks]
                parts.append(Part(module, outs, ranks, *views, down, up, factors.scaling, factors.down_trains))
                rank += len(factors.down)
            out += size
        return parts

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

    def add_gradients(self, grad: Tensor, pulled: Tensor, x: Tensor | None, inner: Tensor) -> None:
        """Add those of each factor to its own, from those of the product and of what `down` gave. Without trained
        `down` there is no need of `x`."""
        if all(part.down_trains for part in self.parts):
            assert x is not None
            _add_gradient([part.down for part in self.parts], pulled[:, : self.parts[-1].ranks.stop].T, x)
        elif self.keeps_input:
            assert x is not None
            for part in self.parts:
                if part.down_trains:
                    _add_gradient([part.down], pulled[:, part.ranks].T, x)
        for part in self.parts:
            _add_gradient([part.up], grad[:, part.outs].T, inner[:, part.ranks], part.scaling)

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


def _add_gradient(parameters: Sequence[Slot], a: Tensor, b: Tensor, scaling: float = 1.0) -> None:
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
