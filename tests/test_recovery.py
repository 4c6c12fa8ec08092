"""Memory runs out at a chosen place of a run: the phase is done again in smaller pieces, and nothing else changes."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import shutil
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from shoestring import budgets, checkpoint, cli, loop, pieces, train
from shoestring.batch import collate
from shoestring.config import settle
from shoestring.loss import Objective
from shoestring.memory import OutOfMemory
from shoestring.models import ModelSettings
from shoestring.optim import backward
from shoestring.plan import predict
from shoestring.policy import Policy, load_policy
from shoestring.samplers import SAMPLERS, Sampling
from shoestring.types import Credit, Group
from test_policy import close, gradients
from tiny import prompt

NEEDS_TORCHAO = pytest.mark.skipif(importlib.util.find_spec("torchao") is None, reason="needs the extra full")

# Two updates with a KL term, so that a step has every kind of pass. Its eight completions make one wave and two
# micro-batches of four rows.
RUN: dict[str, Any] = {
    "algorithm": "grpo",
    "objective": {"beta": 0.04, "updates": 2},
    "save_every": 1,
    "sampling": {"num_prompts": 2, "num_completions": 4, "max_new_tokens": 12, "temperature": 1.5},
    "optim": {"lr": 1e-3, "warmup_steps": 0},
    "execution": {"wave_tokens": 160, "micro_batch_tokens": 76, "checkpointing": False},
}


def config(**changes: Any) -> dict[str, Any]:
    merged = {**RUN, "out": "run"}
    for key, value in changes.items():
        both = isinstance(value, Mapping) and isinstance(merged.get(key), Mapping)
        merged[key] = {**merged[key], **value} if both else value
    return merged


def varied(completions: list[Any], **others: Any) -> list[float]:
    """Rewards that differ within every group."""
    return [float(sum(map(ord, completion[0]["content"])) % 11) for completion in completions]


def run(**changes: Any) -> Any:
    return train(config(**changes), rewards=[varied], quiet=True)


def resumed(folder: str, steps: int = 2) -> Any:
    return train({"steps": steps}, resume=folder, rewards=[varied], quiet=True)


def metrics(folder: str | Path) -> list[dict[str, Any]]:
    """The metrics without what a clock says."""
    lines = [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key != "seconds"} for line in lines]


def tensors(folder: str | Path, step: int) -> dict[str, torch.Tensor]:
    """Weights and optimizer state behind so many steps."""
    at = Path(folder) / "checkpoints" / f"step-{step}"
    return {**load_file(at / "weights.safetensors"), **load_file(at / "optimizer.safetensors")}


def assert_same_tensors(first: Mapping[str, torch.Tensor], second: Mapping[str, torch.Tensor]) -> None:
    assert first.keys() == second.keys()
    assert not [name for name in first if not torch.equal(first[name], second[name])]


def assert_same_runs(first: str, second: str) -> None:
    """Bit for bit: metrics and samples, and what is saved behind the second step."""
    assert metrics(first) == metrics(second)
    assert len(metrics(first)) == 2
    assert Path(first, "samples.jsonl").read_text() == Path(second, "samples.jsonl").read_text()
    assert_same_tensors(tensors(first, 2), tensors(second, 2))
    states = [json.loads(Path(f, "checkpoints/step-2/state.json").read_text()) for f in (first, second)]
    assert states[0] == states[1]


# --- the injector ---------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Fault:
    """Raises at the calls of these numbers (None: at all) of one place, counted inside one part of the run."""

    place: str
    numbers: tuple[int, ...] | None = (1,)
    within: str = "step"
    step: int = 1
    armed: bool = False
    calls: int = 0
    hits: int = 0

    def due(self, place: str) -> bool:
        if not self.armed or place != self.place:
            return False
        self.calls += 1
        hit = self.numbers is None or self.calls in self.numbers
        self.hits += hit
        return hit

    def at(self, place: str) -> None:
        if self.due(place):
            raise torch.OutOfMemoryError(f"planted in {place}")


@pytest.fixture
def plant(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Plants one fault; to be called once."""

    def planted(fault: Fault) -> Fault:
        _watch_parts(monkeypatch, fault)
        _watch_policy(monkeypatch, fault)
        _watch_optimizer(monkeypatch, fault)
        return fault

    return planted


