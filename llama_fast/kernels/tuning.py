"""Which block sizes a kernel runs with: a table measured per GPU and matrix shape, and a rule for everything else."""

import itertools
from typing import Any, NamedTuple


class Tile(NamedTuple):
    """How a linear kernel cuts its work.

    rows: weight rows of a block. columns: weight columns of one load. warps: per program.
    vector: several rows of activations go as one does, in registers and not to tensor cores.
    In registers: blocks: per program, the next one's weights loading while one is used. convert: int8 to float32 for bf16
    activations: "plain", "exact" or "offset", see common.to_float32.
    On tensor cores: stages: of the software pipeline. slices: of the columns of a load, a warp or more to each (0: all warps
    share all columns). ahead: loads before the wait for the kernel ahead.
    apart: of weights of less than a byte, the activations' limbs are made by a launch of their own. loads: of columns, in a step
    of the pipeline, of such weights on tensor cores; a step is also what is loaded ahead. splits: programs that share such a
    block's columns; the last of them adds up.
    """

    rows: int
    columns: int
    warps: int
    blocks: int = 1
    stages: int = 3
    convert: str = "plain"
    vector: bool = False
    ahead: int = 0
    slices: int = 1
    apart: bool = False
    loads: int = 1
    splits: int = 1


Storage = int | str
"""How a weight lies in memory: bytes of each, or the kind of `stored.Narrow`."""


class AttentionTile(NamedTuple):
    """slots: per step of the loop. splits: programs per key/value head. least: fewest slots worth a program.

    vector: a key/value head's one query row goes without tensor cores.
    """

    slots: int = 64
    splits: int = 8
    least: int = 64
    warps: int = 4
    stages: int = 2
    vector: bool = False


def next_power_of_2(n: int) -> int:
    """5 -> 8."""
    return 1 << max(n - 1, 0).bit_length()


