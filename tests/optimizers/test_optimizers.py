"""The optimizers: a contract over the table, worked numbers of the papers, and runs that are resumed."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from shoestring import ConfigError, sft, train
from shoestring.adapters import ADAPTERS
from shoestring.config.files import dump
from shoestring.config.run import load, settle
from shoestring.memory.plan import predict
from shoestring.memory.work import trained_sizes
from shoestring.model.shapes import shape_of
from shoestring.optimizers import OPTIMIZERS
from shoestring.optimizers.base import (
    OptimSettings,
    TrainedParameter,
    TrainedSizes,
    load_state,
    set_learning_rate,
    state_of,
    trained_parameters,
)
from shoestring.optimizers.galore import projector
from shoestring.training import micro_batching
from shoestring.training.update import build_optimizer
from tiny import random_model

NEEDS_TORCHAO = pytest.mark.skipif(importlib.util.find_spec("torchao") is None, reason="needs the extra full")
NAMES = [pytest.param(name, marks=NEEDS_TORCHAO if name == "adamw-8bit" else []) for name in OPTIMIZERS]
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
# Under two numbered layers, a matrix that is tall and one that is wide; outside, an embedding and a vector.
WHOLE = {
    "embed.weight": (32, 128),
    "layers.0.tall.weight": (128, 64),
    "layers.1.wide.weight": (64, 128),
    "norm.weight": (4096,),
}
LORA = {"layers.0.q.lora_A.default.weight": (16, 256), "layers.0.q.lora_B.default.weight": (256, 16)}
WHOLE_MODEL = ADAPTERS["none"]()
SETTINGS: dict[str, dict[str, Any]] = {"galore": {"rank": 4, "update_every": 2}, "lora-plus": {"ratio": 4.0}}


def settings(name: str, **changes: Any) -> OptimSettings:
    return OPTIMIZERS[name](**{"lr": 1e-2, "weight_decay": 0.1, **SETTINGS.get(name, {}), **changes})


def parameters_of(name: str, dtype: torch.dtype = torch.float32) -> dict[str, nn.Parameter]:
    torch.manual_seed(0)
    shapes = LORA if name == "lora-plus" else WHOLE
    return {key: nn.Parameter(torch.randn(shape).to(dtype)) for key, shape in shapes.items()}


def step(parameters: Mapping[str, nn.Parameter], optimizer: torch.optim.Optimizer, number: int) -> None:
    """One step along a gradient that the number gives."""
    torch.manual_seed(number)
    set_learning_rate(optimizer, 1e-2 / number)
    for parameter in parameters.values():
        parameter.grad = torch.randn(parameter.shape).to(parameter.dtype)
    optimizer.step()
    optimizer.zero_grad()


def assert_same_states(
    first: tuple[Mapping[str, nn.Parameter], torch.optim.Optimizer],
    second: tuple[Mapping[str, nn.Parameter], torch.optim.Optimizer],
) -> None:
    """Weights and the whole state, bit for bit."""
    (ours, our_values), (theirs, their_values) = (state_of(own, parameters) for parameters, own in (first, second))
    assert our_values == their_values
    for left, right in ((first[0], second[0]), (ours, theirs)):
        assert left.keys() == right.keys()
        assert not [key for key in left if not torch.equal(left[key], right[key])]


# --- the contract ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_an_entry_is_one_file_whose_settings_say_its_name_and_are_frozen(name: str) -> None:
    own = OPTIMIZERS[name]()
    assert own.name == name
    assert issubclass(OPTIMIZERS[name], OptimSettings)
    assert type(own).__module__ == "shoestring.optimizers." + name.replace("-", "_")
    with pytest.raises(Exception, match="frozen"):
        own.lr = 1.0


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_state_that_went_through_files_goes_the_same_way(name: str, dtype: str) -> None:
    """Two steps, files, a fresh optimizer, two more steps: bit for bit those of one optimizer."""
    first = parameters_of(name, DTYPES[dtype])
    optimizer = build_optimizer(first, settings(name))
    for number in (1, 2):
        step(first, optimizer, number)
    tensors, values = state_of(optimizer, first)
    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, "state.safetensors")
    Path("state.json").write_text(json.dumps(values))
    second = {key: nn.Parameter(parameter.detach().clone()) for key, parameter in first.items()}
    other = build_optimizer(second, settings(name))
    load_state(other, second, load_file("state.safetensors"), json.loads(Path("state.json").read_text()))
    for number in (3, 4):
        assert_same_states((first, optimizer), (second, other))
        step(first, optimizer, number)
        step(second, other, number)
    assert_same_states((first, optimizer), (second, other))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("before", [0, 1])
def test_a_state_is_put_back_as_it_was(name: str, before: int) -> None:
    """After a step that is undone, whether or not there was a state; tensors of before stay where they lie."""
    first, second = parameters_of(name), parameters_of(name)
    optimizer, other = build_optimizer(first, settings(name)), build_optimizer(second, settings(name))
    for parameters, own in ((first, optimizer), (second, other)):
        for _ in range(before):
            step(parameters, own, 1)
    policy: Any = SimpleNamespace(trained=lambda: first, handle=None)
    with micro_batching.Snapshot.taken(policy, optimizer, copied=True) as snapshot:
        held = [tensor.data_ptr() for tensor in state_of(optimizer, first)[0].values()]
        step(first, optimizer, 2)
        set_learning_rate(optimizer, 1e-2)
        snapshot.restore()
        set_learning_rate(other, 1e-2)
        assert_same_states((first, optimizer), (second, other))
        if before and name != "galore":  # whose projector is a new tensor
            assert held == [tensor.data_ptr() for tensor in state_of(optimizer, first)[0].values()]
        for number in (2, 3):
            step(first, optimizer, number)
            step(second, other, number)
    assert_same_states((first, optimizer), (second, other))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_rehearsed_step_leaves_no_trace(name: str, dtype: str) -> None:
    """Its weights stay, and the three steps after it are those of a run without it. Its state is a real one."""
    first, second = parameters_of(name, DTYPES[dtype]), parameters_of(name, DTYPES[dtype])
    config: Any = SimpleNamespace(optim=settings(name))
    optimizer, other = build_optimizer(first, config.optim), build_optimizer(second, config.optim)
    spare = micro_batching.Spare(first, config)
    spare.step()
    rehearsed, real = state_of(spare.optimizer, first)[0], parameters_of(name, DTYPES[dtype])
    assert_same_states((first, optimizer), (second, other))
    for number in (1, 2, 3):
        step(first, optimizer, number)
        step(second, other, number)
        assert_same_states((first, optimizer), (second, other))
    step(real, fresh := build_optimizer(real, config.optim), 1)
    assert {key: t.nbytes for key, t in rehearsed.items()} == {k: t.nbytes for k, t in state_of(fresh, real)[0].items()}


def sizes_of(parameters: Mapping[str, nn.Parameter]) -> TrainedSizes:
    trained = trained_parameters(parameters)
    matrices = [tuple(each.parameter.shape) for each in trained if each.is_matrix and each.role == "weight"]
    others = [tuple(each.parameter.shape) for each in trained if not (each.is_matrix and each.role == "weight")]
    return TrainedSizes(matrices, others, 4, whole=bool(matrices), gpu=False)


def state_bytes(optimizer: torch.optim.Optimizer, parameters: Mapping[str, nn.Parameter]) -> int:
    """Those of the tensors, without counters, lookup tables and rates."""
    return sum(
        tensor.nbytes
        for key, tensor in state_of(optimizer, parameters)[0].items()
        if tensor.ndim and not key.endswith(".qmap")
    )


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_plan_knows_the_bytes_of_the_state(name: str, dtype: str) -> None:
    parameters = parameters_of(name, DTYPES[dtype])
    own = settings(name)
    optimizer = build_optimizer(parameters, own)
    step(parameters, optimizer, 1)
    found = state_bytes(optimizer, parameters)
    if name == "adamw-cpu":  # with a copy of the weights, on the host
        found -= 12 * sum(parameter.numel() for parameter in parameters.values())
    assert own.state_bytes(sizes_of(parameters)) == found


@pytest.mark.parametrize("family", ["qwen2", "gemma2", "phi3"])
@pytest.mark.parametrize("name", ["adamw", "sgd", "lion", "galore"])
def test_the_plan_knows_the_bytes_of_a_whole_models_state(name: str, family: str) -> None:
    """From its config alone."""
    model: Any = WHOLE_MODEL.attach(random_model(family), 0).model
    parameters = dict(model.named_parameters())
    own = settings(name)
    optimizer = build_optimizer(parameters, own)
    step(parameters, optimizer, 1)
    shape = shape_of(model.config.to_dict())
    sizes = trained_sizes(shape, WHOLE_MODEL.cost(shape), 4, gpu=False)
    assert own.state_bytes(sizes) == state_bytes(optimizer, parameters)


@pytest.mark.parametrize("name", NAMES)
def test_every_rate_is_the_one_that_is_set_times_the_groups_own(name: str) -> None:
    optimizer = build_optimizer(parameters_of(name), settings(name))
    set_learning_rate(optimizer, 0.5)
    assert [float(group["lr"]) for group in optimizer.param_groups] == (
        [0.5, 2.0] if name == "lora-plus" else [0.5] * len(optimizer.param_groups)
    )


@pytest.mark.parametrize("name", ["sgd", "lion", "galore"])
def test_small_steps_of_bf16_weights_add_up(name: str) -> None:
    """4096 weights of 0.02 and 100 steps of 1e-6: the mean moves by -1e-4, though no step reaches a neighbour of 0.02.
    Of GaLore's step of 8e-6 along the first singular vector each weight has an eighth."""
    torch.manual_seed(0)
    weight = nn.Parameter(torch.full((64, 64), 0.02, dtype=torch.bfloat16))
    start = weight[0, 0].item()
    changes = {
        "sgd": {"momentum": 0.0, "lr": 1e-3},
        "lion": {"lr": 1e-6},
        "galore": {"lr": 8e-6, "scale": 1.0, "rank": 1},
    }
    own = settings(name, **{"weight_decay": 0.0, **changes[name]})
    optimizer = build_optimizer({"layers.0.weight": weight}, own)
    for _ in range(100):
        weight.grad = torch.full_like(weight, 1e-3)
        optimizer.step()
    assert float((weight.detach().double() - start).mean()) == pytest.approx(-1e-4, rel=0.06)


