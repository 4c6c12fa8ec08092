"""The layout: imports point one way, no circle anywhere, and no file is long."""

from __future__ import annotations

import ast
from functools import cache
from pathlib import Path

import pytest

import shoestring

PACKAGE = Path(shoestring.__file__).parent
MAX_LINES = 350
LONG = {"answers.py", "model/fast/kernels/decode.py", "tasks/word_stories.py"}
"""Files that may be longer: kernels, data, and the comparison of answers."""

# A level may import itself and what stands above it. A dotted name is a module of a room that stands elsewhere.
LEVELS = (
    ("errors", "types", "hashing", "answers", "allocator"),
    ("config.settings", "config.sizes", "config.dotted", "config.extras"),
    ("model",),
    ("adapters", "algorithms", "curricula", "objectives", "optimizers", "rewards", "samplers", "tasks", "trackers"),
    ("config",),
    ("memory", "rollout", "training", "plan"),
    ("evaluation", "records"),
    ("run",),
    ("cli",),
    ("", "__main__", "tiny"),
)


@cache
def modules() -> dict[str, Path]:
    """Every module of the package by its dotted name, the package's own name left out."""
    paths = {path.relative_to(PACKAGE).with_suffix(""): path for path in PACKAGE.rglob("*.py")}
    return {".".join(path.parts).removesuffix("__init__").removesuffix("."): file for path, file in paths.items()}


@cache
def imports(name: str) -> frozenset[str]:
    """The modules of the package that one imports: inside functions and for types only, too."""
    found = set()
    for node in ast.walk(ast.parse(modules()[name].read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "shoestring":
            base = (node.module or "").removeprefix("shoestring").removeprefix(".")
            for alias in node.names:
                inner = f"{base}.{alias.name}".removeprefix(".")
                found.add(inner if inner in modules() else base)
        elif isinstance(node, ast.Import):
            found |= {alias.name.removeprefix("shoestring.") for alias in node.names} & modules().keys()
    return frozenset(found - {name})


def level(name: str) -> int:
    """The number of a module's level; that of its own name before that of its room."""
    for known in (name, name.partition(".")[0]):
        for number, names in enumerate(LEVELS):
            if known in names:
                return number
    pytest.fail(f"{name} stands in no level")


def circle(name: str, behind: tuple[str, ...], done: set[str]) -> tuple[str, ...]:
    """A circle of imports that a walk from `name` meets; empty without one."""
    if name in behind:
        return (*behind[behind.index(name) :], name)
    if name in done:
        return ()
    for other in sorted(imports(name)):
        if found := circle(other, (*behind, name), done):
            return found
    done.add(name)
    return ()


def test_every_import_is_found() -> None:
    assert "model.policy" in imports("run.loading")
    assert "types" in imports("model.policy")


@pytest.mark.parametrize("name", sorted(modules()))
def test_imports_point_one_way(name: str) -> None:
    assert [other for other in imports(name) if level(other) > level(name)] == []


def test_no_import_runs_in_a_circle() -> None:
    done: set[str] = set()
    assert [found for name in sorted(modules()) if (found := circle(name, (), done))] == []


def test_a_circle_would_be_found(monkeypatch: pytest.MonkeyPatch) -> None:
    edges = {"a": {"b"}, "b": {"c"}, "c": {"b"}}
    monkeypatch.setitem(globals(), "imports", lambda name: frozenset(edges[name]))
    assert circle("a", (), set()) == ("b", "c", "b")


@pytest.mark.parametrize("name", sorted(modules()))
def test_no_file_is_long(name: str) -> None:
    path = modules()[name]
    if str(path.relative_to(PACKAGE)) not in LONG:
        assert len(path.read_text(encoding="utf-8").splitlines()) <= MAX_LINES
