"""The warm start: what it teaches, what it writes, what it refuses."""

from __future__ import annotations

import json
import signal
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from shoestring import ConfigError, DataError, SftConfig, merge, sft
from shoestring.config import files as config_files
from shoestring.config import run as configs
from shoestring.model.load import ModelSettings
from shoestring.model.policy import Policy
from shoestring.run import sft as supervised
from shoestring.run.loading import load_policy
from shoestring.tasks.multiplication import Multiplication
from tiny import TINY

FEW: dict[str, Any] = {"num": 16, "epochs": 6, "batch_size": 8, "optim": {"lr": 1e-3, "warmup_steps": 0}}
LORA = {"adapter": {"name": "lora", "rank": 4}}


def metrics(folder: str = "warm") -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key != "seconds"} for line in lines]


def weights(folder: str) -> dict[str, torch.Tensor]:
    return load_file(Path(folder) / "model" / "model.safetensors")


def warmed(out: str = "warm", **changes: Any) -> Path:
    return sft({**FEW, "out": out, **changes})


def small_rows(**settings: Any) -> tuple[Policy, SftConfig, list[Any], int]:
    """The policy, the config and the rows of a warm start on eight problems."""
    config = SftConfig(num=8, **settings)
    policy = load_policy(ModelSettings(), adapter=config.adapter, device="cpu")
    rows, left_out = supervised._rows(policy, config, supervised._problems(config)[0])
    return policy, config, rows, left_out


@pytest.mark.parametrize("adapter", [{}, LORA], ids=["whole", "lora"])
def test_the_loss_falls_on_few_examples(adapter: dict[str, Any]) -> None:
    warmed(**adapter)
    found = metrics()
    assert [m["step"] for m in found] == list(range(12))
    assert all(m["applied"] and m["grad_norm"] > 0 for m in found)
    losses = [m["loss"] for m in found]
    assert sum(losses[-2:]) < 0.8 * sum(losses[:2])


@pytest.mark.parametrize("adapter", [{}, LORA], ids=["whole", "lora"])
def test_what_is_written_is_an_ordinary_model_folder(adapter: dict[str, Any]) -> None:
    """Plain transformers loads it, and it computes what was trained: the loss goes on where it ended."""
    folder = warmed(num=64, epochs=1, batch_size=32, **adapter)
    assert folder == Path("warm/model")
    assert {path.name for path in Path("warm").iterdir()} == {"config.toml", "metrics.jsonl", "model"}
    assert not [path for path in folder.iterdir() if path.suffix in (".bin", ".pt", ".pkl")]
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    before = AutoModelForCausalLM.from_pretrained(TINY)
    assert model.state_dict().keys() == before.state_dict().keys()
    ids = torch.tensor([tokenizer("12*34=")["input_ids"]])
    assert not torch.equal(model(input_ids=ids).logits, before(input_ids=ids).logits)
    assert tokenizer.chat_template == AutoTokenizer.from_pretrained(TINY).chat_template
    assert model.generation_config.eos_token_id == 257
    assert config_files.read("warm/config.toml")["num"] == 64
    assert len(metrics()) == 2


def test_a_warm_model_can_be_named_by_either_folder() -> None:
    warmed(epochs=1)
    first, second = (load_policy(ModelSettings(name=name), device="cpu") for name in ("warm", "warm/model"))
    ids = torch.tensor([[260, 17, 18]])
    assert torch.equal(first.base(input_ids=ids).logits, second.base(input_ids=ids).logits)


def test_trained_whole_every_weight_moves_and_is_fp32() -> None:
    warmed(epochs=1, model={"dtype": "bf16"})
    before = AutoModelForCausalLM.from_pretrained(TINY).state_dict()
    for name, value in weights("warm").items():
        assert value.dtype == torch.float32
        assert not torch.equal(value, before[name]), name


def test_an_adapter_moves_only_the_modules_it_is_put_on() -> None:
    warmed(epochs=1, adapter={"name": "lora", "modules": ["q_proj"], "layers": (1,)})
    before = AutoModelForCausalLM.from_pretrained(TINY).state_dict()
    moved = [name for name, value in weights("warm").items() if not torch.equal(value, before[name])]
    assert moved == ["model.layers.1.self_attn.q_proj.weight"]


@pytest.mark.parametrize(("asked", "dtype"), [("bf16", torch.bfloat16), ("fp16", torch.float16)])
def test_the_saved_type_is_the_one_asked_for(asked: str, dtype: torch.dtype) -> None:
    folder = warmed(epochs=1, save_dtype=asked)
    assert {value.dtype for value in weights("warm").values()} == {dtype}
    assert AutoModelForCausalLM.from_pretrained(folder).dtype == dtype


