"""A fused step over ranks against the reference, in Triton's interpreter: processes that share memory in place of GPUs.

Run by test_interpreted.py, once for each rank: interpreted_shards.py shards RANK SIZE FILE.
"""

import dataclasses
import hashlib
import sys

import torch

from llama_fast.build import build
from llama_fast.compilers.eager import Eager
from llama_fast.encodings.dense import Dense
from llama_fast.encodings.int8 import Int8
from llama_fast.kernels import ops
from llama_fast.kernels.exchange import Exchange
from llama_fast.kernels.packets import Mailbox
from llama_fast.parallel.tensor_parallel import OverNvlink, TensorParallel
from llama_fast.recipes import fused
from llama_ref.checkpoint import random_checkpoint
from llama_ref.config import LlamaConfig
from llama_ref.model import Llama as Reference

ops.ARGMAX_STRETCH = 16
WORDS, BLOCK = 512, 32
CONFIG = LlamaConfig(
    dim=32, n_layers=2, n_heads=6, n_kv_heads=6, head_dim=20, ffn_dim=66, vocab_size=35, max_context=256
)


def main(rank: int, size: int, file: str) -> None:
    """One row, whose products send their own parts; two at unequal positions, a step of several tokens, a long prompt;
    vocabulary and heads cut unevenly."""
    memory = torch.from_file(file, shared=True, size=size * 2 * size * WORDS, dtype=torch.int64)
    at = torch.tensor([memory.data_ptr() + peer * 2 * size * WORDS * 8 for peer in range(size)])
    mailbox = Mailbox(rank, size, WORDS, BLOCK, at, torch.zeros(WORDS // BLOCK, dtype=torch.int32))
    exchange = Exchange(mailbox, memory)
    shard = TensorParallel(rank, size, OverNvlink(exchange))
    checked, bits = 0, hashlib.sha256()
    for encoding, kv_heads, B, T in ((Dense(), 6, 2, 1), (Int8(), 1, 2, 2), (Dense(), 6, 1, 1), (Int8(), 6, 1, 1)):
        config = dataclasses.replace(CONFIG, n_kv_heads=kv_heads, tie_embeddings=kv_heads == 1)
        checkpoint = random_checkpoint(config, 1, "cpu", torch.float32)
        runner = build(checkpoint, dataclasses.replace(fused(encoding), compiler=Eager(), shard=shard), "cpu")
        wanted = Reference(config, runner.reference_weights(), torch.float64)
        tokens_BL = torch.randint(config.vocab_size, (B, 20), generator=torch.Generator().manual_seed(B))
        wanted_BLV = wanted(tokens_BL)
        cache = runner.allocate(B, 20)
        assert cache.layers[0].k.shape[1] == max(1, kv_heads // size), "local heads only"
        lengths_B = torch.tensor([7, 5])[:B]
        logits_BV = runner.prefill(tokens_BL[:, :7], lengths_B, cache)
        torch.testing.assert_close(logits_BV.double(), wanted_BLV[torch.arange(B), lengths_B - 1], atol=2e-5, rtol=2e-5)
        for first in range(0, 2 * T, T):
            start_B = lengths_B + first
            at_BT = start_B[:, None] + torch.arange(T)
            rows_B1 = torch.arange(B)[:, None]
            token_B, logits_BTV = runner.step(tokens_BL[rows_B1, at_BT], start_B, cache, runner.greedy(B))
            torch.testing.assert_close(logits_BTV.double(), wanted_BLV[rows_B1, at_BT], atol=2e-5, rtol=2e-5)
            assert torch.equal(token_B, logits_BTV[:, -1].argmax(-1))
            checked += 1
            bits.update(logits_BTV.numpy().tobytes())
    print(f"shards: {checked} results agree, bits {bits.hexdigest()}")


if __name__ == "__main__":
    main(int(sys.argv[2]), int(sys.argv[3]), sys.argv[4])
