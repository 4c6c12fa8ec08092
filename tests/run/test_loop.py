"""The loop, end to end, on the embedded model: what it leaves behind, how it stops, and that it resumes exactly."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from shoestring import ConfigError, DataError, train
from shoestring.errors import NonFiniteError
from shoestring.model.policy import Policy
from shoestring.model.sampling import Sampling
from shoestring.rollout.prompts import order
from shoestring.run import checkpoint as checkpoints
from shoestring.run import folder as runs
from shoestring.run import loop
from shoestring.run.checkpoint import prune
from shoestring.run.locks import locked
from shoestring.run.messages import where_it_lies
from shoestring.samplers.hf import HfEngine
from shoestring.types import Completion

SMALL: dict[str, Any] = {
    "steps": 4,
    "save_every": 2,
    "sampling": {"num_prompts": 3, "num_completions": 4, "max_new_tokens": 24},
    "optim": {"lr": 1e-3},
}


def config(**changes: Any) -> dict[str, Any]:
    merged = {**SMALL, "out": "run"}
    for key, value in changes.items():
        both = isinstance(value, Mapping) and isinstance(merged.get(key), Mapping)
        merged[key] = {**merged[key], **value} if both else value
    return merged


def metrics(folder: str | Path = "run") -> list[dict[str, Any]]:
    """The metrics without what a clock or a device says."""
    lines = [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in ("seconds", "tokens_per_s", "peak_bytes")} for line in lines]


def weights(folder: str | Path) -> dict[str, torch.Tensor]:
    return load_file(Path(folder) / "adapter" / "adapter_model.safetensors")


def same_weights(a: str, b: str) -> bool:
    first, second = weights(a), weights(b)
    return first.keys() == second.keys() and all(torch.equal(first[k], second[k]) for k in first)


ALGORITHMS: dict[str, dict[str, Any]] = {
    "grpo": {"algorithm": {"name": "grpo"}, "objective": {"beta": 0.04, "updates": 2}},
    "s-grpo": {"algorithm": {"name": "s-grpo", "alpha": 4, "k": 8}},
    "t-spmo": {"algorithm": {"name": "t-spmo", "replay_from": "both", "replay_completions": 3}},
    "entropy-filter": {"algorithm": {"name": "entropy-filter"}},
}


@pytest.mark.parametrize("name", ALGORITHMS)
def test_a_stopped_run_goes_on_as_if_it_had_never_stopped(name: str) -> None:
    """Bit for bit on the CPU: metrics, samples and weights."""
    train(config(out="whole", **ALGORITHMS[name]), quiet=True)
    train(config(out="parts", steps=2, **ALGORITHMS[name]), quiet=True)
    train({"steps": 4}, resume="parts", quiet=True)
    assert metrics("whole") == metrics("parts")
    assert Path("whole/samples.jsonl").read_text() == Path("parts/samples.jsonl").read_text()
    assert same_weights("whole", "parts")
    assert len(metrics("whole")) == 4


def test_a_killed_run_goes_on_from_its_last_checkpoint() -> None:
    """Steps behind the checkpoint are done again, and a torn last line does no harm."""
    train(config(out="whole"), quiet=True)
    train(config(out="killed", steps=3), quiet=True)
    for path in Path("killed/checkpoints").glob("step-3"):
        path.rename(path.with_name(".draft-step-3"))  # as if the kill had come while it was written
    with open("killed/metrics.jsonl", "a") as file:
        file.write('{"step": 3, "rew')
    train({"steps": 4}, resume="killed", quiet=True)
    assert metrics("killed") == metrics("whole")
    assert same_weights("killed", "whole")


@pytest.mark.parametrize("sampler", ["hf", "graph"])
def test_entropy_filter_trains_on_the_share_that_it_selects(sampler: str) -> None:
    """Every group's, as the samples show; the entropies themselves leave no trace in the config."""
    run = train(config(steps=2, algorithm={"name": "entropy-filter", "fraction": 0.3}, sampler=sampler), quiet=True)
    samples = [json.loads(line) for line in Path("run/samples.jsonl").read_text().splitlines()]
    for place in range(0, len(samples), 4):
        group = samples[place : place + 4]
        assert len({sample["problem"] for sample in group}) == 1
        assert sum(len(s["credit"]) for s in group) == round(0.3 * sum(s["tokens"] for s in group))
    assert any(report.tokens_trained for report in run.reports)
    assert "entropy =" not in Path("run/config.toml").read_text()


