"""The kernels of a decode step against plain torch: on a GPU as compiled, elsewhere in Triton's interpreter."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from copy import copy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tests.model.test_trees import some_step

from shoestring.model.fast import triton_operations as fused
from shoestring.model.fast.operations import Heads, Keys, Stream, Table
from shoestring.model.fast.torch_operations import Plain
from shoestring.model.fast.triton_operations import Fused
from shoestring.samplers import Sampling
from shoestring.samplers.graph import GraphEngine
from shoestring.samplers.hf import HfEngine
from shoestring.training.batch import training_rows
from shoestring.training.micro_batching import micro_batches
from shoestring.types import Paths
from tiny import prompt, random_policy

if importlib.util.find_spec("triton") is None:
    pytest.skip("needs the package triton", allow_module_level=True)

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TYPES = [torch.float32, torch.bfloat16] if DEVICE == "cuda" else [torch.float32]
CLOSE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


def close(found: torch.Tensor, wanted: torch.Tensor) -> None:
    torch.testing.assert_close(found, wanted, atol=CLOSE[found.dtype], rtol=CLOSE[found.dtype])


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("width", [48, 1536])
def test_norms(dtype: torch.dtype, width: int) -> None:
    x, weight = normal(5, width, dtype=dtype), normal(width, seed=1, dtype=dtype)
    y = normal(5, width + 8, seed=2, dtype=dtype)[:, :width]  # a view, as behind a product with an adapter's rows
    close(Fused().norm(x, weight, 1e-6), Plain().norm(x, weight, 1e-6))
    a, b = x.clone(), x.clone()
    close(Fused().add_norm(a, y, weight, 1e-6), Plain().add_norm(b, y, weight, 1e-6))
    assert torch.equal(a, b)


@pytest.mark.parametrize("dtype", TYPES)
def test_the_way_back_through_a_norm(dtype: torch.dtype) -> None:
    """Against autograd."""
    x, weight, add = normal(5, 72, dtype=dtype), normal(72, seed=1, dtype=dtype), normal(5, 72, seed=4, dtype=dtype)
    grad = normal(5, 80, seed=2, dtype=dtype)[:, :72]
    leaf = x.clone().requires_grad_()
    (wanted,) = torch.autograd.grad(Plain().norm(leaf, weight, 1e-6), leaf, grad)
    for do in (Plain(), Fused()):
        given = grad.clone()
        close(do.norm_back(given, x, weight, 1e-6, add), wanted + add)
        assert torch.equal(given, grad)
        close(do.norm_back(given, x, weight, 1e-6, add, again=True), wanted + add)
        close(given, Plain().norm(x, weight, 1e-6))


@pytest.mark.parametrize("dtype", TYPES)
def test_the_way_back_through_swiglu(dtype: torch.dtype) -> None:
    whole = normal(3, 2 * 1100 + 16, dtype=dtype)
    grad = normal(3, 1100, seed=1, dtype=dtype)
    leaf = whole[:, : 2 * 1100].clone().requires_grad_()
    (wanted,) = torch.autograd.grad(Plain().swiglu(leaf), leaf, grad)
    for do in (Plain(), Fused()):
        given, pulled = whole.clone(), grad.clone()
        do.swiglu_back(pulled, given[:, : 2 * 1100])
        close(given[:, : 2 * 1100], wanted)
        close(pulled, Plain().swiglu(whole[:, : 2 * 1100]))
        assert torch.equal(given[:, 2 * 1100 :], whole[:, 2 * 1100 :])


@pytest.mark.parametrize("dtype", TYPES)
def test_rotation_there_and_back(dtype: torch.dtype) -> None:
    heads = heads_of(7, 2, 16)
    positions = torch.tensor([0, 1, 70, 71], device=DEVICE)
    given = normal(4, 11 * 16 + 8, dtype=dtype)[:, : 11 * 16]
    before, turned = given.clone(), 9 * 16
    found, wanted = Fused().rotate(given, positions, heads), Plain().rotate(given, positions, heads)
    close(found, wanted)
    assert torch.equal(given, before)
    assert torch.equal(found[:, turned:], given[:, turned:])
    grad = normal(4, 11 * 16, seed=3, dtype=dtype)
    back, wanted = grad.clone(), grad.clone()
    close(Fused().rotate_back(back, positions, heads), Plain().rotate_back(wanted, positions, heads))
    assert torch.equal(back[:, turned:], grad[:, turned:])
    if dtype == torch.float32:  # <R x, g> = <x, R^T g>
        torch.testing.assert_close((found * grad).sum(), (given * back).sum(), rtol=1e-4, atol=1e-4)


def rows_of_a_tree() -> Paths:
    (tree,) = micro_batches(training_rows(*some_step()), 10**6, trees=True)
    assert tree.paths is not None
    return tree.paths.to(torch.device(DEVICE))


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize(("count", "kv"), [(7, 1), (2, 2), (3, 3)])
def test_rows_are_spread_and_their_gradients_added_up(dtype: torch.dtype, count: int, kv: int) -> None:
    heads, paths = heads_of(count, kv, 16), rows_of_a_tree()
    nodes = len(paths.place)
    given = normal(nodes, (count + 2 * kv) * 16 + 8, dtype=dtype)[:, : (count + 2 * kv) * 16]
    found = Fused().spread(given, paths, heads)
    for mine, wanted in zip(found, Plain().spread(given, paths, heads), strict=True):
        close(mine, wanted)
    assert len(found[1]) > nodes
    grads = [normal(*part.shape, seed=4 + i, dtype=dtype) for i, part in enumerate(found)]
    back = Fused().spread_back(*grads, paths, heads)
    close(back, Plain().spread_back(*grads, paths, heads))
    if dtype == torch.float32:  # <S x, g> = <x, S^T g>
        there = sum((part * grad).sum() for part, grad in zip(found, grads, strict=True))
        torch.testing.assert_close(there, (given * back).sum(), rtol=1e-4, atol=1e-3)


@pytest.mark.skipif(DEVICE == "cpu", reason="torch has FlashAttention on a GPU only")
@pytest.mark.parametrize(("count", "kv", "size"), [(7, 1, 64), (4, 4, 16), (6, 2, 128)])
@pytest.mark.parametrize("window", [None, 5])
def test_flash_attention_over_rows(count: int, kv: int, size: int, window: int | None) -> None:
    heads, paths, dtype = heads_of(count, kv, size), rows_of_a_tree(), torch.bfloat16
    given = Plain().spread(normal(len(paths.place), (count + 2 * kv) * size, dtype=dtype), paths, heads)
    found, mass = Fused().attend_rows(*given, paths, window)
    wanted, sums = Plain().attend_rows(*given, paths, window)
    close(found, wanted)
    torch.testing.assert_close(mass, sums, rtol=1e-2, atol=1e-2)
    grad = normal(*found.shape, seed=6, dtype=dtype)
    back = Fused().attend_rows_back(grad, *given, found, mass, paths, window)
    for mine, own in zip(back, Plain().attend_rows_back(grad, *given, found, mass, paths, window), strict=True):
        assert (mine.float() - own.float()).norm() <= 2e-2 * own.float().norm()


@pytest.mark.parametrize("dtype", TYPES)
def test_swiglu(dtype: torch.dtype) -> None:
    x = normal(3, 2 * 1100 + 16, dtype=dtype)[:, : 2 * 1100]
    close(Fused().swiglu(x), Plain().swiglu(x))


class Thin:
    """A product with LoRA, all numbers at random."""

    def __init__(self, outs: int, inputs: int, tail: int, bias: bool, dtype: torch.dtype):
        self.weight = normal(outs, inputs, seed=1, dtype=dtype) * inputs**-0.5
        self.bias = normal(outs, seed=2, dtype=dtype) if bias else None
        self.down = normal(tail, inputs, seed=3, dtype=dtype) * inputs**-0.5
        self.up = normal(outs, tail, seed=4, dtype=dtype) * max(tail, 1) ** -0.5

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.linear(x, self.weight, self.bias) + x @ self.down.T @ self.up.T

    def add_to(self, x: torch.Tensor, y: torch.Tensor) -> None:
        x.add_(self(y))

    def single(self) -> Thin:
        """The same numbers in fp32."""
        made = copy(self)
        made.weight, made.down, made.up = self.weight.float(), self.down.float(), self.up.float()
        made.bias = self.bias.float() if self.bias is not None else None
        return made


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("rows", [1, 5, 70])
@pytest.mark.parametrize(
    ("outs", "inputs", "tail", "bias"),
    [(96, 64, 8, False), (200, 72, 24, True), (40, 400, 0, True), (64, 1600, 8, False)],
)
def test_products(rows: int, outs: int, inputs: int, tail: int, bias: bool, dtype: torch.dtype) -> None:
    """Of a stream that a product has been added to, whose kernel has begun its norm, and of one without. The last of
    the sizes has sums that programs share, in any type."""
    x, do = normal(rows, inputs, dtype=dtype) * 3, Fused()
    product, before = Thin(outs, inputs, tail, bias, dtype), Thin(inputs, outs, tail, bias, dtype)
    norm = normal(inputs, seed=6, dtype=dtype)
    assert do.one_kernel(x, product) == bool(tail or dtype != torch.float32)
    do.one_kernel = lambda x, product: True  # type: ignore[method-assign]
    assert do.tile(rows, outs, inputs, 16, dtype.itemsize, gated=False).splits > 1 or inputs < 1600
    y = normal(rows, outs + 8, seed=7, dtype=dtype)[:, :outs]
    results = []
    for operations, single in ((do, False), (Plain(), False), (Plain(), True)):
        given, also, gain = (x.float(), y.float(), norm.float()) if single else (x.clone(), y, norm)
        thin, first = (product.single(), before.single()) if single else (product, before)
        stream = Stream(given)
        found = []
        for _ in range(2):
            found.append(operations.normed_linear(stream, gain, 1e-6, thin))
            if outs % 2 == 0:
                found.append(operations.normed_gated(stream, gain, 1e-6, thin))
            operations.add_linear(stream, also, first, gain)
        assert (stream.gained is not None) == (operations is do)
        operations.add_linear(stream, also, first, None)
        assert stream.gained is None
        results.append((*found, stream.x))
    for found, wanted, exact in zip(*results, strict=True):
        if dtype == torch.float32:
            torch.testing.assert_close(found, wanted, atol=3e-5, rtol=3e-5)
        else:  # which rounds elsewhere, but not more
            assert (found.float() - exact).abs().max() <= 2 * (wanted.float() - exact).abs().max()


def test_programs_that_share_a_sum_leave_their_counters_as_they_were() -> None:
    do, product = Fused(), Thin(40, 400, 8, False, torch.float32)
    assert do.tile(5, 40, 400, 16, 4, gated=False).splits > 1
    results = []
    for _ in range(2):
        stream = Stream(torch.zeros(5, 40, device=DEVICE))
        do.add_linear(stream, normal(5, 400), product, None)
        results.append(stream.x)
    assert torch.equal(*results)
    assert do._arrived is not None
    assert not do._arrived.any()


def test_parts_of_attention_are_none_too_small() -> None:
    """Of 230 + 40 tokens in blocks of 80, and of the same in blocks of 8."""
    made, _ = filled(torch.float32, heads_of(6, 2, 16))
    assert Fused(264)._splits(2, made, 80) == 1
    assert Fused(264)._splits(2, made, 8) == 270 // 32
    assert Fused(264)._splits(132, made, 8) == 2
    assert Fused(264)._splits(264, made, 8) == 1


def test_a_product_in_half_precision_norms_first() -> None:
    """In fp16 what the norm divides by is divided by before anything is multiplied."""
    x, product = normal(5, 64) * 3e4, Thin(96, 64, 8, False, torch.float16)
    x, norm = x.clamp(-6e4, 6e4).half(), torch.full((64,), 8.0, device=DEVICE).half()
    back = Thin(64, 96, 8, False, torch.float16)
    for do in (Fused(), Plain()):
        stream = Stream(x.clone())
        do.add_linear(stream, normal(5, 96, seed=7).half(), back, norm)
        found = do.normed_linear(stream, norm, 1e-6, product)
        assert found.isfinite().all()
        torch.testing.assert_close(
            found, Plain().normed_linear(Stream(stream.x), norm, 1e-6, product), atol=5e-2, rtol=1e-2
        )


def test_which_products_are_one_kernel() -> None:
    do = Fused()
    for rows, outs, inputs, tail, one in (
        (4, 96, 64, 0, True),
        (4, 96, 64, 72, False),  # too wide an A to be held beside the sums
        (64, 4096, 4096, 0, True),
        (64, 4096, 4104, 0, False),
        (64, 4096, 8192, 8, True),
        (65, 4096, 8192, 8, False),
        (513, 96, 64, 8, False),
    ):
        product: Any = SimpleNamespace(weight=torch.empty(outs, inputs, device="meta"), down=torch.empty(tail, inputs))
        assert do.one_kernel(torch.empty(rows, 1, dtype=torch.bfloat16), product) == one
        assert do.one_kernel(torch.empty(rows, 1), product) == (one and tail > 0)
    quantised: Any = SimpleNamespace(weight=None, down=torch.empty(8, 64))
    assert not do.one_kernel(torch.empty(4, 1), quantised)
    wide = Thin(96, 64, 72, False, torch.float32)
    x, norm = normal(4, 64), normal(64, seed=6)
    close(do.normed_linear(Stream(x), norm, 1e-6, wide), wide(do.norm(x, norm, 1e-6)))


@pytest.mark.parametrize(("shared", "stages"), [(227, 4), (99, 2), (48, 1), (8, 1)])
def test_cards_with_less_shared_memory_load_fewer_steps_ahead(shared: int, stages: int) -> None:
    do = Fused(shared=shared * 2**10)
    assert do.stages(36 * 2**10, 4) == stages
    x, product, norm = normal(5, 72), Thin(96, 72, 8, False, torch.float32), normal(72, seed=6)
    close(do.normed_linear(Stream(x), norm, 1e-6, product), Plain().normed_linear(Stream(x), norm, 1e-6, product))


def table(rows: int, width: int, vocab_size: int = 50) -> Table:
    made = Table.empty(rows, width, vocab_size, torch.device(DEVICE))
    made.uniform.copy_(torch.rand(made.uniform.shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64))
    return made


def filled(dtype: torch.dtype, heads: Heads) -> tuple[Table, Table]:
    """Two tables over the same cache contents: five completions of three prompts, one of them ended."""
    tables = []
    for _ in range(2):
        made = table(6, 40)
        info = [[3, 0, 1, 230, 40, 0, 9], [0, 39, 0, 1, 40, 0, 8], [1, 12, 2, 93, 40, 1, 7],
                [4, 31, 2, 93, 40, 0, 6], [2, 5, 0, 1, 40, 0, 5], [5, 8, 1, 230, 40, 0, 4]]  # fmt: skip
        made.info[:6] = torch.tensor(info, dtype=torch.int32)
        size = heads.head_dim
        made.hold(
            Keys(
                normal(2, 2, 3, heads.kv_heads, 230, size, seed=3, dtype=dtype),
                normal(2, 2, 6, heads.kv_heads, 40, size, seed=4, dtype=dtype),
            )
        )
        tables.append(made)
    return tables[0], tables[1]


def in_whole_rows(made: Table) -> Table:
    """The same, with each completion's prompt at the head of its row."""
    assert made.keys is not None
    prompt, own = made.keys.prompt, made.keys.own
    rows = own.new_zeros(*own.shape[:4], prompt.shape[4] + own.shape[4], own.shape[5])
    for slot, _, place, length, *_ in made.info[:6].tolist():
        rows[:, :, slot, :, :length] = prompt[:, :, place, :, :length]
        rows[:, :, slot, :, length : length + own.shape[4]] = own[:, :, slot]
    made.hold(Keys(prompt, rows))
    return made


