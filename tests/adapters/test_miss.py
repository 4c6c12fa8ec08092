"""MiSS: block sums."""

from __future__ import annotations

import pytest
import torch
from tests.memory.test_plan import DTYPES
from tests.peaks import as_near_as_lora, not_short

from shoestring.adapters import ADAPTERS
from tiny import random_model


@pytest.mark.parametrize("rank", [4, 5])
def test_its_factors_are_what_peft_computes(rank: int) -> None:
    """A rank that does not divide the inputs too."""
    handle = ADAPTERS["miss"](rank=rank, modules=["down_proj"]).attach(random_model(), 0)
    module = handle.base.model.layers[0].mlp.down_proj
    assert sum(p.numel() for p in handle.parameters().values()) == 3 * rank * 32
    with torch.no_grad():
        module.miss_block["default"].normal_()
        x = torch.randn(5, 48)
        factors = handle.factors(module)
        assert factors is not None
        wanted = module.base_layer(x) + x @ factors.down.T @ factors.up.T
        torch.testing.assert_close(module(x), wanted, atol=1e-5, rtol=0)
        one_hot = torch.eye(48)[rank + 1]
        torch.testing.assert_close(module(one_hot) - module.base_layer(one_hot), module.miss_block["default"][1])


@pytest.mark.parametrize("on", [False, True], ids=["kept", "recomputed"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_plan_does_not_fall_short(dtype: str, on: bool) -> None:
    not_short({"name": "miss", "rank": 8}, dtype, on=on)
    as_near_as_lora({"name": "miss", "rank": 8}, dtype, on=on)
