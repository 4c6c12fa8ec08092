"""Install torch, then this package, into the environment of the Python that runs this.

    python tools/install.py torch 2.13.0      the build that suits the machine, from the first source that has it
    python tools/install.py package [test]    this folder, editable, with the versions that were tested together

torch comes in builds: one for the CPU, and one for CUDA that takes several GB. Without an NVIDIA driver the CPU build
is asked for first, from what pip is configured to see and then from PyTorch's own index. Where neither has it, the
build that pip finds by itself runs on the CPU too, and is only larger.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parent.parent
CPU_INDEX = "https://download.pytorch.org/whl/cpu"
DRIVER = Path("/proc/driver/nvidia/version")


class Attempt(NamedTuple):
    """One way to install torch: what it is, pip's arguments, and what to say before it starts."""

    name: str
    arguments: tuple[str, ...]
    notice: str = ""


def attempts(version: str, driver: bool) -> list[Attempt]:
    """The ways to install torch, in the order in which they are tried."""
    cpu = [
        Attempt("the CPU build from the configured indexes", (f"torch=={version}+cpu",)),
        Attempt(f"the CPU build from {CPU_INDEX}", (f"torch=={version}", "--index-url", CPU_INDEX)),
    ]
    large = "This build is for CUDA and takes several GB. It runs on the CPU too." * (not driver)
    default = Attempt("the default build from the configured indexes", (f"torch=={version}",), large)
    return [default, *cpu] if driver else [*cpu, default]


def has_driver() -> bool:
    """Whether the machine has an NVIDIA driver."""
    return DRIVER.exists() or shutil.which("nvidia-smi") is not None


def pip(arguments: Sequence[str]) -> tuple[int, str]:
    """Run pip; its exit status and what it printed."""
    command = [sys.executable, "-m", "pip", "install", "-q", "--retries", "2", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.returncode, (done.stdout + done.stderr).strip()


def install_torch(version: str, driver: bool, run: Callable[[Sequence[str]], tuple[int, str]] = pip) -> int:
    """Try each way until one works; print every error where none does. Returns the exit status."""
    errors = []
    for attempt in attempts(version, driver):
        print(f"torch {version}: trying {attempt.name}. {attempt.notice}".rstrip(), flush=True)
        status, output = run(attempt.arguments)
        if status == 0:
            return 0
        errors.append(f"--- {attempt.name} ---\n{output}")
    print(f"torch {version} could not be installed. Each attempt's error:", *errors, sep="\n", file=sys.stderr)
    print(
        "\nWhat to do: check the network and `pip config list`; give another version with `make TORCH=...`; or install "
        "torch into .venv yourself, run `touch .venv/torch`, and call make again.",
        file=sys.stderr,
    )
    return 1


def constraints(cuda: bool) -> list[str]:
    """The files that hold the versions to install; a CUDA build of torch brings a Triton of its own."""
    return ["constraints.txt"] if cuda else ["constraints.txt", "constraints-cpu.txt"]


def install_package(extra: str) -> int:
    """Install this folder with an extra, next to the torch that is there. Returns the exit status."""
    import torch

    files = [part for name in constraints(torch.version.cuda is not None) for part in ("-c", str(ROOT / name))]
    status, output = pip(["-e", f"{ROOT}[{extra}]" if extra else str(ROOT), *files])
    if status:
        print(output, file=sys.stderr)
    return status


if __name__ == "__main__":
    what, *rest = sys.argv[1:]
    raise SystemExit(install_torch(rest[0], has_driver()) if what == "torch" else install_package("".join(rest)))
