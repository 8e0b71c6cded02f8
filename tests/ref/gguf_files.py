"""Small GGUF files for tests, by the gguf package: a tiny Llama, and vocabularies of both kinds."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import gguf
import numpy

SHAPE = {"embedding_length": 32, "block_count": 1, "feed_forward_length": 64, "context_length": 64}
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)


def tensors_of(vocab_size: int) -> dict[str, numpy.ndarray[Any, Any]]:
    """Random weights of the shape above, under the names that GGUF gives them."""
    draw = numpy.random.default_rng(0)
    shapes: dict[str, tuple[int, ...]] = {
        "token_embd": (vocab_size, 32),
        "output_norm": (32,),
        "blk.0.attn_norm": (32,),
        "blk.0.ffn_norm": (32,),
        "blk.0.ffn_gate": (64, 32),
        "blk.0.ffn_up": (64, 32),
        "blk.0.ffn_down": (32, 64),
        **{f"blk.0.attn_{part}": (32, 32) for part in ("q", "k", "v", "output")},
    }
    return {f"{name}.weight": draw.standard_normal(shape).astype(numpy.float32) for name, shape in shapes.items()}


def write_gguf(
    path: Path,
    metadata: Mapping[str, Any] | None = None,
    tensors: Mapping[str, Any] | None = None,
    **writer_options: Any,
) -> Path:
    """A GGUF of the llama architecture with this metadata (a value of None leaves a field out) and these tensors.

    Tensors: arrays, or (bytes as a uint8 array, GGML type). None: those of a tiny Llama with its vocabulary's size.
    """
    metadata = metadata or {}
    tokens = metadata.get("tokenizer.ggml.tokens", ["a"] * 8)
    base: dict[str, Any] = {f"llama.{name}": value for name, value in SHAPE.items()}
    base |= {"llama.attention.head_count": 2, "llama.attention.layer_norm_rms_epsilon": 1e-5}
    if "tokenizer.ggml.tokens" not in metadata:
        base["llama.vocab_size"] = len(tokens)
    writer = gguf.GGUFWriter(path, metadata.get("general.architecture", "llama"), **writer_options)
    for name, value in (base | dict(metadata)).items():
        if value is None or name == "general.architecture":
            continue
        if name == "general.alignment":
            writer.add_custom_alignment(value)
        elif isinstance(value, bool):
            writer.add_bool(name, value)
        elif isinstance(value, int):
            (writer.add_uint32 if value >= 0 else writer.add_int32)(name, value)
        elif isinstance(value, float):
            writer.add_float32(name, value)
        elif isinstance(value, str):
            writer.add_string(name, value)
        else:
            writer.add_array(name, value)
    for name, value in (tensors_of(len(tokens)) if tensors is None else tensors).items():
        if isinstance(value, tuple):
            writer.add_tensor(name, value[0], raw_dtype=value[1])
        else:
            writer.add_tensor(name, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


CORPUS = [
    "year 2024 1234567 12 34",
    "it's IT'S don't",
    "a.b;\n\n  c(d)\n",
    "\tif x:\n        y = 1",
    "été 漢字 hello world",
]


def byte_pair(size: int = 330, specials: Sequence[str] = ("<s>", "</s>")) -> dict[str, Any]:
    """The metadata of a byte-pair vocabulary, trained on CORPUS; `specials` are its first tokens, of the kind control."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    level: Any = pre_tokenizers.ByteLevel
    backend: Any = Tokenizer(models.BPE())
    backend.pre_tokenizer = level(add_prefix_space=False, use_regex=False)
    trainer: Any = trainers.BpeTrainer(
        vocab_size=size, initial_alphabet=level.alphabet(), special_tokens=list(specials), show_progress=False
    )
    backend.train_from_iterator(CORPUS * 40, trainer)
    model = json.loads(backend.to_str())["model"]
    tokens = sorted(model["vocab"], key=model["vocab"].get)
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [CONTROL if token in specials else NORMAL for token in tokens],
        "tokenizer.ggml.merges": [" ".join(merge) for merge in model["merges"]],
    }


def sentencepiece_bytes(**options: Any) -> bytes:
    """A sentencepiece model, trained on a few words with runs of spaces and letters."""
    import sentencepiece

    lines = ["over there he is", "Hello my name  is", "the lazy   dog over here", "aaaa aaaaaa aa", "    indented"]
    out = io.BytesIO()
    defaults: dict[str, Any] = {
        "vocab_size": 340,
        "model_type": "bpe",
        "byte_fallback": True,
        "hard_vocab_limit": False,
        "normalization_rule_name": "identity",
        "remove_extra_whitespaces": False,
        "allow_whitespace_only_pieces": True,
        "minloglevel": 2,
    }
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines * 60), model_writer=out, **(defaults | options)
    )
    return out.getvalue()


def pieces(model: Any) -> dict[str, Any]:
    """The metadata of a sentencepiece vocabulary, as converters write it from a SentencePieceProcessor."""
    size = model.vocab_size()

    def kind(token: int) -> int:
        asked = ((model.is_byte, BYTE), (model.is_control, CONTROL), (model.is_unknown, UNKNOWN))
        return next((found for ask, found in asked if ask(token)), NORMAL)

    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.tokens": [model.id_to_piece(token) for token in range(size)],
        "tokenizer.ggml.scores": [float(model.get_score(token)) for token in range(size)],
        "tokenizer.ggml.token_type": [kind(token) for token in range(size)],
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
    }


def with_tokens(metadata: Mapping[str, Any], added: Mapping[str, int]) -> dict[str, Any]:
    """The metadata with further tokens behind the others: text -> kind."""
    more = dict(metadata)
    more["tokenizer.ggml.tokens"] = [*more["tokenizer.ggml.tokens"], *added]
    more["tokenizer.ggml.token_type"] = [*more["tokenizer.ggml.token_type"], *added.values()]
    if "tokenizer.ggml.scores" in more:
        more["tokenizer.ggml.scores"] = [*more["tokenizer.ggml.scores"], *([-1000.0] * len(added))]
    return more