# On an NVIDIA H100 80GB HBM3: tests/instruments/kernel_sweep.py and shard_tiles.py, the fastest in a whole token and not alone.
# (card, epilogue, N, K, storage) -> Tile for one row
ONE_ROW: dict[tuple[str, str, int, int, Storage], Tile] = {
    # llama-2-7b
    ("H100", "rope", 12288, 4096, 2): Tile(2, 4096, 4, 2),
    ("H100", "add", 4096, 4096, 2): Tile(2, 4096, 8, 2),
    ("H100", "gated", 22016, 4096, 2): Tile(2, 4096, 8, 2),
    ("H100", "add", 4096, 11008, 2): Tile(1, 4096, 8, 2),
    ("H100", "plain", 32000, 4096, 2): Tile(2, 4096, 8, 2),
    ("H100", "rope", 12288, 4096, 1): Tile(8, 2048, 4, convert="offset"),
    ("H100", "add", 4096, 4096, 1): Tile(4, 4096, 8, 2, convert="exact"),
    ("H100", "gated", 22016, 4096, 1): Tile(2, 2048, 4, 2, convert="offset"),
    ("H100", "add", 4096, 11008, 1): Tile(4, 4096, 8, convert="offset"),
    ("H200", "add", 4096, 11008, 1): Tile(2, 4096, 8, convert="offset"),
    ("H100", "plain", 32000, 4096, 1): Tile(4, 4096, 4, 2, convert="offset"),
    # llama-2-70b on one GPU
    ("H100", "rope", 10240, 8192, 1): Tile(2, 2048, 8, 2, convert="offset"),
    ("H100", "add", 8192, 8192, 1): Tile(4, 4096, 4, convert="exact"),
    ("H100", "add", 8192, 28672, 1): Tile(1, 4096, 16, 2, convert="offset"),
    ("H100", "gated", 57344, 8192, 1): Tile(2, 4096, 8, 2, convert="exact"),
    ("H100", "plain", 32000, 8192, 1): Tile(4, 4096, 4, convert="exact"),
    # llama-2-7b over four ranks, by one H100 with none of the others
    ("H100", "rope", 3072, 4096, 2): Tile(2, 4096, 8, 2),
    ("H100", "send", 4096, 1024, 2): Tile(2, 1024, 4, 2),
    ("H100", "send", 4096, 2752, 2): Tile(2, 1024, 2, 2),
    ("H100", "gated", 5504, 4096, 2): Tile(2, 4096, 8, 2),
    ("H100", "plain", 8000, 4096, 2): Tile(4, 4096, 8, 2),
    ("H100", "rope", 3072, 4096, 1): Tile(4, 4096, 4, 2, convert="offset"),
    ("H100", "send", 4096, 1024, 1): Tile(8, 1024, 4, convert="exact"),
    ("H100", "send", 4096, 2752, 1): Tile(2, 1024, 2, 2, convert="offset"),
    ("H100", "gated", 5504, 4096, 1): Tile(2, 4096, 8, 2, convert="offset"),
    ("H100", "plain", 8000, 4096, 1): Tile(4, 4096, 8, 2, convert="offset"),
    # llama-3.2-1b
    ("H100", "rope", 3072, 2048, 2): Tile(8, 2048, 4),
    ("H100", "add", 2048, 2048, 2): Tile(2, 2048, 2),
    ("H100", "gated", 16384, 2048, 2): Tile(2, 2048, 4, 2),
    ("H100", "add", 2048, 8192, 2): Tile(1, 4096, 8, 2),
    ("H100", "plain", 128256, 2048, 2): Tile(4, 2048, 8, 2),
    # llama-2-7b, of weights of less than a byte
    ("H100", "add", 4096, 4096, "int4"): Tile(4, 4096, 4, 2),
    ("H100", "add", 4096, 11008, "int4"): Tile(4, 1024, 8, 2, apart=True),
    ("H100", "gated", 22016, 4096, "int4"): Tile(4, 4096, 4, 2, apart=True),
    ("H100", "rope", 12288, 4096, "int4"): Tile(8, 4096, 4, 4),
    ("H100", "plain", 32000, 4096, "int4"): Tile(8, 4096, 8, 4),
    ("H100", "add", 4096, 4096, "sparse_int8"): Tile(4, 4096, 8, 4),
    ("H100", "add", 4096, 11008, "sparse_int8"): Tile(2, 4096, 8, 2, apart=True),
    ("H100", "gated", 22016, 4096, "sparse_int8"): Tile(2, 4096, 4, apart=True),
    ("H100", "rope", 12288, 4096, "sparse_int8"): Tile(2, 4096, 2, 2, apart=True),
    ("H100", "plain", 32000, 4096, "sparse_int8"): Tile(4, 4096, 4, 8),
    ("H100", "add", 4096, 4096, "sparse"): Tile(2, 4096, 4, 2),
    ("H100", "add", 4096, 11008, "sparse"): Tile(1, 1024, 8),
    ("H100", "gated", 22016, 4096, "sparse"): Tile(2, 4096, 8, 2),
    ("H100", "rope", 12288, 4096, "sparse"): Tile(4, 4096, 4, 2),
    ("H100", "plain", 32000, 4096, "sparse"): Tile(2, 4096, 4, 2),
    ("H200", "add", 4096, 4096, "int4"): Tile(8, 4096, 8, 2),
    ("H200", "gated", 22016, 4096, "int4"): Tile(2, 4096, 4, apart=True),
    ("H200", "plain", 32000, 4096, "int4"): Tile(4, 4096, 4, apart=True),
    ("H200", "add", 4096, 11008, "sparse_int8"): Tile(2, 1024, 8, 2, apart=True),
    ("H200", "gated", 22016, 4096, "sparse_int8"): Tile(2, 4096, 4, 2, apart=True),
    ("H200", "plain", 32000, 4096, "sparse_int8"): Tile(4, 4096, 4, 4, apart=True),
    ("H200", "gated", 22016, 4096, "sparse"): Tile(2, 4096, 4, 2),
    ("H200", "plain", 32000, 4096, "sparse"): Tile(4, 4096, 4, 2),
}
# Of shards, on two H200, of which an H100 is taken to want the same; those of four ranks with one other rank in place of three.
SHARDS: dict[tuple[str, int, int, Storage], Tile] = {
    # llama-2-7b over two ranks
    ("rope", 6144, 4096, 2): Tile(2, 4096, 4, 2),
    ("send", 4096, 2048, 2): Tile(1, 2048, 2, 2),
    ("send", 4096, 5504, 2): Tile(1, 512, 4),
    ("gated", 11008, 4096, 2): Tile(1, 4096, 8, 2),
    ("plain", 16000, 4096, 2): Tile(4, 4096, 8, 2),
    ("rope", 6144, 4096, 1): Tile(4, 4096, 4, 2, convert="offset"),
    ("send", 4096, 2048, 1): Tile(4, 2048, 4, convert="offset"),
    ("send", 4096, 5504, 1): Tile(4, 4096, 4, convert="exact"),
    ("gated", 11008, 4096, 1): Tile(2, 4096, 4, 2, convert="exact"),
    ("plain", 16000, 4096, 1): Tile(4, 4096, 4, 2, convert="offset"),
    # llama-2-70b over two ranks
    ("rope", 5120, 8192, 2): Tile(2, 4096, 8),
    ("send", 8192, 4096, 2): Tile(2, 4096, 4),
    ("send", 8192, 14336, 2): Tile(2, 4096, 8),
    ("gated", 28672, 8192, 2): Tile(1, 4096, 8),
    ("plain", 16000, 8192, 2): Tile(2, 4096, 16, 2),
    ("rope", 5120, 8192, 1): Tile(2, 4096, 8, 2, convert="offset"),
    ("send", 8192, 4096, 1): Tile(4, 4096, 8, 2, convert="exact"),
    ("send", 8192, 14336, 1): Tile(1, 2048, 8, 2, convert="exact"),
    ("gated", 28672, 8192, 1): Tile(1, 4096, 4, 2, convert="offset"),
    ("plain", 16000, 8192, 1): Tile(2, 4096, 8, 2, convert="offset"),
    # over four
    ("rope", 2560, 8192, 2): Tile(2, 4096, 8, 2),
    ("send", 8192, 2048, 2): Tile(1, 2048, 2),
    ("send", 8192, 7168, 2): Tile(1, 1024, 4),
    ("gated", 14336, 8192, 2): Tile(2, 4096, 16),
    ("plain", 8000, 8192, 2): Tile(2, 4096, 16, 2),
    ("rope", 2560, 8192, 1): Tile(2, 4096, 8, 2, convert="offset"),
    ("send", 8192, 2048, 1): Tile(4, 2048, 4, 2, convert="exact"),
    ("send", 8192, 7168, 1): Tile(4, 4096, 4, convert="exact"),
    ("gated", 14336, 8192, 1): Tile(1, 4096, 4, 2, convert="offset"),
    ("plain", 8000, 8192, 1): Tile(2, 4096, 8, 2, convert="exact"),
}
ONE_ROW |= {(card, *shape): tile for card in ("H100", "H200") for shape, tile in SHARDS.items()}
# The same with two rows.
TWO_ROWS: dict[tuple[str, str, int, int, Storage], Tile] = {
    ("H100", "rope", 12288, 4096, 2): Tile(2, 4096, 4, 2, vector=True),
    ("H100", "add", 4096, 4096, 2): Tile(2, 4096, 8, 2, vector=True),
    ("H100", "gated", 22016, 4096, 2): Tile(1, 4096, 8, 2, vector=True),
    ("H100", "add", 4096, 11008, 2): Tile(2, 4096, 8, vector=True),
}
CARDS = ("H100", "H200")
"""What a GPU's name contains whose tiles the tables know. An H200 is the H100's chip with a faster memory: it wants tiles of its own."""
SHARED_BYTES = 101_376
"""What a program may have on a GPU of compute capability 8.6, 8.9 or 12.0 (L4, L40S, A10, RTX); 8.0 and 9.0 have more."""
VECTOR_ROWS = 2
"""Rows of activations up to which int4 weights are multiplied without tensor cores."""
VERY_SHORT_CACHE_SLOTS = 256
SHORT_CACHE_SLOTS = 1024
MOST_SPLITS = 16
MANY_ROWS = 8192
"""Weight rows of which 16 at a time make three programs or more for each multiprocessor."""
LONG_ROW = 4096
"""Columns: of so many, or fewer, a program loads most before the wait, in bf16 three loads of 512 and in int8 all."""


