"""TensorBoard, by torch's own writer: event files in the run's folder."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from shoestring.config.extras import need
from shoestring.config.settings import Settings
from shoestring.trackers.base import Log


class TensorBoard(Settings):
    """Event files in the run's folder, for `tensorboard --logdir`."""

    name: Literal["tensorboard"] = "tensorboard"

    def check(self) -> None:
        need("tensorboard", "tensorboard", 'tracking.name is "tensorboard"')

    @contextmanager
    def opened(self, folder: Path, config: Mapping[str, Any], done: int) -> Iterator[Log]:
        from torch.utils.tensorboard import SummaryWriter

        with SummaryWriter(str(folder / "tensorboard"), purge_step=done) as writer:

            def log(step: int, values: Mapping[str, float]) -> None:
                for name, value in values.items():
                    writer.add_scalar(name, value, step)
                writer.flush()

            yield log
