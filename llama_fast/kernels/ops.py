"""The kernels as functions of tensors.

No function synchronises with the host. Each allocates its result; `_linear` also normed activations, and `likeliest` scratch
memory that is kept.
"""

import functools
import math
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from llama_fast.kernels.attention import _attend
from llama_fast.kernels.choosing import _distribution, _draw
from llama_fast.kernels.eight_bits import _in_eight_bits
from llama_fast.kernels.found import found_tiles, product_of
from llama_fast.kernels.launching import launch
from llama_fast.kernels.linear import _in_registers, _norm, _on_tensor_cores
from llama_fast.kernels.narrow import _limbs_apart, _narrow
from llama_fast.kernels.packets import Mailbox
from llama_fast.kernels.several import _in_pieces, _several_rows
from llama_fast.kernels.stored import Narrow, group_of, storage_of
from llama_fast.kernels.tokens import _argmax, _embed
from llama_fast.kernels.tuning import (
    MOST_SPLITS,
    SHARED_BYTES,
    VECTOR_ROWS,
    AttentionTile,
    Tile,
    attention_tile,
    fitting_stages,
    general_tile,
    measured_tile,
    next_power_of_2,
)

MOST_ROWS = 8
"""Rows of activations in one linear launch, of weights in the activations' type."""
MOST_ROWS_OF_HALVES = 16
"""The same where both take two bytes."""
MOST_ROWS_OF_NARROW = 128
"""The same for weights that a library would first have to widen."""
MOST_ROWS_OF_WORDS = {"int4": 64, "sparse": 32, "sparse_int8": 32, "fp8": 64}
"""The same for weights in words or groups."""
PIECES = {"int4": (2, 4), "sparse": (2, 2), "sparse_int8": (2, 2), "fp8": (1, 1)}
"""Pieces of the activations beside weights of this kind, and columns of each that stand together: see `several._in_pieces`."""
MOST_ATTENTION_ROWS = 64  # tokens x query heads per key/value head
MOST_INTEGER = {"int4": 2.0**22 - 1, "sparse_int8": 2.0**20 - 1, "sparse": 0.0, "fp8": 0.0}
"""The largest integer that an activation becomes beside weights of this kind; 0: it stays a number."""
ARGMAX_STRETCH = 2048
MOST_VOCABULARY = 32768  # that one program holds


class Machine(NamedTuple):
    """What a launch needs to know of the device. `pdl`: programmatic dependent launch (compute capability 9 on)."""

    name: str
    pdl: bool
    shared: int = SHARED_BYTES
    """Bytes of shared memory that one program may have."""


@functools.cache
def machine(device: torch.device) -> Machine:
    """The device's facts; a CPU is Triton's interpreter."""
    if device.type != "cuda":
        return Machine(device.type, False)
    properties = torch.cuda.get_device_properties(device)
    most = triton.runtime.driver.active.utils.get_device_properties(device.index or 0)["max_shared_mem"]
    return Machine(properties.name, properties.major >= 9, most)


def launch_options(pdl: bool) -> dict[str, Any]:
    """Named only when used: Triton's interpreter does not know them."""
    return {"launch_pdl": True} if pdl else {}


def takes(rows: int, weight: Tensor | Narrow, x: Tensor) -> bool:
    """Whether our products are made for so many rows of x: for more, a library's are faster."""
    if isinstance(weight, Narrow):
        return rows <= (MOST_ROWS_OF_WORDS[weight.kind] if fits_tensor_cores(weight) else VECTOR_ROWS)
    if x.element_size() != 2:
        return rows <= MOST_ROWS
    return rows <= (MOST_ROWS_OF_NARROW if weight.element_size() < 2 else MOST_ROWS_OF_HALVES)


def fits_tensor_cores(weight: Narrow) -> bool:
    """Whether a group's columns, by halves, are pieces that tensor cores multiply."""
    return weight.group >= 32 and weight.group & (weight.group - 1) == 0


