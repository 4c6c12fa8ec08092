"""Forward and backward pass of the head, Triton kernels against plain torch: bench/results/head.json.

    python bench/head.py OUT [--tiny] [--sweep]

Log-probs of N tokens over a Qwen2-1.5B vocabulary matrix (V = 151,936, H = 1,536, bf16, frozen), and the gradient of
the hidden states: three matrix products, 6 N V H operations. `products` is those alone over the kernels' tiles, the
least there is. `--sweep` tries other tiles at the smallest N. Without a GPU only the plain path is timed.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable
from typing import Any
from unittest.mock import patch

import torch
from common import clean, write
from torch import Tensor

from shoestring.model import logprobs as heads
from shoestring.model.fast import kernels
from shoestring.model.logit_tiles import head_bytes, tile_shape
from shoestring.model.logprobs import selected_logprobs
from shoestring.model.matmul import add_product

GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if GPU else "cpu")
TIMES, WARM = 10, 2
SIZES = (8192, 16_384), 151_936, 1536
TINY = (256, 512), 5000, 64


def seconds(job: Callable[[], object]) -> list[float]:
    """Of each of ten calls, after two."""
    for _ in range(WARM):
        job()
    return [_once(job) for _ in range(TIMES)]


def _once(job: Callable[[], object]) -> float:
    if not GPU:
        start = time.perf_counter()
        job()
        return time.perf_counter() - start
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    job()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1000


def inputs(num: int, vocab: int, size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states [N, H] that want a gradient, the vocabulary matrix [V, H], targets [N]."""
    torch.manual_seed(0)
    hidden = torch.randn(num, size, device=DEVICE, dtype=torch.bfloat16).requires_grad_()
    weight = torch.randn(vocab, size, device=DEVICE, dtype=torch.bfloat16) * 0.02
    return hidden, weight, torch.randint(0, vocab, (num,), device=DEVICE)


def step(hidden: Tensor, weight: Tensor, target: Tensor) -> None:
    hidden.grad = None
    selected_logprobs(hidden, weight, None, target, 1.0).sum().backward()


def products(hidden: Tensor, weight: Tensor) -> None:
    """What a step cannot do without."""
    num_rows, num_columns = tile_shape(len(hidden), len(weight), weight.shape[1], hidden.itemsize, kernel=True)
    with torch.no_grad():
        for rows in hidden.split(num_rows):
            total = torch.zeros_like(rows, dtype=torch.float32)
            for columns in weight.split(num_columns):
                logits = rows @ columns.T
                torch.matmul(rows, columns.T, out=logits)
                add_product(total, logits, columns)


def line(path: str, num: int, vocab: int, size: int) -> dict[str, Any]:
    """A row of the result: `path` is "kernel", "plain" or "products"."""
    clean()
    hidden, weight, target = inputs(num, vocab, size)
    kernel = path != "plain"
    job = (lambda: products(hidden, weight)) if path == "products" else (lambda: step(hidden, weight, target))
    with patch.object(kernels, "usable", lambda *_: kernel):
        found = seconds(job)
        peak = _peak(job, hidden) if GPU else None
    median = statistics.median(found)
    return {
        "path": path,
        "tokens": num,
        "tile": tile_shape(num, vocab, size, hidden.itemsize, kernel=kernel),
        "ms": 1000 * median,
        "ms_least": 1000 * min(found),
        "ms_most": 1000 * max(found),
        "tflops": 6 * num * vocab * size / median / 1e12,
        "peak_mib": None if peak is None else peak / 2**20,
        "predicted_mib": head_bytes(num, vocab, size, hidden.itemsize, kernel=kernel) / 2**20,
    }


def _peak(job: Callable[[], object], hidden: Tensor) -> int:
    """Bytes at most beside the inputs and the gradient."""
    hidden.grad = None
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    job()
    returned = 0 if hidden.grad is None else hidden.grad.nbytes
    return torch.cuda.max_memory_allocated() - before - returned


def sweep(num: int, vocab: int, size: int) -> list[dict[str, Any]]:
    """The kernel path with other tiles: 16, 32 and 64 MiB, 1,024 to 4,096 rows."""
    found = []
    for rows in (1024, 2048, 4096):
        for tile in (2**24, 2**25, 2**26):
            with patch.multiple(heads, _KERNEL_ROWS=rows, _KERNEL_TILE=(tile, tile)):
                found.append(line("kernel", num, vocab, size) | {"sweep": True})
    return found


def main(out: str, tiny: bool, swept: bool) -> None:
    every, vocab, size = TINY if tiny else SIZES
    here = GPU and kernels.usable(DEVICE, torch.bfloat16)
    rows: list[dict[str, Any]] = []
    for num in every:
        for path in ("kernel", "products", "plain") if here else ("plain",):
            rows.append(line(path, num, vocab, size))
            write(out, "head", rows, vocab=vocab, hidden=size)
        if here:
            kernel, _, plain = rows[-3:]
            print(f"{num} tokens: kernel / plain = {kernel['ms'] / plain['ms']:.3f}", flush=True)
    for row in sweep(every[0], vocab, size) if swept and here else []:
        rows.append(row)
        write(out, "head", rows, vocab=vocab, hidden=size)


if __name__ == "__main__":
    main(sys.argv[1], "--tiny" in sys.argv, "--sweep" in sys.argv)
