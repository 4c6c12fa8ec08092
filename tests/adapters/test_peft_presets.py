"""DoRA, rsLoRA, VeRA: their formulas, and a plan that does not fall short."""

from __future__ import annotations

import pytest
import torch
from tests.memory.test_plan import DTYPES
from tests.peaks import as_near_as_lora, not_short

from shoestring.adapters import ADAPTERS
from tiny import random_model


@pytest.mark.parametrize("on", [False, True], ids=["kept", "recomputed"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["dora", "vera"])
def test_the_plan_does_not_fall_short(name: str, dtype: str, on: bool) -> None:
    not_short({"name": name, "rank": 8}, dtype, on=on)
    if name == "vera":
        as_near_as_lora({"name": name, "rank": 8}, dtype, on=on)


def test_rslora_is_lora_scaled_by_the_root_of_the_rank() -> None:
    handle = ADAPTERS["rslora"](rank=4, alpha=6).attach(random_model(), 0)
    factors = handle.factors(handle.base.model.layers[0].self_attn.q_proj)
    assert factors is not None
    assert factors.scaling == 3
    assert isinstance(factors.up, torch.nn.Parameter)


def test_vera_s_factors_are_what_peft_computes() -> None:
    handle = ADAPTERS["vera"](rank=8).attach(random_model(), 0)
    module = handle.base.model.layers[1].mlp.down_proj
    with torch.no_grad():
        module.vera_lambda_b["default"].normal_()
        factors = handle.factors(module)
        assert factors is not None
        x = torch.randn(5, 48)
        wanted = module.base_layer(x) + x @ factors.down.T @ factors.up.T
        torch.testing.assert_close(module(x), wanted, atol=1e-4, rtol=0)
