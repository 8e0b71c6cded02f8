"""Every kernel of a step, compiled for a GPU on a machine that has none. Run by test_for_hopper.py in its own process, with the
compute capability: 90 for all kernels with a Hopper's own tiles, another, as 86 or 89, for every tile that such a GPU can get.

Triton's driver is replaced by one that knows the chip and cannot launch: whatever tried to would fail here.
"""

import dataclasses
import itertools
import sys
import tempfile
import threading
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget

from llama_fast.arithmetic import triton as arithmetic
from llama_fast.build import build
from llama_fast.caches.paged import Paged
from llama_fast.caches.static import Static
from llama_fast.compilers.eager import Eager
from llama_fast.compilers.graphed import first_block_of
from llama_fast.encodings.dense import Dense
from llama_fast.encodings.fp8 import Fp8
from llama_fast.encodings.int4 import Int4
from llama_fast.encodings.int8 import Int8
from llama_fast.encodings.sparse24 import Sparse24
from llama_fast.kernels import (
    attention,
    choosing,
    eight_bits,
    exchange,
    linear,
    many_rows,
    ops,
    prompt,
    several,
    tokens,
    tuning,
    widen,
)
from llama_fast.kernels import narrow as narrow_kernels
from llama_fast.kernels.launching import compiled_together
from llama_fast.kernels.packets import Mailbox
from llama_fast.kernels.stored import LOADERS
from llama_fast.model.llama import Llama
from llama_fast.recipes import fused
from llama_ref.checkpoint import random_checkpoint
from llama_ref.config import LlamaConfig

CONFIG = LlamaConfig(
    dim=128, n_layers=2, n_heads=4, n_kv_heads=2, head_dim=32, ffn_dim=192, vocab_size=1000, max_context=256
)
KERNELS = (
    linear._in_registers,
    linear._on_tensor_cores,
    linear._norm,
    attention._attend,
    eight_bits._in_eight_bits,
    tokens._embed,
    tokens._argmax,
    choosing._distribution,
    choosing._draw,
    prompt._rotate_and_store,
    prompt._gate,
    exchange._sum,
    exchange._gather,
    narrow_kernels._narrow,
    narrow_kernels._limbs_apart,
    several._several_rows,
    several._in_pieces,
    widen._widen,
    widen._halve,
)


class Absent:
    """A GPU that answers questions."""

    def __init__(self, capability: int):
        self.capability = capability
        self.utils, self.launchers = None, list[tuple[str, str]]()

    def launcher_cls(self, source: Any, metadata: Any) -> None:
        """What Triton builds to launch a kernel."""
        self.launchers.append((source.fn.__name__, threading.current_thread().name))

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.capability, 32)


def ready() -> dict[str, int]:
    """How many variants of each kernel are compiled; what launches each was built too, beside what was still compiled."""
    found = {}
    launchers = triton.runtime.driver.active.launchers
    assert any(thread.startswith("ThreadPoolExecutor") for _, thread in launchers)
    for kernel in KERNELS:
        variants = [*kernel.device_caches[0][0].values()]
        assert all(type(variant) is triton.compiler.CompiledKernel for variant in variants), variants
        assert all(variant.metadata.shared <= tuning.SHARED_BYTES for variant in variants), (
            "more shared memory than some GPUs have"
        )
        found[kernel.fn.__name__] = len(variants)
        assert sum(name == kernel.fn.__name__ for name, _ in launchers) == len(variants)
    return found