def test_an_algorithm_that_needs_entropies_refuses_a_sampler_without(monkeypatch: pytest.MonkeyPatch) -> None:
    def without(self: HfEngine, *arguments: Any, sampling: Sampling, **others: Any) -> list[tuple[Completion, ...]]:
        return sample(self, *arguments, sampling=sampling.model_copy(update={"entropy": False}), **others)

    sample = HfEngine.sample
    monkeypatch.setattr(HfEngine, "sample", without)
    with pytest.raises(ConfigError, match="the sampler gave 0 entropies"):
        train(config(algorithm="entropy-filter", sampler="hf"), quiet=True)
    assert not Path("run").exists()


def test_what_a_run_leaves_behind() -> None:
    run = train(config(eval_every=2, evaluation={"num": 10}), quiet=True)
    names = {path.name for path in run.folder.iterdir()}
    assert names == {"adapter", "checkpoints", "config.toml", "evals.jsonl", "metrics.jsonl", "samples.jsonl"}
    assert sorted(p.name for p in (run.folder / "checkpoints").iterdir()) == ["step-2", "step-4"]
    assert not list(run.folder.rglob("*.bin")) + list(run.folder.rglob("*.pt")) + list(run.folder.rglob("*.pkl"))
    assert [json.loads(line)["step"] for line in Path("run/evals.jsonl").read_text().splitlines()] == [0, 2, 4]
    samples = [json.loads(line) for line in Path("run/samples.jsonl").read_text().splitlines()]
    assert len(samples) == 4 * 3 * 4
    assert {"step", "problem", "text", "score", "credit", "stop"} <= samples[0].keys()
    assert sum(len(s["credit"]) for s in samples) >= sum(m["tokens_trained"] for m in metrics())
    assert len(run.reports) == 4


def test_the_adapter_loads_with_plain_peft_and_the_base_is_untouched() -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    from shoestring.model.structure import quiet_peft
    from tiny import TINY

    run = train(config(), quiet=True)
    base = AutoModelForCausalLM.from_pretrained(TINY)
    ids = torch.tensor([[260, 17, 18, 9, 30]])
    bare = base(input_ids=ids).logits
    with quiet_peft():
        loaded = PeftModel.from_pretrained(base, str(run.adapter)).eval()
    assert torch.equal(loaded(input_ids=ids).logits, run.policy.base(input_ids=ids).logits)
    assert not torch.equal(loaded(input_ids=ids).logits, bare)
    assert all(key.startswith("base_model.model.model.layers.") for key in weights(run.folder))
    with run.policy.reference():
        assert torch.equal(run.policy.base(input_ids=ids).logits, bare)


def test_micro_batches_change_a_run_by_rounding_only() -> None:
    train(config(out="one", steps=1), quiet=True)
    train(config(out="many", steps=1, execution={"micro_batch_tokens": 1, "checkpointing": True}), quiet=True)
    one, many = metrics("one")[0], metrics("many")[0]
    assert one["grad_norm"] == pytest.approx(many["grad_norm"], abs=1e-6)
    assert one["tokens_trained"] == many["tokens_trained"]


