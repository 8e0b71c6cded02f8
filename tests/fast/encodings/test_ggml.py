"""GGUF's block types as encodings. The witness is the gguf package: its own numbers, to the last bit."""

from __future__ import annotations

from typing import Any

import gguf
import numpy
import pytest
import torch
from gguf.constants import GGMLQuantizationType

from llama_fast.encodings.ggml import DECODERS, Ggml, repacked
from llama_fast.encodings.int4 import Int4
from llama_fast.model.matvec import product_by_pieces
from llama_ref.formats.gguf_blocks import BLOCKS, block_bytes

KINDS = list(DECODERS)
WRITTEN = ["q4_0", "q4_1", "q5_0", "q5_1", "q8_0", "mxfp4"]
"""Types that the gguf package quantises to."""
EXTREMES = (
    1.0,
    -1.0,
    6e-8,
    -5.9e-5,
    60000.0,
    -0.0,
    0.013,
    -3.1e-3,
)  # of a half: subnormal, the largest, no number of bits


def random_blocks(kind: str, rows: int, columns: int, scales: tuple[float, ...] = EXTREMES) -> numpy.ndarray[Any, Any]:
    """Valid blocks uint8 [rows, bytes of a row]: any bits, but scales that are numbers."""
    draw = numpy.random.default_rng(5)
    raw = draw.integers(0, 256, (rows, columns // BLOCKS[kind][0], block_bytes(kind)), dtype=numpy.uint8)
    at = 0
    for name, dtype, count in BLOCKS[kind][1]:
        if dtype is torch.float16:
            halves = draw.choice(numpy.array(scales, dtype=numpy.float16), raw.shape[:2])
            raw[..., at : at + 2] = halves[..., None].view(numpy.uint8)
        if (kind, name) == ("mxfp4", "scale"):
            exponents = (0, 1, 2, 3, 100, 127, 140, 230) if scales is EXTREMES else (119, 120, 121)
            raw[..., at] = draw.choice(numpy.array(exponents, dtype=numpy.uint8), raw.shape[:2])
        at += dtype.itemsize * count
    return raw.reshape(rows, -1)


def parts_of(kind: str, raw: numpy.ndarray[Any, Any]) -> dict[str, torch.Tensor]:
    """The fields of blocks uint8 [rows, bytes of a row]."""
    blocks = torch.from_numpy(raw).unflatten(1, (-1, block_bytes(kind)))
    parts, at = {}, 0
    for name, dtype, count in BLOCKS[kind][1]:
        parts[name] = blocks[..., at : at + dtype.itemsize * count].contiguous().flatten(1).view(dtype)
        at += dtype.itemsize * count
    return parts


def decoded(kind: str, raw: numpy.ndarray[Any, Any]) -> torch.Tensor:
    """What the gguf package makes of them."""
    return torch.from_numpy(gguf.quants.dequantize(raw, GGMLQuantizationType[kind.upper()]))


def modest(kind: str, rows: int, columns: int) -> dict[str, torch.Tensor]:
    return parts_of(kind, random_blocks(kind, rows, columns, (0.01, -0.02, 0.005)))


def same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    return one.shape == other.shape and torch.equal(one.view(torch.int32), other.view(torch.int32))


@pytest.mark.parametrize("kind", KINDS)
def test_every_number_is_that_of_the_gguf_package(kind: str) -> None:
    raw = random_blocks(kind, 9, 1024)
    parts = parts_of(kind, raw)
    layout = Ggml(kind).layout((9, 1024))
    assert {name: (tuple(part.shape), part.dtype) for name, part in parts.items()} == layout
    assert same_bits(Ggml(kind).decode(parts), decoded(kind, raw))


@pytest.mark.parametrize("kind", WRITTEN)
def test_every_number_that_the_gguf_package_wrote_is_read(kind: str) -> None:
    draw = numpy.random.default_rng(1)
    weights = (draw.standard_normal((6, 512)) * 10.0 ** draw.integers(-7, 4, (6, 1))).astype(numpy.float32)
    raw = gguf.quants.quantize(weights, GGMLQuantizationType[kind.upper()])
    assert same_bits(Ggml(kind).decode(parts_of(kind, raw)), decoded(kind, raw))


def test_q4_0_is_int4_in_another_order() -> None:
    raw = random_blocks("q4_0", 5, 512)
    encoding, parts = repacked(Ggml("q4_0"), parts_of("q4_0", raw))
    assert encoding == Int4(32) and parts["scale"].dtype is torch.float16
    assert {name: tuple(part.shape) for name, part in parts.items()} == {
        name: shape for name, (shape, _) in Int4(32).layout((5, 512)).items()
    }
    assert same_bits(encoding.decode(parts), decoded("q4_0", raw))
    untouched = parts_of("q8_0", random_blocks("q8_0", 2, 64))
    assert repacked(Ggml("q8_0"), untouched) == (Ggml("q8_0"), untouched)


@pytest.fixture
def words_of_inductor() -> None:
    """What a product says to a compiler, as `Compiled` makes it known."""
    from torch._inductor import inductor_prims  # noqa: F401


@pytest.mark.usefixtures("words_of_inductor")
@pytest.mark.parametrize("rows", [1, 2, 9])
@pytest.mark.parametrize("kind", ["q4_0", "q8_0", "q4_k", "q6_k", "q3_k"])
def test_a_product_by_pieces_is_that_of_the_whole(kind: str, rows: int) -> None:
    """What a compiler is given: up to eight rows by a sum, more by a library."""
    parts = modest(kind, 12, 512)
    x = torch.randn(rows, 1, 512, generator=torch.Generator().manual_seed(0))
    y = product_by_pieces(x, Ggml(kind).pieces(parts))
    exact = x.double() @ Ggml(kind).decode(parts).double().T
    torch.testing.assert_close(y.double(), exact, atol=1e-5 * float(exact.abs().max()), rtol=1e-5)


@pytest.mark.usefixtures("words_of_inductor")
def test_a_compiled_product_is_that_of_the_whole() -> None:
    kinds = ("q8_0", "q4_k")
    held = {kind: modest(kind, 24, 512) for kind in kinds}
    x = torch.randn(2, 1, 512, generator=torch.Generator().manual_seed(0))

    def products(x: torch.Tensor) -> list[torch.Tensor]:
        return [Ggml(kind).product(x, held[kind]) for kind in kinds]

    for kind, y in zip(kinds, torch.compile(products, fullgraph=True)(x), strict=True):
        exact = x.double() @ Ggml(kind).decode(held[kind]).double().T
        torch.testing.assert_close(y.double(), exact, atol=1e-5 * float(exact.abs().max()), rtol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_a_cut_through_a_block_is_refused_with_its_numbers(kind: str) -> None:
    size = BLOCKS[kind][0]
    parts = modest(kind, 6, 4 * size)
    shape = (6, 4 * size)
    told = f"{kind} has blocks of {size} columns: columns 0 to {size + 16} of {4 * size} part one"
    with pytest.raises(ValueError, match=told):
        Ggml(kind).cut(parts, shape, (slice(0, 6), slice(0, size + 16)))
    one = modest(kind, 6, size)  # a row of one block: its scale has length 1, and is no row's scale all the same
    with pytest.raises(ValueError, match="part one"):
        Ggml(kind).cut(one, (6, size), (slice(0, 6), slice(0, size // 2)))


def test_columns_that_are_no_blocks_are_refused_and_nothing_is_encoded() -> None:
    with pytest.raises(ValueError, match="q4_k has blocks of 256 columns, which 128 columns are not"):
        Ggml("q4_k").layout((8, 128))
    with pytest.raises(ValueError, match="nothing is encoded as q4_k here"):
        Ggml("q4_k").encode(torch.ones(2, 256), torch.float32)


@pytest.mark.usefixtures("words_of_inductor")
@pytest.mark.parametrize("kind", ["q5_0", "q3_k", "iq4_xs"])
def test_a_compiler_is_given_no_constant_tensors(kind: str) -> None:
    """In a region of a graph, as `Compiled` makes of a block, inductor of torch 2.13 loses them."""
    parts = modest(kind, 6, 512)
    graphs: list[Any] = []
    torch._dynamo.reset()  # it counts what was compiled of this code

    def keep(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    x = torch.randn(1, 512, generator=torch.Generator().manual_seed(0))
    y = torch.compile(lambda x: Ggml(kind).product(x, parts), backend=keep, fullgraph=True)(x)
    (graph,) = graphs
    assert not [
        node for node in graph.graph.nodes if node.op == "get_attr" or "tensor" in str(node.target).split(".")[-1]
    ]
    exact = x.double() @ Ggml(kind).decode(parts).double().T
    torch.testing.assert_close(y.double(), exact, atol=1e-5 * float(exact.abs().max()), rtol=1e-5)
