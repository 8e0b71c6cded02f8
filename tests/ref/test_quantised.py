"""Directories that other tools quantised: held in narrow parts that mean the file's own numbers, to the last bit."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from llama_fast.build import build
from llama_fast.parallel.tensor_parallel import TensorParallel
from llama_fast.plan import Plan
from llama_fast.recipes import encoding_named, fused
from llama_fast.weights import encoded
from llama_ref.checkpoint import Checkpoint, CheckpointError, open_checkpoint
from llama_ref.formats.huggingface import halve, huggingface_name, interleave, is_rotary
from llama_ref.formats.safetensors_files import StoredTensor
from llama_ref.weights import FLOATS, Key
from tests.ref.quantised_files import CONFIG, E4M3, KINDS, Drawn, ct, fp8, gptq, write, write_matrices


def decoded(checkpoint: Checkpoint, stem: str) -> Tensor:
    """A weight as it was stored, by its encoding."""
    names = [name for name in checkpoint.weights if name.rpartition(".")[0] == stem]
    parts = {name.rpartition(".")[2]: checkpoint.weights[name][:] for name in names}
    return encoding_named(checkpoint.encodings[stem]).decode(parts) if stem in checkpoint.encodings else parts["weight"]


def check(checkpoint: Checkpoint, exact: dict[str, Tensor]) -> None:
    """Every matrix is the file's, its q and k rows in pairs."""
    stems = [name.removesuffix(".weight") for name in checkpoint.weights if name.endswith(".weight")]
    assert len(stems) == 3 + 9 * CONFIG.n_layers
    for stem in stems:
        wanted = exact[huggingface_name(f"{stem}.weight").removesuffix(".weight")]
        if is_rotary(f"{stem}.weight"):
            wanted = interleave(wanted, CONFIG.head_dim)
        found = decoded(checkpoint, stem)
        assert found.shape == wanted.shape
        assert torch.equal(found.double(), wanted.double()), stem


@pytest.mark.parametrize("kind", KINDS)
def test_a_directory_of_another_tool_means_the_numbers_of_its_integers(tmp_path: Path, kind: str) -> None:
    exact = write(tmp_path, kind)
    checkpoint = open_checkpoint(tmp_path)
    assert checkpoint.encoding == KINDS[kind].encoding and len(checkpoint.encodings) == 7 * CONFIG.n_layers
    assert set(checkpoint.encodings.values()) <= {KINDS[kind].encoding, "int4-zero"}  # a row of 128 columns is a group
    check(checkpoint, exact)


RECORDED = Path(__file__).parent / "quantised" / "recorded.safetensors"
"""One matrix [32, 64] of each kind as its tool wrote it, and of what the tool decodes it to a digest, by
`tests/instruments/record_quantised.py`."""
RECORDED_MODULE = "model.layers.1.self_attn.k_proj"


def recorded() -> dict[str, dict[str, object]]:
    if not RECORDED.is_file():
        return {}
    with safe_open(RECORDED, "pt") as file:
        return {name: json.loads(fact) for name, fact in sorted(file.metadata().items())}  # of no order


def test_every_tool_is_recorded() -> None:
    tools = {str(fact["tool"]).split()[0] for fact in recorded().values()}
    assert tools == {"gptqmodel", "autoawq", "compressed-tensors", "torchao"} and len(recorded()) > 20


@pytest.mark.parametrize("case", recorded())
def test_what_a_tool_wrote_decodes_to_what_the_tool_decodes(tmp_path: Path, case: str) -> None:
    fact = recorded()[case]
    held = {
        name.partition("/")[2]: tensor for name, tensor in load_file(RECORDED).items() if name.startswith(f"{case}/")
    }

    def quantise(out: int, columns: int, generator: torch.Generator, name: str) -> tuple[dict[str, Tensor], Tensor]:
        return (held if name == RECORDED_MODULE else {}), torch.randn(out, columns, generator=generator)

    headers = {f"{RECORDED_MODULE}.weight": fact["header"]} if fact["header"] else {}
    write_matrices(tmp_path, fact["settings"], quantise, headers=headers)  # type: ignore[arg-type]
    checkpoint = open_checkpoint(tmp_path)
    stem = "layers.1.attention.wk"
    assert list(checkpoint.encodings) == [stem]
    matrix = halve(decoded(checkpoint, stem), CONFIG.head_dim)
    assert list(matrix.shape) == fact["shape"] and matrix.dtype is torch.float32
    assert hashlib.sha256(matrix.contiguous().numpy().tobytes()).hexdigest() == fact["sha256"]


