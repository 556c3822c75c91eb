"""The command line: one command per function of `api`. Knows no mathematics; tables go to stdout, progress to stderr."""

from __future__ import annotations

import errno
import sys
from typing import Annotated, NoReturn

import typer

from expertsmith.cli import flow, judge, look, models, more  # noqa: F401  each adds its commands
from expertsmith.cli.options import app
from expertsmith.errors import UserError


@app.callback(invoke_without_command=True)
def _root(
    version: Annotated[bool, typer.Option("--version", help="Show the version.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    if version:
        from expertsmith import __version__

        print(f"expertsmith {__version__}")
        raise typer.Exit


def main() -> None:
    """Run the command line. A user's mistake ends in one line and exit code 2; `--debug` shows where it came from."""
    debug = "--debug" in sys.argv
    arguments = [argument for argument in sys.argv[1:] if argument != "--debug"]
    try:
        app(arguments, prog_name="expertsmith")
    except UserError as error:
        if debug:
            raise
        _fail(str(error))
    except (MemoryError, OSError, RuntimeError) as error:
        if debug:
            raise
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            _fail(f"the disk is full{f' ({error.filename})' if error.filename else ''}")
        if not _out_of_memory(error):
            raise
        _fail("memory ran out; run with --memory stream and a smaller --batch-tokens, or on a larger machine")
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        raise SystemExit(130) from None


def _out_of_memory(error: Exception) -> bool:
    """Whether the system or torch had no more memory to give (torch says so in a RuntimeError's text)."""
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    return isinstance(error, MemoryError) or "allocate memory" in str(error) or "out of memory" in str(error)


def _fail(message: str) -> NoReturn:
    print(f"error: {message}", file=sys.stderr)
    raise SystemExit(2)
