"""Files read by somebody else: numbers of every tensor, ids of texts, conversations as templates spell them.

Truth and subject open a model with the same code; what that code misreads, both believe. `gguf` and `safetensors` read the
numbers again, under names and in an order of rows that are written down here for themselves; `transformers` makes the ids
and spells the conversations. What none of them can read is said in words, and stands in the certificate.

Shapes: none; numbers, ids and strings.
"""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llama_ref.checkpoint import Checkpoint
from llama_ref.config import LlamaConfig
from llama_ref.tokenizers.chat import chat_text
from llama_ref.tokenizers.contract import Tokenizer
from oracle.questions.tokens import TEXTS
from oracle.statistics.compare import Check, Verdict

SAMPLES = 32
ROUNDING = 1e-9
"""Of a sum in float64, as a share of the sum of sizes: two orders of summation."""
FURTHER = (
    "e\u0301a\u0308n\u0303 is not composed",
    "zero\u200bwidth and \ufeff marks",
    "tab\tand   spaces  ",
    "İstanbul ſ ﬁ",
)
"""Texts that a tokenizer may normalise: they need not come back, but their ids must be the witness's."""
CONVERSATIONS: tuple[tuple[tuple[tuple[str, str], ...], bool], ...] = (
    ((("user", "Hi"),), True),
    ((("system", "Be brief."), ("user", "One, two?")), True),
    ((("user", "Hi"), ("assistant", "Hello."), ("user", "And you?")), True),
    ((("user", "Hi"), ("assistant", "Hello.")), False),
)
"""Messages, and whether a reply's turn is opened behind them."""
NAMES = {"tok_embeddings": "model.embed_tokens", "norm": "model.norm", "output": "lm_head"}
PARTS = {
    "attention_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attention.wq": "self_attn.q_proj",
    "attention.wk": "self_attn.k_proj",
    "attention.wv": "self_attn.v_proj",
    "attention.wo": "self_attn.o_proj",
    "feed_forward.w1": "mlp.gate_proj",
    "feed_forward.w2": "mlp.down_proj",
    "feed_forward.w3": "mlp.up_proj",
}
GGUF_NAMES = {"tok_embeddings": "token_embd", "norm": "output_norm", "output": "output"}
GGUF_PARTS = {
    "attention_norm": "attn_norm",
    "ffn_norm": "ffn_norm",
    "attention.wq": "attn_q",
    "attention.wk": "attn_k",
    "attention.wv": "attn_v",
    "attention.wo": "attn_output",
    "feed_forward.w1": "ffn_gate",
    "feed_forward.w2": "ffn_down",
    "feed_forward.w3": "ffn_up",
}


@dataclass
class Told:
    """What witnesses said: by question the number of things compared and what differs; and what had no witness, and why."""

    compared: dict[str, int] = field(default_factory=dict)
    wrong: dict[str, list[str]] = field(default_factory=dict)
    without: list[str] = field(default_factory=list)

    def verdict(self) -> Verdict:
        return Verdict(
            tuple(
                Check(name, len(self.wrong[name]), 0, "".join(self.wrong[name][:1]), count)
                for name, count in self.compared.items()
            )
        )


def ask_witnesses(path: Path | None, checkpoint: Checkpoint, tokenizer: Tokenizer | None) -> Told:
    """Every witness that is installed, on what there is at `path`."""
    told = Told()
    if path is None:
        told.without.append("weights: they are drawn, and in no file")
    else:
        numbers(told, path, checkpoint)
    if tokenizer is None:
        told.without.append("ids and conversations: there is no tokenizer")
    elif path is not None:
        texts(told, path, tokenizer)
    return told


