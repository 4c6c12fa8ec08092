"""How many bytes of tensors live at once, on any device."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):
    """Counts every distinct storage that is made inside the context, while it lives; looks behind each operation.

    What an operation allocates and frees within itself is not seen.

    >>> import torch
    >>> with LiveBytes() as live:
    ...     a = torch.zeros(100)
    ...     b = a.view(10, 10) + 1
    ...     del a
    ...     b.add_(1).sum().item()
    200.0
    >>> live.peak, live.now()
    (800, 400)
    """

    def __init__(self) -> None:
        super().__init__()
        self.peak = 0
        self._live: dict[int, tuple[StorageWeakRef, int]] = {}

    def now(self) -> int:
        """Bytes that live now."""
        self._live = {key: (ref, size) for key, (ref, size) in self._live.items() if not ref.expired()}
        return sum(size for _, size in self._live.values())

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {_key(x) for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
        out = func(*args, **(kwargs or {}))
        for x in tree_leaves(out):
            if isinstance(x, Tensor) and _key(x) not in given | self._live.keys():
                storage = x.untyped_storage()
                self._live[_key(x)] = StorageWeakRef(storage), storage.nbytes()
        self.peak = max(self.peak, self.now())
        return out


def _key(x: Tensor) -> int:
    return x.untyped_storage()._cdata
