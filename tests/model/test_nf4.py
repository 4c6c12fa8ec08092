"""4-bit base weights: their error, that they never change, and that sampler, trainer and reference share them."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tests.model.test_policy import batches_of, clear, gradients, loss_gradients, sampled_groups
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from shoestring import ConfigError, train
from shoestring.adapters import ADAPTERS
from shoestring.config.run import settle
from shoestring.memory.footprint import NF4, NF4_TABLES, weights
from shoestring.memory.plan import predict
from shoestring.model.load import ModelSettings, load, quantise
from shoestring.model.policy import Policy
from shoestring.model.structure import decoder_layers
from shoestring.run import preflight as budgets
from shoestring.run.loading import load_policy
from shoestring.run.sft import merge
from tiny import TINY, random_model

pytestmark = pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is None, reason="needs the extra nf4")

CPU = torch.device("cpu")
IDS = torch.tensor([[260, 17, 18, 9, 30, 44, 5]])
RUN: dict[str, Any] = {
    "model": {"dtype": "nf4"},
    "adapter": {"rank": 4},
    "algorithm": "grpo",
    "objective": {"beta": 0.04},
    "steps": 3,
    "save_every": 1,
    "sampling": {"num_prompts": 2, "num_completions": 4, "max_new_tokens": 12, "temperature": 1.5},
    "optim": {"lr": 1e-2, "warmup_steps": 0},
    "execution": {"device": "cpu"},
    "out": "run",
}


def varied(completions: list[Any], **others: Any) -> list[float]:
    """Rewards that differ within every group."""
    return [float(sum(map(ord, completion[0]["content"])) % 11) for completion in completions]


def run(**changes: Any) -> Any:
    return train({**RUN, **changes}, rewards=[varied], quiet=True)


def metrics(folder: str = "run") -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key not in ("seconds", "tokens_per_s")} for line in lines]


def small_linears(model: nn.Module) -> dict[str, nn.Module]:
    from bitsandbytes.nn import Linear4bit

    return {name: module for name, module in model.named_modules() if type(module) is Linear4bit}


def quantised_bytes(model: Any) -> dict[str, torch.Tensor]:
    """All that the 4-bit weights are made of: codes, scales, tables."""
    found = {}
    for name, module in small_linears(model).items():
        state = module.weight.quant_state
        parts = {
            "codes": module.weight.data,
            "absmax": state.absmax,
            "offset": state.offset,
            "scales": state.state2.absmax,
        }
        found |= {f"{name}.{part}": value.detach().clone() for part, value in parts.items()}
    return found


def plain(module: Any) -> torch.Tensor:
    """A 4-bit layer's weight, unpacked."""
    from bitsandbytes.functional import dequantize_4bit

    return dequantize_4bit(module.weight.data, module.weight.quant_state)


@pytest.fixture(scope="module")
def base() -> Any:
    return load(ModelSettings(dtype="nf4"), CPU)[0]


@pytest.fixture
def policy() -> Policy:
    policy = load_policy(ModelSettings(dtype="nf4"), adapter=ADAPTERS["lora"](rank=4), device="cpu")
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in policy.trained().items():
            if "lora_B" in name:
                parameter.normal_(std=0.05)
    return policy


# --- what is loaded -------------------------------------------------------------------------------------------------


def test_the_error_of_a_normal_matrix_is_that_of_nf4() -> None:
    """0.0920 of its norm, as the sheet measured (section 9.1), by the settings that a model is loaded with."""

    model = random_model()
    torch.manual_seed(0)
    weight = torch.randn(1024, 1024)
    model.model.layers[0].extra = nn.Linear(1024, 1024, bias=False)
    model.model.layers[0].extra.weight.data = weight.clone()
    quantise(model, CPU)
    back = plain(model.model.layers[0].extra)
    assert ((back - weight).norm() / weight.norm()).item() == pytest.approx(0.0920, abs=0.001)
    assert back.unique().numel() > 16  # each block of 64 has a scale of its own
    small = model.model.layers[0].extra.weight
    assert small.quant_state.nested
    assert small.quant_state.blocksize == 64
    taken = small.nbytes + small.quant_state.absmax.nbytes + small.quant_state.state2.absmax.nbytes
    assert taken == NF4 * weight.numel()


