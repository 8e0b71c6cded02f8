"""From logits to a token, on the device: no host sync, no hidden generator, each row on its own.

Randomness is a function, not a state: `uniform(seed, position)` is a Philox-4x32-10 hash (Salmon et al. 2011), so a row
draws the same numbers alone or in a batch, on any device, in any process, and again after a rejected draft.

Shapes: B rows, V vocabulary.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from llama_fast.choosing import SamplingKernels
from llama_fast.engine.guides import Constraint
from llama_fast.engine.transfer import upload
from llama_ref.arguments import is_whole, made, real, several, shown, whole

MASK_32 = 0xFFFFFFFF
FLOAT32 = torch.finfo(torch.float32)
STREAMS = 4
"""Of uniforms, for each row and position: 0 is plain choice, the others are speculation's."""


@dataclass(frozen=True)
class Sampling:
    """How a token is chosen. Temperature 0 is the argmax; `top_k` None, `top_p` 1.0 and `min_p` 0.0 keep everything.

    In this order: `logit_bias` {id: bias} is added to logits; those of tokens that the row already holds, prompt included,
    are divided by `repetition_penalty` where they are positive and multiplied by it where they are negative (Keskar et al.
    2019); those of tokens that the row has generated c times are lowered by c x `frequency_penalty` + `presence_penalty`
    (OpenAI's definition, without the prompt); tokens that `grammar` does not allow are impossible; temperature; `top_k`
    likeliest; fewest that sum to `top_p`; those at least `min_p` times as likely as the likeliest. `seed`: row b draws with
    seed + b, or with the b-th of several. `grammar` is made for a model's tokens, as by `llama.constraint(Regex("a+"))`.
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float = 1.0
    seed: int | Sequence[int] = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    logit_bias: Mapping[int, float] | Sequence[tuple[int, float]] | None = None
    """Kept as pairs, in the order of ids."""
    grammar: Constraint | None = None

    def __post_init__(self) -> None:
        penalties = ("frequency_penalty", "presence_penalty")
        for name in ("temperature", "top_p", "min_p", "repetition_penalty", *penalties):
            object.__setattr__(self, name, real(name, getattr(self, name)))
        if self.top_k is not None:
            object.__setattr__(self, "top_k", whole("top_k", self.top_k))
        object.__setattr__(self, "seed", seed_or_seeds(self.seed))
        object.__setattr__(self, "logit_bias", biases(self.logit_bias))
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
        for name in penalties:
            if not abs(getattr(self, name)) <= FLOAT32.max:
                raise ValueError(f"{name}={getattr(self, name)} must be a number of float32")
        if self.grammar is not None:
            made("grammar", self.grammar, "a grammar for a model's tokens, as llama.constraint() makes one", "begin")
        for seed in (self.seed,) if isinstance(self.seed, int) else self.seed:
            if not 0 <= seed < 2**64:
                raise ValueError(f"seed={seed} must lie in [0, 2^64)")

    @property
    def bias(self) -> dict[int, float]:
        """What is added to the logits of some tokens."""
        return dict(self.logit_bias or ())

    @property
    def counts(self) -> bool:
        """Whether a penalty counts the tokens that a row has generated."""
        return self.frequency_penalty != 0 or self.presence_penalty != 0

    def check_without_history(self) -> None:
        """ValueError, by its name, for a setting that needs to know what stands before each token."""
        asked = {
            "repetition_penalty": self.repetition_penalty != 1,
            "frequency_penalty": self.frequency_penalty != 0,
            "presence_penalty": self.presence_penalty != 0,
            "grammar": self.grammar is not None,
        }
        for name, is_asked in asked.items():
            if is_asked:
                raise ValueError(f"{name} looks at the tokens before each; it cannot be had with a draft")
        if self.logit_bias:
            raise ValueError("logit_bias is not known to who proposes tokens; it cannot be had with a draft")

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


def biases(given: object) -> tuple[tuple[int, float], ...]:
    """The pairs of a logit bias: {7: 1, 3: -2.5} -> ((3, -2.5), (7, 1.0)); TypeError or ValueError that names it."""
    if given is None:
        return ()
    if not isinstance(given, (Mapping, tuple)):
        raise TypeError(f"logit_bias={shown(given)} must be a mapping of token ids to numbers")
    pairs = {}
    for token, bias in given.items() if isinstance(given, Mapping) else given:
        token, bias = whole("logit_bias: a token id", token, 0), real(f"logit_bias[{token}]", bias)
        if not abs(bias) <= FLOAT32.max:
            raise ValueError(f"logit_bias[{token}]={bias} must be a number of float32")
        pairs[token] = bias
    return tuple(sorted(pairs.items()))


class Code(NamedTuple):
    """What of the rows' settings changes the code that chooses; all else is numbers in tensors."""

    drawn: bool = False
    """Whether a row draws; else all take the largest logit."""
    mixed: bool = False
    """Whether rows differ in what is said here, so that the code must look at what each row wants."""
    top_k: int = 0
    """The k of all rows, or where they differ a bound on them; 0 keeps everything."""
    nucleus: bool = False
    floored: bool = False
    penalised: bool = False
    counted: bool = False
    biased: bool = False
    masked: bool = False
    """Whether a row has a grammar: then the host says, at each step, which tokens are allowed."""

    @property
    def edited(self) -> bool:
        """Whether logits are changed by what is kept, or told, for each row and token."""
        return self.counted or self.biased or self.masked

    def with_edits_of(self, other: Code) -> Code:
        """The same code with what the other changes logits by."""
        return self._replace(counted=other.counted, biased=other.biased, masked=other.masked)

    def covers(self, other: Code) -> bool:
        """Whether this code is right for rows that need the other."""
        wider = self.mixed and self.top_k >= other.top_k and all(a or not b for a, b in zip(self, other, strict=True))
        return self == other or wider


