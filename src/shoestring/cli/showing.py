"""The commands that show."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Annotated

import typer

from shoestring.cli.app import app
from shoestring.errors import ConfigError

if TYPE_CHECKING:
    pass


@app.command()
def report(
    run: Annotated[str, typer.Argument(help="A run's folder.")],
    out: Annotated[
        str | None, typer.Option(help="The file to write; default: report.html in the run's folder.")
    ] = None,
) -> None:
    """Write a run as one HTML page: its curves, completions with the credit of their tokens, its settings."""
    os.environ["HF_HUB_OFFLINE"] = "1"  # the tokenizer that is on this machine has to do

    from shoestring.records.html_report import write_page

    print(f"report: {write_page(run, out)}")


@app.command("list")
def list_(
    kind: Annotated[
        str | None,
        typer.Argument(help="tasks, algorithms, adapters, samplers, optimizers, terms, trackers or gym."),
    ] = None,
) -> None:
    """List what there is, from the tables themselves."""
    from shoestring.adapters import ADAPTERS
    from shoestring.algorithms import ALGORITHMS
    from shoestring.errors import nearest
    from shoestring.objectives import TERMS
    from shoestring.optimizers import OPTIMIZERS
    from shoestring.samplers import SAMPLERS
    from shoestring.tasks import TASKS, gym
    from shoestring.trackers import TRACKERS

    tables = {"tasks": TASKS, "algorithms": ALGORITHMS, "adapters": ADAPTERS, "samplers": SAMPLERS}
    tables |= {"optimizers": OPTIMIZERS, "terms": TERMS, "trackers": TRACKERS}
    if kind == "gym":
        print("\n".join(f"gym:{name}" for name in gym.available()))
        print("\n".join(f"(left out: {name}: {reason})" for name, reason in gym.EXCLUDED.items()))
        return
    if kind is not None and kind not in tables:
        raise ConfigError(f'the list is "{kind}"', "there is none of that name", nearest(kind, [*tables, "gym"]))
    for name, table in tables.items():
        if kind in (None, name):
            print(f"{name}:")
            for key, cls in table.items():
                print(f"  {key:<16}{(cls.__doc__ or '').strip().splitlines()[0]}")


@app.command()
def env() -> None:
    """Versions, for a bug report."""
    from shoestring.records.environment import describe

    for name, value in describe().items():
        print(f"{name:<16}{value}")
