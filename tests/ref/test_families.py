"""Every family x RoPE kind x layout: logits and greedy tokens as `transformers` has them on the same random weights.

The layouts are written here by other means than the readers': `save_pretrained` for Hugging Face's, and Meta's,
gpt-fast's and GGUF's by their own published rules on the state dict.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from llama_fast import build
from llama_fast.encodings.int8 import Int8
from llama_fast.engine.generate import generate
from llama_fast.recipes import encoding_named, optimised
from llama_fast.weights import encoded
from llama_ref.checkpoint import open_checkpoint, save_checkpoint
from llama_ref.convert import convert
from llama_ref.model import Llama as Reference

CONTEXT, NEW_TOKENS = 64, 8
FAMILIES: dict[str, dict[str, Any]] = {
    "llama-1": {"num_key_value_heads": 4, "rms_norm_eps": 1e-6},
    "llama-2": {"rms_norm_eps": 1e-5},
    "code-llama": {"rope_theta": 1e6, "vocab_size": 107},
    "llama-3": {"rope_theta": 5e5, "num_attention_heads": 8, "eos_token_id": [3, 5]},
    "llama-3.2": {"rope_theta": 5e5, "tie_word_embeddings": True, "head_dim": 16},
    "tinyllama": {"num_attention_heads": 8, "num_key_value_heads": 1},
    "smollm2": {"hidden_size": 36, "num_attention_heads": 9, "num_key_value_heads": 3, "tie_word_embeddings": True},
    "yi": {"rope_theta": 5e6, "rms_norm_eps": 1e-6, "pretraining_tp": 1},
    "biased": {"attention_bias": True, "mlp_bias": True, "head_dim": 12},
    "mistral-0.1": {"model_type": "mistral", "sliding_window": 9, "head_dim": 16},
    "mistral-0.3": {"model_type": "mistral", "sliding_window": None, "rope_theta": 1e6},
}
ROPES: dict[str, dict[str, Any]] = {
    "default": {"rope_type": "default"},
    "linear": {"rope_type": "linear", "factor": 3.0},
    "dynamic": {"rope_type": "dynamic", "factor": 2.0},
    "llama3": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
    },
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16, "beta_fast": 4.0},
}


@dataclass(frozen=True)
class Witness:
    """A model of transformers, what it says, and the directory that it saved."""

    directory: Path
    state: dict[str, Tensor]
    rows: list[list[int]]
    logits: list[Tensor]
    tokens: list[list[int]]


def family_config(family: str, rope: str) -> Any:
    from transformers import LlamaConfig, MistralConfig

    fields: dict[str, Any] = {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 48,
        "vocab_size": 101,
        "max_position_embeddings": CONTEXT,
        "initializer_range": 0.3,
    } | FAMILIES[family]
    theta, kind = fields.pop("rope_theta", 10000.0), fields.pop("model_type", "llama")
    rotary = {**ROPES[rope], "rope_theta": theta}
    return (MistralConfig if kind == "mistral" else LlamaConfig)(**fields, rope_parameters=rotary)


def make_witness(family: str, rope: str, directory: Path) -> Witness:
    from transformers import AutoModelForCausalLM

    torch.manual_seed(len(family) * 31 + len(rope))
    model = AutoModelForCausalLM.from_config(family_config(family, rope), attn_implementation="eager").eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():  # biases start at 0 and norms at 1, which would hide a fault
            if parameter.ndim == 1:
                parameter.add_(0.2 * torch.randn_like(parameter))
            assert parameter.std() > 0.05, name
    model.save_pretrained(directory)
    rows = [torch.randint(0, 101, (length,)).tolist() for length in (48, 21)]
    return Witness(directory, dict(model.state_dict()), rows, *answers(model, rows))


@torch.no_grad()
def answers(model: Any, rows: list[list[int]]) -> tuple[list[Tensor], list[list[int]]]:
    """Logits of each row, and a greedy continuation of each, alone."""
    logits, tokens = [], []
    for row in rows:
        ids = torch.tensor([row])
        logits.append(model(ids).logits[0])
        done = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=NEW_TOKENS,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )
        tokens.append(done[0, len(row) :].tolist())
    return logits, tokens


@pytest.fixture(scope="module")
def witness_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], Witness]:
    known: dict[tuple[str, str], Witness] = {}

    def give(family: str, rope: str) -> Witness:
        if (family, rope) not in known:
            known[family, rope] = make_witness(family, rope, tmp_path_factory.mktemp(f"{family}-{rope}"))
        return known[family, rope]

    return give


# --- layouts --------------------------------------------------------------------------------------


def as_is(witness: Witness, to: Path) -> Path:
    return witness.directory


def sharded(witness: Witness, to: Path) -> Path:
    from transformers import AutoModelForCausalLM

    AutoModelForCausalLM.from_pretrained(witness.directory).save_pretrained(to, max_shard_size="20KB")
    assert len(list(to.glob("*.safetensors"))) > 1
    return to


def pickled(witness: Witness, to: Path) -> Path:
    copy_config(witness, to)
    torch.save(witness.state, to / "pytorch_model.bin")
    return to


def pickled_shards(witness: Witness, to: Path) -> Path:
    copy_config(witness, to)
    places = {}
    for number in range(3):
        part = {name: tensor for i, (name, tensor) in enumerate(witness.state.items()) if i % 3 == number}
        torch.save(part, to / f"pytorch_model-{number}.bin")
        places |= dict.fromkeys(part, f"pytorch_model-{number}.bin")
    (to / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": places}))
    return to


META_NAMES = {
    "model.embed_tokens": "tok_embeddings",
    "model.norm": "norm",
    "lm_head": "output",
    "input_layernorm": "attention_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attention.wq",
    "self_attn.k_proj": "attention.wk",
    "self_attn.v_proj": "attention.wv",
    "self_attn.o_proj": "attention.wo",
    "mlp.gate_proj": "feed_forward.w1",
    "mlp.down_proj": "feed_forward.w2",
    "mlp.up_proj": "feed_forward.w3",
}


def meta_state(witness: Witness) -> dict[str, Tensor]:
    """Row by row: Meta's rows 2i and 2i + 1 of a head are Hugging Face's rows i and i + half."""
    config = json.loads((witness.directory / "config.json").read_text())
    d = config["head_dim"]
    order = torch.tensor([i // 2 + (i % 2) * (d // 2) for i in range(d)])
    state = {}
    for name, tensor in witness.state.items():
        for theirs, ours in META_NAMES.items():
            if theirs in name:
                name = name.replace(theirs, ours).removeprefix("model.")
                break
        if ".wq." in name or ".wk." in name:
            tensor = torch.cat([head[order] for head in tensor.split(d)])
        state[name] = tensor.clone()
    return state


def meta_shards(witness: Witness, to: Path, cut_vocabulary: bool) -> Path:
    """Two ranks of Meta's model-parallel group, with the rank-independent config beside them."""
    copy_config(witness, to)
    state = meta_state(witness)
    if json.loads((to / "config.json").read_text())["tie_word_embeddings"]:
        assert torch.equal(state["output.weight"], state["tok_embeddings.weight"])
    for rank in range(2):
        part = {"rope.freqs": torch.ones(4)}
        for name, tensor in state.items():
            by_columns = name.endswith(("wo.weight", "w2.weight")) or (name.startswith("tok") and not cut_vocabulary)
            if tensor.ndim == 1 and (name.endswith("norm.weight") or "wo.bias" in name or "w2.bias" in name):
                part[name] = tensor
            else:
                part[name] = tensor.tensor_split(2, int(by_columns))[rank].clone()
        torch.save(part, to / f"consolidated.{rank:02d}.pth")
    return to


