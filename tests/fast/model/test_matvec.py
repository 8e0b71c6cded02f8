"""A product of rows and a matrix, by whichever way it is taken."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch._inductor.utils import run_and_get_code

from llama_fast.model import matvec
from llama_fast.model.matvec import product

pytestmark = pytest.mark.usefixtures("two_threads")


@pytest.mark.parametrize("shape", [(1, 96), (3, 96), (2, 2, 96), (2, 5, 96), (1, 1, 96), (40, 96)], ids=str)
@pytest.mark.parametrize("libraries", ["all", "onednn", "none"])
@pytest.mark.parametrize("threads", [1, 5, 7])
def test_rows_of_any_shape(
    shape: tuple[int, ...], libraries: str, threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """50 outputs are shared by five threads, and not by seven."""
    monkeypatch.setattr(matvec, "MKL", libraries == "all" and matvec.MKL)
    monkeypatch.setattr(matvec, "ONEDNN", libraries != "none" and matvec.ONEDNN)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    torch.manual_seed(0)
    x, weight, scale = torch.randn(shape), torch.randn(50, 96), torch.rand(50, 1) + 0.5
    wide = F.linear(x.double(), weight.double())
    with torch.no_grad():
        torch.testing.assert_close(product(x, weight).double(), wide, atol=1e-4, rtol=1e-5)
        torch.testing.assert_close(product(x, weight, scale).double(), wide * scale[:, 0], atol=1e-4, rtol=1e-5)
        # rows cut out of a larger tensor, and a matrix that does not begin where an allocation does
        columns, block, turned = (
            torch.randn(*shape[:-1], 100)[..., 2:98],
            torch.randn(60, 96)[7:57],
            torch.randn(96, 50).t(),
        )
        cut = F.linear(columns.double(), block.double())
        torch.testing.assert_close(product(columns, block).double(), cut, atol=1e-4, rtol=1e-5)
        wide = F.linear(columns.double(), turned.double())
        torch.testing.assert_close(product(columns, turned).double(), wide, atol=1e-4, rtol=1e-5)


def test_the_library_of_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its own product where it is right to take it, and not where a gradient or another type is asked for."""
    taken: list[str] = []
    library = F.linear

    def seen(*arguments: torch.Tensor) -> torch.Tensor:
        taken.append("F.linear")
        return library(*arguments)

    monkeypatch.setattr(F, "linear", seen)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    x, weight = torch.randn(9, 8), torch.randn(4, 8)
    with torch.no_grad():
        product(x, weight)
        assert taken == ([] if matvec.ONEDNN else ["F.linear"])
        taken.clear()
        product(x[:4], weight)
        assert taken == ([] if matvec.MKL or matvec.ONEDNN else ["F.linear"])
        product(x.double(), weight)
        product(x.bfloat16(), weight)
    taken.clear()
    leaf = weight.clone().requires_grad_()
    product(x, leaf).sum().backward()
    assert taken == ["F.linear"] and leaf.grad is not None


@pytest.mark.parametrize("by_words", [False, True])
def test_int8_compiled_however_its_weights_are_read(by_words: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two unequal rows; widths of whole words and vectors, of words alone, and of neither, which is read byte by byte."""
    from torch._inductor import inductor_prims  # noqa: F401 - as `Compiled` does

    monkeypatch.setattr(matvec, "BY_WORDS", by_words)
    torch.manual_seed(0)
    widths = (64, 20, 22) if by_words else (20,)
    x = [torch.randn(2, width) for width in widths]
    weight = [torch.randint(-128, 128, (5, width), dtype=torch.int8) for width in widths]
    scale = torch.rand(5, 1) + 0.5

    def all_of_them(x: list[torch.Tensor], weight: list[torch.Tensor]) -> list[torch.Tensor]:
        return [product(rows, matrix, scale) for rows, matrix in zip(x, weight)]

    with torch.no_grad():
        found, code = run_and_get_code(torch.compile(all_of_them, dynamic=False, fullgraph=True), x, weight)
    assert (" << " in "".join(code)) == by_words, "the way that was asked for"
    for y, rows, matrix in zip(found, x, weight, strict=True):
        wanted = rows.double() @ matrix.double().T * scale[:, 0]
        torch.testing.assert_close(y.double(), wanted, atol=1e-3, rtol=1e-5)