@pytest.mark.parametrize("kind", ["gptq-order", "gptq-3", "awq", "ct-3-older", "ct-6", "ct-int8-zero", "ct-4-row"])
def test_a_slice_of_a_part_is_that_of_the_whole(tmp_path: Path, kind: str) -> None:
    write(tmp_path, kind)
    for name, source in open_checkpoint(tmp_path).weights.items():
        whole = source[:]
        assert tuple(whole.shape) == tuple(source.shape) and whole.dtype is source.dtype, name
        rows, columns = slice(5, 37), slice(1, max(2, whole.shape[-1] // 2))
        assert torch.equal(source[rows], whole[rows]), name
        if whole.dim() == 2:
            assert torch.equal(source[rows, columns], whole[rows, columns]), name


@pytest.mark.parametrize("kind", ["gptq", "gptq-order", "gptq-8-row", "ct-int8-zero"])
def test_it_computes_what_its_decoded_weights_do(tmp_path: Path, kind: str) -> None:
    """Through the optimised model with joined projections, against the same numbers as a dense checkpoint."""
    write(tmp_path, kind)
    checkpoint = open_checkpoint(tmp_path)
    plan = Plan(encoding_named(checkpoint.encoding))
    ids = torch.tensor([[5, 17, 3, 88], [9, 2, 44, 0]])
    runner = build(checkpoint, plan, "cpu")
    dense = Checkpoint(checkpoint.config, {name: tensor[:] for name, tensor in runner.reference_weights().items()})
    exact = build(dense, Plan(), "cpu").score(ids)
    assert exact.abs().max() > 0.1
    torch.testing.assert_close(runner.score(ids), exact, atol=2e-4, rtol=2e-4)


BLOCK = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [48, 32]}


@pytest.mark.parametrize(
    ("settings", "shape", "name", "encoding"),
    [
        (BLOCK, "blocks", "weight_scale_inv", "fp8-g32"),
        (BLOCK | {"weight_block_size": None}, "number", "weight_scale_inv", "fp8"),
        ({"quant_method": "fp8", "activation_scheme": "static"}, "tensor", "weight_scale", "fp8"),
        ({"quant_method": "fbgemm_fp8", "activation_scale_ub": 1200.0}, "rows", "weight_scale", "fp8"),
        ({"quant_method": "fbgemm_fp8"}, "vector", "weight_scale", "fp8"),
    ],
)
def test_fp8_with_each_kind_of_scales(tmp_path: Path, settings: dict, shape: str, name: str, encoding: str) -> None:  # type: ignore[type-arg]
    exact = write_matrices(tmp_path, settings, fp8(shape, name))  # type: ignore[arg-type]
    with pytest.warns(UserWarning, match="weights alone are of few bits"):
        checkpoint = open_checkpoint(tmp_path)
    assert set(checkpoint.encodings.values()) == {encoding}
    assert checkpoint.weights["layers.0.attention.wq.weight"].dtype is E4M3
    check(checkpoint, exact)


def mixed(tmp_path: Path) -> dict[str, Tensor]:
    """Layer 0's q in 8 bits, its o as it was, all else in 4 bits."""
    wide, plain = "model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.o_proj"
    of_8, exact = write(tmp_path / "8", "ct-8"), write(tmp_path / "4", "ct-4")
    exact |= {wide: of_8[wide], plain: torch.randn(64, 64)}
    four, eight = (load_file(tmp_path / bits / "model.safetensors") for bits in ("4", "8"))
    stored = {name: tensor for name, tensor in four.items() if not name.startswith((wide, plain))}
    stored |= {name: tensor for name, tensor in eight.items() if name.startswith(wide)}
    stored[f"{plain}.weight"] = exact[plain]
    settings = ct(
        KINDS["ct-4"].settings["config_groups"]["group_0"]["weights"], "mixed-precision", ignore=["lm_head", plain]
    )
    settings["config_groups"]["group_0"]["format"] = "pack-quantized"
    settings["config_groups"]["wide"] = {
        "targets": ["re:.*layers.0.*q_proj"],
        "weights": KINDS["ct-8"].settings["config_groups"]["group_0"]["weights"],
        "format": "pack-quantized",
    }
    save_file(stored, tmp_path / "4" / "model.safetensors")
    config = json.loads((tmp_path / "4" / "config.json").read_text()) | {"quantization_config": settings}
    (tmp_path / "4" / "config.json").write_text(json.dumps(config))
    return exact


def test_a_file_may_mix_schemes_and_a_layer_of_two_is_multiplied_one_by_one(tmp_path: Path) -> None:
    exact = mixed(tmp_path)
    checkpoint = open_checkpoint(tmp_path / "4")
    assert checkpoint.encodings["layers.0.attention.wq"] == "int8-g32" != checkpoint.encoding == "int4-g32"
    assert "layers.0.attention.wo" not in checkpoint.encodings
    check(checkpoint, exact)
    ids = torch.tensor([[5, 17, 3], [9, 2, 44]])
    apart = build(checkpoint, Plan(encoding_named("int4-g32")), "cpu").score(ids)
    with pytest.warns(
        UserWarning, match="1 groups of projections are not joined .* layers.0: stored as int8-g32, int4-g32"
    ):
        joined = build(checkpoint, Plan(encoding_named("int4-g32"), fuse_projections=True), "cpu").score(ids)
    torch.testing.assert_close(apart, joined)


def test_orders_that_differ_are_not_joined_and_one_order_is(tmp_path: Path) -> None:
    write(tmp_path, "gptq-order")
    checkpoint = open_checkpoint(tmp_path)
    plan = Plan(encoding_named(checkpoint.encoding), fuse_projections=True)
    with pytest.warns(UserWarning, match="4 groups of projections .* layers.0: with columns in orders that differ"):
        build(checkpoint, plan, "cpu")
    same = checkpoint.weights["layers.0.attention.wq.order"]
    orders = {name: same for name in checkpoint.weights if name.endswith(".order") and "w2" not in name}
    one = Checkpoint(
        checkpoint.config, {**checkpoint.weights, **orders}, None, checkpoint.encoding, checkpoint.encodings
    )
    ids = torch.tensor([[5, 17, 3], [9, 2, 44]])
    apart = build(one, Plan(plan.encoding), "cpu").score(ids)
    torch.testing.assert_close(build(one, plan, "cpu").score(ids), apart, atol=1e-5, rtol=1e-5)


def test_zero_points_that_are_all_the_middle_are_not_held(tmp_path: Path) -> None:
    """And where a file that says it is symmetric has another, it is held: the file's numbers are right."""
    write(tmp_path, "gptq-sym")
    assert open_checkpoint(tmp_path).encoding == "int4-g64"
    stored = load_file(tmp_path / "model.safetensors")
    stored["model.layers.1.mlp.up_proj.qzeros"][0, 0] -= 1
    save_file(stored, tmp_path / "model.safetensors", metadata={"format": "pt"})
    checkpoint = open_checkpoint(tmp_path)
    assert [stem for stem, name in checkpoint.encodings.items() if name == "int4-g64-zero"] == [
        "layers.1.feed_forward.w3"
    ]


def test_a_zero_of_nothing_in_the_first_version_borrows_from_its_neighbour(tmp_path: Path) -> None:
    """gptqmodel takes 0x11111111 off the word when it saves [0, 8, 8, ...], and adds it when it loads: we do too."""
    write(tmp_path, "gptq")
    stored = load_file(tmp_path / "model.safetensors")
    name = "model.layers.0.mlp.up_proj.qzeros"
    stored[name][0, 0] = 0x7777777F - 0x10  # 15, 6, 7, 7, ...
    save_file(stored, tmp_path / "model.safetensors", metadata={"format": "pt"})
    zero = open_checkpoint(tmp_path).weights["layers.0.feed_forward.w3.zero"]
    assert zero[0:8, 0:1].flatten().tolist() == [0, 8, 8, 8, 8, 8, 8, 8]


def test_a_bias_of_zeros_that_the_model_has_not_is_left_out(tmp_path: Path) -> None:
    exact = write(tmp_path, "gptq")
    stored = load_file(tmp_path / "model.safetensors")
    stored["model.layers.0.mlp.up_proj.bias"] = torch.zeros(128).half()
    save_file(stored, tmp_path / "model.safetensors", metadata={"format": "pt"})
    check(open_checkpoint(tmp_path), exact)
    stored["model.layers.0.mlp.up_proj.bias"][3] = 1.0
    save_file(stored, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"1 extra: model\.layers\.0\.mlp\.up_proj\.bias"):
        open_checkpoint(tmp_path)


def change(
    directory: Path, settings: dict[str, object], more: dict[str, Tensor] | None = None, without: str = ""
) -> None:
    """Change entries of `quantization_config`, and tensors."""
    config = json.loads((directory / "config.json").read_text())
    config["quantization_config"] |= settings
    (directory / "config.json").write_text(json.dumps(config))
    with safe_open(directory / "model.safetensors", "pt") as file:
        metadata = file.metadata()
    stored = load_file(directory / "model.safetensors") | (more or {})
    stored.pop(without, None)
    save_file(stored, directory / "model.safetensors", metadata=metadata)


Q = "model.layers.0.self_attn.q_proj"


@pytest.mark.parametrize(
    ("kind", "settings", "told"),
    [
        ("gptq", {"checkpoint_format": "marlin"}, "config.json: quantization_config: checkpoint_format='marlin' is not"),
        ("gptq", {"checkpoint_format": "gptq_p"}, "checkpoint_format='gptq_p' is not supported"),
        ("gptq", {"pack_dtype": "int16"}, "pack_dtype='int16' is not supported"),
        ("gptq", {"quant_method": "hqq"}, r"quantization_config=\{'quant_method': 'hqq', .* is not supported"),
        ("gptq", {"quant_method": "bitsandbytes"}, "'bitsandbytes', .* is not supported"),
        ("awq", {"version": "gemv"}, "version='gemv' is not supported"),
        ("awq", {"bits": 8}, "bits=8 is not supported"),
        ("ct-4", {"format": "marlin-24"}, "format='marlin-24' is not supported"),
        ("ct-4", {"format": "nvfp4-pack-quantized"}, "format='nvfp4-pack-quantized' is not supported"),
        ("ct-4", {"sparsity_config": {"format": "sparse-24-bitmask"}}, "sparsity_config=.* is not supported"),
        ("ct-4", {"transform_config": {"config_groups": {}}}, "transform_config=.* is not supported"),
        ("ct-4", {"ignore": ["re:.*q_proj"]}, f"{Q} is stored in parts, and no config group names it"),
        ("ct-4", {"ignore": ["re:(("]}, r"'re:\(\(' is no pattern"),
        ("ct-4", {"config_groups": {"g": {"targets": ["Linear"], "weights": {"num_bits": 4, "strategy": "tensor_group"}}}},
         "strategy='tensor_group' is not supported"),
    ],
)  # fmt: skip
def test_what_is_not_supported_is_refused_by_its_name(
    tmp_path: Path, kind: str, settings: dict[str, object], told: str
) -> None:
    write(tmp_path, kind)
    change(tmp_path, settings)
    with pytest.raises(CheckpointError, match=told) as refusal:
        open_checkpoint(tmp_path)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    ("kind", "more", "without", "told"),
    [
        ("gptq", {}, f"{Q}.scales", f"1 missing: {Q}.scales"),
        ("gptq", {}, f"{Q}.qzeros", f"1 missing: {Q}.qzeros"),
        ("gptq", {f"{Q}.qweight": torch.zeros(7, 64, dtype=torch.int32)}, "", f"{Q}.qweight has 7 rows of words for 64"),
        ("gptq", {f"{Q}.qweight": torch.zeros(8, 32, dtype=torch.int32)}, "", r"qweight is \[8, 32\], not \[8, 64\]"),
        ("gptq", {f"{Q}.qweight": torch.zeros(8, 64)}, "", "qweight is stored as float32, not as int32"),
        ("gptq", {f"{Q}.g_idx": torch.full((64,), 2, dtype=torch.int32)}, "", "g_idx names a group that is none of 2"),
        ("gptq", {f"{Q}.g_idx": torch.arange(64).int() % 2 * (torch.arange(64).int() > 4)}, "", "groups divide into 2 columns"),
        ("gptq", {"model.layers.0.self_attn.x": torch.zeros(2)}, "", "1 extra: model.layers.0.self_attn.x"),
        ("gptq", {f"{Q}.weight": torch.zeros(64, 64)}, "", f"{Q} is stored twice"),
        ("ct-4", {}, f"{Q}.weight_shape", f"1 missing: {Q}.weight_shape"),
        ("ct-4", {f"{Q}.weight_shape": torch.tensor([64, 63])}, "", r"weight_shape is \[64, 63\], not \[64, 64\]"),
        ("ct-4", {f"{Q}.weight_scale": torch.ones(64, 3)}, "", r"weight_scale is \[64, 3\], not \[64, 2\]"),
        ("ct-4-zero", {}, f"{Q}.weight_zero_point", f"1 missing: {Q}.weight_zero_point"),
        ("awq", {f"{Q}.qzeros": torch.zeros(2, 9, dtype=torch.int32)}, "", r"qzeros is \[2, 9\], not \[2, 8\]"),
        ("torchao-intx", {f"{Q}._weight_scale": torch.ones(64, 4)}, "", r"_weight_scale is \[64, 4\], not \[64, 2\]"),
    ],
)  # fmt: skip
def test_what_is_damaged_is_refused_when_the_directory_is_opened(
    tmp_path: Path, kind: str, more: dict[str, Tensor], without: str, told: str
) -> None:
    write(tmp_path, kind)
    change(tmp_path, {}, more, without)
    with pytest.raises(CheckpointError, match=told) as refusal:
        open_checkpoint(tmp_path)
    assert "\n" not in str(refusal.value)


