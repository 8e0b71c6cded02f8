"""Git LFS pointers: the few lines of text that a clone has in place of a large file that it did not fetch."""

from __future__ import annotations

from pathlib import Path

START = b"version https://git-lfs.github.com/spec/"
TOLD = "a Git LFS pointer, not the file itself; fetch that with `git lfs pull`"


def is_pointer(path: Path) -> bool:
    """Whether a file, which must be there, is such a pointer."""
    with path.open("rb") as file:
        return file.read(len(START)) == START