def meta_llama2(witness: Witness, to: Path) -> Path:
    return meta_shards(witness, to, cut_vocabulary=False)


def meta_llama3(witness: Witness, to: Path) -> Path:
    return meta_shards(witness, to, cut_vocabulary=True)


def gpt_fast(witness: Witness, to: Path) -> Path:
    """One matrix for q, k and v, in a file of the old format (not a zip)."""
    copy_config(witness, to)
    state = meta_state(witness)
    for name in [name for name in state if ".wq." in name]:
        parts = [state.pop(name.replace("wq", part)) for part in ("wq", "wk", "wv")]
        state[name.replace("wq", "wqkv")] = torch.cat(parts)
    torch.save(state, to / "model.pth", _use_new_zipfile_serialization=False)
    return to


def converted(witness: Witness, to: Path) -> Path:
    """By our own `convert`, to Meta's layout and back; only what params.json can say goes that way."""
    try:
        convert(witness.directory, to / "meta", "meta")
    except ValueError as error:
        assert "params.json" in str(error)
        convert(witness.directory, to / "meta", "hf")
    convert(to / "meta", to / "back", "hf")
    return to / "back"


def ours(witness: Witness, to: Path) -> Path:
    checkpoint = open_checkpoint(witness.directory)
    save_checkpoint(to / "ours", checkpoint.config, checkpoint.weights)
    return to / "ours"


