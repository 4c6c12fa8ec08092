"""The command line: parses, calls, prints. Heavy imports happen inside the commands, so that help and mistakes are
quick."""

from __future__ import annotations

import sys

import typer

from shoestring.cli import evaluating, models, showing, training
from shoestring.cli.app import app
from shoestring.errors import NonFiniteError, ShoestringError

# In the order of --help; each module registers its commands when it is imported.
COMMANDS = (training, evaluating, models, showing)


def main() -> None:
    """Runs the command line; a user's mistake is printed without a traceback and exits with 2."""
    try:
        code = app(standalone_mode=False)
        if code == 130:  # typer's own word for Ctrl-C
            _fail("interrupted", 130)
        raise SystemExit(code or 0)
    except ShoestringError as error:
        _fail(f"{type(error).__name__}: {error}", 2)
    except NonFiniteError as error:
        _fail(str(error), 1)
    except typer.Exit as stop:
        raise SystemExit(stop.exit_code) from None
    except KeyboardInterrupt:
        _fail("interrupted", 130)
    except Exception as error:
        if type(error).__module__.startswith(("click", "typer")) and hasattr(error, "format_message"):
            _fail(f"Error: {error.format_message()}", 2)  # type: ignore[attr-defined]
        raise


def _fail(message: str, code: int) -> None:
    print(message, file=sys.stderr)
    raise SystemExit(code)
