"""One thread a test process (two run side by side), and shape annotations checked in the modules that carry them."""

from __future__ import annotations

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # read when huggingface_hub is imported

from pathlib import Path

import pytest
import torch
from jaxtyping import install_import_hook

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when a kernel is defined

torch.set_num_threads(1)
install_import_hook(
    ["shoestring.objectives", "shoestring.model.logprobs", "shoestring.model.draw", "shoestring.algorithms.base"],
    "beartype.beartype",
)

ROOT = Path(__file__).parent.parent


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tests write nowhere else."""
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def data_folder() -> Path:
    """The folder with SVAMP and GSM8K that SHOESTRING_DATA names, where there is one."""
    root = os.environ.get("SHOESTRING_DATA")
    if not root or not Path(root).is_dir():
        pytest.skip("SHOESTRING_DATA does not name a folder with SVAMP and GSM8K")
    return Path(root)
