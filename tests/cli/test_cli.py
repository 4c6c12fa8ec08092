"""The command line: every mistake is three parts on stderr and code 2, every command does what its help says."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from conftest import ROOT
from shoestring.adapters import ADAPTERS
from shoestring.algorithms import ALGORITHMS
from shoestring.cli import main as cli
from shoestring.config import files as config_files
from shoestring.config import run as configs
from shoestring.optimizers import OPTIMIZERS
from shoestring.run.sft import SftConfig
from shoestring.samplers import SAMPLERS
from shoestring.tasks import TASKS, gym
from tiny import TINY

COMMANDS = ["train", "eval", "sweep", "sample", "sft", "merge", "list", "env"]
SMALL = ["steps=2", "sampling.num_prompts=2", "sampling.num_completions=3", "sampling.max_new_tokens=16", "out=run"]


class Done(NamedTuple):
    code: int
    out: str
    err: str


class Shell:
    """Runs the command line inside this process."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
        self.monkeypatch, self.capsys = monkeypatch, capsys

    def __call__(self, *arguments: str) -> Done:
        self.monkeypatch.setattr(sys, "argv", ["shoestring", *arguments])
        self.capsys.readouterr()
        code = 0
        try:
            cli.main()
        except SystemExit as stop:
            code = stop.code if isinstance(stop.code, int) else 0 if stop.code is None else 1
        return Done(code, *self.capsys.readouterr())

    def fine(self, *arguments: str) -> str:
        """Its stdout; the command must succeed, and say nothing on stderr."""
        done = self(*arguments)
        assert (done.code, done.err) == (0, "")
        return done.out


@pytest.fixture
def shell(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Shell:
    return Shell(monkeypatch, capsys)


@pytest.fixture
def run_folder(shell: Shell) -> Path:
    shell.fine("train", "--quiet", *SMALL)
    return Path("run")


def files() -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in sorted(Path().rglob("*")) if path.is_file()}


# --- mistakes -------------------------------------------------------------------------------------------------------


def prepared() -> None:
    """Files that the mistakes below need."""
    for name, text in {
        "empty.jsonl": "",
        "mute.jsonl": '{"text": "2*3=", "answer": "6"}\n',
        "vague.jsonl": '{"prompt": "2*3=", "answer": "a lot of apples"}\n',
        "train.jsonl": '{"prompt": "2*3=", "answer": "6"}\n',
        "hollow.jsonl": '{"prompt": "", "answer": "6"}\n',
        "torn.jsonl": '{"prompt": "2*3=", "answer": "6"}\n{"prompt": \n',
        "bad.toml": "steps = \n",
        "notes.txt": "no model",
        "full/config.toml": "steps = 5\n",
        "full/metrics.jsonl": '{"step": 0}\n',
        "bare/readme.md": "nothing",
        "half/config.toml": 'task = "multiplication"\n',
    }.items():
        Path(name).parent.mkdir(exist_ok=True)
        Path(name).write_text(text)
    Path("nothing").mkdir()
    Path("half/checkpoints").mkdir()