@pytest.mark.parametrize(
    ("change", "told"), [({"steps": 2}, "has done 4"), ({"steps": 8, "memory": "1MiB"}, "memory is 1.0 MiB")]
)
def test_a_refused_resume_leaves_the_run_as_it_was(change: dict[str, Any], told: str) -> None:
    train(config(optim={"schedule": "constant"}), quiet=True)
    before = Path("run/config.toml").read_text()
    with pytest.raises(ConfigError, match=told):
        train(change, resume="run", quiet=True)
    assert Path("run/config.toml").read_text() == before
    train({"steps": 5}, resume="run", quiet=True)
    assert "steps = 5" in Path("run/config.toml").read_text()
    assert len(metrics()) == 5


def test_a_run_is_one_processs_at_a_time() -> None:
    train(config(steps=1), quiet=True)
    with locked(Path("run")), pytest.raises(ConfigError, match="another process is at it"):
        train({"steps": 2}, resume="run", quiet=True)
    train({"steps": 2}, resume="run", quiet=True)


def test_python_rewards_with_weights_have_a_plan(capsys: pytest.CaptureFixture[str]) -> None:
    train(config(rewards={"weights": [1.0, 0.2]}, memory="1GiB", steps=1), rewards=["task", varied])
    assert "predicted" in capsys.readouterr().out


def test_old_checkpoints_go_and_the_run_ends_alike() -> None:
    every = config(steps=6, save_every=1, eval_every=1, evaluation={"num": 20, "keep": "best"})
    for out, limit in (("all", None), ("few", 2)):
        train(
            {key: value for key, value in {**every, "out": out, "save_total_limit": limit}.items() if value}, quiet=True
        )
    assert len(list(Path("all/checkpoints").iterdir())) == 6
    assert sorted(path.name for path in Path("few/checkpoints").iterdir()) == ["step-5", "step-6"]
    assert same_weights("all", "few")


def test_best_weights_stay_as_long_as_a_checkpoint_refers_to_them() -> None:
    for step, best in ((2, 0), (4, 4), (6, 4), (8, 8)):
        for path in (Path(f"run/checkpoints/step-{step}"), Path(f"run/best/step-{best}")):
            path.mkdir(parents=True, exist_ok=True)
        Path(f"run/checkpoints/step-{step}/state.json").write_text(json.dumps({"best_step": best}))

    def left() -> list[str]:
        return sorted(str(path.relative_to("run")) for path in Path("run").glob("*/*"))

    prune(Path("run"), 2)
    assert left() == ["best/step-4", "best/step-8", "checkpoints/step-6", "checkpoints/step-8"]
    prune(Path("run"), 1)
    assert left() == ["best/step-8", "checkpoints/step-8"]
    prune(Path("run"), 1)
    assert left() == ["best/step-8", "checkpoints/step-8"]


