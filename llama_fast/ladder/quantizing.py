"""A dense checkpoint's weights in another encoding: rounded to the nearest, or fitted to a text."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from llama_fast.calibration.fitting import Fit, as_saved, calibrated
from llama_fast.calibration.text import LENGTH, calibration_rows
from llama_fast.contracts import Encoding
from llama_fast.ladder.quality import HeldOut, in_memory, told
from llama_fast.plan import Plan
from llama_fast.weights import encoded, encoding_of, is_encoded
from llama_ref.checkpoint import Checkpoint, expected_shapes
from llama_ref.tokenizers.contract import Tokenizer
from oracle.questions.cases import TEXT, text_rows

HELD_OUT_ROWS, HELD_OUT_LENGTH = 4, 256
FITS = ("weighted", "feedback")
Say = Callable[[str], None]


@dataclass(frozen=True)
class Text:
    """The text that a model is fitted to, as tokens [rows, length], and what is to be said of it."""

    tokens: Tensor
    notices: tuple[str, ...]

    @classmethod
    def of(cls, file: Path, tokenizer: Tokenizer, tokens: int, context: int) -> Text:
        """The beginning of a file. OSError, or a ValueError that names it, if it cannot be read, is no text or too short."""
        try:
            text = file.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(f"{file}: no UTF-8 text ({error.reason} at byte {error.start})") from error
        length = min(LENGTH, context, tokens)
        try:
            found, notice = calibration_rows(text, tokenizer.encode, max(1, tokens // length), length)
        except ValueError as error:
            raise ValueError(f"{file}: {error}") from error
        seen = TEXT.read_text(encoding="utf-8")[:400] in text
        twice = f"{file} holds the text on which the loss is measured: what is told is too little" if seen else ""
        return cls(found, tuple(filter(None, (notice, twice))))


def fit_named(name: str) -> bool:
    """ "feedback" -> True, "weighted" -> False: whether errors are answered. ValueError that lists the known names."""
    if name not in FITS:
        raise ValueError(f"unknown fit {name!r} (known: {', '.join(FITS)})")
    return name == "feedback"


def with_head(checkpoint: Checkpoint, head: Encoding | None, encoding: Encoding) -> Checkpoint:
    """The checkpoint with a word for its head, which a tied table is as well, if that shall be stored otherwise.

    ValueError if a matrix does not fit the encoding that it shall have.
    """
    if head is not None and head.name != encoding.name:
        stem = "tok_embeddings" if checkpoint.config.tie_embeddings else "output"
        checkpoint = replace(checkpoint, encodings={stem: head.name})
    for name, shape in expected_shapes(checkpoint.config).items():
        stem, _, part = name.rpartition(".")
        if part == "weight" and is_encoded(stem, checkpoint.config):
            try:
                encoding_of(checkpoint, stem, encoding).layout(shape)
            except ValueError as error:
                raise ValueError(f"{stem}: {error}") from error
    return checkpoint


def nearest(checkpoint: Checkpoint, encoding: Encoding, device: torch.device) -> dict[str, Tensor]:
    """All tensors by the names of a file, each number rounded to the nearest that can be stored."""
    found: dict[str, Tensor] = {}
    for stem, stored in encoded(checkpoint, Plan(encoding=encoding), None, device):
        found |= {f"{stem}.{part}": tensor.cpu() for part, tensor in as_saved(stored).tensors.items()}
    return found


def fitted(fit: Fit, text: Text, progress: Say = lambda _: None) -> dict[str, Tensor]:
    """The same, fitted to a text."""
    found: dict[str, Tensor] = {}
    for stem, stored in calibrated(fit, text.tokens, progress):
        found |= {f"{stem}.{part}": tensor.cpu() for part, tensor in stored.tensors.items()}
    return found


def held_out(original: Checkpoint, tokenizer: Tokenizer, device: torch.device) -> HeldOut:
    """The oracle's own text, as `llama-oracle verify` measures drift on it."""
    length = min(HELD_OUT_LENGTH, original.config.max_context)
    return HeldOut.of(original, text_rows(tokenizer.encode, [length] * HELD_OUT_ROWS), device)


def measured(held: HeldOut, original: Checkpoint, tensors: dict[str, Tensor], encoding: str) -> str:
    """What these tensors lose, in one line."""
    return told(held.drift(in_memory(original, tensors, encoding)))


__all__ = ["Fit", "Text", "fit_named", "fitted", "held_out", "measured", "nearest", "with_head"]