@pytest.mark.parametrize("micro", [1, 100, 10_000])
def test_the_loss_is_transformers_own_with_the_prompt_masked(micro: int) -> None:
    """However the batch is cut; and so is its gradient."""
    policy, config, rows, _ = small_rows(execution={"micro_batch_tokens": micro})
    found = supervised._backward(policy, config, rows)

    tokenizer, task = AutoTokenizer.from_pretrained(TINY), Multiplication()
    texts = []
    for problem in [task.draw("train", i) for i in range(8)]:
        asked = tokenizer.encode(f"<|user|>{problem.question}<|assistant|>")
        texts.append((asked, tokenizer.encode(f"{task.solution(problem)}<|end|>")))
    length = max(len(asked) + len(told) for asked, told in texts)
    ids, labels = torch.full((8, length), 256), torch.full((8, length), -100)
    for i, (asked, told) in enumerate(texts):
        ids[i, : len(asked) + len(told)] = torch.tensor(asked + told)
        labels[i, len(asked) : len(asked) + len(told)] = torch.tensor(told)
    model = AutoModelForCausalLM.from_pretrained(TINY)
    loss = model(input_ids=ids, attention_mask=(ids != 256).long(), labels=labels).loss
    assert found == pytest.approx(loss.item(), abs=1e-5)
    loss.backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(policy.base.get_parameter(name).grad, parameter.grad, atol=1e-5, rtol=0)


def test_the_first_recorded_loss_is_that_of_the_untrained_model() -> None:
    policy, config, rows, _ = small_rows()
    warmed(num=8, epochs=1)
    assert metrics()[0]["loss"] == pytest.approx(supervised._backward(policy, config, rows), abs=1e-5)


def test_the_end_token_is_taught_and_the_prompt_is_not() -> None:
    policy, _, rows, left_out = small_rows()
    assert left_out == 0
    for row, problem in zip(rows, [Multiplication().draw("train", i) for i in range(8)], strict=True):
        assert row.target[-1] == policy.end_id == 257
        prompt = policy.encode(Multiplication().ask(problem))
        assert row.token_ids[: len(prompt)] == prompt
        assert row.col.tolist() == list(range(len(prompt) - 1, len(row.token_ids)))
        assert policy.tokenizer.decode(row.target[:-1]) == Multiplication().solution(problem)


def test_examples_that_are_too_long_are_counted_and_left_out(capsys: pytest.CaptureFixture[str]) -> None:
    _, _, rows, _ = small_rows()
    lengths = sorted(len(row.token_ids) + 1 for row in rows)
    limit = lengths[3]
    _, _, kept, left_out = small_rows(max_length=limit)
    assert [row.problem_id for row in kept] == [row.problem_id for row in rows if len(row.token_ids) < limit]
    assert left_out == sum(n > limit for n in lengths) > 0
    warmed(num=8, epochs=1, max_length=limit)
    assert f"{len(kept)} examples, {left_out} longer than {limit} left out" in capsys.readouterr().out