def test_an_integer_outside_its_bits_is_refused_when_it_is_read(tmp_path: Path) -> None:
    write(tmp_path, "torchao-intx")
    change(tmp_path, {}, {f"{Q}._weight_qdata": torch.full((64, 64), 9, dtype=torch.int8)})
    with pytest.raises(CheckpointError, match="q_proj: holds an integer outside of -8 to 7"):
        open_checkpoint(tmp_path).weights["layers.0.attention.wq.weight"][:]


def test_what_rounds_activations_or_keys_is_said_once(tmp_path: Path) -> None:
    exact = write(tmp_path, "ct-int8")
    groups = KINDS["ct-int8"].settings["config_groups"]
    groups = {"group_0": groups["group_0"] | {"input_activations": {"num_bits": 8, "dynamic": True}}}
    scales = {"model.layers.0.self_attn.k_scale": torch.ones(1), f"{Q}.input_scale": torch.ones(1)}
    change(tmp_path, {"config_groups": groups}, scales)
    with pytest.warns(UserWarning) as told:
        check(open_checkpoint(tmp_path), exact)
    assert len(told) == 1 and "input_activations, kv_cache_scheme: here weights alone" in str(told[0].message)


def test_a_base_model_of_another_tool_is_found_under_its_shorter_names(tmp_path: Path) -> None:
    exact = write(tmp_path, "gptq", CONFIG)
    stored = load_file(tmp_path / "model.safetensors")
    save_file({name.removeprefix("model."): tensor for name, tensor in stored.items()}, tmp_path / "model.safetensors")
    check(open_checkpoint(tmp_path), exact)