LEAST_BOUND = 256
"""Of k, in code for any settings."""


def code_of(settings: Iterable[Sampling]) -> Code:
    """The code that rows with these settings need, as little of it as possible."""
    kinds, penalised, counted, biased, masked = set(), False, False, False, False
    for one in settings:
        drawn = one.temperature > 0
        kinds.add((drawn, (drawn and one.top_k) or 0, drawn and one.top_p < 1, drawn and one.min_p > 0))
        penalised |= one.repetition_penalty != 1
        counted, biased, masked = (
            counted | one.counts,
            biased | bool(one.logit_bias),
            masked | (one.grammar is not None),
        )
    if not kinds:
        return Code()
    drawn, top_k, nucleus, floored = (max(of) for of in zip(*kinds, strict=True))
    return Code(drawn, len(kinds) > 1, top_k, nucleus, floored, penalised, counted, biased, masked)


class BatchSampler:
    """Chooses a token for each of B rows on a device. Each row has settings of its own, which may change between two steps.

    What changes the code is the Python value `code`; what only changes numbers is a tensor, so that another temperature or
    seed does not recompile. Where all rows filter alike, the code asks none of them what it wants.
    """

    def __init__(
        self,
        sampling: Sampling,
        seeds: Sequence[int],
        device: torch.device,
        written: Sequence[Sequence[int]] | None = None,
        vocab_size: int = 0,
    ):
        """One sampling for all rows, and a seed for each; see `set_rows`. Without seeds there are no rows."""
        self._allocate(len(seeds), device, vocab_size)
        self.set_rows(0, [replace(sampling, seed=seed) for seed in seeds], written)

    @classmethod
    def of_free_rows(cls, rows: int, device: torch.device, vocab_size: int) -> BatchSampler:
        """A sampler of rows that are still to be set; until then, what it chooses for them means nothing."""
        sampler = cls(Sampling(), (), device)
        sampler._allocate(rows, device, vocab_size)
        return sampler

    def _allocate(self, rows: int, device: torch.device, vocab_size: int) -> None:
        self.settings: list[Sampling | None] = [None] * rows
        self.vocab_size = vocab_size
        self.code = Code()
        self.steady = False
        """Whether code is kept as long as it is right, because another one would have to be compiled."""
        self.first = 0
        """Where these rows stand among those of the sampler that they are of."""
        self.temperature_B = torch.ones(rows, dtype=torch.float32, device=device)
        """0 where a row takes the largest logit."""
        self.top_k_B = torch.zeros(rows, dtype=torch.int64, device=device)
        self.top_p_B = torch.ones(rows, dtype=torch.float32, device=device)
        self.min_p_B = torch.zeros(rows, dtype=torch.float32, device=device)
        self.penalty_B = torch.ones(rows, dtype=torch.float32, device=device)
        self.frequency_B = torch.zeros(rows, dtype=torch.float32, device=device)
        self.presence_B = torch.zeros(rows, dtype=torch.float32, device=device)
        self.key_B2 = torch.zeros(rows, 2, dtype=torch.int64, device=device)
        self.seen_BV: Tensor | None = None
        self.count_BV: Tensor | None = None
        """How often each row has generated each token, float32: 0 or more where the row asks for it, else anything."""
        self.bias_BV: Tensor | None = None
        self.allowed: Callable[[int, int], Tensor] | None = None
        """Which tokens the grammars of rows allow next, for (first row, how many): a bit for each, int32 [B, V / 32]."""
        self.ahead_BSL: Tensor | None = None
        self.positions = 0
        self.likeliest: BatchSampler | None = None
        """Where code is kept: what a compiled step holds while tokens are chosen behind it."""
        self.kernels: SamplingKernels | None = None
        """Where nothing is compiled: what chooses in few launches, for vocabularies that it takes."""

    @property
    def greedy(self) -> bool:
        """Whether every row takes its largest logit, and nothing is looked at beside logits."""
        return not (self.code.drawn or self.code.penalised or self.code.edited)

    @property
    def is_apart(self) -> bool:
        """Whether tokens are chosen behind the compiled step, so that what is rarely asked for is compiled for nobody."""
        return self.steady and self.code.edited

    def set_rows(
        self,
        first: int,
        settings: Sequence[Sampling],
        written: Sequence[Sequence[int]] | None = None,
        generated: Sequence[Sequence[int]] | None = None,
    ) -> None:
        """Rows from the `first` on choose by these settings, one seed each, from now on.

        What changes logits from token to token also needs what is `written` in each row; ValueError without it. `generated`:
        what of it is no prompt, where rows go on that had begun elsewhere; None: nothing.
        """
        if written is None:
            for one in settings:
                one.check_without_history()
        part, begun = slice(first, first + len(settings)), self.code != Code() or any(self.settings)
        self.settings[part] = settings
        needed = code_of(one for one in self.settings if one is not None)
        kept, wanted = self.code.with_edits_of(Code()), needed.with_edits_of(Code())
        if not (self.steady and begun):
            kept = wanted
        elif not kept.covers(wanted):
            bound = max(LEAST_BOUND, 1 << (needed.top_k - 1).bit_length() if needed.top_k else 0, self.code.top_k)
            kept = Code(True, True, bound, True, True, penalised=self.vocab_size > 0)
        self.code = kept.with_edits_of(needed)
        device = self.key_B2.device
        temperatures = [max(one.temperature, 1e-6) if one.temperature else 0.0 for one in settings]
        self.temperature_B[part] = upload(temperatures, device, torch.float32)
        self.top_k_B[part] = upload([one.top_k or 0 for one in settings], device, torch.int64)
        self.top_p_B[part] = upload([one.top_p for one in settings], device, torch.float32)
        self.min_p_B[part] = upload([one.min_p for one in settings], device, torch.float32)
        self.penalty_B[part] = upload([one.repetition_penalty for one in settings], device, torch.float32)
        self.frequency_B[part] = upload([one.frequency_penalty for one in settings], device, torch.float32)
        self.presence_B[part] = upload([one.presence_penalty for one in settings], device, torch.float32)
        seeds = [int(seed) for one in settings for seed in one.seeds(1)]
        words = [[seed & MASK_32, seed >> 32] for seed in seeds]
        self.key_B2[part] = upload(words, device, torch.int64).view(-1, 2)
        if self.code.penalised:
            if self.seen_BV is None:
                self.seen_BV = torch.zeros(len(self.settings), self.vocab_size, dtype=torch.bool, device=device)
            self.seen_BV[part] = upload(seen(written or [[] for _ in settings], self.vocab_size), device)
        if self.code.counted:
            if self.count_BV is None:
                self.count_BV = torch.zeros(len(self.settings), self.vocab_size, device=device)
            self.count_BV[part] = upload(counted(generated or [[] for _ in settings], self.vocab_size), device)
        if self.code.biased and self.bias_BV is None:
            self.bias_BV = torch.zeros(len(self.settings), self.vocab_size, device=device)
        if self.bias_BV is not None:  # also where nobody has one now: who stood there before may have had one
            self.bias_BV[part] = 0
            for row, one in enumerate(settings, first):
                if one.bias:
                    self.bias_BV[row, upload(list(one.bias), device)] = upload(
                        [*one.bias.values()], device, torch.float32
                    )
        if any(one.temperature for one in settings):
            self._hash_ahead(part)

    def free_row(self, row: int) -> None:
        """Nobody asks for this row's token any more. The code stays right; `narrow` makes it as little as the others need."""
        self.settings[row] = None

    def narrow(self) -> None:
        """Code for the rows that are left; where code is kept, without the edits that nobody asks for any more."""
        needed = code_of(one for one in self.settings if one is not None)
        self.code = self.code.with_edits_of(needed) if self.steady else needed

    def rows(self, first: int, count: int) -> BatchSampler:
        """The sampler of some of the rows alone, which stay this one's."""
        part, of = slice(first, first + count), copy.copy(self)
        of.settings, of.first = self.settings[part], self.first + first
        of.temperature_B, of.top_k_B, of.top_p_B = self.temperature_B[part], self.top_k_B[part], self.top_p_B[part]
        of.min_p_B, of.penalty_B, of.key_B2 = self.min_p_B[part], self.penalty_B[part], self.key_B2[part]
        of.frequency_B, of.presence_B = self.frequency_B[part], self.presence_B[part]
        for name in ("seen_BV", "count_BV", "bias_BV", "ahead_BSL"):
            of_all = getattr(self, name)
            setattr(of, name, None if of_all is None else of_all[part])
        return of

    def look_ahead(self, positions: int) -> None:
        """Hash the uniforms of all positions below this at once: a draw then looks one up, and launches no hundred small kernels.

        For code that is not compiled; a compiler makes one kernel of the hash.
        """
        self.positions = positions
        if self.code.drawn:
            self._hash_ahead(slice(0, len(self.settings)))

    def _hash_ahead(self, part: slice) -> None:
        if not self.positions:
            return
        key_B2 = self.key_B2[part]
        lane_N = torch.arange(STREAMS * self.positions, device=key_B2.device)
        position_BN, stream_N = (lane_N % self.positions).expand(len(key_B2), -1), lane_N // self.positions
        found_BSL = hashed(key_B2, position_BN, stream_N).view(-1, STREAMS, self.positions)
        if len(key_B2) == len(self.key_B2):
            self.ahead_BSL = found_BSL
            return
        if self.ahead_BSL is None:
            self.ahead_BSL = found_BSL.new_zeros(len(self.key_B2), STREAMS, self.positions)
        self.ahead_BSL[part] = found_BSL

    def uniforms(self, position_BN: Tensor, stream_N: Tensor) -> Tensor:
        """The uniforms [B, N] of each row at its positions, in the streams [N]."""
        if self.ahead_BSL is None:
            return hashed(self.key_B2, position_BN, stream_N)
        row_B1 = torch.arange(len(position_BN), device=position_BN.device)[:, None]
        return self.ahead_BSL[row_B1, stream_N, position_BN]

    def __call__(self, logits_BV: Tensor, position_B: Tensor) -> Tensor:
        """The token [B] that stands at `position_B`; on equal logits the lowest id."""
        logits_BV = self.edited(logits_BV)
        if not self.code.drawn:
            return logits_BV.argmax(-1) if self.kernels is None else self.kernels.likeliest(logits_BV)
        if self.ahead_BSL is not None:
            u_B = self.ahead_BSL[:, 0].gather(1, position_B[:, None])[:, 0]
        else:
            u_B = uniform(self.key_B2, position_B)
        return self.draw(self.probabilities(logits_BV), u_B)

    def edited(self, logits_BV: Tensor) -> Tensor:
        """The logits with each row's bias, penalties and grammar; a row without them has its own, to the bit."""
        code = self.code
        if code.biased:
            assert self.bias_BV is not None
            logits_BV = logits_BV.float() + self.bias_BV
        if code.penalised:
            assert self.seen_BV is not None
            logits_BV, penalty_B1 = logits_BV.float(), self.penalty_B[:, None]
            lowered_BV = torch.where(logits_BV > 0, logits_BV / penalty_B1, logits_BV * penalty_B1)
            logits_BV = torch.where(self.seen_BV, lowered_BV, logits_BV)
        if code.counted:
            assert self.count_BV is not None
            lowered_BV = self.frequency_B[:, None] * self.count_BV + self.presence_B[:, None] * (self.count_BV > 0)
            logits_BV = logits_BV.float() - lowered_BV
        if code.masked:
            assert self.allowed is not None
            allowed_BV = unpacked(self.allowed(self.first, len(logits_BV)), logits_BV.shape[1])
            logits_BV = logits_BV.float().masked_fill(~allowed_BV, -torch.inf)
        return logits_BV

    def note(self, token_B: Tensor) -> None:
        """The token that each row now also holds. Apart from choosing, so that no compiled graph writes to its inputs."""
        if self.code.penalised:
            assert self.seen_BV is not None
            self.seen_BV.scatter_(1, token_B[:, None], True)
        if self.code.counted:
            assert self.count_BV is not None
            self.count_BV.scatter_add_(1, token_B[:, None], torch.ones_like(self.frequency_B)[:, None])

    def probabilities(self, logits: Tensor) -> Tensor:
        """The distributions that tokens are drawn from, float32 of the logits' shape: [B, V], or [B, T, V].

        A row that takes the largest logit has all weight there.
        """
        code, V = self.code, logits.shape[-1]
        if self.kernels is not None and not code.nucleus and V <= self.kernels.MOST_VOCABULARY:
            top_k_B, min_p_B = self.top_k_B if code.top_k else None, self.min_p_B if code.floored else None
            p_MV = self.kernels.distribution(logits.reshape(-1, V), self.temperature_B, top_k_B, min_p_B)
            return p_MV.view(logits.shape)
        each = (-1, *[1] * (logits.dim() - 1))  # of values [B], beside logits
        temperature, top_p, min_p = self.temperature_B.view(each), self.top_p_B.view(each), self.min_p_B.view(each)
        scaled = logits.float() / (torch.where(temperature == 0, 1.0, temperature) if code.mixed else temperature)
        if code.mixed and code.top_k:
            largest, k = scaled.topk(min(code.top_k, V), -1).values, self.top_k_B.view(each)
            at = (k - 1).clamp(0, largest.shape[-1] - 1).expand(*logits.shape[:-1], 1)
            scaled = scaled.masked_fill(scaled < torch.where(k == 0, -torch.inf, largest.gather(-1, at)), -torch.inf)
        elif 0 < code.top_k < V:
            scaled = scaled.masked_fill(scaled < scaled.topk(code.top_k, -1).values[..., -1:], -torch.inf)
        p = scaled.softmax(-1)
        if code.nucleus:
            kept = keep_nucleus(p, top_p)
            p = torch.where(top_p < 1, kept, p) if code.mixed else kept
        if code.floored:
            kept = keep_likely(p, min_p)
            p = torch.where(min_p > 0, kept, p) if code.mixed else kept
        if code.mixed:
            certain = torch.zeros_like(p).scatter(-1, logits.argmax(-1, keepdim=True), 1.0)
            p = torch.where(temperature == 0, certain, p)
        return p

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


def counted(generated: Sequence[Sequence[int]], vocab_size: int) -> Tensor:
    """How often each row holds each token, float32 [B, V]: ([[2, 0, 2], []], 3) -> [[1, 0, 2], [0, 0, 0]]."""
    rows = [torch.bincount(torch.tensor(ids, dtype=torch.int64), minlength=vocab_size) for ids in generated]
    return torch.stack(rows).float()


def unpacked(words_BW: Tensor, width: int) -> Tensor:
    """Bits of int32 words as booleans [B, width], the lowest bit first: ([[5]], 3) -> [[T, F, T]]."""
    bits_BW32 = (words_BW[..., None] >> torch.arange(32, dtype=torch.int32, device=words_BW.device)) & 1
    return bits_BW32.flatten(1)[:, :width] == 1


def hashed(key_B2: Tensor, position_BN: Tensor, stream_N: Tensor) -> Tensor:
    """The uniforms [B, N] of rows with these keys at their positions, in the streams [N]."""
    B, N = position_BN.shape
    key_RB2 = key_B2[:, None].expand(B, N, 2).reshape(-1, 2)
    return uniform(key_RB2, position_BN.reshape(-1), stream_N.expand(B, N).reshape(-1)).view(B, N)


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
