"""LoRA-XS: its frames, and the same log-probs fast and slow."""

from __future__ import annotations

import pytest
import torch
from tests.memory.test_plan import DTYPES
from tests.peaks import as_near_as_lora, not_short

from shoestring.adapters import ADAPTERS
from shoestring.adapters.lora_xs import LoRAXSLinear, leading_frames
from tiny import random_model


def test_the_frames_are_the_leading_singular_triplets() -> None:
    weight = torch.randn(40, 12, generator=torch.Generator().manual_seed(0))
    left, right = leading_frames(weight, 5)
    u, s, vh = torch.linalg.svd(weight, full_matrices=False)
    torch.testing.assert_close(left @ right, (u[:, :5] * s[:5]) @ vh[:5], atol=1e-5, rtol=0)
    torch.testing.assert_close(left.T @ left, torch.eye(5), atol=1e-5, rtol=0)


def test_a_randomised_svd_finds_them_too() -> None:
    torch.manual_seed(0)
    spectrum = 0.7 ** torch.arange(64)
    weight = torch.linalg.qr(torch.randn(96, 64))[0] * spectrum @ torch.linalg.qr(torch.randn(64, 64))[0]
    left, right = leading_frames(weight, 4)
    u, s, vh = torch.linalg.svd(weight, full_matrices=False)
    torch.testing.assert_close(left @ right, (u[:, :4] * s[:4]) @ vh[:4], atol=1e-5, rtol=0)


def test_the_update_is_scaled_and_lies_in_the_frames() -> None:
    handle = ADAPTERS["lora-xs"](rank=3, alpha=6, modules=["q_proj"], layers=(1,)).attach(random_model(), 0)
    module = handle.base.model.layers[1].self_attn.q_proj
    assert isinstance(module, LoRAXSLinear)
    assert sum(p.numel() for p in handle.parameters().values()) == 9
    with torch.no_grad():
        module.core.normal_()
        x = torch.randn(5, 32)
        wanted = module.base_layer(x) + 2 * x @ (module.left @ module.core @ module.right).T
        torch.testing.assert_close(module(x), wanted, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("on", [False, True], ids=["kept", "recomputed"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_plan_does_not_fall_short(dtype: str, on: bool) -> None:
    not_short({"name": "lora-xs", "rank": 8}, dtype, on=on)
    as_near_as_lora({"name": "lora-xs", "rank": 8}, dtype, on=on)