def test_a_head_in_few_bits_is_held_so_and_serves_a_tied_model_as_its_table(tmp_path: Path) -> None:
    drawn = Drawn(104, 64, 4, 32, torch.Generator().manual_seed(1))
    tied = dataclasses.replace(CONFIG, vocab_size=104)
    exact = write(tmp_path, "gptq-v2", tied)
    head = {f"lm_head.{part}": tensor for part, tensor in gptq(drawn, 2).items()}
    change(tmp_path, {}, head, "lm_head.weight")
    checkpoint = open_checkpoint(tmp_path)
    assert checkpoint.encodings["output"] == "int4-g32-zero"
    check(checkpoint, exact | {"lm_head": drawn.exact})
    config = json.loads((tmp_path / "config.json").read_text()) | {"tie_word_embeddings": True}
    (tmp_path / "config.json").write_text(json.dumps(config))
    change(tmp_path, {}, {}, "model.embed_tokens.weight")
    checkpoint = open_checkpoint(tmp_path)
    assert checkpoint.encodings["tok_embeddings"] == "int4-g32-zero" and "output" not in checkpoint.encodings
    ids = torch.tensor([[5, 17, 3], [9, 2, 44]])
    rows = build(checkpoint, Plan(encoding_named("int4-g32-zero")), "cpu").model.embedding(ids)
    assert torch.equal(rows.double(), drawn.exact[ids])


