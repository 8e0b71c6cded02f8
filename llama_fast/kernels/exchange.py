"""Sums and gathers over the GPUs of one host in one launch, by the words of `words`.

A program counts one epoch for all its words, and waits for all peers' at once. A product may have sent its own part
(`ops.linear_send`): the sum behind it then finds most words there. Sums run in float32, in one order: all ranks get the same bits.
Of a long message not all programs fit the GPU at once. Each sends before it waits, for the programs of its own number alone, and
GPUs start programs in the order of their numbers: the least that waits always gets on.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, misc"
# (functions under triton.jit are compiled from their source; Triton ships no types)

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from llama_fast.kernels import ops
from llama_fast.kernels.common import start_next, wait
from llama_fast.kernels.launching import launch
from llama_fast.kernels.ops import launch_options, machine
from llama_fast.kernels.packets import Mailbox, _inbox, _receive, _send
from llama_fast.kernels.tuning import next_power_of_2

BLOCK = 128  # words of a program, up to eight ranks a thread for each of each: a warp's words leave as whole lines
WORDS = 1 << 17  # that one rank can send another at once: 8 rows of a model 16384 wide


@triton.jit
def _peers(rank, SIZE: tl.constexpr, RANKS: tl.constexpr):
    """[RANKS, 1]: (a rank's number, within bounds; whether it is another than this; whether it is at all)."""
    peer = tl.arange(0, RANKS)[:, None]
    real = peer < SIZE
    return tl.where(real, peer, rank), real & (peer != rank), real


@triton.jit(do_not_specialize=["rank"])
def _sum(
    x, residual, out, inboxes, epochs, n, rank,
    SIZE: tl.constexpr, RANKS: tl.constexpr, WORDS: tl.constexpr, BLOCK: tl.constexpr, ADD: tl.constexpr, SENT: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """Grid (n / BLOCK,): out = the ranks' x summed, + residual. RANKS: SIZE padded to a power of two. SENT: x is on its way."""
    program = tl.program_id(0)
    start_next(PDL)
    peer, other, real = _peers(rank, SIZE, RANKS)
    at = program * BLOCK + tl.arange(0, BLOCK)
    live = at < n
    wait(PDL)
    epoch = tl.load(epochs + program) + 1
    mine = tl.load(x + at, mask=live, other=0).to(tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    if ADD:
        total += tl.load(residual + at, mask=live, other=0).to(tl.float32)
    travels = other & live[None, :]
    if not SENT:
        to = _inbox(inboxes, peer, rank, epoch, WORDS, SIZE) + at[None, :]
        _send(to, tl.where(travels, mine[None, :], 0.0), epoch, travels)
    came = _receive(_inbox(inboxes, rank, peer, epoch, WORDS, SIZE) + at[None, :], epoch, travels)
    total += tl.sum(tl.where(real & ~other, mine[None, :], came), 0)
    tl.store(out + at, total.to(out.dtype.element_ty), mask=live)
    tl.debug_barrier()  # every thread has read the old count before one writes the new
    tl.store(epochs + program, epoch)


@triton.jit(do_not_specialize=["rank"])
def _gather(
    x, out, inboxes, epochs, rows, rank,
    V: tl.constexpr, WIDEST: tl.constexpr,
    SIZE: tl.constexpr, RANKS: tl.constexpr, WORDS: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Grid (rows * WIDEST / BLOCK,): rank r's x holds columns V r / SIZE up to V (r + 1) / SIZE of out [rows, V]."""
    program = tl.program_id(0)
    start_next(PDL)
    peer, other, real = _peers(rank, SIZE, RANKS)
    at = program * BLOCK + tl.arange(0, BLOCK)
    row, column, live = at // WIDEST, at % WIDEST, at < rows * WIDEST
    width = V * (rank + 1) // SIZE - V * rank // SIZE
    wait(PDL)
    epoch = tl.load(epochs + program) + 1
    mine = tl.load(x + row * width + column, mask=live & (column < width), other=0).to(tl.float32)[None, :]
    travels = other & live[None, :]
    to = _inbox(inboxes, peer, rank, epoch, WORDS, SIZE) + at[None, :]
    _send(to, tl.where(travels, mine, 0.0), epoch, travels)
    came = _receive(_inbox(inboxes, rank, peer, epoch, WORDS, SIZE) + at[None, :], epoch, travels)
    begin, end = V * peer // SIZE, V * (peer + 1) // SIZE
    kept = real & live[None, :] & (column[None, :] < end - begin)
    value = tl.where(other, came, mine).to(out.dtype.element_ty)
    tl.store(out + row[None, :] * V + begin + column[None, :], value, mask=kept)
    tl.debug_barrier()  # every thread has read the old count before one writes the new
    tl.store(epochs + program, epoch)


class Exchange(NamedTuple):
    """One rank's side; `memory` keeps its inbox, and the peers' mappings, alive.

    The product of one row sends its own part; with `apart` the sum behind it does. All ranks make the same calls in the same
    order. ValueError for more numbers than the mailbox has words.
    """

    mailbox: Mailbox
    memory: object
    apart: bool = False

    def takes(self, rows: int, columns: int) -> bool:
        """Whether a gather of so many rows, each cut over the ranks, fits the mailbox."""
        return rows * -(-columns // self.mailbox.size) <= self.mailbox.words

    def sum(self, x: Tensor, residual: Tensor | None = None, sent: bool = False, *, pdl: bool | None = None) -> Tensor:
        """The sum of the ranks' x (any shape, contiguous), in x's type; with a residual residual + sum, in its type.

        `sent`: x is what `ops.linear_send` gave, on every rank, and nothing was exchanged since: here its epoch is counted.
        """
        self._check(x.numel())
        out = torch.empty_like(x if residual is None else residual, memory_format=torch.contiguous_format)
        launch(_sum, (triton.cdiv(x.numel(), self.mailbox.block),))(
            x, x if residual is None else residual, out, self.mailbox.inboxes, self.mailbox.epochs, x.numel(),
            ADD=residual is not None, SENT=sent, **self._constants(x.device, pdl),
        )  # fmt: skip
        return out

    def gather(self, x: Tensor, columns: int, *, pdl: bool | None = None) -> Tensor:
        """[rows, columns] of which this rank has x [rows, columns (rank + 1) // size - columns rank // size]."""
        rows, widest = x.shape[0], -(-columns // self.mailbox.size)
        self._check(rows * widest)
        out = x.new_empty(rows, columns)
        launch(_gather, (triton.cdiv(rows * widest, self.mailbox.block),))(
            x, out, self.mailbox.inboxes, self.mailbox.epochs, rows, V=columns, WIDEST=widest, **self._constants(x.device, pdl)
        )  # fmt: skip
        return out

    def add_product(self, x: Tensor, weight: Tensor, scale: Tensor | None, residual: Tensor) -> Tensor:
        """residual + the sum of the ranks' (x W^T) * scale, of one row: each product sends its own part."""
        return self.sum(ops.linear_send(x, weight, scale, self.mailbox), residual, sent=True)

    def _check(self, numbers: int) -> None:
        if numbers > self.mailbox.words:
            raise ValueError(f"{numbers} numbers at once: this exchange takes up to {self.mailbox.words}")

    def _constants(self, device: torch.device, pdl: bool | None) -> dict[str, object]:
        rank, size, words, block, *_ = self.mailbox
        pdl = machine(device).pdl if pdl is None else pdl
        ranks = next_power_of_2(size)
        shape = {"rank": rank, "SIZE": size, "RANKS": ranks, "WORDS": words, "BLOCK": block}
        return {**shape, "PDL": pdl, "num_warps": min(32, max(1, block * ranks // 32)), **launch_options(pdl)}


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


def over_nvlink(rank: int, size: int, device: torch.device, apart: bool = False, group: Any = None) -> Exchange:
    """For a process group (by default all), all of whose ranks call this. RuntimeError where GPUs do not reach each other."""
    import torch.distributed as dist
    import torch.distributed._symmetric_memory as symmetric

    group = group or dist.group.WORLD
    assert group is not None
    memory = symmetric.empty(2, size, WORDS, dtype=torch.int64, device=device)
    memory.zero_()
    handle = symmetric.rendezvous(memory, group)
    addresses = [handle.get_buffer(peer, memory.shape, memory.dtype).data_ptr() for peer in range(size)]
    torch.cuda.synchronize(device)
    dist.barrier(group)  # no word may arrive before the zeros
    inboxes = torch.tensor(addresses, dtype=torch.int64, device=device)
    epochs = torch.zeros(WORDS // BLOCK, dtype=torch.int32, device=device)
    return Exchange(Mailbox(rank, size, WORDS, BLOCK, inboxes, epochs), (memory, handle), apart)