def test_a_weight_without_anything_in_its_state_is_put_back_so() -> None:
    parameters = parameters_of("sgd")
    optimizer = build_optimizer(parameters, settings("sgd", momentum=0.0))
    step(parameters, optimizer, 1)
    before = state_of(optimizer, parameters)
    load_state(optimizer, parameters, *before)
    assert state_of(optimizer, parameters) == before == ({}, before[1])
    assert settings("sgd", momentum=0.0).state_bytes(sizes_of(parameters)) == 0


@pytest.mark.parametrize("name", ["sgd", "lion"])
def test_tiles_change_nothing(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, cut = parameters_of(name), parameters_of(name)
    for number in (1, 2):
        step(whole, own := build_optimizer(whole, settings(name)), number)
    monkeypatch.setattr("shoestring.optimizers.rounding.TILE", 100)
    for number in (1, 2):
        step(cut, other := build_optimizer(cut, settings(name)), number)
    assert_same_states((whole, own), (cut, other))


# --- states of any kind ---------------------------------------------------------------------------------------------


class Hoarder(torch.optim.Optimizer):
    """Holds whatever an optimizer may: nested dicts, lists, tuples, texts and numbers, of a weight and of a group."""

    def __init__(self, parameters: Any):
        super().__init__(parameters, {"lr": 1.0, "steps": 0, "limits": (0.5, None), "seen": {}})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            group["steps"] += 1
            group["seen"] = {"norms": [*group["seen"].get("norms", []), 0.1 * group["steps"]], 3: torch.float16}
            for parameter in group["params"]:
                state = self.state[parameter]
                state.setdefault("inner", {"ages": [torch.zeros(2)], "on": True, "word": "x"})
                state["inner"]["ages"][0] += parameter.grad
                parameter -= state["inner"]["ages"][0] * group["steps"]


def test_a_state_may_hold_anything_that_has_a_form_in_files() -> None:
    first, second = ({"a": nn.Parameter(torch.ones(2))} for _ in range(2))
    optimizer, other = Hoarder(first.values()), Hoarder(second.values())
    step(first, optimizer, 1)
    tensors, values = state_of(optimizer, first)
    assert list(tensors) == ["a:inner.ages.0"]
    kept = {key: tensor.clone() for key, tensor in tensors.items()}
    second["a"].data.copy_(first["a"])
    load_state(other, second, kept, json.loads(json.dumps(values)))
    assert other.param_groups[0]["seen"] == {"norms": [0.1], 3: torch.float16}
    assert other.param_groups[0]["limits"] == (0.5, None)
    for number in (2, 3):
        step(first, optimizer, number)
        step(second, other, number)
    assert_same_states((first, optimizer), (second, other))
    assert torch.equal(kept["a:inner.ages.0"], tensors["a:inner.ages.0"]) is False  # none is shared


def test_what_has_no_form_in_files_is_refused() -> None:
    parameters = {"a": nn.Parameter(torch.ones(2))}
    optimizer = Hoarder(parameters.values())
    optimizer.param_groups[0]["seen"] = object()
    with pytest.raises(ConfigError, match=r"holds a object \(groups:0:seen\)"):
        state_of(optimizer, parameters)


def test_a_state_of_other_groups_and_classes_from_anywhere_are_refused() -> None:
    parameters = {"a": nn.Parameter(torch.ones(2)), "b": nn.Parameter(torch.ones(2))}
    tensors, values = state_of(Hoarder(parameters.values()), parameters)
    with pytest.raises(ValueError, match="other weights"):
        load_state(Hoarder([parameters["a"]]), parameters, tensors, values)
    values["groups"][0]["settings"]["seen"] = {"quantised": "os:system", "parts": {}, "context": []}
    with pytest.raises(ValueError, match="no class of torchao"):
        load_state(Hoarder(parameters.values()), parameters, tensors, values)


# --- the numbers of the papers --------------------------------------------------------------------------------------


def moved(own: OptimSettings, start: Tensor, *grads: Tensor, name: str = "layers.0.weight") -> list[Tensor]:
    """The weight behind each step."""
    weight, found = nn.Parameter(start.clone()), []
    optimizer = own.build([TrainedParameter(name, weight)])
    for grad in grads:
        weight.grad = grad
        optimizer.step()
        found.append(weight.detach().clone())
    return found


def test_lion_moves_by_the_sign_of_two_averages() -> None:
    """c = 0.9 m + 0.1 g moves the weight, m = 0.99 m + 0.01 g is kept: behind g = (1, -2) it is (0.01, -0.02). With
    g = (-0.05, 0.1) then, c = (0.004, -0.008): the old direction still; with g = (-0.2, 0.4), c = (-0.011, 0.022)."""
    start = torch.tensor([1.0, 1.0])
    once, kept = moved(
        settings("lion", lr=0.1, weight_decay=0.5), start, torch.tensor([1.0, -2.0]), torch.tensor([-0.05, 0.1])
    )
    assert once.tolist() == pytest.approx([0.95 - 0.1, 0.95 + 0.1])
    assert kept.tolist() == pytest.approx([0.85 * 0.95 - 0.1, 1.05 * 0.95 + 0.1])
    _, turned = moved(
        settings("lion", lr=0.1, weight_decay=0.0), start, torch.tensor([1.0, -2.0]), torch.tensor([-0.2, 0.4])
    )
    assert turned.tolist() == pytest.approx([1.0, 1.0])


def test_sgd_is_torchs() -> None:
    torch.manual_seed(0)
    start, grads = torch.randn(5, 3), [torch.randn(5, 3) for _ in range(4)]
    weight = nn.Parameter(start.clone())
    theirs = torch.optim.SGD([weight], lr=0.1, momentum=0.9, weight_decay=0.1)
    for found, grad in zip(moved(settings("sgd", lr=0.1), start, *grads), grads, strict=True):
        weight.grad = grad
        theirs.step()
        torch.testing.assert_close(found, weight.detach(), atol=1e-6, rtol=0)


def test_lora_plus_is_adamw_with_two_rates() -> None:
    """The first step of AdamW moves every weight by its rate: A by 0.01, B by 4 times that, as do the later ones."""
    ours, theirs = parameters_of("lora-plus"), parameters_of("lora-plus")
    before = {key: parameter.detach().clone() for key, parameter in ours.items()}
    optimizer = build_optimizer(ours, settings("lora-plus", weight_decay=0.0, ratio=4.0))
    singles = {
        name: torch.optim.AdamW([parameter], lr=1.0, betas=(0.9, 0.99), eps=1e-8, weight_decay=0.0)
        for name, parameter in theirs.items()
    }
    for number in (1, 2):
        step(ours, optimizer, number)
        torch.manual_seed(number)
        for name, parameter in theirs.items():
            singles[name].param_groups[0]["lr"] = 1e-2 / number * (4 if "lora_B" in name else 1)
            parameter.grad = torch.randn(parameter.shape)
            singles[name].step()
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)
        if number == 1:
            a, b = (float((ours[name].detach() - before[name]).abs().mean()) for name in LORA)
            assert (a, b) == (pytest.approx(0.01, rel=1e-4), pytest.approx(0.04, rel=1e-4))


