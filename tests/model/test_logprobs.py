"""Log-probs and entropy from tiles against all logits at once: values, gradients, memory."""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from shoestring.model import logit_tiles
from shoestring.model.logit_tiles import head_bytes, tile_shape
from shoestring.model.logit_transforms import POST_HEAD, Head
from shoestring.model.logprobs import full_entropy, gathered_logprobs, selected_logprobs
from tracker import LiveBytes

CAP = POST_HEAD["gemma2"](SimpleNamespace(final_logit_softcapping=3.0))
PLAIN = POST_HEAD["qwen2"](SimpleNamespace())


def tiles_of(monkeypatch: pytest.MonkeyPatch, rows: int, elements: int) -> None:
    monkeypatch.setattr(logit_tiles, "KEPT", 0)
    monkeypatch.setattr(logit_tiles, "_ROWS", rows)
    monkeypatch.setattr(logit_tiles, "_TILE", elements)


@dataclass
class Case:
    """Random inputs, and what their gradients are taken against."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    target: Tensor
    upstream: Tensor
    """[2, N]: gradients of log-prob and entropy."""

    def leaves(self) -> list[Tensor]:
        given = [self.hidden, self.weight] + ([] if self.bias is None else [self.bias])
        return [x.detach().clone().requires_grad_() for x in given]


def random_case(
    num: int, vocab: int, size: int, *, bias: bool = False, dtype: torch.dtype = torch.float32, seed: int = 0
) -> Case:
    draw = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=draw, dtype=torch.float64).to(dtype)

    target = torch.randint(0, vocab, (num,), generator=draw)
    weight = normal(vocab, size) * (4 / size**0.5)
    wide = torch.promote_types(dtype, torch.float32)
    return Case(normal(num, size), weight, normal(vocab) if bias else None, target, normal(2, num).to(wide))


def slow(case: Case, temperature: float, post: Head, entropy: bool) -> tuple[list[Tensor], list[Tensor]]:
    """Values and gradients with all logits at hand."""
    leaves = case.leaves()
    logits = post(torch.nn.functional.linear(*leaves))
    found = [gathered_logprobs(logits, case.target, temperature)]
    if entropy:
        found.append(full_entropy(logits, temperature))
    return found, gradients(case, found, leaves)


def tiled(case: Case, temperature: float, post: Head | None, entropy: bool) -> tuple[list[Tensor], list[Tensor]]:
    leaves = case.leaves()
    bias = leaves[2] if len(leaves) == 3 else None
    if entropy:
        found = list(selected_logprobs(*leaves[:2], bias, case.target, temperature, post, entropy=True))
    else:
        found = [selected_logprobs(*leaves[:2], bias, case.target, temperature, post)]
    return found, gradients(case, found, leaves)


def gradients(case: Case, found: list[Tensor], leaves: list[Tensor]) -> list[Tensor]:
    loss = sum((x * g).sum() for x, g in zip(found, case.upstream, strict=False))
    return list(torch.autograd.grad(loss, leaves))  # type: ignore[arg-type]


def agree(found: tuple[list[Tensor], list[Tensor]], wanted: tuple[list[Tensor], list[Tensor]], atol: float) -> None:
    """Within `atol`, times the size of the largest entry where that is above 1."""
    for a, b in zip(found[0] + found[1], wanted[0] + wanted[1], strict=True):
        scale = max(1.0, b.detach().abs().max().item()) if b.numel() else 1.0
        torch.testing.assert_close(a, b, atol=atol * scale, rtol=0)


def test_worked_example_in_two_vocabulary_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    tiles_of(monkeypatch, rows=1, elements=2)
    hidden = torch.tensor([[2.0, 0.0, 1.0, -1.0]], requires_grad=True)
    logprob, entropy = selected_logprobs(hidden, torch.eye(4), None, torch.tensor([2]), 1.0, entropy=True)
    assert logprob.item() == pytest.approx(-1.440190, abs=2e-6)
    assert entropy.item() == pytest.approx(0.947537, abs=2e-6)
    logprob.sum().backward()
    torch.testing.assert_close(
        hidden.grad, torch.tensor([[-0.643914, -0.087144, 0.763117, -0.032059]]), atol=2e-6, rtol=0
    )


TILINGS = [(1024, 2**22), (7, 7 * 5), (50, 64), (16, 16 * 261), (5, 50)]


@pytest.mark.parametrize("tiling", TILINGS)
@pytest.mark.parametrize("entropy", [False, True])
@pytest.mark.parametrize(("post", "bias", "temperature"), [(PLAIN, False, 1.0), (CAP, False, 0.7), (None, True, 1.3)])
def test_tiles_equal_all_logits_at_once(
    tiling: tuple[int, int],
    entropy: bool,
    post: Head | None,
    bias: bool,
    temperature: float,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    tiles_of(monkeypatch, *tiling)
    for seed, (num, vocab, size) in enumerate([(50, 261, 8), (1, 3, 2), (33, 70, 16)]):
        case = random_case(num, vocab, size, bias=bias, seed=seed)
        agree(tiled(case, temperature, post, entropy), slow(case, temperature, post or PLAIN, entropy), atol=1e-5)


@pytest.mark.parametrize("family", ["granite", "cohere", "gemma2"])
def test_a_frozen_head_gives_the_same_gradient_of_hidden(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    tiles_of(monkeypatch, rows=20, elements=20 * 100)
    config = SimpleNamespace(final_logit_softcapping=3.0, logits_scaling=3.0, logit_scale=0.25)
    post = POST_HEAD[family](config)
    case = random_case(50, 261, 8)
    _, (wanted, _) = slow(case, 0.9, post, False)
    hidden = case.hidden.requires_grad_()
    found = selected_logprobs(hidden, case.weight, None, case.target, 0.9, post)
    found.backward(case.upstream[0])
    torch.testing.assert_close(hidden.grad, wanted, atol=1e-5, rtol=0)
    assert case.weight.grad is None


@pytest.mark.parametrize("post", [None, CAP])
def test_gradcheck(post: Head | None, monkeypatch: pytest.MonkeyPatch) -> None:
    tiles_of(monkeypatch, rows=2, elements=6)
    case = random_case(3, 7, 4, bias=True, dtype=torch.float64)

    def both(hidden: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        return selected_logprobs(hidden, weight, bias, case.target, 0.8, post, entropy=True)

    assert torch.autograd.gradcheck(both, case.leaves())


@pytest.mark.parametrize("offset", [-300.0, 0.0, 300.0])
def test_large_logits_and_far_apart_tiles(offset: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """The largest score rises by hundreds from tile to tile, or stays in the first."""
    tiles_of(monkeypatch, rows=4, elements=8)
    logits = torch.randn(4, 6, generator=torch.Generator().manual_seed(0)) + offset * torch.arange(6) // 2
    hidden, target = torch.eye(4), torch.tensor([0, 2, 4, 5])
    found = selected_logprobs(hidden, logits.T.contiguous(), None, target, 1.0, entropy=True)
    torch.testing.assert_close(found[0], gathered_logprobs(logits, target, 1.0), atol=1e-4, rtol=1e-6)
    torch.testing.assert_close(found[1], full_entropy(logits, 1.0), atol=1e-5, rtol=0)


@pytest.mark.parametrize("trained", [False, True])
def test_bf16_is_as_exact_as_bf16_logits(trained: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    tiles_of(monkeypatch, rows=64, elements=64 * 128)
    case = random_case(200, 1000, 64, dtype=torch.bfloat16)
    exact = Case(case.hidden.double(), case.weight.double(), None, case.target, case.upstream.double())
    values, grads = slow(exact, 1.0, PLAIN, True)
    plain = slow(case, 1.0, PLAIN, True)
    if trained:
        found = tiled(case, 1.0, None, True)
    else:
        hidden = case.hidden.clone().requires_grad_()
        outputs = list(selected_logprobs(hidden, case.weight, None, case.target, 1.0, entropy=True))
        found = outputs, gradients(case, outputs, [hidden])
    assert {x.dtype for x in found[0]} == {torch.float32}
    assert {x.dtype for x in found[1]} == {torch.bfloat16}
    for ours, theirs, true in zip(found[0] + found[1], plain[0] + plain[1], values + grads, strict=False):
        error, usual = (ours.double() - true).abs().mean(), (theirs.double() - true).abs().mean()
        assert error < 1.05 * usual


def test_autocast_rounds_products_only_and_reaches_fp32_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    tiles_of(monkeypatch, rows=16, elements=16 * 100)
    case = random_case(40, 261, 32)
    low = Case(case.hidden.bfloat16(), case.weight.bfloat16(), None, case.target, case.upstream)
    leaves = case.leaves()
    with torch.autocast("cpu", torch.bfloat16):
        found = selected_logprobs(leaves[0], leaves[1], None, case.target, 0.9)
    (wanted,), _ = tiled(low, 0.9, None, False)
    assert torch.equal(found, wanted)
    grads = gradients(case, [found], leaves)
    assert {g.dtype for g in grads} == {torch.float32}
    for a, b in zip(grads, slow(case, 0.9, PLAIN, False)[1], strict=True):
        assert (a - b).norm() < 0.02 * b.norm()


def test_no_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    empty = random_case(0, 11, 4)
    assert selected_logprobs(empty.hidden, empty.weight, None, empty.target, 1.0).shape == (0,)
    monkeypatch.setattr(logit_tiles, "KEPT", -1)
    case = random_case(0, 11, 4, bias=True)
    found, grads = tiled(case, 0.9, CAP, True)
    assert [x.shape for x in found] == [(0,), (0,)]
    assert [float(g.abs().sum()) for g in grads] == [0.0, 0.0, 0.0]


def test_a_target_outside_the_vocabulary_gets_nan(monkeypatch: pytest.MonkeyPatch) -> None:
    """A number would pass for a log-prob."""
    tiles_of(monkeypatch, rows=2, elements=8)
    case = random_case(3, 11, 4)
    found = selected_logprobs(case.hidden, case.weight, None, torch.tensor([0, 11, -1]), 1.0)
    assert found.isnan().tolist() == [False, True, True]


def test_with_and_without_gradient_are_the_same_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    tiles_of(monkeypatch, rows=16, elements=16 * 100)
    case = random_case(40, 261, 32)
    with torch.no_grad():
        free = selected_logprobs(case.hidden, case.weight, None, case.target, 0.9)
    assert not free.requires_grad
    assert torch.equal(free, tiled(case, 0.9, None, False)[0][0])


@pytest.mark.parametrize("entropy", [False, True])
@pytest.mark.parametrize("post", [None, CAP])
def test_few_logits_are_kept(entropy: bool, post: Head | None) -> None:
    case = random_case(50, 261, 8, bias=True)
    agree(tiled(case, 0.7, post, entropy), slow(case, 0.7, post or PLAIN, entropy), atol=1e-6)


def test_there_is_no_second_derivative(monkeypatch: pytest.MonkeyPatch) -> None:
    tiles_of(monkeypatch, rows=2, elements=8)
    case = random_case(3, 11, 4)
    hidden = case.hidden.requires_grad_()
    found = selected_logprobs(hidden, case.weight, None, case.target, 1.0).square().sum()
    [grad] = torch.autograd.grad(found, hidden, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


@pytest.mark.parametrize(
    ("num", "vocab", "shape"),
    [
        (0, 261, (1, 261)),
        (3, 261, (3, 261)),
        (5000, 261, (1024, 261)),
        (5000, 151_936, (1024, 8192)),
        (8, 151_936, (8, 151_936)),
        (100, 151_936, (100, 83_840)),
    ],
)
def test_tile_shape(num: int, vocab: int, shape: tuple[int, int]) -> None:
    assert tile_shape(num, vocab) == shape


VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "entropy": {"entropy": True},
    "post": {"post": True},
    "both": {"entropy": True, "post": True},
    "trained": {"frozen": False},
}


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("num", "vocab", "size"), [(40, 3001, 64), (200, 1500, 48), (333, 2000, 16), (300, 900, 256)])
def test_peak_bytes(
    num: int, vocab: int, size: int, dtype: torch.dtype, variant: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tiles of 2^15 elements, so that a test is quick; full ones are below."""
    tiles_of(monkeypatch, rows=128, elements=2**15)
    peak, promised = peak_bytes(num, vocab, size, dtype, VARIANTS[variant])
    assert 0.85 * promised < peak <= 1.05 * promised


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_peak_bytes_of_few_logits(dtype: torch.dtype, variant: str) -> None:
    peak, promised = peak_bytes(300, 800, 16, dtype, VARIANTS[variant])
    assert 0.85 * promised < peak <= 1.05 * promised


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_peak_bytes_of_full_tiles(dtype: torch.dtype) -> None:
    peak, promised = peak_bytes(1500, 18_000, 32, dtype, {})
    assert 0.85 * promised < peak <= 1.05 * promised
    assert peak < 10 * 2**23 < 1500 * 18_000 * dtype.itemsize * 2


