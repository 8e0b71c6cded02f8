"""A command before it runs: PyTorch takes seconds to load, in which Ctrl-C would end in a traceback. Imports next to nothing."""

from __future__ import annotations

import gc
import os
import signal
import sys
from types import FrameType

INTERRUPTED = 130  # what a shell says of a command that Ctrl-C ended
COMMANDS = ("llama-fast", "llama-oracle")
PACKAGES = ("llama_fast", "oracle")


def quiet_until_run() -> None:
    """Let Ctrl-C end the process at once and without a word, if it is one of our commands, until it calls `loud`.

    Until then it collects no garbage either: modules leave next to none, and looking for it is a fifth of the time that they take
    to load. A program that imports us as a library is left as it is.
    """
    if is_command(sys.argv, sys.orig_argv) and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        try:
            signal.signal(signal.SIGINT, _end_at_once)
        except ValueError:  # not in the main thread: nobody's command
            return
        gc.disable()


def loud() -> None:
    """From here on Ctrl-C is a KeyboardInterrupt again, and garbage is collected, but not looked for in what was loaded."""
    if signal.getsignal(signal.SIGINT) is _end_at_once:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        gc.freeze()
        gc.enable()


def is_command(argv: list[str], all_words: list[str]) -> bool:
    """Whether a process with these words was started as our command: llama-fast, or `python -m` and one of our packages."""
    if not argv:
        return False
    if argv[0] == "-m":  # Python is looking for the module that it was told to run
        return any(word.split(".")[0].removeprefix("-m") in PACKAGES for word in all_words[1:])
    return os.path.basename(argv[0]).removesuffix(".exe") in COMMANDS


def _end_at_once(number: int, frame: FrameType | None) -> None:
    os._exit(INTERRUPTED)