def test_roles_and_partners_come_from_the_names() -> None:
    a, b = trained_parameters(parameters_of("lora-plus"))
    assert (a.role, a.partner, b.role, b.partner) == ("A", b.name, "B", a.name)
    whole = trained_parameters(parameters_of("galore"))
    assert {each.role for each in whole} == {"weight"}
    assert [each.is_matrix for each in whole] == [False, True, True, False]


GALORE = {"lr": 0.1, "weight_decay": 0.0, "eps": 1e-6, "rank": 1, "scale": 0.25, "update_every": 200}


@pytest.mark.parametrize("wide", [False, True])
def test_galore_moves_within_the_subspace_of_the_first_gradient(wide: bool) -> None:
    """The numbers of methods/memory.md, 3.1; for a wide matrix all of it is transposed."""
    grads = [torch.tensor([[3.0, 0.0], [0.0, 1.0], [0.0, 0.0]]), torch.tensor([[0.0, 2.0], [1.0, 0.0], [0.0, 0.0]])]
    turn = (lambda x: x.T.contiguous()) if wide else (lambda x: x)
    first, second = moved(settings("galore", **GALORE), turn(torch.zeros(3, 2)), *map(turn, grads))
    torch.testing.assert_close(turn(first), torch.tensor([[-0.025, 0], [0, 0], [0, 0]]), atol=1e-6, rtol=0)
    torch.testing.assert_close(turn(second), torch.tensor([[-0.041751, 0], [-0.018603, 0], [0, 0]]), atol=1e-6, rtol=0)


