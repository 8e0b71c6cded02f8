"""GGUF models whose matrices are kept as the file holds them: the decoded model's numbers, in the file's memory."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

from llama_fast.arithmetic.triton import Triton
from llama_fast.build import build
from llama_fast.encodings.dense import Dense
from llama_fast.encodings.ggml import DECODERS, Ggml
from llama_fast.encodings.int8 import Int8
from llama_fast.encodings.stored import AsStored
from llama_fast.model.roofline import stored_bytes
from llama_fast.parallel.tensor_parallel import TensorParallel
from llama_fast.plan import Plan
from llama_fast.recipes import chosen_encoding, encoding_named, fused, optimised
from llama_fast.weights import encode_one
from llama_ref.checkpoint import Checkpoint, CheckpointError, open_checkpoint
from llama_ref.models import DEFAULT_MODEL, resolve
from oracle.questions.cases import standard_case
from oracle.questions.judge import Bench, judge
from oracle.questions.localise import judge_weights
from oracle.questions.threads import judge_ranks
from oracle.subjects.fast import FastSubject
from oracle.verify import references
from tests.fast.encodings.test_ggml import decoded, random_blocks
from tests.ref.gguf_files import write_gguf

WIDTH, VOCABULARY, LAYERS = 256, 40, 2
SPREAD = 0.06
"""Standard deviation of a matrix's numbers, about 1 / sqrt(WIDTH)."""
IDS = torch.tensor([[5, 17, 3, 38], [9, 2, 33, 0]])
CPU = torch.device("cpu")


def blocks(kind: str, rows: int, columns: int) -> numpy.ndarray[Any, Any]:
    """Random blocks of a type, of numbers that are neither large nor small."""
    if kind == "mxfp4":
        return random_blocks(kind, rows, columns, ())
    spread = float(decoded(kind, random_blocks(kind, rows, columns, (1.0, -0.5))).std())
    return random_blocks(kind, rows, columns, (SPREAD / spread, -0.5 * SPREAD / spread))


