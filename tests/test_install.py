"""What `make` installs: the order of sources for torch, its errors, and versions that fit together."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Sequence
from importlib import metadata
from typing import Any

import pytest
from packaging.markers import default_environment
from packaging.requirements import Requirement

from conftest import ROOT

spec = importlib.util.spec_from_file_location("install", ROOT / "tools" / "install.py")
assert spec is not None
assert spec.loader is not None
install: Any = importlib.util.module_from_spec(spec)
spec.loader.exec_module(install)

# What torch 2.13.0 asks for, by its metadata on PyPI (the CUDA build) and on PyTorch's CPU index.
TORCH_ASKS = {True: ["triton==3.7.1"], False: []}


def pins(files: Sequence[str]) -> dict[str, str]:
    """Versions by name, from constraints files."""
    lines = [line for file in files for line in (ROOT / file).read_text().splitlines()]
    pairs = [line.split("==") for line in lines if "==" in line and not line.startswith("#")]
    return {normal(name): version for name, version in pairs}


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def failing(failures: int, calls: list[tuple[str, ...]]) -> Any:
    """A pip that fails so often, with an error that counts."""

    def run(arguments: Sequence[str]) -> tuple[int, str]:
        calls.append(tuple(arguments))
        return (1, f"error {len(calls)}") if len(calls) <= failures else (0, "")

    return run


@pytest.mark.parametrize(
    ("driver", "order"),
    [
        (False, ["torch==2.13.0+cpu", "torch==2.13.0 --index-url " + install.CPU_INDEX, "torch==2.13.0"]),
        (True, ["torch==2.13.0", "torch==2.13.0+cpu", "torch==2.13.0 --index-url " + install.CPU_INDEX]),
    ],
)
def test_sources_are_tried_in_order_until_one_works(driver: bool, order: list[str]) -> None:
    for failures in range(3):
        calls: list[tuple[str, ...]] = []
        assert install.install_torch("2.13.0", driver, failing(failures, calls)) == 0
        assert [" ".join(call) for call in calls] == order[: failures + 1]


def test_every_error_is_shown_where_all_fail(capsys: pytest.CaptureFixture[str]) -> None:
    assert install.install_torch("2.13.0", False, failing(3, [])) == 1
    told = capsys.readouterr().err
    assert all(f"error {number}" in told for number in (1, 2, 3))
    assert "make TORCH=" in told


def test_a_large_download_is_announced_before_it_starts(capsys: pytest.CaptureFixture[str]) -> None:
    assert install.install_torch("2.13.0", False, failing(2, [])) == 0
    assert "several GB" in capsys.readouterr().out.splitlines()[-1]


@pytest.mark.parametrize("cuda", [True, False])
def test_pins_allow_what_torch_asks_for(cuda: bool) -> None:
    pinned = pins(install.constraints(cuda))
    for requirement in map(Requirement, TORCH_ASKS[cuda]):
        version = pinned.get(normal(requirement.name))
        assert version is None or requirement.specifier.contains(version), requirement


def test_pins_allow_what_every_installed_package_asks_for() -> None:
    """Each requirement that holds here is met by the pinned version."""
    pinned = pins(["constraints.txt", "constraints-cpu.txt"])
    environment = {**default_environment(), "extra": ""}
    wrong = []
    for dist in metadata.distributions():
        if pinned.get(normal(dist.metadata["Name"])) != dist.version:
            continue  # another version than the pinned one says nothing about it
        for requirement in map(Requirement, dist.requires or []):
            version = pinned.get(normal(requirement.name))
            applies = requirement.marker is None or requirement.marker.evaluate(environment)
            if version and applies and not requirement.specifier.contains(version, prereleases=True):
                wrong.append(f"{dist.metadata['Name']} {dist.version} asks for {requirement}, pinned is {version}")
    assert wrong == []


def test_the_package_is_what_the_pins_belong_to() -> None:
    """Every package that the core asks for has a pin, torch aside."""
    pinned = pins(["constraints.txt"])
    asked = [Requirement(text) for text in metadata.requires("shoestring") or [] if "extra ==" not in text]
    assert {normal(r.name) for r in asked} - {"torch"} <= pinned.keys()