def test_only_the_linear_layers_of_the_decoder_are_in_4_bits(base: Any) -> None:
    _, layers = decoder_layers(base)
    inside = {f"model.layers.{name}" for name, m in layers.named_modules() if isinstance(m, nn.Linear)}
    assert small_linears(base).keys() == inside
    assert len(inside) == 7 * len(layers)
    codes = {name for name, p in base.named_parameters() if p.dtype == torch.uint8}
    assert codes == {f"{name}.weight" for name in inside}
    assert all(p.dtype == torch.float32 for name, p in base.named_parameters() if name not in codes)
    assert base.get_output_embeddings().weight is base.get_input_embeddings().weight
    assert not any(p.requires_grad for name, p in base.named_parameters() if name in codes)


def test_a_folder_of_a_model_is_loaded_in_4_bits(base: Any) -> None:
    """Near the model it was made from, and as near as the embedded one of the same weights."""
    AutoModelForCausalLM.from_pretrained(TINY).save_pretrained("saved")
    AutoTokenizer.from_pretrained(TINY).save_pretrained("saved")
    loaded = load(ModelSettings(name="saved", dtype="nf4"), CPU)[0]
    first, second = quantised_bytes(base), quantised_bytes(loaded)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    whole = dict(AutoModelForCausalLM.from_pretrained(TINY).named_modules())
    for name, module in small_linears(loaded).items():
        weight = whole[name].weight  # type: ignore[union-attr]
        assert 0.05 < ((plain(module) - weight).norm() / weight.norm()).item() < 0.12
        assert module.bias is None or torch.equal(module.bias, whole[name].bias)  # type: ignore[arg-type]


def test_the_plan_knows_the_weights_bytes(base: Any) -> None:
    """All but the 4-bit layers' code tables, for which it takes a round number each."""
    work = predict({"model": {"dtype": "nf4"}, "execution": {"device": "cpu"}}, prompt_tokens=9).work
    held = sum(p.nbytes for p in base.parameters())
    held += sum(value.nbytes for name, value in quantised_bytes(base).items() if not name.endswith("codes"))
    tables = NF4_TABLES * len(small_linears(base))
    assert weights(work) - tables == pytest.approx(held, rel=0.001)


# --- what is refused ------------------------------------------------------------------------------------------------


def test_the_missing_package_is_named_with_the_command_before_the_model_loads(monkeypatch: pytest.MonkeyPatch) -> None:

    real = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *a: None if name == "bitsandbytes" else real(name, *a)
    )
    monkeypatch.setattr(budgets, "load_policy", lambda *_, **__: pytest.fail("the model was loaded"))
    with pytest.raises(ConfigError) as told:
        run()
    assert told.value.given == 'model.dtype is "nf4"'
    assert "bitsandbytes" in told.value.why
    assert told.value.write == 'run: pip install "shoestring[nf4]"'
    assert not Path("run").exists()


def test_4_bit_weights_are_not_trained_themselves() -> None:
    with pytest.raises(ConfigError, match=r'use adapter\.name = "lora"') as told:
        settle({"model": {"dtype": "nf4"}, "adapter": "none"})
    assert told.value.given == 'model.dtype is "nf4" and adapter.name "none"'
    with pytest.raises(ConfigError, match="quantised"):
        ADAPTERS["none"]().attach(load(ModelSettings(dtype="nf4"), CPU)[0], 0)


# --- one copy for sampler, trainer and reference --------------------------------------------------------------------


def test_without_the_adapter_the_policy_is_the_4_bit_base(policy: Policy, base: Any) -> None:
    adapted = policy.base(input_ids=IDS).logits
    with policy.reference():
        assert torch.equal(policy.base(input_ids=IDS).logits, base(input_ids=IDS).logits)
    assert not torch.equal(adapted, base(input_ids=IDS).logits)
    whole = AutoModelForCausalLM.from_pretrained(TINY)(input_ids=IDS).logits
    assert not torch.allclose(base(input_ids=IDS).logits, whole, atol=1e-3)


def test_a_fresh_adapter_changes_nothing(base: Any) -> None:
    fresh = load_policy(ModelSettings(dtype="nf4"), adapter=ADAPTERS["lora"](rank=4), device="cpu")
    assert torch.equal(fresh.base(input_ids=IDS).logits, base(input_ids=IDS).logits)
    assert all(p.dtype == torch.float32 and "lora_" in name for name, p in fresh.trained().items())


def test_the_samplers_logprobs_are_the_trainers(policy: Policy) -> None:
    for batch in batches_of(sampled_groups(policy, lengths=(4, 11, 7))):
        torch.testing.assert_close(policy.logprobs(batch), batch.sampler_logprob, atol=1e-4, rtol=0)


