"""What is LoRA's own; tests/adapters/test_contracts.py holds what all adapters share."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import nn

from shoestring.adapters import ADAPTERS
from shoestring.errors import ConfigError
from shoestring.model.structure import chosen_layers, decoder_layers
from tiny import FAMILIES, VOCAB, random_model

IDS = torch.tensor([[260, 17, 18, 9, 30, 44, 5]])
LINEAR = {
    "qwen2": ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"],
    "phi3": ["down_proj", "gate_up_proj", "o_proj", "qkv_proj"],
    "gpt2": ["c_attn", "c_fc", "c_proj"],
}


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).logits


def attached(name: str, family: str = "qwen2", **settings: Any) -> nn.Module:
    return ADAPTERS[name](**settings).attach(random_model(family), 0).model.eval()


def trained(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def disturb(model: nn.Module) -> None:
    """Gives the adapter weights that do something."""
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in trained(model).values():
            parameter.add_(0.1 * torch.randn_like(parameter))


def places(model: nn.Module) -> dict[int, set[str]]:
    """The modules that hold trained weights, by the number of their layer."""
    found: dict[int, set[str]] = {}
    for name in trained(model):
        match = re.search(r"\.(?:layers|h)\.(\d+)\.(?:\w+\.)?(\w+)\.lora_[AB]\.", name)
        assert match, name
        found.setdefault(int(match[1]), set()).add(match[2])
    return found


@pytest.mark.parametrize("family", LINEAR)
def test_all_linear_is_every_linear_layer_of_the_decoder_and_no_head(family: str) -> None:
    """Fused projections (Phi-3) and transposed ones (GPT-2) too."""
    assert places(attached("lora", family)) == {layer: set(LINEAR[family]) for layer in range(3)}


@pytest.mark.parametrize(
    ("layers", "wanted"),
    [("all", [0, 1, 2]), ("last-third", [2]), (1, [2]), (2, [1, 2]), (3, [0, 1, 2]), ((1,), [1]), ((2, 0), [0, 2])],
)
@pytest.mark.parametrize("family", LINEAR)
def test_weights_lie_in_the_chosen_layers_and_nowhere_else(family: str, layers: Any, wanted: list[int]) -> None:
    assert sorted(places(attached("lora", family, layers=layers))) == wanted


@pytest.mark.parametrize("family", LINEAR)
def test_weights_lie_in_the_named_modules_and_nowhere_else(family: str) -> None:
    some = LINEAR[family][1:3]
    assert places(attached("lora", family, modules=some, layers=2)) == {1: set(some), 2: set(some)}


@pytest.mark.parametrize(
    ("family", "given", "says"),
    [
        ("qwen2", "q_porj", 'did you mean "q_proj"'),
        ("phi3", "qkv", "down_proj, gate_up_proj, o_proj, qkv_proj"),
        ("qwen2", "lm_head", "k_proj"),  # it lies outside the layers
        ("qwen2", "input_layernorm", "no layer has a linear module"),
    ],
)
def test_an_unknown_module_is_told_with_the_nearest_name_or_all(family: str, given: str, says: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(f'"{given}"')) as caught:
        attached("lora", family, modules=[given])
    assert says in str(caught.value)


@pytest.mark.parametrize("layers", [0, -1, 4, (), (3,), (-1, 2)])
def test_layers_that_the_model_does_not_have_are_told(layers: Any) -> None:
    with pytest.raises(ConfigError, match=r"adapter\.layers is"):
        attached("lora", layers=layers)


@pytest.mark.parametrize(
    ("layers", "count", "wanted"),
    [
        ("all", 4, [0, 1, 2, 3]),
        ("last-third", 30, list(range(20, 30))),
        ("last-third", 28, list(range(19, 28))),
        ("last-third", 2, [1]),
        ("last-third", 1, [0]),
        (1, 4, [3]),
        (4, 4, [0, 1, 2, 3]),
        ((3, 1, 3), 4, [1, 3]),
    ],
)
def test_chosen_layers(layers: Any, count: int, wanted: list[int]) -> None:
    assert chosen_layers(layers, count) == wanted


@pytest.mark.parametrize("family", [*FAMILIES, "gpt2"])
def test_the_decoder_layers_are_found_in_every_family(family: str) -> None:
    name, layers = decoder_layers(random_model(family))
    assert name in ("model.layers", "transformer.h")
    assert len(layers) == 3


def test_a_model_without_decoder_layers_is_told() -> None:
    class Odd(nn.Module):
        config = random_model().config

    with pytest.raises(ConfigError, match="no list of its 3 layers"):
        decoder_layers(Odd())  # type: ignore[arg-type]


@pytest.mark.parametrize(("rank", "alpha"), [(4, 32.0), (8, 1.0), (3, 0.5)])
def test_what_is_added_is_alpha_over_rank_times_b_times_a(rank: int, alpha: float) -> None:
    adapted = attached("lora", rank=rank, alpha=alpha, modules=["q_proj"], layers=(1,))
    disturb(adapted)
    weights = trained(adapted)
    [a], [b] = ([p for name, p in weights.items() if part in name] for part in ("lora_A", "lora_B"))
    assert (a.shape, b.shape) == ((rank, 32), (32, rank))
    plain = random_model()
    with torch.no_grad():
        plain.model.layers[1].self_attn.q_proj.weight += (alpha / rank) * b @ a
    torch.testing.assert_close(logits(adapted), logits(plain), atol=1e-5, rtol=0)


@pytest.mark.parametrize("family", LINEAR)
def test_merged_into_the_base_it_computes_the_same(family: str) -> None:
    adapted = attached("lora", family)
    disturb(adapted)
    wanted = logits(adapted)
    merged = adapted.merge_and_unload()
    torch.testing.assert_close(logits(merged), wanted, atol=1e-4, rtol=1e-4)
    assert merged.state_dict().keys() == random_model(family).state_dict().keys()
    assert wanted.shape[-1] == VOCAB
