# SPDX-License-Identifier: Apache-2.0
"""The ``vtprune`` command: a file for each of its commands.

Results go to stdout, progress and errors to stderr. Every mistake of the user is one line ``error: ...`` that names the
cure, with exit code 2. Heavy imports happen inside the commands, so that ``vtprune --help`` answers at once.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Annotated

import typer

from .. import __version__
from ..errors import VTPruneError
from . import ask, bench, board, common, demo, doctor, evaluate, lens, methods
from .common import app, one_line

__all__ = ["app", "ask", "bench", "board", "common", "demo", "doctor", "evaluate", "lens", "main", "methods"]

#: A call of each command that must be given something.
EXAMPLES = {
    "ask": 'ask examples/shapes.png "what does the text say ?"',
    "board": "board results",
    "doctor": "doctor pocket-llava",
    "lens": "lens examples/shapes.png",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code; without arguments, print the help."""
    given = list(sys.argv[1:] if arguments is None else arguments) or ["--help"]
    try:
        return app(given, standalone_mode=False) or 0
    except VTPruneError as error:
        return _fail(error)
    except typer.Abort:
        return 130
    except Exception as error:
        # What the argument parser says about wrong arguments. Its exception classes moved between versions of typer,
        # the method did not.
        if hasattr(error, "format_message"):
            return _fail(f"{error.format_message()}{_example(error)}")
        raise


def _example(error: Exception) -> str:
    """How the command is called of which an argument is missing; nothing after other mistakes."""
    command = getattr(getattr(error, "ctx", None), "info_name", None)
    if type(error).__name__ != "MissingParameter" or command not in EXAMPLES:
        return ""
    return f" For example: vtprune {EXAMPLES[command]}"


def _fail(reason: object) -> int:
    print("error:", one_line(reason), file=sys.stderr)
    return 2


def _print_version(wanted: bool) -> None:
    if wanted:
        print("vtprune", __version__)
        raise typer.Exit


@app.callback()
def _options(
    show_version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, metavar="", help="Print the version and exit."
        ),
    ] = False,
) -> None:
    """Prune the visual tokens of vision-language models."""
