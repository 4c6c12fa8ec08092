"""The contracts of every adapter in the table."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from tests.model.test_trees import gradients
from tests.training.test_hidden_cache import rows_of
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from shoestring import train
from shoestring.adapters import ADAPTERS
from shoestring.errors import ConfigError
from shoestring.model.adapter import Handle
from shoestring.model.capability import fast_path
from shoestring.model.fast.decoder import Decoder, unsupported
from shoestring.model.fast.layers import Pass
from shoestring.model.load import ModelSettings
from shoestring.model.policy import Policy
from shoestring.model.shapes import shape_of
from shoestring.model.structure import quiet_peft
from shoestring.run.loading import load_policy
from shoestring.samplers import SAMPLERS, Sampling
from shoestring.training.micro_batching import micro_batches
from shoestring.training.update import apply
from shoestring.types import Batch, Group, Score
from tiny import COMMON, FAMILIES, prompt, random_model, random_policy

IDS = torch.tensor([[260, 17, 18, 9, 30, 44, 5]])
SETTINGS: dict[str, dict[str, Any]] = {"peft": {"type": "loha", "settings": {"r": 4}}, "adalora": {"total_steps": 8}}
"""Settings without a default, or short ones for a small run."""
ONLY_LINEAR = {"miss", "peft"}
"""Those that PEFT does not give GPT-2's transposed layers."""
NEXT_TO_BASE = [name for name in ADAPTERS if name != "none"]
"""Those that add weights to a frozen base."""


def settings(name: str) -> Any:
    return ADAPTERS[name](**SETTINGS.get(name, {}))


def attached(name: str, family: str = "qwen2", dtype: torch.dtype = torch.float32, seed: int = 0) -> Handle:
    if family == "gpt2" and name in ONLY_LINEAR:
        with pytest.raises(ConfigError, match="PEFT refuses it"):
            settings(name).attach(random_model(family), 0)
        pytest.skip("refused in words")
    handle = settings(name).attach(random_model(family, dtype=dtype), seed)
    handle.model.eval()
    return handle


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).logits


def disturb(handle: Handle) -> None:
    """Give the adapter weights that do something."""
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in handle.parameters().values():
            parameter.add_(0.05 * torch.randn_like(parameter))


def policy_with(name: str, family: str = "qwen2") -> Policy:
    policy = random_policy(family, adapter={"name": name, **SETTINGS.get(name, {})})
    assert policy.handle is not None
    disturb(policy.handle)
    return policy


def sampled(policy: Policy) -> list[Group]:
    prompts = [prompt(length, length) for length in (5, 11, 3)]
    found = SAMPLERS["auto"]().open(policy).sample(prompts, num=4, sampling=Sampling(max_new_tokens=9), seed=2)
    scores = tuple(Score(float(i % 2)) for i in range(4))
    return [Group(p, completions, scores) for p, completions in zip(prompts, found, strict=True)]


def batches_of(policy: Policy) -> list[Batch]:
    return micro_batches(rows_of(sampled(policy)), 60, trees=policy.takes_trees)


# --- the start ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", [*FAMILIES, "gpt2"])
@pytest.mark.parametrize("name", ADAPTERS)
def test_a_fresh_adapter_is_the_base_model_or_says_that_it_is_not(name: str, family: str) -> None:
    handle = attached(name, family)
    if handle.starts_as_base:
        torch.testing.assert_close(logits(handle.model), logits(random_model(family)), atol=EXACT.get(name, 0), rtol=0)


EXACT: dict[str, float] = {"dora": 1e-5}
"""How far the first logits may be off; 0 where nothing is said."""


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ADAPTERS)
def test_a_fresh_adapter_is_the_base_model_in_half_precision(name: str, dtype: torch.dtype) -> None:
    if attached(name).starts_as_base and name not in EXACT:
        assert torch.equal(logits(attached(name, dtype=dtype).model), logits(random_model(dtype=dtype)))


