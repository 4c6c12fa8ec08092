"""The algorithms: one small file each. The table is the list."""

from __future__ import annotations

from typing import Any

from shoestring.algorithms.entropy_filter import EntropyFilter
from shoestring.algorithms.grpo import GRPO
from shoestring.algorithms.reinforce_pp import ReinforcePP
from shoestring.algorithms.rloo import RLOO
from shoestring.algorithms.s_grpo import SGRPO
from shoestring.algorithms.t_spmo import TSPMO

ALGORITHMS: dict[str, type[Any]] = {
    "grpo": GRPO,
    "s-grpo": SGRPO,
    "t-spmo": TSPMO,
    "entropy-filter": EntropyFilter,
    "rloo": RLOO,
    "reinforce++": ReinforcePP,
}
