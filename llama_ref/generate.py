"""Decoding by definition: recompute the whole sequence for every token.

Slow on purpose. There is no cache whose index could be wrong, so `llama_fast` has something to be compared with.
"""

from __future__ import annotations

from collections.abc import Callable, Collection

import torch
from torch import Tensor

from llama_ref.arguments import real, row_of_ids, set_of_ids, whole
from llama_ref.model import Llama


def greedy(model: Llama, prompt: list[int], max_new_tokens: int, eos_ids: Collection[int] = ()) -> list[int]:
    """The prompt's continuation by the largest logit (lowest id on a tie), ended after the first of `eos_ids`."""
    return _decode(model, prompt, max_new_tokens, eos_ids, lambda logits_V: int(logits_V.argmax()))


def sample(
    model: Llama,
    prompt: list[int],
    max_new_tokens: int,
    temperature: float,
    generator: torch.Generator,
    top_k: int | None = None,
    eos_ids: Collection[int] = (),
) -> list[int]:
    """A continuation drawn from softmax(logits / temperature), restricted to the `top_k` largest logits if given."""

    temperature = real("temperature", temperature)
    if not 0 < temperature < float("inf"):
        raise ValueError(f"temperature={temperature} must be a positive number; for 0 take `greedy`")
    top_k = None if top_k is None else whole("top_k", top_k, 1)

    def draw(logits_V: Tensor) -> int:
        scaled_V = logits_V.double() / temperature
        if top_k is not None:
            scaled_V[scaled_V < scaled_V.topk(min(top_k, scaled_V.numel())).values[-1]] = -torch.inf
        return int(torch.multinomial(scaled_V.softmax(-1).cpu(), 1, generator=generator))

    return _decode(model, prompt, max_new_tokens, eos_ids, draw)


def _decode(
    model: Llama, prompt: list[int], max_new_tokens: int, eos_ids: Collection[int], choose: Callable[[Tensor], int]
) -> list[int]:
    tokens, eos_ids = row_of_ids("prompt", prompt), set_of_ids("eos_ids", eos_ids)
    if not tokens:
        raise ValueError("the prompt is empty: nothing to continue")
    length, vocabulary = len(tokens), model.config.vocab_size
    if not all(0 <= token < vocabulary for token in tokens):
        raise ValueError(f"the prompt holds a token id outside the vocabulary of {vocabulary}")
    for _ in range(whole("max_new_tokens", max_new_tokens, 0)):
        tokens.append(choose(model(torch.tensor([tokens]))[0, -1]))
        if tokens[-1] in eos_ids:
            break
    return tokens[length:]
