"""The comparison of two trees' speed, with scripts of known results."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from conftest import ROOT

SCRIPT = """
import json, sys
from pathlib import Path
rows = [{"setting": "no budget", "completed": True, "step_s": STEP, "step_s_least": STEP / 2, "runs": 5}]
rows.append({"setting": "other", "completed": False})
found = {"device": "some", "versions": {"python": "3"}, "rows": rows}
(Path(sys.argv[1]) / "w1.json").write_text(json.dumps(found))
"""


@pytest.fixture(autouse=True)
def _bench(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT / "bench")


def tree(name: str, script: str, room: str = "") -> str:
    """A source tree with one script, in a folder of bench/ where `room` says so."""
    folder = Path(name) / "bench" / room
    folder.mkdir(parents=True)
    (folder / "w1.py").write_text(script)
    (Path(name) / "src" / "shoestring").mkdir(parents=True)
    (Path(name) / "src" / "shoestring" / "__init__.py").touch()
    return name


def test_ratios_are_written_and_printed(capsys: pytest.CaptureFixture[str]) -> None:
    import compare

    old, new = tree("old", SCRIPT.replace("STEP", "2.0")), tree("new", SCRIPT.replace("STEP", "1.0"), "speed")
    compare.main([old, new, "out", "--only", "w1", "--rounds", "2"])
    found = json.loads(Path("out/compare.json").read_text())
    assert {"benchmark", "device", "versions", "date", "rows", "old", "new"} <= found.keys()
    (row,) = found["rows"]
    assert (row["workload"], row["ratio"], row["rounds"], row["old_least"]) == ("w1", 0.5, 2, 1.0)
    assert "0.500 to 0.500" in capsys.readouterr().out


def test_a_script_that_fails_is_left_out_with_a_reason(capsys: pytest.CaptureFixture[str]) -> None:
    import compare

    old, new = tree("old", SCRIPT.replace("STEP", "2.0")), tree("new", "raise SystemExit(3)")
    with pytest.raises(SystemExit):
        compare.main([old, new, "--only", "w1", "--rounds", "1"])
    assert "left out: w1, round 1: new: it ended with 3" in capsys.readouterr().out


def test_nothing_starts_behind_the_limit(capsys: pytest.CaptureFixture[str]) -> None:
    import compare

    old, new = tree("old", SCRIPT.replace("STEP", "2.0")), tree("new", SCRIPT.replace("STEP", "1.0"))
    with pytest.raises(SystemExit):
        compare.main([old, new, "--only", "w1", "--limit", "0"])
    assert "left out: w1, round 1: the limit of 0 s" in capsys.readouterr().out
