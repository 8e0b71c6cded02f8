"""A cache in pages: rows take pages of a common pool as they grow, and rows that begin alike may share them.

Unlike the static one it holds what is written and not what might be. A table says which page of the pool each stretch of a row's
positions stands in; it is a tensor of one shape and one address, so that compiled and recorded steps see one program. Page 0 is
nobody's: a stretch without a page is written there, by free rows and by padding, and nobody sees it.

Shapes: B batch, T tokens, K key/value heads, d head width, N slots of the pool, P pages of a row, S slots of a row.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from llama_fast.caches.eight_bits import EightBitLayer, known
from llama_fast.contracts import KVCache
from llama_ref.arguments import whole
from llama_ref.config import LlamaConfig

NOBODYS = 0
"""The page that is read by nobody."""
CACHED_BYTES = 1 << 21
"""Keys and values that are copied at once on a CPU: they are read again at once, and should not go by way of the memory."""
STEP = 256
"""A row's positions are rounded up to a multiple of this: fewer shapes to compile."""


class Table:
    """Which page of the pool holds each stretch of a row's positions, and how many of them attention reads."""

    def __init__(self, pages_BP: Tensor, page: int):
        self.pages_BP, self.page = pages_BP, page
        self.seen_BP = pages_BP
        self._known: tuple[Tensor, Tensor] | None = None

    def see(self, pages: int) -> None:
        """Let attention read the first so many pages of each row."""
        self.seen_BP = self.pages_BP if pages == self.pages_BP.shape[1] else self.pages_BP[:, :pages]

    def forget(self) -> None:
        """The table was written: what was worked out from it is old."""
        self._known = None

    def slots_at(self, position_BT: Tensor) -> Tensor:
        """The slots [B, T] of the pool where these positions stand; worked out once for the layers of a step."""
        if torch.compiler.is_compiling():
            return slots_at(self.pages_BP, position_BT, self.page)
        if self._known is None or self._known[0] is not position_BT:
            self._known = position_BT, slots_at(self.pages_BP, position_BT, self.page)
        return self._known[1]