def over_ranks(x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor) -> None:
    """Products that send their own parts, and sums and gathers in launches of their own."""
    inboxes, counts = torch.zeros(6, dtype=torch.int64), torch.zeros(1024, dtype=torch.int32)
    for size in (2, 4, 6):
        mailbox = Mailbox(1, size, 2048, 128, inboxes, counts)
        for tile in (tuning.Tile(2, 128, 4, 2, convert="exact"), tuning.Tile(8, 64, 4, convert="offset"), None):
            ops.linear_send(x, weight, scale, mailbox, tile=tile)
            ops.linear_send(x, weight.bfloat16(), None, mailbox, tile=tile)
        one, part = exchange.Exchange(mailbox, None), torch.zeros(1, 96)
        for sent in (False, True):
            one.sum(part, part.bfloat16(), sent)
        one.gather(torch.zeros(3, 1000 * 2 // size - 1000 // size), 1000)


def in_pages(block: Llama) -> None:
    """A step, a check and a prompt whose keys stand in pages."""
    cache = Paged().allocate(CONFIG, 2, 256, torch.bfloat16, torch.device("cpu"))
    start_B = torch.zeros(2, dtype=torch.int64)
    for T in (1, 4, 16):
        block(torch.ones(2, T, dtype=torch.int64), start_B, cache)


def in_eight_bits(block: Llama) -> None:
    """The same where they are kept in eight bits, and one row's step in a long cache."""
    for kind in (Static(bits=8), Paged(bits=8)):
        cache = kind.allocate(CONFIG, 2, 256, torch.bfloat16, torch.device("cpu"))
        for T in (1, 4, 16):
            block(torch.ones(2, T, dtype=torch.int64), torch.zeros(2, dtype=torch.int64), cache)
    for slots, rows in itertools.product((256, 512, 4096), (1, 8)):
        keys, steps = torch.zeros(1, 1, slots, 128, dtype=torch.int8), torch.zeros(1, 1, slots)
        scratch = ops.AttentionScratch.of(8, 1, 1, 128, keys.device)
        start_B = torch.zeros(1, dtype=torch.int64)
        ops.attention(
            torch.zeros(rows, 128, dtype=torch.bfloat16), keys, keys.clone(), start_B, scratch, steps=(steps, steps)
        )


def of_words() -> None:
    """Weights of less than a byte a column, by one row, by a few, and widened for many."""
    for kind, rows in (
        (Int4(), (1, 2, 8, 16, 32, 64)),
        (Int4(32, True), (8, 64)),
        (Fp8(128), (1, 8, 64)),
        (Sparse24(), (1, 8)),
        (Sparse24(True), (1, 8)),
    ):
        weight, scale = LOADERS[kind.loader](kind.encode(torch.ones(64, 1024), torch.bfloat16))
        for m in rows:
            ops.linear(torch.ones(m, 1024, dtype=torch.bfloat16), weight, scale)
        many_rows.wide_linear(torch.ones(64, 1024, dtype=torch.bfloat16), weight, scale)


def general(gpu: str) -> None:
    """Every tile that a GPU gets which the tables do not know: by matrix, type of weights, number of rows; and attention's."""
    assert tuning.card(gpu) is None
    ops.machine = lambda device: ops.Machine(gpu, False)  # type: ignore[assignment]
    wide, narrow, seen = torch.float32, torch.bfloat16, set()
    caches = {dtype: torch.zeros(1, 1, 64, 64, dtype=dtype) for dtype in (wide, narrow)}
    table, start_B = torch.zeros(64, 32), torch.zeros(128, dtype=torch.int64)
    with compiled_together():
        for n, k, m, x_type, w_type, epilogue in itertools.product(
            (512, tuning.MANY_ROWS), (2048, 2 * tuning.LONG_ROW), (1, 8, 64, 128), (narrow, wide),
            (torch.int8, narrow, wide),
            ("plain", "gated", "rope"),
        ):  # fmt: skip
            many = m > ops.MOST_ROWS and ((w_type, x_type) != (torch.int8, narrow) or epilogue == "rope")
            if w_type not in (torch.int8, x_type) or many:
                continue
            tile = tuning.linear_tile(gpu, epilogue, n, k, m, w_type.itemsize, x_type.itemsize)
            if (tile, x_type, w_type, epilogue) in seen:
                continue
            seen.add((tile, x_type, w_type, epilogue))
            x, weight = torch.ones(m, k, dtype=x_type), torch.ones(1, 1, dtype=w_type).expand(n, k)
            scale = torch.ones(n, 1, dtype=x_type) if w_type is torch.int8 else None
            if epilogue == "plain":
                ops.linear(x, weight, scale)
            elif epilogue == "gated":
                ops.gated(x, x[0], 1e-5, weight, scale)
            else:
                cache = caches[x_type].expand(m, -1, -1, -1)
                rope = ops.Rope(table, table, start_B[:m], cache, cache, n // 64 - 2)
                ops.qkv(x, x[0], 1e-5, weight, scale, rope)
        for slots, rows, dtype, width in itertools.product((256, 512, 4096), (1, 8), (narrow, wide), (128, 256)):
            keys = torch.zeros(1, 1, slots, width, dtype=dtype)
            scratch = ops.AttentionScratch.of(8, 1, 1, width, keys.device)
            ops.attention(torch.zeros(rows, width, dtype=dtype), keys, keys.clone(), start_B[:1], scratch)
    found = ready()
    assert found["_on_tensor_cores"] + found["_in_registers"] >= len(seen)
    print("; ".join(f"{name} {count}" for name, count in found.items()))


def main() -> None:
    ops.machine = lambda device: ops.Machine("NVIDIA H100 80GB HBM3", True)  # type: ignore[assignment]
    arithmetic.interpreted = lambda: True  # type: ignore[attr-defined]  # so that a model can be built without a GPU
    start_B = torch.zeros(1, dtype=torch.int64)
    for encoding in (Dense(), Int8()):
        plan = dataclasses.replace(fused(encoding), compiler=Eager())
        runner = build(random_checkpoint(CONFIG, 1, "cpu", torch.bfloat16), plan, "cpu", torch.bfloat16)
        block, cache = first_block_of(runner.model), runner.allocate(1, 256)
        before = [tensor.clone() for layer in cache.layers for tensor in (layer.k, layer.v)]
        with compiled_together():
            for T in (1, 2, 8):
                ops.likeliest(block(torch.ones(1, T, dtype=torch.int64), start_B, cache)[:, -1])
            cos, layer = block.rope_table[..., 0].contiguous(), cache.layers[0]
            many_rows.rotate_and_store(
                many_rows.Wide(torch.randn(24, 256).bfloat16()),
                ops.Rope(cos, cos, start_B, layer.k, layer.v, 4),
                torch.bfloat16,
            )
            many_rows.gate(many_rows.Wide(torch.randn(24, 384).bfloat16()), torch.bfloat16)
            in_pages(block)
            in_eight_bits(block)
            two = torch.randn(2, 128).bfloat16()
            weight, scale = torch.ones(96, 128, dtype=torch.int8), torch.ones(96, 1, dtype=torch.bfloat16)
            for rows, (n, k) in itertools.product((9, 32, 64, 128), ((96, 128), (16384, 256))):
                ops.linear(
                    torch.randn(rows, k).bfloat16(), torch.ones(n, k, dtype=torch.int8), torch.ones(n, 1).bfloat16()
                )
            # the rule's tiles for large matrices
            for dtype, k in itertools.product((torch.bfloat16, torch.float32), (2048, 8192)):
                eight, large = torch.randn(8, k).to(dtype), torch.ones(2048, k)
                ops.linear(eight, large.to(dtype), None)
                ops.linear(eight, large.to(torch.int8), torch.ones(2048, 1, dtype=dtype))
            number = torch.full((3,), 0.5)
            for top_k, min_p in ((None, None), (torch.tensor([200, 0, 7]), number)):
                ops.draw(
                    ops.distribution(torch.zeros(3, 32000), number, top_k, min_p), torch.zeros(3, dtype=torch.float64)
                )
            # and for attention: of one row and of eight, narrow keys and wide, in caches short and long
            wide, narrow = torch.float32, torch.bfloat16
            for dtype, width, slots, heads in (
                (narrow, 128, 4096, 1), (narrow, 256, 512, 1), (wide, 128, 512, 4), (wide, 256, 512, 1), (wide, 256, 4096, 1),
            ):  # fmt: skip
                keys = torch.zeros(1, 1, slots, width, dtype=dtype)
                scratch = ops.AttentionScratch.of(8, heads, 1, width, keys.device)
                for T in (1, 8):
                    ops.attention(torch.zeros(T, heads * width, dtype=dtype), keys, keys.clone(), start_B, scratch)
            of_words()
            for tile in (tuning.Tile(4, 128, 4, 2, vector=True), tuning.Tile(16, 64, 1, ahead=1)):
                ops.linear(two, weight, scale, gain=two[0], eps=1e-5, tile=tile)
            over_ranks(two[:1], weight, scale)
        after = [tensor for layer in cache.layers for tensor in (layer.k, layer.v)]
        assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True)), "nothing was to be launched"
    found = ready()  # before one fails, of which some versions of Triton keep a promise
    with compiled_together(trials=True):  # one of several tiles on trial may be none
        ops.linear(two, weight, scale, tile=tuning.Tile(5, 64, 1, vector=True))
    try:
        with compiled_together():
            ops.linear(two, weight, scale, tile=tuning.Tile(3, 64, 1, vector=True))  # no power of two
        raise AssertionError("an error of the compiler was lost")
    except triton.CompilationError:
        pass
    print("; ".join(f"{name} {count}" for name, count in found.items()))


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as directory, triton.knobs.cache.scope():
        triton.knobs.cache.dir = directory
        triton.runtime.driver.set_active(Absent(int(sys.argv[1])))  # type: ignore[arg-type]
        main() if sys.argv[1] == "90" else general("NVIDIA L4")
    sys.exit()
