"""The samplers: one file each. The table is the list."""

from __future__ import annotations

from typing import Any

from shoestring.model.sampling import Sampling
from shoestring.samplers.auto import AutoSampler
from shoestring.samplers.graph import GraphSampler
from shoestring.samplers.hf import HfSampler

SAMPLERS: dict[str, type[Any]] = {
    "auto": AutoSampler,
    "graph": GraphSampler,
    "hf": HfSampler,
}

__all__ = ["SAMPLERS", "Sampling"]
