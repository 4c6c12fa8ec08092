"""The commands that train and plan."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from shoestring.cli.app import Overrides, _split, app
from shoestring.cli.printing import _print_plan

if TYPE_CHECKING:
    pass


@app.command()
def train(
    arguments: Overrides = None,
    resume: Annotated[str | None, typer.Option(help="The folder of a run to go on with.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the resolved config and exit.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="Print nothing but warnings and errors.")] = False,
    profile: Annotated[
        bool,
        typer.Option("--profile", help="Write trace.json.gz (for Perfetto) and profile.json into the run's folder."),
    ] = False,
) -> None:
    """Train a model: [RECIPE] [KEY=VALUE ...]. Without a recipe: the embedded default."""
    from shoestring.config import run as configs
    from shoestring.config.files import dump, read
    from shoestring.model import load as models

    recipe, overrides = _split(arguments)
    if dry_run:
        values = read(recipe, overrides)
        print(dump(_resolved(resume, values)), end="")
        return
    values = read(recipe, overrides) if recipe or overrides or not resume else None
    if not resume:  # a mistake is reported before transformers is loaded
        models.locate(configs.settle(values or {}).model.name)

    from shoestring.run.loop import carried_out
    from shoestring.run.messages import where_it_lies

    run = carried_out(values, resume=resume, quiet=quiet, profile=profile)
    if not quiet:
        print(where_it_lies(run))
    if run.stopped_by:
        raise SystemExit(128 + run.stopped_by)


def _resolved(resume: str | None, values: dict[str, Any]) -> Any:
    from shoestring.config import run as configs
    from shoestring.run import folder as runs

    return runs.resumed_config(Path(resume), values or None) if resume else configs.settle(values)


@app.command()
def plan(
    arguments: Overrides = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")] = False,
) -> None:
    """What a run will take of the card, before it starts: [RECIPE] [KEY=VALUE ...]. Loads no weights."""
    os.environ["HF_HUB_OFFLINE"] = os.environ["HF_DATASETS_OFFLINE"] = "1"  # what is on this machine has to do

    from shoestring.config import run as configs
    from shoestring.memory.plan import predict

    recipe, overrides = _split(arguments)
    config = configs.load(recipe, overrides)
    found = predict(config)
    if as_json:
        print(json.dumps(found.as_json()))
    else:
        _print_plan(config, found)
