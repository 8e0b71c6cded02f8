"""The exchange between ranks in Triton's interpreter: processes that share memory in place of GPUs that reach each other.

Run by test_interpreted.py, once for each rank: interpreted_exchange.py exchange RANK SIZE FILE.
"""

import hashlib
import random
import sys
import time

import torch

from llama_fast.kernels import ops
from llama_fast.kernels.exchange import Exchange
from llama_fast.kernels.packets import Mailbox
from llama_fast.kernels.tuning import Tile

WORDS, BLOCK, ROUNDS = 256, 32, 12


def inputs(round_number: int, rank: int, *shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1000 * round_number + rank))


def main(rank: int, size: int, file: str) -> None:
    """Sums, sums onto a residual, products that send their own part and gathers, of changing lengths, as a step's; ranks are
    late by turns."""
    memory = torch.from_file(file, shared=True, size=size * 2 * size * WORDS, dtype=torch.int64)
    at = torch.tensor([memory.data_ptr() + peer * 2 * size * WORDS * 8 for peer in range(size)])
    mailbox = Mailbox(rank, size, WORDS, BLOCK, at, torch.zeros(WORDS // BLOCK, dtype=torch.int32))
    exchange = Exchange(mailbox, memory)
    late = random.Random(rank)
    checked, bits = 0, hashlib.sha256()
    for i in range(ROUNDS):
        rows = 1 + i % 3
        time.sleep(late.random() * 0.02)
        parts = [inputs(i, r, rows, 45) for r in range(size)]
        total, residual = torch.stack(parts).double().sum(0), inputs(i, 99, rows, 45).half()
        # half: the interpreter rounds to bfloat16 in its own way
        plain, added = exchange.sum(parts[rank]), exchange.sum(parts[rank], residual)
        torch.testing.assert_close(plain.double(), total, atol=1e-6, rtol=1e-6)
        assert added.dtype is torch.float16
        torch.testing.assert_close(added.double(), total + residual, atol=1e-3, rtol=1e-3)
        sent, product = product_of_all(exchange, i, rank, size)
        torch.testing.assert_close(sent.double(), product, atol=1e-3, rtol=1e-3)
        columns = 50 + i
        whole = inputs(i, 98, rows, columns)
        mine = whole[:, columns * rank // size : columns * (rank + 1) // size].contiguous()
        assert torch.equal(exchange.gather(mine, columns), whole)
        checked += 4
        for result in (plain, added, sent):
            bits.update(result.numpy().tobytes())
    print(f"exchange: {checked} results agree, bits {bits.hexdigest()}")


def product_of_all(exchange: Exchange, i: int, rank: int, size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(a product whose programs send their own rows, summed onto a residual; the same in float64). Columns are cut over ranks."""
    n, k = 37 + i, 24
    x, weight, scale = inputs(i, 97, 1, k * size), inputs(i, 96, n, k * size), inputs(i, 95, n, 1)
    mine, residual = slice(k * rank, k * (rank + 1)), inputs(i, 94, 1, n).half()
    tile = Tile(2 << i % 2, 16, 1, blocks=1 + i % 3 // 2)
    part = ops.linear_send(
        x[:, mine].contiguous(), weight[:, mine].contiguous(), scale if i % 2 else None, exchange.mailbox, tile=tile
    )
    time.sleep(0.01 * ((rank + i) % size))
    product = x.double() @ weight.double().T * (scale.double().T if i % 2 else 1)
    return exchange.sum(part, residual, sent=True), product + residual


if __name__ == "__main__":
    main(int(sys.argv[2]), int(sys.argv[3]), sys.argv[4])
