"""What the benchmarks share: random models of real shapes, runs of ours in one process, and the result files."""

from __future__ import annotations

import gc
import json
import random
import shutil
import statistics
import tempfile
import time
from datetime import date
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

import shoestring
from shoestring.records.environment import device_name, versions

TINY = Path(shoestring.__file__).parent / "tiny" / "model"
GIB = 2**30

# The published sizes; weights are random, since speed and memory do not ask for skill.
SHAPES: dict[str, dict[str, Any]] = {
    "tiny": {
        "hidden_size": 64,
        "intermediate_size": 160,
        "num_hidden_layers": 6,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 600,
        "tie_word_embeddings": True,
    },
    "smollm2-135m": {
        "model_type": "llama",
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "vocab_size": 49_152,
        "tie_word_embeddings": True,
    },
    "qwen2-0.5b": {
        "hidden_size": 896,
        "intermediate_size": 4864,
        "num_hidden_layers": 24,
        "num_attention_heads": 14,
        "num_key_value_heads": 2,
        "vocab_size": 151_936,
        "tie_word_embeddings": True,
    },
    "qwen2-1.5b": {
        "hidden_size": 1536,
        "intermediate_size": 8960,
        "num_hidden_layers": 28,
        "num_attention_heads": 12,
        "num_key_value_heads": 2,
        "vocab_size": 151_936,
        "tie_word_embeddings": True,
    },
    "qwen2.5-7b": {
        "hidden_size": 3584,
        "intermediate_size": 18_944,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "vocab_size": 152_064,
        "tie_word_embeddings": False,
    },
}


def random_model(shape: str) -> Path:
    """A folder with a model of that shape in bf16 and the embedded model's tokenizer; made once."""
    from transformers import AutoConfig, AutoModelForCausalLM

    memory_disk = Path("/dev/shm")
    folder = (memory_disk if memory_disk.is_dir() else Path(tempfile.gettempdir())) / f"shoestring-bench-{shape}"
    if (folder / "done").is_file():
        return folder
    shutil.rmtree(folder, ignore_errors=True)
    common = {"max_position_embeddings": 32_768, "eos_token_id": 257, "pad_token_id": 256}
    config = AutoConfig.for_model(**{"model_type": "qwen2", **common, **SHAPES[shape]})
    torch.manual_seed(0)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(folder)
    for file in TINY.glob("*token*"):
        shutil.copy(file, folder)
    (folder / "done").touch()
    del model
    clean()
    return folder


def clean() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch._C._cuda_clearCublasWorkspaces()  # of the stream that a system before used
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def prompts(lengths: list[int]) -> list[dict[str, str]]:
    """Rows whose prompts have exactly these numbers of tokens (a digit is one)."""
    return [
        {"prompt": "".join(random.Random(i).choices("123456789", k=n)), "answer": "0"} for i, n in enumerate(lengths)
    ]


class Noise:
    """A reward of seeded uniform noise, so that every group trains."""

    __name__ = "noise"

    def __init__(self) -> None:
        self._random = random.Random(0)

    def __call__(self, completions: list[Any], **kwargs: Any) -> list[float]:
        return [self._random.random() for _ in completions]


def our_run(config: dict[str, Any], lengths: list[int]) -> Any:
    """The reports of a run of ours, in a folder that is thrown away."""
    from shoestring import train

    clean()
    with tempfile.TemporaryDirectory() as out:
        base = {"task": {"name": "file:data", "format": "plain", "check": "none"}, "save_every": 0, "out": f"{out}/run"}
        run = train({**base, **config}, data=prompts(lengths), rewards=[Noise()], quiet=True)
        reports = list(run.reports)
    del run
    clean()
    return reports


def row(system: str, setting: str, reports: list[Any], *, skip: int = 1) -> dict[str, Any]:
    """A line of a result file: medians over the steps after the first `skip`, peaks over all."""
    warm = reports[skip:] or reports
    sample = statistics.median(r.seconds["sample"] for r in warm)
    steps = [sum(r.seconds.values()) for r in warm]
    return {
        "system": system,
        "setting": setting,
        "step_s": statistics.median(steps),
        "step_s_least": min(steps),
        "step_s_most": max(steps),
        "sample_s": sample,
        "train_s": statistics.median(r.seconds["train"] for r in warm),
        "tokens_per_s": warm[0].tokens_sampled / sample,
        "peak_allocated_gib": max(r.peak_bytes for r in reports) / GIB,
        "peak_sample_gib": max(r.peaks.get("sample", 0) for r in reports) / GIB,
        "peak_train_gib": max(r.peaks.get("train", 0) for r in reports) / GIB,
        "peak_reserved_gib": max(r.reserved_bytes for r in reports) / GIB,
        "wave_tokens": reports[-1].wave_tokens,
        "micro_batch_tokens": reports[-1].micro_batch_tokens,
        "checkpointing": reports[-1].checkpointing,
        "runs": len(warm) if len(reports) > skip else 1,
        "warm": len(reports) > skip,
    }


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def write(out: str, name: str, rows: list[dict[str, Any]], **more: Any) -> None:
    """`<out>/<name>.json`, written after each row, so that a cut-off run leaves what it has."""
    found = {
        "benchmark": name,
        "device": device_name(),
        "versions": {**versions(), **{name: _version(name) for name in ("trl", "bitsandbytes") if _version(name)}},
        "date": date.today().isoformat(),
        **more,
        "rows": rows,
    }
    Path(out).mkdir(parents=True, exist_ok=True)
    (Path(out) / f"{name}.json").write_text(json.dumps(found, indent=1), encoding="utf-8")
    last = {key: round(v, 3) if isinstance(v, float) else v for key, v in rows[-1].items()} if rows else {}
    print(f"{time.strftime('%X')} {name}: {json.dumps(last)}", flush=True)
