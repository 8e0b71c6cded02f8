"""Small whole numbers in words of 32 bits: unpacking what other tools packed, and our own packing of nibbles.

>>> unpacked_stream(torch.tensor([[0x76543210]], dtype=torch.int32), 4, 8)
tensor([[0, 1, 2, 3, 4, 5, 6, 7]], dtype=torch.uint8)
"""

from __future__ import annotations

import torch
from torch import Tensor

WORD_BITS = 32
NIBBLES = 8
"""Nibbles of a word."""
LOW_WORD = 0xFFFF_FFFF


def stream_words(count: int, bits: int) -> int:
    """Words that hold `count` numbers one behind the other."""
    return -(-count * bits // WORD_BITS)


def padded_words(count: int, bits: int) -> int:
    """Words of which each holds as many whole numbers as fit: 64 of 3 bits -> 7, where a stream has 6."""
    return -(-count // (WORD_BITS // bits))


def unpacked_stream(words: Tensor, bits: int, count: int) -> Tensor:
    """The first `count` numbers of each row of words int32 [..., W], the lowest bits first: uint8 [..., count].

    Number i stands at bit i * bits of the row, also where that crosses words.
    """
    if 8 % bits == 0:
        return _unpacked_bytes(words, bits)[..., :count]
    first_bit = torch.arange(count, device=words.device) * bits
    word, shift = first_bit // WORD_BITS, first_bit % WORD_BITS
    wide = words.long() & LOW_WORD
    following = (word + 1).clamp(max=wide.shape[-1] - 1)  # where no number crosses, its bits are masked away
    both = wide[..., word] | wide[..., following] << WORD_BITS
    return (both >> shift & (1 << bits) - 1).to(torch.uint8)


def unpacked_padded(words: Tensor, bits: int, count: int) -> Tensor:
    """The same where no number crosses words: 3 bits are ten numbers a word, and two bits stay free."""
    shift = torch.arange(WORD_BITS // bits, device=words.device) * bits
    numbers = (words.long() & LOW_WORD)[..., None] >> shift & (1 << bits) - 1
    return numbers.flatten(-2)[..., :count].to(torch.uint8)


def _unpacked_bytes(words: Tensor, bits: int) -> Tensor:
    data = words.contiguous().view(torch.uint8)
    if bits == 8:
        return data
    shift, most = torch.arange(0, 8, bits, dtype=torch.uint8), (1 << bits) - 1
    return torch.stack([data >> int(step) & most for step in shift], -1).flatten(-2)


def signed(numbers: Tensor, middle: int) -> Tensor:
    """Numbers 0 to 2 middle - 1, uint8, less the middle: int8."""
    return (numbers ^ 128).view(torch.int8) if middle == 128 else numbers.view(torch.int8) - middle


def packed_nibbles(nibbles: Tensor) -> Tensor:
    """Numbers 0 to 15, uint8 [out, in], as words int32 [out, in / 8] in the order of our int4 encoding.

    Of a word's eight columns the first four are the low nibbles of its bytes, the others the high ones.
    """
    low_OW, high_OW = nibbles.contiguous().view(torch.int32).unflatten(1, (-1, 2)).unbind(2)  # four numbers at once
    word_OW: Tensor = low_OW | high_OW << 4
    return word_OW


def unpacked_nibbles(words: Tensor) -> Tensor:
    """The numbers again, uint8 [out, in]."""
    if torch.compiler.is_compiling():  # shifts fuse with what uses the numbers, a stack does not
        half_2, byte_4 = (torch.arange(n, dtype=torch.int32, device=words.device) for n in (2, NIBBLES // 2))
        return (words[..., None, None] >> 4 * half_2[:, None] + 8 * byte_4 & 15).to(torch.uint8).flatten(1)
    byte_OW4 = words.contiguous().view(torch.uint8).unflatten(1, (-1, NIBBLES // 2))
    return torch.stack([byte_OW4 & 15, byte_OW4 >> 4], 2).flatten(1)