def slots_at(pages_BP: Tensor, position_BT: Tensor, page: int) -> Tensor:
    """Slots of a pool: pages [[2, 5]] of 4 slots, position 6 -> slot 22, the third of page 5."""
    return pages_BP.gather(1, position_BT // page) * page + position_BT % page


class PagedLayer:
    """One block's keys and values, [N, K, d]: a page is `page` neighbouring slots."""

    def __init__(self, k_NKd: Tensor, v_NKd: Tensor, table: Table):
        self.tensors: tuple[Tensor, Tensor] = (k_NKd, v_NKd)
        self.table = table

    @property
    def k(self) -> Tensor:
        """The keys that attention reads, [B, K, S, d]: a copy of them in order."""
        return self.gathered(self.tensors[0])

    @property
    def v(self) -> Tensor:
        return self.gathered(self.tensors[1])

    def parts(self) -> Iterator[tuple[slice, Tensor, Tensor]]:
        """The same by a few rows at a time, as many as a processor's cache holds while they are attended to."""
        pages_BP = self.table.seen_BP
        of_row = 2 * pages_BP.shape[1] * self.table.page * self.tensors[0][0].nbytes
        count = len(pages_BP) if pages_BP.is_cuda else max(1, CACHED_BYTES // of_row)
        for first in range(0, len(pages_BP), count):
            rows = slice(first, first + count)
            k_BKSd, v_BKSd = (self.gathered(pool_NKd, rows) for pool_NKd in self.tensors)
            yield rows, k_BKSd, v_BKSd

    def gathered(self, pool_NKd: Tensor, rows: slice = slice(None)) -> Tensor:
        """What attention reads of one of the pools, for some rows, [B, K, S, d]."""
        pages_BP = self.table.seen_BP[rows]
        pool = pool_NKd.view(-1, self.table.page * pool_NKd.shape[1], pool_NKd.shape[2])
        in_order = pool.index_select(0, pages_BP.flatten())  # by whole pages: several times as fast as indexing
        return in_order.view(len(pages_BP), -1, *pool_NKd.shape[1:]).transpose(1, 2)

    def put(self, k_BTKd: Tensor, v_BTKd: Tensor, position_BT: Tensor) -> None:
        at_BT = self.table.slots_at(position_BT)
        self.tensors[0][at_BT] = k_BTKd
        self.tensors[1][at_BT] = v_BTKd

    def through(self, table: Table) -> PagedLayer:
        """The same pool as the rows of another table see it."""
        return PagedLayer(*self.tensors, table)

    def beside(self, width: int, dtype: torch.dtype) -> PagedLayer:
        """A pool of the same slots for vectors of another width and type."""
        k_NKd, v_NKd = (pool.new_zeros(*pool.shape[:-1], width, dtype=dtype) for pool in self.tensors)
        return PagedLayer(k_NKd, v_NKd, self.table)


class PagedCache:
    """Rows whose pages an engine assigns.

    Where nobody does, each row has pages of its own: all of them, or, where the pool is too small for that, as they are reserved.
    """

    def __init__(self, layers: Sequence[Any], pages: int):
        """`pages`: those of the pool that rows may have, numbered from 1 on."""
        self.layers, self.pages = list(layers), pages
        self.table: Table = layers[0].table
        self.page: int = self.table.page
        self.batch, self.row_pages = self.table.pages_BP.shape
        self.capacity = self.row_pages * self.page
        self._parts: dict[tuple[int, int], PagedCache] = {}
        self._seat: PagedCache | None = None
        self._of: tuple[PagedCache, int] | None = None
        self._reserved: list[int] | None = None
        self._assigned: list[int] | None = None
        """How many pages each row was given by an engine."""

    @property
    def length(self) -> int:
        pages: int = self.table.seen_BP.shape[1]
        return pages * self.page

    @property
    def nbytes(self) -> int:
        kept: int = sum(tensor.nbytes for layer in self.layers for tensor in layer.tensors)
        return kept + self.table.pages_BP.nbytes

    def own(self) -> PagedCache:
        """The same cache, before an engine assigns pages: every row has its own."""
        if self.batch * self.row_pages <= self.pages:
            own_BP = torch.arange(1, self.batch * self.row_pages + 1).view(self.batch, self.row_pages)
            self.table.pages_BP.copy_(own_BP)
        else:
            self._reserved = []
        return self

    def reserve(self, start_B: Tensor, T: int) -> None:
        """Where pages are given as they are asked for: give them. ValueError, with the numbers, where the pool has no more.

        Else nothing, and no look at `start_B`: a GPU may still be computing it.
        """
        if self._of is not None:
            whole_cache, first = self._of
            whole_cache._reserve(first, start_B, T)
        else:
            self._reserve(0, start_B, T)

    def _reserve(self, first: int, start_B: Tensor, T: int) -> None:
        if self._assigned is not None and not any(self._assigned[first : first + len(start_B)]):
            raise ValueError("cache: an engine assigns its pages, and these rows have none: take a cache of its own")
        if self._reserved is None:
            return
        for row, start in enumerate(start_B.tolist(), first):
            for stretch in range(-(-(start + T) // self.page)):
                if not self.table.pages_BP[row, stretch]:
                    if len(self._reserved) == self.pages:
                        raise ValueError(
                            f"{self.batch} rows of {start + T} positions do not fit the {self.pages} pages "
                            f"of {self.page} of a paged cache: give it more tokens"
                        )
                    self._reserved.append(row)
                    self.table.pages_BP[row, stretch] = len(self._reserved)
                    self._forget(row)

    def rows(self, first: int, count: int) -> PagedCache:
        assert 0 <= first < first + count <= self.batch
        if (first, count) not in self._parts:
            table = Table(self.table.pages_BP[first : first + count], self.page)
            part = PagedCache([layer.through(table) for layer in self.layers], self.pages)
            part._of = self, first
            self._parts[first, count] = part
        return self._parts[first, count]

    def seat(self, row: int) -> PagedCache:
        """One row as a cache, until `seat` is called again. It is the same object for all rows: their tables are copied to one
        address, so that what was recorded for one of them serves all.
        """
        if self._seat is None:
            table = Table(torch.full_like(self.table.pages_BP[:1], NOBODYS), self.page)
            self._seat = PagedCache([layer.through(table) for layer in self.layers], self.pages)
        self._seat._of = self, row
        self._fill_seat()
        return self._seat

    def _fill_seat(self) -> None:
        assert self._seat is not None and self._seat._of is not None
        row = self._seat._of[1]
        self._seat.table.pages_BP.copy_(self.table.pages_BP[row : row + 1])
        self._seat.table.forget()

    def assign(self, row: int, pages: Sequence[int], first: int = 0) -> None:
        """These are a row's pages from its `first` on; behind them it has none. From now on somebody else counts them."""
        self._reserved = None
        if self._assigned is None:
            self._assigned = [0] * self.batch
        self._assigned[row] = first + len(pages)
        given = torch.tensor([*pages, *[NOBODYS] * (self.row_pages - first - len(pages))])
        if self.table.pages_BP.is_cuda:
            given = given.pin_memory()  # the copy takes its turn on the device, and the host goes on
        self.table.pages_BP[row, first:].copy_(given, non_blocking=True)
        self._forget(row)

    def see(self, pages: int | None) -> None:
        """Let attention read the first so many pages of a row, None: all. Shapes of steps follow from it."""
        self.table.see(self.row_pages if pages is None else pages)

    def _forget(self, row: int) -> None:
        """A row's table was written."""
        self.table.forget()
        for part in self._parts.values():
            part.table.forget()
        if self._seat is not None and self._seat._of == (self, row):
            self._fill_seat()


@dataclass(frozen=True)
class Paged:
    """A pool of pages of `page` positions. `tokens`: positions of the pool; by default as many as all rows may have.

    bits: 8 keeps keys and values in so many; None: in the type of the arithmetic.
    """

    tokens: int | None = None
    page: int = 32
    bits: int | None = None
    plain_slots: ClassVar[bool] = False
    fixed_addresses: ClassVar[bool] = True

    def __post_init__(self) -> None:
        known(self.bits)
        object.__setattr__(self, "tokens", None if self.tokens is None else whole("tokens", self.tokens))
        object.__setattr__(self, "page", whole("page", self.page))
        if self.page < 2 or self.page & (self.page - 1):
            raise ValueError(f"page={self.page} must be a power of two, and at least 2")
        if self.tokens is not None and self.tokens < self.page:
            raise ValueError(f"tokens={self.tokens} do not fill one page of {self.page}")

    def allocate(
        self, config: LlamaConfig, batch: int, length: int, dtype: torch.dtype, device: torch.device
    ) -> KVCache:
        """Rows of up to `length` positions each, in a pool that need not hold all of them at once."""
        rounded = min(-(-length // STEP) * STEP, max(config.max_context, length))
        row_pages = -(-rounded // self.page)
        pages = batch * row_pages if self.tokens is None else self.tokens // self.page
        shape = ((1 + pages) * self.page, config.n_kv_heads, config.head_dim)
        table = Table(torch.full((batch, row_pages), NOBODYS, dtype=torch.int64, device=device), self.page)

        def zeros() -> Tensor:  # not empty: whatever a masked slot holds is multiplied by 0, and 0 x NaN is NaN
            return torch.zeros(shape, dtype=dtype if self.bits is None else torch.int8, device=device)

        layers = [PagedLayer(zeros(), zeros(), table) for _ in range(config.n_layers)]
        kept = layers if self.bits is None else [EightBitLayer(layer, dtype) for layer in layers]
        return PagedCache(kept, pages).own()
