"""Sums and gathers over the GPUs of one host in a single launch: every rank writes into its peers' memory and waits for theirs.

A float32 travels in one 64-bit word with the number of the exchange it belongs to (its epoch), so a word that has arrived
says so itself: no barrier, no second trip. Two inboxes take turns. Epoch e + 2 may overwrite e, because who sends it has
seen epoch e + 1 of every peer, and a peer sends that after its kernel of epoch e has ended. Epochs are counted on the
device, by each program for itself, so that a CUDA graph can be replayed and a recording counts nothing.
Sums run in rank order in float32: all ranks get the same bits.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, misc"
# (functions under triton.jit are compiled from their source; Triton ships no types)

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from llama_fast.kernels.common import INTERPRETED, start_next, wait
from llama_fast.kernels.ops import launch_options, machine

BLOCK = 256  # words of a program, one for each thread: a warp's words leave as whole lines
WORDS = 1 << 17  # that one rank can send another at once: 8 rows of a model 16384 wide

SEND: tl.constexpr = tl.constexpr("st.relaxed.sys.global.b64 [$1], $2; mov.b32 $0, 0;")
# The upper half is the epoch; until it is this one, the word has not arrived.
RECEIVE: tl.constexpr = tl.constexpr(
    "{ .reg .b64 w; .reg .b32 e; .reg .pred p;"
    " again: ld.relaxed.sys.global.b64 w, [$1]; mov.b64 {$0, e}, w; setp.ne.b32 p, e, $2; @p bra again; }"
)


@triton.jit
def _inbox(inboxes, of, sender, epoch, WORDS: tl.constexpr, SIZE: tl.constexpr):
    """Where in the memory of rank `of` the words of `sender` lie in this epoch."""
    base = tl.load(inboxes + of).to(tl.pointer_type(tl.int64))
    return base + ((epoch & 1) * SIZE + sender) * WORDS


@triton.jit
def _send(at, value, epoch):
    """Each float32 with its epoch to its address."""
    low = value.to(tl.int32, bitcast=True).to(tl.int64) & 0xFFFFFFFF
    word = low | (epoch.to(tl.int64) << 32)
    if INTERPRETED:
        tl.store(at, word)
    else:
        tl.inline_asm_elementwise(SEND, "=r,l,l", [at.to(tl.int64), word], dtype=tl.int32, is_pure=False, pack=1)


@triton.jit
def _receive(at, epoch):
    """The float32 values that arrive at these addresses in this epoch."""
    if INTERPRETED:
        word = tl.load(at)
        while tl.min(((word >> 32) == epoch).to(tl.int32), 0) == 0:
            word = tl.load(at)
        return (word & 0xFFFFFFFF).to(tl.uint32).to(tl.float32, bitcast=True)
    else:
        low = tl.inline_asm_elementwise(
            RECEIVE, "=r,l,r", [at.to(tl.int64), epoch], dtype=tl.int32, is_pure=False, pack=1
        )
        return low.to(tl.float32, bitcast=True)


@triton.jit
def _sum(
    x, residual, out, inboxes, epochs, n,
    RANK: tl.constexpr, SIZE: tl.constexpr, WORDS: tl.constexpr, BLOCK: tl.constexpr, ADD: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Grid (n / BLOCK,): out = the ranks' x summed, + residual."""
    program = tl.program_id(0)
    start_next(PDL)
    wait(PDL)
    epoch = tl.load(epochs + program) + 1
    at = program * BLOCK + tl.arange(0, BLOCK)
    mine = tl.load(x + at, mask=at < n, other=0).to(tl.float32)
    for hop in tl.static_range(1, SIZE):
        _send(_inbox(inboxes, (RANK + hop) % SIZE, RANK, epoch, WORDS, SIZE) + at, mine, epoch)
    total = tl.zeros([BLOCK], tl.float32)
    if ADD:
        total += tl.load(residual + at, mask=at < n, other=0).to(tl.float32)
    for sender in tl.static_range(SIZE):
        if sender == RANK:
            total += mine
        else:
            total += _receive(_inbox(inboxes, RANK, sender, epoch, WORDS, SIZE) + at, epoch)
    tl.store(out + at, total.to(out.dtype.element_ty), mask=at < n)
    tl.debug_barrier()  # every thread has read the old count before one writes the new
    tl.store(epochs + program, epoch)


