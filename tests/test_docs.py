"""What the README and the docs name exists."""

from __future__ import annotations

import re
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

from conftest import ROOT
from shoestring.adapters import ADAPTERS
from shoestring.algorithms import ALGORITHMS
from shoestring.cli.main import app
from shoestring.config import run as configs
from shoestring.objectives import TERMS
from shoestring.optimizers import OPTIMIZERS
from shoestring.tasks import TASKS
from shoestring.tasks.base import SPLITS

PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_and_named_files_exist(page) -> None:
    text = page.read_text()
    for link in re.findall(r"\]\(([^)#]+)\)", text):
        assert link.startswith("http") or (page.parent / link).exists(), link
    for path in re.findall(r"\b(?:recipes|bench|docs|examples)/[\w./-]+\.\w+", text):
        assert (ROOT / path).exists(), path


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_recipes_and_settings_exist(page) -> None:
    text = page.read_text()
    known = {command.name or command.callback.__name__ for command in app.registered_commands}
    for command in re.findall(r"(?m)^\s*shoestring (\w+)", text):
        assert command in known, command
    for recipe, overrides in re.findall(r"(?m)^\s*shoestring train (recipes/\S+\.toml)?([^\n#]*)", text):
        changes = [part for part in overrides.split() if "=" in part and not part.startswith("-")]
        if recipe or changes:
            configs.load(ROOT / recipe if recipe else None, changes)
    for target in re.findall(r"\bmake ([a-z-]+\d?)", text):
        assert re.search(rf"(?m)^{target}:", (ROOT / "Makefile").read_text()), target


def test_the_examples_of_adding_one_work_as_they_stand(monkeypatch: pytest.MonkeyPatch) -> None:
    """The task's splits share nothing and its references score; the algorithm gives the advantages it promises."""
    import torch

    from shoestring.types import Completion, Group, Problem, Prompt, Score

    monkeypatch.syspath_prepend(".")
    made: dict[str, Any] = {}
    for number, block in enumerate(
        re.findall(r"(?s)```python\n(.*?)```", (ROOT / "docs" / "extending.md").read_text())
    ):
        Path(f"pasted_{number}.py").write_text(block)
        made |= vars(import_module(f"pasted_{number}"))
    assert made["brief"]([[{"content": "12"}]], ["12"]) == [1.0]
    task = made["Sums"]()
    seen = [{p.question for p in task.problems(split)} for split in SPLITS]
    assert sum(map(len, seen)) == len(set().union(*seen)) == 10_000
    assert all(task.score(p, f"#### {p.answer}").value == 1.0 for p in task.problems("test"))
    completions = tuple(Completion((i, 5), (0.0, 0.0), "end") for i in range(3))
    group = Group(Prompt(Problem("1", "?", "1"), (1,), 1), completions, tuple(Score(r) for r in (1.0, 0.0, 0.0)))
    alike = Group(group.prompt, group.completions, (Score(0.1, {}),) * len(group.scores))
    assert not made["RLOO"]().credit(alike, torch.Generator()).advantage.any()
    credit = made["RLOO"]().credit(group, torch.Generator())
    assert credit.advantage.tolist() == pytest.approx([1, 1, -0.5, -0.5, -0.5, -0.5])


def test_the_engine_in_the_docs_is_the_tested_one() -> None:
    file = (ROOT / "tests" / "fake_engine.py").read_text()
    assert f"```python\n{file}```" in (ROOT / "docs" / "extending.md").read_text()


def test_the_readme_names_every_table_entry() -> None:
    text = (ROOT / "README.md").read_text()
    for name in [*ALGORITHMS, *TASKS, *TERMS]:
        assert f"`{name}" in text, name
    for name in [*ADAPTERS, *OPTIMIZERS]:
        assert f'"{name}"' in text, name


def test_the_tables_are_those_of_the_result_files() -> None:
    """`python bench/tables.py` would change nothing."""
    sys.path.insert(0, str(ROOT / "bench"))
    import tables

    for page in tables.PAGES:
        assert tables.filled(page.read_text()) == page.read_text(), page
