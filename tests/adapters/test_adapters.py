"""The adapters: the contract runs over the table; then what is LoRA's own."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import nn
from transformers import AutoModelForCausalLM

from shoestring.adapters import ADAPTERS
from shoestring.errors import ConfigError
from shoestring.model.structure import chosen_layers, decoder_layers, quiet_peft
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


BESIDE = [name for name in ADAPTERS if name != "none"]  # those that add weights beside the base model's

# --- the contract ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", [*FAMILIES, "gpt2"])
@pytest.mark.parametrize("name", ADAPTERS)
def test_a_fresh_adapter_changes_nothing_at_all(name: str, family: str) -> None:
    assert torch.equal(logits(attached(name, family)), logits(random_model(family)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ADAPTERS)
def test_a_fresh_adapter_changes_nothing_at_all_on_a_short_base(name: str, dtype: torch.dtype) -> None:
    adapted = ADAPTERS[name]().attach(random_model(dtype=dtype), 0).model.eval()
    assert torch.equal(logits(adapted), logits(random_model(dtype=dtype)))


@pytest.mark.parametrize("family", ["qwen2", "phi3", "gpt2"])
@pytest.mark.parametrize("name", BESIDE)
def test_only_the_adapters_own_weights_are_trained(name: str, family: str) -> None:
    base = random_model(family)
    own = {id(p) for p in base.parameters()}
    adapted = ADAPTERS[name]().attach(base, 0).model
    assert trained(adapted)
    assert all((id(p) in own) != p.requires_grad for p in adapted.parameters())
    assert own <= {id(p) for p in adapted.parameters()}  # one copy of the base, and it is the one that was given


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", BESIDE)
def test_adapter_weights_are_fp32_whatever_the_base(name: str, dtype: torch.dtype) -> None:
    adapted = ADAPTERS[name]().attach(random_model(dtype=dtype), 0).model.eval()
    assert {p.dtype for p in trained(adapted).values()} == {torch.float32}
    assert {p.dtype for p in adapted.parameters() if not p.requires_grad} == {dtype}
    adapted(input_ids=IDS).logits.float().logsumexp(-1).sum().backward()
    gradients = [p.grad for p in trained(adapted).values() if p.grad is not None]
    assert {g.dtype for g in gradients} == {torch.float32}
    assert sum(float(g.abs().sum()) for g in gradients) > 0


@pytest.mark.parametrize("family", ["qwen2", "phi3", "gpt2"])
@pytest.mark.parametrize("name", BESIDE)
def test_saved_weights_load_with_plain_peft(name: str, family: str) -> None:
    random_model(family).save_pretrained("base")
    adapted = ADAPTERS[name]().attach(AutoModelForCausalLM.from_pretrained("base"), 0).model.eval()
    disturb(adapted)
    adapted.save_pretrained("adapter")
    with quiet_peft():
        loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained("base"), "adapter").eval()
    assert torch.equal(logits(loaded), logits(adapted))
    assert not torch.equal(logits(loaded), logits(random_model(family)))


@pytest.mark.parametrize("family", ["qwen2", "phi3", "gpt2"])
@pytest.mark.parametrize("name", BESIDE)
def test_switched_off_it_is_the_base(name: str, family: str) -> None:
    adapted = attached(name, family)
    disturb(adapted)
    bare = logits(random_model(family))
    on = logits(adapted)
    assert not torch.equal(on, bare)
    with adapted.disable_adapter():
        assert torch.equal(logits(adapted), bare)
    assert torch.equal(logits(adapted), on)


@pytest.mark.parametrize("name", BESIDE)
def test_the_same_seed_gives_the_same_first_weights(name: str) -> None:
    def weights(seed: int) -> list[torch.Tensor]:
        return list(trained(ADAPTERS[name]().attach(random_model(), seed).model).values())

    first, again, other = weights(3), weights(3), weights(4)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(first, other, strict=True))


@pytest.mark.parametrize("name", ADAPTERS)
def test_nothing_is_dropped_out_even_in_training_mode(name: str) -> None:
    adapted = attached(name)
    disturb(adapted)
    quiet = logits(adapted)
    adapted.train()
    assert torch.equal(logits(adapted), quiet)
    assert not [m for m in adapted.modules() if isinstance(m, nn.Dropout) and m.p > 0]


@pytest.mark.parametrize("name", ADAPTERS)
def test_the_settings_say_their_own_name_and_are_frozen(name: str) -> None:
    settings = ADAPTERS[name]()
    assert settings.name == name
    with pytest.raises(Exception, match="frozen"):
        settings.name = "other"


# --- LoRA -----------------------------------------------------------------------------------------------------------


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
