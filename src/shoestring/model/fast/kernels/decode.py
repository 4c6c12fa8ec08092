"""The kernels of `samplers.fused`; shapes are told in `samplers.operations`. Numbers are fp32 between load and store
unless said otherwise."""

# Triton's types do not know what its compiler does with constants:
# pyright: reportArgumentType=false, reportOperatorIssue=false, reportMissingImports=false
# pyright: reportAttributeAccessIssue=false, reportAssignmentType=false, reportPossiblyUnboundVariable=false
# pyright: reportGeneralTypeIssues=false
from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

# `Table.info` and `Table.where`, as in the latter.
SLOT = tl.constexpr(0)
LENGTH = tl.constexpr(1)
PROMPT = tl.constexpr(2)
PROMPT_LENGTH = tl.constexpr(3)
LIMIT = tl.constexpr(4)
DONE = tl.constexpr(5)
TOKEN = tl.constexpr(6)
COLUMNS = tl.constexpr(7)

PREFETCH = tl.constexpr("prefetch.global.L2 [$1]; mov.u32 $0, 0;")


@triton.jit
def add_norm(x, y, weight, out, x_stride, y_stride, width, eps, ADD: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    cols = tl.arange(0, BLOCK)
    mask = cols < width
    value = tl.load(x + row * x_stride + cols, mask, 0.0)
    if ADD:
        more = tl.load(y + row * y_stride + cols, mask, 0.0)
        value = (value.to(tl.float32) + more.to(tl.float32)).to(x.dtype.element_ty)
        tl.store(x + row * x_stride + cols, value, mask)
    wide = value.to(tl.float32)
    scale = tl.rsqrt(tl.sum(wide * wide, 0) / width + eps)
    normed = (wide * scale).to(out.dtype.element_ty).to(tl.float32)
    gain = tl.load(weight + cols, mask, 0.0).to(tl.float32)
    tl.store(out + row * width + cols, (gain * normed).to(out.dtype.element_ty), mask)


@triton.jit
def fetch(weight, first, count, inputs, start, stop, LANES: tl.constexpr):
    """Asks for columns `start` to `stop` of `count` rows of a matrix, [*, inputs], to be brought to the L2 cache."""
    line: tl.constexpr = 128 // (weight.dtype.element_ty.primitive_bitwidth // 8)
    lines = tl.cdiv(stop - start, line)
    for at in range(0, count * lines, LANES):
        i = tl.minimum(at + tl.arange(0, LANES), count * lines - 1)
        place = weight + (first + i // lines).to(tl.int64) * inputs + start + (i % lines) * line
        tl.inline_asm_elementwise(PREFETCH, "=r,l", [place.to(tl.int64)], dtype=tl.int32, is_pure=False, pack=1)


@triton.jit
def loaded(places, real, EVEN: tl.constexpr):
    """What is there, and 0 where nothing `real` is; EVEN says that there is something everywhere."""
    return tl.load(places) if EVEN else tl.load(places, real, 0.0)


@triton.jit
def product(
    x, squares, weight, bias, down, up, out, gain, gained, sums, part, arrived,
    rows, outs, inputs, tail, parts, x_stride, eps,
    NORM: tl.constexpr, BIAS: tl.constexpr, RANK: tl.constexpr, GATED: tl.constexpr, ADD: tl.constexpr,
    GAIN: tl.constexpr, PARTS: tl.constexpr, SPLITS: tl.constexpr, EVEN: tl.constexpr, EARLY: tl.constexpr,
    FETCH: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """x weight^T + bias + (x down^T) up^T, [rows, outs]; GATED: silu of such a one times another, whose weights, bias
    and `up` lie `outs` rows behind. NORM: x has been multiplied by an RMS norm's weight, and the `parts` of its sum of
    squares are at hand, whose scale multiplies what is found. ADD: added to what is there; with GAIN the result is also
    kept times the next norm's `gain`, with the sum of its squares in this block. RANK, 0 or 16 or more, is a power of 2
    of `tail` or above it. SPLITS programs share the terms of a sum; the last to arrive adds up what they have found, in
    order. EVEN: BLOCK_K divides `inputs`.

    A warp gives some 1,000 instructions, one every five cycles, which is most of the time that a small product takes:
    hence the care for masks. What does not hang on the kernel before is done in front of `gdc_wait`, where kernels
    start EARLY; the next one may start when all programs have waited, so that no third one takes their places."""
    dtype: tl.constexpr = out.dtype.element_ty
    exact: tl.constexpr = "ieee" if dtype == tl.float32 else "tf32"
    ahead: tl.constexpr = dtype != tl.float32  # there are no registers for B in fp32 beside the sums
    first = tl.program_id(0) * BLOCK_N
    n, m = first + tl.arange(0, BLOCK_N), tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    k = tl.arange(0, BLOCK_K)
    each = tl.cdiv(inputs, SPLITS * BLOCK_K) * BLOCK_K
    begin = tl.program_id(2) * each
    end = tl.minimum(begin + each, inputs)
    if FETCH:
        count = tl.minimum(BLOCK_N, outs - first)
        fetch(weight, first, count, inputs, begin, end, 128)
        if GATED:
            fetch(weight, first + outs, count, inputs, begin, end, 128)
    if RANK:
        r = tl.arange(0, RANK)
        thin = (n[None, :] < outs) & (r[:, None] < tail)
        ups = up + n[None, :] * tail + r[:, None]
        if ahead:
            b = tl.load(ups, thin, 0.0)
            if GATED:
                more_b = tl.load(ups + outs * tail, thin, 0.0)
        ds = down + tl.minimum(r, tail - 1)[None, :] * inputs + k[:, None]
        inner = tl.zeros((BLOCK_M, RANK), tl.float32)
    if GAIN:
        factor = tl.load(gain + n, n < outs, 0.0).to(tl.float32)
    # Rows and columns that are not there are others again, which takes less than a mask.
    xs = x + tl.minimum(m, rows - 1)[:, None] * x_stride + k[None, :]
    ws = weight + tl.minimum(n, outs - 1)[None, :] * inputs + k[:, None]
    here = (m[:, None] < rows) & (n[None, :] < outs)
    spot = m[:, None] * outs + n[None, :]
    if EARLY:
        gdc_wait()
        gdc_launch_dependents()
    if NORM:
        p = tl.arange(0, PARTS)
        square = tl.load(squares + p[:, None] * rows + m[None, :], (p[:, None] < parts) & (m[None, :] < rows), 0.0)
    if ADD and SPLITS == 1:
        before = tl.load(out + spot, here, 0.0)
    found = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    more = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(begin, end, BLOCK_K):
        real = k < inputs - start
        given = loaded(xs + start, real[None, :], EVEN)
        found = tl.dot(given, loaded(ws + start, real[:, None], EVEN), found, input_precision=exact)
        if GATED:
            also = loaded(ws + outs * inputs + start, real[:, None], EVEN)
            more = tl.dot(given, also, more, input_precision=exact)
        if RANK:
            inner = tl.dot(given, loaded(ds + start, real[:, None], EVEN), inner, input_precision=exact)
    if NORM:
        mean = tl.where(m < rows, tl.sum(square, 0) / inputs, 1.0)  # not 0 in rows that are not there
        scale = tl.rsqrt(mean + eps)[:, None]
        found *= scale
        more *= scale
        if RANK:
            inner *= scale
    if RANK:
        if not ahead:
            b = tl.load(ups, thin, 0.0)
            if GATED:
                more_b = tl.load(ups + outs * tail, thin, 0.0)
        found = tl.dot(inner.to(dtype), b, found, input_precision=exact)
        if GATED:
            more = tl.dot(inner.to(dtype), more_b, more, input_precision=exact)
    last = first >= 0  # always; where programs share a sum, only one of them goes on
    if SPLITS > 1:
        tile = tl.program_id(1) * tl.num_programs(0) + tl.program_id(0)
        tl.store(part + tl.program_id(2) * rows * outs + spot, found, here)
        tl.debug_barrier()  # all of it is there before one thread says so
        last = tl.atomic_add(arrived + tile, 1, sem="acq_rel", scope="gpu") == SPLITS - 1
        if last:
            tl.store(arrived + tile, 0)
            found = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
            for split in tl.static_range(SPLITS):
                found += tl.load(part + split * rows * outs + spot, here, 0.0, cache_modifier=".cg")
    if last:
        if BIAS:
            found += tl.load(bias + n, n < outs, 0.0).to(tl.float32)[None, :]
        if GATED:
            if BIAS:
                more += tl.load(bias + outs + n, n < outs, 0.0).to(tl.float32)[None, :]
            gate = found.to(dtype).to(tl.float32)
            active = (gate / (1 + tl.exp(-gate))).to(dtype).to(tl.float32)
            found = active * more.to(dtype).to(tl.float32)
        if ADD:
            if SPLITS > 1:
                before = tl.load(out + spot, here, 0.0)
            found += before.to(tl.float32)
        tl.store(out + spot, found.to(dtype), here)
        if GAIN:
            wide = tl.where(here, found.to(dtype).to(tl.float32), 0.0)
            tl.store(gained + spot, (wide * factor[None, :]).to(dtype), here)
            tl.store(sums + tl.program_id(0) * rows + m, tl.sum(wide * wide, 1), m < rows)


@triton.jit
def swiglu(gate_up, out, stride, width, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    cols = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = cols < width
    gate = tl.load(gate_up + row * stride + cols, mask, 0.0).to(tl.float32)
    up = tl.load(gate_up + row * stride + width + cols, mask, 0.0).to(tl.float32)
    active = (gate / (1 + tl.exp(-gate))).to(out.dtype.element_ty).to(tl.float32)
    tl.store(out + row * width + cols, (active * up).to(out.dtype.element_ty), mask)


@triton.jit
def swiglu_back(grad, gate_up, grad_stride, stride, width, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    cols = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = cols < width
    dtype: tl.constexpr = gate_up.dtype.element_ty
    pulled = tl.load(grad + row * grad_stride + cols, mask, 0.0).to(tl.float32)
    gate = tl.load(gate_up + row * stride + cols, mask, 0.0).to(tl.float32)
    up = tl.load(gate_up + row * stride + width + cols, mask, 0.0).to(tl.float32)
    share = 1 / (1 + tl.exp(-gate))
    active = (gate / (1 + tl.exp(-gate))).to(dtype).to(tl.float32)
    tl.store(grad + row * grad_stride + cols, (active * up).to(dtype), mask)
    tl.store(gate_up + row * stride + cols, (pulled * up * share * (1 + gate * (1 - share))).to(dtype), mask)
    tl.store(gate_up + row * stride + width + cols, (pulled * gate * share).to(dtype), mask)


@triton.jit
def norm_back(
    grad, x, weight, add, out, grad_stride, x_stride, add_stride, width, eps, AGAIN: tl.constexpr, BLOCK: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    cols = tl.arange(0, BLOCK)
    mask = cols < width
    wide = tl.load(x + row * x_stride + cols, mask, 0.0).to(tl.float32)
    gain = tl.load(weight + cols, mask, 0.0).to(tl.float32)
    pulled = gain * tl.load(grad + row * grad_stride + cols, mask, 0.0).to(tl.float32)
    scale = tl.rsqrt(tl.sum(wide * wide, 0) / width + eps)
    along = tl.sum(pulled * wide, 0) / width
    found = scale * (pulled - wide * (scale * scale * along))
    more = tl.load(add + row * add_stride + cols, mask, 0.0).to(tl.float32)
    tl.store(out + row * width + cols, (more + found).to(out.dtype.element_ty), mask)
    if AGAIN:
        normed = (wide * scale).to(x.dtype.element_ty).to(tl.float32)
        tl.store(grad + row * grad_stride + cols, (gain * normed).to(grad.dtype.element_ty), mask)


@triton.jit
def rotate(
    qkv, out, positions, inv_freq, stride, out_stride, scaling, sign,
    TURNED: tl.constexpr, HEADS: tl.constexpr, PADDED: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    """HEADS heads of a row from `qkv` to `out`, the first TURNED of them rotated."""
    row = tl.program_id(0).to(tl.int64)
    half: tl.constexpr = D // 2
    cols = tl.arange(0, half)
    head = tl.arange(0, PADDED)[:, None]
    dtype: tl.constexpr = out.dtype.element_ty
    angle = tl.load(positions + row).to(tl.float32) * tl.load(inv_freq + cols)
    cos = (tl.cos(angle) * scaling).to(dtype).to(tl.float32)[None, :]
    sin = (tl.sin(angle) * scaling).to(dtype).to(tl.float32)[None, :] * sign
    place = head * D + cols[None, :]
    low = tl.load(qkv + row * stride + place, head < HEADS, 0.0).to(tl.float32)
    high = tl.load(qkv + row * stride + place + half, head < HEADS, 0.0).to(tl.float32)
    new_low = tl.where(head < TURNED, low * cos - high * sin, low)
    new_high = tl.where(head < TURNED, high * cos + low * sin, high)
    tl.store(out + row * out_stride + place, new_low.to(dtype), head < HEADS)
    tl.store(out + row * out_stride + place + half, new_high.to(dtype), head < HEADS)


@triton.jit
def spread(
    qkv, q, both, positions, nodes, inv_freq, stride, count, scaling,
    HEADS: tl.constexpr, KV: tl.constexpr, PADDED: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    """The rotated queries of `count` nodes, [T, HEADS, D]; then at each place the key, rotated, and the value of its
    node, [P, 2 KV, D]."""
    at = tl.program_id(0).to(tl.int64)
    asks = at < count
    place = tl.maximum(at - count, 0)
    node = tl.where(asks, at, tl.load(nodes + place).to(tl.int64))
    half: tl.constexpr = D // 2
    cols = tl.arange(0, half)
    head = tl.arange(0, PADDED)[:, None]
    real = head < tl.where(asks, HEADS, 2 * KV)
    turned = head < tl.where(asks, HEADS, KV)
    dtype: tl.constexpr = q.dtype.element_ty
    angle = tl.load(positions + node).to(tl.float32) * tl.load(inv_freq + cols)
    cos = (tl.cos(angle) * scaling).to(dtype).to(tl.float32)[None, :]
    sin = (tl.sin(angle) * scaling).to(dtype).to(tl.float32)[None, :]
    spot = head * D + cols[None, :]
    source = qkv + node * stride + tl.where(asks, 0, HEADS * D) + spot
    low = tl.load(source, real, 0.0).to(tl.float32)
    high = tl.load(source + half, real, 0.0).to(tl.float32)
    new_low = tl.where(turned, low * cos - high * sin, low).to(dtype)
    new_high = tl.where(turned, high * cos + low * sin, high).to(dtype)
    if asks:
        tl.store(q + at * (HEADS * D) + spot, new_low, real)
        tl.store(q + at * (HEADS * D) + spot + half, new_high, real)
    else:
        tl.store(both + place * (2 * KV * D) + spot, new_low, real)
        tl.store(both + place * (2 * KV * D) + spot + half, new_high, real)


@triton.jit
def spread_back(
    of_q, of_keys, of_values, out, positions, owner, copies, starts, inv_freq, scaling,
    HEADS: tl.constexpr, KV: tl.constexpr, PADDED: tl.constexpr, KV_PADDED: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    """A node's gradient: of its query, and the sums of those of its keys and values, turned back."""
    node = tl.program_id(0).to(tl.int64)
    half: tl.constexpr = D // 2
    cols = tl.arange(0, half)
    dtype: tl.constexpr = out.dtype.element_ty
    position = tl.load(positions + node)
    angle = position.to(tl.float32) * tl.load(inv_freq + cols)
    cos = (tl.cos(angle) * scaling).to(dtype).to(tl.float32)[None, :]
    sin = (tl.sin(angle) * scaling).to(dtype).to(tl.float32)[None, :]
    target = out + node * ((HEADS + 2 * KV) * D)

    head = tl.arange(0, PADDED)[:, None]
    real = head < HEADS
    spot = head * D + cols[None, :]
    low = tl.load(of_q + node * (HEADS * D) + spot, real, 0.0).to(tl.float32)
    high = tl.load(of_q + node * (HEADS * D) + spot + half, real, 0.0).to(tl.float32)
    tl.store(target + spot, (low * cos + high * sin).to(dtype), real)
    tl.store(target + spot + half, (high * cos - low * sin).to(dtype), real)

    head = tl.arange(0, KV_PADDED)[:, None]
    real = head < KV
    spot = head * D + cols[None, :]
    key_low = tl.zeros([KV_PADDED, half], tl.float32)
    key_high = tl.zeros([KV_PADDED, half], tl.float32)
    value_low = tl.zeros([KV_PADDED, half], tl.float32)
    value_high = tl.zeros([KV_PADDED, half], tl.float32)
    row = tl.load(owner + node)
    for other in range(row, row + tl.load(copies + node)):
        from_here = (tl.load(starts + other) + position).to(tl.int64) * (KV * D) + spot
        key_low += tl.load(of_keys + from_here, real, 0.0).to(tl.float32)
        key_high += tl.load(of_keys + from_here + half, real, 0.0).to(tl.float32)
        value_low += tl.load(of_values + from_here, real, 0.0).to(tl.float32)
        value_high += tl.load(of_values + from_here + half, real, 0.0).to(tl.float32)
    target += HEADS * D
    tl.store(target + spot, (key_low * cos + key_high * sin).to(dtype), real)
    tl.store(target + spot + half, (key_high * cos - key_low * sin).to(dtype), real)
    target += KV * D
    tl.store(target + spot, value_low.to(dtype), real)
    tl.store(target + spot + half, value_high.to(dtype), real)


# What `begin` finds out for a row: addresses of its keys and values in layer 0, the prompt's and its own; bytes from a
# layer to the next, and from a head to the next, in both; tokens of the prompt, of its own, and whether it has ended.
PROMPT_KEYS = tl.constexpr(0)
PROMPT_VALUES = tl.constexpr(1)
OWN_KEYS = tl.constexpr(2)
OWN_VALUES = tl.constexpr(3)
PROMPT_LAYER = tl.constexpr(4)
OWN_LAYER = tl.constexpr(5)
PROMPT_HEAD = tl.constexpr(6)
OWN_HEAD = tl.constexpr(7)
BEHIND = tl.constexpr(8)
OWN_LENGTH = tl.constexpr(9)
ENDED = tl.constexpr(10)
RECORD = tl.constexpr(16)


@triton.jit
def begin(
    info, rows, where, inv_freq, embedding, x, records, turns, scaling, width,
    KV: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """For each row its token's embedding, and what the layers of a step share: its record, and the cosines and sines of
    its position, rounded as x is, the latter with the sign that they have in each half, [2, D]."""
    b = tl.program_id(0)
    own = info + tl.load(rows + b) * COLUMNS
    kind: tl.constexpr = x.dtype.element_ty
    size: tl.constexpr = kind.primitive_bitwidth // 8
    at = tl.arange(0, WIDTH)
    token = tl.load(own + TOKEN).to(tl.int64)
    tl.store(x + b * width + at, tl.load(embedding + token * width + at, at < width, 0.0), at < width)
    length = tl.load(own + LENGTH)
    behind = tl.load(own + PROMPT_LENGTH)
    record = records + b * RECORD
    prompt_slots = tl.load(where + 4) * (D * size)
    own_slots = tl.load(where + 5) * (D * size)
    prompt_row = prompt_slots * KV
    own_row = own_slots * KV
    prompt_at = tl.load(own + PROMPT) * prompt_row
    own_at = tl.load(own + SLOT) * own_row
    tl.store(record + PROMPT_KEYS, tl.load(where) + prompt_at)
    tl.store(record + PROMPT_VALUES, tl.load(where + 1) + prompt_at)
    tl.store(record + OWN_KEYS, tl.load(where + 2) + own_at)
    tl.store(record + OWN_VALUES, tl.load(where + 3) + own_at)
    tl.store(record + PROMPT_LAYER, tl.load(where + 6) * prompt_row)
    tl.store(record + OWN_LAYER, tl.load(where + 7) * own_row)
    tl.store(record + PROMPT_HEAD, prompt_slots)
    tl.store(record + OWN_HEAD, own_slots)
    tl.store(record + BEHIND, behind.to(tl.int64))
    tl.store(record + OWN_LENGTH, length.to(tl.int64))
    tl.store(record + ENDED, tl.load(own + DONE).to(tl.int64))
    half: tl.constexpr = D // 2
    cols = tl.arange(0, D)
    angle = (behind + length).to(tl.float32) * tl.load(inv_freq + cols % half)
    cos = (tl.cos(angle) * scaling).to(kind).to(tl.float32)
    sin = (tl.sin(angle) * scaling).to(kind).to(tl.float32)
    tl.store(turns + b * (2 * D) + cols, cos)
    tl.store(turns + b * (2 * D) + D + cols, tl.where(cols < half, -sin, sin))


@triton.jit
def rotated(source, real, gain, turn, eps, NORM: tl.constexpr, N: tl.constexpr, D: tl.constexpr):
    """Heads of D numbers that lie one behind the other, N of them, normed and rotated, [N, D] as they are stored."""
    cols = tl.arange(0, D)
    across = (cols + D // 2) % D
    dtype: tl.constexpr = source.dtype.element_ty
    heads = source + tl.arange(0, N)[:, None] * D
    a = tl.load(heads + cols[None, :], real[:, None], 0.0).to(tl.float32)
    c = tl.load(heads + across[None, :], real[:, None], 0.0).to(tl.float32)
    if NORM:
        scale = tl.rsqrt(tl.sum(a * a, 1) / D + eps)[:, None]
        a = (a * scale).to(dtype).to(tl.float32) * tl.load(gain + cols).to(tl.float32)[None, :]
        c = (c * scale).to(dtype).to(tl.float32) * tl.load(gain + across).to(tl.float32)[None, :]
        a = a.to(dtype).to(tl.float32)
        c = c.to(dtype).to(tl.float32)
    return (a * tl.load(turn + cols)[None, :] + c * tl.load(turn + D + cols)[None, :]).to(dtype)


@triton.jit
def attend(
    qkv, out, mass, records, turns, q_norm, k_norm, layer, stride, scale, window, eps,
    KV: tl.constexpr, REPEAT: tl.constexpr, PADDED: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr,
    SPLITS: tl.constexpr, NORM: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """The first split begins with the newest token, which it takes to the cache; the others find what was there. Powers
    are of 2, so `scale` holds log2(e), and `mass` is a logarithm to that base. Records are read before the wait: what
    `begin` writes has to be two kernels back."""
    b = tl.program_id(0).to(tl.int64)
    kv = tl.program_id(1)
    split = tl.program_id(2)
    dtype: tl.constexpr = qkv.dtype.element_ty
    record = records + b * RECORD
    behind = tl.load(record + BEHIND).to(tl.int32)
    length = tl.load(record + OWN_LENGTH).to(tl.int32)
    going = tl.load(record + ENDED) == 0
    prompt_at = layer * tl.load(record + PROMPT_LAYER) + kv * tl.load(record + PROMPT_HEAD)
    own_at = layer * tl.load(record + OWN_LAYER) + kv * tl.load(record + OWN_HEAD)
    kind: tl.constexpr = tl.pointer_type(dtype)
    prompt_keys = (tl.load(record + PROMPT_KEYS) + prompt_at).to(kind)
    prompt_values = (tl.load(record + PROMPT_VALUES) + prompt_at).to(kind)
    own_keys = (tl.load(record + OWN_KEYS) + own_at).to(kind)
    own_values = (tl.load(record + OWN_VALUES) + own_at).to(kind)
    position = behind + length
    prompt_blocks = tl.cdiv(behind, BLOCK)
    blocks = tl.where(going, prompt_blocks + tl.cdiv(length, BLOCK), 0)
    each = tl.cdiv(blocks, SPLITS)
    start = split * each
    stop = tl.minimum(start + each, blocks)
    if EARLY:
        gdc_wait()
        gdc_launch_dependents()

    heads = tl.arange(0, PADDED)
    cols = tl.arange(0, D)
    real = heads < REPEAT
    first = (b * KV + kv) * REPEAT
    here = qkv + b * stride
    turn = turns + b * (2 * D)
    query = rotated(here + kv * (REPEAT * D), real, q_norm, turn, eps, NORM, PADDED, D)
    top = tl.full([PADDED], float("-inf"), tl.float32)
    total = tl.zeros([PADDED], tl.float32)
    found = tl.zeros([PADDED, D], tl.float32)
    if (split == 0) & going:
        here += (KV * REPEAT + kv) * D
        new = rotated(here, tl.full([1], 1, tl.int1), k_norm, turn, eps, NORM, 1, D)
        value = tl.load(here + KV * D + cols)
        tl.store(own_keys + length * D + cols[None, :], new)
        tl.store(own_values + length * D + cols, value)
        top = tl.sum(query.to(tl.float32) * new.to(tl.float32), 1) * scale
        total += 1.0
        found += value.to(tl.float32)[None, :]
    for j in range(start, stop):
        in_prompt = j < prompt_blocks
        at = tl.where(in_prompt, j, j - prompt_blocks) * BLOCK + tl.arange(0, BLOCK)
        end = tl.where(in_prompt, behind, length)
        seen = (at < end) & (at + tl.where(in_prompt, 0, behind) > position - window)
        # Behind the end the last token is loaded again, which takes less than a mask. 16 bytes are loaded at once, and
        # ahead: the compiler cannot know how an address from a table is aligned.
        place = tl.minimum(at, end - 1) * D
        keys_at = tl.multiple_of(tl.where(in_prompt, prompt_keys, own_keys), 16)
        values_at = tl.multiple_of(tl.where(in_prompt, prompt_values, own_values), 16)
        key = tl.load(keys_at + place[None, :] + cols[:, None])
        values = tl.load(values_at + place[:, None] + cols[None, :])
        score = tl.dot(query, key, input_precision="ieee") * scale
        score = tl.where(seen[None, :], score, float("-inf"))
        higher = tl.maximum(top, tl.max(score, 1))
        safe = tl.where(higher == float("-inf"), 0.0, higher)
        power = tl.exp2(score - safe[:, None])
        decay = tl.exp2(top - safe)
        total = total * decay + tl.sum(power, 1)
        found = found * decay[:, None] + tl.dot(power.to(dtype), values, input_precision="ieee")
        top = higher
    some = tl.where(total == 0, 1.0, total)
    found = found / some[:, None]
    if SPLITS == 1:
        tl.store(out + (first + heads)[:, None] * D + cols[None, :], found.to(dtype), real[:, None])
    else:
        spot = (first + heads) * SPLITS + split
        tl.store(out + spot[:, None] * D + cols[None, :], found, real[:, None])
        tl.store(mass + spot, tl.where(total == 0, float("-inf"), top + tl.log2(some)), real)


@triton.jit
def combine(part, mass, out, D: tl.constexpr, SPLITS: tl.constexpr, PADDED: tl.constexpr, EARLY: tl.constexpr):
    if EARLY:
        gdc_wait()
        gdc_launch_dependents()
    at = tl.program_id(0).to(tl.int64) * tl.num_programs(1) + tl.program_id(1)
    splits = tl.arange(0, PADDED)
    cols = tl.arange(0, D)
    real = splits < SPLITS
    weight = tl.load(mass + at * SPLITS + splits, real, float("-inf"))
    top = tl.max(weight, 0)
    weight = tl.exp2(weight - tl.where(top == float("-inf"), 0.0, top))
    weight = weight / tl.maximum(tl.sum(weight, 0), 1e-30)
    parts = tl.load(part + (at * SPLITS + splits)[:, None] * D + cols[None, :], real[:, None], 0.0)
    tl.store(out + at * D + cols, tl.sum(parts * weight[:, None], 0).to(out.dtype.element_ty))


@triton.jit
def draw_stats(logits, top, mass, stride, vocab_size, blocks, scale, BLOCK: tl.constexpr):
    """The largest scaled logit of a block and the sum of e to what they lie below it."""
    row = tl.program_id(0).to(tl.int64)
    block = tl.program_id(1)
    cols = block * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(logits + row * stride + cols, cols < vocab_size, float("-inf")).to(tl.float32) * scale
    high = tl.max(value, 0)
    safe = tl.where(high == float("-inf"), 0.0, high)
    tl.store(top + row * blocks + block, high)
    tl.store(mass + row * blocks + block, tl.sum(tl.exp(value - safe), 0))


@triton.jit
def draw_pick(
    logits, top, mass, token, logprob, uniform, info, rows, stride, vocab_size, blocks, scale, uniform_stride,
    BLOCK: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    """The first token at which the summed probability exceeds the row's uniform number: the block, then the token."""
    b = tl.program_id(0).to(tl.int64)
    row = tl.load(rows + b)
    place = tl.load(info + row * COLUMNS + LENGTH) + 1
    number = tl.load(uniform + row * uniform_stride + place)
    index = tl.arange(0, BLOCKS)
    high = tl.load(top + b * blocks + index, index < blocks, float("-inf"))
    highest = tl.max(high, 0)
    part = tl.load(mass + b * blocks + index, index < blocks, 0.0) * tl.exp(high - highest)
    sums = tl.cumsum(part.to(tl.float64), 0)
    total = tl.sum(part.to(tl.float64), 0)
    wanted = number * total
    # The last block with mass, where rounding leaves none that exceeds.
    last = tl.max(tl.where(part > 0, index, 0), 0)
    block = tl.minimum(tl.min(tl.where(sums > wanted, index, BLOCKS), 0), last)
    before = tl.sum(tl.where(index < block, part, 0.0).to(tl.float64), 0)
    cols = block * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(logits + b * stride + cols, cols < vocab_size, float("-inf")).to(tl.float32) * scale
    power = tl.exp(value - highest)
    inside = tl.cumsum(power.to(tl.float64), 0) + before
    last = tl.max(tl.where(power > 0, cols, 0), 0)
    found = tl.minimum(tl.min(tl.where(inside > wanted, cols, vocab_size), 0), last)
    chosen = tl.sum(tl.where(cols == found, value, 0.0), 0)
    tl.store(token + b, found.to(tl.int64))
    tl.store(logprob + b, chosen - highest - tl.log(total).to(tl.float32))


@triton.jit
def keep(x, rows, info, where, width, BLOCK: tl.constexpr):
    b = tl.program_id(0).to(tl.int64)
    row = tl.load(rows + b)
    own = info + row * COLUMNS
    cols = tl.arange(0, BLOCK)
    if tl.load(own + DONE) == 0:
        place = row * tl.load(where + 9) + tl.load(own + LENGTH)
        trunk = tl.load(where + 8).to(tl.pointer_type(x.dtype.element_ty))
        value = tl.load(x + b * width + cols, cols < width, 0.0)
        tl.store(trunk + place * width + cols, value, cols < width)


@triton.jit
def advance(token, logprob, rows, info, tokens, logprobs, ends, stride):
    b = tl.program_id(0)
    row = tl.load(rows + b)
    own = info + row * COLUMNS
    if tl.load(own + DONE) == 0:
        place = tl.load(own + LENGTH) + 1
        drawn = tl.load(token + b)
        tl.store(tokens + row * stride + place, drawn)
        tl.store(logprobs + row * stride + place, tl.load(logprob + b))
        ended = (place + 1 >= tl.load(own + LIMIT)) | (tl.load(ends + drawn) != 0)
        tl.store(own + LENGTH, place)
        tl.store(own + TOKEN, drawn.to(tl.int32))
        tl.store(own + DONE, ended.to(tl.int32))