def test_all_weights_stay_narrow_and_no_row_is_read_for_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A rank's rows are read alone: of the words of 4 bits, those of its rows."""
    write(tmp_path, "gptq")
    checkpoint = open_checkpoint(tmp_path)
    assert all(
        tensor.dtype not in FLOATS or name.endswith((".scale", "norm.weight")) or not name.startswith("layers")
        for name, tensor in checkpoint.weights.items()
    )
    taken = []
    read = StoredTensor.__getitem__

    def watched(self: StoredTensor, key: Key) -> Tensor:
        taken.append((self.shape, key))
        return read(self, key)

    monkeypatch.setattr(StoredTensor, "__getitem__", watched)
    checkpoint.weights["layers.0.feed_forward.w1.weight"][32:48]
    assert taken == [((8, 128), (slice(0, 8), slice(32, 48)))]


@pytest.mark.parametrize("kind", ["gptq", "awq", "ct-8", "ct-int8-zero"])
def test_the_shares_of_two_ranks_decode_to_the_whole(tmp_path: Path, kind: str) -> None:
    write(tmp_path, kind)
    checkpoint = open_checkpoint(tmp_path)
    plans = [Plan(encoding_named(checkpoint.encoding), shard=TensorParallel(rank, 2)) for rank in range(2)]
    shares = [dict(encoded(checkpoint, plan, None, torch.device("cpu"))) for plan in plans]
    for stem in checkpoint.encodings:
        first, second = (share[stem].encoding.decode(share[stem].parts) for share in shares)
        axis = 1 if stem.endswith((".wo", ".w2")) else 0
        assert torch.equal(torch.cat([first, second], axis), decoded(checkpoint, stem)), stem


def test_columns_in_any_order_are_not_cut_over_ranks(tmp_path: Path) -> None:
    write(tmp_path, "gptq-order")
    checkpoint = open_checkpoint(tmp_path)
    plan = Plan(encoding_named(checkpoint.encoding), shard=TensorParallel(0, 2))
    with pytest.raises(
        ValueError, match=r"layers\.0\.attention\.wo, stored as int4-g32-zero-order: columns 0 to 32 of 64 part 2"
    ):
        dict(encoded(checkpoint, plan, None, torch.device("cpu")))


def test_the_fused_kernels_refuse_a_matrix_that_they_do_not_read(tmp_path: Path) -> None:
    """Also where the encoding of most of the file is one that they do."""
    mixed(tmp_path)
    with pytest.raises(ValueError, match="the fused kernels read no int8-g32 weights"):
        build(open_checkpoint(tmp_path / "4"), fused(encoding_named("int4-g32")), "cpu")
