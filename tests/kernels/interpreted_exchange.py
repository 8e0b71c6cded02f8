"""The exchange between ranks in Triton's interpreter: processes that share memory in place of GPUs that reach each other.

Run by test_interpreted.py, once for each rank: interpreted_exchange.py exchange RANK SIZE FILE.
"""

import random
import sys
import time

import torch

from llama_fast.kernels.exchange import Exchange

WORDS, BLOCK, ROUNDS = 256, 32, 12


def inputs(round_number: int, rank: int, *shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1000 * round_number + rank))


def main(rank: int, size: int, file: str) -> None:
    """Sums, sums onto a residual and gathers of changing lengths, as a step's; ranks are late by turns."""
    memory = torch.from_file(file, shared=True, size=size * 2 * size * WORDS, dtype=torch.int64)
    at = [memory.data_ptr() + peer * 2 * size * WORDS * 8 for peer in range(size)]
    exchange = Exchange(
        rank, size, torch.tensor(at), torch.zeros(WORDS // BLOCK, dtype=torch.int32), memory, WORDS, BLOCK
    )
    late = random.Random(rank)
    checked = 0
    for i in range(ROUNDS):
        rows = 1 + i % 3
        time.sleep(late.random() * 0.02)
        parts = [inputs(i, r, rows, 45) for r in range(size)]
        total = torch.zeros_like(parts[0])
        for part in parts:
            total = total + part
        assert torch.equal(exchange.sum(parts[rank]), total), "summed in rank order, to the bit"
        residual = inputs(i, 99, rows, 45).half()  # the interpreter rounds to bfloat16 in its own way
        added = residual.float()
        for part in parts:
            added = added + part
        found = exchange.sum(parts[rank], residual)
        assert found.dtype is torch.float16 and torch.equal(found, added.half())
        columns = 50 + i
        whole = inputs(i, 98, rows, columns)
        mine = whole[:, columns * rank // size : columns * (rank + 1) // size].contiguous()
        assert torch.equal(exchange.gather(mine, columns), whole)
        checked += 3
    if rank == 0:
        print(f"exchange: {checked} results agree")


if __name__ == "__main__":
    main(int(sys.argv[2]), int(sys.argv[3]), sys.argv[4])