@pytest.fixture
def planted(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Makes log-probs not finite from a given call on, the way a broken forward would; {"at", "calls", "value"}."""
    plan: dict[str, Any] = {"at": 10**9, "until": 10**9, "calls": 0, "value": float("nan")}
    real = Policy.logprobs

    def broken(self: Policy, batch: Any, temperature: float = 1.0) -> torch.Tensor:
        plan["calls"] += 1
        found = real(self, batch, temperature)
        hit = plan["at"] <= plan["calls"] < plan["until"]
        return found * torch.where(batch.row == 0, plan["value"], 1.0) if hit else found

    monkeypatch.setattr(Policy, "logprobs", broken)
    return plan


def varied(completions: list[Any], **others: Any) -> list[float]:
    """Rewards that differ within every group."""
    return [float(sum(map(ord, completion[0]["content"])) % 11) for completion in completions]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_step_that_is_not_finite_is_never_applied(planted: dict[str, Any], value: float) -> None:
    """The weights and the optimizer after it are those before it, and the run says which problem it was."""
    train(config(out="before", steps=1, save_every=1), rewards=[varied], quiet=True)
    planted.update(at=2, value=value, calls=0)
    with pytest.raises(NonFiniteError, match="multiplication-") as caught:
        train(config(steps=8, save_every=1), rewards=[varied], quiet=True)
    assert "not finite" in str(caught.value)
    done = metrics()
    assert [m["applied"] for m in done] == [True, False, False, False]
    for name in ("weights.safetensors", "optimizer.safetensors"):
        first, last = (
            load_file(f"{folder}/{name}") for folder in ("before/checkpoints/step-1", "run/checkpoints/step-4")
        )
        assert all(torch.equal(first[key], last[key]) for key in first)


def test_a_single_step_that_is_not_finite_is_skipped_and_the_run_goes_on(
    planted: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    planted.update(at=1, until=6)  # the first step's one pass, and the search for its cause in its one group of four
    train(config(steps=3), rewards=[varied])
    assert [m["applied"] for m in metrics()] == [False, True, True]
    assert "Step 0 was not applied" in capsys.readouterr().err


def test_extreme_ratios_stay_finite() -> None:
    """Several updates at an absurd rate: the ratio is held in bounds, the clip acts, and every step is applied."""
    train(config(optim={"lr": 1.0}, objective={"updates": 4, "beta": 0.1}), quiet=True)
    assert all(m["applied"] or not m["tokens_trained"] for m in metrics())
    assert max(m["clip_fraction"] for m in metrics()) > 0


def short_answers(completions: list[Any], **others: Any) -> list[float]:
    return [-float(len(completion[0]["content"])) for completion in completions]


def test_rewards_of_ones_own_and_rows_of_ones_own() -> None:
    rows = [{"prompt": f"{a}*3=", "topic": "times"} for a in range(10, 30)]
    task = {"name": "multiplication", "digits": [2, 2], "system": "Be quick."}  # what any rows can have is kept
    run = train(config(steps=2, task=task), rewards=[short_answers], data=rows, quiet=True)
    assert run.config.task.system == "Be quick."
    assert run.config.task.name.startswith("file:")
    assert all(m["reward"] < 0 for m in metrics())
    train({"steps": 3}, resume="run", rewards=[short_answers], quiet=True)
    assert len(metrics()) == 3


def test_nothing_to_learn_is_a_fact_and_no_error(capsys: pytest.CaptureFixture[str]) -> None:
    run = train(config(steps=2), rewards=[lambda completions, **others: [0.0] * len(completions)])
    assert [(m["groups_with_signal"], m["tokens_trained"], m["applied"]) for m in metrics()] == [(0, 0, False)] * 2
    assert "scored 0" in capsys.readouterr().err
    assert run.adapter.is_dir()


def test_what_all_functions_pass_over_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    train(config(steps=1), rewards=[lambda completions, **others: [None] * len(completions)])
    told = capsys.readouterr().err
    assert "none of the 12 completions of the first step got a reward" in told
    assert "scored 0" not in told


def test_rewards_and_lengths_of_a_step_are_those_of_its_samples() -> None:
    train(config(steps=2), rewards=[short_answers], quiet=True)
    samples = [json.loads(line) for line in Path("run/samples.jsonl").read_text().splitlines()]
    for line in metrics():
        own = [s for s in samples if s["step"] == line["step"]]
        lengths, scores = [s["tokens"] for s in own], torch.tensor([s["score"] for s in own]).double()
        assert line["length_mean"] == sum(lengths) / len(lengths)
        assert line["length_max"] == max(lengths)
        assert line["reward_std"] == pytest.approx(scores.view(3, 4).std(1).mean().item())
        assert line["reward_std"] > 0


def test_the_best_adapter_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """Evaluations of 0.2, 0.9 and 0.5: the adapter of the second is the run's."""
    import dataclasses

    from shoestring.run import loop

    found = iter([0.2, 0.9, 0.5])
    real = loop.evaluate
    monkeypatch.setattr(loop, "evaluate", lambda *a: dataclasses.replace(real(*a), accuracy=next(found)))
    train(config(eval_every=2, evaluation={"num": 5, "keep": "best"}), quiet=True)
    kept = weights("run")
    at_2 = load_file("run/checkpoints/step-2/weights.safetensors")
    assert all(torch.equal(value, at_2[key.replace(".weight", ".default.weight")]) for key, value in kept.items())


def test_a_mistake_leaves_no_folder_behind_so_that_the_same_command_works_once_it_is_mended() -> None:
    with pytest.raises(ConfigError):
        train(config(rewards={"functions": ["nowhere.module:f"]}), quiet=True)
    assert not Path("run").exists()
    train(config(steps=1), quiet=True)


def test_ctrl_c_in_python_ends_what_comes_after_the_run_too(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []

    def pressed(completions: list[Any], **others: Any) -> list[float]:
        asked.append(1)
        if len(asked) == 2:
            signal.raise_signal(signal.SIGINT)
        return varied(completions)

    with pytest.raises(KeyboardInterrupt):
        train(config(save_every=0), rewards=[pressed], quiet=True)
    assert "2 steps are saved; to go on: train(resume='run', rewards=[...])" in capsys.readouterr().err
    assert checkpoints.steps_done(Path("run")) == 2
    assert len(train(resume="run", rewards=[pressed], quiet=True).reports) == 4


def test_the_config_of_a_run_from_python_is_told_so() -> None:
    train(config(steps=1), rewards=[varied], quiet=True)
    with pytest.raises(ConfigError, match=r"Python functions varied.*train\(\.\.\., rewards=\[\.\.\.\]\)"):
        train("run/config.toml", quiet=True)


def test_a_run_with_python_rewards_is_not_resumed_without_them_or_with_others() -> None:
    train(config(steps=1), rewards=[short_answers], quiet=True)
    with pytest.raises(ConfigError, match="varied"):
        train({"steps": 2}, resume="run", rewards=[varied], quiet=True)
    with pytest.raises(ConfigError, match="leave data out"):
        train({"steps": 2}, resume="run", rewards=[short_answers], data=[{"prompt": "1"}], quiet=True)
    with pytest.raises(ConfigError, match="short_answers"):
        train({"steps": 2}, resume="run", quiet=True)


def test_a_scorer_that_raises_stops_the_run_with_a_checkpoint_to_go_on_from(
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Going on after the mend gives what a run without the fault gives."""
    fails = {"at": 3, "calls": 0}

    def fragile(completions: list[Any], **others: Any) -> list[float]:
        fails["calls"] += 1
        if fails["calls"] == fails["at"]:
            raise KeyError("a bug of the user's own")
        return varied(completions)

    with pytest.raises(DataError, match="fragile"):
        train(config(save_every=0), rewards=[fragile], quiet=True)
    assert "to go on: train(resume='run', rewards=[...])" in capsys.readouterr().err
    assert len(metrics()) == 2
    train(resume="run", rewards=[fragile], quiet=True)
    train(config(out="whole"), rewards=[varied], quiet=True)
    assert metrics() == [
        {**m, "reward_parts": {k.replace("varied", "fragile"): v for k, v in m["reward_parts"].items()}}
        for m in metrics("whole")
    ]


@pytest.mark.parametrize("error", [SystemExit(130), MemoryError()], ids=["a second Ctrl-C", "out of memory"])
def test_whatever_ends_a_step_before_its_update_loses_no_step(
    error: BaseException, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []

    def interrupted(engine: HfEngine, *args: Any, **kwargs: Any) -> Any:
        asked.append(1)
        if len(asked) == 3:
            raise error
        return sample(engine, *args, **kwargs)

    sample = HfEngine.sample
    monkeypatch.setattr(HfEngine, "sample", interrupted)
    with pytest.raises(type(error)):
        train(config(sampler="hf", save_every=0), quiet=True)
    assert checkpoints.steps_done(Path("run")) == 2
    assert "2 steps are saved; to go on: " in capsys.readouterr().err
    assert len(train(resume="run", quiet=True).reports) == 4


def test_an_error_in_saving_does_not_hide_the_one_before(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []

    def fragile(completions: list[Any], **others: Any) -> list[float]:
        asked.append(1)
        if len(asked) == 3:
            monkeypatch.setattr(checkpoints, "save", full)
            raise KeyError("gold")
        return varied(completions)

    def full(*args: Any) -> None:
        raise OSError("no space left")

    with pytest.raises(DataError, match="gold"):
        train(config(save_every=0), rewards=[fragile], quiet=True)
    assert "2 steps are done and cannot be saved: no space left" in capsys.readouterr().err


def test_a_second_signal_while_the_run_is_saved_at_its_end_loses_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []

    def interrupted(*args: Any) -> Path:
        asked.append(1)
        if len(asked) == 1:
            raise SystemExit(130)
        return save(*args)

    save = checkpoints.save
    monkeypatch.setattr(checkpoints, "save", interrupted)
    with pytest.raises(SystemExit):
        train(config(save_every=0), quiet=True)
    assert checkpoints.steps_done(Path("run")) == 4


@pytest.mark.parametrize(
    ("file", "content"),
    [("weights.safetensors", "half a fi"), ("state.json", "{}"), ("state.json", "null"), ("state.json", '{"ste')],
)
def test_a_damaged_checkpoint_is_told_with_what_to_do(file: str, content: str) -> None:
    train(config(), quiet=True)
    Path("run/checkpoints/step-4", file).write_text(content)
    with pytest.raises(ConfigError, match=r"step-4; it cannot be read .*; remove that folder to go on from"):
        train(resume="run", quiet=True)


def test_what_a_failed_resume_changed_is_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    train(config(steps=2), quiet=True)
    before = Path("run/config.toml").read_text()

    def broken(*args: Any, **others: Any) -> None:
        raise MemoryError

    monkeypatch.setattr("shoestring.run.loop.roll_out", broken)
    with pytest.raises(MemoryError):
        train({"steps": 4}, resume="run", quiet=True)
    assert Path("run/config.toml").read_text() == before


def test_an_evaluation_that_is_repeated_after_an_error_says_the_same() -> None:
    asked: list[int] = []

    def fragile(completions: list[Any], **others: Any) -> list[float]:
        asked.append(1)
        if len(asked) == 2:
            raise KeyError("gold")
        return varied(completions)

    evaluated = {"eval_every": 1, "evaluation": {"num": 8}, "steps": 2}
    train(config(out="whole", **evaluated), rewards=[varied], quiet=True)
    with pytest.raises(DataError):
        train(config(**evaluated), rewards=[fragile], quiet=True)
    train(resume="run", rewards=[fragile], quiet=True)
    assert Path("run/evals.jsonl").read_text() == Path("whole/evals.jsonl").read_text()


def test_a_child_of_the_run_does_not_hold_it() -> None:
    """As one of a reward function's own pool that outlives the run."""
    train(config(steps=1), quiet=True)
    read, write = os.pipe()
    with locked(Path("run")):
        child = os.fork()
        if not child:
            os.read(read, 1)
            os._exit(0)
    try:
        with locked(Path("run")):
            pass
    finally:
        os.write(write, b".")
        os.waitpid(child, 0)


def test_a_folder_that_cannot_be_used_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    Path("mine").mkdir()
    closed: set[Path] = {Path.cwd()}
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) not in closed)
    train(config(out="mine", steps=1), quiet=True)  # its own folder can be written to, whatever lies above it
    with pytest.raises(ConfigError, match="cannot be written to"):
        train(config(out="other/run"), quiet=True)
    with pytest.raises(ConfigError, match="something lies there"):
        train(config(out="/"), quiet=True)


def test_a_run_on_rows_of_ones_own_can_be_moved() -> None:
    rows = [{"prompt": f"{a}*{b}=", "answer": a * b} for a in range(2, 9) for b in range(2, 9)]
    train(config(steps=1), data=rows, quiet=True)
    Path("elsewhere").mkdir()
    Path("run").rename("elsewhere/my run")
    train(config(steps=1), data=[{"prompt": "1*1=", "answer": 1}], quiet=True)  # where the first one was
    run = train({"steps": 2}, resume="elsewhere/my run", quiet=True)
    assert len(run.reports) == 2
    asked = [json.loads(line)["question"] for line in Path("elsewhere/my run/samples.jsonl").read_text().splitlines()]
    assert "1*1=" not in asked
    assert "eval 'elsewhere/my run' --split train" in where_it_lies(run)


@pytest.mark.parametrize("given", [{"config": 3}, {"rewards": [3]}, {"rewards": ["task", 4.5]}], ids=str)
def test_what_is_no_config_or_reward_is_told(given: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"holds no settings|cannot be called"):
        train(**given)


def test_a_logged_metric_does_not_take_a_rewards_place() -> None:
    def logs(completions: list[Any], log_metric: Any, **others: Any) -> list[float]:
        log_metric("correct", 5.0)
        return varied(completions)

    run = train(config(steps=1), rewards=["task", logs], quiet=True)
    parts = run.reports[0].reward_parts
    assert (parts["logged/correct"], parts["correct"] <= 1) == (5.0, True)


def test_a_prompt_too_long_is_told_before_the_first_step() -> None:
    rows = [{"prompt": "1*1=" if i else "9" * 1100, "answer": "1"} for i in range(40)]
    with pytest.raises(DataError, match="longer than the model's context"):
        train(config(), data=rows, quiet=True)
    run = train(config(steps=14, allow_truncated_prompts=True), data=rows, quiet=True)
    assert sum(report.prompts_truncated for report in run.reports) >= 1


def test_order_goes_through_every_problem_once_an_epoch() -> None:
    chosen = [i for start in range(0, 30, 3) for i in order(10, seed=1, start=start, num=3)]
    assert sorted(chosen[:10]) == sorted(chosen[10:20]) == sorted(chosen[20:]) == list(range(10))
    assert chosen[:10] != chosen[10:20]


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_saves_and_exits(number: int, code: int) -> None:
    """The step in hand is finished, a checkpoint is written, and the run can go on."""
    command = [sys.executable, "-m", "shoestring", "train", "steps=500", "out=run", "sampling.num_prompts=2"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen(command, **pipes, env={**os.environ, "OMP_NUM_THREADS": "1"})
    limit = time.monotonic() + 120
    while not (Path("run/metrics.jsonl").is_file() and metrics()) and time.monotonic() < limit:
        time.sleep(0.2)
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    assert process.returncode == code
    assert "Stopping once this step is done and saved; another Ctrl-C stops at once." in err
    assert "--resume run" in out
    last = checkpoints.latest(Path("run"))
    assert last is not None
    assert last.name == f"step-{len(metrics())}"


def test_a_signal_stops_a_run_that_nobody_listens_to_any_more() -> None:
    """As `2>&1 | tee log`, which the same Ctrl-C ends."""
    read, write = os.pipe()
    os.close(read)
    command = [sys.executable, "-m", "shoestring", "train", "steps=500", "out=run", "sampling.num_prompts=2", "--quiet"]
    process = subprocess.Popen(command, stderr=write, env={**os.environ, "OMP_NUM_THREADS": "1"})
    os.close(write)
    limit = time.monotonic() + 120
    while not (Path("run/metrics.jsonl").is_file() and metrics()) and time.monotonic() < limit:
        time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=60) == 130
    assert checkpoints.steps_done(Path("run")) == len(metrics())
    assert Path("run/adapter").is_dir()


def test_half_a_checkpoint_is_not_seen() -> None:
    train(config(steps=2), quiet=True)
    Path("run/checkpoints/.draft-step-9").mkdir()
    last = checkpoints.latest(Path("run"))
    assert last is not None
    assert last.name == "step-2"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"out": "full"}, "something lies there"),
        ({"model": "./nowhere"}, "no such folder"),
        ({"task": {"name": "file:none.jsonl"}}, "no such file"),
        ({"rewards": {"functions": ["nowhere.module:f"]}}, "nowhere"),
        ({"sampling": {"max_new_tokens": 2000}}, "context"),
        ({"execution": {"device": "foo"}}, "execution.device is"),
    ],
)
def test_mistakes_are_told_and_nothing_is_overwritten(change: dict[str, Any], message: str) -> None:
    Path("full").mkdir()
    Path("full/mine.txt").write_text("mine")
    with pytest.raises((ConfigError, DataError), match=message):
        train(config(**change), quiet=True)
    assert Path("full/mine.txt").read_text() == "mine"
    assert len(list(Path("full").iterdir())) == 1


