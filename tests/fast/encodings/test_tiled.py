"""An encoding in tiles is the same matrix; a model on a CPU is built of such matrices, and one on kernels of ours is not."""

from __future__ import annotations

import pytest
import torch

from llama_fast.build import build
from llama_fast.caches.static import Static
from llama_fast.encodings import tiled
from llama_fast.encodings.int4 import Int4
from llama_fast.encodings.int8 import Int8
from llama_fast.encodings.tiled import Tiled, laid_in_tiles
from llama_fast.model.matrices import Stored
from llama_fast.plan import Plan
from llama_ref.checkpoint import random_checkpoint
from llama_ref.config import LlamaConfig
from llama_ref.model import Llama as Reference


def stored(kind: Int4, rows: int, columns: int) -> Stored:
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(rows))
    return Stored(kind, (rows, columns), kind.encode(weight, torch.float32), torch.ones(rows))


@pytest.mark.parametrize("kind", [Int4(32), Int4(128, True)], ids=lambda kind: kind.name)
@pytest.mark.parametrize("rows", [48, 50, 3])
def test_in_tiles_it_is_the_same_matrix(kind: Int4, rows: int) -> None:
    plain = stored(kind, rows, 256)
    laid = laid_in_tiles(plain)
    assert isinstance(laid.encoding, Tiled) and laid.encoding.name == kind.name and laid.bias is plain.bias
    assert torch.equal(laid.encoding.decode(laid.parts), kind.decode(plain.parts))
    ids = torch.tensor([[rows - 1, 0], [1, 2]])
    for dtype in (torch.float32, torch.bfloat16):
        assert torch.equal(laid.encoding.rows(ids, laid.parts, dtype), kind.rows(ids, plain.parts, dtype))
    x = torch.randn(2, 3, 256, generator=torch.Generator().manual_seed(0))
    y = laid.encoding.product(x, laid.parts)
    assert y.shape == (2, 3, rows)
    exact = x.double() @ kind.decode(plain.parts).double().T
    torch.testing.assert_close(y.double(), exact, atol=1e-4, rtol=1e-5)


def test_a_product_by_slices_ends_within_a_tile(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiled, "SLICE_NUMBERS", 40 * 128)  # 40 rows: two tiles and a half
    plain = stored(Int4(32), 75, 128)
    laid = laid_in_tiles(plain)
    x = torch.randn(2, 128, generator=torch.Generator().manual_seed(0))
    exact = x.double() @ plain.encoding.decode(plain.parts).double().T
    torch.testing.assert_close(laid.encoding.product(x, laid.parts).double(), exact, atol=1e-4, rtol=1e-5)


def test_what_has_no_loop_over_tiles_stays_as_it_is() -> None:
    plain = Stored(Int8(), (4, 64), Int8().encode(torch.ones(4, 64), torch.float32))
    assert laid_in_tiles(plain) is plain


def test_a_matrix_in_tiles_is_not_cut() -> None:
    laid = laid_in_tiles(stored(Int4(32), 48, 64))
    with pytest.raises(ValueError, match="int4-g32 in tiles is not cut"):
        laid.encoding.cut(laid.parts, laid.shape, (slice(0, 16), slice(None)))


@pytest.mark.parametrize("fuse", [False, True], ids=["apart", "joined"])
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_a_model_on_a_cpu_is_the_references_and_holds_a_tied_table_once(tied: bool, fuse: bool) -> None:
    config = LlamaConfig(64, 2, 4, 2, 16, 96, 101, 128, tie_embeddings=tied)
    plan = Plan(Int4(32), cache=Static(), fuse_projections=fuse)
    runner = build(random_checkpoint(config, 3), plan, "cpu")
    tokens_BT = torch.randint(101, (3, 12), generator=torch.Generator().manual_seed(1))
    expected = Reference(config, runner.reference_weights(), torch.float32)(tokens_BT)
    torch.testing.assert_close(runner.score(tokens_BT), expected, atol=5e-5, rtol=2e-5)
    head = runner.model.head
    assert isinstance(head.encoding, Tiled) and head.parts["weight"].shape == (112, 8)
    table = runner.model.embedding.parts["weight"]
    assert (table.data_ptr() == head.parts["weight"].data_ptr()) == tied
