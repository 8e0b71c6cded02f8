"""Matrices whose rows stand side by side in tiles of 16, and the loops over them: how a CPU multiplies narrow weights.

In a tile the same word of 16 rows is one vector. So each lane of a vector sums an output of its own: nothing is summed across
lanes, the scales of a group are a vector too, and an input is one number for all lanes. Sixteen weights take four instructions:
a shift and a mask, which leave a number with its sign, a conversion, and a multiplication that adds.

    >>> tiles = tiled(torch.arange(32).view(16, 2))
    >>> tiles.shape, tiles.flatten()[:3].tolist()
    (torch.Size([16, 2]), [0, 2, 4])

Shapes: R rows of inputs, N outputs, K inputs, T tiles, L lanes of a tile, W words of a row, G groups, C chunks of a group, j the
words of a chunk, n the numbers of a word.
"""

from __future__ import annotations

from functools import reduce
from operator import add

import torch
import torch.nn.functional as F
from torch import Tensor

from llama_fast.model.matvec import kept

LANES = 16
"""Outputs side by side: a vector of AVX-512, two of AVX2."""
CHUNK = 32
"""Inputs of one turn of a loop: so many products are written out, and their sum is scaled once."""
NIBBLES = 8
"""Numbers of a word of 32 bits."""
NIBBLES_LESS_8 = -0x77777778
"""0x88888888: the nibbles of a word with their highest bits turned are those numbers less 8, in two's complement."""
SHIFT, TOP_NIBBLE = 28, -0x10000000
"""A nibble is used where it has a sign, as the highest of its word: 2^28 times too large, which the scale takes back."""


def tiled(part: Tensor) -> Tensor:
    """A part [N, W] in tiles: memory [T, W, L] under the shape [N, W], with N filled up to whole tiles by zeros."""
    filled = F.pad(part, (0, 0, 0, -len(part) % LANES)) if len(part) % LANES else part
    tiles: Tensor = filled.unflatten(0, (-1, LANES)).transpose(1, 2).reshape(filled.shape)
    return tiles


def untiled(part: Tensor) -> Tensor:
    """The rows of whole tiles, one behind the other."""
    return lanes(part).transpose(1, 2).reshape(part.shape)


def rows_of_tiles(part: Tensor, ids: Tensor) -> Tensor:
    """The rows at `ids` [n]: [n, W]."""
    return lanes(part)[ids // LANES, :, ids % LANES]


def lanes(part: Tensor) -> Tensor:
    """A part in tiles as it lies, [T, W, L]."""
    return part.view(-1, part.shape[1], LANES)


def sums_of_nibbles(x_RK: Tensor, words: Tensor, scale: Tensor, zero: Tensor | None, group: int) -> Tensor:
    """x @ weight.T, float32 [R, N], of weights (nibble - zero) * scale in tiles; a zero of None is 8.

    Nibble n of word w is the weight of input 8 w + n / 2 where n is even, and of 8 w + 4 + (n - 1) / 2 where it is odd.
    """
    chunks, words_of_chunk = group // CHUNK, CHUNK // NIBBLES
    word_TGCjL = lanes(words).unflatten(1, (-1, chunks, words_of_chunk)) ^ NIBBLES_LESS_8
    scale_TGL = lanes(scale).float() * 2.0**-SHIFT
    x_RGCjhb = kept(x_RK).unflatten(1, (-1, chunks, words_of_chunk, 2, NIBBLES // 2))
    columns = []
    for x_GCjhb in x_RGCjhb.unbind():
        sums: dict[tuple[int, int], Tensor] = {}  # eight of them: one chain of 32 additions would wait for itself
        for n in range(NIBBLES):
            for j in range(words_of_chunk):
                word_TGCL = word_TGCjL[:, :, :, j]
                top_TGCL = (word_TGCL if n == NIBBLES - 1 else word_TGCL << SHIFT - 4 * n) & TOP_NIBBLE
                product = top_TGCL.float(), x_GCjhb[:, :, j, n % 2, n // 2, None]
                sums[j, n % 2] = multiply_add(*product, sums.get((j, n % 2)))
        sum_TGCL = reduce(add, sums.values())
        if zero is not None:
            total_GC = kept(x_GCjhb.sum((-3, -2, -1))) * 2.0**SHIFT
            sum_TGCL = sum_TGCL + (8 - lanes(zero).float())[:, :, None] * total_GC[..., None]
        columns.append((sum_TGCL * scale_TGL[:, :, None]).sum((1, 2)).flatten())
    return torch.stack(columns)


def multiply_add(a: Tensor, b: Tensor, c: Tensor | None = None) -> Tensor:
    """a * b + c; one instruction where it is compiled."""
    if c is None or not torch.compiler.is_compiling():
        return a * b if c is None else a * b + c
    d: Tensor = torch.ops.prims.fma(*torch.broadcast_tensors(a, b, c))
    return d
