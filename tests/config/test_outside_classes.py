"""Algorithms, tasks, adapters and samplers from outside the package, named "module:Class"."""

from __future__ import annotations

import re
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest
from tests.run.test_loop import SMALL, config, metrics, same_weights

from conftest import ROOT
from shoestring import ConfigError, train
from shoestring.algorithms.grpo import GRPO
from shoestring.config import run as configs

BLOCKS = re.findall(r"(?s)```python\n(.*?)```", (ROOT / "docs" / "extending.md").read_text())


def pasted(module: str, word: str) -> str:
    """The example of the docs that holds `word`, as a module of one's own in the current folder; its class."""
    [text] = [block for block in BLOCKS if f"class {word}(" in block]
    text = re.sub(r'name: Literal\["[\w-]+"\] = "[\w-]+"', "name: str", text)
    Path(f"{module}.py").write_text(text)
    return f"{module}:{word}"


@pytest.fixture(autouse=True)
def _modules_of_this_test_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(".")
    for name in ("mine", "sums", "engine", "grpo"):
        monkeypatch.delitem(sys.modules, name, raising=False)


def test_a_run_with_all_of_them_is_named_and_resumed() -> None:
    own = {
        "algorithm": pasted("mine", "RLOO"),
        "task": pasted("sums", "Sums"),
        "sampler": {"name": pasted("engine", "OwnWeights"), "noise": 0.0},
    }
    train(config(**own, steps=2), quiet=True)
    saved = configs.load("run/config.toml")
    assert (saved.algorithm.name, saved.task.name, saved.sampler.name) == (
        "mine:RLOO",
        "sums:Sums",
        "engine:OwnWeights",
    )
    assert saved.objective.importance_correction == "token-truncate"  # as the class's own `exact` asks for
    train({"steps": 4}, resume="run", quiet=True)
    train(config(**own, out="whole"), quiet=True)
    assert metrics("run") == metrics("whole")
    assert same_weights("run", "whole")


def test_a_module_may_be_called_as_an_entry_is() -> None:
    assert type(configs.settle({"algorithm": pasted("grpo", "RLOO")}).algorithm).__name__ == "RLOO"


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"algorithm": "mine.RLOO"}, r'no such algorithm; write "package\.module:Class" for a class of your own'),
        ({"task": "data.jsonl"}, r'no such task; write "file:data\.jsonl" for a file, or "package\.module:Class"'),
        ({"task": "./data.jsonl"}, r'write "file:\./data\.jsonl" for a file'),
        ({"algorithm": "s-gpro"}, 'did you mean "s-grpo"'),
    ],
)
def test_what_is_nearly_a_name_is_answered(given: dict[str, str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        configs.settle(given)


def test_a_class_in_a_function_or_in_the_script_that_runs_is_refused() -> None:
    class Here(GRPO):
        name: str = "x"  # type: ignore[assignment]

    with pytest.raises(ConfigError, match="put the class into a module of its own"):
        configs.settle({"algorithm": Here(name=f"{__name__}:Here")})
    Path("script.py").write_text(
        "from shoestring import train\nfrom shoestring.algorithms.grpo import GRPO\n\n\n"
        "class Mine(GRPO):\n    name: str\n\n\n"
        "train({'algorithm': Mine(name='__main__:Mine')})\n"
    )
    done = subprocess.run([sys.executable, "script.py"], capture_output=True, text=True, check=False)
    assert "put the class into a module of its own" in done.stderr


def test_an_instance_is_taken_where_its_name_leads_back_to_its_class() -> None:
    pasted("mine", "RLOO")
    own = import_module("mine").RLOO
    assert configs.settle({"algorithm": own(name="mine:RLOO")}).algorithm == own(name="mine:RLOO")
    for name in ("rloo", "grpo", "mine:Other"):
        with pytest.raises(ConfigError, match=r'algorithm is a RLOO whose name is .* give it name="mine:RLOO"'):
            configs.settle({"algorithm": own(name=name)})


def test_an_adapter_that_differs_in_name_only_trains_the_same_weights() -> None:
    Path("mine.py").write_text(
        "from shoestring.adapters.lora import LoRA\n\n\nclass Mine(LoRA):\n    name: str\n    rank: int = 16\n"
    )
    for adapter, out in (("mine:Mine", "own"), ("lora", "listed")):
        train(config(adapter=adapter, out=out, steps=1), quiet=True)
    assert same_weights("own", "listed")


def test_an_algorithm_in_the_table_does_as_the_same_from_outside() -> None:
    Path("mine.py").write_text(
        "from shoestring.algorithms.grpo import GRPO\n\n\nclass Mine(GRPO):\n    name: str = 'mine:Mine'\n"
    )
    for algorithm, out in (("mine:Mine", "own"), ("grpo", "listed")):
        train(config(algorithm=algorithm, out=out, steps=1), quiet=True)
    assert metrics("own") == metrics("listed")


def test_the_command_line_finds_what_lies_in_the_folder_it_runs_in() -> None:
    small = ["steps=1", "sampling.num_prompts=2", "sampling.max_new_tokens=8", "out=run"]
    command = str(Path(sys.executable).with_name("shoestring"))
    done = subprocess.run(
        [command, "train", f"algorithm.name={pasted('mine', 'RLOO')}", *small],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "mine:RLOO on multiplication" in done.stdout


@pytest.mark.parametrize(
    ("name", "body", "message"),
    [
        ("nowhere:Thing", "", 'importing nowhere raised ModuleNotFoundError.*write "package.module:Class"'),
        ("s-gpro:x", "", 'write "s-grpo" or "package.module:Class"'),
        ("mine:", "", "does not name a module"),
        ("mine:Absent", "class Present: pass", "no attribute 'Absent'"),
        ("mine:Thing", "class Thing: pass", "no subclass of shoestring.config.settings.Settings"),
        ("mine:thing", "def thing(): pass", "no subclass of shoestring.config.settings.Settings"),
        ("mine:Thing", "class Thing(Settings): pass", "write name: str in the class"),
        (
            "mine:Thing",
            "from typing import Literal\nclass Thing(Settings):\n    name: Literal['thing'] = 'thing'",
            "write name: str in the class",
        ),
        (
            "mine:Thing",
            "class Thing(Settings):\n    name: str",
            "the class has no credit, least_completions, normalise, objective, replay",
        ),
        ("mine:Thing", "1 / 0", "importing mine raised ZeroDivisionError"),
    ],
)
def test_what_cannot_be_one_is_said(name: str, body: str, message: str) -> None:
    Path("mine.py").write_text(f"from shoestring.config.settings import Settings\n{body}\n")
    with pytest.raises(ConfigError, match=message):
        configs.settle({"algorithm": name})


def test_its_settings_are_as_strict_as_ours() -> None:
    with pytest.raises(ConfigError, match=r'"algorithm\.scale" is set; there is no such setting'):
        configs.settle({"algorithm": {"name": pasted("mine", "RLOO"), "scale": 2}})
    task = configs.settle({**SMALL, "task": {"name": pasted("sums", "Sums"), "prompt": "Add: {question}"}}).task
    assert task.ask(task.problems("test")[0])[0]["content"].startswith("Add: ")


def test_a_sampler_of_ones_own_works_under_a_budget() -> None:
    """Where the largest pieces of a step are rehearsed."""
    own = {"sampler": {"name": pasted("engine", "OwnWeights"), "noise": 0.0}}
    train(config(**own, steps=1, memory="1GiB"), quiet=True)
    assert [line["step"] for line in metrics("run")] == [0]
