"""The head's Triton kernels: on CPU tensors by Triton's interpreter, and on a GPU against the plain path.

The interpreter must be on before Triton is imported, so those tests run in a process of their own, which
`test_by_the_interpreter` starts. TRITON_INTERPRET=1 runs them directly.
"""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.model.test_logprobs import PLAIN, VARIANTS, Case, agree, gradients, random_case, slow, tiled
from torch import Tensor

from shoestring.memory.footprint import FAMILIES
from shoestring.model import logit_tiles, logit_transforms
from shoestring.model import logprobs as heads
from shoestring.model.fast import kernels
from shoestring.model.logit_tiles import head_bytes, tile_shape
from shoestring.model.logprobs import full_entropy, gathered_logprobs, selected_logprobs
from tracker import LiveBytes

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
interpreted = pytest.mark.skipif(not INTERPRETED, reason="runs under TRITON_INTERPRET=1, as a test here starts it")
on_gpu = pytest.mark.skipif(not torch.cuda.is_available() or INTERPRETED, reason="needs a GPU")
needs_triton = pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed")


@needs_triton
@pytest.mark.skipif(INTERPRETED, reason="is the test that starts the others")
def test_by_the_interpreter() -> None:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-x", __file__],
        cwd=Path(__file__).parents[3],
        env={**environment, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    if "only 0-dimensional arrays can be converted" in done.stdout:
        pytest.skip(f"the interpreter of Triton {version('triton')} cannot loop under numpy {version('numpy')}")
    assert done.returncode == 0, done.stdout + done.stderr
    assert " passed" in done.stdout


# --- the kernels on given logits ------------------------------------------------------------------------------------


def statistics(logits: Tensor, target: Tensor, temperature: float, width: int, entropy: bool) -> tuple[Tensor, ...]:
    """Log Z, log-prob and entropy (without `entropy`: nothing of use), [N] each, from tiles of `width` columns."""
    from shoestring.model.fast.kernels.head import add_statistics

    top, mass, moment = (torch.full((len(logits),), x, device=logits.device) for x in (-torch.inf, 0.0, 0.0))
    picked = torch.full_like(top, torch.nan)
    for start in range(0, logits.shape[1], width):
        tile = logits[:, start : start + width].contiguous()
        add_statistics(tile, target, start, temperature, (top, mass, moment, picked), entropy=entropy)
    log_z = top + mass.log()
    return log_z, picked - log_z, mass.log() - moment / mass


def gradient(
    logits: Tensor, target: Tensor, temperature: float, width: int, log_z: Tensor, given: tuple[Tensor, ...]
) -> Tensor:
    """[N, V] from tiles of `width` columns; `given` is g, or g, entropy and its g."""
    from shoestring.model.fast.kernels.head import to_gradient

    tiles = []
    for start in range(0, logits.shape[1], width):
        tiles.append(logits[:, start : start + width].contiguous().clone())
        to_gradient(tiles[-1], target, start, temperature, log_z, *given)
    return torch.cat(tiles, 1)


def random_logits(num: int, vocab: int, dtype: torch.dtype, device: str = "cpu") -> tuple[Tensor, Tensor, Tensor]:
    """Logits [N, V], targets [N] with the first and the last column among them, and gradients [2, N]."""
    draw = torch.Generator().manual_seed(num + vocab)
    logits = torch.randn(num, vocab, generator=draw).mul(4).to(dtype)
    target = torch.randint(0, vocab, (num,), generator=draw)
    target[0], target[-1] = 0, vocab - 1
    return logits.to(device), target.to(device), torch.randn(2, num, generator=draw).to(device)


# num, vocab, width of a tile
SHAPES = [(1, 1, 1), (5, 261, 261), (7, 1000, 250), (3, 4097, 4097), (5, 9001, 4500), (2, 7, 1)]
# The interpreter cuts numbers off where a GPU rounds them: a whole step of the type, not half of one.
STEPS = {torch.float32: 1e-5, torch.bfloat16: 2**-7, torch.float16: 2**-10}


def check_kernels(num: int, vocab: int, width: int, dtype: torch.dtype, temperature: float, device: str) -> None:
    logits, target, upstream = random_logits(num, vocab, dtype, device)
    leaf = logits.float().requires_grad_()
    wanted = gathered_logprobs(leaf, target, temperature), full_entropy(leaf, temperature)
    for entropy in (False, True):
        log_z, logprob, spread = statistics(logits, target, temperature, width, entropy)
        torch.testing.assert_close(logprob, wanted[0].detach(), atol=1e-5, rtol=1e-6)
        given: tuple[Tensor, ...] = (upstream[0] / temperature,)
        loss = (wanted[0] * upstream[0]).sum()
        if entropy:
            torch.testing.assert_close(spread, wanted[1].detach(), atol=2e-5, rtol=1e-6)
            given = (*given, spread, upstream[1] / temperature)
            loss = loss + (wanted[1] * upstream[1]).sum()
        [exact] = torch.autograd.grad(loss, leaf, retain_graph=True)
        found = gradient(logits, target, temperature, width, log_z, given)
        assert found.dtype == dtype
        torch.testing.assert_close(found.float(), exact, atol=1e-5, rtol=STEPS[dtype])


@interpreted
@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("dtype", STEPS)
@pytest.mark.parametrize(("num", "vocab", "width"), SHAPES)
def test_both_kernels(num: int, vocab: int, width: int, dtype: torch.dtype, temperature: float) -> None:
    check_kernels(num, vocab, width, dtype, temperature, "cpu")


def check_forbidden_tokens(dtype: torch.dtype, device: str) -> None:
    """Logits of -inf take no mass and get no gradient, also where they fill a row's first tile."""
    logits, target, upstream = random_logits(6, 40, dtype, device)
    logits[0, 1:] = logits[1, :20] = logits[2, 5] = logits[3, 39] = -torch.inf
    target[1] = 25
    some = logits.float() > -torch.inf
    log_p = torch.log_softmax(logits.float() / 0.7, -1)
    p, log_p = log_p.exp(), log_p.masked_fill(~some, 0.0)
    log_z, logprob, spread = statistics(logits, target, 0.7, 10, True)
    entropy = -(p * log_p).sum(-1)
    torch.testing.assert_close(logprob, log_p.gather(1, target[:, None]).squeeze(1), atol=1e-5, rtol=0)
    torch.testing.assert_close(spread, entropy, atol=1e-5, rtol=0)
    exact = -upstream[0, :, None] * p - upstream[1, :, None] * p * (log_p + entropy[:, None])
    exact[torch.arange(6), target] += upstream[0]
    found = gradient(logits, target, 0.7, 10, log_z, (upstream[0], spread, upstream[1]))
    torch.testing.assert_close(found.float(), exact, atol=1e-5, rtol=STEPS[dtype])
    assert not found[~some].any()


@interpreted
@pytest.mark.parametrize("dtype", STEPS)
def test_forbidden_tokens(dtype: torch.dtype) -> None:
    check_forbidden_tokens(dtype, "cpu")


def check_bad_numbers(device: str) -> None:
    """A logit that is no number is seen, also behind good tiles; so is +inf."""
    logits, target, _ = random_logits(4, 40, torch.float32, device)
    logits[1, 33], logits[2, 3] = torch.nan, torch.inf
    log_z, logprob, spread = statistics(logits, target, 1.0, 10, True)
    for found in (log_z, logprob, spread):
        assert found.isnan().tolist() == [False, True, True, False]
    ones = torch.ones_like(log_z)
    found = gradient(logits, target, 1.0, 10, log_z, (ones, spread, ones))
    assert found.isnan().all(1).tolist() == [False, True, True, False]


@interpreted
@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
def test_bad_numbers() -> None:
    check_bad_numbers("cpu")


# --- the whole head by the kernels, on the CPU ----------------------------------------------------------------------


def tiles_of(monkeypatch: pytest.MonkeyPatch, rows: int, size: int) -> None:
    """The kernel path here, with tiles of `size` bytes."""
    monkeypatch.setattr(kernels, "usable", lambda *_: True)
    monkeypatch.setattr(logit_tiles, "KEPT", 0)
    monkeypatch.setattr(logit_tiles, "_KERNEL_ROWS", rows)
    monkeypatch.setattr(logit_tiles, "_KERNEL_TILE", (size, size))


@interpreted
@pytest.mark.parametrize("tiling", [(2048, 2**25), (5, 5 * 37), (4, 4 * 64), (13, 13 * 261), (1, 200)])
@pytest.mark.parametrize("entropy", [False, True])
@pytest.mark.parametrize(("bias", "temperature"), [(False, 1.0), (True, 0.7)])
def test_tiles_equal_all_logits_at_once(
    tiling: tuple[int, int], entropy: bool, bias: bool, temperature: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiles_of(monkeypatch, tiling[0], 4 * tiling[1])
    for seed, (num, vocab, size) in enumerate([(13, 261, 8), (1, 3, 2), (6, 70, 16)]):
        case = random_case(num, vocab, size, bias=bias, seed=seed)
        agree(tiled(case, temperature, None, entropy), slow(case, temperature, PLAIN, entropy), atol=1e-5)


@interpreted
def test_a_target_outside_the_vocabulary_gets_nan(monkeypatch: pytest.MonkeyPatch) -> None:
    tiles_of(monkeypatch, 2, 32)
    case = random_case(3, 11, 4)
    found = selected_logprobs(case.hidden, case.weight, None, torch.tensor([0, 11, -1]), 1.0)
    assert found.isnan().tolist() == [False, True, True]


@interpreted
def test_a_transform_of_logits_takes_the_plain_path(monkeypatch: pytest.MonkeyPatch) -> None:
    tiles_of(monkeypatch, 2, 32)
    monkeypatch.setattr(heads._Running, "read", lambda *_: pytest.fail("the kernel was used"))
    case = random_case(3, 11, 4)
    agree(tiled(case, 1.0, torch.tanh, False), slow(case, 1.0, torch.tanh, False), atol=1e-5)


def backward(hidden: Tensor, weight: Tensor, target: Tensor, entropy: bool = False) -> None:
    if entropy:
        sum(selected_logprobs(hidden, weight, None, target, 0.9, entropy=True)).sum().backward()  # type: ignore[union-attr]
    else:
        selected_logprobs(hidden, weight, None, target, 0.9).sum().backward()


# --- what the plan says ---------------------------------------------------------------------------------------------


def test_the_kernels_tiles() -> None:
    """32 MiB of logits beside few hidden states, 64 MiB beside many, in rows of equal number."""
    assert tile_shape(2048, 151_936, 1536, 2, kernel=True) == (2048, 8192)
    assert tile_shape(2048, 151_936, 1024, 4, kernel=True) == (2048, 4096)
    assert tile_shape(8192, 151_936, 1536, 2, kernel=True) == (2048, 16_384)
    assert tile_shape(4353, 151_936, 1536, 2, kernel=True) == (1451, 18_432)
    assert tile_shape(100, 151_936, 1536, 2, kernel=True) == (100, 151_936)
    assert tile_shape(300, 151_936, 1536, 2, kernel=True) == (300, 55_872)


@pytest.mark.parametrize("variant", ["plain", "entropy", "trained"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("num", "vocab", "size"), [(40, 3001, 64), (200, 1500, 48), (333, 2000, 16)])
def test_live_bytes(
    num: int, vocab: int, size: int, dtype: torch.dtype, variant: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of all but the kernels, which take none. A product that a GPU adds on the way is a tensor of its own here."""
    tiles_of(monkeypatch, 128, 2**16)
    monkeypatch.setattr(heads._Running, "read", lambda *_: None)
    monkeypatch.setattr(heads._Pull, "_by_kernel", lambda *_: None)
    options = VARIANTS[variant]
    trained = not options.get("frozen", True)
    case = random_case(num, vocab, size, dtype=dtype)
    hidden, weight = case.hidden.requires_grad_(), case.weight.requires_grad_(trained)
    with LiveBytes() as live:
        backward(hidden, weight, case.target, entropy=options.get("entropy", False))
    returned = (hidden.numel() + weight.numel() * trained) * dtype.itemsize
    promised = head_bytes(num, vocab, size, dtype.itemsize, kernel=True, **options)
    rows, columns = tile_shape(num, vocab, size, dtype.itemsize, kernel=True)
    product = (dtype.itemsize < 4) * dtype.itemsize * size * (max(rows, columns) if trained and num > rows else rows)
    assert 0.85 * promised < live.peak - returned <= 1.05 * (promised + product)


@pytest.mark.parametrize("size", [896, 1536, 4096])
def test_the_kernels_take_little_more_memory_than_the_plain_path(size: int) -> None:
    """No more, but where hidden states take some of their own."""
    for num in (64, 1000, 2048, 8192):
        both = [head_bytes(num, 151_936, size, 2, kernel=kernel) for kernel in (True, False)]
        assert both[0] <= 1.01 * both[1] + 4 * size * num * (8 * size * num > 2**25)


def test_families_with_a_transform_are_those_of_the_head() -> None:
    from types import SimpleNamespace

    config = SimpleNamespace(logits_scaling=3.0, logit_scale=0.25, final_logit_softcapping=3.0)
    config_of = {"gemma3_text": SimpleNamespace(final_logit_softcapping=None)}  # as published
    for name, family in FAMILIES.items():
        assert family.post == (
            logit_transforms.POST_HEAD[name](config_of.get(name, config)) is not logit_transforms._same
        ), name


def test_nothing_but_a_gpu_has_kernels() -> None:
    assert not kernels.usable(torch.device("cpu"), torch.bfloat16)


# --- on a GPU -------------------------------------------------------------------------------------------------------


def moved(case: Case) -> Case:
    given = (case.hidden, case.weight, case.bias, case.target, case.upstream)
    return Case(*(None if x is None else x.cuda() for x in given))  # type: ignore[arg-type]


@on_gpu
def test_the_kernels_run() -> None:
    for dtype in STEPS:
        assert kernels.usable(torch.device("cuda"), dtype)
    assert not kernels.usable(torch.device("cuda"), torch.float64)


@on_gpu
@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("dtype", STEPS)
@pytest.mark.parametrize(("num", "vocab", "width"), [*SHAPES, (130, 20_000, 8192)])
def test_both_kernels_on_a_gpu(num: int, vocab: int, width: int, dtype: torch.dtype, temperature: float) -> None:
    check_kernels(num, vocab, width, dtype, temperature, "cuda")


@on_gpu
def test_odd_logits_on_a_gpu() -> None:
    for dtype in STEPS:
        check_forbidden_tokens(dtype, "cuda")
    check_bad_numbers("cuda")


def by_path(
    case: Case, temperature: float, trained: bool, kernel: bool, monkeypatch: pytest.MonkeyPatch
) -> tuple[list[Tensor], list[Tensor]]:
    """Log-prob and entropy, and their gradients of hidden and, if trained, weight and bias."""
    with monkeypatch.context() as patched:
        if not kernel:
            patched.setattr(kernels, "usable", lambda *_: False)
        leaves = case.leaves() if trained else case.leaves()[:1]
        weight = leaves[1] if trained else case.weight
        bias = None if case.bias is None else leaves[2] if trained else case.bias
        found = list(selected_logprobs(leaves[0], weight, bias, case.target, temperature, entropy=True))
        return found, gradients(case, found, leaves)


@on_gpu
@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize(("num", "vocab", "size"), [(3000, 9001, 64), (2500, 20_000, 128), (100, 151_936, 64)])
def test_the_kernel_path_is_the_plain_path_in_fp32(
    num: int, vocab: int, size: int, trained: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = moved(random_case(num, vocab, size, bias=trained))
    both = [by_path(case, 0.7, trained, kernel, monkeypatch) for kernel in (True, False)]
    agree(both[0], both[1], atol=1e-5)


@on_gpu
@pytest.mark.parametrize("trained", [False, True])
def test_the_kernel_path_is_as_exact_as_bf16_logits(trained: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    case = moved(random_case(2500, 20_000, 128, dtype=torch.bfloat16))
    exact = Case(case.hidden.double(), case.weight.double(), None, case.target, case.upstream.double())
    values, grads = slow(exact, 0.7, PLAIN, True)
    kernel, plain = (by_path(case, 0.7, trained, kernel, monkeypatch) for kernel in (True, False))
    for ours, theirs, true in zip(kernel[0] + kernel[1], plain[0] + plain[1], values + grads, strict=False):
        error, usual = (ours.double() - true).abs().mean(), (theirs.double() - true).abs().mean()
        assert ours.dtype == theirs.dtype
        assert error < 1.05 * usual


GPU_VARIANTS: dict[str, dict[str, Any]] = {name: VARIANTS[name] for name in ("plain", "entropy", "trained")}


@on_gpu
@pytest.mark.parametrize("variant", GPU_VARIANTS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("num", "vocab", "size"), [(5000, 40_000, 512), (700, 50_000, 256)])
def test_peak_bytes_on_a_gpu(num: int, vocab: int, size: int, dtype: torch.dtype, variant: str) -> None:
    options = GPU_VARIANTS[variant]
    trained = not options.get("frozen", True)
    case = moved(random_case(num, vocab, size, dtype=dtype))
    hidden, weight = case.hidden.requires_grad_(), case.weight.requires_grad_(trained)
    backward(hidden[:32], weight, case.target[:32])  # compiles, and takes cuBLAS' workspace
    hidden.grad = weight.grad = None
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    backward(hidden, weight, case.target, entropy=options.get("entropy", False))
    returned = (hidden.numel() + weight.numel() * trained) * dtype.itemsize
    peak = torch.cuda.max_memory_allocated() - before - returned
    promised = head_bytes(num, vocab, size, dtype.itemsize, kernel=True, **options)
    assert abs(peak - promised) <= 0.03 * promised + 300 * 2**10
