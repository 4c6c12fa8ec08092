"""Adapters of PEFT by name: what is refused in words, and a plan that does not fall short."""

from __future__ import annotations

from typing import Any

import pytest
from tests.memory.test_plan import DTYPES
from tests.peaks import not_short

from shoestring.adapters import ADAPTERS
from shoestring.errors import ConfigError
from shoestring.model.shapes import shape_of
from tiny import COMMON, random_model


def shape() -> Any:
    return shape_of({"model_type": "qwen2", **COMMON})


@pytest.mark.parametrize("kind", ["loha", "lokr", "oft", "ia3", "hra", "fourierft", "delora", "lora"])
def test_its_types_are_counted_as_they_are(kind: str) -> None:
    given: dict[str, Any] = {
        "ia3": {"feedforward_modules": ["down_proj"]},
        "oft": {"oft_block_size": 4},
        "fourierft": {"n_frequency": 50},
    }
    settings = ADAPTERS["peft"](type=kind, settings=given.get(kind, {}))
    cost = settings.cost(shape())
    handle = settings.attach(random_model(), 0)
    assert cost.trained(4) == sum(p.nbytes for p in handle.parameters().values())
    assert bool(cost.slow) == (kind != "lora")


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"type": "lohaa"}, 'did you mean "loha"'),
        ({"type": "prompt_tuning"}, "adapts no linear layers"),
        ({"type": "loha", "settings": {"rank": 4}}, "no such field"),
        ({"type": "lora", "settings": {"lora_dropout": 0.1}}, "part the sampler from the trainer"),
    ],
)
def test_what_cannot_be_is_said_before_the_model_loads(values: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        ADAPTERS["peft"](**values).cost(shape())


def test_first_values_out_of_the_base_weights_are_refused() -> None:
    with pytest.raises(ConfigError, match="no longer be the model before training"):
        ADAPTERS["peft"](type="lora", settings={"init_lora_weights": "pissa"}).attach(random_model(), 0)


@pytest.mark.parametrize("on", [False, True], ids=["kept", "recomputed"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("adapter", [{"name": "peft", "type": "loha"}, {"name": "peft", "type": "lokr"}], ids=str)
def test_the_plan_of_a_slow_adapter_does_not_fall_short(adapter: dict[str, Any], dtype: str, on: bool) -> None:
    not_short(adapter, dtype, on=on)
