"""The columns of selected tokens: what is cut and joined again is the same, further streams included."""

from __future__ import annotations

import pytest
import torch

from shoestring.types import TokenColumns


def columns(num: int, **extra: torch.Tensor) -> TokenColumns:
    generator = torch.Generator().manual_seed(num)
    ids = torch.randint(0, 9, (num,), generator=generator)
    return TokenColumns(ids, *(torch.randn(num, generator=generator) for _ in range(4)), extra=extra)


def same(left: TokenColumns, right: TokenColumns) -> None:
    assert left.streams().keys() == right.streams().keys()
    for name, column in left.streams().items():
        assert torch.equal(column, right.streams()[name]), name


def test_what_is_split_is_joined_again() -> None:
    whole = columns(6, entropy=torch.arange(6.0))
    parts = whole.split([1, 0, 5])
    assert [len(part) for part in parts] == [1, 0, 5]
    assert parts[2].extra["entropy"].tolist() == [1.0, 2.0, 3.0, 4.0, 5.0]
    same(TokenColumns.cat(parts), whole)


def test_a_mask_and_places_take_the_same_tokens() -> None:
    whole = columns(4, values=torch.arange(4.0))
    same(whole.take(torch.tensor([False, True, False, True])), whole.take(torch.tensor([1, 3])))
    assert whole.take(torch.tensor([3, 1])).extra["values"].tolist() == [3.0, 1.0]


def test_every_column_moves() -> None:
    moved = columns(3, entropy=torch.zeros(3)).to(torch.device("meta"))
    assert {column.device.type for column in moved.streams().values()} == {"meta"}
    assert moved.streams().keys() == columns(3, entropy=torch.zeros(3)).streams().keys()


def test_parts_with_other_streams_are_not_joined() -> None:
    with pytest.raises(ValueError, match="extra"):
        TokenColumns.cat([columns(2, entropy=torch.zeros(2)), columns(2)])
