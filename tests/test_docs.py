"""What the README and the docs name exists."""

from __future__ import annotations

import re
import sys

import pytest

from conftest import ROOT
from shoestring import config as configs
from shoestring.adapters import ADAPTERS
from shoestring.algorithms import ALGORITHMS
from shoestring.cli import app
from shoestring.tasks import TASKS

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


def test_the_readme_names_every_table_entry() -> None:
    text = (ROOT / "README.md").read_text()
    for name in [*ALGORITHMS, *TASKS]:
        assert f"`{name}" in text, name
    assert "LoRA" in text
    assert set(ADAPTERS) == {"lora"}


def test_the_tables_are_those_of_the_result_files() -> None:
    """`python bench/tables.py` would change nothing."""
    sys.path.insert(0, str(ROOT / "bench"))
    import tables

    for page in tables.PAGES:
        assert tables.filled(page.read_text()) == page.read_text(), page