def numbers(told: Told, path: Path, checkpoint: Checkpoint) -> None:
    """Sum and samples of every tensor, but of matrices that another tool packed: what their parts mean no witness says."""
    reader, file_name = reader_of(path)
    if isinstance(reader, str):
        told.without.append(f"weights: {reader}")
        return
    wrong, seen, theirs = [], 0, reader()
    packed = {stem for stem, _, part in (name.rpartition(".") for name in theirs) if part not in ("weight", "bias")}
    foreign = [name for name in checkpoint.weights if name not in theirs and _stem(file_name, name) in packed]
    if foreign:
        told.without.append(f"{len(foreign)} parts of packed matrices: no witness unpacks them")
    for name, source in checkpoint.weights.items():
        if name in foreign:
            continue
        found = theirs.get(name, theirs.get(file_name(name)))
        if found is None:
            wrong.append(f"{name}: the witness has none")
            continue
        ours, other, seen = source[:].double(), found().double(), seen + 1
        if name not in theirs:
            other = rows_interleaved(name, other, checkpoint.config, file_name is hf_name)
        if ours.shape != other.shape:
            wrong.append(f"{name}: shape {list(ours.shape)}, the witness has {list(other.shape)}")
            continue
        size = float(other.abs().sum())
        if not abs(float(ours.sum()) - float(other.sum())) <= ROUNDING * size:
            wrong.append(f"{name}: sum {float(ours.sum()):.9g}, the witness has {float(other.sum()):.9g}")
        at = torch.arange(SAMPLES) * max(1, ours.numel() // SAMPLES + 1) % ours.numel()
        if not torch.equal(ours.flatten()[at], other.flatten()[at]):
            wrong.append(f"{name}: other numbers at samples")
    told.compared["tensors that a witness reads otherwise"], told.wrong["tensors that a witness reads otherwise"] = (
        seen,
        wrong,
    )


Read = Callable[[], Tensor]


def reader_of(path: Path) -> tuple[Callable[[], Mapping[str, Read]] | str, Callable[[str], str]]:
    """What reads the tensors of a path by their names there, or why nothing does; and how canonical names are called there."""
    if path.suffix == ".gguf" or (
        path.is_dir() and not [*path.glob("*.safetensors")] and len([*path.glob("*.gguf")]) == 1
    ):
        if importlib.util.find_spec("gguf") is None:
            return "gguf is not installed", gguf_name
        file = path if path.is_file() else next(path.glob("*.gguf"))
        return lambda: gguf_tensors(file), gguf_name
    if path.is_dir() and [*path.glob("*.safetensors")]:
        return lambda: dict(safetensors_of(path)), hf_name
    return f"no witness reads {path.name}", hf_name


def gguf_tensors(path: Path) -> dict[str, Read]:
    import gguf

    def read(tensor: Any) -> Read:
        return lambda: torch.from_numpy(gguf.dequantize(tensor.data, tensor.tensor_type).copy())

    return {tensor.name: read(tensor) for tensor in gguf.GGUFReader(path).tensors}


def safetensors_of(path: Path) -> Iterator[tuple[str, Read]]:
    from safetensors import safe_open

    def read(file: Path, name: str) -> Read:
        def tensor() -> Tensor:
            with safe_open(file, "pt") as opened:
                found: Tensor = opened.get_tensor(name)
                return found

        return tensor

    for file in sorted(path.glob("*.safetensors")):
        with safe_open(file, "pt") as opened:
            names = list(opened.keys())
        yield from ((name, read(file, name)) for name in names)


def hf_name(name: str) -> str:
    """ "layers.3.attention.wq.weight" -> "model.layers.3.self_attn.q_proj.weight"."""
    return _renamed(name, NAMES, PARTS, "model.layers")


def gguf_name(name: str) -> str:
    """ "layers.3.attention.wq.weight" -> "blk.3.attn_q.weight"."""
    return _renamed(name, GGUF_NAMES, GGUF_PARTS, "blk")


def _stem(file_name: Callable[[str], str], name: str) -> str:
    """ "layers.3.attention.wq.scale" -> "model.layers.3.self_attn.q_proj"."""
    return file_name(name).rpartition(".")[0]


def _renamed(name: str, whole: Mapping[str, str], parts: Mapping[str, str], layers: str) -> str:
    stem, _, kind = name.rpartition(".")
    if stem in whole:
        return f"{whole[stem]}.{kind}"
    _, number, part = stem.split(".", 2)
    return f"{layers}.{number}.{parts[part]}.{kind}"


def rows_interleaved(name: str, theirs: Tensor, config: LlamaConfig, in_halves: bool) -> Tensor:
    """q's and k's rows in pairs, as Meta has them: row (head, pair, which) of what stands as (head, which, pair)."""
    if not in_halves or not name.rsplit(".", 1)[0].endswith(("attention.wq", "attention.wk")):
        return theirs
    half = config.head_dim // 2
    row = torch.arange(len(theirs))
    head, within = row // config.head_dim, row % config.head_dim
    return theirs[head * config.head_dim + within % 2 * half + within // 2]


def texts(told: Told, path: Path, tokenizer: Tokenizer) -> None:
    """Ids of texts, and conversations, by `transformers`' reading of the same files."""
    if importlib.util.find_spec("transformers") is None:
        told.without.append("ids and conversations: transformers is not installed")
        return
    from transformers import AutoTokenizer

    where: tuple[Any, dict[str, str]] = (path, {})
    if path.is_file():
        where = path.parent, {"gguf_file": path.name}
    elif not (path / "tokenizer.json").is_file() and not (path / "tokenizer.model").is_file():
        told.without.append(f"ids and conversations: no witness reads the tokenizer of {path.name}")
        return
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            theirs = AutoTokenizer.from_pretrained(where[0], **where[1])
    except (
        ImportError,
        OSError,
        ValueError,
        RuntimeError,
        KeyError,
        TypeError,
    ) as error:  # it may want packages of its own
        first = (str(error).strip().splitlines() or ["transformers has none"])[0]
        told.without.append(f"ids and conversations: {first}")
        return
    judge_ids(told, tokenizer, theirs.encode)
    if getattr(theirs, "chat_template", None) is None or tokenizer.chat_template is None:
        told.without.append("conversations: there is no template")
    else:
        judge_conversations(told, tokenizer, theirs)


def judge_ids(told: Told, tokenizer: Tokenizer, encode: Callable[[str], list[int]]) -> None:
    wrong = []
    for text in (*TEXTS, *FURTHER):
        ours, theirs = tokenizer.encode(text), encode(text)
        if ours != theirs:
            at = next((i for i, (a, b) in enumerate(zip(ours, theirs)) if a != b), min(len(ours), len(theirs)))
            wrong.append(f"{text[:24]!r}: id {at} is {ours[at : at + 1]} where the witness has {theirs[at : at + 1]}")
    told.compared["texts whose ids a witness denies"] = len(TEXTS) + len(FURTHER)
    told.wrong["texts whose ids a witness denies"] = wrong


def judge_conversations(told: Told, tokenizer: Tokenizer, theirs: Any) -> None:
    """A conversation that both refuse is no difference; one that one of them refuses is."""
    wrong = []
    for turns, opened in CONVERSATIONS:
        messages = [{"role": role, "content": content} for role, content in turns]
        ours = _spelled(partial(chat_text, tokenizer, messages, opened, False))
        spell = partial(theirs.apply_chat_template, messages, tokenize=False, add_generation_prompt=opened)
        other = _spelled(spell)
        if ours != other:
            wrong.append(f"{turns[-1][0]}, {len(turns)} turns: {ours!r:.80} where the witness has {other!r:.80}")
    told.compared["conversations that a witness spells otherwise"] = len(CONVERSATIONS)
    told.wrong["conversations that a witness spells otherwise"] = wrong


def _spelled(ask: Callable[[], str]) -> str | None:
    try:
        return ask()
    except Exception:  # a template refuses by what it likes
        return None


def of_words(said: Mapping[str, Any]) -> Told:
    """What another process wrote down of a Told."""
    return Told(dict(said["compared"]), dict(said["wrong"]), list(said["without"]))


__all__: Sequence[str] = ("Told", "ask_witnesses", "judge_conversations", "judge_ids", "numbers", "of_words")
