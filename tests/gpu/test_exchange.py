"""What ranks say to each other, by ranks that are streams of one GPU. Messages are small: all programs must run at once."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch

from llama_fast.encodings.int8 import Int8

pytestmark = pytest.mark.gpu
ROUNDS = 6


class Ranks(NamedTuple):
    """`size` ranks, each with its exchange and its stream; all inboxes are one tensor."""

    exchanges: list[Any]
    streams: list[torch.cuda.Stream]
    memory: torch.Tensor
    epochs: torch.Tensor

    @staticmethod
    def of(size: int, words: int = 2048, block: int = 64) -> Ranks:
        from llama_fast.kernels.exchange import Exchange
        from llama_fast.kernels.packets import Mailbox

        memory = torch.zeros(size, 2, size, words, dtype=torch.int64, device="cuda")
        inboxes = torch.tensor([memory[rank].data_ptr() for rank in range(size)], device="cuda")
        epochs = torch.zeros(size, words // block, dtype=torch.int32, device="cuda")
        exchanges = [Exchange(Mailbox(r, size, words, block, inboxes, epochs[r]), memory) for r in range(size)]
        return Ranks(exchanges, [torch.cuda.Stream() for _ in range(size)], memory, epochs)

    def load(self, *calls: Any) -> None:
        """Have kernels loaded while none runs that waits for one not yet launched: every word seems to have arrived."""
        self.memory.fill_(1 << 32)
        for call in calls:
            self.epochs.zero_()
            call(self.exchanges[0])
        torch.cuda.synchronize()
        self.memory.zero_()
        self.epochs.zero_()


@pytest.mark.parametrize("size", [2, 3, 4, 8])
@pytest.mark.parametrize(("encoding", "convert"), [("bf16", "plain"), ("int8", "exact"), ("int8", "offset")])
@pytest.mark.parametrize("rows", [1, 4])
def test_products_that_send_their_own_parts_sum_to_the_whole(size: int, encoding: str, convert: str, rows: int) -> None:
    """Each round with other numbers, on two inboxes in turns."""
    from llama_fast.kernels import ops
    from llama_fast.kernels.tuning import Tile

    n, k = 510, 64 * size
    ranks = Ranks.of(size)
    tile = Tile(rows, 64, 4 if rows * size > 32 else 2, blocks=2, convert=convert)
    weight = torch.randn(n, k, device="cuda").bfloat16()
    parts = Int8().encode(weight, torch.bfloat16) if encoding == "int8" else {"weight": weight}
    exact = Int8().decode(parts) if encoding == "int8" else weight
    for seed in range(ROUNDS):
        torch.manual_seed(seed)
        x, residual = torch.randn(1, k, device="cuda").bfloat16(), torch.randn(1, n, device="cuda").bfloat16()
        torch.cuda.synchronize()
        found = []
        for rank, (stream, exchange) in enumerate(zip(ranks.streams, ranks.exchanges, strict=True)):
            share = slice(64 * rank, 64 * (rank + 1))
            with torch.cuda.stream(stream):
                mine = x[:, share].contiguous(), parts["weight"][:, share].contiguous()
                part = ops.linear_send(*mine, parts.get("scale"), exchange.mailbox, tile=tile)
                found.append(exchange.sum(part, residual, sent=True))
        torch.cuda.synchronize()
        wanted = residual.double() + x.double() @ exact.double().T
        assert found[0].shape == wanted.shape and found[0].dtype == torch.bfloat16
        torch.testing.assert_close(found[0].double(), wanted, atol=0.03, rtol=0.004)
        assert all(torch.equal(other, found[0]) for other in found), "all ranks get the same bits"


@pytest.mark.parametrize("size", [2, 3, 4, 8])
def test_sums_and_gathers_of_changing_lengths(size: int) -> None:
    """Rows of steps and of prompts by turns: the same words are used for all of them."""
    ranks = Ranks.of(size)
    zeros = torch.zeros(3, 300, device="cuda")
    ranks.load(lambda e: e.sum(zeros, zeros.bfloat16()), lambda e: e.gather(zeros[:, :100].contiguous(), 250))
    for seed in range(ROUNDS):
        torch.manual_seed(seed)
        rows, columns = (5, 3, 2)[seed % 3], 250  # one row, or columns of another number, are kernels of their own
        parts = torch.randn(size, rows, 300, device="cuda")
        residual, whole = torch.randn(rows, 300, device="cuda").bfloat16(), torch.randn(rows, columns, device="cuda")
        shares = [whole[:, columns * r // size : columns * (r + 1) // size].contiguous() for r in range(size)]
        torch.cuda.synchronize()
        sums, wholes = [], []
        for stream, exchange, part, share in zip(ranks.streams, ranks.exchanges, parts, shares, strict=True):
            with torch.cuda.stream(stream):
                sums.append(exchange.sum(part, residual))
                wholes.append(exchange.gather(share, columns))
        torch.cuda.synchronize()
        wanted = parts.double().sum(0) + residual.double()
        torch.testing.assert_close(sums[0].double(), wanted, atol=0.01, rtol=0.004)
        assert all(torch.equal(other, sums[0]) for other in sums)
        assert all(torch.equal(found, whole) for found in wholes)


@pytest.mark.parametrize("size", [2, 4])
def test_a_step_of_products_sums_and_a_gather_replayed(size: int) -> None:
    """As a decode step has them, in a CUDA graph for each rank: two products of unequal widths that follow from each other, then
    a gather of one row. Replayed with other inputs, bit for bit what the ranks' parts come to."""
    ranks = Ranks.of(size)
    torch.manual_seed(0)
    dim, hidden, columns = 320, 192 * size, 250
    first = [torch.randn(dim, 64, device="cuda").bfloat16() / 8 for _ in range(size)]
    second = [torch.randn(dim, hidden // size, device="cuda").bfloat16() / 16 for _ in range(size)]
    heads = [torch.randn(columns * (r + 1) // size - columns * r // size, dim, device="cuda") / 16 for r in range(size)]
    x, residual = torch.zeros(1, 64, device="cuda").bfloat16(), torch.zeros(1, dim, device="cuda").bfloat16()

    def step(exchange: Any, rank: int) -> torch.Tensor:
        y = exchange.add_product(x, first[rank], None, residual)
        y = exchange.add_product(y[:, : hidden // size].contiguous(), second[rank], None, y)
        return exchange.gather((y.float() @ heads[rank].T), columns)

    ranks.load(
        lambda e: e.add_product(x, first[0], None, residual),
        lambda e: e.add_product(residual[:, :192].contiguous(), second[0], None, residual),
        *(lambda e, head=head: e.gather(residual.float() @ head.T, columns) for head in heads),
    )
    graphs, found = [], []
    for rank, (stream, exchange) in enumerate(zip(ranks.streams, ranks.exchanges, strict=True)):
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
            found.append(step(exchange, rank))
        graphs.append(graph)
    seen = set()
    for seed in range(ROUNDS):
        torch.manual_seed(seed)
        x.copy_(torch.randn(1, 64, device="cuda"))
        residual.copy_(torch.randn(1, dim, device="cuda"))
        torch.cuda.synchronize()
        for graph, stream in zip(graphs, ranks.streams, strict=True):
            with torch.cuda.stream(stream):
                graph.replay()
        torch.cuda.synchronize()
        y = (residual.double() + sum(x.double() @ w.double().T for w in first)).bfloat16()
        y = y.double() + sum(y[:, :192].double() @ w.double().T for w in second)
        wanted = torch.cat([y.bfloat16().double() @ head.double().T for head in heads], 1)
        torch.testing.assert_close(found[0].double(), wanted, atol=0.05, rtol=0.02)
        assert all(torch.equal(other, found[0]) for other in found), "all ranks get the same bits"
        seen.add(found[0].sum().item())
    assert len(seen) == ROUNDS, "every replay is another step"