def test_resume_refuses_another_config() -> None:
    train(config(steps=2), quiet=True)
    for change in ({"seed": 5}, {"optim": {"lr": 1e-5}}, {"algorithm": {"name": "grpo"}}):
        with pytest.raises(ConfigError, match="neither the old run nor a new one"):
            train(change, resume="run", quiet=True)
    with pytest.raises(ConfigError, match=r"no config\.toml"):
        train(resume="nowhere", quiet=True)
    assert len(metrics()) == 2


def test_an_update_that_breaks_after_the_first_counts_as_one_that_is_not_finite(
    planted: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    """With two updates a step, of which the second is not finite: three such steps in a row stop the run."""
    planted.update(at=2)
    with pytest.raises(NonFiniteError, match="none was applied whole"):
        train(config(steps=8, objective={"updates": 2}), rewards=[varied])
    assert [m["applied"] for m in metrics()] == [True, False, False]
    assert "Step 0 was applied in part" in capsys.readouterr().err


def test_a_run_that_is_extended_keeps_the_evaluation_that_chose_its_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    accuracies = [0.1, 0.2, 0.9, 0.3, 0.4]
    real = loop.evaluate

    def said(*given: Any) -> Any:
        return dataclasses.replace(real(*given), accuracy=accuracies.pop(0))

    def evaluations() -> list[tuple[int, float]]:
        lines = map(json.loads, Path("run/evals.jsonl").read_text().splitlines())
        return [(line["step"], line["accuracy"]) for line in lines]

    monkeypatch.setattr(loop, "evaluate", said)
    keeping = {"evaluation": {"num": 5, "keep": "best"}, "eval_every": 2, "save_every": 1}
    train(config(**keeping, steps=3), quiet=True)
    assert evaluations() == [(0, 0.1), (2, 0.2), (3, 0.9)]
    run = train({"steps": 5}, resume="run", quiet=True)
    assert run.best_step == 3
    assert evaluations() == [(0, 0.1), (2, 0.2), (3, 0.9), (4, 0.3), (5, 0.4)]


def test_folders_without_a_name_are_not_shared(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another run has taken the next number in between."""
    Path("runs/sums-grpo-1").mkdir(parents=True)
    real, asked = runs._next_free, []

    def late(parent: Path, name: str) -> Path:
        asked.append(name)
        return Path("runs/sums-grpo-1") if len(asked) == 1 else real(parent, name)

    monkeypatch.setattr(runs, "_next_free", late)
    assert runs._new_folder(None, "sums", "grpo") == Path("runs/sums-grpo-2")


def test_an_evaluation_prompt_that_is_too_long_is_told_at_the_start() -> None:
    """Of a conversation all messages count, not the last alone."""
    long = [{"role": "user", "content": "1" * 1200}, {"role": "assistant", "content": "?"}]
    rows = [{"prompt": [*before, {"role": "user", "content": "1+1="}], "answer": 2} for before in ([], long)]
    with pytest.raises(DataError, match="longer than the model's context"):
        train(config(), data=[*[rows[0]] * 6, rows[1], *[{"prompt": "12345+1=", "answer": 12346}] * 9], quiet=True)
    settings = config(eval_every=2, evaluation={"num": 5})
    with pytest.raises(DataError, match="longer than the model's context"):
        train(settings, data=rows[:1], eval_data=[*[rows[0]] * 2, rows[1]], quiet=True)
    assert not Path("run").exists()
