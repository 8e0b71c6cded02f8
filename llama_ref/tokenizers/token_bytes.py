"""The bytes that each token adds to a text, worked out from the decoder that a tokenizer.json states.

A text is the decoder's work on all pieces together, but every decoder here treats the pieces behind the first one by one: a
piece has its bytes, whatever stands beside it. Half a character is bytes too, which no decoded text would show.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

from llama_ref.tokenizers.tiktoken_file import byte_alphabet

A_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")
Change = Callable[[bytes], bytes]


def piece_decoder(decoder: Mapping[str, Any] | None) -> Change:
    """What makes a piece's UTF-8 the bytes that it adds behind another piece; ValueError, by name, for other decoders.

    piece_decoder({"type": "ByteLevel"})("Ġa".encode()) -> b" a"
    """
    kind = decoder.get("type") if isinstance(decoder, Mapping) else None
    if decoder is None or kind is None:
        raise ValueError("it states no decoder")
    if kind == "Sequence":
        changes, fused = [], False
        for part in decoder.get("decoders", ()):
            if part.get("type") == "Fuse":
                fused = True
            elif not (part.get("type") == "Strip" and fused):  # behind Fuse it strips the whole text's ends
                changes.append(piece_decoder(part))

        def one_after_another(piece: bytes) -> bytes:
            for change in changes:
                piece = change(piece)
            return piece

        return one_after_another
    if kind == "Fuse":
        return lambda piece: piece
    if kind == "ByteLevel":
        return of_byte_level
    if kind == "ByteFallback":
        return of_byte_fallback
    if kind == "Metaspace":
        mark = str(decoder.get("replacement", "▁")).encode()
        return lambda piece: piece.replace(mark, b" ")
    pattern = decoder.get("pattern")
    if kind == "Replace" and isinstance(pattern, Mapping) and isinstance(pattern.get("String"), str):
        old, new = pattern["String"].encode(), str(decoder.get("content", "")).encode()
        return lambda piece: piece.replace(old, new)
    raise ValueError(f"what its decoder {kind!r} makes of a single token is not known here")


def of_byte_level(piece: bytes) -> bytes:
    """A piece in the alphabet of byte-level vocabularies; one with any other character stands for itself, as added tokens do."""
    found = [BYTE_OF.get(letter) for letter in piece.decode()]
    return piece if None in found else bytes(one for one in found if one is not None)


def of_byte_fallback(piece: bytes) -> bytes:
    """b"<0x0A>" -> b"\\n"; any other piece stands for itself."""
    found = A_BYTE.fullmatch(piece.decode(errors="replace"))
    return piece if found is None else bytes([int(found[1], 16)])


BYTE_OF = {chr(point): byte for byte, point in byte_alphabet().items()}