MISTAKES: list[tuple[list[str], str]] = [
    (["train", "optim.lrr=1e-4"], 'did you mean "lr"'),
    (["train", "stepz=3"], 'did you mean "steps"'),
    (["train", "task.digitz=[2, 2]"], 'did you mean "digits"'),
    (["train", "runs/a=b"], "there is no such setting"),
    (["eval", "runs/a=b"], "there is no such setting"),
    (["train", "algorithm.name=s-gpro"], 'did you mean "s-grpo"'),
    (["train", "nowhere.toml"], "there is no such file"),
    (["train", "bad.toml"], "it is not TOML"),
    (["train", "steps=2", "loose"], "it is no KEY=VALUE"),
    (["train", "steps=-1"], "steps is -1"),
    (["train", "sampling.num_completions=1"], "a group of one has no mean to differ from"),
    (["train", "algorithm.alpha=9", "algorithm.k=8"], "alpha at most k"),
    (["train", "task.name=file:empty.jsonl"], "it holds no rows"),
    (["train", "task.name=file:none.jsonl"], "there is no such file"),
    (["train", "task.name=file:torn.jsonl"], "torn.jsonl, line 2"),
    (["train", "task.name=file:mute.jsonl"], "none of them asks"),
    (["train", "task.name=file:vague.jsonl"], "it is neither a number nor a formula"),
    (["train", "task.name=file:hollow.jsonl"], "hollow.jsonl row 1 has an empty prompt"),
    (["train", "task.name=file:nowhere/data"], "there is no such file"),
    (["train", "task.name=file:train.jsonl", "task.check=none"], "it has nothing to compare answers with"),
    (
        ["train", 'task={name="mixture", of=["svamp", {name="file:train.jsonl", check="none"}]}'],
        "it has nothing to compare answers with",
    ),
    (["train", "out=notes.txt/run"], "notes.txt is no folder"),
    (["train", "model=./nowhere"], "there is no such folder"),
    (["train", "model=notes.txt"], "this file is not a GGUF file"),
    (["train", "model=nothing"], "the folder holds no config.json"),
    (["train", "out=full"], "something lies there already"),
    (["train", 'rewards.functions=["nowhere.module:f"]'], "importing nowhere.module raised"),
    (["train", 'rewards.functions=["math:squirt"]'], 'did you mean "sqrt"'),
    (["train", 'rewards.functions=["unnamed"]'], "does not name a module"),
    (["train", 'adapter.modules=["q_porj"]'], 'did you mean "q_proj"'),
    (["train", "adapter.layers=9"], "the model has 4 layers"),
    (["train", "eval_every=1", "evaluation.split=exam"], "there is no such split"),
    (["train", "sampling.max_new_tokens=2000"], "longer than the model's context"),
    (["train", "--resume", "nowhere"], "it holds no config.toml"),
    (["train", "--resume", "nowhere", "--dry-run"], "it holds no config.toml"),
    (["train", "--dry-run", "stepz=3"], 'did you mean "steps"'),
    (["eval", "./nowhere", "--task", "multiplication"], "there is no such folder"),
    (["eval", "notes.txt", "--task", "multiplication"], "this file is not a GGUF file"),
    (["eval", "tiny"], "add --task"),
    (["eval", "half"], "that run has not come to its end"),
    (["eval", "tiny", "--task", "file:train.jsonl", "check=none"], "every completion would count as wrong"),
    (["sweep", "task.name=file:train.jsonl", "task.check=none"], "it has nothing to compare answers with"),
    (["eval", "tiny", "--task", "multiplicaton"], 'did you mean "multiplication"'),
    (["eval", "tiny", "--task", "multiplication", "--split", "exam"], "use one of: train, validation, test"),
    (["eval", "tiny", "--task", "multiplication", "task.digitz=[2, 2]"], 'did you mean "digits"'),
    (["eval", "tiny", "--task", "multiplication", "--k", "one"], "it is no list of whole numbers"),
    (["eval", "tiny", "--task", "multiplication", "--k", "0"], "at least one completion"),
    (["eval", "tiny", "--task", "multiplication", "--k", "4", "--samples", "2"], "use at least 4 samples"),
    (["eval", "tiny", "--task", "multiplication", "--k", "4", "--temperature", "0"], "all the same"),
    (["sample", "tiny"], "add --task"),
    (["sample", "./nowhere", "--task", "multiplication"], "there is no such folder"),
    (["sample", "tiny", "--task", "multiplication", "--max-new-tokens", "-3"], "sampling.max_new_tokens is -3"),
    (["sample", "tiny", "--task", "multiplication", "--max-new-tokens", "0"], "sampling.max_new_tokens is 0"),
    (["sample", "tiny", "--task", "multiplication", "--temperature", "-1"], "sampling.temperature is -1"),
    (["sample", "tiny", "--task", "multiplication", "--completions", "0"], "completions is 0"),
    (["eval", "tiny", "--task", "multiplication", "--max-new-tokens", "0"], "max_new_tokens is 0"),
    (["sft", "epoch=1"], 'did you mean "epochs"'),
    (["sft", "out=full"], "something lies there already"),
    (["sft", "task.name=file:train.jsonl"], 'add a column "solution"'),
    (["sft", "num=8", "max_length=4"], "no example is short enough"),
    (["merge", "nowhere", "out"], "nowhere"),
    (["merge", "tiny", "out"], "no adapter to merge"),
    (["merge", "tiny", "full"], "something lies there already"),
    (["list", "taks"], 'did you mean "tasks"'),
]
USAGE: list[tuple[list[str], str]] = [
    (["tarin"], "tarin"),
    (["train", "--resum", "x"], "--resum"),
    (["eval", "tiny", "--num", "many"], "--num"),
    (["merge", "run"], "'out'"),
]


