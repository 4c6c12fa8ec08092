"""The application and what several commands share."""

from __future__ import annotations

from typing import Annotated

import typer

from shoestring.errors import ConfigError

app = typer.Typer(
    help="Reinforcement learning of LLM reasoning on one memory-constrained GPU.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


Overrides = Annotated[list[str] | None, typer.Argument(help="A TOML recipe (or none), then KEY=VALUE overrides.")]


Target = Annotated[
    list[str] | None,
    typer.Argument(help="A run's folder or a model, then KEY=VALUE settings of the task."),
]


def _split(arguments: list[str] | None) -> tuple[str | None, list[str]]:
    """The first argument, if it is no KEY=VALUE, and the rest, which must be."""
    given = list(arguments or [])
    first = given.pop(0) if given and "=" not in given[0] else None
    for argument in given:
        if "=" not in argument:
            raise ConfigError(f'an argument is "{argument}"', "it is no KEY=VALUE", "write one, such as optim.lr=1e-4")
    return first, given


def _ints(text: str, name: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise ConfigError(
            f'{name} is "{text}"', "it is no list of whole numbers", "write one, such as 1,4,16"
        ) from None
