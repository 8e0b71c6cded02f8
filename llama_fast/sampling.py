"""From logits to a token, on the device: no host sync, no hidden generator, each row on its own.

Randomness is a function, not a state: `uniform(seed, position)` is a Philox-4x32-10 hash (Salmon et al. 2011), so a row
draws the same numbers alone or in a batch, on any device, in any process, and again after a rejected draft.

Shapes: B rows, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

MASK_32 = 0xFFFFFFFF


@dataclass(frozen=True)
class Sampling:
    """How a token is chosen. Temperature 0 is the argmax; `top_k` None and `top_p` 1.0 keep everything."""

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < float("inf"):
            raise ValueError(f"temperature={self.temperature} must be 0 (greedy) or a positive number")
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top_k={self.top_k} must be at least 1")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p={self.top_p} must lie in (0, 1]")
        if not 0 <= self.seed < 2**64:
            raise ValueError(f"seed={self.seed} must lie in [0, 2^64)")


class Chooser:
    """A Sampling made ready for B rows on a device.

    What changes the code (greedy or not, whether a filter is there) is a Python value; what only changes numbers is a
    tensor, so that another temperature or seed does not recompile.
    """

    def __init__(self, sampling: Sampling, seeds: Sequence[int], device: torch.device):
        """`seeds`: one per row."""
        self.greedy = sampling.temperature == 0
        self.top_k = sampling.top_k
        self.nucleus = sampling.top_p < 1
        self.temperature = torch.tensor(max(sampling.temperature, 1e-6), dtype=torch.float32, device=device)
        self.top_p = torch.tensor(sampling.top_p, dtype=torch.float32, device=device)
        words = [[seed & MASK_32, (seed >> 32) & MASK_32] for seed in seeds]
        self.key_B2 = torch.tensor(words, dtype=torch.int64, device=device)

    def __call__(self, logits_BV: Tensor, position_B: Tensor) -> Tensor:
        """The token [B] that stands at `position_B`; on equal logits the lowest id."""
        if self.greedy:
            return logits_BV.argmax(-1)
        return draw(self.probabilities(logits_BV), uniform(self.key_B2, position_B))

    def probabilities(self, logits_BV: Tensor) -> Tensor:
        """The distribution that tokens are drawn from, float32 [B, V]."""
        scaled_BV = logits_BV.float() / self.temperature
        if self.top_k is not None and self.top_k < scaled_BV.shape[-1]:
            least_B1 = scaled_BV.topk(self.top_k, -1).values[:, -1:]
            scaled_BV = scaled_BV.masked_fill(scaled_BV < least_B1, -torch.inf)
        p_BV = scaled_BV.softmax(-1)
        return keep_nucleus(p_BV, self.top_p) if self.nucleus else p_BV


def keep_nucleus(p_BV: Tensor, top_p: Tensor) -> Tensor:
    """The fewest likeliest tokens whose sum reaches `top_p`, renormalised: [.5, .3, .2], 0.7 -> [.625, .375, 0]."""
    sorted_BV, order_BV = p_BV.sort(dim=-1, descending=True, stable=True)
    before_BV = sorted_BV.cumsum(-1) - sorted_BV
    kept_BV = torch.where(before_BV < top_p, sorted_BV, 0.0)
    p_BV = torch.zeros_like(p_BV).scatter(-1, order_BV, kept_BV)
    return p_BV / p_BV.sum(-1, keepdim=True)


def draw(p_BV: Tensor, uniform_B: Tensor) -> Tensor:
    """The token at which the cumulative probability passes u: ([.2, .5, .3], u=0.69) -> 1. Never one of probability 0."""
    total_BV = p_BV.double().cumsum(-1)  # float64: in float32 the tail of 128k terms would be lost
    passed_B1 = uniform_B[:, None] * total_BV[:, -1:]
    index_B = (total_BV <= passed_B1).sum(-1)
    last_B = p_BV.shape[-1] - 1 - (p_BV.flip(-1) > 0).int().argmax(-1)
    return torch.minimum(index_B, last_B)


def uniform(key_B2: Tensor, position_B: Tensor, stream: int = 0) -> Tensor:
    """Numbers in [0, 1) with 53 bits, float64 [B]: one per (seed, position, stream), independent across all three."""
    position_B = position_B.to(torch.int64)
    zero_B = torch.zeros_like(position_B)
    counter = (position_B & MASK_32, position_B >> 32, zero_B + stream, zero_B)
    a, b, _, _ = philox(counter, (key_B2[:, 0], key_B2[:, 1]))
    return ((a >> 5) * 2**26 + (b >> 6)).double() / 2**53


Lanes = tuple[Tensor, Tensor, Tensor, Tensor]


def philox(counter: Lanes, key: tuple[Tensor, Tensor]) -> Lanes:
    """Philox-4x32-10: four 32-bit words in, four out, each held in an int64."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        high0, low0 = multiply(c0, 0xD2511F53)
        high1, low1 = multiply(c2, 0xCD9E8D57)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + 0x9E3779B9) & MASK_32, (k1 + 0xBB67AE85) & MASK_32
    return c0, c1, c2, c3


def multiply(word: Tensor, factor: int) -> tuple[Tensor, Tensor]:
    """High and low 32 bits of a 32 x 32 bit product; int64 wraps, but the 64 bits of the product are all there."""
    product = word * factor
    return (product >> 32) & MASK_32, product & MASK_32