def test_examples_beyond_the_models_context_are_left_out_too() -> None:
    rows = [{"prompt": "z" * n + "2*3=", "answer": "6", "solution": "#### 6"} for n in (1, 2, 1100)]
    Path("train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    _, _, kept, left_out = small_rows(task={"name": "file:train.jsonl"}, max_length=5000)
    assert (len(kept), left_out) == (2, 1)


def test_nothing_short_enough_is_told_and_nothing_written() -> None:
    with pytest.raises(DataError, match="raise max_length"):
        warmed(max_length=5)
    assert not Path("warm").exists()


def test_a_task_without_solutions_is_refused() -> None:
    Path("train.jsonl").write_text('{"prompt": "2*3=", "answer": "6"}\n')
    with pytest.raises(ConfigError, match="no worked solutions"):
        warmed(task="file:train.jsonl")
    assert not Path("warm").exists()


def test_rows_without_a_worked_answer_are_counted(capsys: pytest.CaptureFixture[str]) -> None:
    asked = {"role": "user", "content": "2*3="}
    useless = [
        {"prompt": [asked], "completion": [{"role": "assistant", "content": None}]},
        {"prompt": [asked], "completion": [{"role": "assistant", "content": "a"}] * 2},
        {"prompt": "2*3=", "completion": "  "},
        {"messages": [asked]},
    ]
    good = {"prompt": None, "messages": [asked, {"role": "assistant", "content": "#### 6"}]}
    rows = [{**row, "id": str(i)} for i, row in enumerate([*useless, good, good])]
    Path("train.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    warmed(task={"name": "file:train.jsonl", "check": "none"}, epochs=1)
    assert "2 examples, 0 longer than 1024 left out, 4 without a worked solution too" in capsys.readouterr().out


def test_rows_as_trl_has_them_teach_the_same() -> None:
    asked, told = {"role": "user", "content": "2*3="}, {"role": "assistant", "content": "#### 6"}
    kinds: list[dict[str, Any]] = [
        {"prompt": "2*3=", "solution": "#### 6"},
        {"prompt": "2*3=", "completion": "#### 6"},
        {"prompt": [asked], "completion": [told]},
        {"messages": [asked, told]},
    ]
    seen = []
    for number, row in enumerate(kinds):
        Path(f"rows-{number}.jsonl").write_text(f"{json.dumps(row)}\n" * 40)
        _, _, kept, _ = small_rows(task={"name": f"file:rows-{number}.jsonl", "check": "none"})
        seen.append([(row.token_ids, row.target.tolist()) for row in kept])
    assert seen[0]
    assert all(other == seen[0] for other in seen)


def test_a_row_without_a_solution_among_others_teaches_no_empty_answer() -> None:
    """BUG: only the first row is looked at; any other without a solution is taught as an empty answer."""
    rows = [{"prompt": "2*3=", "answer": "6", "solution": "#### 6"}, {"prompt": "2*4=", "answer": "8"}]
    Path("train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    try:
        _, _, kept, _ = small_rows(task={"name": "file:train.jsonl"})
    except (ConfigError, DataError):
        return
    assert all(len(row.target) > 1 for row in kept)


def test_a_folder_that_is_not_empty_is_refused() -> None:
    Path("warm").mkdir()
    Path("warm/mine.txt").write_text("mine")
    with pytest.raises(ConfigError, match="something lies there already"):
        warmed()
    assert [path.name for path in Path("warm").iterdir()] == ["mine.txt"]


@pytest.mark.parametrize("adapter", [{}, LORA], ids=["whole", "lora"])
def test_a_seed_gives_the_same_weights_and_another_does_not(adapter: dict[str, Any]) -> None:
    for out, seed in (("a", 3), ("b", 3), ("c", 4)):
        warmed(out, epochs=1, seed=seed, **adapter)
    a, b, c = (weights(name) for name in "abc")
    assert metrics("a") == metrics("b")
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert not all(torch.equal(a[name], c[name]) for name in a)


def stopped_at(monkeypatch: pytest.MonkeyPatch, step: int, error: BaseException, **changes: Any) -> None:
    """A warm start that fails as it computes the gradient of a step."""
    real, calls = supervised._backward, iter(range(100))

    def failing(*arguments: Any) -> float:
        if next(calls) == step:
            raise error
        return real(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(supervised, "_backward", failing)
        with pytest.raises(type(error)):
            warmed(**changes)


@pytest.mark.parametrize("adapter", [{}, LORA], ids=["whole", "lora"])
def test_one_that_failed_goes_on_and_ends_as_it_would_have(
    adapter: dict[str, Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Five steps of twelve, in the third time through the rows; the schedule, the order and the moments go on."""
    changes = {**adapter, "num": 20, "epochs": 4}
    warmed("straight", **changes)
    stopped_at(monkeypatch, 5, RuntimeError("out of something"), **changes)
    assert "5 steps are saved; to go on: " in (said := capsys.readouterr().out)
    assert said.rstrip().endswith("sft --resume warm")
    assert not Path("warm/model").exists()
    assert sft(resume="warm") == Path("warm/model")
    assert metrics("warm") == metrics("straight")
    a, b = weights("warm"), weights("straight")
    assert all(torch.equal(a[name], b[name]) for name in b)
    assert {path.name for path in Path("warm").iterdir()} == {"config.toml", "metrics.jsonl", "model"}


def test_one_that_was_killed_goes_on_from_its_newest_checkpoint(monkeypatch: pytest.MonkeyPatch) -> None:
    """A kill saves nothing more, and may tear the last line of the log."""
    warmed("straight", save_every=2)
    monkeypatch.setattr(supervised.checkpoint, "saved_at", lambda *_: nullcontext())
    stopped_at(monkeypatch, 7, RuntimeError("killed"), save_every=2)
    assert [path.name for path in Path("warm/checkpoints").iterdir()] == ["step-6"]
    with Path("warm/metrics.jsonl").open("a") as log:
        log.write('{"step": 7, "lo')
    Path("warm").rename("moved")
    sft({"save_every": 0, "execution": {"micro_batch_tokens": 10_000}}, resume="moved")
    assert metrics("moved") == metrics("straight")
    a, b = weights("moved"), weights("straight")
    assert all(torch.equal(a[name], b[name]) for name in b)


def interrupted_in(monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    """A warm start with Ctrl-C in the update of a step."""
    real = supervised._update

    def interrupted(*arguments: Any) -> Any:
        if len(Path("warm/metrics.jsonl").read_text().splitlines()) == step:
            signal.raise_signal(signal.SIGINT)
        return real(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(supervised, "_update", interrupted)
        with pytest.raises(KeyboardInterrupt):
            warmed()


def test_ctrl_c_lets_the_step_in_hand_finish(monkeypatch: pytest.MonkeyPatch) -> None:
    interrupted_in(monkeypatch, 3)
    assert [m["step"] for m in metrics()] == [0, 1, 2, 3]
    assert [path.name for path in Path("warm/checkpoints").iterdir()] == ["step-4"]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_one_that_fails_before_any_step_leaves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    stopped_at(monkeypatch, 0, RuntimeError("out of something"))
    assert not Path("warm").exists()


def test_one_that_fails_as_it_goes_on_loses_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """BUG: killed before its first checkpoint and failing in its first step then, it took its folder with it."""
    with monkeypatch.context() as patch:
        patch.setattr(supervised.checkpoint, "saved_at", lambda *_: nullcontext())
        stopped_at(patch, 3, RuntimeError("killed"))
    Path("warm/notes.txt").write_text("mine")
    with monkeypatch.context() as patch:
        patch.setattr(supervised, "_backward", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            sft(resume="warm")
    assert Path("warm/notes.txt").read_text() == "mine"
    sft(resume="warm")
    warmed("straight")
    a, b = weights("warm"), weights("straight")
    assert all(torch.equal(a[name], b[name]) for name in b)


def test_a_disk_that_is_full_does_not_hide_what_went_wrong(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*_: Any) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr(supervised.checkpoint, "save", full)
    stopped_at(monkeypatch, 5, RuntimeError("out of something"))
    assert "5 steps are done and cannot be saved: No space left on device" in capsys.readouterr().out


def test_ctrl_c_in_the_last_step_is_taken_up_once_the_model_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    interrupted_in(monkeypatch, 11)
    assert len(metrics()) == 12
    assert Path("warm/model/model.safetensors").is_file()


def test_what_cannot_go_on_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match=r"it holds no config\.toml"):
        sft(resume="nowhere")
    stopped_at(monkeypatch, 5, RuntimeError("out of something"))
    with pytest.raises(ConfigError, match="changes epochs"):
        sft({"epochs": 7}, resume="warm")
    with pytest.raises(ConfigError, match="changes save_dtype"):
        sft({"save_dtype": "bf16"}, resume="warm")
    Path("run").mkdir()
    Path("run/config.toml").write_text(config_files.dump(configs.settle({})))
    with pytest.raises(ConfigError, match="it is a run; write train --resume"):
        sft(resume="run")
    log = Path("warm/metrics.jsonl").read_text()
    Path("warm/metrics.jsonl").unlink()
    with pytest.raises(ConfigError, match="its log has 0"):
        sft(resume="warm")
    Path("warm/metrics.jsonl").write_text(log)
    with pytest.raises(ConfigError, match="go on with a warm start by --resume"):
        warmed()
    sft(resume="warm")
    with pytest.raises(ConfigError, match="it is done"):
        sft(resume="warm")


def test_part_of_an_epoch_and_the_schedule() -> None:
    warmed(num=16, epochs=1.5, optim={"lr": 1e-3, "warmup_steps": 1, "schedule": "linear"}, batch_size=4)
    found = [m["lr"] for m in metrics()]
    assert len(found) == 6
    assert found == pytest.approx([1e-3 * share for share in (1, 1, 0.8, 0.6, 0.4, 0.2)])


def test_a_run_on_a_warm_model_can_be_merged_and_a_model_without_an_adapter_cannot() -> None:
    warmed(epochs=1)
    with pytest.raises(ConfigError, match="nothing to add"):
        merge("warm", "merged")
    assert not Path("merged").exists()


@pytest.mark.parametrize("given", [{}, {"adapter": "none"}, {"adapter": {"name": "none"}}])
def test_no_adapter_is_the_default_and_is_spelled_in_two_ways(given: dict[str, Any]) -> None:
    assert SftConfig(**given).adapter.name == "none"


def test_settings_are_strict() -> None:
    with pytest.raises(ConfigError, match='did you mean "epochs"'):
        sft({"epoch": 1})
    with pytest.raises(ConfigError, match='did you mean "lora"'):
        sft({"adapter": "lorra"})
