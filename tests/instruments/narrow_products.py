"""One row times int8 and int4 matrices on this CPU: microseconds by each way to multiply, and by only reading the bytes.

    OMP_NUM_THREADS=2 python tests/instruments/narrow_products.py [--rows 1] [--rounds 9]

The shapes are those of the default model and of a layer of the 7B. Each way has as many matrices as exceed the caches; the ways
take turns; the median counts. `generated` is what the compiled rungs have. PyTorch's packed products are told with their error,
for most of them round the activations to bf16. A last column is the time relative to reading the same bytes.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch._inductor import inductor_prims  # noqa: F401 - knows what the loops ask of a compiler

from llama_fast.compilers.compiled import CPU_OPTIONS
from llama_fast.contracts import Parts
from llama_fast.encodings.int4 import Int4, unpacked
from llama_fast.encodings.int8 import Int8
from llama_fast.encodings.tiled import laid_in_tiles
from llama_fast.model.matrices import Stored

SHAPES = [(960, 576), (576, 576), (3072, 576), (576, 1536), (49152, 576), (12288, 4096), (22016, 4096), (4096, 11008)]
ENOUGH_BYTES = 150_000_000
"""Of matrices that are multiplied in a round, so that none is found in a cache."""
OPTIONS = {name: value for name, value in CPU_OPTIONS.items() if name != "guard_filter_fn"}


@dataclass
class Way:
    """One way to multiply: a function of the input and a matrix's tensors, and copies of these."""

    name: str
    multiply: Callable[[Tensor, Parts], Tensor]
    copies: list[dict[str, Tensor]]
    dtype: torch.dtype = torch.float32
    microseconds: list[float] = field(default_factory=list)

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for part in self.copies[0].values())

    def round(self, x: Tensor) -> None:
        began = time.perf_counter()
        for parts in self.copies:
            self.multiply(x, parts)
        self.microseconds.append((time.perf_counter() - began) / len(self.copies) * 1e6)


def copied(parts: Parts) -> list[dict[str, Tensor]]:
    count = max(1, ENOUGH_BYTES // sum(part.nbytes for part in parts.values()))
    return [{name: part.clone() for name, part in parts.items()} for _ in range(count)]


def ways(int4: Stored, int8: Stored) -> list[Way]:
    laid = laid_in_tiles(int4)
    generated = {
        stored: torch.compile(stored.encoding.product, dynamic=False, options=OPTIONS) for stored in (laid, int8)
    }
    scale = int4.parts["scale"].float()
    both = torch.stack([scale.t(), torch.zeros_like(scale.t())], -1).contiguous()
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(unpacked(int4.parts["weight"]).int(), 1)
    read = torch.compile(lambda x, parts: parts["weight"].view(torch.int32).view(64, -1).sum(-1), dynamic=False)

    def by_int4pack(x: Tensor, parts: Parts) -> Tensor:
        y: Tensor = torch.ops.aten._weight_int4pack_mm_for_cpu(x, parts["weight"], 32, parts["scale"])
        return y

    def by_int8pack(x: Tensor, parts: Parts) -> Tensor:
        y: Tensor = torch.ops.aten._weight_int8pack_mm(x, parts["weight"], parts["scale"])
        return y

    packed_int8 = {"weight": int8.parts["weight"], "scale": int8.parts["scale"].bfloat16().view(-1)}
    return [
        Way("int4 read only", read, copied({"weight": int4.parts["weight"]})),
        Way("int4 generated", generated[laid], copied(laid.parts)),
        Way("int4 packed, float32", by_int4pack, copied({"weight": packed, "scale": both})),
        Way("int4 packed, bf16", by_int4pack, copied({"weight": packed, "scale": both.bfloat16()}), torch.bfloat16),
        Way("int8 read only", read, copied({"weight": int8.parts["weight"]})),
        Way("int8 generated", generated[int8], copied(int8.parts)),
        Way("int8 packed, bf16", by_int8pack, copied(packed_int8), torch.bfloat16),
    ]


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=9)
    asked = parser.parse_args()
    torch._dynamo.config.recompile_limit = 64  # every shape has its own code
    for shape in SHAPES:
        weight, x = torch.randn(shape), torch.randn(asked.rows, shape[1])
        stored = [Stored(kind, shape, kind.encode(weight, torch.float32)) for kind in (Int4(32), Int8())]
        exact = [x.double() @ one.encoding.decode(one.parts).double().T for one in stored]
        tried = ways(*stored)
        for _ in range(asked.rounds + 1):
            for way in tried:
                way.round(x.to(way.dtype))
        print(f"{shape[0]} x {shape[1]}, {asked.rows} rows, {torch.get_num_threads()} threads")
        for way in tried:
            wanted, median = exact["int8" in way.name], statistics.median(way.microseconds[1:])
            error = ""
            if "read" in way.name:
                reading = median
            else:
                off = (way.multiply(x.to(way.dtype), way.copies[0]).double() - wanted).norm() / wanted.norm()
                error = f", error {off:.0e}, {median / reading:.1f} times the reading"
            print(f"  {way.name}: {median:.0f} us, {way.nbytes / median / 1e3:.1f} GB/s{error}", flush=True)


if __name__ == "__main__":
    main()