def matrix(kind: str, rows: int, columns: int) -> Any:
    if kind in ("f32", "f16"):
        draw = numpy.random.default_rng(rows)
        return (draw.standard_normal((rows, columns)) * SPREAD).astype(
            numpy.float16 if kind == "f16" else numpy.float32
        )
    if kind == "bf16":
        drawn = torch.randn(rows, columns, generator=torch.Generator().manual_seed(rows)) * SPREAD
        return drawn.bfloat16().view(torch.uint8).numpy(), GGMLQuantizationType.BF16
    if kind == "iq2_xxs":
        size, count = GGML_QUANT_SIZES[GGMLQuantizationType.IQ2_XXS]
        return numpy.zeros((rows, columns // size * count), dtype=numpy.uint8), GGMLQuantizationType.IQ2_XXS
    return blocks(kind, rows, columns), GGMLQuantizationType[kind.upper()]


def model(path: Path, kind: str, others: Mapping[str, str] | None = None, ffn: int = 512, tied: bool = False) -> Path:
    """A GGUF of two blocks, every matrix of one type; `others` says which are of another."""
    tensors: dict[str, Any] = {}
    shapes = {"token_embd": (VOCABULARY, WIDTH)} | ({} if tied else {"output": (VOCABULARY, WIDTH)})
    for i in range(LAYERS):
        heads = {
            "attn_q": (WIDTH, WIDTH),
            "attn_k": (128, WIDTH),
            "attn_v": (128, WIDTH),
            "attn_output": (WIDTH, WIDTH),
        }
        mlp = {"ffn_gate": (ffn, WIDTH), "ffn_up": (ffn, WIDTH), "ffn_down": (WIDTH, ffn)}
        shapes |= {f"blk.{i}.{name}": shape for name, shape in (heads | mlp).items()}
        tensors |= {f"blk.{i}.{norm}.weight": numpy.ones(WIDTH, numpy.float32) for norm in ("attn_norm", "ffn_norm")}
    for name, shape in shapes.items():
        tensors[f"{name}.weight"] = matrix((others or {}).get(name, kind), *shape)
    tensors["output_norm.weight"] = numpy.ones(WIDTH, numpy.float32)
    metadata = {"llama.embedding_length": WIDTH, "llama.block_count": LAYERS, "llama.feed_forward_length": ffn}
    metadata |= {"llama.attention.head_count": 4, "llama.attention.head_count_kv": 2, "llama.context_length": 192}
    return write_gguf(path, metadata | {"llama.vocab_size": VOCABULARY}, tensors)


def logits(checkpoint: Checkpoint, plan: Plan) -> torch.Tensor:
    return build(checkpoint, plan, "cpu", torch.float32).score(IDS)


def close(ours: torch.Tensor, theirs: torch.Tensor) -> bool:
    return float((ours - theirs).abs().max()) < 2e-5 * float(theirs.abs().max())


@pytest.mark.parametrize("kind", DECODERS)
def test_a_model_kept_as_stored_computes_what_the_decoded_one_does(kind: str, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(model(tmp_path / "m.gguf", kind))
    assert checkpoint.default_encoding == "stored"
    dense, kept = (logits(checkpoint, optimised(encoding)) for encoding in (Dense(), AsStored()))
    assert dense.shape == (2, 4, VOCABULARY) and 0.1 < float(dense.std()) < 30
    assert not torch.equal(dense[0], dense[1]) and close(kept, dense)


@pytest.mark.parametrize("kind", ["q4_k", "q8_0"])
def test_what_is_held_are_the_bytes_of_the_file(kind: str, tmp_path: Path) -> None:
    path = model(tmp_path / "m.gguf", kind)
    runner = build(open_checkpoint(path), optimised(AsStored()), "cpu", torch.float32)
    columns, size = GGML_QUANT_SIZES[GGMLQuantizationType[kind.upper()]]
    numbers = 2 * VOCABULARY * WIDTH + LAYERS * (2 * WIDTH * WIDTH + 2 * 128 * WIDTH + 3 * 512 * WIDTH)
    norms = 4 * WIDTH * (2 * LAYERS + 1)
    assert stored_bytes(runner.model) == numbers // columns * size + norms
    assert numbers // columns * size <= path.stat().st_size


def test_a_file_of_several_types_joins_what_is_alike(tmp_path: Path) -> None:
    """As Q4_K_M files are: some of the values and the down projections are wider."""
    others = {"blk.0.attn_v": "q6_k", "blk.0.ffn_down": "q6_k", "output": "q6_k", "blk.1.ffn_up": "q5_k"}
    checkpoint = open_checkpoint(model(tmp_path / "m.gguf", "q4_k", others))
    runner = build(checkpoint, optimised(AsStored()), "cpu", torch.float32)
    names = [
        {module.encoding.name for module in block.modules() if hasattr(module, "encoding")}
        for block in runner.model.blocks
    ]
    assert names == [{"q4_k", "q6_k"}, {"q4_k", "q5_k"}]
    first, second = runner.model.blocks
    assert [type(joined).__name__ for joined in (first.qkv, first.gate_up)] == ["Separate", "Joined"]
    assert [type(joined).__name__ for joined in (second.qkv, second.gate_up)] == ["Joined", "Separate"]
    assert close(runner.score(IDS), logits(checkpoint, optimised()))
    assert str(runner.plan) == "stored · static · eager · whole · fused projections"


def test_tied_tables_are_held_once(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(model(tmp_path / "m.gguf", "q6_k", tied=True))
    runner = build(checkpoint, optimised(AsStored()), "cpu", torch.float32)
    table, head = runner.model.embedding.parts["weight"], runner.model.head.parts["weight"]
    assert table.data_ptr() == head.data_ptr() and table.dtype is torch.uint8
    assert close(runner.score(IDS), logits(checkpoint, optimised()))


def test_halves_beside_quantised_matrices_stay_halves(tmp_path: Path) -> None:
    others = {"output": "f16", "token_embd": "bf16", "blk.0.ffn_down": "f32"}
    checkpoint = open_checkpoint(model(tmp_path / "m.gguf", "q8_0", others))
    runner = build(checkpoint, optimised(AsStored()), "cpu", torch.float32)
    held = [runner.model.head, runner.model.embedding, runner.model.blocks[0].w2, runner.model.blocks[1].w2]
    assert [module.encoding.name for module in held] == ["f16", "bf16", "dense", "q8_0"]
    assert [module.parts["weight"].dtype for module in held[:2]] == [torch.float16, torch.bfloat16]
    assert close(runner.score(IDS), logits(checkpoint, optimised()))
    narrow = build(checkpoint, optimised(AsStored()), "cpu", torch.bfloat16)
    assert [module.encoding.name for module in (narrow.model.head, narrow.model.embedding)] == ["f16", "dense"]
    assert torch.isfinite(narrow.score(IDS)).all()


def test_a_file_of_floats_is_dense_by_default(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(model(tmp_path / "m.gguf", "f16"))
    assert (checkpoint.encoding, checkpoint.default_encoding) == ("dense", "dense")
    assert close(logits(checkpoint, optimised(AsStored())), logits(checkpoint, optimised()))


def test_the_default_model_is_decoded_unless_it_is_asked_for_as_stored() -> None:
    checkpoint = resolve(DEFAULT_MODEL).open()
    assert checkpoint.default_encoding == "dense" and checkpoint.stored is not None
    assert set(checkpoint.stored.encodings.values()) == {"q4_1", "q8_0"}


def test_our_kernels_take_a_file_decoded_unless_told_otherwise(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(model(tmp_path / "m.gguf", "q4_k"))
    assert [chosen_encoding(None, checkpoint, kernels).name for kernels in (False, True)] == ["stored", "dense"]
    assert chosen_encoding("int8", checkpoint, True) == Int8()
    with pytest.raises(ValueError, match=r"the fused kernels read no q4_k weights \(tok_embeddings\): take Compiled"):
        build(checkpoint, fused(AsStored()), "cpu")
    with pytest.raises(ValueError, match="the fused kernels need a CUDA device"):
        build(open_checkpoint(model(tmp_path / "read.gguf", "q4_0")), fused(AsStored()), "cpu")


def test_q4_0_is_int4_where_our_kernels_multiply(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(model(tmp_path / "m.gguf", "q4_0"))
    stem = "layers.1.feed_forward.w1"
    plain, kernels = (
        encode_one(checkpoint, stem, plan, torch.float32, CPU)
        for plan in (Plan(AsStored()), Plan(AsStored(), arithmetic=Triton(), fuse_projections=True))
    )
    assert (plain.encoding, kernels.encoding.name, kernels.encoding.loader) == (Ggml("q4_0"), "int4-g32", "int4")
    numbers = checkpoint.weights[f"{stem}.weight"][:]
    assert all(torch.equal(stored.encoding.decode(stored.parts), numbers) for stored in (plain, kernels))


def test_another_encoding_is_made_of_the_decoded_numbers(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(model(tmp_path / "m.gguf", "q4_k"))
    stored = encode_one(checkpoint, "layers.0.attention.wo", Plan(Int8()), torch.float32, CPU)
    wanted = Int8().encode(checkpoint.weights["layers.0.attention.wo.weight"][:], torch.float32)
    assert all(torch.equal(stored.parts[name], part) for name, part in wanted.items())


def test_a_type_that_is_only_decoded_is_refused_by_its_name(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(model(tmp_path / "m.gguf", "q8_0", {"blk.1.attn_k": "iq2_xxs"}))
    told = r"m\.gguf: layers\.1\.attention\.wk is stored as iq2_xxs, which is not multiplied as it is: take the encoding dense"
    with pytest.raises(CheckpointError, match=told):
        build(checkpoint, optimised(encoding_named(checkpoint.default_encoding)), "cpu")
    assert torch.isfinite(logits(checkpoint, optimised())).all()


def test_two_ranks_hold_whole_blocks_and_agree_with_the_oracle(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(
        model(tmp_path / "m.gguf", "q4_k", {"blk.0.attn_output": "q8_0", "blk.1.attn_output": "q5_0"})
    )
    plan = optimised(AsStored())
    bench = Bench(*references(build(checkpoint, plan, "cpu"), checkpoint))
    assert judge_ranks(checkpoint, plan, torch.float32, bench, 2).outcome.value == "AGREE"


def test_a_cut_through_a_block_is_refused_with_its_numbers(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(model(tmp_path / "m.gguf", "q4_k"))
    with pytest.raises(ValueError, match="q4_k has blocks of 256 columns: columns 0 to 128 of 256 part one"):
        build(checkpoint, Plan(AsStored(), shard=TensorParallel(0, 2)), "cpu")


def test_the_oracle_agrees_and_sees_a_decoder_that_is_wrong(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = open_checkpoint(model(tmp_path / "m.gguf", "q6_k"))
    runner = build(checkpoint, optimised(AsStored()), "cpu")
    case = standard_case(checkpoint.config.vocab_size, checkpoint.config.max_context)
    assert judge(FastSubject(runner), Bench(*references(runner, checkpoint)), case).outcome.value == "AGREE"
    original = {name: source[:] for name, source in checkpoint.weights.items()}
    assert judge_weights(runner.reference_weights(), original, 0.0).outcome.value == "AGREE"
    right = DECODERS["q6_k"]
    swapped = {**DECODERS, "q6_k": lambda fields: right({**fields, "scales": fields["scales"].flip(-1)})}
    monkeypatch.setattr("llama_fast.encodings.ggml.DECODERS", swapped)
    assert judge_weights(runner.reference_weights(), original, 0.0).outcome.value == "DIFFER"


def test_a_damaged_layout_is_refused_by_its_name(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(model(tmp_path / "m.gguf", "q8_0"))
    assert checkpoint.stored is not None
    weights = {name: source for name, source in checkpoint.stored.weights.items() if name != "output.scale"}
    short = Checkpoint(checkpoint.config, weights, tmp_path, "stored", checkpoint.stored.encodings)
    with pytest.raises(CheckpointError, match=r"1 missing: output\.scale"):
        build(short, optimised(AsStored()), "cpu")
