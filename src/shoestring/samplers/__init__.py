"""The samplers: one file each. The table is the list."""

from __future__ import annotations

from typing import Any

from shoestring.samplers.base import Sampling
from shoestring.samplers.hf import HfSampler

SAMPLERS: dict[str, type[Any]] = {
    "hf": HfSampler,
}

__all__ = ["SAMPLERS", "Sampling"]