@pytest.mark.parametrize("name", ADAPTERS)
def test_the_same_seed_gives_the_same_state(name: str) -> None:
    first, again = attached(name, seed=3).state(), attached(name, seed=3).state()
    assert first.tensors.keys() == again.tensors.keys()
    assert all(torch.equal(value, again.tensors[key]) for key, value in first.tensors.items())


@pytest.mark.parametrize("name", ADAPTERS)
def test_nothing_is_dropped_out_even_in_training_mode(name: str) -> None:
    handle = attached(name)
    disturb(handle)
    quiet = logits(handle.model)
    handle.model.train()
    assert torch.equal(logits(handle.model), quiet)
    assert not [m for m in handle.model.modules() if isinstance(m, nn.Dropout) and m.p > 0]


@pytest.mark.parametrize("name", ADAPTERS)
def test_the_settings_say_their_own_name_and_are_frozen(name: str) -> None:
    assert settings(name).name == name
    with pytest.raises(Exception, match="frozen"):
        settings(name).name = "other"


# --- what trains ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["qwen2", "phi3", "gpt2"])
@pytest.mark.parametrize("name", NEXT_TO_BASE)
def test_only_the_adapters_tensors_have_gradients(name: str, family: str) -> None:
    handle = attached(name, family)
    own = set(map(id, handle.parameters().values()))
    state = set(map(id, handle.state().tensors.values()))
    assert own <= state
    disturb(handle)
    handle.model(input_ids=IDS).logits.float().logsumexp(-1).sum().backward()
    moved = {id(p) for p in handle.model.parameters() if p.grad is not None}
    assert moved
    assert moved <= own
    assert all(p.requires_grad == (id(p) in own) for p in handle.model.parameters())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", NEXT_TO_BASE)
def test_trained_weights_are_fp32_whatever_the_base(name: str, dtype: torch.dtype) -> None:
    handle = attached(name, dtype=dtype)
    assert {p.dtype for p in handle.parameters().values()} == {torch.float32}
    handle.model(input_ids=IDS).logits.float().logsumexp(-1).sum().backward()
    assert {p.grad.dtype for p in handle.parameters().values() if p.grad is not None} == {torch.float32}


@pytest.mark.parametrize("plain", [False, True], ids=["fast", "plain"])
@pytest.mark.parametrize("name", NEXT_TO_BASE)
def test_two_steps_move_every_trained_tensor_and_no_other(name: str, plain: bool) -> None:
    policy = random_policy(adapter={"name": name, **SETTINGS.get(name, {})})
    policy.plain = plain
    handle = policy.handle
    assert handle is not None
    trained = set(map(id, handle.parameters().values()))
    every = [*handle.model.named_parameters(), *handle.model.named_buffers()]
    before = {key: tensor.detach().clone() for key, tensor in every}
    optimizer = torch.optim.AdamW(handle.parameters().values(), lr=1e-2, weight_decay=0.0)
    for _ in range(2):
        gradients(policy, batches_of(policy))
        apply(policy, optimizer)
    still = [key for key, tensor in every if id(tensor) in trained and torch.equal(tensor, before[key])]
    assert not still
    assert all(torch.equal(tensor, before[key]) for key, tensor in every if id(tensor) not in trained)


# --- files ----------------------------------------------------------------------------------------------------------

RUN: dict[str, Any] = {
    "algorithm": {"name": "s-grpo", "alpha": 4, "k": 8},
    "sampling": {"num_prompts": 4, "num_completions": 4, "max_new_tokens": 32},
    "objective": {"l2": 0.0},
    "optim": {"lr": 1e-3, "warmup_steps": 0},
    "execution": {"device": "cpu"},
    "save_every": 2,
    "steps": 4,
}


def tensors_in(folder: Path) -> dict[str, dict[str, Tensor]]:
    return {str(path.relative_to(folder)): load_file(path) for path in folder.rglob("*.safetensors")}


def assert_same_files(first: Path, second: Path) -> None:
    ours, others = tensors_in(first), tensors_in(second)
    assert ours.keys() == others.keys()
    for path, tensors in ours.items():
        assert tensors.keys() == others[path].keys(), path
        assert all(torch.equal(value, others[path][key]) for key, value in tensors.items()), path