@triton.jit
def _gather(
    x, out, inboxes, epochs, rows,
    V: tl.constexpr, WIDEST: tl.constexpr,
    RANK: tl.constexpr, SIZE: tl.constexpr, WORDS: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Grid (rows * WIDEST / BLOCK,): rank r's x holds columns V r / SIZE up to V (r + 1) / SIZE of out [rows, V]."""
    program = tl.program_id(0)
    start_next(PDL)
    wait(PDL)
    epoch = tl.load(epochs + program) + 1
    at = program * BLOCK + tl.arange(0, BLOCK)
    row = at // WIDEST
    column = at % WIDEST
    first: tl.constexpr = V * RANK // SIZE
    width: tl.constexpr = V * (RANK + 1) // SIZE - first
    live = (row < rows) & (column < width)
    mine = tl.load(x + row * width + column, mask=live, other=0).to(tl.float32)
    for hop in tl.static_range(1, SIZE):
        _send(_inbox(inboxes, (RANK + hop) % SIZE, RANK, epoch, WORDS, SIZE) + at, mine, epoch)
    tl.store(out + row * V + first + column, mine.to(out.dtype.element_ty), mask=live)
    for hop in tl.static_range(1, SIZE):
        sender: tl.constexpr = (RANK + hop) % SIZE
        value = _receive(_inbox(inboxes, RANK, sender, epoch, WORDS, SIZE) + at, epoch)
        begin = V * sender // SIZE
        there = (row < rows) & (column < V * (sender + 1) // SIZE - begin)
        tl.store(out + row * V + begin + column, value.to(out.dtype.element_ty), mask=there)
    tl.debug_barrier()
    tl.store(epochs + program, epoch)


class Exchange(NamedTuple):
    """One rank's side. `inboxes` [size] int64: the address in this process of every rank's inbox; `epochs` counts from 0.

    An inbox is [2, size, words] int64, zeros at the start; more numbers cannot be sent at once. `memory` keeps it, and the
    peers' mappings, alive.
    """

    rank: int
    size: int
    inboxes: Tensor
    epochs: Tensor
    memory: object
    words: int = WORDS
    block: int = BLOCK

    def sum(self, x: Tensor, residual: Tensor | None = None, *, pdl: bool | None = None) -> Tensor:
        """The sum of the ranks' x (any shape, contiguous), in x's type; with a residual residual + sum, in its type."""
        out = torch.empty_like(x if residual is None else residual, memory_format=torch.contiguous_format)
        pdl = machine(x.device).pdl if pdl is None else pdl
        _sum[(triton.cdiv(x.numel(), self.block),)](
            x, x if residual is None else residual, out, self.inboxes, self.epochs, x.numel(),
            ADD=residual is not None, **self._constants(pdl),
        )  # fmt: skip
        return out

    def gather(self, x: Tensor, columns: int, *, pdl: bool | None = None) -> Tensor:
        """[rows, columns] of which this rank has x [rows, columns (rank + 1) // size - columns rank // size]."""
        rows, widest = x.shape[0], -(-columns // self.size)
        out = x.new_empty(rows, columns)
        pdl = machine(x.device).pdl if pdl is None else pdl
        _gather[(triton.cdiv(rows * widest, self.block),)](
            x, out, self.inboxes, self.epochs, rows, V=columns, WIDEST=widest, **self._constants(pdl)
        )
        return out

    def _constants(self, pdl: bool) -> dict[str, object]:
        shape = {"RANK": self.rank, "SIZE": self.size, "WORDS": self.words, "BLOCK": self.block}
        return {**shape, "PDL": pdl, "num_warps": max(1, self.block // 32), **launch_options(pdl)}


OPEN: dict[str, Exchange] = {}
"""By name, because an operator takes no object: what process groups do."""


def opened(exchange: Exchange) -> str:
    """The name by which `torch.ops.llama_fast.exchange_sum` and `exchange_gather` find it."""
    name = str(len(OPEN))
    OPEN[name] = exchange
    return name


@torch.library.custom_op("llama_fast::exchange_sum", mutates_args=())
def exchange_sum(x: Tensor, residual: Tensor | None, name: str) -> Tensor:
    """`Exchange.sum`."""
    return OPEN[name].sum(x.contiguous(), residual)


@exchange_sum.register_fake
def _(x: Tensor, residual: Tensor | None, name: str) -> Tensor:
    return torch.empty_like(x if residual is None else residual, memory_format=torch.contiguous_format)


@torch.library.custom_op("llama_fast::exchange_gather", mutates_args=())
def exchange_gather(x: Tensor, columns: int, name: str) -> Tensor:
    """`Exchange.gather`."""
    return OPEN[name].gather(x.contiguous(), columns)


@exchange_gather.register_fake
def _(x: Tensor, columns: int, name: str) -> Tensor:
    return x.new_empty(x.shape[0], columns)


def over_nvlink(rank: int, size: int, device: torch.device) -> Exchange:
    """For the default process group, all of whose ranks call this. Raises RuntimeError where GPUs do not reach each other."""
    import torch.distributed as dist
    import torch.distributed._symmetric_memory as symmetric

    group = dist.group.WORLD
    assert group is not None
    memory = symmetric.empty(2, size, WORDS, dtype=torch.int64, device=device)
    memory.zero_()
    handle = symmetric.rendezvous(memory, group)
    addresses = [handle.get_buffer(peer, memory.shape, memory.dtype).data_ptr() for peer in range(size)]
    torch.cuda.synchronize(device)
    dist.barrier()  # no word may arrive before the zeros
    inboxes = torch.tensor(addresses, dtype=torch.int64, device=device)
    epochs = torch.zeros(WORDS // BLOCK, dtype=torch.int32, device=device)
    return Exchange(rank, size, inboxes, epochs, (memory, handle))
