"""A sentencepiece model as the library of that name reads it, with a space before a text or without one.

Whether there is one is a setting in the file, which a caller may overrule. So this class keeps two readers of the file.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from llama_ref.formats import lfs_pointers
from llama_ref.tokenizers.tokenizer_files import TokenizerError

# A message of protobuf's may be followed by fields that replace earlier ones: normalizer_spec { add_dummy_prefix: ... },
# fields 3 and 3 of sentencepiece_model.proto.
WITH_PREFIX, WITHOUT_PREFIX = b"\x1a\x02\x18\x01", b"\x1a\x02\x18\x00"


class SentencePieceModel:
    """`pieces` by id, `bytes` those that stand for a byte, `control` the ids of control symbols, and `names` the model's
    own special tokens by name, as "bos_token"."""

    def __init__(self, content: bytes, where: Path) -> None:
        self._content, self._where = content, where
        self._prefixed, self._bare = _reader(content, where), _reader(content + WITHOUT_PREFIX, where)
        self.has_prefix: bool = self._prefixed.encode("a") != self._bare.encode("a")
        reader = self._bare
        ids = range(int(reader.vocab_size()))
        try:
            self.pieces: list[str] = [reader.id_to_piece(i) for i in ids]
        except UnicodeDecodeError as error:
            raise TokenizerError(f"{where}: holds a piece that is no text ({error})") from error
        self.bytes = {i: int(self.pieces[i][3:5], 16) for i in ids if reader.is_byte(i)}
        self.control = [i for i in ids if reader.is_control(i)]
        own = {"bos_token": reader.bos_id(), "eos_token": reader.eos_id(), "unk_token": reader.unk_id()}
        self.names = {name: self.pieces[i] for name, i in own.items() if i in ids}

    def encode(self, text: str, prefix: bool = True) -> list[int]:
        """Ids of a text without special tokens; with `prefix`, behind a space if the model's texts have one."""
        ids: list[int] = (self._prefixed if prefix else self._bare).encode(text)
        return ids

    def overrule_prefix(self, prefix: bool) -> None:
        """Let texts start with a space, or without one, whatever the file says."""
        if prefix != self.has_prefix:
            self.has_prefix = prefix
            self._prefixed = _reader(self._content + WITH_PREFIX, self._where) if prefix else self._bare


def _reader(content: bytes, where: Path) -> Any:
    from sentencepiece import SentencePieceProcessor

    try:
        return SentencePieceProcessor(model_proto=content)
    except (RuntimeError, OSError, TypeError, UnicodeDecodeError) as error:
        if content.startswith(lfs_pointers.START):
            raise TokenizerError(f"{where}: {lfs_pointers.TOLD}") from error
        raise TokenizerError(f"{where}: neither a sentencepiece model nor a tiktoken file") from error
