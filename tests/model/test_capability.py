"""The path that a config announces is the one that the loaded model takes."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from transformers import AutoTokenizer

from shoestring.adapters import ADAPTERS
from shoestring.config.run import settle
from shoestring.memory.plan import predict
from shoestring.model.capability import fast_path, plain_attention
from shoestring.model.fast.decoder import unsupported
from shoestring.model.load import ModelSettings
from shoestring.model.policy import Policy
from shoestring.model.shapes import FAMILIES as KNOWN
from shoestring.model.shapes import shape_of
from shoestring.run.preflight import other_paths
from shoestring.samplers import SAMPLERS
from tiny import COMMON, FAMILIES, TINY, random_model

ODD: dict[str, dict[str, Any]] = {
    "gelu": {"hidden_act": "gelu"},
    "dynamic": {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}},
    "yarn": {"rope_parameters": {"rope_type": "yarn", "factor": 2.0, "rope_theta": 10000.0}},
    "sliding": {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 1},
    "none": {},
}


def both(family: str, sizes: dict[str, Any], adapter: str) -> None:
    config = {"model_type": family, **COMMON, **FAMILIES.get(family, {}), **sizes}
    base = random_model(family, sizes=sizes).requires_grad_(False)
    for written in (config, base.config.to_dict()):  # as a file may hold it, and as transformers writes it
        shape, settings = shape_of(written), ADAPTERS[adapter]()
        handle = settings.attach(random_model(family, sizes=sizes).requires_grad_(False), 0)
        policy = Policy(handle.base, AutoTokenizer.from_pretrained(TINY), handle, family)
        slow, other = fast_path(shape, ModelSettings(), settings), plain_attention(shape, ModelSettings())
        assert slow == unsupported(policy.base, policy.handle)
        own = not slow and not other and adapter != "none"
        assert own == policy.own_layers
        assert (not other and (own or not shape.traits.window)) == policy.takes_trees


@pytest.mark.parametrize("adapter", ["lora", "none"])
@pytest.mark.parametrize("family", [family for family in FAMILIES if family in KNOWN])
def test_every_family(family: str, adapter: str) -> None:
    both(family, {}, adapter)


@pytest.mark.parametrize("name", ODD)
def test_what_a_config_may_hold(name: str) -> None:
    both("qwen2", ODD[name], "lora")


def test_stored_weights_of_another_kind_take_the_slow_path() -> None:
    config = {"model_type": "qwen2", **COMMON, "quantization_config": {"quant_method": "gptq"}}
    assert "gptq" in fast_path(shape_of(config), ModelSettings(), ADAPTERS["lora"]())


def test_layers_read_as_another_family_s_take_the_slow_path() -> None:
    config = {"model_type": "mine", **COMMON}
    assert '"mine"' in fast_path(shape_of(config, family="llama"), ModelSettings(), ADAPTERS["lora"]())


def test_a_run_that_went_another_way_than_planned_says_so() -> None:
    plan = predict(settle({}), prompt_tokens=16)
    handle = ADAPTERS["lora"]().attach(random_model().requires_grad_(False), 0)
    policy = Policy(handle.base, AutoTokenizer.from_pretrained(TINY), handle, "qwen2")
    engine = SAMPLERS["auto"]().open(policy)
    assert plan.work.slow == ""
    assert other_paths(plan, policy, engine) == ""
    policy.own_layers = False
    assert "training by our own layers was planned otherwise" in other_paths(plan, policy, engine)
    bare: Any = SimpleNamespace()
    assert "sampling by our own decode step and training" in other_paths(plan, policy, bare)
