"""Shoestring: reinforcement learning of LLM reasoning on one memory-constrained GPU.

    from shoestring import train
    run = train({"task": "multiplication", "algorithm": {"name": "t-spmo"}, "steps": 100})

The public names; each is imported when it is first used, so that this import costs nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from shoestring.config.run import RunConfig, load
    from shoestring.errors import ConfigError, DataError
    from shoestring.evaluation.evaluate import evaluate
    from shoestring.model.policy import Policy
    from shoestring.run.handle import Run
    from shoestring.run.loading import load_policy
    from shoestring.run.loop import train
    from shoestring.run.sft import SftConfig, merge, sft

__version__ = "0.1.0"

_HOME = {
    "RunConfig": "config.run",
    "load": "config.run",
    "ConfigError": "errors",
    "DataError": "errors",
    "evaluate": "evaluation.evaluate",
    "Policy": "model.policy",
    "load_policy": "run.loading",
    "SftConfig": "run.sft",
    "merge": "run.sft",
    "sft": "run.sft",
    "Run": "run.handle",
    "train": "run.loop",
}

__all__ = [
    "ConfigError",
    "DataError",
    "Policy",
    "Run",
    "RunConfig",
    "SftConfig",
    "evaluate",
    "load",
    "load_policy",
    "merge",
    "sft",
    "train",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'shoestring' has no attribute {name!r}")
    return getattr(import_module(f"shoestring.{_HOME[name]}"), name)
