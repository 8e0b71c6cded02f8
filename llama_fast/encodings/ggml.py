"""The block types of GGUF files, kept as they are stored: the fields of all blocks side by side, and nothing is encoded here.

    >>> Ggml("q8_0").layout((8, 64))
    {'scale': ((8, 2), torch.float16), 'weight': ((8, 64), torch.int8)}

A type's decoder gives the numbers of ggml's own (`dequantize_row_q4_K` and its like in ggml-quants.c) in float32, to the last
bit. It gives them in pieces: the columns of a block are seen as [a, P, w], and piece p of the P holds columns [:, p], so that
what one shift leaves of the packed bytes is one piece. A product is then summed piece by piece, and no row is laid out.

Shapes: R rows of x, N outputs, K inputs, B blocks of a row.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from llama_fast.contracts import Cut, Encoding, PartLayout, Parts
from llama_fast.encodings.decoding import Decoding, rows_of
from llama_fast.encodings.int4 import Int4
from llama_fast.model.matvec import product_by_pieces, product_by_slices
from llama_ref.checkpoint import TensorSource
from llama_ref.formats.gguf_blocks import BLOCKS

Pieces = list[Tensor]
"""P tensors float32 [N, B, a, w]."""

SLICE_NUMBERS = 1 << 18
"""Numbers that are decoded at once: a decoder's passes then find them in a processor's second cache."""

IQ4_NUMBERS = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
E2M1_NUMBERS = (0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12)  # doubled; the scale is halved


@dataclass(frozen=True)
class Ggml(Decoding):
    """`type`: the GGML type's name in small letters, as "q4_k"."""

    type: str
    loader: ClassVar[str] = ""
    unpacks: ClassVar[bool] = True

    @property
    def name(self) -> str:
        return self.type

    def layout(self, shape: Sequence[int]) -> dict[str, PartLayout]:
        """ValueError where the columns are no whole blocks."""
        columns, fields = BLOCKS[self.type]
        if shape[1] % columns:
            raise ValueError(f"{self.name} has blocks of {columns} columns, which {shape[1]} columns are not")
        return {name: ((shape[0], shape[1] // columns * count), dtype) for name, dtype, count in fields}

    def encode(self, weight: Tensor, dtype: torch.dtype) -> dict[str, Tensor]:
        raise ValueError(f"{self.name} weights come from a GGUF file: nothing is encoded as {self.name} here")

    def decode(self, parts: Parts) -> Tensor:
        """Float32 [out, in]."""
        return torch.stack(self.pieces(parts), 3).flatten(1)

    def pieces(self, parts: Parts) -> Pieces:
        """The numbers of a matrix, in pieces."""
        fields = {name: parts[name].unflatten(1, (-1, count)) for name, _, count in BLOCKS[self.type][1]}
        return DECODERS[self.type](fields)

    def cut(self, parts: Mapping[str, TensorSource], shape: Sequence[int], cut: Cut) -> dict[str, Tensor]:
        """ValueError, with numbers, for a cut within a block."""
        columns, fields = BLOCKS[self.type]
        first, stop, _ = cut[1].indices(shape[1])
        if first % columns or stop % columns:
            raise ValueError(
                f"{self.name} has blocks of {columns} columns: columns {first} to {stop} of {shape[1]} part one"
            )
        blocks = first // columns, stop // columns
        return {
            name: parts[name][cut[0], blocks[0] * count : blocks[1] * count].contiguous() for name, _, count in fields
        }

    def product(self, x: Tensor, parts: Parts) -> Tensor:
        """The decoded matrix's, some rows of it at a time; compiled, a sum of pieces."""
        if torch.compiler.is_compiling():
            return product_by_pieces(x, self.pieces(parts))
        rows = parts["weight"].shape[0]
        return product_by_slices(x, rows, lambda some: self.decode(rows_of(parts, some)), numbers=SLICE_NUMBERS)


def read_by_kernels(encoding: Encoding) -> Encoding:
    """The encoding that our kernels are given for this one: Q4_0 is `Int4(32)` in another order, all else stays as it is."""
    return Int4(32) if encoding == Ggml("q4_0") else encoding


def repacked(encoding: Encoding, parts: dict[str, Tensor]) -> tuple[Encoding, dict[str, Tensor]]:
    """A matrix for our kernels, number for number."""
    if read_by_kernels(encoding) == encoding:
        return encoding, parts
    low, high = nibbles(parts["weight"].unflatten(1, (-1, 16)))
    return Int4(32), Int4(32).stored(torch.cat([low, high], -1).flatten(1), parts["scale"], None)


# --- what several types share ---------------------------------------------------------------------


def nibbles(packed: Tensor) -> tuple[Tensor, Tensor]:
    return packed & 15, packed >> 4


def shifts(device: torch.device, count: int, step: int) -> Tensor:
    """(3, 2) -> 0, 2, 4. Not a constant tensor: in a region of a graph a compiler loses those."""
    return torch.arange(count, dtype=torch.uint8, device=device) * step


def fifth_bits(high_NB4: Tensor) -> tuple[Tensor, Tensor]:
    """Bit i of 32 belongs to column i: two pieces [N, B, 16] of 0 and 1."""
    bit_NB48 = high_NB4[..., None] >> shifts(high_NB4.device, 8, 1) & 1
    return bit_NB48[:, :, :2].flatten(2), bit_NB48[:, :, 2:].flatten(2)


def in_one(pieces: Sequence[Tensor]) -> Pieces:
    """Pieces [N, B, w] of blocks whose columns are [1, P, w]."""
    return [piece[:, :, None] for piece in pieces]


def six_bit_scales(packed_NB12: Tensor) -> tuple[Tensor, Tensor]:
    """Scales and offsets [N, B, 4, 2] of Q4_K and Q5_K: the first four stand whole, the others in two parts each."""
    first, second, third = packed_NB12.unflatten(2, (3, 4)).unbind(2)
    scales = torch.cat([first & 63, third & 15 | first >> 2 & 48], -1)
    offsets = torch.cat([second & 63, third >> 4 | second >> 2 & 48], -1)
    return scales.unflatten(2, (4, 2)).float(), offsets.unflatten(2, (4, 2)).float()


def by_sixteens(numbers_NB232: Tensor, scale_NB22: Tensor) -> Tensor:
    """A piece [N, B, 2, 32] of which every 16 columns share a scale."""
    scaled: Tensor = numbers_NB232.float().unflatten(3, (2, 16)) * scale_NB22[..., None]
    return scaled.flatten(3)


def looked_up(numbers: tuple[int, ...], indices: Tensor) -> Tensor:
    """The numbers at indices of four bits, float32; for a compiler a choice by each bit, and no constant tensor."""
    if not torch.compiler.is_compiling():
        return torch.tensor(numbers, dtype=torch.float32, device=indices.device)[indices.int()]
    chosen: list[Any] = [float(number) for number in numbers]
    for bit in range(4):
        is_set = (indices >> bit & 1) == 1
        chosen = [torch.where(is_set, high, low) for low, high in zip(chosen[::2], chosen[1::2])]
    found: Tensor = chosen[0]
    return found


# --- the types ------------------------------------------------------------------------------------


def of_q4_0(f: Parts) -> Pieces:
    scale_NB1 = f["scale"].float()
    return in_one([(numbers.float() - 8) * scale_NB1 for numbers in nibbles(f["weight"])])


def of_q4_1(f: Parts) -> Pieces:
    scale_NB1, offset_NB1 = f["scale"].float(), f["offset"].float()
    return in_one([numbers.float() * scale_NB1 + offset_NB1 for numbers in nibbles(f["weight"])])


def of_q5_0(f: Parts) -> Pieces:
    scale_NB1 = f["scale"].float()
    numbers = [low | bit << 4 for low, bit in zip(nibbles(f["weight"]), fifth_bits(f["high"]))]
    return in_one([(number.float() - 16) * scale_NB1 for number in numbers])


def of_q5_1(f: Parts) -> Pieces:
    scale_NB1, offset_NB1 = f["scale"].float(), f["offset"].float()
    numbers = [low | bit << 4 for low, bit in zip(nibbles(f["weight"]), fifth_bits(f["high"]))]
    return in_one([number.float() * scale_NB1 + offset_NB1 for number in numbers])


def of_q8_0(f: Parts) -> Pieces:
    return in_one([f["weight"].float() * f["scale"].float()])


def of_q2_k(f: Parts) -> Pieces:
    low, high = nibbles(f["scales"].unflatten(2, (2, 4, 2)))
    scale_NB242 = f["scale"].float()[..., None, None] * low.float()
    offset_NB242 = f["offset"].float()[..., None, None] * high.float()
    packed_NB232 = f["weight"].unflatten(2, (2, 32))
    scaled = [by_sixteens(packed_NB232 >> 2 * p & 3, scale_NB242[:, :, :, p]) for p in range(4)]
    return [
        (piece.unflatten(3, (2, 16)) - offset_NB242[:, :, :, p, :, None]).flatten(3) for p, piece in enumerate(scaled)
    ]


def of_q3_k(f: Parts) -> Pieces:
    low_NB8, high_NB4 = f["scales"][..., :8], f["scales"][..., 8:]
    low = torch.cat(nibbles(low_NB8), -1)
    high = torch.cat([high_NB4 >> 2 * i & 3 for i in range(4)], -1)
    scale_NB242 = (f["scale"].float() * ((low | high << 4).float() - 32)).unflatten(2, (2, 4, 2))
    packed_NB232 = f["weight"].unflatten(2, (2, 32))
    half_21 = shifts(low.device, 2, 4)[:, None]
    return [
        by_sixteens(
            (packed_NB232 >> 2 * p & 3).float() - 4 + 4 * (f["high"][:, :, None] >> half_21 + p & 1).float(),
            scale_NB242[:, :, :, p],
        )
        for p in range(4)
    ]


def of_q4_k(f: Parts) -> Pieces:
    scales, offsets = six_bit_scales(f["scales"])
    scale_NB42 = f["scale"].float()[..., None] * scales
    offset_NB42 = f["offset"].float()[..., None] * offsets
    return [
        numbers.float() * scale_NB42[..., p, None] - offset_NB42[..., p, None]
        for p, numbers in enumerate(nibbles(f["weight"].unflatten(2, (4, 32))))
    ]


def of_q5_k(f: Parts) -> Pieces:
    scales, offsets = six_bit_scales(f["scales"])
    scale_NB42 = f["scale"].float()[..., None] * scales
    offset_NB42 = f["offset"].float()[..., None] * offsets
    pair_41 = shifts(f["high"].device, 4, 2)[:, None]
    high = [f["high"][:, :, None] >> pair_41 + p & 1 for p in range(2)]
    return [
        (low | high[p] << 4).float() * scale_NB42[..., p, None] - offset_NB42[..., p, None]
        for p, low in enumerate(nibbles(f["weight"].unflatten(2, (4, 32))))
    ]


def of_q6_k(f: Parts) -> Pieces:
    scale_NB242 = (f["scale"].float() * f["scales"].float()).unflatten(2, (2, 4, 2))
    low_NB2232, high_NB232 = f["weight"].unflatten(2, (2, 2, 32)), f["high"].unflatten(2, (2, 32))
    return [
        by_sixteens(
            ((low_NB2232[:, :, :, p % 2] >> 4 * (p // 2) & 15) | (high_NB232 >> 2 * p & 3) << 4).float() - 32,
            scale_NB242[:, :, :, p],
        )
        for p in range(4)
    ]


def of_iq4_nl(f: Parts) -> Pieces:
    scale_NB1 = f["scale"].float()
    return in_one([looked_up(IQ4_NUMBERS, numbers) * scale_NB1 for numbers in nibbles(f["weight"])])


def of_iq4_xs(f: Parts) -> Pieces:
    low_NB8 = torch.stack(nibbles(f["scales"]), -1).flatten(2)
    high_NB8 = (f["high"][..., None] >> shifts(low_NB8.device, 4, 2) & 3).flatten(2)
    scale_NB8 = f["scale"].float() * ((low_NB8 | high_NB8 << 4).float() - 32)
    packed = nibbles(f["weight"].unflatten(2, (8, 16)))
    return [looked_up(IQ4_NUMBERS, numbers) * scale_NB8[..., None] for numbers in packed]


def of_mxfp4(f: Parts) -> Pieces:
    power = f["scale"].int()  # of two, by 127 too large, and one more for the doubled numbers; below 2 it is subnormal
    half_NB1 = torch.where(power < 2, 0x200000 << power.clamp(max=1), power - 1 << 23).view(torch.float32)
    return in_one([looked_up(E2M1_NUMBERS, numbers) * half_NB1 for numbers in nibbles(f["weight"])])


DECODERS: Mapping[str, Callable[[Parts], Pieces]] = {
    "q4_0": of_q4_0,
    "q4_1": of_q4_1,
    "q5_0": of_q5_0,
    "q5_1": of_q5_1,
    "q8_0": of_q8_0,
    "q2_k": of_q2_k,
    "q3_k": of_q3_k,
    "q4_k": of_q4_k,
    "q5_k": of_q5_k,
    "q6_k": of_q6_k,
    "iq4_nl": of_iq4_nl,
    "iq4_xs": of_iq4_xs,
    "mxfp4": of_mxfp4,
}
"""Each is given a type's parts as [N, B, numbers of a block]."""

STORED = tuple(Ggml(name) for name in DECODERS)
