"""Memory runs out at a chosen place of a run: the phase is done again in smaller pieces, and nothing else changes."""

from __future__ import annotations

import dataclasses
import gc
import importlib.util
import json
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tests.model.test_policy import close, gradients
from tests.run.test_loop import same_weights

from batches import collate
from shoestring import train
from shoestring.allocator import OutOfMemory
from shoestring.cli import main as cli
from shoestring.config.run import settle
from shoestring.errors import ConfigError
from shoestring.memory.plan import predict
from shoestring.model.load import ModelSettings
from shoestring.model.policy import Policy
from shoestring.objectives.loss import Objective
from shoestring.optimizers.adamw import AdamW
from shoestring.run import checkpoint, loading, loop, opening
from shoestring.run import preflight as budgets
from shoestring.run.loading import load_policy
from shoestring.samplers import SAMPLERS, Sampling
from shoestring.samplers.hf import HfEngine
from shoestring.training import micro_batching as pieces
from shoestring.training.update import backward
from shoestring.types import Credit, Group
from tiny import prompt, random_policy

NEEDS_TORCHAO = pytest.mark.skipif(importlib.util.find_spec("torchao") is None, reason="needs the extra full")

# Two updates with a KL term, so that a step has every kind of pass. Its eight completions make one wave and two
# micro-batches of four rows.
RUN: dict[str, Any] = {
    "algorithm": "grpo",
    "sampler": "hf",
    "adapter": {"layers": 2, "modules": ["q_proj", "v_proj"]},
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
    return [{key: value for key, value in line.items() if key not in ("seconds", "tokens_per_s")} for line in lines]


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


@pytest.fixture(scope="module", autouse=True)
def _quick_collection(begun: Path) -> Any:
    """Each halving collects garbage; what the libraries hold since the first run need not be looked at each time."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(scope="module", autouse=True)
def _rows_as_they_are() -> Any:
    """What is counted below is passes over padded rows."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Policy, "takes_trees", False)
        yield


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
    def watch(owner: Any, name: str, part: str) -> None:
        real = getattr(owner, name)

        def watched(session: Any, state: Any, *rest: Any) -> Any:
            fault.armed = part == fault.within and (part == "rehearse" or state.step == fault.step)
            try:
                return real(session, state, *rest)
            finally:
                fault.armed = False

        monkeypatch.setattr(owner, name, watched)

    watch(loop, "_step", "step")
    watch(loop, "_evaluate", "evaluate")
    watch(budgets, "rehearse", "rehearse")


def _watch_policy(monkeypatch: pytest.MonkeyPatch, fault: Fault) -> None:
    def watch(name: str) -> None:
        real = getattr(Policy, name)

        def watched(self: Policy, *args: Any) -> Any:
            found = real(self, *args)
            fault.at(name)
            return found

        monkeypatch.setattr(Policy, name, watched)

    for name in ("prefill", "decode_step", "logprobs"):
        watch(name)
    real_backward = torch.Tensor.backward

    def passed_back(self: torch.Tensor, *args: Any, **options: Any) -> None:
        real_backward(self, *args, **options)
        fault.at("backward")  # the gradients are in place already

    monkeypatch.setattr(torch.Tensor, "backward", passed_back)
    real_load = loading.load_policy

    def loaded(*args: Any, **options: Any) -> Policy:
        policy = real_load(*args, **options)
        parameters = list(policy.trained().values())

        def hook(grad: torch.Tensor) -> None:
            fault.at("inside backward")

        parameters[len(parameters) // 2].register_hook(hook)
        return policy

    monkeypatch.setattr(budgets, "load_policy", loaded)


def _watch_optimizer(monkeypatch: pytest.MonkeyPatch, fault: Fault) -> None:
    real_build = opening.build_optimizer

    def built(parameters: Any, settings: Any) -> torch.optim.Optimizer:
        optimizer = real_build(parameters, settings)
        real_step = optimizer.step

        def step() -> None:
            fault.at("before the optimizer's step")
            if fault.due("inside the optimizer's step"):  # half of the weights are done
                for parameter in list(parameters.values())[len(parameters) // 2 :]:
                    parameter.grad = None
                real_step()
                raise torch.OutOfMemoryError("planted inside the optimizer's step")
            real_step()
            fault.at("behind the optimizer's step")

        optimizer.step = step  # type: ignore[method-assign]
        return optimizer

    monkeypatch.setattr(opening, "build_optimizer", built)
    monkeypatch.setattr(pieces, "build_optimizer", built)  # for the rehearsal's own


# --- a fault in the middle of a run ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def begun(tmp_path_factory: pytest.TempPathFactory, _rows_as_they_are: None) -> Path:
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
def test_a_fault_in_sampling_halves_the_waves(
    name: str, begun: Path, faultless: Path, at_sizes: Any, plant: Any
) -> None:
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


@pytest.mark.parametrize(
    "fault", [SAMPLING["the second token"], TRAINING["the forward"]], ids=["waves", "micro-batches"]
)
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
    pytest.param(adapter, dtype, name, step, marks=NEEDS_TORCHAO if name == "adamw-8bit" else [])
    for adapter, dtype, steps in ((RUN["adapter"], "fp32", (1,)), ("none", "bf16", (0, 1)))
    for name in ("adamw", "adamw-8bit", "adamw-cpu")
    for step in steps
]


@pytest.mark.parametrize(("adapter", "dtype", "name", "step"), OPTIMIZERS)
def test_every_optimizer_is_put_back(adapter: Any, dtype: str, name: str, step: int, plant: Any) -> None:
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

# An adapter so small that the plan trains two rows at once within what sampling takes.
REHEARSING: dict[str, Any] = {
    "adapter": {"layers": 1, "modules": ["q_proj", "v_proj"]},
    "sampling": {"num_completions": 8},
    "execution": {"wave_tokens": 16 * 20, "micro_batch_tokens": 2 * 19},
}
REHEARSED = {
    "the prompts": Fault("prefill", within="rehearse"),
    "the last token": Fault("decode_step", within="rehearse"),
    "the forward": Fault("logprobs", within="rehearse"),
    "inside backward": Fault("inside backward", within="rehearse"),
    "inside the optimizer's step": Fault("inside the optimizer's step", within="rehearse"),
    "behind the optimizer's step": Fault("behind the optimizer's step", within="rehearse"),
}


@pytest.fixture(scope="module")
def rehearsed_at(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A run of a step that has given sizes from the start and no budget, so no rehearsal; its folder."""
    made: dict[Any, str] = {}

    def ran(wave: int, micro: int, on: bool) -> str:
        if (wave, micro) not in made:
            folder = made[wave, micro] = str(tmp_path_factory.mktemp("rehearsed") / "run")
            execution = {"wave_tokens": wave, "micro_batch_tokens": micro, "checkpointing": on}
            run(out=folder, steps=1, **{**REHEARSING, "execution": execution})
        return made[wave, micro]

    return ran


@pytest.mark.parametrize("name", REHEARSED)
def test_a_fault_in_the_rehearsal_leaves_no_trace_but_smaller_pieces(name: str, rehearsed_at: Any, plant: Any) -> None:
    """What comes after it is the run that has these sizes from the start."""
    fault = plant(dataclasses.replace(REHEARSED[name]))
    run(steps=1, memory="1GiB", **REHEARSING)
    assert fault.hits == 1
    found = sizes(metrics("run")[0])
    sampling = fault.place in ("prefill", "decode_step")
    assert found == ((8 * 20, 2 * 19, False) if sampling else (16 * 20, 19, False))
    other = rehearsed_at(*found)
    assert_same_tensors(tensors("run", 1), tensors(other, 1))
    assert metrics("run") == metrics(other)


@pytest.mark.parametrize(
    ("adapter", "dtype", "name"),
    [
        (REHEARSING["adapter"], "fp32", "adamw"),
        ("none", "bf16", "adamw"),
        pytest.param("none", "bf16", "adamw-8bit", marks=NEEDS_TORCHAO),
        ("none", "bf16", "adamw-cpu"),
    ],
    ids=str,
)
def test_a_rehearsal_changes_nothing(adapter: Any, dtype: str, name: str, plant: Any) -> None:
    """A run with a budget rehearses on any device; one with the same pieces and no budget does not on the CPU."""
    both = {**REHEARSING, "adapter": adapter, "model": {"dtype": dtype}, "optim": {"name": name}}
    both |= {"objective": {"beta": 0.0, "updates": 1}, "steps": 1} if adapter == "none" else {"steps": 2}
    seen = plant(Fault("backward", (), within="rehearse"))
    run(memory="1GiB", **both)
    wave, micro, on = sizes(metrics("run")[0])
    run(out="other", **{**both, "execution": {"wave_tokens": wave, "micro_batch_tokens": micro, "checkpointing": on}})
    assert seen.calls == 1
    assert metrics("run") == metrics("other")
    for file in Path("run/checkpoints").rglob("*.safetensors"):
        assert_same_tensors(load_file(file), load_file(Path("other", *file.parts[1:])))


def evaluations(folder: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in Path(folder, "evals.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("step", [0, 1])
def test_a_fault_in_an_evaluation_changes_none_of_its_figures(step: int, plant: Any) -> None:
    """What follows, a step or a resumed run, goes on in the smaller waves."""
    evaluated = {"eval_every": 1, "evaluation": {"num": 8}, "steps": 1, "objective": {"beta": 0.0, "updates": 1}}
    run(out="whole", **evaluated)
    fault = plant(Fault("decode_step", (3,), within="evaluate", step=step))
    run(**evaluated)
    assert fault.hits == 1
    assert evaluations("run") == evaluations("whole")
    train({"steps": 2}, resume="run", rewards=[varied], quiet=True)
    waves = [line["wave_tokens"] for line in metrics("run")]
    assert waves[1] <= 80
    assert waves[0] == (160 if step else waves[1])


# --- where nothing smaller is left ----------------------------------------------------------------------------------

SMALLEST = {
    "sampling": Fault("decode_step", None),
    "the prompts": Fault("prefill", None),
    "the forward": Fault("logprobs", None),
    "inside the optimizer's step": Fault("inside the optimizer's step", None),
}


@pytest.mark.parametrize("name", SMALLEST)
def test_the_smallest_piece_that_does_not_fit_ends_the_run_with_a_checkpoint(
    name: str, begun: Path, faultless: Path, plant: Any
) -> None:
    """In it are the weights before the step, and the run goes on from it as if nothing had been."""
    fault = plant(dataclasses.replace(SMALLEST[name]))
    with pytest.raises(OutOfMemory) as told:
        run(steps=2, save_every=0)  # so that it is the error that has it saved
    assert all((told.value.given, told.value.why, told.value.write))
    assert fault.hits >= 3  # the whole, a half, a quarter
    assert_same_tensors(tensors("run", 1), tensors(begun, 1))
    fault.numbers = ()
    resumed("run")
    assert_same_tensors(tensors("run", 2), tensors(faultless, 2))


def test_half_a_step_is_never_saved(plant: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where weights are too many to be copied, an error inside the optimizer's step leaves some of them changed."""
    monkeypatch.setattr(pieces, "_COPIED", 0)
    run(steps=1, out="one")
    plant(Fault("inside the optimizer's step", None, step=1))
    with pytest.raises(OutOfMemory, match="last checkpoint"):
        run(steps=2, save_every=0)
    if checkpoint.latest(Path("run")) is not None:
        assert_same_tensors(tensors("run", 1), tensors("one", 1))


@pytest.mark.parametrize("fused", [True, False])
def test_a_step_is_copied_where_memory_may_run_out_behind_its_first_change(fused: bool) -> None:
    """Not with one update of an optimizer that takes no memory, as the fused one on a GPU once its state is there."""
    policy = random_policy()
    optimizer = torch.optim.AdamW(policy.trained().values(), fused=fused)

    def copied(updates: int) -> bool:
        needed = updates > 1 or not AdamW().takes_no_memory(optimizer)
        with pieces.Snapshot.taken(policy, optimizer, copied=needed) as before:
            return bool(before._weights)

    assert copied(1)
    for parameter in policy.trained().values():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    assert copied(1) != fused
    assert copied(2)


def test_in_the_first_step_there_is_nothing_to_save_and_the_same_command_works_later(plant: Any) -> None:
    fault = plant(Fault("logprobs", None, step=0))
    with pytest.raises(OutOfMemory):
        run(steps=1)
    assert not Path("run").exists()
    fault.numbers = ()
    run(steps=1)


@pytest.mark.parametrize("place", ["logprobs", "decode_step"])
def test_the_command_line_tells_it_and_ends_with_2(
    place: str, plant: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    plant(Fault(place, None, step=0))
    arguments = [
        "sampler.name=hf",
        "sampling.num_prompts=2",
        "sampling.max_new_tokens=12",
        "sampling.temperature=1.5",
        "out=run",
    ]
    functions = 'rewards.functions=["test_recovery:varied"]'
    monkeypatch.setattr(sys, "argv", ["shoestring", "train", "--quiet", "steps=1", functions, *arguments])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 2
    said = capsys.readouterr()
    assert said.err.startswith("OutOfMemory: memory ran out while ")
    assert "Traceback" not in said.err
    assert said.out == ""


# --- recomputing layers as the last resort --------------------------------------------------------------------------


@pytest.fixture
def narrow(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Once "on", training fits only while layers are recomputed; "tokens" are those of the passes that fitted then."""
    found: dict[str, Any] = {"on": False, "tokens": []}
    real = Policy.logprobs

    def logprobs(self: Policy, batch: Any, temperature: float = 1.0) -> torch.Tensor:
        if found["on"] and torch.is_grad_enabled():
            if not self.base.model.layers[-1].gradient_checkpointing:
                raise torch.OutOfMemoryError("planted")
            found["tokens"].append(batch.input_ids.numel())
        return real(self, batch, temperature)

    monkeypatch.setattr(Policy, "logprobs", logprobs)
    return found


def test_layers_are_recomputed_where_a_single_row_does_not_fit(narrow: dict[str, Any]) -> None:
    """And micro-batches are as large as before, if they fit then."""
    narrow["on"] = True
    run(steps=1, execution={"checkpointing": "auto"})
    assert sizes(metrics("run")[0]) == (160, 76, True)
    assert json.loads(Path("run/checkpoints/step-1/state.json").read_text())["pieces"]["checkpointing"]
    narrow["on"] = False
    run(steps=1, out="other", execution={"checkpointing": True})
    assert metrics("run") == metrics("other")
    assert_same_tensors(tensors("run", 1), tensors("other", 1))


def test_layers_are_never_recomputed_where_the_setting_forbids_it(narrow: dict[str, Any]) -> None:
    narrow["on"] = True
    with pytest.raises(OutOfMemory, match=r"execution\.checkpointing = true"):
        run(steps=1, execution={"checkpointing": False})
    assert narrow["tokens"] == []


@pytest.mark.parametrize(("before", "after"), [(False, "auto"), ("auto", False)])
def test_a_resumed_run_recomputes_layers_if_its_new_setting_says_so(
    before: Any, after: Any, narrow: dict[str, Any]
) -> None:
    run(steps=1, execution={"checkpointing": before})
    narrow["on"] = True
    again = {"steps": 2, "execution": {"checkpointing": after}}
    if after == "auto":
        train(again, resume="run", rewards=[varied], quiet=True)
        assert metrics("run")[1]["checkpointing"]
    else:
        with pytest.raises(OutOfMemory):
            train(again, resume="run", rewards=[varied], quiet=True)


# --- every budget, one gradient -------------------------------------------------------------------------------------

BUDGETED: dict[str, Any] = {
    "adapter": {"rank": 4, "layers": 2},
    "sampling": {"num_prompts": 3, "num_completions": 8, "max_new_tokens": 12, "temperature": 1.5},
    "objective": {"beta": 0.04},
    "execution": {"device": "cpu"},
}


def plans(lengths: int) -> list[Any]:
    """Those of six budgets, from the least to one in which all fits, and of none."""
    least, most = (predict({**BUDGETED, **m}, prompt_tokens=lengths) for m in ({"memory": "1MiB"}, {"memory": "1GiB"}))
    chosen = [least.smallest + (most.peak - least.smallest) * i // 5 for i in range(6)]
    found = [predict({**BUDGETED, "memory": f"{size}B"}, prompt_tokens=lengths) for size in chosen]
    return [*found, predict(BUDGETED, prompt_tokens=lengths)]


@pytest.fixture(scope="module")
def policy() -> Policy:
    adapter = settle(BUDGETED).adapter
    policy = load_policy(ModelSettings(), adapter=adapter, device="cpu")
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in policy.trained().items():
            if "lora_B" in name:
                parameter.normal_(std=0.02)
    return policy


PROMPTS = [prompt(length, seed=length) for length in (6, 9, 7)]


def test_every_budget_gives_the_same_gradient(policy: Policy) -> None:
    """From the same completions and credits, to 1e-5, in the micro-batches of each plan."""
    settled = settle(BUDGETED)
    groups, credits = _step_of(policy, settled)
    objective = Objective(beta=0.04, clip_low=0.2, clip_high=0.2, updates=1, l2=0.0)

    def gradient(max_tokens: int, on: bool) -> tuple[dict[str, torch.Tensor], int]:
        batches = collate(groups, credits, beta=0.04, max_tokens=max_tokens)
        old: list[Any] = [None] * len(batches)
        for parameter in policy.trained().values():
            parameter.grad = None
        for index in range(len(batches)):
            backward(policy, batches, index, old, objective, 1.5, on)
        return gradients(policy), len(batches)

    whole, one = gradient(10**6, False)
    assert one == 1
    assert max(float(value.abs().max()) for value in whole.values()) > 1e-2
    tried = {(plan.micro_batch, plan.sizes.checkpointing) for plan in plans(9)}
    assert len(tried) >= 4
    for micro, on in sorted(tried):
        close(gradient(micro, on)[0], whole, atol=1e-5)


def _step_of(policy: Policy, settled: Any) -> tuple[list[Group], list[Credit]]:
    from shoestring.types import Score

    found = SAMPLERS["hf"]().open(policy).sample(PROMPTS, num=8, sampling=settled.sampling, seed=3)
    groups = [
        Group(p, completions, tuple(Score(float(sum(c.token_ids) % 5), {}) for c in completions))
        for p, completions in zip(PROMPTS, found, strict=True)
    ]
    return groups, [settled.algorithm.credit(group, torch.Generator().manual_seed(0)) for group in groups]


def test_every_budget_samples_the_same_tokens(policy: Policy) -> None:
    sampling = Sampling(max_new_tokens=12, temperature=1.5)
    waves = {plan.wave_tokens for plan in plans(9)} | {45, 63, 200}
    assert len(waves) >= 5

    def tokens(wave: int | None) -> list[Any]:
        found = SAMPLERS["hf"]().open(policy, wave).sample(PROMPTS, num=8, sampling=sampling, seed=3)
        return [[completion.token_ids for completion in group] for group in found]

    whole = tokens(None)
    assert all(tokens(wave) == whole for wave in waves)


def test_an_engine_that_fails_to_take_the_weights_loses_no_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """By then the step is done, and it is saved as such."""
    settings = config(steps=3, objective={"beta": 0.0, "updates": 1}, save_every=0)
    train({**settings, "out": "whole"}, rewards=[varied], quiet=True)
    real, told = HfEngine.sync, []

    def sync(self: HfEngine, policy: Policy) -> None:
        told.append(True)
        if len(told) == 2:
            raise OSError("the engine is gone")
        real(self, policy)

    monkeypatch.setattr(HfEngine, "sync", sync)
    with pytest.raises(OSError, match="gone"):
        train(settings, rewards=[varied], quiet=True)
    assert checkpoint.steps_done(Path("run")) == 2
    train(resume="run", rewards=[varied], quiet=True)
    assert metrics("run") == metrics("whole")
    assert same_weights("run", "whole")


def test_replayed_problems_keep_what_json_cannot_hold(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(".")
    Path("dated.py").write_text(
        """
import datetime
from typing import Literal
from shoestring.tasks.base import Asking
from shoestring.types import Problem, Score

class Dated(Asking):
    name: str = "dated:Dated"
    format: Literal["chat", "plain"] = "plain"

    def problems(self, split):
        return [Problem(str(i), f"{i}*7=", str(7 * i), {"by": {3: datetime.date(2026, 1, i)}}) for i in range(10, 30)]

    def score(self, problem, text):
        return Score(float((sum(map(ord, text)) + problem.meta["by"][3].day) % 11))

    def vote(self, text):
        return None

    def solution(self, problem):
        return None
"""
    )
    settings = config(
        task="dated:Dated", algorithm={"name": "t-spmo", "replay_from": "both"}, objective={"beta": 0.0}, steps=4
    )
    train({**settings, "out": "whole"}, quiet=True)
    train({**settings, "steps": 2}, quiet=True)
    state = json.loads(Path("run/checkpoints/step-2/state.json").read_text())
    assert state["replays"]
    assert set(state["replays"][0]) == {"id", "answer", "token_ids", "answer_start"}
    shutil.copytree("run", "changed")
    train({"steps": 4}, resume="run", quiet=True)
    assert metrics("run") == metrics("whole")
    assert same_weights("run", "whole")
    Path("dated.py").write_text(Path("dated.py").read_text().replace("range(10, 30)", "range(30, 31)"))
    monkeypatch.delitem(sys.modules, "dated")
    with pytest.raises(ConfigError, match="which the task no longer has"):
        train({"steps": 4}, resume="changed", quiet=True)
