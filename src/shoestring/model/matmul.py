"""Matrix products that are added up, as a rule in fp32."""

from __future__ import annotations

import torch
from torch import Tensor


def add_product(total: Tensor, a: Tensor, b: Tensor, *, scale: float = 1.0, fresh: bool = False) -> None:
    """total += scale a b, [n, m] and [m, k], as a rule fp32 += bf16 bf16. What is in a `fresh` total does not count.

    >>> total = torch.ones(1, 1)
    >>> add_product(total, torch.tensor([[2.0, 3.0]]), torch.tensor([[4.0], [5.0]]), scale=0.5)
    >>> total
    tensor([[12.5000]])
    """
    b = b.to(a.dtype)
    share = {"beta": 0 if fresh else 1, "alpha": scale}
    if total.dtype == a.dtype:
        total.addmm_(a, b, **share)
    elif total.is_cuda and torch.version.cuda:
        torch.addmm(total, a, b, out_dtype=total.dtype, **share, out=total)  # the product is not rounded
    elif fresh:
        total.copy_(a @ b).mul_(scale)
    else:
        total.add_(a @ b, alpha=scale)