def test_galore_of_full_rank_on_a_diagonal_gradient_is_adam() -> None:
    """With eps = 0, whose place in the formula is another; and with the decay at the end of the step."""
    grads = [torch.diag(torch.tensor([3.0, 2.0, 1.0])) * factor for factor in (1.0, -0.5, 2.0)]
    full = {"lr": 0.1, "weight_decay": 0.0, "eps": 1e-30, "rank": 3, "scale": 1.0, "betas": (0.9, 0.99)}
    ours = moved(settings("galore", **full), torch.zeros(3, 3), *grads)[-1].diagonal()
    theirs = moved(settings("adamw", lr=0.1, weight_decay=0.0), torch.zeros(3, 3), *grads)[-1].diagonal()
    torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=0)


@pytest.mark.parametrize("shape", [(6, 4), (4, 6)])
def test_galores_projector_is_orthonormal_and_spans_the_gradient(shape: tuple[int, int]) -> None:
    torch.manual_seed(0)
    grad = torch.randn(shape[0], 2) @ torch.randn(2, shape[1])
    p = projector(grad, 2)
    tall = shape[0] > shape[1]
    rows = p if tall else p.T
    torch.testing.assert_close(rows @ rows.T, torch.eye(2), atol=1e-5, rtol=0)
    torch.testing.assert_close(grad @ p.T @ p if tall else p @ (p.T @ grad), grad, atol=1e-5, rtol=0)
    assert p.untyped_storage().nbytes() == p.nbytes  # it does not hold all of the decomposition


