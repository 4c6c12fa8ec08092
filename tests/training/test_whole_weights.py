"""Training without an adapter, end to end: every weight, its optimizers, the reference copy, the model folder."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tests.model.test_policy import batches_of, full_logprobs, sampled_groups
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from shoestring import ConfigError, sft, train
from shoestring.adapters import ADAPTERS
from shoestring.config.run import load, settle
from shoestring.model.load import ModelSettings, locate
from shoestring.model.policy import Policy
from shoestring.optimizers import OPTIMIZERS, base
from shoestring.optimizers.adamw import RoundedAdamW
from shoestring.optimizers.adamw_8bit import AdamW8bit
from shoestring.optimizers.adamw_cpu import AdamWCpu, HostAdamW
from shoestring.optimizers.base import OptimSettings, set_learning_rate
from shoestring.optimizers.rounding import rounded_by_chance
from shoestring.run import checkpoint
from shoestring.run.loading import load_policy
from shoestring.training.update import build_optimizer, clip_gradient
from tiny import TINY, random_model

WHOLE: dict[str, Any] = {
    "adapter": "none",
    "steps": 4,
    "save_every": 2,
    "sampling": {"num_prompts": 3, "num_completions": 4, "max_new_tokens": 16},
    "optim": {"lr": 1e-3, "warmup_steps": 0},
    "execution": {"micro_batch_tokens": 4096, "checkpointing": False},
}
IDS = torch.tensor([[260, 17, 18, 9, 30]])
NEEDS_TORCHAO = pytest.mark.skipif(importlib.util.find_spec("torchao") is None, reason="needs the extra full")
ADAMS = ("adamw", "adamw-8bit", "adamw-cpu")
NAMES = [pytest.param(name, marks=NEEDS_TORCHAO if name == "adamw-8bit" else []) for name in ADAMS]
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


def config(**changes: Any) -> dict[str, Any]:
    merged = {**WHOLE, "out": "run"}
    for key, value in changes.items():
        both = isinstance(value, Mapping) and isinstance(merged.get(key), Mapping)
        merged[key] = {**merged[key], **value} if both else value
    return merged


def varied(completions: list[Any], **others: Any) -> list[float]:
    """Rewards that differ within every group."""
    return [float(sum(map(ord, completion[0]["content"])) % 11) for completion in completions]


def trained(**changes: Any) -> Any:
    return train(config(**changes), rewards=[varied], quiet=True)


def metrics(folder: str = "run") -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]
    return [
        {key: value for key, value in line.items() if key not in ("seconds", "tokens_per_s", "peak_bytes")}
        for line in lines
    ]


def same(first: Mapping[str, torch.Tensor], second: Mapping[str, torch.Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)


def weights(folder: str | Path) -> dict[str, torch.Tensor]:
    return load_file(Path(folder) / "model" / "model.safetensors")


# --- a run ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_stopped_run_goes_on_as_if_it_had_never_stopped(name: str, dtype: str) -> None:
    """Bit for bit on the CPU, random rounding included."""
    same_for_both = {"optim": {"name": name, "lr": 1e-4}, "model": {"dtype": dtype}}
    trained(out="whole", **same_for_both)
    trained(out="parts", steps=2, **same_for_both)
    train({"steps": 4}, resume="parts", rewards=[varied], quiet=True)
    assert metrics("whole") == metrics("parts")
    assert Path("whole/samples.jsonl").read_text() == Path("parts/samples.jsonl").read_text()
    assert same(weights("whole"), weights("parts"))
    for file in ("weights", "optimizer"):
        assert same(*(load_file(f"{run}/checkpoints/step-4/{file}.safetensors") for run in ("whole", "parts")))


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_run_ends_with_an_ordinary_model_folder(dtype: str) -> None:
    run = trained(model={"dtype": dtype})
    assert {path.name for path in run.folder.iterdir()} == {
        *("checkpoints", "config.toml", "metrics.jsonl", "model", "samples.jsonl")
    }
    assert not [path for path in run.folder.rglob("*") if path.suffix in (".bin", ".pt", ".pkl")]
    assert run.result == run.folder / "model"
    loaded, before = (AutoModelForCausalLM.from_pretrained(f, dtype=DTYPES[dtype]) for f in (run.result, TINY))
    assert torch.equal(loaded(input_ids=IDS).logits, run.policy.base(input_ids=IDS).logits)
    assert not torch.equal(loaded(input_ids=IDS).logits, before(input_ids=IDS).logits)
    assert {value.dtype for value in weights("run").values()} == {DTYPES[dtype]}
    assert loaded.generation_config.eos_token_id == 257
    assert AutoTokenizer.from_pretrained(run.result).chat_template == run.policy.tokenizer.chat_template
    assert locate("run").path == "run/model"
    again = load_policy(ModelSettings(name="run", dtype=dtype), device="cpu")  # type: ignore[arg-type]
    assert torch.equal(again.base(input_ids=IDS).logits, loaded(input_ids=IDS).logits)


def test_every_weight_is_trained_and_tied_ones_are_kept_once() -> None:
    run = trained()
    kept = load_file("run/checkpoints/step-4/weights.safetensors")
    assert kept.keys() == dict(run.policy.base.named_parameters()).keys() == run.policy.trained().keys()
    assert sum(value.numel() for value in kept.values()) == sum(p.numel() for p in run.policy.base.parameters())
    before = dict(AutoModelForCausalLM.from_pretrained(TINY).named_parameters())
    assert not [name for name, value in kept.items() if torch.equal(value, before[name])]


def test_the_best_model_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    import dataclasses

    from shoestring.run import loop

    found, real = iter([0.2, 0.9, 0.5]), loop.evaluate
    monkeypatch.setattr(loop, "evaluate", lambda *a: dataclasses.replace(real(*a), accuracy=next(found)))
    trained(eval_every=2, evaluation={"num": 5, "keep": "best"})
    at_2 = load_file("run/checkpoints/step-2/weights.safetensors")
    assert all(torch.equal(value, at_2[name]) for name, value in weights("run").items())


def test_the_closing_lines_and_the_evaluation_know_the_model_folder(capsys: pytest.CaptureFixture[str]) -> None:
    from shoestring.cli.main import app
    from shoestring.run.messages import where_it_lies

    assert where_it_lies(trained()).startswith("model:    run/model")
    app(["eval", "run", "--num", "3", "--json"], standalone_mode=False)
    assert json.loads(capsys.readouterr().out)["problems"] == 3


def test_a_run_goes_on_from_the_model_of_another() -> None:
    trained(steps=1)
    trained(steps=1, out="second", model="run")
    assert not same(weights("run"), weights("second"))


# --- the reference --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_reference_is_a_copy_of_the_first_weights_also_after_a_resume(dtype: str) -> None:
    options: dict[str, Any] = {"objective": {"beta": 0.1}, "model": {"dtype": dtype}, "optim": {"lr": 1e-3}}
    run = trained(out="whole", **options)
    kl = [m["kl"] for m in metrics("whole")]
    assert kl[0] == 0
    assert min(kl[1:]) > 0
    first = AutoModelForCausalLM.from_pretrained(TINY, dtype=DTYPES[dtype])
    with run.policy.reference():
        assert torch.equal(run.policy.base(input_ids=IDS).logits, first(input_ids=IDS).logits)
        assert not torch.is_grad_enabled()
    assert not torch.equal(run.policy.base(input_ids=IDS).logits, first(input_ids=IDS).logits)
    trained(out="parts", steps=2, **options)
    again = train({"steps": 4}, resume="parts", rewards=[varied], quiet=True)
    assert metrics("whole") == metrics("parts")
    with again.policy.reference():
        assert torch.equal(again.policy.base(input_ids=IDS).logits, first(input_ids=IDS).logits)


def test_without_a_kl_term_there_is_no_copy() -> None:
    run = trained(steps=1)
    with pytest.raises(ConfigError, match=r"objective\.beta = 0"), run.policy.reference():
        pass


def test_an_adapter_needs_no_copy() -> None:
    lora = ADAPTERS["lora"]()
    policy = load_policy(ModelSettings(), adapter=lora, keep_reference=True, device="cpu")
    assert policy._first is None


# --- settings -------------------------------------------------------------------------------------------------------


def test_the_l2_term_of_an_adapter_is_none_of_a_whole_model() -> None:
    both = {"algorithm": "t-spmo", "adapter": "none"}
    assert settle(both).objective.l2 == 0
    with pytest.raises(ConfigError, match=r"pull every weight"):
        settle({**both, "objective": {"l2": 1e-6}})


def test_fp16_weights_are_not_trained() -> None:
    with pytest.raises(ConfigError, match='use "bf16" or "fp32"'):
        settle({"adapter": "none", "model": {"dtype": "fp16"}})
    assert settle({"adapter": "lora", "model": {"dtype": "fp16"}}).model.dtype == "fp16"


def test_another_optimizer_keeps_the_recipes_rate() -> None:
    Path("recipe.toml").write_text('[optim]\nname = "adamw"\nlr = 0.5\n')
    assert load("recipe.toml", ["optim.name=adamw-8bit"]).optim == AdamW8bit(lr=0.5)


def test_a_missing_package_is_told_before_the_model_loads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r'pip install "shoestring\[full\]"'):
        trained(optim={"name": "adamw-8bit"}, model="./nowhere")
    with pytest.raises(ConfigError, match=r'pip install "shoestring\[full\]"'):
        sft({"optim": {"name": "adamw-8bit"}, "model": "./nowhere"})
    AdamWCpu().check(torch.device("cpu"))


def test_quantised_weights_are_not_trained() -> None:
    model = random_model()
    model.model.norm.weight = nn.Parameter(torch.zeros(32, dtype=torch.uint8), requires_grad=False)
    with pytest.raises(ConfigError, match="quantised"):
        ADAPTERS["none"]().attach(model, 0)


# --- the optimizers -------------------------------------------------------------------------------------------------


def settings(name: str, **changes: Any) -> OptimSettings:
    return OPTIMIZERS[name](**{"lr": 1e-6, "betas": (0.9, 0.99), "warmup_steps": 0, **changes})


def pushed(parameter: nn.Parameter, optimizer: torch.optim.Optimizer, num: int = 100) -> float:
    """The mean shift after steps along a constant gradient."""
    before = parameter.detach().float().clone()
    for _ in range(num):
        parameter.grad = torch.full_like(parameter, 1e-3)
        optimizer.step()
    return (parameter.detach().float() - before).mean().item()


def test_small_steps_of_bf16_weights_are_all_lost_without_random_rounding() -> None:
    weight = nn.Parameter(torch.full((4096,), 0.02, dtype=torch.bfloat16))
    assert pushed(weight, torch.optim.AdamW([weight], lr=1e-6, betas=(0.9, 0.99), weight_decay=0.0)) == 0


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", DTYPES.values())
def test_small_steps_add_up_to_what_they_should(name: str, dtype: torch.dtype) -> None:
    """4096 weights of 0.02, 100 steps of 1e-6: the mean moves by -1.0e-4. On the host it is the copy that does."""
    torch.manual_seed(0)
    weight = nn.Parameter(torch.full((4096,), 0.02, dtype=dtype))
    start = weight[0].item()
    optimizer = build_optimizer({"w": weight}, settings(name))
    shift = pushed(weight, optimizer)
    if name == "adamw-cpu":
        shift = (optimizer.state[weight]["weight"].double() - start).mean().item()
        assert torch.equal(weight, optimizer.state[weight]["weight"].to(dtype))
    assert shift == pytest.approx(-1.0e-4, rel=0.05)


def test_rounding_by_chance_gives_neighbours_whose_mean_is_the_value() -> None:
    torch.manual_seed(0)
    for value in (0.02, -0.02, 1e-6, -3.3, 0.0):
        found = rounded_by_chance(torch.full((100_000,), value))
        ulp = 2.0**-8 * abs(value) * 2
        assert found.dtype == torch.bfloat16
        assert len(found.unique()) <= 2
        assert float((found.float() - value).abs().max()) <= ulp
        assert found.double().mean().item() == pytest.approx(value, abs=ulp / 100)
    exact = torch.randn(1000).bfloat16()
    assert torch.equal(rounded_by_chance(exact.float()), exact)


@pytest.mark.parametrize("cls", [RoundedAdamW, HostAdamW])
@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_our_classes_compute_torchs_adamw(cls: Any, decay: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """In fp32, across tiles."""
    monkeypatch.setattr("shoestring.optimizers.rounding.TILE", 7)
    torch.manual_seed(0)
    ours, theirs = (nn.Parameter(torch.ones(5, 4)) for _ in range(2))
    options: dict[str, Any] = {"lr": 1e-2, "betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": decay}
    mine, torchs = cls([ours], **options), torch.optim.AdamW([theirs], **options)
    for _ in range(5):
        ours.grad = torch.randn(5, 4)
        theirs.grad = ours.grad.clone()
        mine.step()
        torchs.step()
    torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=0)


@pytest.mark.parametrize("name", NAMES)
def test_the_rate_is_the_one_that_is_set(name: str) -> None:
    weight = nn.Parameter(torch.zeros(4096))
    optimizer = build_optimizer({"w": weight}, settings(name))
    for lr in (0.5, 0.25):
        set_learning_rate(optimizer, lr)
        assert pushed(weight, optimizer, num=1) == pytest.approx(-lr, rel=1e-3)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", DTYPES.values())
def test_state_is_saved_in_plain_tensors_and_comes_back_bit_for_bit(name: str, dtype: torch.dtype) -> None:
    """A matrix that is quantised, a vector that is too small for it, and one that never had a gradient."""

    def made() -> tuple[dict[str, nn.Parameter], torch.optim.Optimizer]:
        torch.manual_seed(0)
        shapes = {"matrix": (64, 128), "vector": (48,), "unused": (3,)}
        parameters = {key: nn.Parameter(torch.randn(shape).to(dtype)) for key, shape in shapes.items()}
        return parameters, build_optimizer(parameters, settings(name, lr=1e-2, weight_decay=0.1))

    def step(parameters: dict[str, nn.Parameter], optimizer: torch.optim.Optimizer, number: int) -> None:
        torch.manual_seed(number)
        set_learning_rate(optimizer, 1e-2)
        for key in ("matrix", "vector"):
            parameters[key].grad = torch.randn(parameters[key].shape).to(dtype)
        optimizer.step()
        optimizer.zero_grad()

    first, optimizer = made()
    step(first, optimizer, 1)
    step(first, optimizer, 2)
    path = checkpoint.save(Path("run"), first, optimizer, checkpoint.State(step=2))
    second, other = made()
    assert checkpoint.restore(path, second, other).step == 2
    for _ in range(3):
        assert same(first, second)
        mine, theirs = (base.state_of(*pair)[0] for pair in ((optimizer, first), (other, second)))
        assert same(mine, theirs)
        assert not [key for key in mine if key.startswith("unused")]
        step(first, optimizer, 3)
        step(second, other, 3)
    if name == "adamw-8bit":
        assert mine["matrix:exp_avg.codes"].dtype == torch.uint8


def test_a_checkpoint_of_other_weights_is_refused() -> None:
    parameters = {"a": nn.Parameter(torch.ones(2))}
    path = checkpoint.save(Path("run"), parameters, build_optimizer(parameters, settings("adamw")), checkpoint.State())
    others = {"b": nn.Parameter(torch.ones(2))}
    with pytest.raises(ConfigError, match="other weights"):
        checkpoint.restore(path, others, build_optimizer(others, settings("adamw")))


@pytest.mark.parametrize("dtype", DTYPES.values())
def test_the_norm_is_fp32_and_the_gradient_is_cut_to_the_limit(dtype: torch.dtype) -> None:
    parameters = [nn.Parameter(torch.zeros(1000, dtype=dtype)) for _ in range(2)]
    for parameter in parameters:
        parameter.grad = torch.full_like(parameter, 0.5)
    norm = clip_gradient(parameters, 1.0)
    assert norm.dtype == torch.float32
    assert norm.item() == pytest.approx(2000**0.5 / 2, rel=1e-6)
    after = torch.cat([p.grad.float() for p in parameters if p.grad is not None])
    assert after.norm().item() == pytest.approx(1.0, rel=4e-3)


# --- log-probs ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["qwen2", "gemma2", "phi3"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_every_gradient_is_that_of_the_librarys_own_logits(family: str, checkpointing: bool) -> None:
    """The vocabulary matrix and the embedding included, tied or not."""
    policy = whole_policy(family)
    [batch] = batches_of(sampled_groups(policy))
    with policy.checkpointing(checkpointing):
        (batch.weight * batch.advantage * policy.logprobs(batch)).sum().backward()
    found = {name: p.grad for name, p in policy.trained().items()}
    assert None not in found.values()
    policy.base.zero_grad(set_to_none=True)
    (batch.weight * batch.advantage * full_logprobs(policy, batch, 1.0)).sum().backward()
    for name, parameter in policy.trained().items():
        scale = max(1.0, float(parameter.grad.abs().max()))  # type: ignore[union-attr]
        torch.testing.assert_close(found[name], parameter.grad, atol=2e-5 * scale, rtol=0, msg=name)


def whole_policy(family: str) -> Policy:
    handle = ADAPTERS["none"]().attach(random_model(family).eval(), 0)
    return Policy(handle.base, AutoTokenizer.from_pretrained(TINY), handle, family)


# --- on a GPU -------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.filterwarnings("default")  # torchao's compiled step warns of its own tensors
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", DTYPES.values())
def test_on_a_gpu_steps_add_up_and_state_comes_back(name: str, dtype: torch.dtype) -> None:
    """Fused, compiled and host optimizers: small steps add up, and a restored one goes on bit for bit."""
    torch.manual_seed(0)

    def made() -> tuple[dict[str, nn.Parameter], torch.optim.Optimizer]:
        parameters = {"w": nn.Parameter(torch.full((64, 64), 0.02, dtype=dtype, device="cuda"))}
        return parameters, build_optimizer(parameters, settings(name))

    first, optimizer = made()
    shift = pushed(first["w"], optimizer)
    if name != "adamw-cpu" or dtype == torch.float32:
        assert shift == pytest.approx(-1.0e-4, rel=0.05)
    path = checkpoint.save(Path("run"), first, optimizer, checkpoint.State())
    second, other = made()
    checkpoint.restore(path, second, other)
    set_learning_rate(other, 1e-6)
    for parameters, own in ((first, optimizer), (second, other)):
        torch.manual_seed(3)
        pushed(parameters["w"], own, num=3)
    assert torch.equal(first["w"], second["w"])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.filterwarnings("default")  # torchao's compiled step warns of its own tensors
@pytest.mark.parametrize("name", NAMES)
def test_on_a_gpu_a_whole_run_is_applied(name: str) -> None:
    run = trained(steps=2, optim={"name": name}, execution={"device": "cuda"}, objective={"beta": 0.1})
    assert all(m["applied"] for m in metrics())
    assert {p.dtype for p in run.policy.trained().values()} == {torch.bfloat16}
    train({"steps": 3}, resume="run", rewards=[varied], quiet=True)
    assert len(metrics()) == 3
