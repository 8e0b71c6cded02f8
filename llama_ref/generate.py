"""Decoding by definition: recompute the whole sequence for every token.

Slow on purpose. There is no cache whose index could be wrong, so `llama_fast` has something to be compared with.
"""

from __future__ import annotations

from collections.abc import Callable, Collection

import torch
from torch import Tensor

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

    def draw(logits_V: Tensor) -> int:
        scaled_V = logits_V.double() / temperature
        if top_k is not None:
            scaled_V[scaled_V < scaled_V.topk(min(top_k, scaled_V.numel())).values[-1]] = -torch.inf
        return int(torch.multinomial(scaled_V.softmax(-1).cpu(), 1, generator=generator))

    return _decode(model, prompt, max_new_tokens, eos_ids, draw)


def _decode(
    model: Llama, prompt: list[int], max_new_tokens: int, eos_ids: Collection[int], choose: Callable[[Tensor], int]
) -> list[int]:
    if not prompt:
        raise ValueError("the prompt is empty: nothing to continue")
    tokens = list(prompt)
    for _ in range(max_new_tokens):
        tokens.append(choose(model(torch.tensor([tokens]))[0, -1]))
        if tokens[-1] in eos_ids:
            break
    return tokens[len(prompt) :]