def test_galore_takes_no_subspace_from_a_gradient_of_0() -> None:
    """At the start it waits; later it keeps the old one until there is a gradient."""
    zero, x, y = torch.zeros(3, 2), torch.zeros(3, 2), torch.zeros(3, 2)
    x[0, 0], y[0, 1] = 1.0, 1.0
    weight = nn.Parameter(torch.zeros(3, 2))
    optimizer = settings("galore", **{**GALORE, "update_every": 2}).build([TrainedParameter("layers.0.weight", weight)])
    seen = []
    for grad in (zero, x, x, zero, y, zero):
        weight.grad = grad
        optimizer.step()
        held = optimizer.state[weight].get("projector")
        seen.append(None if held is None else held.abs().tolist()[0])
    assert seen == [None, [1, 0], [1, 0], [1, 0], [0, 1], [0, 1]]


# --- settings and runs ----------------------------------------------------------------------------------------------


def test_a_bare_name_and_a_table_without_one_are_enough() -> None:
    assert settle({}).optim == OPTIMIZERS["adamw"](lr=3e-4, betas=(0.9, 0.99), eps=1e-8, warmup_steps=5)
    assert settle({"optim": {"lr": 1.0}}).optim == OPTIMIZERS["adamw"](lr=1.0)
    assert settle({"optim": "lion"}).optim == OPTIMIZERS["lion"]()
    assert load(None, ["optim=sgd", "optim.momentum=0.5"]).optim == OPTIMIZERS["sgd"](momentum=0.5)
    Path("back.toml").write_text(dump(settle({"optim": {"name": "sgd", "momentum": 0.5}})))
    assert load("back.toml").optim == OPTIMIZERS["sgd"](momentum=0.5)