def card(gpu: str) -> str | None:
    """ "NVIDIA H100 80GB HBM3" -> "H100"; None for a GPU that the tables do not know."""
    return next((name for name in CARDS if name in gpu), None)


def untuned(gpu: str) -> str | None:
    """What is to be said of a GPU that the tables do not know, in one line; None for one that they do."""
    if card(gpu) is not None:
        return None
    return f"no tile was measured on {gpu}: the fused kernels take general ones, right on every GPU, tuned on {' and '.join(CARDS)}"


def linear_tile(gpu: str, *about: Any) -> Tile:
    """The tables' tile, or the rule's: see `general_tile`."""
    return measured_tile(gpu, *about) or general_tile(*about)


def measured_tile(
    gpu: str, epilogue: str, n: int, k: int, m: int, storage: Storage, of_activations: int = 2
) -> Tile | None:
    """The tables' tile. For several rows that is the rule's, wherever one row of this shape was measured: the rule was made of these
    shapes."""
    name = card(gpu)
    if name is None:
        return None
    kinds = ("plain", "send") if epilogue == "plain" else (epilogue,)  # the same product, sent or not
    tables = {1: (ONE_ROW,), 2: (TWO_ROWS, ONE_ROW)}.get(m, (ONE_ROW,))
    for table, kind in itertools.product(tables, kinds):
        tile = table.get((name, kind, n, k, storage))
        if tile is not None:
            measured_so = m == 1 or table is TWO_ROWS
            return tile if measured_so else general_tile(epilogue, n, k, m, storage, of_activations)
    return None