def test_gradients_are_those_of_the_unpacked_weights(policy: Policy) -> None:
    """With and without checkpointing."""
    groups = sampled_groups(policy, num=3, new=6)
    batches = batches_of(groups)
    found = loss_gradients(policy, batches)
    again = loss_gradients(policy, batches, checkpointing=True)
    clear(policy)
    whole = load_policy(ModelSettings(dtype="fp32"), adapter=ADAPTERS["lora"](rank=4), device="cpu")
    unpacked = {name: plain(module) for name, module in small_linears(policy.base).items()}
    with torch.no_grad():
        for name, module in whole.base.named_modules():
            if name in unpacked:
                module.weight.copy_(unpacked[name])  # type: ignore[union-attr,operator]
        for name, parameter in whole.trained().items():
            parameter.copy_(policy.trained()[name])
    expected = loss_gradients(whole, batches)
    assert found.keys() == expected.keys() == again.keys()
    assert max(float(value.abs().max()) for value in expected.values()) > 1e-2
    for name, value in expected.items():
        atol = 1e-5 * max(1.0, float(value.abs().max()))
        torch.testing.assert_close(found[name], value, atol=atol, rtol=0)
        torch.testing.assert_close(again[name], value, atol=atol, rtol=0)
    assert gradients(policy) == {}


# --- a run ----------------------------------------------------------------------------------------------------------


def test_a_run_trains_the_adapter_and_leaves_every_4_bit_weight_as_it_was(base: Any) -> None:
    done = run()
    assert all(line["applied"] for line in metrics())
    assert max(line["sampler_gap"] for line in metrics()) < 1e-4
    assert metrics()[0]["kl"] == 0 < metrics()[-1]["kl"]
    before = quantised_bytes(base)
    after = {name.replace(".base_layer", ""): value for name, value in quantised_bytes(done.policy.base).items()}
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    with done.policy.reference():
        assert torch.equal(done.policy.base(input_ids=IDS).logits, base(input_ids=IDS).logits)
    saved = load_file("run/adapter/adapter_model.safetensors")
    assert all("lora_" in name and value.dtype == torch.float32 for name, value in saved.items())


def test_the_adapter_is_evaluated_on_the_4_bit_base_of_its_run() -> None:
    from shoestring.run.folder import model_settings

    done = run(steps=1)
    again = load_policy(model_settings("run"), device="cpu")
    assert len(small_linears(again.base)) > 0
    assert torch.equal(again.base(input_ids=IDS).logits, done.policy.base(input_ids=IDS).logits)


def test_a_stopped_run_goes_on_as_if_it_had_never_stopped() -> None:
    run(out="whole")
    run(out="parts", steps=1)
    train({"steps": 3}, resume="parts", rewards=[varied], quiet=True)
    assert metrics("whole") == metrics("parts")
    first, second = (load_file(f"{folder}/adapter/adapter_model.safetensors") for folder in ("whole", "parts"))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_a_budget_holds_for_a_4_bit_run_too() -> None:
    run(memory="1GiB", steps=1)
    assert metrics()[0]["micro_batch_tokens"] > 0


def test_merging_adds_the_adapter_to_the_weights_that_were_quantised() -> None:
    """So the merged model is whole, and near the one that was trained but not quite it."""
    done = run(steps=1)
    merge("run", "merged")
    merged = AutoModelForCausalLM.from_pretrained("merged")
    assert not small_linears(merged)
    assert "quantization_config" not in json.loads(Path("merged/config.json").read_text())
    whole = AutoModelForCausalLM.from_pretrained(TINY)
    name = "model.layers.0.self_attn.q_proj"
    lora = done.policy.trained()
    a, b = (lora[f"base_model.model.{name}.lora_{x}.default.weight"] for x in "AB")
    scale = 32 / 4
    expected = whole.get_parameter(f"{name}.weight") + scale * b @ a
    torch.testing.assert_close(merged.get_parameter(f"{name}.weight"), expected, atol=1e-6, rtol=0)


def test_a_gguf_file_is_unpacked_and_packed_again() -> None:
    from tests.model.test_load import original, write_gguf

    write_gguf("it.gguf", original("tied qwen2"), "qwen2")
    loaded = load(ModelSettings(name="it.gguf", dtype="nf4"), CPU)[0]
    assert len(small_linears(loaded)) == 7 * loaded.config.num_hidden_layers
    assert torch.isfinite(loaded(input_ids=IDS % 200).logits).all()