@pytest.mark.parametrize("name", ADAPTERS)
def test_a_run_resumes_bit_for_bit_and_loads_as_it_was(name: str) -> None:
    adapter = {"name": name, **SETTINGS.get(name, {})}
    whole = train({**RUN, "adapter": adapter, "out": "whole"}, quiet=True)
    train({**RUN, "adapter": adapter, "out": "cut", "steps": 2}, quiet=True)
    train({"steps": 4}, resume="cut", quiet=True)
    assert_same_files(Path("whole"), Path("cut"))
    lines = [Path(run, "checkpoints/step-4/adapter.json").read_text() for run in ("whole", "cut")]
    assert json.loads(lines[0]) == json.loads(lines[1])
    assert whole.policy.handle is not None
    with torch.no_grad():
        trained = logits(whole.policy.handle.model)
    for saved in ("whole", "whole/checkpoints/step-4"):
        loaded = load_policy(saved, device="cpu")
        assert torch.equal(logits(loaded.adapted or loaded.base), trained)
        assert not loaded.trained()
        if loaded.handle is not None:
            assert unsupported(loaded.base, loaded.handle) == unsupported(whole.policy.base, whole.policy.handle)
    earlier = load_policy("whole/checkpoints/step-2", device="cpu")
    assert not torch.equal(logits(earlier.adapted or earlier.base), trained)


@pytest.mark.parametrize("family", ["qwen2", "phi3", "gpt2"])
@pytest.mark.parametrize("name", NEXT_TO_BASE)
def test_saved_weights_load_with_plain_peft(name: str, family: str) -> None:
    handle = attached(name, family)
    disturb(handle)
    handle.save(Path("adapter"))
    with quiet_peft():
        loaded = PeftModel.from_pretrained(random_model(family), "adapter").eval()
    torch.testing.assert_close(logits(loaded), logits(handle.model), atol=1e-4, rtol=1e-5)
    assert not torch.equal(logits(loaded), logits(random_model(family)))


@pytest.mark.parametrize("family", ["qwen2", "phi3", "gpt2"])
@pytest.mark.parametrize("name", NEXT_TO_BASE)
def test_the_exported_lora_does_the_same_in_plain_peft(name: str, family: str) -> None:
    handle = attached(name, family)
    disturb(handle)
    cost = settings(name).cost(shape("qwen2"))
    if cost.slow:
        with pytest.raises(ConfigError, match="no product of two thin matrices"):
            handle.export_lora(Path("lora"))
        return
    handle.export_lora(Path("lora"))
    if family == "qwen2":
        assert json.loads(Path("lora/adapter_config.json").read_text())["r"] == cost.rank
    with quiet_peft():
        loaded = PeftModel.from_pretrained(random_model(family), "lora").eval()
    close(logits(loaded), logits(handle.model))


@pytest.mark.parametrize("family", ["qwen2", "phi3", "gpt2"])
@pytest.mark.parametrize("name", ADAPTERS)
def test_merged_into_the_base_it_computes_the_same(name: str, family: str) -> None:
    handle = attached(name, family)
    disturb(handle)
    wanted = logits(handle.model)
    merged = handle.merged()
    close(logits(merged), wanted)
    assert merged.state_dict().keys() == random_model(family).state_dict().keys()


def close(found: Tensor, wanted: Tensor) -> None:
    """Within 1e-5 of the largest."""
    torch.testing.assert_close(found, wanted, atol=1e-5 * max(1.0, wanted.abs().max().item()), rtol=0)


@pytest.mark.parametrize("family", ["qwen2", "phi3", "gpt2"])
@pytest.mark.parametrize("name", NEXT_TO_BASE)
def test_switched_off_it_is_the_base(name: str, family: str) -> None:
    handle = attached(name, family)
    disturb(handle)
    bare, on = logits(random_model(family)), logits(handle.model)
    assert not torch.equal(on, bare)
    assert handle.off_is_reference
    with handle.off():
        assert torch.equal(logits(handle.model), bare)
    assert torch.equal(logits(handle.model), on)