def general_tile(epilogue: str, n: int, k: int, m: int, storage: Storage, of_activations: int = 2) -> Tile:
    """The rule's tile for a weight [n, k] that is stored so, and m rows of activations of so many bytes each."""
    if isinstance(storage, str):
        return narrow_tile(epilogue, k, storage) if m == 1 else several_tile(epilogue, n, k, m, storage)
    if m == 1:
        return one_row_tile(epilogue, k, storage)
    if m > 8:
        return many_rows_tile(epilogue, n, k, m)
    return few_rows_tile(epilogue, n, k, storage, of_activations)


def one_row_tile(epilogue: str, k: int, itemsize: int) -> Tile:
    """16 KB of weights a block, as most of the measured tiles have."""
    columns = min(next_power_of_2(k), 4096)
    bytes_per_row = columns * itemsize
    rows = max(1, min(8, 16384 // bytes_per_row))
    if epilogue == "gated":
        rows = max(1, rows // 2)
    elif epilogue == "rope":
        rows = max(2, rows)
    return Tile(rows, columns, warps=8 if bytes_per_row >= 8192 else 4, convert="exact")


def narrow_tile(epilogue: str, k: int, kind: str) -> Tile:
    """For one row of weights of less than a byte: a row of up to 4096 columns is one load."""
    columns = max(64, min(4096, next_power_of_2(k)))
    rows = {"int4": 4}.get(kind, 2)
    return Tile(rows // 2 if epilogue == "gated" else rows, columns, warps=4 if columns >= 1024 else 2)


def several_tile(epilogue: str, n: int, k: int, m: int, kind: str) -> Tile:
    """For two rows and more of weights in words or groups. Two rows of int4 go as one does, with limbs made apart; all others go to
    tensor cores, a slice of a load's columns to a warp. Nine rows and more of a large int4 matrix go by warp groups.

    A matrix of few rows makes few programs, so that each has more warps, and loads ahead.
    """
    if kind == "int4" and m <= VECTOR_ROWS:
        return Tile(2 if epilogue == "gated" else 4, max(64, min(4096, next_power_of_2(k))), 4, apart=True, vector=True)
    each, large = 128, n >= MANY_ROWS
    if kind != "int4":  # of more rows than 32 the activations of eight slices do not fit into every GPU's shared memory
        small = Tile(16, 8 * each, 8, slices=8, ahead=2) if m <= 32 else Tile(16, 4 * each, 4, slices=4, ahead=2)
        tile = Tile(16, 4 * each, 4, slices=4) if large else small
    elif m <= 8 and not large:
        tile = Tile(16, 8 * each, 8, slices=8, ahead=4)
    elif m <= 8 and epilogue == "rope":
        tile = Tile(32, 4 * each, 4, slices=4, ahead=4)
    elif m <= 8:
        tile = Tile(32, 2 * each, 2, slices=2, loads=2)
    elif large and epilogue == "rope":
        tile = Tile(64, each, 4, slices=0, loads=4 if m <= 16 else 2, stages=4 if m <= 32 else 3)
    elif large:
        tile = Tile(64, each, 4, slices=0, loads=2, stages=4 if m <= 16 else 3 if m <= 32 else 2)
    elif m <= 32:
        tile = Tile(16, 4 * each, 4, slices=4, loads=2)
    else:
        tile = Tile(32, 4 * each, 4, slices=4)
    return tile._replace(rows=tile.rows // 2) if epilogue == "gated" else tile


def few_rows_tile(epilogue: str, n: int, k: int, itemsize: int, of_activations: int = 2) -> Tile:
    """16 weight rows a program. Where that makes few programs, each has more warps and more loads under way; there, and for q k v,
    some go before the wait.

    Stages hold weights and activations in shared memory: at most SHARED_BYTES, as every GPU since Ampere has.
    """
    rows = 8 if epilogue == "gated" else 16
    most = max(16, next_power_of_2(k))
    if max(itemsize, of_activations) > 2:
        return Tile(rows, min(256, most), warps=1, stages=3)
    if n >= MANY_ROWS and epilogue != "rope":
        columns, slices, stages, ahead = 512, 2, 3, 0
    elif n >= MANY_ROWS:
        columns, slices, stages, ahead = (512, 4, 2, 3) if itemsize == 2 else (512, 2, 3, 2)
    elif k <= LONG_ROW:
        columns, slices, stages, ahead = (512, 4, 3, 3) if itemsize == 2 else (1024, 8, 1, 4)
    else:
        columns, slices, stages, ahead = (512, 4, 4, 1) if itemsize == 2 else (1024, 8, 3, 2)
    columns = min(columns, most)
    slices = min(slices, columns // 16)
    return Tile(rows, columns, warps=slices, stages=stages, slices=slices, ahead=ahead)


def many_rows_tile(epilogue: str, n: int, k: int, m: int) -> Tile:
    """For 9 rows and more of narrow weights: up to 16, to 32, to 64, and beyond. Activations travel as often as there are programs, so
    that these take more weight rows each where the matrix has enough of them. Stages: as many as fit (`fitting_stages`).
    """
    large = n >= MANY_ROWS
    if m <= 16:
        tile = Tile(16, 512, 2, stages=3, slices=2)
    elif m <= 32:
        tile = Tile(32, 128, 4, stages=4, slices=0) if large else Tile(16, 512, 4, stages=3, slices=4)
    elif m <= 64:
        tile = Tile(64, 128, 4, stages=4, slices=0) if large else Tile(32, 256, 4, stages=4, slices=4)
    else:
        tile = Tile(64, 64 if large else 128, 4, stages=5, slices=0)
    columns = min(tile.columns, max(16, next_power_of_2(k)))
    rows = tile.rows // 2 if epilogue == "gated" else tile.rows
    return tile._replace(rows=rows, columns=columns, slices=min(tile.slices, columns // 16))


def fitting_stages(tile: Tile, bytes_per_column: int, shared: int) -> int:
    """The tile's stages, or as many as fit into so many bytes of shared memory: each holds the weights and activations of its
    columns."""
    return max(1, min(tile.stages, shared // (tile.columns * bytes_per_column)))


def attention_tile(pairs: int, rows: int, slots: int, key_bytes: int) -> AttentionTile:
    """For `pairs` = batch x key/value heads, `rows` = query heads x tokens of each, a cache of `slots` keys of `key_bytes` each,
    padded to a power of two. Keys and values of a step, and of those loaded ahead, share at most 64 KB.

    In a short cache latency counts, in a long one loads in flight: some 256 programs, each loading ahead.
    """
    if slots > SHORT_CACHE_SLOTS:
        at_once = max(16, min(64, 16_384 // key_bytes))
        return AttentionTile(at_once, max(4, min(MOST_SPLITS, next_power_of_2(256 // pairs))), 64, 4, 2)
    if rows > 1:
        at_once = max(16, min(128, 32_768 // key_bytes))
        return AttentionTile(at_once, max(2, min(8, 64 // pairs)), at_once, 8, 1)
    if slots <= VERY_SHORT_CACHE_SLOTS or key_bytes > 512:
        return AttentionTile(32, 4 if slots <= VERY_SHORT_CACHE_SLOTS else 8, 32, 2, 1, vector=True)
    return AttentionTile(64, 8, 64, 4, 1)
