"""A model whose every answer is known beforehand, and its alphabet: what the library's face is asked with.

The first of a text's four markers A, B, C, D says by which table it goes on: `following` gives the token after each. So its text
has a period of dozens of tokens and none of a random model's monotony, it ends where it is told to, and every token of it
needs the marker's key and value, which stand far behind in the cache: what a neighbour, or an earlier request, left there
leads elsewhere. After D two tokens are likely, by 3 to 1, so that draws, penalties and log-probabilities have something to
choose from.

One block does it: attention finds the marker (its key alone answers the query, which is the same of all tokens), the gated
layer has one unit for every pair (marker, token), and writes what comes next into features of their own, which the head
reads.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from llama_ref.checkpoint import Checkpoint
from llama_ref.config import LlamaConfig

SPECIAL = ("<s>", "</s>", "<|end|>")
BOS, EOS, END = range(3)
LETTERS = "ABCD" + "abcdefghijklmnopqrstuvwxyz0123456789 .,:;!?-+*/=()[]<>|&"
VOCABULARY = 64
assert len(SPECIAL) + len(LETTERS) <= VOCABULARY
MARKERS = tuple(range(len(SPECIAL), len(SPECIAL) + 4))
HEAD, HEADS, DIM = 16, 2, 144
STEEP = 20.0
"""How far the score of a marker's key, and the gate of a unit that is meant, stand above the others."""
STEP = {0: 1, 1: 5, 2: 23, 3: 9}
"""By how many letters each marker's walk goes on; all lead through all of them."""
WALKED = tuple(range(len(SPECIAL) + 4, len(SPECIAL) + len(LETTERS)))
assert all(math.gcd(step, len(WALKED)) == 1 for step in STEP.values())
SECOND = 11
"""How many letters further the second choice after D stands."""
CHAT = (
    "{%- for message in messages -%}{{ '<' + message['role'][0] + '>' + message['content'] + '<|end|>' }}{%- endfor -%}"
    "{%- if add_generation_prompt %}{{ '<a>' }}{% endif -%}"
)


def following(marker: int, token: int) -> int:
    """The likeliest token after `token` in a text with the marker of this number."""
    count = len(WALKED)
    at = WALKED.index(token) if token in WALKED else token
    return WALKED[(at + STEP[marker]) % count]


def walk(marker: int, token: int, count: int) -> list[int]:
    """`count` tokens after this one: greedy text."""
    said = []
    for _ in range(count):
        token = following(marker, token)
        said.append(token)
    return said


def walker(eos_ids: Sequence[int] = (), shift: int = 0, max_context: int = 256, layers: int = 1) -> Checkpoint:
    """The model, whose texts end at `eos_ids`. `shift`: another of the same shape, which goes on with the letters after.

    `layers`: so many blocks, of which the last does all and the others add nothing.
    """
    V, M = VOCABULARY, len(MARKERS)
    units = V * M
    config = LlamaConfig(
        DIM, layers, HEADS, 1, HEAD, units, V, max_context, 1e-6, 1e6, bos_id=BOS, eos_ids=tuple(eos_ids)
    )
    token, marker, out = slice(0, V), slice(V, V + M), slice(V + M, 2 * V + M)
    embedding = torch.zeros(V, DIM)
    embedding[:, token] = torch.eye(V)
    size = math.sqrt(DIM)  # of a token's one feature after the norm
    both = math.sqrt(DIM / 2)  # of the two that it has with the marker's
    wq, wo = torch.zeros(HEADS * HEAD, DIM), torch.zeros(DIM, HEADS * HEAD)
    wk, wv = torch.zeros(HEAD, DIM), torch.zeros(HEAD, DIM)
    slow = HEAD - 2  # of the pair that a thousand positions hardly turn
    edge = math.sqrt(STEEP * math.sqrt(HEAD)) / size
    for head in range(HEADS):
        wq[head * HEAD + slow, token] = edge
        wo[marker, head * HEAD : head * HEAD + M] = torch.eye(M) / HEADS
    w1, w3, w2 = torch.zeros(units, DIM), torch.zeros(units, DIM), torch.zeros(DIM, units)
    w3[:, token] = 1 / both
    gate = 2 * STEEP / both
    w1[:, token] = -1.5 * gate
    for number, mark in enumerate(MARKERS):
        wk[slow, mark], wv[number, mark] = edge, 1 / size
        for one in range(V):
            unit = number * V + one
            w1[unit, one] += gate
            w1[unit, V + number] += gate
            after = following(number, one)
            w2[out.start + _shifted(after, shift), unit] = 8 / STEEP
            if number == 3:
                second = WALKED[(WALKED.index(after) + SECOND) % len(WALKED)]
                scale = math.sqrt((2 + 64 + 49) / DIM)
                w2[out.start + _shifted(second, shift), unit] = (8 - scale * math.log(3)) / STEEP
    output = torch.zeros(V, DIM)
    output[:, out] = torch.eye(V)
    ones, name = torch.ones(DIM), f"layers.{layers - 1}"
    weights = {
        "tok_embeddings.weight": embedding,
        f"{name}.attention_norm.weight": ones,
        f"{name}.attention.wq.weight": wq,
        f"{name}.attention.wk.weight": wk,
        f"{name}.attention.wv.weight": wv,
        f"{name}.attention.wo.weight": wo,
        f"{name}.ffn_norm.weight": ones.clone(),
        f"{name}.feed_forward.w1.weight": w1,
        f"{name}.feed_forward.w2.weight": w2,
        f"{name}.feed_forward.w3.weight": w3,
        "norm.weight": ones.clone(),
        "output.weight": output,
    }
    for idle in range(layers - 1):
        for part, tensor in [(part, tensor) for part, tensor in weights.items() if part.startswith(f"{name}.")]:
            weights[part.replace(name, f"layers.{idle}")] = tensor if "norm" in part else torch.zeros_like(tensor)
    return Checkpoint(config, weights)


def _shifted(token: int, shift: int) -> int:
    return WALKED[(WALKED.index(token) + shift) % len(WALKED)]


class Letters:
    """A letter an id, and a template that names the speaker: as plain as a tokenizer can be."""

    bos_id: int | None = BOS
    eos_ids: tuple[int, ...] = ()
    vocab_size = VOCABULARY
    chat_template: str | None = CHAT
    chat_templates: Mapping[str, str] = {"default": CHAT}
    special_tokens: dict[str, str] = {"bos_token": SPECIAL[BOS], "eos_token": SPECIAL[EOS]}  # noqa: RUF012

    def encode(self, text: str, bos: bool = True) -> list[int]:
        ids = [BOS] if bos else []
        while text:
            special = next((i for i, word in enumerate(SPECIAL) if text.startswith(word)), None)
            ids.append(len(SPECIAL) + LETTERS.index(text[0]) if special is None else special)
            text = text[1 if special is None else len(SPECIAL[special]) :]
        return ids

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        words = [*("" if skip_special_tokens else word for word in SPECIAL), *LETTERS, *"#" * VOCABULARY]
        return "".join(words[token] for token in ids)

    def token_bytes(self) -> list[bytes | None]:
        return [*[None for _ in SPECIAL], *(letter.encode() for letter in LETTERS)]

    def save(self, directory: Path) -> None:
        raise NotImplementedError("the oracle's alphabet has no files")