def gguf(witness: Witness, to: Path) -> Path | None:
    """None where GGUF, or our reader of it, has no such model."""
    from gguf import GGUFWriter

    config = json.loads((witness.directory / "config.json").read_text())
    rope = config["rope_parameters"]
    if rope["rope_type"] not in ("default", "linear") or config.get("sliding_window") is not None:
        return None
    writer = GGUFWriter(to / "model.gguf", "llama")
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_key_length(config["head_dim"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(rope["rope_theta"])
    writer.add_vocab_size(config["vocab_size"])
    if rope["rope_type"] == "linear":
        writer.add_string("llama.rope.scaling.type", "linear")
        writer.add_float32("llama.rope.scaling.factor", rope["factor"])
    names = {
        "tok_embeddings": "token_embd",
        "attention_norm": "attn_norm",
        "attention.wq": "attn_q",
        "attention.wk": "attn_k",
        "attention.wv": "attn_v",
        "attention.wo": "attn_output",
        "feed_forward.w1": "ffn_gate",
        "feed_forward.w2": "ffn_down",
        "feed_forward.w3": "ffn_up",
    }
    for name, tensor in meta_state(witness).items():
        if name == "output.weight" and config["tie_word_embeddings"]:
            continue
        if name == "norm.weight":
            name = "output_norm.weight"
        for canonical, theirs in names.items():
            name = name.replace(canonical, theirs)
        writer.add_tensor(name.replace("layers.", "blk."), tensor.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return to


def copy_config(witness: Witness, to: Path) -> None:
    (to / "config.json").write_text((witness.directory / "config.json").read_text())


LAYOUTS: dict[str, Callable[[Witness, Path], Path | None]] = {
    layout.__name__.replace("_", "-"): layout
    for layout in (
        *(as_is, sharded, pickled, pickled_shards, meta_llama2, meta_llama3),
        *(gpt_fast, converted, ours, gguf),
    )
}


# --- the matrix -----------------------------------------------------------------------------------


def far(ours: Tensor, theirs: Tensor) -> float:
    """The largest difference, as a share of the logits' own size."""
    assert ours.shape == theirs.shape
    return float((ours - theirs).abs().max() / theirs.square().mean().sqrt())


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("rope", ROPES)
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_and_greedy_tokens_are_those_of_transformers(
    family: str, rope: str, layout: str, witness_of: Callable[[str, str], Witness], tmp_path: Path
) -> None:
    witness = witness_of(family, rope)
    path = LAYOUTS[layout](witness, tmp_path)
    if path is None:
        return  # the format has no such model: nothing to compare, and test_what_gguf_cannot_say counts them
    checkpoint = open_checkpoint(path)
    runner = build(checkpoint, optimised(), "cpu", torch.float32)
    for row, logits in zip(witness.rows, witness.logits, strict=True):
        assert far(runner.score(torch.tensor([row]))[0], logits) < 1e-4
    together = generate(runner, witness.rows, NEW_TOKENS)
    assert [completion.tokens for completion in together.completions] == witness.tokens


@pytest.mark.parametrize("rope", ROPES)
@pytest.mark.parametrize("family", FAMILIES)
def test_the_references_logits_are_those_of_transformers(
    family: str, rope: str, witness_of: Callable[[str, str], Witness]
) -> None:
    witness = witness_of(family, rope)
    checkpoint = open_checkpoint(witness.directory)
    reference = Reference(checkpoint.config, checkpoint.weights, torch.float32)
    for row, logits in zip(witness.rows, witness.logits, strict=True):
        assert far(reference(torch.tensor([row]))[0], logits) < 1e-4


@pytest.mark.parametrize("rope", ROPES)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_quantised_directory_answers_as_transformers_on_its_decoded_weights(
    family: str, rope: str, witness_of: Callable[[str, str], Witness], tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM

    witness = witness_of(family, rope)
    original = open_checkpoint(witness.directory)
    parts = {
        f"{stem}.{part}": tensor
        for stem, several in encoded(original, optimised(Int8()), None, torch.device("cpu"))
        for part, tensor in several.items()
    }
    assert sum(tensor.dtype == torch.int8 for tensor in parts.values()) == 2 * 7 + 1
    save_checkpoint(tmp_path / "int8", original.config, parts, "int8")
    checkpoint = open_checkpoint(tmp_path / "int8")
    runner = build(checkpoint, optimised(encoding_named(checkpoint.encoding)), "cpu", torch.float32)
    save_checkpoint(tmp_path / "decoded", original.config, runner.reference_weights())
    assert convert(tmp_path / "decoded", tmp_path / "hf", "hf") == "hf"
    copy_config(witness, tmp_path / "hf")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", attn_implementation="eager").eval()
    logits, tokens = answers(model, witness.rows)
    for row, theirs in zip(witness.rows, logits, strict=True):
        assert far(runner.score(torch.tensor([row]))[0], theirs) < 1e-4
    assert [done.tokens for done in generate(runner, witness.rows, NEW_TOKENS).completions] == tokens


def test_what_gguf_cannot_say(witness_of: Callable[[str, str], Witness], tmp_path: Path) -> None:
    """The cells of the matrix that hold nothing: three RoPE kinds everywhere, and the windowed family."""
    empty = 0
    for family in FAMILIES:
        for rope in ROPES:
            to = tmp_path / f"{family}-{rope}"
            to.mkdir()
            empty += gguf(witness_of(family, rope), to) is None
    assert empty == 3 * len(FAMILIES) + 2


@pytest.mark.parametrize(
    ("change", "least"),
    [
        ({"rope_theta": 10001.0 * 1.01}, 1e-4),
        ({"window": None}, 1e-2),
    ],
)
def test_the_matrix_sees_a_small_fault(
    change: dict[str, Any], least: float, witness_of: Callable[[str, str], Witness]
) -> None:
    """The tolerance is not so wide that another theta or a window left out would pass."""
    import dataclasses

    witness = witness_of("mistral-0.1", "default")
    checkpoint = open_checkpoint(witness.directory)
    wrong = dataclasses.replace(checkpoint.config, **change)
    assert wrong != checkpoint.config
    logits = Reference(wrong, checkpoint.weights, torch.float32)(torch.tensor([witness.rows[0]]))[0]
    assert far(logits, witness.logits[0]) > least
