"""The trackers. The table is the list."""

from __future__ import annotations

from typing import Any

from shoestring.trackers.base import NoTracker
from shoestring.trackers.tensorboard import TensorBoard
from shoestring.trackers.wandb import Trackio, WandB

TRACKERS: dict[str, type[Any]] = {
    "none": NoTracker,
    "tensorboard": TensorBoard,
    "wandb": WandB,
    "trackio": Trackio,
}
