"""Compare what two source trees do: eleven small runs on the CPU, byte for byte.

    python bench/identity.py record SOURCE OUT     runs the package of SOURCE/src, one process a run
    python bench/identity.py compare OLD NEW       exits with 1 at any difference

Seconds and bytes are set aside: they say how long a step took and what it held, not what it computed. `--renamed` names
a JSON file with old and new names of metrics; `--intended` one that lists [run, key] pairs that may differ, which are
printed with both values.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from safetensors import safe_open

ASIDE = {"seconds", "tokens_per_s", "peak_bytes", "peaks", "reserved_bytes"}
BASE: dict[str, Any] = {
    "steps": 6,
    "save_every": 3,
    "sampling": {"num_prompts": 4, "num_completions": 4, "max_new_tokens": 32},
    "optim": {"lr": 1e-3},
    "execution": {"device": "cpu"},
    "out": "run",
}
RUNS: dict[str, dict[str, Any]] = {
    "grpo": {"algorithm": {"name": "grpo"}, "eval_every": 3, "evaluation": {"num": 8}},
    "s-grpo": {"algorithm": {"name": "s-grpo", "alpha": 4, "k": 8}},
    "t-spmo-replay": {"algorithm": {"name": "t-spmo", "replay_from": "both", "replay_completions": 3}},
    "entropy-filter": {"algorithm": {"name": "entropy-filter"}},
    "dynamic-sampling": {
        "algorithm": {"name": "grpo"},
        "sampling": {"num_prompts": 4, "num_completions": 2, "max_new_tokens": 32, "dynamic_sampling": 4},
    },
    "updates-2": {"algorithm": {"name": "grpo"}, "objective": {"updates": 2}},
    "beta": {"algorithm": {"name": "s-grpo"}, "objective": {"beta": 0.04}},
    "whole-weights": {"algorithm": {"name": "grpo"}, "adapter": {"name": "none"}, "optim": {"lr": 1e-4}},
    "budget": {
        "algorithm": {"name": "grpo"},
        "memory": "smallest",
        "sampling": {"num_prompts": 16, "num_completions": 8, "max_new_tokens": 64},
    },
    "workers": {"algorithm": {"name": "grpo"}, "rewards": {"workers": 2}},
    "resumed": {"algorithm": {"name": "s-grpo", "alpha": 4, "k": 8}},
}


def carry_out(name: str) -> None:
    """Do one run in the folder `run` of the current directory; called in a process of its own."""
    import torch

    from shoestring import train

    torch.set_num_threads(1)
    config = {**BASE, **RUNS[name]}
    if name == "budget":
        config |= within_the_smallest_budget(config)
    if name != "resumed":
        train(config, quiet=True)
        return
    train({**config, "steps": 3}, quiet=True)
    train({"steps": 6}, resume="run", quiet=True)


def within_the_smallest_budget(config: Mapping[str, Any]) -> dict[str, str]:
    """The least budget that the plan of this tree allows, so that sampling needs several waves."""
    from shoestring.plan import predict

    plain = {key: value for key, value in config.items() if key != "memory"}
    budget = f"{-(-predict(plain).smallest // 2**20) + 1}MiB"
    plan = predict({**plain, "memory": budget})
    assert plan.waves > 1, f"{budget} forces no waves"
    return {"memory": budget}


def record(source: Path, out: Path) -> None:
    """Carry out every run with the package of a source tree, and keep each run's folder."""
    for name in RUNS:
        folder = out / name
        folder.mkdir(parents=True)
        paths = os.pathsep.join([str(source.absolute() / "src"), str(Path(__file__).parent.absolute())])
        code = f"import identity; identity.carry_out({name!r})" if name != "workers" else _GUARDED.format(name)
        with tempfile.NamedTemporaryFile("w", suffix=".py", dir=folder) as script:  # workers read the script again
            script.write(code)
            script.flush()
            environment = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
            subprocess.run([sys.executable, script.name], cwd=folder, env=environment, check=True)
        print(f"{name}: recorded", flush=True)


_GUARDED = "import identity\nif __name__ == '__main__':\n    identity.carry_out({!r})\n"


def compare(old: Path, new: Path, renamed: Mapping[str, str], intended: set[tuple[str, str]]) -> bool:
    """Print one line a run; whether all runs are the same but for what is intended."""
    fine = True
    for name in RUNS:
        found = list(differences(old / name / "run", new / name / "run", renamed))
        meant = [line for key, line in found if (name, key) in intended]
        unmeant = [line for key, line in found if (name, key) not in intended]
        print(f"{name}: {unmeant[0] if unmeant else 'same'}" + "".join(f"\n  intended: {line}" for line in meant))
        fine &= not unmeant
    return fine


def differences(old: Path, new: Path, renamed: Mapping[str, str]) -> Iterator[tuple[str, str]]:
    """The keys in which two runs differ, each with a line that says how."""
    for log in ("metrics.jsonl", "samples.jsonl", "evals.jsonl"):
        left, right = _lines(old / log), _lines(new / log)
        if len(left) != len(right):
            yield log, f"{log} has {len(left)} lines and {len(right)}"
        for number, (a, b) in enumerate(zip(left, right, strict=False)):
            a = {renamed.get(key, key): value for key, value in a.items()}
            for key in sorted((a.keys() | b.keys()) - ASIDE):
                if json.dumps(a.get(key)) != json.dumps(b.get(key)):
                    yield key, f"{log} line {number}, {key}: {a.get(key)!r} -> {b.get(key)!r}"
    for folder in ("adapter", "model", "best"):
        for file in sorted((old / folder).rglob("*.safetensors")):
            other = new / file.relative_to(old)
            if not other.exists() or _tensors(file) != _tensors(other):
                yield str(file.relative_to(old)), f"{file.relative_to(old)} holds other tensors"


def _lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []


def _tensors(path: Path) -> dict[str, str]:
    """A digest of each tensor."""
    with safe_open(path, "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    return {name: hashlib.sha256(t.float().numpy().tobytes()).hexdigest() for name, t in tensors.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("record", "compare"))
    parser.add_argument("first", type=Path)
    parser.add_argument("second", type=Path)
    parser.add_argument("--renamed", type=Path)
    parser.add_argument("--intended", type=Path)
    given = parser.parse_args()
    if given.what == "record":
        record(given.first, given.second)
        return
    renamed = json.loads(given.renamed.read_text()) if given.renamed else {}
    intended = {(run, key) for run, key in json.loads(given.intended.read_text())} if given.intended else set()
    raise SystemExit(not compare(given.first, given.second, renamed, intended))


if __name__ == "__main__":
    main()
