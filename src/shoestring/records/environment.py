"""What a run ran on, for bug reports and for result files."""

from __future__ import annotations

import os
import platform
import shlex
import shutil
import sys
from importlib import metadata

PACKAGES = ("shoestring", "torch", "transformers", "peft", "tokenizers", "safetensors", "pydantic", "math-verify")


def command() -> str:
    """How to call the command line from here: by its name where that is on the PATH, else through this Python."""
    if shutil.which("shoestring"):
        return "shoestring"
    here = os.path.relpath(sys.executable)
    return f"{sys.executable if here.startswith('..') else here} -m shoestring"


def quoted(path: object) -> str:
    """A path or name as a shell takes it.

    >>> quoted("runs/my run")
    "'runs/my run'"
    """
    return shlex.quote(str(path))


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that matter; "-" where one is missing."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "-"
    return found


def device_name() -> str:
    """The GPU's name, else the processor's."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            names = [line.partition(":")[2].strip() for line in file if line.startswith("model name")]
        threads = torch.get_num_threads()
        return f"{names[0]}, {threads} thread{'s' * (threads > 1)}" if names else platform.processor()
    except OSError:
        return platform.processor() or platform.machine()


def describe() -> dict[str, str]:
    import torch

    cuda = f"{torch.version.cuda}, {torch.cuda.device_count()} devices" if torch.cuda.is_available() else "none"
    return {
        **versions(),
        "torch": torch.__version__,
        "system": platform.platform(),
        "device": device_name(),
        "cuda": cuda,
    }
