"""The matrices of a model alone, on this CPU: milliseconds for all that one step multiplies by, by each way to multiply.

    python tests/instruments/products.py [--rows 1,2,4,8] [--shape smollm2-135m] [--rounds 9]

Random float32 weights of the named shape, each with its own memory, so that a step reads all of them anew. The ways take turns;
the median counts. `generated` is `llama_fast.model.matvec.product` compiled, as the compiled rungs have it.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from llama_fast.ladder.bandwidth import read_bandwidth_gb_per_s
from llama_fast.model.matvec import library_product, product
from llama_ref.config import NAMED, LlamaConfig


def matrices(config: LlamaConfig) -> list[Tensor]:
    """[out, in] of every block and of the head."""
    q, kv, dim, ffn = (
        config.n_heads * config.head_dim,
        config.n_kv_heads * config.head_dim,
        config.dim,
        config.ffn_dim,
    )
    block = [(q, dim), (kv, dim), (kv, dim), (dim, q), (ffn, dim), (ffn, dim), (dim, ffn)]
    return [torch.randn(shape) for shape in [*block * config.n_layers, (config.vocab_size, dim)]]


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", default="1,2,4,8")
    parser.add_argument("--shape", default="smollm2-135m", choices=sorted(NAMED))
    parser.add_argument("--rounds", type=int, default=9)
    asked = parser.parse_args()
    weights = matrices(NAMED[asked.shape])
    gigabytes = sum(weight.nbytes for weight in weights) / 1e9
    read = read_bandwidth_gb_per_s(torch.device("cpu"))
    print(f"{gigabytes:.3f} GB of weights, {gigabytes / read * 1e3:.1f} ms to read them at {read:.1f} GB/s")
    torch._dynamo.config.recompile_limit = 64  # every shape has its own code
    ways: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
        "F.linear": F.linear,
        "oneDNN": lambda x, weight: torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], ""),
        "library_product": library_product,
        "generated": torch.compile(product, dynamic=False),
    }
    for rows in map(int, asked.rows.split(",")):
        inputs = {width: torch.randn(rows, width) for width in {weight.shape[1] for weight in weights}}
        times: dict[str, list[float]] = {name: [] for name in ways}
        for _ in range(asked.rounds + 1):
            for name, multiply in ways.items():
                began = time.perf_counter()
                for weight in weights:
                    multiply(inputs[weight.shape[1]], weight)
                times[name].append((time.perf_counter() - began) * 1e3)
        text = ", ".join(
            f"{name} {statistics.median(t[1:]):.1f} ({min(t[1:]):.1f}-{max(t[1:]):.1f})" for name, t in times.items()
        )
        print(f"rows {rows}: {text} ms", flush=True)


if __name__ == "__main__":
    main()
