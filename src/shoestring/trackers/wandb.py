"""Weights & Biases, and Trackio, which has the same functions."""

from __future__ import annotations

import importlib
import os
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar, Literal

from shoestring.config.extras import need
from shoestring.config.settings import Settings
from shoestring.errors import ConfigError
from shoestring.trackers.base import Log


class _Package(Settings):
    """What the two share."""

    project: str = "shoestring"

    package: ClassVar[str]

    def check(self) -> None:
        need(self.package, self.package, f'tracking.name is "{self.package}"')

    @contextmanager
    def opened(self, folder: Path, config: Mapping[str, Any], done: int) -> Iterator[Log]:
        package: Any = importlib.import_module(self.package)
        try:
            run = package.init(
                project=self.project, config=dict(config), resume="allow", **self.called(folder, kept_name(folder))
            )
        except Exception as error:
            given = f'tracking.name is "{self.package}"'
            raise ConfigError(given, f"it cannot be started ({error})", "fix that, or leave tracking out") from error
        try:
            yield lambda step, values: run.log(dict(values), step=step)
        except BaseException:
            self.finish(run, failed=True)
            raise
        self.finish(run, failed=False)

    def finish(self, run: Any, *, failed: bool) -> None:
        run.finish()

    def called(self, folder: Path, name: str) -> dict[str, Any]:
        """What makes a resumed run one with what was tracked of it before."""
        return {"name": name}


class WandB(_Package):
    """Weights & Biases; its own variables, such as WANDB_MODE=offline, hold."""

    name: Literal["wandb"] = "wandb"
    package: ClassVar[str] = "wandb"

    def called(self, folder: Path, name: str) -> dict[str, Any]:
        return {"name": name, "id": name[-8:], "dir": str(folder)}

    def finish(self, run: Any, *, failed: bool) -> None:
        run.finish(exit_code=int(failed))


class Trackio(_Package):
    """Trackio: Weights & Biases' functions, kept on this machine."""

    name: Literal["trackio"] = "trackio"
    package: ClassVar[str] = "trackio"


def kept_name(folder: Path) -> str:
    """That of the run's folder and 8 letters of its own, in a file there: the folder may be moved or renamed."""
    path = folder / "tracking-name"
    if not path.is_file():
        draft = folder / ".draft-tracking-name"
        draft.write_text(f"{folder.absolute().name}-{uuid.uuid4().hex[:8]}", encoding="utf-8")
        os.replace(draft, path)
    return path.read_text(encoding="utf-8")
