"""What the head does with a tile of logits: softmax statistics in one read, and its gradient in its own memory in one
read and one write. No fp32 copy of the tile is made.

A tile is [n, c], in bf16, fp16 or fp32, contiguous; its first column is number `start` of the vocabulary. Beside it lie
fp32 vectors, [n]. With TRITON_INTERPRET=1 the kernels run on CPU tensors.
"""

# Triton reads the annotations of kernels, so they are no strings here. It is not installed everywhere, and its types do
# not know the options of a launch:
# pyright: reportMissingImports=false, reportIndexIssue=false, reportCallIssue=false

import torch
import triton
import triton.language as tl
from torch import Tensor


def add_statistics(
    logits: Tensor,
    target: Tensor,
    start: int,
    temperature: float,
    running: tuple[Tensor, Tensor, Tensor, Tensor],
    *,
    entropy: bool,
) -> None:
    """Takes a tile into the `running` statistics of z = logits / temperature, each [n], in place: the largest z so far,
    m; the sum of e^(z - m); that of e^(z - m) (z - m), if `entropy` is wanted; z at the target, where that is here.

    Starts from -inf, 0, 0 and whatever an unseen target shall have.
    """
    num, columns = logits.shape
    assert logits.is_contiguous(), logits.stride()
    block = min(triton.next_power_of_2(columns), 4096)
    with torch.cuda.device_of(logits):
        _statistics[(num,)](
            *(logits, target.contiguous(), *running, start, columns, 1 / temperature),
            ENTROPY=entropy,
            BLOCK=block,
            num_warps=8 if block > 1024 else 4,
        )


def to_gradient(
    logits: Tensor,
    target: Tensor,
    start: int,
    temperature: float,
    log_z: Tensor,
    grad_logprob: Tensor,
    entropy: Tensor | None = None,
    grad_entropy: Tensor | None = None,
) -> None:
    """Overwrites a tile with its gradient g (1[j = target] - p_j) - g_entropy p_j (log p_j + entropy), where
    log p = logits / temperature - log_z.

    The gradients that come in, g and g_entropy, are divided by the temperature already.
    """
    num, columns = logits.shape
    assert logits.is_contiguous(), logits.stride()
    both = entropy is not None and grad_entropy is not None
    # without entropy its pointers are never read
    spread, push = (entropy, grad_entropy.contiguous()) if both else (log_z, log_z)  # type: ignore[union-attr]
    block = min(triton.next_power_of_2(columns), 1024)
    with torch.cuda.device_of(logits):
        _gradient[(num, triton.cdiv(columns, block))](
            *(logits, target.contiguous(), log_z, grad_logprob.contiguous(), spread, push),
            *(start, columns, 1 / temperature),
            ENTROPY=both,
            BLOCK=block,
            num_warps=4,
        )


def try_out(device: torch.device, dtype: torch.dtype) -> None:
    """Compiles both kernels as they are mostly used, and runs them on a row; raises what Triton raises."""
    logits = torch.zeros(1, 4096, device=device, dtype=dtype)
    target = torch.zeros(1, device=device, dtype=torch.int64)
    vector = torch.zeros(1, device=device)
    add_statistics(logits, target, 0, 1.0, (vector, vector.clone(), vector.clone(), vector.clone()), entropy=False)
    to_gradient(logits, target, 0, 1.0, vector, vector)


@triton.jit
def _statistics(
    logits,
    target,
    top,
    mass,
    moment,
    picked,
    start,
    columns,
    inverse,
    ENTROPY: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program a row. Sums stay one a lane until the end, all relative to the largest score so far."""
    row = tl.program_id(0)
    logits += row.to(tl.int64) * columns
    before = tl.load(top + row)
    high = before
    sums = tl.zeros([BLOCK], dtype=tl.float32)
    moments = tl.zeros([BLOCK], dtype=tl.float32)
    for first in range(0, columns, BLOCK):
        at = first + tl.arange(0, BLOCK)
        z = tl.load(logits + at, mask=at < columns, other=float("-inf")).to(tl.float32) * inverse
        higher = tl.maximum(high, tl.max(z, axis=0))
        level = tl.where(higher == float("-inf"), 0.0, higher)  # -inf less -inf is NaN
        drop = tl.maximum(high - level, -200.0)  # e^-200 is nothing, and 0 times it no NaN as with -inf
        decay = tl.exp(drop)
        rest = z - level
        power = tl.exp(rest)
        if ENTROPY:
            moments = decay * (moments + drop * sums) + power * tl.maximum(rest, -200.0)
        sums = decay * sums + power
        high = higher
    level = tl.where(high == float("-inf"), 0.0, high)
    drop = tl.maximum(before - level, -200.0)
    decay = tl.exp(drop)
    old = tl.load(mass + row)
    if ENTROPY:
        tl.store(moment + row, decay * (tl.load(moment + row) + drop * old) + tl.sum(moments, axis=0))
    tl.store(mass + row, decay * old + tl.sum(sums, axis=0))
    tl.store(top + row, high)
    place = tl.load(target + row) - start
    here = (place >= 0) & (place < columns)
    found = tl.load(logits + place, mask=here, other=0.0).to(tl.float32) * inverse
    tl.store(picked + row, found, mask=here)


@triton.jit
def _gradient(
    logits,
    target,
    log_z,
    grad_logprob,
    entropy,
    grad_entropy,
    start,
    columns,
    inverse,
    ENTROPY: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program for a piece of a row."""
    row = tl.program_id(0)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    logits += row.to(tl.int64) * columns
    log_p = tl.load(logits + at, mask=at < columns, other=0.0).to(tl.float32) * inverse - tl.load(log_z + row)
    p = tl.exp(log_p)
    g = tl.load(grad_logprob + row)
    grad = tl.where(at == tl.load(target + row) - start, g, 0.0) - g * p
    if ENTROPY:
        spread = tl.load(entropy + row)
        grad -= tl.load(grad_entropy + row) * p * (tl.maximum(log_p, -200.0) + spread)
    tl.store(logits + at, grad.to(logits.dtype.element_ty), mask=at < columns)
