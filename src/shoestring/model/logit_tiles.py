"""How many logits are there at once, and what they take."""

from __future__ import annotations

# Elements of a logits tile (32 MiB in fp32), and its rows at most. On an H100 half of it takes twice the time, since
# launches dominate; twice of it three quarters. Logits of at most 2^20 elements are kept for the backward pass: that
# takes the memory of a tile, and less time.
_TILE = 2**23


_ROWS = 1024


KEPT = 2**20


# With the Triton kernels nothing but the logits themselves takes memory, so a tile has a size in bytes: four times that
# of the hidden states, which what their layers keep exceeds many times over, but within these.
_KERNEL_TILE = (2**25, 2**26)


_KERNEL_ROWS = 2048


def tile_shape(
    num_rows: int, vocab_size: int, hidden_size: int = 0, itemsize: int = 4, *, kernel: bool = False
) -> tuple[int, int]:
    """Rows and vocabulary columns of a tile of logits; few rows make it wide. `hidden_size` and `itemsize`, that of the
    logits, matter to the kernels' tiles only."""
    elements, rows = _TILE, min(max(num_rows, 1), _ROWS)
    if kernel:
        elements = min(max(4 * num_rows * hidden_size, _KERNEL_TILE[0] // itemsize), _KERNEL_TILE[1] // itemsize)
        rows = -(-max(num_rows, 1) // -(-max(num_rows, 1) // _KERNEL_ROWS))
    columns = max(elements // rows, 1)
    if columns > 64:
        columns -= columns % 64  # odd strides keep matrix products off the tensor cores
    return rows, min(columns, vocab_size)


def head_bytes(
    num_rows: int,
    vocab_size: int,
    hidden_size: int,
    itemsize: int,
    *,
    frozen: bool = True,
    entropy: bool = False,
    post: bool = False,
    kernel: bool = False,
) -> int:
    """Bytes that `selected_logprobs` and its backward pass hold at most, beside the inputs and their gradients.

    `itemsize` is that of hidden and weight, `frozen` says that weight and bias get no gradient, `post` that a
    transform follows the logits, `kernel` that Triton kernels go over them: on a GPU, without `post`.
    """
    if num_rows * vocab_size <= KEPT:
        return (16 + 8 * entropy + itemsize * post) * num_rows * vocab_size + 32 * num_rows
    rows, columns = tile_shape(num_rows, vocab_size, hidden_size, itemsize, kernel=kernel)
    tile, vectors = rows * columns, 4 * num_rows * (4 + 2 * entropy) + 40 * rows
    several = num_rows > rows and not frozen
    if kernel:
        held = itemsize * tile + vectors
    elif itemsize >= 4:
        held = itemsize * (3 if post else 2 if entropy else 1) * tile + vectors
    else:
        product = itemsize * hidden_size * (max(rows, columns) if several else rows)
        held = max((itemsize + 4 + 2 * entropy + 2 * post) * tile, itemsize * tile + product) + vectors
    if itemsize >= 4:  # gradients are summed where they are returned
        return held
    if frozen:
        return 4 * rows * hidden_size + held
    held += 4 * columns * hidden_size * several
    # the sums over hidden are rounded at the end, so a returned gradient is not yet there while tiles are
    return 4 * num_rows * hidden_size + max(held - itemsize * num_rows * hidden_size, vectors)
