"""What programs of a kernel take at once."""

from __future__ import annotations

from typing import NamedTuple

# Up to so many rows a product takes long steps of few columns.
_FEW_ROWS = 64


class Tile(NamedTuple):
    """What a program of `product` takes at once, and how many steps of it it loads ahead; `splits` programs share a
    sum."""

    rows: int
    columns: int
    terms: int
    stages: int
    splits: int


def _blocks(rows: int, inputs: int, itemsize: int, *, gated: bool) -> tuple[int, int, int]:
    """Columns and terms that a program of `product` takes at once, and how many such steps it loads ahead, as measured
    on an H200."""
    if itemsize == 4:
        return 32, 32, 2
    if rows > _FEW_ROWS:
        return (64, 128, 3) if gated else (32, 128, 4)
    if gated:
        return 32, 64, 6
    return (16, 256, 3) if inputs <= 2048 else (32, 128, 4)
