"""The operations of our own layers in training as Triton kernels and FlashAttention."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor

from shoestring.model.fast.operations import Heads
from shoestring.types import Paths


class TrainingOperations:
    """Forward and back of what is no matrix product."""

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

    def spread(self, qkv: Tensor, paths: Paths, heads: Heads) -> tuple[Tensor, Tensor, Tensor]:
        rows = paths.unpadded
        assert rows is not None
        count, places = len(qkv), len(rows.nodes)
        q = qkv.new_empty(count, heads.heads, heads.head_dim)
        both = qkv.new_empty(places, 2 * heads.kv_heads, heads.head_dim)
        kernels().spread[(count + places,)](
            qkv, q, both, paths.positions, rows.nodes, heads.inv_freq, qkv.stride(0), count, heads.scaling,
            HEADS=heads.heads, KV=heads.kv_heads, PADDED=_power(max(heads.heads, 2 * heads.kv_heads)),
            D=heads.head_dim, num_warps=4,
        )  # fmt: skip
        return q, both[:, : heads.kv_heads], both[:, heads.kv_heads :]

    def spread_back(self, of_q: Tensor, of_keys: Tensor, of_values: Tensor, paths: Paths, heads: Heads) -> Tensor:
        rows = paths.unpadded
        assert rows is not None
        of_q, of_keys, of_values = of_q.contiguous(), of_keys.contiguous(), of_values.contiguous()
        out = of_q.new_empty(len(of_q), (heads.heads + 2 * heads.kv_heads) * heads.head_dim)
        kernels().spread_back[(len(of_q),)](
            of_q, of_keys, of_values, out, paths.positions, rows.owner, rows.copies, rows.starts, heads.inv_freq,
            heads.scaling, HEADS=heads.heads, KV=heads.kv_heads, PADDED=_power(heads.heads),
            KV_PADDED=_power(heads.kv_heads), D=heads.head_dim, num_warps=4,
        )  # fmt: skip
        return out

    def attend_rows(
        self, q: Tensor, keys: Tensor, values: Tensor, paths: Paths, window: int | None
    ) -> tuple[Tensor, Tensor]:
        rows, reach = _flash_options(paths, window)
        found, mass, *_ = torch.ops.aten._flash_attention_forward(q, keys, values, *rows, False, **reach)
        return found, mass

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
        state = q.new_empty(2, dtype=torch.uint64)  # of a dropout that there is not
        rows, reach = _flash_options(paths, window)
        given = (grad, q, keys, values, found, mass, *rows, state, state)
        return torch.ops.aten._flash_attention_backward(*given, **reach)

    def swiglu_back(self, grad: Tensor, gate_up: Tensor) -> None:
        count, width = grad.shape
        kernels().swiglu_back[(count, -(-width // 1024))](
            grad, gate_up, grad.stride(0), gate_up.stride(0), width, BLOCK=1024, num_warps=4
        )


def has_flash(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether torch has FlashAttention (arXiv 2307.08691) here, which `Fused.attend_rows` is."""
    if device.type != "cuda" or torch.version.cuda is None or dtype not in (torch.bfloat16, torch.float16):
        return False
    return torch.backends.cuda.is_flash_attention_available() and torch.cuda.get_device_capability(device) >= (8, 0)


def _flash_options(paths: Paths, window: int | None) -> tuple[tuple[Any, ...], dict[str, int]]:
    """Row starts, the largest rows, no dropout, and causal, so that a row's last query stands at its last key; and how
    far it looks back."""
    rows, longest = paths.unpadded, paths.nodes.shape[1]
    assert rows is not None
    reach = {} if window is None else {"window_size_left": window - 1, "window_size_right": 0}
    return (rows.own, rows.starts, longest, longest, 0.0, True), reach


def _power(count: int) -> int:
    """The next power of two."""
    return 1 << max(count - 1, 0).bit_length()


@cache
def kernels() -> Any:
    """The compiled kernels' module, imported at their first use: it needs Triton."""
    from shoestring.model.fast.kernels import decode

    return decode
