"""The header of a GGUF file: metadata, and where each tensor lies. Nothing else of the file is read.

Written here rather than taken from the `gguf` package because that builds an array per vocabulary string and needs
seconds; a test holds the two against each other. Layout: github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import hashlib
import mmap
import re
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llama_ref.formats import lfs_pointers
from llama_ref.weights import CheckpointError

MAGIC = b"GGUF"
VERSIONS = (2, 3)
SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
STRING, ARRAY = 8, 9
DEFAULT_ALIGNMENT_BYTES = 32
PART = re.compile(r"(?P<stem>.*)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf")  # gguf-split's names


@dataclass(frozen=True)
class TensorPlace:
    """Where a tensor lies: `shape` as PyTorch counts (rows first), `ggml_type` the number of its encoding."""

    shape: tuple[int, ...]
    ggml_type: int
    offset_bytes: int  # from the start of the file


@dataclass(frozen=True)
class Header:
    """`fingerprint` is the SHA-256 of the header's bytes: the same vocabulary and settings, the same fingerprint."""

    metadata: dict[str, Any]
    tensors: dict[str, TensorPlace]
    fingerprint: str


def read_header(path: Path) -> Header:
    """Read a file's header; raises CheckpointError if it is no GGUF, or ends within the header."""
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            return _parse(content)
    except (struct.error, IndexError, UnicodeDecodeError, OverflowError, RecursionError) as error:
        raise CheckpointError(f"{path}: truncated or corrupt GGUF header") from error
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from error
    except (OSError, ValueError) as error:  # mmap refuses an empty file with ValueError
        raise CheckpointError(f"{path}: not readable ({error})") from error


def _parse(content: mmap.mmap) -> Header:
    if content[: len(lfs_pointers.START)] == lfs_pointers.START:
        raise CheckpointError(lfs_pointers.TOLD)
    if content[:4] != MAGIC:
        raise CheckpointError("not a GGUF file")
    cursor = _Cursor(content, position=4)
    version = cursor.number("I")
    if version.to_bytes(4, "big")[0] in VERSIONS and version not in VERSIONS:
        raise CheckpointError(f"a big-endian GGUF (version {version} in little-endian) is not supported: convert it")
    if version not in VERSIONS:
        raise CheckpointError(f"GGUF version {version} is not supported (known: 2, 3, little-endian)")
    n_tensors, n_entries = cursor.number("Q"), cursor.number("Q")
    metadata: dict[str, Any] = {}
    for _ in range(n_entries):
        name = cursor.text()
        if name in metadata:
            raise CheckpointError(f"holds {name!r} twice")
        metadata[name] = cursor.value(cursor.number("I"))
    places: dict[str, tuple[tuple[int, ...], int, int]] = {}
    for _ in range(n_tensors):
        name = cursor.text()
        if name in places:
            raise CheckpointError(f"holds {name!r} twice")
        dims = [cursor.number("Q") for _ in range(cursor.number("I"))]
        places[name] = (tuple(reversed(dims)), cursor.number("I"), cursor.number("Q"))
    alignment = metadata.get("general.alignment", DEFAULT_ALIGNMENT_BYTES)
    if isinstance(alignment, bool) or not isinstance(alignment, int) or alignment.bit_count() != 1 or alignment < 0:
        raise CheckpointError(f"general.alignment={alignment!r} must be a power of two")
    data = -(-cursor.position // alignment) * alignment
    tensors = {name: TensorPlace(shape, kind, data + offset) for name, (shape, kind, offset) in places.items()}
    return Header(metadata, tensors, hashlib.sha256(content[: cursor.position]).hexdigest())


def gguf_files(directory: Path) -> list[Path]:
    """The GGUF files of a directory, in order; of a model in several parts the first stands for all."""
    return [path for path in sorted(directory.glob("*.gguf")) if first_part(path) == path]


def first_part(path: Path) -> Path:
    """`m-00002-of-00003.gguf` -> `m-00001-of-00003.gguf`; a file that is no such part stays itself."""
    named = PART.fullmatch(path.name)
    return path.with_name(f"{named['stem']}-00001-of-{named['count']}.gguf") if named else path


class _Cursor:
    """Reads values one after another. A count beyond the end of the file fails at once, as IndexError."""

    def __init__(self, content: mmap.mmap, position: int) -> None:
        self.content, self.position, self.size = content, position, len(content)

    def number(self, code: str) -> Any:
        (value,) = struct.unpack_from("<" + code, self.content, self.position)
        self.position += struct.calcsize("<" + code)
        return value

    def text(self) -> str:
        length = self.number("Q")
        self._claim(length)
        start, self.position = self.position, self.position + length
        return self.content[start : self.position].decode("utf-8")

    def value(self, kind: int) -> Any:
        if kind == STRING:
            return self.text()
        if kind in SCALARS:
            return self.number(SCALARS[kind])
        if kind != ARRAY:
            raise CheckpointError(f"metadata of unknown type {kind}")
        kind, length = self.number("I"), self.number("Q")
        self._claim(length)  # at least one byte each
        if kind not in SCALARS:
            return [self.value(kind) for _ in range(length)]
        layout = struct.Struct(f"<{length}{SCALARS[kind]}")
        values = list(layout.unpack_from(self.content, self.position))
        self.position += layout.size
        return values

    def _claim(self, length: int) -> None:
        if length > self.size - self.position:
            raise IndexError(length)