def test_a_frozen_head_allocates_nothing_of_its_size(monkeypatch: pytest.MonkeyPatch) -> None:
    """A weight much larger than a tile."""
    tiles_of(monkeypatch, rows=8, elements=2**10)
    peak, _ = peak_bytes(8, 4096, 256, torch.bfloat16, {})
    assert peak < 0.02 * 4096 * 256 * 2


def peak_bytes(num: int, vocab: int, size: int, dtype: torch.dtype, variant: dict[str, Any]) -> tuple[int, int]:
    """Measured, less the returned gradients, and promised."""
    case = random_case(num, vocab, size, dtype=dtype)
    hidden = case.hidden.requires_grad_()
    trained = not variant.get("frozen", True)
    weight = case.weight.requires_grad_(trained)
    post = CAP if variant.get("post") else None
    with LiveBytes() as live:
        if variant.get("entropy"):
            sum(selected_logprobs(hidden, weight, None, case.target, 0.9, post, entropy=True)).sum().backward()  # type: ignore[union-attr]
        else:
            selected_logprobs(hidden, weight, None, case.target, 0.9, post).sum().backward()
    assert (weight.grad is not None) == trained
    returned = (hidden.numel() + weight.numel() * trained) * dtype.itemsize
    return live.peak - returned, head_bytes(num, vocab, size, dtype.itemsize, **variant)
