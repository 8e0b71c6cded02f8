"""Decoding by definition: recompute the whole sequence for every token.

Slow on purpose. There is no cache whose index could be wrong, so `llama_fast` has something to be compared with.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from llama_ref.arguments import real, row_of_ids, set_of_ids, whole
from llama_ref.model import Llama


@dataclass(frozen=True)
class Adjusted:
    """Logits as a request wants them changed, one token after another; without arguments, as they are.

    OpenAI's definition of the two penalties: a token that was generated c > 0 times loses c x frequency_penalty +
    presence_penalty; the prompt does not count. For repetition_penalty (Keskar et al. 2019) it does: the logit of a token that
    stands anywhere is divided by it if it is positive, and multiplied by it otherwise. `logit_bias` is added before both.
    """

    repetition_penalty: float = 1.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)

    def of(self, logits_V: Tensor, prompt: Sequence[int], generated: Sequence[int]) -> Tensor:
        """The changed logits [V] behind a prompt and what was generated, in float64."""
        logits = logits_V.double().tolist()
        for token, bias in self.logit_bias.items():
            logits[token] += bias
        for token in {*prompt, *generated}:
            if logits[token] > 0:
                logits[token] /= self.repetition_penalty
            else:
                logits[token] *= self.repetition_penalty
        for token, times in Counter(generated).items():
            logits[token] -= times * self.frequency_penalty
            logits[token] -= self.presence_penalty
        return torch.tensor(logits, dtype=torch.float64)


UNCHANGED = Adjusted()


def greedy(
    model: Llama,
    prompt: list[int],
    max_new_tokens: int,
    eos_ids: Collection[int] = (),
    adjusted: Adjusted = UNCHANGED,
) -> list[int]:
    """The prompt's continuation by the largest logit (lowest id on a tie), ended after the first of `eos_ids`."""
    return _decode(model, prompt, max_new_tokens, eos_ids, _choosing(adjusted, prompt, lambda one: int(one.argmax())))


def sample(
    model: Llama,
    prompt: list[int],
    max_new_tokens: int,
    temperature: float,
    generator: torch.Generator,
    top_k: int | None = None,
    eos_ids: Collection[int] = (),
    adjusted: Adjusted = UNCHANGED,
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

    return _decode(model, prompt, max_new_tokens, eos_ids, _choosing(adjusted, prompt, draw))


Choose = Callable[[Tensor, list[int]], int]
"""A token, from logits [V] and all tokens before."""


def _choosing(adjusted: Adjusted, prompt: Sequence[int], choose: Callable[[Tensor], int]) -> Choose:
    if adjusted == UNCHANGED:
        return lambda logits_V, tokens: choose(logits_V)
    return lambda logits_V, tokens: choose(adjusted.of(logits_V, prompt, tokens[len(prompt) :]))


def _decode(
    model: Llama, prompt: list[int], max_new_tokens: int, eos_ids: Collection[int], choose: Choose
) -> list[int]:
    tokens, eos_ids = row_of_ids("prompt", prompt), set_of_ids("eos_ids", eos_ids)
    if not tokens:
        raise ValueError("the prompt is empty: nothing to continue")
    length, vocabulary = len(tokens), model.config.vocab_size
    if not all(0 <= token < vocabulary for token in tokens):
        raise ValueError(f"the prompt holds a token id outside the vocabulary of {vocabulary}")
    for _ in range(whole("max_new_tokens", max_new_tokens, 0)):
        tokens.append(choose(model(torch.tensor([tokens]))[0, -1], tokens))
        if tokens[-1] in eos_ids:
            break
    return tokens[length:]
