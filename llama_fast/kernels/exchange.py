"""Sums and gathers over the GPUs of one host in a launch of their own, by the words of `words`.

A program counts one epoch for all its words. Sums run in rank order in float32: all ranks get the same bits.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, misc"
# (functions under triton.jit are compiled from their source; Triton ships no types)

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from llama_fast.kernels.common import start_next, wait
from llama_fast.kernels.launching import launch
from llama_fast.kernels.ops import launch_options, machine
from llama_fast.kernels.words import Mailbox, _inbox, _receive, _send

BLOCK = 256  # words of a program, one for each thread: a warp's words leave as whole lines
WORDS = 1 << 17  # that one rank can send another at once: 8 rows of a model 16384 wide
ROW_WORDS = 1 << 14  # the same from a product's own launch: one row


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
    all_of_them = at >= 0
    mine = tl.load(x + at, mask=at < n, other=0).to(tl.float32)
    for hop in tl.static_range(1, SIZE):
        _send(_inbox(inboxes, (RANK + hop) % SIZE, RANK, epoch, WORDS, SIZE) + at, mine, epoch, all_of_them)
    total = tl.zeros([BLOCK], tl.float32)
    if ADD:
        total += tl.load(residual + at, mask=at < n, other=0).to(tl.float32)
    for sender in tl.static_range(SIZE):
        if sender == RANK:
            total += mine
        else:
            total += _receive(_inbox(inboxes, RANK, sender, epoch, WORDS, SIZE) + at, epoch, all_of_them)
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
    all_of_them = at >= 0
    row = at // WIDEST
    column = at % WIDEST
    first: tl.constexpr = V * RANK // SIZE
    width: tl.constexpr = V * (RANK + 1) // SIZE - first
    live = (row < rows) & (column < width)
    mine = tl.load(x + row * width + column, mask=live, other=0).to(tl.float32)
    for hop in tl.static_range(1, SIZE):
        _send(_inbox(inboxes, (RANK + hop) % SIZE, RANK, epoch, WORDS, SIZE) + at, mine, epoch, all_of_them)
    tl.store(out + row * V + first + column, mine.to(out.dtype.element_ty), mask=live)
    for hop in tl.static_range(1, SIZE):
        sender = (RANK + hop) % SIZE
        value = _receive(_inbox(inboxes, RANK, sender, epoch, WORDS, SIZE) + at, epoch, all_of_them)
        begin = V * sender // SIZE
        there = (row < rows) & (column < V * (sender + 1) // SIZE - begin)
        tl.store(out + row * V + begin + column, value.to(out.dtype.element_ty), mask=there)
    tl.debug_barrier()
    tl.store(epochs + program, epoch)


class Exchange(NamedTuple):
    """One rank's side. `inboxes` [size] int64: the address in this process of every rank's inbox; `epochs` counts from 0.

    An inbox is [2, size, words] int64, zeros at the start; more numbers cannot be sent at once. `memory` keeps it, and the
    peers' mappings, alive. `rows` is for products that send their own parts: `ops.linear_sum`.
    """

    rank: int
    size: int
    inboxes: Tensor
    epochs: Tensor
    memory: object
    words: int = WORDS
    block: int = BLOCK
    rows: Mailbox | None = None

    def sum(self, x: Tensor, residual: Tensor | None = None, *, pdl: bool | None = None) -> Tensor:
        """The sum of the ranks' x (any shape, contiguous), in x's type; with a residual residual + sum, in its type."""
        out = torch.empty_like(x if residual is None else residual, memory_format=torch.contiguous_format)
        pdl = machine(x.device).pdl if pdl is None else pdl
        launch(_sum, (triton.cdiv(x.numel(), self.block),))(
            x, x if residual is None else residual, out, self.inboxes, self.epochs, x.numel(),
            ADD=residual is not None, **self._constants(pdl),
        )  # fmt: skip
        return out

    def gather(self, x: Tensor, columns: int, *, pdl: bool | None = None) -> Tensor:
        """[rows, columns] of which this rank has x [rows, columns (rank + 1) // size - columns rank // size]."""
        rows, widest = x.shape[0], -(-columns // self.size)
        out = x.new_empty(rows, columns)
        pdl = machine(x.device).pdl if pdl is None else pdl
        launch(_gather, (triton.cdiv(rows * widest, self.block),))(
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
    memory = symmetric.empty(2 * size * (WORDS + ROW_WORDS), dtype=torch.int64, device=device)
    memory.zero_()
    handle = symmetric.rendezvous(memory, group)
    addresses = [handle.get_buffer(peer, memory.shape, memory.dtype).data_ptr() for peer in range(size)]
    torch.cuda.synchronize(device)
    dist.barrier()  # no word may arrive before the zeros
    inboxes = torch.tensor(addresses, dtype=torch.int64, device=device)
    counts = torch.zeros(WORDS // BLOCK + ROW_WORDS, dtype=torch.int32, device=device)
    behind = 2 * size * WORDS * memory.element_size()
    rows = Mailbox(rank, size, ROW_WORDS, inboxes + behind, counts[WORDS // BLOCK :])
    return Exchange(rank, size, inboxes, counts[: WORDS // BLOCK], (memory, handle), rows=rows)
