"""How GPUs of one host talk inside a kernel: each number travels in one 64-bit word with the number of the exchange it belongs to.

Every rank writes into its peers' memory and waits for theirs. A word that has arrived says so itself, by its upper half (its
epoch): no barrier, no second trip; the idea is that of NCCL's LL protocol. Two inboxes take turns. Epoch e + 2 may overwrite e,
because who sends it has seen epoch e + 1 of every peer, and a peer sends that after its kernel of epoch e has ended. Epochs are
counted on the device, so that a CUDA graph can be replayed and a recording counts nothing. All this rests on every kernel of a
step waiting for the one ahead (`common.wait`) before it reads an epoch or sends: then all kernels before it have ended.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, misc"
# (functions under triton.jit are compiled from their source; Triton ships no types)

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from llama_fast.kernels.common import INTERPRETED

# $1 address, $2 word, $3 whether to
SEND: tl.constexpr = tl.constexpr(
    "{ .reg .pred p; setp.ne.b32 p, $3, 0; @p st.relaxed.sys.global.b64 [$1], $2; mov.b32 $0, 0; }"
)
# $1 address, $2 epoch, $3 whether to. The upper half is the epoch; until it is this one, the word has not arrived.
RECEIVE: tl.constexpr = tl.constexpr(
    "{ .reg .b64 w; .reg .b32 v, e; .reg .pred p; mov.b32 v, 0; setp.eq.b32 p, $3, 0; @p bra done;"
    " again: ld.relaxed.sys.global.b64 w, [$1]; mov.b64 {v, e}, w; setp.ne.b32 p, e, $2; @p bra again;"
    " done: mov.b32 $0, v; }"
)


class Mailbox(NamedTuple):
    """One rank's side of exchanges of up to `words` numbers, in programs of `block` words.

    `inboxes` [size] int64: the address in this process of every rank's inbox, which is [2, size, words] int64, zeros at the
    start; `epochs` [words / block] int32 counts each program's exchanges, from 0. The caller keeps the memory alive.
    """

    rank: int
    size: int
    words: int
    block: int
    inboxes: Tensor
    epochs: Tensor


@triton.jit
def _inbox(inboxes, of, sender, epoch, WORDS: tl.constexpr, SIZE: tl.constexpr):
    """Where in the memory of rank `of` the words of `sender` lie in this epoch."""
    base = tl.load(inboxes + of).to(tl.pointer_type(tl.int64))
    return base + ((epoch & 1) * SIZE + sender) * WORDS


@triton.jit
def _send(at, value, epoch, live):
    """Each float32 that is `live`, with its epoch, to its address."""
    low = value.to(tl.int32, bitcast=True).to(tl.int64) & 0xFFFFFFFF
    word = low | (epoch.to(tl.int64) << 32)
    if INTERPRETED:
        tl.store(at, word, mask=live)
    else:
        tl.inline_asm_elementwise(
            SEND, "=r,l,l,r", [at.to(tl.int64), word, live.to(tl.int32)], dtype=tl.int32, is_pure=False, pack=1
        )


@triton.jit
def _receive(at, epoch, live):
    """The float32 values that arrive at these addresses in this epoch; 0 where not `live`, at once."""
    if INTERPRETED:
        word = tl.load(at, mask=live, other=0)
        while tl.min(((word >> 32 == epoch) | ~live).to(tl.int32)) == 0:
            word = tl.load(at, mask=live, other=0)
        return (word & 0xFFFFFFFF).to(tl.uint32).to(tl.float32, bitcast=True)
    else:
        low = tl.inline_asm_elementwise(
            RECEIVE, "=r,l,r,r", [at.to(tl.int64), epoch, live.to(tl.int32)], dtype=tl.int32, is_pure=False, pack=1
        )
        return low.to(tl.float32, bitcast=True)


@triton.jit
def _own_inbox(inboxes, rank, R: tl.constexpr, SIZE: tl.constexpr, THREADS: tl.constexpr):
    """For thread t the inbox of rank t // R, where there is one."""
    peer = tl.arange(0, THREADS) // R
    return tl.load(inboxes + tl.where(peer < SIZE, peer, rank)).to(tl.pointer_type(tl.int64))


@triton.jit
def _own_epoch(epochs, block, N: tl.constexpr, R: tl.constexpr, BLOCK: tl.constexpr, THREADS: tl.constexpr):
    """For thread t the epoch in which row t % R of a block travels: one more than the last of the program that receives it."""
    row = block * R + tl.arange(0, THREADS) % R
    return tl.load(epochs + row // BLOCK, mask=row < N, other=0) + 1


@triton.jit
def _send_rows(
    value_R, block, epoch, inbox, rank,
    N: tl.constexpr, R: tl.constexpr, SIZE: tl.constexpr, WORDS: tl.constexpr, THREADS: tl.constexpr,
):  # fmt: skip
    """A block's rows to every peer: thread t sends row t % R to rank t // R, so that all leave at once."""
    t = tl.arange(0, THREADS)
    peer, row = t // R, block * R + t % R
    value = tl.sum(tl.where(tl.arange(0, R)[:, None] == (t % R)[None, :], value_R[:, None], 0.0), 0)
    _send(inbox + ((epoch & 1) * SIZE + rank) * WORDS + row, value, epoch, (peer < SIZE) & (peer != rank) & (row < N))