def _watch_parts(monkeypatch: pytest.MonkeyPatch, fault: Fault) -> None:
    for owner, name, part in ((loop, "_step", "step"), (loop, "_evaluate", "evaluate"), (budgets, "rehearse", "rehearse")):

        def watched(session: Any, state: Any, *rest: Any, real: Any = getattr(owner, name), part: str = part) -> Any:
            fault.armed = part == fault.within and (part == "rehearse" or state.step == fault.step)
            try:
                return real(session, state, *rest)
            finally:
                fault.armed = False

        monkeypatch.setattr(owner, name, watched)


def _watch_policy(monkeypatch: pytest.MonkeyPatch, fault: Fault) -> None:
    for name in ("prefill", "decode_step", "logprobs"):

        def watched(self: Policy, *args: Any, real: Any = getattr(Policy, name), name: str = name) -> Any:
            found = real(self, *args)
            fault.at(name)
            return found

        monkeypatch.setattr(Policy, name, watched)
    real_backward = torch.Tensor.backward

    def passed_back(self: torch.Tensor, *args: Any, **options: Any) -> None:
        real_backward(self, *args, **options)
        fault.at("backward")  # the gradients are in place already

    monkeypatch.setattr(torch.Tensor, "backward", passed_back)
    real_load = loop.load_policy

    def loaded(*args: Any, **options: Any) -> Policy:
        policy = real_load(*args, **options)
        parameters = list(policy.trained().values())

        def hook(grad: torch.Tensor) -> None:
            fault.at("inside backward")

        parameters[len(parameters) // 2].register_hook(hook)
        return policy

    monkeypatch.setattr(loop, "load_policy", loaded)


def _watch_optimizer(monkeypatch: pytest.MonkeyPatch, fault: Fault) -> None:
    real_build = loop.build_optimizer

    def built(parameters: Any, settings: Any) -> torch.optim.Optimizer:
        parameters = list(parameters)
        optimizer = real_build(parameters, settings)
        real_step = optimizer.step

        def step() -> None:
            fault.at("before the optimizer's step")
            if fault.due("inside the optimizer's step"):  # half of the weights are done
                for parameter in parameters[len(parameters) // 2 :]:
                    parameter.grad = None
                real_step()
                raise torch.OutOfMemoryError("planted inside the optimizer's step")
            real_step()
            fault.at("behind the optimizer's step")

        optimizer.step = step  # type: ignore[method-assign]
        return optimizer

    monkeypatch.setattr(loop, "build_optimizer", built)


# --- a fault in the middle of a run ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def begun(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of one step, to be copied and gone on with."""
    folder = tmp_path_factory.mktemp("begun") / "run"
    run(out=str(folder), steps=1)
    return folder


@pytest.fixture(scope="module")
def faultless(begun: Path) -> Path:
    """The same run, gone on with to its end without a fault."""
    folder = begun.parent / "faultless"
    shutil.copytree(begun, folder)
    resumed(str(folder))
    return folder


def lowered(folder: str, step: int, wave_tokens: int, micro_batch_tokens: int, checkpointing: bool) -> None:
    """Has a run go on from a checkpoint in pieces of these sizes, as if it had found them there."""
    path = Path(folder, f"checkpoints/step-{step}/state.json")
    state = json.loads(path.read_text())
    state["wave_tokens"] = wave_tokens
    state["pieces"].update(micro_batch_tokens=micro_batch_tokens, checkpointing=checkpointing)
    path.write_text(json.dumps(state))


@pytest.fixture(scope="module")
def at_sizes(begun: Path) -> Any:
    """Goes on behind the first step in pieces of given sizes, without any fault; the run's folder."""
    made: dict[Any, str] = {}

    def gone_on(*sizes: Any) -> str:
        if sizes not in made:
            folder = made[sizes] = str(begun.parent / f"at-{len(made)}")
            shutil.copytree(begun, folder)
            lowered(folder, 1, *sizes)
            resumed(folder)
        return made[sizes]

    return gone_on


def sizes(line: Mapping[str, Any]) -> tuple[int, int, bool]:
    return line["wave_tokens"], line["micro_batch_tokens"], line["checkpointing"]


SAMPLING = {
    "the prompts": Fault("prefill"),
    "the prompts, in the next try too": Fault("prefill", (1, 2)),
    "the prompts of the second wave of the second try": Fault("prefill", (1, 3)),
    "the second token": Fault("decode_step"),
    "a token in the middle": Fault("decode_step", (7,)),
}
TRAINING = {
    "the reference's forward": Fault("logprobs"),
    "the forward": Fault("logprobs", (2,)),
    "the forward of the second micro-batch": Fault("logprobs", (4,)),
    "the forward of the second update": Fault("logprobs", (6,)),
    "inside backward": Fault("inside backward"),
    "behind backward of the second micro-batch": Fault("backward", (2,)),
    "behind backward of the second update": Fault("backward", (3,)),
    "before the optimizer's step": Fault("before the optimizer's step"),
    "inside the optimizer's step": Fault("inside the optimizer's step"),
    "behind the optimizer's step": Fault("behind the optimizer's step"),
    "inside the optimizer's step of the second update": Fault("inside the optimizer's step", (2,)),
    "inside the optimizer's step, in the next try too": Fault("inside the optimizer's step", (1, 2)),
}


def test_the_run_has_a_wave_two_micro_batches_and_two_updates(faultless: Path, begun: Path) -> None:
    """What the numbers of the planted calls stand on."""
    lines = metrics(faultless)
    assert all(line["applied"] and line["groups_with_signal"] == 2 for line in lines)
    assert {sizes(line) for line in lines} == {sizes(metrics(begun)[0])}
    assert sizes(lines[0]) == (8 * 20, 4 * 19, False)
    assert all(4 * 17 < line["tokens_run"] / 2 <= 4 * 19 for line in lines)


@pytest.mark.parametrize("name", SAMPLING)
def test_a_fault_in_sampling_halves_the_waves(name: str, begun: Path, faultless: Path, at_sizes: Any, plant: Any) -> None:
    fault = plant(dataclasses.replace(SAMPLING[name]))
    shutil.copytree(begun, "run")
    resumed("run")
    assert fault.hits == len(fault.numbers)
    whole, smaller = map(sizes, metrics("run"))
    assert whole == sizes(metrics(faultless)[1])
    assert whole[0] // 2**fault.hits >= smaller[0] > whole[0] // 2**fault.hits * 0.8
    assert smaller[1:] == whole[1:]
    assert_same_runs("run", at_sizes(*smaller))


@pytest.mark.parametrize("name", TRAINING)
def test_a_fault_in_training_halves_the_micro_batches_and_undoes_the_step(
    name: str, begun: Path, faultless: Path, at_sizes: Any, plant: Any
) -> None:
    """Bit for bit what the step gives at that size from the start: weights, optimizer state and metrics."""
    fault = plant(dataclasses.replace(TRAINING[name]))
    shutil.copytree(begun, "run")
    resumed("run")
    assert fault.hits == len(fault.numbers)
    whole, smaller = map(sizes, metrics("run"))
    assert whole == sizes(metrics(faultless)[1])
    assert smaller == (whole[0], whole[1] // 2**fault.hits, False)
    assert_same_runs("run", at_sizes(*smaller))


def test_the_pieces_matter_to_the_last_bit(faultless: Path, at_sizes: Any) -> None:
    """Else the comparisons above would show nothing: other micro-batches round otherwise."""
    wave, micro, _ = sizes(metrics(faultless)[0])
    other = tensors(at_sizes(wave, micro // 2, False), 2)
    assert any(not torch.equal(value, other[name]) for name, value in tensors(faultless, 2).items())
    close(tensors(faultless, 2), other, atol=1e-4)


@pytest.mark.parametrize("fault", [SAMPLING["the second token"], TRAINING["the forward"]], ids=["waves", "micro-batches"])
def test_what_fits_is_remembered_across_a_stop(fault: Fault, begun: Path, plant: Any) -> None:
    fault = plant(dataclasses.replace(fault))
    shutil.copytree(begun, "run")
    resumed("run", steps=3)
    resumed("run", steps=4)
    whole, *smaller = map(sizes, metrics("run"))
    assert smaller == [smaller[0]] * 3 != [whole] * 3
    assert fault.hits == 1


def test_another_plan_sets_the_sizes_anew(begun: Path, plant: Any) -> None:
    plant(Fault("logprobs"))
    shutil.copytree(begun, "run")
    resumed("run")
    train({"steps": 3, "execution": {"micro_batch_tokens": 60}}, resume="run", rewards=[varied], quiet=True)
    assert [line["micro_batch_tokens"] for line in metrics("run")] == [4 * 19, 2 * 19, 3 * 19]


def test_a_fault_in_the_first_step_of_a_run(plant: Any) -> None:
    """Before it there is no optimizer state to go back to."""
    fault = plant(Fault("inside the optimizer's step", step=0))
    run(steps=2)
    assert fault.hits == 1
    micro = metrics("run")[0]["micro_batch_tokens"]
    assert micro == 38
    run(steps=2, out="small", execution={"micro_batch_tokens": micro})
    assert_same_tensors(tensors("run", 2), tensors("small", 2))
    assert metrics("run") == metrics("small")


SMALL = 4 * 20, 2 * 19, False  # the four completions of a prompt, two to a micro-batch
OPTIMIZERS = [
    pytest.param(adapter, dtype, name, marks=NEEDS_TORCHAO if name == "adamw-8bit" else [])
    for adapter, dtype in (("lora", "fp32"), ("none", "bf16"))
    for name in ("adamw", "adamw-8bit", "adamw-cpu")
]


@pytest.mark.parametrize(("adapter", "dtype", "name"), OPTIMIZERS)
@pytest.mark.parametrize("step", [0, 1])
def test_every_optimizer_is_put_back(adapter: str, dtype: str, name: str, step: int, plant: Any) -> None:
    """Its state as it was, or gone where there was none; rounding by chance draws the same numbers again."""
    both: dict[str, Any] = {
        "adapter": adapter,
        "model": {"dtype": dtype},
        "optim": {"name": name},
        "objective": {"beta": 0.0, "updates": 1},
        "sampling": {"num_prompts": 1},
    }
    if step:
        run(out="small", steps=1, **both)
        shutil.copytree("small", "run")
        lowered("small", 1, *SMALL)
        resumed("small", steps=2)
        fault = plant(Fault("inside the optimizer's step"))
        resumed("run", steps=2)
    else:
        run(out="small", steps=1, **both, execution={"micro_batch_tokens": SMALL[1]})
        fault = plant(Fault("inside the optimizer's step", step=0))
        run(steps=1, **both)
    assert fault.hits == 1
    assert sizes(metrics("run")[-1]) == SMALL
    assert metrics("run") == metrics("small")
    assert_same_tensors(tensors("run", step + 1), tensors("small", step + 1))


# --- the rehearsal and the evaluations ------------------------------------------------------------------------------

REHEARSED = {
    "sampling": Fault("decode_step", within="rehearse"),
    "the forward": Fault("logprobs", within="rehearse"),
    "backward": Fault("backward", within="rehearse"),
    "inside backward": Fault("inside backward", within="rehearse"),
    "before the optimizer's step": Fault("before the optimizer's step", within="rehearse"),
    "inside the optimizer's step": Fault("inside the optimizer's step", within="rehearse"),
    "behind the optimizer's step": Fault("behind the optimizer's step", within="rehearse"),
}


@pytest.mark.parametrize("name", REHEARSED)
def test_a_fault_in_the_rehearsal_leaves_no_trace_but_smaller_pieces(name: str, plant: Any) -> None:
    """What comes after it is the run that has these sizes from the start."""
    fault = plant(dataclasses.replace(REHEARSED[name]))
    run(steps=1, memory="1GiB", execution=WITHIN)
    assert fault.hits == 1
    [line] = metrics("run")
    wave, micro, _ = planned = settled(memory="1GiB", execution=WITHIN)
    assert sizes(line) == ((wave // 2, micro, False) if name == "sampling" else (wave, micro // 2, False))
    _run_at(sizes(line), planned, steps=1)
    assert metrics("run") == metrics("other")
    assert_same_tensors(tensors("run", 1), tensors("other", 1))


@pytest.mark.parametrize(
    ("adapter", "dtype", "name"),
    [
        ("lora", "fp32", "adamw"),
        ("none", "bf16", "adamw"),
        pytest.param("none", "bf16", "adamw-8bit", marks=NEEDS_TORCHAO),
        ("none", "bf16", "adamw-cpu"),
    ],
)
def test_a_rehearsal_changes_nothing(adapter: str, dtype: str, name: str, plant: Any) -> None:
    """A run with a budget rehearses on any device; one with the same pieces and no budget does not on the CPU."""
    both: dict[str, Any] = {
        "adapter": {**ADAPTER, "name": "lora"} if adapter == "lora" else "none",
        "model": {"dtype": dtype},
        "optim": {"name": name},
        "objective": {"beta": 0.0},
        "execution": WITHIN,
    }
    seen = plant(Fault("backward", (), within="rehearse"))
    run(steps=2, memory="1GiB", **both)
    assert seen.calls == 1
    wave, micro, on = sizes(metrics("run")[0])
    run(
        out="other",
        steps=2,
        **{**both, "execution": {"wave_tokens": wave, "micro_batch_tokens": micro, "checkpointing": on}},
    )
    assert seen.calls == 1
    assert metrics("run") == metrics("other")
    assert_same_tensors(tensors("run", 2), tensors("other", 2))


def evaluations(folder: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in Path(folder, "evals.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("step", [0, 1])
def test_a_fault_in_an_evaluation_changes_none_of_its_figures(step: int, plant: Any) -> None:
    """What follows, a step or a resumed run, goes on in the smaller waves."""
    evaluated = {"eval_every": 1, "evaluation": {"num": 8}, "steps": 1}
    run(out="whole", **evaluated)
    fault = plant(Fault("decode_step", (3,), within="evaluate", step=step))
    run(**evaluated)
    assert fault.hits == 1
    assert evaluations("run") == evaluations("whole")
    resumed("run")
    waves = [line["wave_tokens"] for line in metrics("run")]
    assert waves[1] <= 80
    assert waves[0] == (160 if step else waves[1])


# --- where nothing smaller is left ----------------------------------------------------------------------------------

SMALLEST = {
    "sampling": Fault("decode_step", None),
    "the prompts": Fault("prefill", None),
    "the forward": Fault("logprobs", None),
    "behind backward": Fault("backward", None),
    "inside the optimizer's step": Fault("inside the optimizer's step", None),
}


@pytest.mark.parametrize("name", SMALLEST)
def test_the_smallest_piece_that_does_not_fit_ends_the_run_with_a_checkpoint(
    name: str, begun: Path, faultless: Path, plant: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The weights in it are those before the step, and it can be gone on from as if nothing had been."""
    run(steps=1, save_every=0)
    shutil.rmtree("run/checkpoints/step-1")  # so that it is the error that saves it
    shutil.copytree(begun / "checkpoints/step-1", "run/checkpoints/step-1")
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "save", _into("run/after", checkpoint.save))
        fault = plant(dataclasses.replace(SMALLEST[name]))
        with pytest.raises(OutOfMemory, match="smaller|lower"):
            resumed("run")
    assert fault.hits >= 3
    assert_same_tensors(tensors("run/after", 1), tensors(begun, 1))
    fault.numbers = ()
    resumed("run")
    assert_same_tensors(tensors("run", 2), tensors(faultless, 2))


def _into(folder: str, real: Any) -> Any:
    return lambda _, *rest: real(Path(folder), *rest)
