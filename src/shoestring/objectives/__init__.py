"""The terms that an objective is the sum of: one small file each. The table is the list."""

from __future__ import annotations

from typing import Any

from shoestring.objectives.cispo import CISPO
from shoestring.objectives.gspo import GSPO
from shoestring.objectives.k3 import K3
from shoestring.objectives.ppo import PPO

TERMS: dict[str, type[Any]] = {
    "ppo": PPO,
    "gspo": GSPO,
    "cispo": CISPO,
    "k3": K3,
}