# --- the plan and the fast path -------------------------------------------------------------------------------------


def shape(family: str) -> Any:
    return shape_of({"model_type": family, **COMMON, **FAMILIES[family]})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", ["qwen2", "phi3", "gemma"])
@pytest.mark.parametrize("name", ADAPTERS)
def test_the_plan_knows_the_bytes_to_the_byte(name: str, family: str, dtype: torch.dtype) -> None:
    handle, cost = attached(name, family, dtype), settings(name).cost(shape(family))
    trained = handle.parameters()
    assert cost.trained(dtype.itemsize) == sum(p.nbytes for p in trained.values())
    frozen = sum(t.nbytes for key, t in handle.state().tensors.items() if key not in trained)
    assert cost.frozen(dtype.itemsize) == frozen
    assert cost.off_is_reference == handle.off_is_reference


@pytest.mark.parametrize("family", ["qwen2", "qwen3", "llama", "mistral"])
@pytest.mark.parametrize("name", NEXT_TO_BASE)
def test_the_fast_path_is_taken_and_equals_the_slow_one(
    name: str, family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy = policy_with(name, family)
    fast_one = not fast_path(shape(family), ModelSettings(), settings(name))
    assert fast_one == (not unsupported(policy.base, policy.handle)) == policy.own_layers
    ran = {"decode": 0, "layers": 0}
    step, run = Decoder.step, Pass.run

    def counted(key: str, real: Any) -> Any:
        def call(*args: Any) -> Any:
            ran[key] += 1
            return real(*args)

        return call

    monkeypatch.setattr(Decoder, "step", counted("decode", step))
    monkeypatch.setattr(Pass, "run", counted("layers", run))
    groups = sampled(policy)
    assert bool(ran["decode"]) == fast_one
    fast = micro_batches(rows_of(groups), 10**6, trees=policy.takes_trees)
    ran["layers"] = 0
    ours = gradients(policy, fast)
    assert bool(ran["layers"]) == fast_one
    with torch.no_grad():
        logprobs = policy.logprobs(fast[0])
        close(logprobs, fast[0].sampler_logprob)
        policy.own_layers = False
        rows = micro_batches(rows_of(groups), 10**6, trees=policy.takes_trees)
        close(logprobs.sort().values, policy.logprobs(rows[0]).sort().values)
    theirs = gradients(policy, rows)
    assert ours.keys() == theirs.keys()
    for key, value in theirs.items():
        torch.testing.assert_close(ours[key], value, atol=5e-5 * max(1.0, value.abs().max().item()), rtol=0)


@pytest.mark.parametrize("plain", [False, True], ids=["fast", "plain"])
@pytest.mark.parametrize("name", NEXT_TO_BASE)
def test_an_input_is_kept_for_a_trained_down_only(name: str, plain: bool) -> None:
    """The input of o_proj, 56 wide, which nothing else needs on the way back."""
    if settings(name).cost(shape("qwen2")).slow:
        return
    only_o = {"name": name, **SETTINGS.get(name, {}), "modules": ["o_proj"]}
    policy = random_policy(adapter=only_o, sizes={"head_dim": 14})
    [batch] = micro_batches(rows_of(sampled(policy)), 10**6, trees=True)
    policy.own_layers = policy.own_layers and not plain
    shapes: list[tuple[int, ...]] = []

    def pack(x: Tensor) -> Tensor:
        shapes.append(tuple(x.shape))
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        policy.logprobs(batch)
    tokens = batch.input_ids.numel()
    kept = any(shape[-1:] == (56,) and torch.Size(shape).numel() == tokens * 56 for shape in shapes)
    assert kept == settings(name).cost(shape("qwen2")).down_trains


def test_saved_settings_lead_back_to_the_adapter() -> None:
    """From an adapter folder that lies anywhere."""
    random_model().save_pretrained("base")
    handle = settings("lora").attach(AutoModelForCausalLM.from_pretrained("base"), 0)
    handle.save(Path("away"))
    assert not Path("away/adapter_settings.json").exists()  # PEFT's own format holds all of LoRA