def test_another_optimizer_keeps_what_both_have() -> None:
    Path("recipe.toml").write_text("[optim]\nlr = 0.5\nbetas = [0.8, 0.9]\neps = 1e-6\n")
    assert load("recipe.toml", ["optim.name=lion"]).optim == OPTIMIZERS["lion"](lr=0.5, betas=(0.8, 0.9))
    Path("recipe.toml").write_text("[optim]\nlr = 0.5\nmomentun = 0.5\n")
    with pytest.raises(ConfigError, match=r'"optim.momentun" is set.*did you mean "momentum"'):
        load("recipe.toml", ["optim.name=sgd"])


@pytest.mark.parametrize(("name", "adapter"), [("lora-plus", "none"), ("galore", "lora")])
def test_an_optimizer_of_other_weights_is_refused_before_the_model_loads(name: str, adapter: str) -> None:
    both = {"optim": name, "adapter": adapter, "model": "./nowhere"}
    with pytest.raises(ConfigError, match=f'optim.name is "{name}"'):
        settle(both)
    with pytest.raises(ConfigError, match=f'optim.name is "{name}"'):
        sft(both)


RUN: dict[str, Any] = {
    "algorithm": "grpo",
    "sampling": {"num_prompts": 2, "num_completions": 4, "max_new_tokens": 12, "temperature": 1.5},
    "execution": {"micro_batch_tokens": 4096, "checkpointing": False},
    "save_every": 2,
    "steps": 4,
}
RUNS: dict[str, dict[str, Any]] = {
    "sgd": {"optim": {"name": "sgd", "warmup_steps": 2}},
    "lion": {"optim": {"name": "lion"}},
    "lora-plus": {"optim": {"name": "lora-plus"}},
    "galore": {
        "adapter": "none",
        "model": {"dtype": "bf16"},
        "optim": {"name": "galore", "rank": 4, "update_every": 3, "warmup_steps": 0},
    },
    "from outside": {"optim": {"name": "mine_signed:Signed", "factor": 2.0}},
}
MINE = '''
import torch

from shoestring.optimizers.lion import Lion


class Signed(Lion):
    """A class of one's own."""

    name: str
    factor: float = 1.0
'''


def varied(completions: list[Any], **others: Any) -> list[float]:
    """Rewards that differ within every group."""
    return [float(sum(map(ord, completion[0]["content"])) % 11) for completion in completions]


def saved(folder: str) -> dict[str, Any]:
    at = Path(folder, "checkpoints", "step-4")
    both = {**load_file(at / "weights.safetensors"), **load_file(at / "optimizer.safetensors")}
    return {**{key: tensor.tolist() for key, tensor in both.items()}, "": (at / "optimizer.json").read_text()}


@pytest.mark.parametrize("name", RUNS)
def test_a_run_that_is_resumed_is_the_one_that_never_stopped(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """And a run with a budget, which is rehearsed at both of its starts, is the one without."""
    Path("mine_signed.py").write_text(MINE)
    monkeypatch.syspath_prepend(".")
    whole = {**RUN, **RUNS[name]}
    train({**whole, "out": "whole"}, rewards=[varied], quiet=True)
    for folder, more in (("halves", {}), ("rehearsed", {"memory": "1GiB"})):
        train({**whole, **more, "out": folder, "steps": 2}, rewards=[varied], quiet=True)
        train({"steps": 4}, resume=folder, rewards=[varied], quiet=True)
        assert saved(folder) == saved("whole")


def test_the_plan_counts_the_state() -> None:
    whole = {"adapter": "none", "sampling": {"max_new_tokens": 16}}
    peaks = {
        name: {part.phase: part.bytes for part in predict({**whole, "optim": {"name": name, **more}}).phases}
        for name, more in {"adamw": {}, "lion": {}, "galore": {"rank": 4}}.items()
    }
    held = {name: phases["adapter, gradient and optimizer"] for name, phases in peaks.items()}
    assert held["galore"] < held["adamw"]
    assert held["lion"] < held["adamw"]
    changes = {change.change for change in predict({**whole, "optim": "galore"}).alternatives}
    assert 'adapter.name = "lora", optim.name = "adamw"' in changes  # since GaLore is for whole weights
