"""The commands that make models."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from shoestring.cli.app import Overrides, _split, app

if TYPE_CHECKING:
    pass


@app.command()
def sft(
    arguments: Overrides = None,
    resume: Annotated[str | None, typer.Option(help="The folder of a warm start to go on with.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the resolved config and exit.")] = False,
) -> None:
    """A short supervised warm start on a task's worked solutions; writes an ordinary model folder."""
    from shoestring.config.files import dump, read
    from shoestring.config.settings import build
    from shoestring.run.sft import SftConfig, resumed
    from shoestring.run.sft import sft as run_sft

    values = read(*_split(arguments))
    config = resumed(Path(resume), values) if resume else build(SftConfig, values, "")
    if dry_run:
        print(dump(config), end="")
    else:
        run_sft(config, resume=resume)


@app.command()
def merge(
    run: Annotated[str, typer.Argument(help="A run's folder, a checkpoint of one, or a PEFT adapter folder.")],
    out: Annotated[str, typer.Argument(help="The model folder to write.")],
) -> None:
    """Write a run's model with the adapter added into its weights."""
    from shoestring.run.sft import merge as run_merge

    print(f"model: {run_merge(run, out)}")
