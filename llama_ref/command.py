"""How a command ends: with its exit code, or one line that says what stopped it."""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from llama_ref.interrupts import INTERRUPTED, loud

NOBODY_READS = 141  # what a shell says of a command whose reader has gone, as in `llama-fast generate | head -1`


def run(app: Callable[..., Any]) -> int:
    """Run a Typer application on the command line's arguments; its exit code. What stops it, also a wrong flag, is raised."""
    try:
        loud()
        with warnings.catch_warnings():
            warnings.showwarning = _say_warning  # restored at the end, as are the filters
            code = app(standalone_mode=False) or 0
        if sys.stdout is not None:  # as after `>&-`
            sys.stdout.flush()
        return code
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:
        say_no_more()
        return NOBODY_READS
    except SystemExit as end:
        if isinstance(end.__context__, BrokenPipeError):  # Typer's own ending, with 1: that says DIFFER of llama-oracle
            say_no_more()
            return NOBODY_READS
        if isinstance(end.code, str):
            raise
        return end.code or 0
    except Exception as error:
        endings = {"NoArgsIsHelpError": 2, "Abort": INTERRUPTED}  # by name: Typer has click's classes, or its own
        if type(error).__name__ in endings:
            return endings[type(error).__name__]
        raise


def _say_warning(message: Warning | str, *place: Any, **more: Any) -> None:
    """One line on stderr, without the line of source that raised it."""
    print(f"warning: {' '.join(str(message).split())}", file=sys.stderr, flush=True)


def complain(line: str) -> None:
    """The line that says what stopped a command, on stderr; what cannot be written any more is dropped."""
    try:
        print(line, file=sys.stderr, flush=True)
        if sys.stdout is not None:
            sys.stdout.flush()
    except OSError:
        say_no_more()


def say_no_more() -> None:
    """Send what is still to be written nowhere: Python would complain of it on its way out."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for stream in (sys.stdout, sys.stderr):
        if stream is not None:
            os.dup2(nowhere, stream.fileno())
    os.close(nowhere)


def writable(*files: Path | None) -> None:
    """ValueError for a file that could not be written: better now than after a minute."""
    for file in files:
        if file is None:
            continue
        if not file.parent.is_dir():
            raise ValueError(f"{file.parent}: no such directory, {file.name} could not be written")
        if file.is_dir():
            raise ValueError(f"{file} is a directory, not a file to write")
        if not os.access(file if file.exists() else file.parent, os.W_OK):
            raise ValueError(f"{file} cannot be written")


def one_line(error: BaseException) -> str:
    """What an error says; of a wrong flag also which one is meant."""
    said = error.format_message() if hasattr(error, "format_message") else str(error)
    return " ".join(said.split()) or type(error).__name__


def is_foreseen(error: BaseException) -> bool:
    """Whether the words are for the user; else the error's type belongs to them."""
    return isinstance(error, (ValueError, OSError)) or hasattr(error, "format_message")