def heads_of(count: int, kv: int, size: int) -> Heads:
    return Heads(count, kv, size, normal(size // 2, seed=8).abs(), 1.1, 1e-6)


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("programs", [1, 64])
@pytest.mark.parametrize("window", [None, 20])
@pytest.mark.parametrize(("count", "kv", "norm"), [(6, 2, False), (4, 4, True), (40, 2, False)])
def test_attention(
    dtype: torch.dtype,
    programs: int,
    window: int | None,
    count: int,
    kv: int,
    *,
    norm: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """In one part and in several; the newest tokens' keys and values are in the cache then."""
    monkeypatch.setattr(fused, "_LEAST_BLOCKS", 1)
    heads = heads_of(count, kv, 16)
    one, other = filled(dtype, heads)
    rows = torch.tensor([5, 0, 3, 1, 4], device=DEVICE)
    qkv = normal(5, (count + 2 * kv) * 16 + 8, seed=9, dtype=dtype)[:, : (count + 2 * kv) * 16]
    _, block, _ = Fused(programs).attention(5 * kv, 16, dtype.itemsize)
    assert (Fused(programs)._splits(5 * kv, one, block) > 1) == (programs > 1)
    norms = (normal(16, seed=1, dtype=dtype), normal(16, seed=2, dtype=dtype)) if norm else None
    wanted = Plain().attend(qkv, rows, in_whole_rows(other), 1, heads, norms, window)
    do = Fused(programs)
    do.begin(rows, one, heads, normal(10, 24, dtype=dtype))
    close(do.attend(qkv, rows, one, 1, heads, norms, window), wanted)
    whole = in_whole_rows(one)
    assert whole.keys is not None
    assert other.keys is not None
    close(whole.keys.own, other.keys.own)


# What a kernel may read before the one in front of it has ended: what only `sync` and `begin` write.
_THERE_BEFORE = {"product": {"up", "gain"}, "attend": {"records"}, "combine": set[str]()}


@pytest.mark.parametrize(("capability", "shared"), [(89, 99), (90, 227), (100, 227), (120, 99)])
def test_kernels_compile_for_cards_that_are_not_here(capability: int, shared: int) -> None:
    """For an RTX 4090, an H100, a B200 and an RTX 5090: within their shared memory, and loading ahead in whole
    lines. Where nothing tells that the cache's addresses are aligned, attention loads each number by itself, when it is
    needed. Kernels that start early read and write nothing of others' before they have waited, and let the next one go
    only then. Programs that share a sum show their part before they count themselves, in what is compiled."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    command = [sys.executable, str(Path(__file__).parents[2] / "compiled.py"), str(capability), str(shared)]
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    found = json.loads(done.stdout)
    assert len(found) == 14
    assert {made["SPLITS"] for made in found if made["kernel"] == "product"} == {1, 4}
    for made in found:
        assert set(made["read early"]) <= _THERE_BEFORE[made["kernel"]], made
        assert made["written early"] == 0, made
        assert made["let go"] == made["EARLY"] == (capability >= 90), made
        assert made["shared"] <= shared * 2**10
        assert made["one by one"] < 8, made
        assert made["ahead"] >= 8 or made["kernel"] == "combine", made
        assert made.get("shown", True), made
        assert made.get("parts", 1), made
    if capability >= 90:
        assert {name for made in found for name in made["read early"]} == {"up", "gain", "records"}


@pytest.mark.parametrize("programs", [1, 64])
def test_rows_that_stand_for_none_give_numbers_and_leave_the_cache_alone(
    programs: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fused, "_LEAST_BLOCKS", 1)
    heads = heads_of(6, 2, 16)
    one, before = filled(torch.float32, heads)
    qkv = normal(2, 10 * 16)
    do, rows = Fused(programs), torch.tensor([2, 6], device=DEVICE)
    do.begin(rows, one, heads, normal(10, 24))
    found = do.attend(qkv, rows, one, 0, heads, None, None)
    assert torch.equal(found, torch.zeros_like(found))
    assert one.keys is not None
    assert before.keys is not None
    assert torch.equal(one.keys.own, before.keys.own)


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("vocab_size", [50, 4096, 9001])
@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_draws(dtype: torch.dtype, vocab_size: int, temperature: float) -> None:
    one = table(40, 12)
    one.info[:40, 1] = torch.arange(40, dtype=torch.int32) % 11 - 1
    rows = torch.randperm(40, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    logits = normal(40, vocab_size, dtype=dtype) * 3
    logits[:, ::3] = -torch.inf
    sampling = Sampling(temperature=temperature)
    found, logprob = Fused().pick(logits, rows, one, sampling)
    wanted, wanted_logprob = Plain().pick(logits, rows, one, sampling)
    assert torch.equal(found, wanted)
    torch.testing.assert_close(logprob, wanted_logprob, atol=1e-5, rtol=1e-5)


def test_the_edges_of_a_draw() -> None:
    """Uniform numbers at 0, at a token's own edge, and just below 1: a token without mass is never drawn."""
    one = table(4, 2)
    one.info[:4, 1] = -1
    one.uniform[:4, 0] = torch.tensor([0.0, 0.5, 0.4999999, 1 - 2**-53], dtype=torch.float64)
    logits = torch.full((4, 9000), -torch.inf, device=DEVICE)
    logits[:, [7, 8500]] = 0.0
    found, logprob = Fused().pick(logits, torch.arange(4, device=DEVICE), one, Sampling())
    assert found.tolist() == [7, 8500, 7, 8500]
    torch.testing.assert_close(logprob.cpu(), torch.full((4,), 0.5).log())


def test_draws_follow_the_distribution() -> None:
    """Chi-square over 4,000 draws of 8 tokens: 7 degrees of freedom, so above 24.3 once in a thousand."""
    count = 4_000 if DEVICE == "cpu" else 40_000
    one = table(count, 1)
    one.info[:count, 1] = -1
    logits = torch.tensor([2.0, 1.0, 0.5, 0.0, -0.5, -1.0, -2.0, 0.2], device=DEVICE)
    token, _ = Fused().pick(
        logits.expand(count, -1).contiguous(), torch.arange(count, device=DEVICE), one, Sampling(temperature=0.8)
    )
    wanted = (logits / 0.8).softmax(-1)
    seen = torch.bincount(token, minlength=8)
    assert float(((seen - count * wanted) ** 2 / (count * wanted)).sum()) < 24.3


@pytest.mark.parametrize("dtype", TYPES)
def test_a_step_begins_with_the_embeddings_of_the_next_tokens(dtype: torch.dtype) -> None:
    heads = heads_of(6, 2, 16)
    one, _ = filled(dtype, heads)
    rows, embedding = torch.tensor([5, 0, 3], device=DEVICE), normal(10, 24, dtype=dtype)
    assert torch.equal(Fused().begin(rows, one, heads, embedding), embedding[[4, 9, 6]])


def test_keep() -> None:
    heads = heads_of(6, 2, 16)
    a, b = filled(torch.float32, heads)
    rows = torch.tensor([5, 0, 2, 3, 6], device=DEVICE)
    x = normal(5, 24)
    for do, one in ((Fused(), a), (Plain(), b)):
        assert one.keys is not None
        one.hold(Keys(one.keys.prompt, one.keys.own, torch.zeros(7, 40, 24, device=DEVICE)))
        do.keep(x, rows, one)
    assert a.keys is not None
    assert b.keys is not None
    assert torch.equal(a.keys.trunk, b.keys.trunk)  # type: ignore[arg-type]
    assert torch.equal(a.keys.trunk[3, 31], x[3])  # type: ignore[index]
    assert not a.keys.trunk[[2, 6]].any()  # type: ignore[index]  # ended, and standing for none


def test_advance() -> None:
    a, b = table(4, 6), table(4, 6)
    for one in (a, b):
        one.info[:4] = torch.tensor(
            [[0, -1, 0, 3, 6, 0, 0], [1, 2, 0, 3, 4, 0, 9], [2, 1, 0, 3, 6, 1, 8], [3, 0, 0, 3, 6, 0, 7]]
        ).int()
        one.ends[[13, 20]] = True
    token = torch.tensor([5, 6, 7, 20], device=DEVICE)
    logprob = torch.tensor([-0.1, -0.2, -0.3, -0.4], device=DEVICE)
    rows = torch.tensor([0, 1, 2, 3], device=DEVICE)
    Fused().advance(token, logprob, rows, a)
    Plain().advance(token, logprob, rows, b)
    for name in ("info", "tokens", "logprobs"):
        assert torch.equal(getattr(a, name), getattr(b, name))
    assert a.info[:4, 5].tolist() == [0, 1, 1, 1]  # goes on, at its limit, ended before, an end token


_ADAPTERS: dict[str, dict[str, Any] | None] = {
    "everything": {"modules": "all-linear"},
    "q and v": {"modules": ["q_proj", "v_proj"]},
    "gate and down of the last": {"modules": ["gate_proj", "down_proj"], "layers": "last-third"},
}


@pytest.mark.parametrize("family", ["qwen2", "qwen3", "mistral"])
@pytest.mark.parametrize("name", _ADAPTERS)
def test_a_whole_sampling(family: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fused, "_LEAST_BLOCKS", 1)
    sampled_as_by_transformers(family, name)


def test_a_whole_sampling_with_products_of_both_kinds(monkeypatch: pytest.MonkeyPatch) -> None:
    """Some of a layer's are one kernel, others several."""
    kinds = []
    one_kernel = Fused.one_kernel

    def told(do: Fused, x: torch.Tensor, product: Any) -> bool:
        kinds.append(one_kernel(do, x, product))
        return kinds[-1]

    monkeypatch.setattr(Fused, "one_kernel", told)
    sampled_as_by_transformers("qwen2", "gate and down of the last")
    assert {True, False} == set(kinds)


def sampled_as_by_transformers(family: str, name: str) -> None:
    policy: Any = random_policy(family, adapter=_ADAPTERS[name], sizes={"hidden_size": 64, "head_dim": 16})
    (policy.adapted or policy.base).to(DEVICE)
    prompts = [prompt(n, n) for n in (3, 9)]
    sampling = Sampling(max_new_tokens=5)
    wanted = HfEngine(policy).sample(prompts, num=2, sampling=sampling, seed=4)
    engine = GraphEngine(policy)
    engine._steps.decoder.operations = Fused()
    found = engine.sample(prompts, num=2, sampling=sampling, seed=4)
    for a, b in zip(found, wanted, strict=True):
        assert [c.token_ids for c in a] == [c.token_ids for c in b]
        for c, d in zip(a, b, strict=True):
            torch.testing.assert_close(torch.tensor(c.logprobs), torch.tensor(d.logprobs), atol=1e-4, rtol=0)