def widened_at_every_step(rows: int, weight: Tensor | Narrow) -> str:
    """What is to be said where so few rows read a matrix that is then widened first; "" for others."""
    if not isinstance(weight, Narrow) or rows > max(MOST_ROWS_OF_WORDS.values()):
        return ""
    kind = f"{weight.kind} weights" + (f" in groups of {weight.group}" if group_of(weight) else "")
    return f"{rows} rows of {kind} are widened at every step, which takes as long as several steps of one row"


def tile_of(gpu: str, epilogue: str, weight: Tensor | Narrow, x: Tensor) -> Tile:
    """How a product is cut: as the tables say, as was found at first use, or by the rule."""
    (n, k), m = weight.shape, x.shape[0]
    about = epilogue, n, k, m, storage_of(weight), x.element_size()
    return measured_tile(gpu, *about) or found_tiles(gpu).of(product_of(epilogue, weight, x)) or general_tile(*about)


class Rope(NamedTuple):
    """What the "rope" epilogue writes to and reads from. cos, sin [at least S, HD / 2] float32; caches [B, HKV, S, HD]; start [B].

    Or caches are pools of pages [N, HKV, HD], and `at` [B * T], int64, is the slot of each row of activations.
    """

    cos: Tensor
    sin: Tensor
    start: Tensor
    k_cache: Tensor
    v_cache: Tensor
    heads: int
    at: Tensor | None = None

    @property
    def batch(self) -> int:
        return len(self.start) if self.at is not None else self.k_cache.shape[0]

    @property
    def slots(self) -> int | Tensor:
        """What tells a kernel where a position stands."""
        return self.k_cache.shape[2] if self.at is None else self.at


class Table(NamedTuple):
    """Which page of pools [N, HKV, HD] holds each stretch of `page` positions of a row: int64 [B, P]."""

    pages: Tensor
    page: int