def named(value: list[str] | str) -> str | None:
    return " ".join(value) if isinstance(value, list) else ""


@pytest.mark.parametrize(("arguments", "says"), MISTAKES, ids=named)
def test_a_mistake_is_three_parts_on_stderr_and_code_2(
    shell: Shell, monkeypatch: pytest.MonkeyPatch, arguments: list[str], says: str
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    prepared()
    before = files()
    done = shell(*arguments)
    assert done.code == 2, done
    assert says in done.err
    kind, _, message = done.err.strip().partition(": ")
    assert kind in ("ConfigError", "DataError")
    assert message.count(";") >= 2
    assert "Traceback" not in done.err
    assert "Traceback" not in done.out
    after = files()
    assert {name: after[name] for name in before} == before


@pytest.mark.parametrize(("arguments", "says"), USAGE, ids=named)
def test_an_unknown_command_or_option_is_told(shell: Shell, arguments: list[str], says: str) -> None:
    done = shell(*arguments)
    assert (done.code, done.out) == (2, "")
    assert says in done.err
    assert "Traceback" not in done.err


def test_a_reward_of_the_wrong_length_is_told(shell: Shell, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    Path("short_reward.py").write_text("def short(completions, **others):\n    return [1.0]\n")
    done = shell("train", *SMALL, 'rewards.functions=["short_reward:short"]')
    assert done.code == 2
    assert "reward function short returned 1 values for 6 completions" in done.err
    assert done.err.startswith("DataError: ")


def test_a_resumed_run_with_another_config_is_refused_and_left_as_it_was(shell: Shell, run_folder: Path) -> None:
    before = files()
    for change in ("seed=5", "optim.lr=1e-5", "algorithm.name=grpo", "sampling.num_prompts=3"):
        for dry in ([], ["--dry-run"]):
            done = shell("train", "--resume", "run", change, *dry)
            assert done.code == 2
            assert change.partition("=")[0].removesuffix(".name") in done.err
            assert "neither the old run nor a new one" in done.err
    assert files() == before
    done = shell("train", *SMALL)
    assert (done.code, done.out) == (2, "")
    assert "something lies there already" in done.err
    assert files() == before


def test_an_override_that_is_no_setting_of_the_task_is_refused(shell: Shell) -> None:
    """What does not name another table is a setting of the task."""
    done = shell("eval", "tiny", "--task", "multiplication", "--num", "2", "digits=[1, 1]")
    assert (done.code, "only 81 such problems" in done.err) == (2, True)
    for override in ("digitz=[1, 3]", "tsk.digits=[1, 3]", "optim.lr=1"):
        done = shell("eval", "tiny", "--task", "multiplication", "--num", "2", "--max-new-tokens", "4", override)
        assert done.code == 2, override


def test_after_a_mistake_the_same_folder_can_be_used(shell: Shell) -> None:
    for mistake in ('rewards.functions=["nowhere.module:f"]', "model=./nowhere", "task.name=file:none.jsonl"):
        assert shell("train", "--quiet", *SMALL, mistake).code == 2
    shell.fine("train", "--quiet", *SMALL)


# --- what needs no torch model --------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(shell: Shell, command: str) -> None:
    text = shell.fine(command, "--help")
    assert "Usage: " in text
    assert command in text
    assert "--help" in text


def test_help_lists_every_command_and_so_does_no_argument(shell: Shell) -> None:
    text = shell.fine("--help")
    assert all(f"  {command} " in text for command in COMMANDS)
    nothing = shell()
    assert all(command in nothing.out + nothing.err for command in COMMANDS)


def test_list_prints_every_entry_of_every_table_with_a_line_about_it(shell: Shell) -> None:
    tables = {"tasks": TASKS, "algorithms": ALGORITHMS, "adapters": ADAPTERS, "samplers": SAMPLERS}
    tables |= {"optimizers": OPTIMIZERS}
    whole = shell.fine("list")
    for name, table in tables.items():
        part = shell.fine("list", name)
        assert part in whole
        heading, *lines = part.splitlines()
        assert heading == f"{name}:"
        assert [line.split()[0] for line in lines] == list(table)
        assert all(len(line.split()) > 3 for line in lines)


def test_list_gym_prints_what_there_is_and_what_is_left_out_and_why(shell: Shell) -> None:
    pytest.importorskip("reasoning_gym")
    lines = shell.fine("list", "gym").splitlines()
    assert "gym:chain_sum" in lines
    assert [line for line in lines if line.startswith("gym:")] == [f"gym:{name}" for name in gym.available()]
    assert len([line for line in lines if line.startswith("(left out: ")]) == len(gym.EXCLUDED)


def test_env_prints_versions(shell: Shell) -> None:
    lines = dict(line.split(maxsplit=1) for line in shell.fine("env").splitlines())
    assert lines["torch"] == torch.__version__
    assert {"python", "shoestring", "transformers", "peft", "system", "device", "cuda"} <= lines.keys()


RECIPES = sorted(path for path in (ROOT / "recipes").glob("*.toml"))


@pytest.mark.parametrize("path", [None, *RECIPES], ids=lambda path: path.stem if path else "default")
def test_a_dry_run_prints_the_config_that_reads_back_equal_and_does_nothing(shell: Shell, path: Path | None) -> None:
    command = "sft" if path and path.stem.endswith("-sft") else "train"
    text = shell.fine(command, *([str(path)] if path else []), "seed=7", "optim.lr=2e-5", "--dry-run")
    assert files() == {}
    Path("back.toml").write_text(text)
    if command == "sft":
        assert SftConfig.model_validate(config_files.read("back.toml")).seed == 7
    else:
        assert configs.load("back.toml") == configs.load(path, ["seed=7", "optim.lr=2e-5"])
    assert shell.fine(command, "back.toml", "--dry-run") == text


def test_a_dry_run_of_a_resumed_run_prints_its_config_with_the_changes(shell: Shell, run_folder: Path) -> None:
    before = files()
    Path("back.toml").write_text(shell.fine("train", "--resume", "run", "steps=9", "--dry-run"))
    assert configs.load("back.toml") == configs.load("run/config.toml", ["steps=9"])
    assert {name: content for name, content in files().items() if name != "back.toml"} == before


# --- train, eval, sample, merge, sft --------------------------------------------------------------------------------

FIXED = ["task", "split", "problems", "accuracy", "low", "high", "pass_at_k", "maj_at_k"]


def figures(text: str) -> dict[str, Any]:
    """The one JSON object that must be all there is on stdout."""
    assert len(text.splitlines()) == 1
    values = json.loads(text)
    assert isinstance(values, dict)
    assert values.keys() >= {*FIXED}
    return values


def test_train_says_where_it_all_lies_and_quiet_says_nothing(shell: Shell) -> None:
    done = shell("train", *SMALL)
    assert done.code == 0
    for name in ("adapter", "metrics.jsonl", "samples.jsonl"):
        assert f"run/{name}" in done.out
    assert "shoestring eval run" in done.out
    assert len(Path("run/metrics.jsonl").read_text().splitlines()) == 2
    assert shell.fine("train", "--quiet", *SMALL[:-1], "out=silent") == ""


def test_without_out_runs_are_numbered(shell: Shell) -> None:
    for _ in range(2):
        shell.fine("train", "--quiet", *SMALL[:-1], "steps=1")
    assert sorted(p.name for p in Path("runs").iterdir()) == ["multiplication-s-grpo-1", "multiplication-s-grpo-2"]


def test_train_resumes_from_the_command_line(shell: Shell) -> None:
    shell.fine("train", "--quiet", *SMALL[1:-1], "steps=4", "out=whole")
    shell.fine("train", "--quiet", *SMALL)
    assert "resumed at step 2" in shell("train", "--resume", "run", "steps=4").out
    assert Path("run/samples.jsonl").read_text() == Path("whole/samples.jsonl").read_text()
    assert len(Path("run/metrics.jsonl").read_text().splitlines()) == 4
    assert configs.load("run/config.toml").steps == 4


def test_eval_of_a_run_prints_one_json_object_with_the_fixed_keys(shell: Shell) -> None:
    done = shell("train", "--quiet", *SMALL, "sampling.max_new_tokens=6")
    assert (done.code, done.out) == (0, "")
    assert "WARNING: 6 of 6 completions of the first step were cut off" in done.err  # even a quiet run says so
    values = figures(shell.fine("eval", "run", "--num", "10", "--json"))
    assert (values["task"], values["split"], values["problems"]) == ("multiplication", "test", 10)
    assert values["low"] <= values["accuracy"] <= values["high"]
    assert values["pass_at_k"] == values["maj_at_k"] == {"1": values["accuracy"]}
    assert (values["truncated"], values["tokens"]) == (1.0, 60)  # the limit is the run's own


def test_eval_of_a_base_model_needs_a_task_and_takes_its_settings(shell: Shell) -> None:
    options = ["--task", "multiplication", "--split", "validation", "--num", "10", "--max-new-tokens", "24"]
    values = figures(shell.fine("eval", "tiny", *options, "--k", "1,2", "--json", "--details", "details.json"))
    assert (values["split"], values["problems"], values["samples"]) == ("validation", 10, 2)
    assert values["pass_at_k"].keys() == values["maj_at_k"].keys() == {"1", "2"}
    details = json.loads(Path("details.json").read_text())
    assert len(details["outcomes"]) == 10
    assert sum(details["outcomes"].values()) == round(values["accuracy"] * 20)
    assert {key: details[key] for key in values} == values
    other = figures(shell.fine("eval", "tiny", *options, "task.digits=[1, 3]", "--json", "--details", "other.json"))
    assert other["problems"] == 10
    names = json.loads(Path("other.json").read_text())["outcomes"]
    assert all(len(name.removeprefix("multiplication-").split("x")[0]) == 1 for name in names)


def test_eval_without_any_argument_is_the_default_model_on_the_default_task(shell: Shell) -> None:
    assert figures(shell.fine("eval", "--num", "2", "--max-new-tokens", "4", "--json"))["task"] == "multiplication"


def test_eval_prints_a_table_with_intervals(shell: Shell) -> None:
    options = ["--task", "multiplication", "--num", "10", "--max-new-tokens", "16"]
    text = " ".join(shell.fine("eval", "tiny", *options, "--k", "1,2").split())
    for part in ("10 problems", "greedy accuracy", "pass@2", "maj@2", "95 % interval"):
        assert part in text
    values = figures(shell.fine("eval", "tiny", *options, "--k", "1,2", "--json", "--details", "both.json"))
    alone = figures(shell.fine("eval", "tiny", *options, "--json", "--details", "greedy.json"))
    assert values["greedy"] == {key: alone[key] for key in ("accuracy", "low", "high", "truncated", "tokens")}
    both, greedy = (json.loads(Path(f"{name}.json").read_text()) for name in ("both", "greedy"))
    assert both["greedy_outcomes"] == greedy["outcomes"]


def test_sample_prints_questions_references_and_scored_answers(shell: Shell, run_folder: Path) -> None:
    text = shell.fine("sample", "run", "--num", "2", "--completions", "3")
    assert text.count("=== ") == 2
    assert text.count("--- ") == text.count("  score ") == 6
    assert text == shell.fine("sample", "run", "--num", "2", "--completions", "3")
    own = shell.fine("sample", "tiny", "--task", "multiplication", "--prompt", "12*34=", "--temperature", "0")
    assert own.startswith("=== 12*34=\n--- ")
    assert "score" not in own


def test_a_merged_model_evaluates_as_the_run_does(shell: Shell, monkeypatch: pytest.MonkeyPatch) -> None:
    """A rate at which the adapter changes the answers, so that the comparison says something."""
    shell.fine("train", "--quiet", *SMALL, "optim.lr=1e-2", "optim.warmup_steps=0", "algorithm.name=grpo")
    assert shell.fine("merge", "run", "merged") == "model: merged\n"
    assert not [path for path in Path("merged").iterdir() if path.suffix in (".bin", ".pt")]
    options = ["--num", "20", "--max-new-tokens", "24", "--json"]
    for details, target in (
        ("run", []),
        ("merged", ["--task", "multiplication"]),
        ("tiny", ["--task", "multiplication"]),
    ):
        shell.fine("eval", details, *target, *options, "--details", f"{details}.json")
    found = {name: json.loads(Path(f"{name}.json").read_text()) for name in ("run", "merged", "tiny")}
    run, merged, base = ((values["outcomes"], values["tokens"]) for values in found.values())
    assert run == merged != base
    done = shell("merge", "run", "merged")
    assert done.code == 2
    assert "something lies there already" in done.err
    # An adapter folder alone will do, wherever it lies.
    shutil.copytree("run/adapter", "elsewhere")
    shell.fine("merge", "elsewhere", "again")
    assert Path("again/model.safetensors").read_bytes() == Path("merged/model.safetensors").read_bytes()


@pytest.mark.parametrize("adapter", ["lora", "none"])
def test_a_checkpoint_is_evaluated_and_merged_as_the_run_was_then(shell: Shell, adapter: str) -> None:
    """After two steps of two, a checkpoint answers as the finished run does; after one, as it did in between."""
    fast = ["optim.lr=1e-2" if adapter == "lora" else "optim.lr=1e-3", "optim.warmup_steps=0", "algorithm.name=grpo"]
    shell.fine("train", "--quiet", *SMALL, *fast, f"adapter.name={adapter}", "steps=2", "save_every=1")
    targets = ("run", "run/checkpoints/step-1", "run/checkpoints/step-2")
    found = []
    for place, target in enumerate(targets):
        shell.fine("eval", target, "--num", "20", "--max-new-tokens", "24", "--json", "--details", f"{place}.json")
        values = json.loads(Path(f"{place}.json").read_text())
        found.append((values["task"], values["outcomes"], values["tokens"]))
    assert found[0] == found[2] != found[1]
    assert shell.fine("merge", "run/checkpoints/step-2", "merged") == "model: merged\n"
    if adapter == "lora":
        shell.fine("merge", "run", "whole")
    else:
        shutil.copytree("run/model", "whole")
    assert Path("merged/model.safetensors").read_bytes() == Path("whole/model.safetensors").read_bytes()
    done = shell("train", *SMALL, "model=run/checkpoints/step-1", "out=next")
    assert done.code == 2
    assert "shoestring merge run/checkpoints/step-1 OUT" in done.err
    Path("run/checkpoints/step-1/weights.safetensors").write_bytes(b"torn")
    done = shell("eval", "run/checkpoints/step-1")
    assert done.code == 2
    assert "it cannot be read" in done.err


def test_a_checkpoint_is_known_by_any_path_and_nothing_else_is(shell: Shell, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(TINY, "base")
    shell.fine("train", "--quiet", *SMALL, "model=base", "save_every=1")
    few = ["--num", "2", "--max-new-tokens", "8", "--json"]
    expected = json.loads(shell.fine("eval", "run/checkpoints/step-1", *few))
    Path("link").symlink_to("run/checkpoints/step-1")
    assert shell("eval", "run/checkpoints/step-9").err.count("there is no such folder") == 1
    paths = ["link", "run/checkpoints/step-2/../step-1", "run/checkpoints/step-1/"]
    found = [json.loads(shell.fine("eval", path, *few)) for path in paths]
    for folder, path in (("run/checkpoints", "step-1"), ("step-1", "."), ("../..", "checkpoints/step-1")):
        monkeypatch.chdir(folder)  # where "base" is not to be found: what PEFT noted says where it lies
        found.append(json.loads(shell.fine("eval", path, *few)))
    assert all({**one, "model": ""} == {**expected, "model": ""} for one in found)
    told = shell("eval", "checkpoints/step-9")
    assert told.code == 2
    assert "there is no such folder" in told.err
    Path("best").mkdir()
    shutil.copytree(TINY, "best/mine")
    assert "add --task" in shell("eval", "best/mine").err


def test_a_run_is_evaluated_whatever_else_its_config_says(shell: Shell) -> None:
    """Its algorithm may be somebody's own, which is not here, and its settings those of another version."""
    shell.fine("train", "--quiet", *SMALL)
    own = Path("run/config.toml")
    own.write_text("another = 1\n" + own.read_text().replace('"s-grpo"', '"elsewhere:Mine"'))
    found = json.loads(shell.fine("eval", "run", "--num", "2", "--max-new-tokens", "8", "--json"))
    assert found["problems"] == 2
    shell.fine("sample", "run", "--num", "1", "--max-new-tokens", "8")


def types(folder: str) -> set[torch.dtype]:
    return {value.dtype for value in load_file(f"{folder}/model.safetensors").values()}


def test_merge_writes_the_type_that_the_run_asked_for(shell: Shell) -> None:
    shell.fine("train", "--quiet", *SMALL, "model.dtype=bf16")
    shell.fine("merge", "run", "merged")
    assert types("merged") == {torch.bfloat16}


def test_merge_of_whole_weights_keeps_the_type_they_were_trained_in(shell: Shell) -> None:
    """BUG: that of the base was taken, bf16, in which most of a small rate's steps are lost."""
    shutil.copytree(TINY, "base")
    AutoModelForCausalLM.from_pretrained(TINY, dtype=torch.bfloat16).save_pretrained("base")
    shell.fine("train", "--quiet", *SMALL, "model=./base", "adapter.name=none", "optim.lr=1e-5", "save_every=2")
    shell.fine("merge", "run/checkpoints/step-2", "merged")
    assert types("merged") == types("run/model") == {torch.float32}
    assert Path("merged/model.safetensors").read_bytes() == Path("run/model/model.safetensors").read_bytes()


def test_merge_keeps_the_type_of_a_base_that_lies_there_in_bf16(shell: Shell) -> None:
    """BUG: with dtype "auto" the base is loaded in fp32, its config then says fp32, and so is what is written."""
    shutil.copytree(TINY, "base")
    AutoModelForCausalLM.from_pretrained(TINY, dtype=torch.bfloat16).save_pretrained("base")
    assert types("base") == {torch.bfloat16}
    shell.fine("train", "--quiet", *SMALL, "model=./base")
    shell.fine("merge", "run", "merged")
    assert types("merged") == {torch.bfloat16}


def test_a_warm_start_goes_into_training(shell: Shell) -> None:
    done = shell("sft", "num=16", "epochs=1", "batch_size=8", "out=warm")
    assert done.code == 0
    assert "shoestring eval warm/model --task multiplication" in done.out
    shell.fine("train", "--quiet", *SMALL, "model=warm")
    values = figures(shell.fine("eval", "run", "--num", "4", "--json"))
    assert values["problems"] == 4
    assert figures(shell.fine("eval", "warm", "--num", "4", "--max-new-tokens", "8", "--json"))["problems"] == 4
    done = shell("train", *SMALL[:-1], "out=second", "model=run")
    assert done.code == 2
    assert "shoestring merge run OUT" in done.err


def test_a_run_on_rows_of_ones_own_is_evaluated_on_them(shell: Shell) -> None:
    rows = [json.dumps({"prompt": f"{a}*3=", "answer": str(3 * a)}) for a in range(10, 30)]
    Path("data").mkdir()
    for split in ("train", "test"):
        Path(f"data/{split}.jsonl").write_text("\n".join(rows) + "\n")
    shell.fine("train", "--quiet", *SMALL, "task.name=file:data")
    assert figures(shell.fine("eval", "run", "--json"))["problems"] == 20
    done = shell("eval", "run", "--split", "validation")
    assert done.code == 2
    assert "test, train" in done.err


def test_training_problems_are_evaluated_only_by_name_and_found_in_other_splits(shell: Shell) -> None:
    rows = [json.dumps({"prompt": f"{a}*3=", "answer": str(3 * a)}) for a in range(10, 30)]
    Path("data").mkdir()
    Path("data/train.jsonl").write_text("\n".join(rows))
    shell.fine("train", "--quiet", *SMALL, "task.name=file:data")
    done = shell("eval", "run")
    assert (done.code, done.out) == (2, "")
    assert "ask by name for what there is: eval --split train" in done.err
    assert figures(shell.fine("eval", "run", "--split", "train", "--json"))["overlap"]["shared"] == 20
    Path("data/test.jsonl").write_text("\n".join([*rows[4:6], '{"prompt": "99*3=", "answer": "297"}']))
    assert figures(shell.fine("eval", "run", "--json"))["overlap"] | {"sample": ""} == {
        "problems": 3,
        "shared": 2,
        "sample": "",
    }
    assert "Overlap: 2 of 3 problems with the text of a training problem, such as " in shell.fine("eval", "run")
    done = shell("train", "--quiet", *SMALL[:-1], "task.name=file:data", "eval_every=2", "evaluation.split=test")
    assert "Evaluations: 2 of 3 problems with the text of a training problem, such as data-" in done.err


# --- the process itself ---------------------------------------------------------------------------------------------


def process(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(arguments, capture_output=True, text=True, timeout=100, env=environment, check=False)


def test_a_mistake_is_told_before_the_heavy_imports() -> None:
    """Several mistakes in one process, since one is as long as its imports."""
    mistakes = [
        ["train", "optim.lrr=1"],
        ["train", "sampling.num_completions=1"],
        ["train", "nowhere.toml"],
        ["train", "algorithm.alpha=9", "algorithm.k=8"],
        ["train", "--dry-run"],
        ["train", "--help"],
        ["list"],
        ["tarin"],
        ["sft", "epoch=1"],
        ["sweep", "--over", "optim.lr=1,-1"],
        ["eval", "tiny"],
        ["eval", "./nowhere", "--task", "multiplication"],
        ["eval", "tiny", "--task", "multiplication", "--split", "exam"],
    ]
    code = f"""
import sys
from shoestring.cli import main as cli
for arguments in {mistakes!r}:
    sys.argv = ["shoestring", *arguments]
    try:
        cli.main()
    except SystemExit as stop:
        assert stop.code in (0, 2), arguments
    for heavy in ("transformers", "peft"):
        assert heavy not in sys.modules, (heavy, arguments)
"""
    done = process(sys.executable, "-c", code)
    assert done.returncode == 0, done.stderr


def test_python_dash_m_is_the_command_and_exits_with_2() -> None:
    done = process(sys.executable, "-m", "shoestring", "train", "optim.lrr=1e-4")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == 'ConfigError: "optim.lrr" is set; there is no such setting; did you mean "lr"?\n'


def test_json_is_all_that_a_process_prints() -> None:
    options = ["--task", "multiplication", "--num", "4", "--max-new-tokens", "8", "--json"]
    done = process(sys.executable, "-m", "shoestring", "eval", str(TINY), *options)
    assert done.returncode == 0, done.stderr
    assert figures(done.stdout)["problems"] == 4
    assert "Traceback" not in done.stderr
