"""What ranks say to each other, by ranks that are streams of one GPU."""

from __future__ import annotations

import pytest
import torch

from llama_fast.optimisations.int8 import Int8

pytestmark = pytest.mark.gpu
ROUNDS = 6


@pytest.mark.parametrize("size", [2, 3, 4, 8])
@pytest.mark.parametrize("encoding", ["bf16", "int8"])
@pytest.mark.parametrize("rows", [1, 4])
def test_products_that_send_their_own_parts_sum_to_the_whole(size: int, encoding: str, rows: int) -> None:
    """Small ones, so that the programs of all ranks run at once. Each round with other numbers, on two inboxes in turns."""
    from llama_fast.kernels import ops
    from llama_fast.kernels.exchange import Exchange
    from llama_fast.kernels.tuning import Tile
    from llama_fast.kernels.words import Mailbox

    n, k, words, block = 510, 64 * size, 512, 64
    memory = torch.zeros(size, 2, size, words, dtype=torch.int64, device="cuda")
    inboxes = torch.tensor([memory[rank].data_ptr() for rank in range(size)], device="cuda")
    epochs = torch.zeros(size, words // block, dtype=torch.int32, device="cuda")
    exchanges = [Exchange(Mailbox(r, size, words, block, inboxes, epochs[r]), memory) for r in range(size)]
    streams = [torch.cuda.Stream() for _ in range(size)]
    tile = Tile(rows, 64, 4 if rows * size > 32 else 2, blocks=2, convert="exact")
    weight = torch.randn(n, k, device="cuda").bfloat16()
    parts = Int8().encode(weight, torch.bfloat16) if encoding == "int8" else {"weight": weight}
    exact = Int8().decode(parts) if encoding == "int8" else weight
    for seed in range(ROUNDS):
        torch.manual_seed(seed)
        x, residual = torch.randn(1, k, device="cuda").bfloat16(), torch.randn(1, n, device="cuda").bfloat16()
        torch.cuda.synchronize()
        found = []
        for rank, (stream, exchange) in enumerate(zip(streams, exchanges, strict=True)):
            share = slice(64 * rank, 64 * (rank + 1))
            with torch.cuda.stream(stream):
                mine = x[:, share].contiguous(), parts["weight"][:, share].contiguous()
                part = ops.linear_send(*mine, parts.get("scale"), exchange.mailbox, tile=tile)
                found.append(exchange.sum(part, residual, sent=True))
        torch.cuda.synchronize()
        wanted = residual.double() + x.double() @ exact.double().T
        assert found[0].shape == wanted.shape and found[0].dtype == torch.bfloat16
        torch.testing.assert_close(found[0].double(), wanted, atol=0.01, rtol=0.004)
        assert all(torch.equal(other, found[0]) for other in found), "all ranks get the same bits"


@pytest.mark.parametrize("size", [2, 3, 4, 8])
def test_sums_and_gathers_of_changing_lengths(size: int) -> None:
    """Rows of a step and of a prompt by turns, as the same words are used for all of them."""
    from llama_fast.kernels.exchange import Exchange
    from llama_fast.kernels.words import Mailbox

    words, block = 2048, 64
    memory = torch.zeros(size, 2, size, words, dtype=torch.int64, device="cuda")
    inboxes = torch.tensor([memory[rank].data_ptr() for rank in range(size)], device="cuda")
    epochs = torch.zeros(size, words // block, dtype=torch.int32, device="cuda")
    exchanges = [Exchange(Mailbox(r, size, words, block, inboxes, epochs[r]), memory) for r in range(size)]
    streams = [torch.cuda.Stream() for _ in range(size)]
    # Kernels are loaded while none runs that waits for one not yet launched: every word seems to have arrived.
    memory.fill_(1 << 32)
    zeros = torch.zeros(3, 300, device="cuda")
    exchanges[0].sum(zeros, zeros.bfloat16())
    epochs.zero_()
    exchanges[0].gather(zeros[:, :100].contiguous(), 250)
    torch.cuda.synchronize()
    memory.zero_()
    epochs.zero_()
    for seed in range(ROUNDS):
        torch.manual_seed(seed)
        rows, columns = (5, 3, 2)[seed % 3], 250  # one row, or columns of another number, are kernels of their own
        parts = torch.randn(size, rows, 300, device="cuda")
        residual, whole = torch.randn(rows, 300, device="cuda").bfloat16(), torch.randn(rows, columns, device="cuda")
        shares = [whole[:, columns * r // size : columns * (r + 1) // size].contiguous() for r in range(size)]
        torch.cuda.synchronize()
        sums, wholes = [], []
        for stream, exchange, part, share in zip(streams, exchanges, parts, shares, strict=True):
            with torch.cuda.stream(stream):
                sums.append(exchange.sum(part, residual))
                wholes.append(exchange.gather(share, columns))
        torch.cuda.synchronize()
        wanted = parts.double().sum(0) + residual.double()
        torch.testing.assert_close(sums[0].double(), wanted, atol=0.01, rtol=0.004)
        assert all(torch.equal(other, sums[0]) for other in sums)
        assert all(torch.equal(found, whole) for found in wholes)
