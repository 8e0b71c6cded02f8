"""How GPUs of one host talk inside a kernel: each number travels in one 64-bit word with the number of the exchange it belongs to.

Every rank writes into its peers' memory and waits for theirs. A word that has arrived says so itself, by its upper half (its
epoch): no barrier, no second trip; the idea is that of NCCL's LL protocol. Two inboxes take turns. Epoch e + 2 may overwrite e,
because who sends it has seen epoch e + 1 of every peer, and a peer sends that after its kernel of epoch e has ended. Epochs are
counted on the device, so that a CUDA graph can be replayed and a recording counts nothing.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, misc"
# (functions under triton.jit are compiled from their source; Triton ships no types)

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from llama_fast.kernels.common import INTERPRETED

SEND: tl.constexpr = tl.constexpr(
    "{ .reg .pred p; setp.ne.b32 p, $3, 0; @p st.relaxed.sys.global.b64 [$1], $2; mov.b32 $0, 0; }"
)
RECEIVE: tl.constexpr = tl.constexpr(
    "{ .reg .b64 w; .reg .b32 v, e; .reg .pred p; mov.b32 v, 0; setp.eq.b32 p, $3, 0; @p bra done;"
    " again: ld.relaxed.sys.global.b64 w, [$1]; mov.b64 {v, e}, w; setp.ne.b32 p, e, $2; @p bra again;"
    " done: mov.b32 $0, v; }"
)


class Mailbox(NamedTuple):
    """One rank's side of exchanges of up to `words` numbers.

    `inboxes` [size] int64: the address in this process of every rank's inbox, which is [2, size, words] int64, zeros at the
    start; `epochs` [words] int32 counts each word's exchanges, from 0. Its owner keeps the memory, and the peers' mappings, alive.
    """

    rank: int
    size: int
    words: int
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
        while tl.min(((word >> 32 == epoch) | ~live).to(tl.int32), 0) == 0:
            word = tl.load(at, mask=live, other=0)
        return (word & 0xFFFFFFFF).to(tl.uint32).to(tl.float32, bitcast=True)
    else:
        low = tl.inline_asm_elementwise(
            RECEIVE, "=r,l,r,r", [at.to(tl.int64), epoch, live.to(tl.int32)], dtype=tl.int32, is_pure=False, pack=1
        )
        return low.to(tl.float32, bitcast=True)


@triton.jit
def _row_inboxes(inboxes, rank, R: tl.constexpr, SIZE: tl.constexpr, THREADS: tl.constexpr):
    """(thread t's own: that of rank t // R, where there is one; this rank's)."""
    peer = tl.arange(0, THREADS) // R
    theirs = tl.load(inboxes + tl.where(peer < SIZE, peer, rank)).to(tl.pointer_type(tl.int64))
    return theirs, tl.load(inboxes + rank).to(tl.pointer_type(tl.int64))


@triton.jit
def _row_epochs(epochs, block, N: tl.constexpr, R: tl.constexpr, THREADS: tl.constexpr):
    """For thread t the epoch of row t % R of a block: one more than the last."""
    row = block * R + tl.arange(0, THREADS) % R
    return tl.load(epochs + row, mask=row < N, other=0) + 1


@triton.jit
def _send_rows(
    value_R, block, epoch, theirs, rank,
    N: tl.constexpr, R: tl.constexpr, SIZE: tl.constexpr, WORDS: tl.constexpr, THREADS: tl.constexpr,
):  # fmt: skip
    """A block's rows to every peer: thread t sends row t % R to rank t // R, so that all leave at once. -> [THREADS] row t % R."""
    t = tl.arange(0, THREADS)
    peer, row = t // R, block * R + t % R
    value = tl.sum(tl.where(tl.arange(0, R)[:, None] == (t % R)[None, :], value_R[:, None], 0.0), 0)
    _send(theirs + ((epoch & 1) * SIZE + rank) * WORDS + row, value, epoch, (peer < SIZE) & (peer != rank) & (row < N))
    return value


@triton.jit
def _receive_rows(
    value, block, epoch, mine, epochs, rank,
    N: tl.constexpr, R: tl.constexpr, SIZE: tl.constexpr, WORDS: tl.constexpr, THREADS: tl.constexpr,
):  # fmt: skip
    """What all ranks' `_send_rows` sent, summed [R]; in one order of the ranks, so that all get the same bits."""
    t = tl.arange(0, THREADS)
    peer, row = t // R, block * R + t % R
    at = mine + ((epoch & 1) * SIZE + tl.where(peer < SIZE, peer, rank)) * WORDS + row
    came = _receive(at, epoch, (peer < SIZE) & (peer != rank) & (row < N))
    total_R = tl.sum(tl.reshape(tl.where(peer == rank, value, came), [THREADS // R, R]), 0)
    tl.debug_barrier()  # every thread has read the old count before one writes the new
    tl.store(epochs + row, epoch, mask=(peer == 0) & (row < N))
    return total_R