def _linear(
    x: Tensor,
    weight: Tensor | Narrow,
    scale: Tensor | None,
    out: Tensor,
    epilogue: str,
    *,
    gain: Tensor | None = None,
    eps: float = 0.0,
    residual: Tensor | None = None,
    rope: Rope | None = None,
    mailbox: Mailbox | None = None,
    early: bool = False,
    tile: Tile | None = None,
    pdl: bool | None = None,
) -> Tensor:
    """Launch one linear kernel on x [M, K], weight [N, K]."""
    (m, k), (n, k_weight) = x.shape, weight.shape
    if k != k_weight:
        raise ValueError(f"x has {k} columns, the weight {k_weight}")
    if m < 1 or not takes(m, weight, x):
        raise ValueError(
            f"{m} rows of {x.dtype}: these kernels take 1 to {MOST_ROWS_OF_HALVES}, of narrow weights {MOST_ROWS_OF_NARROW}"
        )
    facts = machine(x.device)
    pdl = facts.pdl if pdl is None else pdl
    tile = tile or tile_of(facts.name, epilogue, weight, x)
    # Absent tensors: any pointer will do, the kernel is compiled without their loads.
    heads = kv_heads = head_dim = tokens = 1
    slots: int | Tensor = 1
    cos = sin = start = k_cache = v_cache = x
    if rope is not None:
        cos, sin, start, k_cache, v_cache, heads, _ = rope
        kv_heads, head_dim, slots = k_cache.shape[1], k_cache.shape[-1], rope.slots
        tokens = m // rope.batch
    dots = m > 1 and not tile.vector and not isinstance(weight, Narrow)
    if dots and gain is not None:
        x, gain = rms_norm(x, gain, eps, pdl=pdl), None
    ends: tuple[Any, ...] = (x if scale is None else scale, x if residual is None else residual, out)
    ends += (start, cos, sin, k_cache, v_cache, slots)
    rows = 2 * tile.rows if epilogue == "gated" else tile.rows
    blocks = triton.cdiv(n, rows)
    shared: dict[str, Any] = dict(
        M=m, N=n, K=k, R=rows, BK=tile.columns, T=tokens, SCALED=scale is not None, EPILOGUE=epilogue,
        H=heads, HKV=kv_heads, HD=head_dim, PDL=pdl, num_warps=tile.warps, **launch_options(pdl),
    )  # fmt: skip
    if isinstance(weight, Narrow) and m > 1 and not tile.vector:
        several_rows(x, gain, eps, weight, ends, tile, blocks, shared)
    elif isinstance(weight, Narrow):
        parts = [x if part is None else part for part in (weight.places, weight.scale, weight.zero)]
        most, apart = MOST_INTEGER[weight.kind], tile.apart and MOST_INTEGER[weight.kind] > 0
        activations, norm = (x, x if gain is None else gain), gain is not None
        if apart:
            activations, norm = limbs_apart(x, gain, eps, most, pdl), False
        launch(_narrow, (triton.cdiv(blocks, tile.blocks),))(
            *activations, weight.weight, *parts, *ends, eps, KIND=weight.kind, G=weight.group,
            ZERO=weight.zero is not None, APART=apart, MOST=most, MP=next_power_of_2(m), NORM=norm, BLOCKS=tile.blocks,
            EARLY=early and not apart, **shared, **over_ranks(mailbox, x, tile),
        )  # fmt: skip
    elif dots:
        ahead, padded = min(tile.ahead, triton.cdiv(k, tile.columns)), max(next_power_of_2(m), 8)
        per_column = rows * weight.element_size() + padded * x.element_size()
        stages = fitting_stages(tile, per_column, facts.shared)
        launch(_on_tensor_cores, (blocks,))(
            x, weight, *ends, MP=padded, SLICES=tile.slices, AHEAD=ahead, STAGES=stages, **shared
        )  # fmt: skip
    else:
        vector = min(16 // weight.element_size(), tile.columns)
        # "offset" costs accuracy that only bf16 activations have already lost.
        on_gpu = facts.name != "cpu"
        convert = tile.convert if weight.dtype == torch.int8 and x.dtype == torch.bfloat16 and on_gpu else "plain"
        launch(_in_registers, (triton.cdiv(blocks, tile.blocks),))(
            x, x if gain is None else gain, weight, *ends, eps, MP=next_power_of_2(m), V=vector, NORM=gain is not None,
            CONVERT=convert, BLOCKS=tile.blocks, EARLY=early, **shared,
            **over_ranks(mailbox, x, tile),
        )  # fmt: skip
    return out


def limbs_apart(x: Tensor, gain: Tensor | None, eps: float, most: float, pdl: bool) -> tuple[Tensor, Tensor]:
    """The limbs of the rows of x [M, K], normed if there is a gain, and their factors [M]: see `narrow._limbs_apart`."""
    m, k = x.shape
    limbs = torch.empty(m, 6 * k // 8 + k // 32, dtype=torch.int32, device=x.device)
    factors = torch.empty(m, dtype=torch.float32, device=x.device)
    launch(_limbs_apart, (m,))(
        x, x if gain is None else gain, limbs, factors, eps, K=k, BK=next_power_of_2(k), NORM=gain is not None,
        MOST=most, PDL=pdl, num_warps=32 if k >= 8192 else 16, **launch_options(pdl),
    )  # fmt: skip
    return limbs, factors


def several_rows(
    x: Tensor,
    gain: Tensor | None,
    eps: float,
    weight: Narrow,
    ends: tuple[Any, ...],
    tile: Tile,
    blocks: int,
    shared: dict[str, Any],
) -> None:
    """Launch `several._several_rows`; `ends` and `shared` are what all products are given."""
    (m, k), pdl = x.shape, shared["PDL"]
    padded, slices = max(next_power_of_2(m), 8), min(tile.slices, next_power_of_2(k // 32))
    scale, zero, places = (x if part is None else part for part in (weight.scale, weight.zero, weight.places))
    each = slice_columns(tile.columns // max(tile.slices, 1), group_of(weight))
    two_of_them = group_of(weight) > 0 and k // weight.group % 2 == 0 and scale.element_size() == 2
    pairs = two_of_them and each >= weight.group
    shared["BK"] = each * max(slices, 1)
    step = tile._replace(columns=shared["BK"] * tile.loads)
    splits, ahead = min(tile.splits, triton.cdiv(k, step.columns)), min(tile.ahead, triton.cdiv(k, step.columns))
    per_column = shared["R"] * weight.weight.nbytes / weight.shape[0] / k + padded * x.element_size()
    values = weight.weight if weight.kind in ("sparse", "fp8") else weight.weight.view(torch.int8)
    launch(_several_rows, (blocks, splits))(
        *(split_scratch(blocks, splits * shared["R"] * padded, x.device) if splits > 1 else (x, x)),
        in_pieces(x, gain, eps, weight.kind, weight.kind == "int4" and not slices, pdl), values, places,
        scale.view(torch.int32) if pairs else scale, zero, *ends, KIND=weight.kind, G=weight.group,
        ZERO=weight.zero is not None, PAIRS=pairs, FP16=scale.dtype == torch.float16, MP=padded, SLICES=slices,
        LOADS=tile.loads, AHEAD=ahead if splits == 1 else 0, SPLITS=splits,
        STAGES=fitting_stages(step, math.ceil(per_column), machine(x.device).shared), **shared,
    )  # fmt: skip


def split_scratch(blocks: int, numbers: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """For a product whose columns are split: so many partial sums of each block, and a counter each, zeros."""
    part = torch.empty(blocks * numbers, dtype=torch.float32, device=device)
    return part, arrivals(next_power_of_2(blocks), device)


@functools.cache
def arrivals(blocks: int, device: torch.device) -> Tensor:
    """Counters that every launch leaves at zero. They are kept: a CUDA graph finds them where they were."""
    return torch.zeros(blocks, dtype=torch.int32, device=device)


def slice_columns(asked: int, group: int) -> int:
    """Columns of a slice, near to those that a tile asks for: of up to 4 groups, or a part of one."""
    return min(asked, max(1, min(4, asked // group)) * group) if group else asked


def in_pieces(x: Tensor, gain: Tensor | None, eps: float, kind: str, swapped: bool, pdl: bool) -> Tensor:
    """The rows of x [M, K], normed if there is a gain, in the order of what is stored as `kind`: see `several._in_pieces`."""
    (m, k), (pieces, run) = x.shape, PIECES[kind]
    out = torch.empty(pieces, m, k // pieces, dtype=x.dtype, device=x.device)
    launch(_in_pieces, (m,))(
        x, x if gain is None else gain, out, eps, m, K=k, BK=next_power_of_2(k), NORM=gain is not None, RUN=run,
        P=pieces, SWAPPED=swapped, PDL=pdl, num_warps=32 if k >= 8192 else 16, **launch_options(pdl),
    )  # fmt: skip
    return out


def over_ranks(mailbox: Mailbox | None, x: Tensor, tile: Tile) -> dict[str, Any]:
    """The arguments by which a product sends its parts; ValueError for a tile whose threads are fewer than its words."""
    if mailbox is None:
        return dict(inboxes=x, epochs=x, rank=0, SIZE=1, WORDS=1, BLOCK=1, THREADS=1)
    threads = 32 * tile.warps
    if mailbox.size * tile.rows > threads:
        raise ValueError(f"{tile.rows} rows to {mailbox.size} ranks: more words than the tile's {threads} threads")
    return dict(
        inboxes=mailbox.inboxes, epochs=mailbox.epochs, rank=mailbox.rank,
        SIZE=mailbox.size, WORDS=mailbox.words, BLOCK=mailbox.block, THREADS=threads,
    )  # fmt: skip


def rms_norm(
    x: Tensor, gain: Tensor, eps: float, *, pdl: bool | None = None, dtype: torch.dtype | None = None
) -> Tensor:
    """x [M, D] over its root mean square, times the gain [D], in `dtype` (x's own by default)."""
    pdl = machine(x.device).pdl if pdl is None else pdl
    out, width = torch.empty_like(x, dtype=dtype), x.shape[1]
    launch(_norm, (x.shape[0],))(
        x, gain, out, eps, K=width, BK=next_power_of_2(width), PDL=pdl, num_warps=8, **launch_options(pdl)
    )
    return out


def qkv(
    x: Tensor,
    gain: Tensor,
    eps: float,
    weight: Tensor | Narrow,
    scale: Tensor | None,
    rope: Rope,
    **options: Any,
) -> Tensor:
    """RMS norm, the stacked q, k, v weight [(H + 2 HKV) * HD, D], rotary; k and v go to the caches. -> q [M, H * HD].

    Row m is token m % T of batch row m // T and sits at position start[m // T] + m % T.
    """
    out = x.new_empty(x.shape[0], rope.heads * rope.k_cache.shape[-1])
    return _linear(x, weight, scale, out, "rope", gain=gain, eps=eps, rope=rope, **options)


def linear_add(x: Tensor, weight: Tensor | Narrow, scale: Tensor | None, residual: Tensor, **options: Any) -> Tensor:
    """residual + x W^T: attention's and the feed-forward's last matrix. [M, N]."""
    return _linear(x, weight, scale, torch.empty_like(residual), "add", residual=residual, **options)


def linear_send(x: Tensor, weight: Tensor | Narrow, scale: Tensor | None, mailbox: Mailbox, **options: Any) -> Tensor:
    """x W^T of one row, float32 [1, N], of which every program also sends its rows to the other ranks.

    The next exchange by this mailbox, on every rank, has to be `Exchange.sum(this, sent=True)`: it counts the epoch.
    """
    if x.shape[0] != 1 or weight.shape[0] > mailbox.words:
        raise ValueError(f"{x.shape[0]} rows of {weight.shape[0]}: a product sends one row of up to {mailbox.words}")
    out = x.new_empty(1, weight.shape[0], dtype=torch.float32)
    return _linear(x, weight, scale, out, "send", mailbox=mailbox, **options)


def linear(
    x: Tensor,
    weight: Tensor | Narrow,
    scale: Tensor | None,
    *,
    gain: Tensor | None = None,
    eps: float = 0.0,
    dtype: torch.dtype | None = None,
    **options: Any,
) -> Tensor:
    """x W^T in `dtype` (x's own by default), behind an RMS norm if there is a `gain`: the output head. [M, N]."""
    out = x.new_empty(x.shape[0], weight.shape[0], dtype=dtype or x.dtype)
    return _linear(x, weight, scale, out, "plain", gain=gain, eps=eps, **options)


def gated(x: Tensor, gain: Tensor, eps: float, weight: Tensor | Narrow, scale: Tensor | None, **options: Any) -> Tensor:
    """RMS norm, then silu(gate) * up; weight [2 F, D]: the gate's rows, then the up's. [M, F]."""
    out = x.new_empty(x.shape[0], weight.shape[0] // 2)
    return _linear(x, weight, scale, out, "gated", gain=gain, eps=eps, **options)


class AttentionScratch(NamedTuple):
    """Partial results of split attention, and a counter per head that every launch leaves at zero."""

    part: Tensor
    part_stats: Tensor
    arrived: Tensor

    @staticmethod
    def of(
        rows: int, heads: int, kv_heads: int, head_dim: int, device: torch.device, splits: int = MOST_SPLITS
    ) -> "AttentionScratch":
        """For `rows` activation rows (B * T) at most; layers run one after the other and can share it."""
        part = torch.empty(rows * heads * splits * head_dim, dtype=torch.float32, device=device)
        stats = torch.empty(rows * heads * splits * 2, dtype=torch.float32, device=device)
        return AttentionScratch(part, stats, torch.zeros(rows * kv_heads, dtype=torch.int32, device=device))


def attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    start: Tensor,
    scratch: AttentionScratch,
    *,
    tile: AttentionTile | None = None,
    pdl: bool | None = None,
    early: bool = False,
    table: Table | None = None,
    steps: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """Causal attention of q [B * T, H * HD] over slots 0 .. start + t of the caches [B, HKV, S, HD]. -> [B * T, H * HD].

    table: where these slots stand in caches that are pools [N, HKV, HD]; no kernel of the step writes it.
    steps: of caches that are int8, what each vector of keys, and of values, is multiplied by, [B, HKV, S] or [N, HKV].
    early: `start` is read before the kernel ahead has ended; right if nothing since `embed` writes it.
    """
    batch, kv_heads, head_dim = k_cache.shape[0] if table is None else len(start), k_cache.shape[1], k_cache.shape[-1]
    slots = k_cache.shape[2] if table is None else table.pages.shape[1] * table.page
    page, row_pages = (0, 0) if table is None else (table.page, table.pages.shape[1])
    heads = q.shape[1] // head_dim
    tokens, group = q.shape[0] // batch, heads // kv_heads
    if tokens * group > MOST_ATTENTION_ROWS:
        raise ValueError(f"{tokens} tokens x {group} query heads per key head: at most {MOST_ATTENTION_ROWS}")
    facts = machine(q.device)
    pdl = facts.pdl if pdl is None else pdl
    tile = tile or attention_tile(
        batch * kv_heads, tokens * group, slots, next_power_of_2(head_dim) * k_cache.element_size()
    )
    if scratch.part.numel() < tile.splits * q.numel() or scratch.arrived.numel() < batch * kv_heads:
        raise ValueError(f"scratch for {scratch.part.numel()} partial results, {tile.splits * q.numel()} needed")
    out = torch.empty_like(q)
    rows = tokens * group
    launch(_attend, (batch * kv_heads, tile.splits))(
        q, k_cache, v_cache, *(steps or (q, q)), start, out, scratch.part, scratch.part_stats, scratch.arrived,
        slots if table is None else table.pages,
        head_dim**-0.5,
        T=tokens, G=group, HKV=kv_heads, HD=head_dim, DP=max(next_power_of_2(head_dim), 16),
        RP=1 if rows == 1 and tile.vector else max(next_power_of_2(rows), 16), BS=tile.slots, SPLITS=tile.splits,
        SPLITS_P=next_power_of_2(tile.splits), E=min(next_power_of_2(rows * head_dim), 4096 // next_power_of_2(tile.splits)), LEAST=tile.least,
        STAGES=tile.stages, PDL=pdl, EARLY=early, PAGE=page, ROW_PAGES=row_pages, EIGHT=steps is not None, num_warps=tile.warps,
        **launch_options(pdl),
    )  # fmt: skip
    return out


def keep_in_eight_bits(
    new: tuple[Tensor, Tensor], kept: tuple[Tensor, ...], start: Tensor, at: Tensor | None, *, pdl: bool | None = None
) -> None:
    """New keys and values [M, HKV, HD] to a cache of eight bits: its integers and steps of keys and of values, as `attention` reads
    them. `start` [B] and `at` as in `Rope`."""
    rows, kv_heads, head_dim = new[0].shape
    facts = machine(new[0].device)
    pdl = facts.pdl if pdl is None else pdl
    k_cache, v_cache, k_steps, v_steps = kept
    launch(_in_eight_bits, (rows, kv_heads))(
        *new, k_cache, v_cache, k_steps, v_steps, start, k_cache.shape[2] if at is None else at, rows // len(start),
        HKV=kv_heads, HD=head_dim, DP=next_power_of_2(head_dim), PDL=pdl, num_warps=1, **launch_options(pdl),
    )  # fmt: skip


def embed(tokens: Tensor, table: Tensor, *, pdl: bool | None = None) -> Tensor:
    """Rows of the embedding table [V, D] for tokens [M]. [M, D]."""
    facts = machine(table.device)
    pdl = facts.pdl if pdl is None else pdl
    out = table.new_empty(tokens.numel(), table.shape[1])
    launch(_embed, (tokens.numel(), triton.cdiv(table.shape[1], 1024)))(
        tokens, table, out, D=table.shape[1], BD=1024, PDL=pdl, **launch_options(pdl)
    )
    return out


class ArgmaxScratch(NamedTuple):
    """Winners of the vocabulary's stretches, and a counter per row that every launch leaves at zero."""

    value: Tensor
    id: Tensor
    arrived: Tensor

    @staticmethod
    def of(rows: int, vocab: int, device: torch.device) -> "ArgmaxScratch":
        """For `rows` rows of logits at most."""
        n = rows * triton.cdiv(vocab, ARGMAX_STRETCH)
        value = torch.empty(n, dtype=torch.float32, device=device)
        ids = torch.empty(n, dtype=torch.int32, device=device)
        return ArgmaxScratch(value, ids, torch.zeros(rows, dtype=torch.int32, device=device))


def argmax(
    logits: Tensor,
    scratch: ArgmaxScratch,
    *,
    out: Tensor | None = None,
    advance: Tensor | None = None,
    pdl: bool | None = None,
) -> Tensor:
    """The id of the largest of each row of logits [M, V], the lowest on ties. int64 [M], or into `out`.

    advance: positions [M] to move on by one in the same launch, so that a step needs no other kernel.
    """
    rows, vocab = logits.shape
    facts = machine(logits.device)
    pdl = facts.pdl if pdl is None else pdl
    splits = triton.cdiv(vocab, ARGMAX_STRETCH)
    out = torch.empty(rows, dtype=torch.int64, device=logits.device) if out is None else out
    launch(_argmax, (rows, splits))(
        logits, out, *scratch, out if advance is None else advance, VOCAB=vocab, BV=ARGMAX_STRETCH, SPLITS=splits, SP=next_power_of_2(splits),
        ADVANCE=advance is not None, PDL=pdl,
        num_warps=8, **launch_options(pdl),
    )  # fmt: skip
    return out


@functools.cache
def _argmax_scratch(rows: int, vocab: int, device: torch.device) -> ArgmaxScratch:
    return ArgmaxScratch.of(rows, vocab, device)


def likeliest(logits: Tensor) -> Tensor:
    """As `argmax`, with scratch memory of its own that is kept: a CUDA graph finds it where it was."""
    logits = logits.contiguous()
    return argmax(logits, _argmax_scratch(*logits.shape, logits.device))


def padded_vocabulary(vocab: int) -> int:
    """What one program holds of a row of logits; ValueError for more than it can."""
    if vocab > MOST_VOCABULARY:
        raise ValueError(f"a vocabulary of {vocab}: this kernel takes up to {MOST_VOCABULARY}")
    return next_power_of_2(vocab)


def distribution(
    logits: Tensor, temperature: Tensor, top_k: Tensor | None = None, min_p: Tensor | None = None
) -> Tensor:
    """The distributions that tokens are drawn from: `sampling.BatchSampler.probabilities` but for top_p. float32 [M, V].

    Of the logits [M, V] each of the B rows has M / B; temperature, top_k (int64) and min_p are [B].
    """
    rows, vocab = logits.shape
    wide = padded_vocabulary(vocab)
    out = torch.empty(rows, vocab, dtype=torch.float32, device=logits.device)
    launch(_distribution, (rows,))(
        logits.contiguous(), temperature, temperature if top_k is None else top_k, temperature if min_p is None else min_p,
        out, V=vocab, BV=wide, EACH=rows // len(temperature), CUT=top_k is not None, FLOORED=min_p is not None, num_warps=32,
    )  # fmt: skip
    return out


def draw(p: Tensor, uniform: Tensor) -> Tensor:
    """The tokens [M] at which the cumulative sums of p [M, V] pass `uniform` [M], float64 in [0, 1), times their totals."""
    rows, vocab = p.shape
    wide = padded_vocabulary(vocab)
    out = torch.empty(rows, dtype=torch.int64, device=p.device)
    launch(_draw, (rows,))(p.contiguous(), uniform.contiguous(), out, V=vocab, BV=wide, E=min(128, wide), num_warps=32)
    return out
