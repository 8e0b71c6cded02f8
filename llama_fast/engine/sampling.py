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

from llama_fast.contracts import SamplingKernels
from llama_ref.arguments import is_whole, real, several, whole

MASK_32 = 0xFFFFFFFF
FLOAT32 = torch.finfo(torch.float32)
STREAMS = 4
"""Of uniforms, for each row and position: 0 is plain choice, the others are speculation's."""


@dataclass(frozen=True)
class Sampling:
    """How a token is chosen. Temperature 0 is the argmax; `top_k` None, `top_p` 1.0 and `min_p` 0.0 keep everything.

    In this order: the logits of tokens that the row already holds are divided by `repetition_penalty` where they are
    positive and multiplied by it where they are negative (Keskar et al. 2019); temperature; `top_k` likeliest; fewest that
    sum to `top_p`; those at least `min_p` times as likely as the likeliest. `seed`: row b draws with seed + b, or with the
    b-th of several.
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float = 1.0
    seed: int | Sequence[int] = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0

    def __post_init__(self) -> None:
        for name in ("temperature", "top_p", "min_p", "repetition_penalty"):
            object.__setattr__(self, name, real(name, getattr(self, name)))
        if self.top_k is not None:
            object.__setattr__(self, "top_k", whole("top_k", self.top_k))
        object.__setattr__(self, "seed", seed_or_seeds(self.seed))
        if not 0 <= self.temperature < float("inf"):
            raise ValueError(f"temperature={self.temperature} must be 0 (greedy) or a positive number")
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top_k={self.top_k} must be at least 1")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p={self.top_p} must lie in (0, 1]")
        if not 0 <= self.min_p <= 1:
            raise ValueError(f"min_p={self.min_p} must lie in [0, 1]")
        if not FLOAT32.tiny <= self.repetition_penalty <= FLOAT32.max:
            raise ValueError(f"repetition_penalty={self.repetition_penalty} must be a positive number of float32")
        for seed in (self.seed,) if isinstance(self.seed, int) else self.seed:
            if not 0 <= seed < 2**64:
                raise ValueError(f"seed={seed} must lie in [0, 2^64)")

    def seeds(self, rows: int) -> list[int]:
        """One seed per row: (seed=7, 3 rows) -> [7, 8, 9]; ValueError where several are given, and not as many."""
        if isinstance(self.seed, int):
            return [(self.seed + row) % 2**64 for row in range(rows)]
        if len(self.seed) != rows:
            raise ValueError(f"{len(self.seed)} seeds for {rows} prompts: one for each, or a single one")
        return list(self.seed)


def seed_or_seeds(given: int | Sequence[int]) -> int | tuple[int, ...]:
    """One seed or several, as plain numbers."""
    if is_whole(given):
        return whole("seed", given)
    return tuple(whole("seed", one) for one in several("seed", given, "a whole number, or one for each prompt"))


class BatchSampler:
    """A Sampling made ready for B rows on a device.

    What changes the code (greedy or not, whether a filter is there) is a Python value; what only changes numbers is a
    tensor, so that another temperature or seed does not recompile.
    """

    def __init__(
        self,
        sampling: Sampling,
        seeds: Sequence[int],
        device: torch.device,
        written: Sequence[Sequence[int]] | None = None,
        vocab_size: int = 0,
    ):
        """`seeds`: one per row. A repetition penalty also needs what is `written` in each row, of `vocab_size` tokens."""
        penalised = sampling.repetition_penalty != 1
        if penalised and written is None:
            raise ValueError("repetition_penalty looks at the tokens before each; it cannot be had with a draft")
        self.greedy: bool = sampling.temperature == 0 and not penalised
        self.coldest = sampling.temperature == 0
        self.top_k = sampling.top_k
        self.nucleus = sampling.top_p < 1
        self.floored = sampling.min_p > 0
        self.min_p = torch.tensor(sampling.min_p, dtype=torch.float32, device=device)
        self.penalty = torch.tensor(sampling.repetition_penalty, dtype=torch.float32, device=device)
        self.seen_BV = seen(written, vocab_size).to(device) if penalised and written is not None else None
        self.temperature = torch.tensor(max(sampling.temperature, 1e-6), dtype=torch.float32, device=device)
        self.top_p = torch.tensor(sampling.top_p, dtype=torch.float32, device=device)
        words = [[seed & MASK_32, (seed >> 32) & MASK_32] for seed in seeds]
        self.key_B2 = torch.tensor(words, dtype=torch.int64, device=device)
        self.ahead_BSL: Tensor | None = None
        self.kernels: SamplingKernels | None = None
        """Where nothing is compiled: what chooses in few launches, for vocabularies that it takes."""

    def look_ahead(self, positions: int) -> None:
        """Hash the uniforms of all positions below this at once: a draw then looks one up, and launches no hundred small kernels.

        For code that is not compiled; a compiler makes one kernel of the hash.
        """
        if not self.coldest:
            lane_N = torch.arange(STREAMS * positions, device=self.key_B2.device)
            position_BN = (lane_N % positions).expand(len(self.key_B2), -1)
            self.ahead_BSL = self.uniforms(position_BN, lane_N // positions).view(-1, STREAMS, positions)

    def uniforms(self, position_BN: Tensor, stream_N: Tensor) -> Tensor:
        """The uniforms [B, N] of each row at its positions, in the streams [N]."""
        B, N = position_BN.shape
        if self.ahead_BSL is not None:
            row_B1 = torch.arange(B, device=position_BN.device)[:, None]
            return self.ahead_BSL[row_B1, stream_N, position_BN]
        key_RB2 = self.key_B2[:, None].expand(B, N, 2).reshape(-1, 2)
        return uniform(key_RB2, position_BN.reshape(-1), stream_N.expand(B, N).reshape(-1)).view(B, N)

    @property
    def code(self) -> tuple[object, ...]:
        """What of it changes the code: two choosers with equal values here run the same compiled graph."""
        return (self.greedy, self.coldest, self.top_k, self.nucleus, self.floored, self.seen_BV is not None)

    def __call__(self, logits_BV: Tensor, position_B: Tensor) -> Tensor:
        """The token [B] that stands at `position_B`; on equal logits the lowest id."""
        if self.seen_BV is not None:
            logits_BV = logits_BV.float()
            lowered_BV = torch.where(logits_BV > 0, logits_BV / self.penalty, logits_BV * self.penalty)
            logits_BV = torch.where(self.seen_BV, lowered_BV, logits_BV)
        if self.coldest:
            return logits_BV.argmax(-1) if self.kernels is None else self.kernels.likeliest(logits_BV)
        if self.ahead_BSL is not None:
            u_B = self.ahead_BSL[:, 0].gather(1, position_B[:, None])[:, 0]
        else:
            u_B = uniform(self.key_B2, position_B)
        return self.draw(self.probabilities(logits_BV), u_B)

    def note(self, token_B: Tensor) -> None:
        """The token that each row now also holds. Apart from choosing, so that no compiled graph writes to its inputs."""
        if self.seen_BV is not None:
            self.seen_BV.scatter_(1, token_B[:, None], True)

    def probabilities(self, logits_BV: Tensor) -> Tensor:
        """The distribution that tokens are drawn from, float32 [B, V]."""
        if self.kernels is not None and not self.nucleus and logits_BV.shape[-1] <= self.kernels.MOST_VOCABULARY:
            return self.kernels.distribution(
                logits_BV, self.temperature, self.top_k, self.min_p if self.floored else None
            )
        scaled_BV = logits_BV.float() / self.temperature
        if self.top_k is not None and self.top_k < scaled_BV.shape[-1]:
            least_B1 = scaled_BV.topk(self.top_k, -1).values[:, -1:]
            scaled_BV = scaled_BV.masked_fill(scaled_BV < least_B1, -torch.inf)
        p_BV = scaled_BV.softmax(-1)
        p_BV = keep_nucleus(p_BV, self.top_p) if self.nucleus else p_BV
        return keep_likely(p_BV, self.min_p) if self.floored else p_BV

    def draw(self, p_BV: Tensor, uniform_B: Tensor) -> Tensor:
        """The token [B] of each distribution at which the cumulative probability passes u."""
        if self.kernels is not None and p_BV.shape[-1] <= self.kernels.MOST_VOCABULARY:
            return self.kernels.draw(p_BV, uniform_B)
        return draw(p_BV, uniform_B)


def seen(written: Sequence[Sequence[int]], vocab_size: int) -> Tensor:
    """Which tokens each row holds, bool [B, V]: ([[2, 0], [2]], 3) -> [[T, F, T], [F, F, T]]."""
    seen_BV = torch.zeros(len(written), vocab_size, dtype=torch.bool)
    for row, ids in zip(seen_BV, written, strict=True):
        row[list(ids)] = True
    return seen_BV


def keep_likely(p_BV: Tensor, min_p: Tensor) -> Tensor:
    """Tokens at least `min_p` times as likely as the likeliest, renormalised: [.5, .3, .2], 0.5 -> [.625, .375, 0]."""
    kept_BV = torch.where(p_BV >= min_p * p_BV.amax(-1, keepdim=True), p_BV, 0.0)
    return kept_BV / kept_BV.sum(-1, keepdim=True)


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


def uniform(key_B2: Tensor, position_B: Tensor, stream: int | Tensor = 0) -> Tensor:
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
