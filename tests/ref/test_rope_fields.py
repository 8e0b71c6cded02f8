"""The rotary fields of a config.json, wherever files put them: the frequencies of transformers, or one clear line."""

from __future__ import annotations

import json
import math
import tempfile
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llama_fast.model.rope import rope_table
from llama_ref.config import LlamaConfig
from llama_ref.formats.hf_config import from_hf
from llama_ref.model import amplitude, inverse_frequencies

BASE: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 96,
    "vocab_size": 128,
    "max_position_embeddings": 64,
}
YARN: dict[str, Any] = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
LLAMA3: dict[str, Any] = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}


pytestmark = pytest.mark.usefixtures("quiet_transformers")


def of_transformers(fields: dict[str, Any]) -> tuple[torch.Tensor, float]:
    """Radians per position of each pair, and the factor of q and k, of the config.json with these fields."""
    from transformers import LlamaConfig as HfLlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(BASE | fields))
        rotary = LlamaRotaryEmbedding(HfLlamaConfig.from_pretrained(folder))
    return rotary.inv_freq.double(), float(rotary.attention_scaling)


def assert_turns_as_transformers(fields: dict[str, Any]) -> None:
    """For both Llamas: the reference's frequencies, and the angles and lengths of the fast one's table."""
    theirs, factor = of_transformers(fields)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = from_hf(BASE | fields)
    torch.testing.assert_close(inverse_frequencies(config), theirs, rtol=1e-5, atol=1e-38)  # theirs are float32
    assert amplitude(config) == pytest.approx(factor, rel=1e-6)
    second = rope_table(config)[1].double()  # the first pair may turn by more than pi
    angle = torch.atan2(second[:, 1], second[:, 0])
    wrapped = torch.remainder(theirs + math.pi, 2 * math.pi) - math.pi
    torch.testing.assert_close(angle, wrapped, rtol=1e-4, atol=1e-6)
    assert second.norm(dim=-1).tolist() == pytest.approx([factor] * len(theirs), rel=1e-6)


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"rope_scaling": None, "rope_theta": 500.0},
        {"rope_scaling": {}, "rope_parameters": {"rope_type": "default", "rope_theta": 500.0}},
        {"rope_parameters": {"rope_theta": 500.0}, "rope_theta": 77.0},
        {"rope_scaling": {"type": "linear", "factor": 4}},
        {"rope_scaling": {"type": "default", "rope_type": "linear", "factor": 4.0}},
        {"rope_scaling": {"type": "linear", "factor": 2.0, "rope_theta": 500.0}, "rope_theta": 77.0},
        {"rope_scaling": {"type": "linear", "factor": 2.0}, "rope_parameters": {"rope_theta": 500.0}},
        {"rope_scaling": {"type": "linear", "factor": 2.0}, "rope_parameters": {"rope_theta": 5.0}, "rope_theta": 77.0},
        {"rope_scaling": LLAMA3, "rope_theta": 5e5},
        {"rope_scaling": LLAMA3, "original_max_position_embeddings": 16},
        {"rope_scaling": LLAMA3 | {"original_max_position_embeddings": 32}, "original_max_position_embeddings": 16},
        {"rope_scaling": YARN},
        {"rope_scaling": YARN | {"factor": None}},
        {"rope_scaling": {"rope_type": "yarn", "factor": None}, "original_max_position_embeddings": 16},
        {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}},
        {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}, "original_max_position_embeddings": 16},
        {"rope_scaling": YARN, "original_max_position_embeddings": 32},
        {"rope_scaling": YARN | {"beta_fast": None, "beta_slow": None, "attention_factor": None}},
        {"rope_scaling": YARN | {"beta_fast": 0, "beta_slow": 0}},
        {"rope_scaling": YARN | {"finetuned": True}},
        {"rope_scaling": YARN | {"attention_factor": 2}},
        {"rope_scaling": YARN | {"mscale": 0.7}},
        {"rope_scaling": YARN | {"mscale_all_dim": 0.7}},
        {"rope_scaling": YARN | {"mscale": 0.0, "mscale_all_dim": 0.7}},
        {"rope_scaling": YARN | {"mscale": 0.7, "mscale_all_dim": 0.3}},
        {"rope_scaling": YARN | {"factor": 1.0, "mscale": 0.7, "mscale_all_dim": 0.3}},
        {"rope_scaling": YARN | {"truncate": False}, "rope_theta": 37.0},
        {"rope_scaling": YARN | {"truncate": None}, "rope_theta": 37.0},
        {"rope_scaling": {"type": "dynamic", "factor": 2.0, "original_max_position_embeddings": 16}},
        {"head_dim": None, "num_key_value_heads": None, "pretraining_tp": 2, "rope_interleaved": False},
        {"head_dim": 24, "rope_scaling": YARN},
    ],
)
def test_fields_as_real_files_spell_them(fields: dict[str, Any]) -> None:
    assert_turns_as_transformers(fields)


kinds = st.sampled_from(["default", "linear", "dynamic", "llama3", "yarn"])
factors = st.floats(1, 64) | st.integers(1, 64)
contexts = st.sampled_from([4, 16, 32, 64, 8192])
OF_KIND: dict[str, dict[str, st.SearchStrategy[Any]]] = {
    "default": {},
    "linear": {"factor": factors},
    "dynamic": {"factor": factors},
    "llama3": {"factor": factors, "low_freq_factor": st.floats(0.5, 2), "high_freq_factor": st.floats(2.5, 8)},
    "yarn": {"factor": factors},
}
OPTIONAL_OF_YARN: dict[str, st.SearchStrategy[Any]] = {
    "attention_factor": st.none() | st.floats(0.5, 2),
    "beta_fast": st.none() | st.just(0) | st.floats(8, 64),
    "beta_slow": st.none() | st.just(0) | st.floats(0.5, 2),
    "mscale": st.none() | st.floats(0, 2),
    "mscale_all_dim": st.none() | st.floats(0, 2),
    "truncate": st.booleans(),
    "original_max_position_embeddings": contexts,
}


@st.composite
def spelled_rope(draw: st.DrawFn) -> dict[str, Any]:
    """The rotary fields of a file that transformers reads, in any of the places."""
    kind = draw(kinds)
    rope = draw(st.fixed_dictionaries(OF_KIND[kind]))
    if kind == "yarn":
        rope |= draw(st.fixed_dictionaries({}, optional=OPTIONAL_OF_YARN))
        if draw(st.booleans()):
            rope["factor"] = None
            rope["original_max_position_embeddings"] = draw(st.sampled_from([4, 16, 64]))  # at most the context
    elif kind == "llama3" and draw(st.booleans()):
        rope["original_max_position_embeddings"] = draw(contexts)
    for name in draw(st.sampled_from([("type",), ("rope_type",), ("type", "rope_type")])):
        rope[name] = kind
    if draw(st.booleans()):
        rope["rope_theta"] = draw(st.floats(2, 1e6))
    fields: dict[str, Any] = draw(
        st.fixed_dictionaries(
            {},
            optional={
                "rope_theta": st.floats(2, 1e6) | st.integers(2, 1_000_000),
                "head_dim": st.none() | st.sampled_from([4, 8, 16, 24, 80]),
                "partial_rotary_factor": st.sampled_from([1, 1.0]),
            },
        )
    )
    if rope.get("factor", 1) is not None and draw(st.booleans()):
        fields["original_max_position_embeddings"] = draw(contexts)
    place = draw(st.sampled_from(["rope_scaling", "rope_parameters", "both"]))
    if place == "both":
        return fields | {"rope_scaling": rope, "rope_parameters": {"rope_type": "default", "rope_theta": 123.0}}
    return (
        fields
        | {place: rope}
        | draw(st.sampled_from([{}, {"rope_scaling": None}] if place != "rope_scaling" else [{}]))
    )


@settings(max_examples=400)
@given(spelled_rope())
def test_any_spelling_turns_as_transformers(fields: dict[str, Any]) -> None:
    assert_turns_as_transformers(fields)


odd = st.none() | st.sampled_from([True, "2", "x", -1, 0, 0.5, 3, 1e300, 10**400, [], {}, {"a": 1}])
NAMES = (
    *("rope_type", "type", "factor", "rope_theta", "low_freq_factor", "high_freq_factor", "beta_fast", "beta_slow"),
    *("attention_factor", "mscale", "mscale_all_dim", "truncate", "partial_rotary_factor"),
    "original_max_position_embeddings",
)


@settings(max_examples=400)
@given(spelled_rope(), st.sampled_from(["inside", "outside"]), st.sampled_from(NAMES), odd)
def test_an_odd_field_is_as_in_transformers_or_one_line(
    fields: dict[str, Any], place: str, name: str, value: Any
) -> None:
    fields = {key: dict(rope) if isinstance(rope, dict) else rope for key, rope in fields.items()}
    holder = fields.get("rope_scaling") or fields["rope_parameters"] if place == "inside" else fields
    holder[name] = value
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            config = from_hf(BASE | fields)
    except ValueError as error:
        assert "\n" not in str(error) and len(str(error)) < 300
        return
    try:
        theirs, factor = of_transformers(fields)
    except Exception:
        return  # null where we have a default, and a number in quotes
    # theirs are float32, in which a theta of 1e300 is infinite
    torch.testing.assert_close(inverse_frequencies(config), theirs, rtol=1e-5, atol=1e-30)
    assert amplitude(config) == pytest.approx(factor, rel=1e-6)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"rope_scaling": {"type": "longrope", "short_factor": [1.0] * 8}}, "rope_type='longrope' is not supported"),
        ({"rope_scaling": {"rope_type": ["yarn"]}}, "rope_type=.'yarn'. is not supported"),
        ({"rope_scaling": "linear"}, "rope_scaling='linear' must be an object"),
        ({"rope_parameters": [1]}, "rope_parameters=.1. must be an object"),
        ({"rope_scaling": {"type": "linear"}}, "factor is missing"),
        ({"rope_scaling": {"type": "linear", "factor": None}}, "factor is missing"),
        ({"rope_scaling": {"type": "linear", "factor": 0.5}}, "factor=0.5 must be a number of at least 1"),
        ({"rope_scaling": {"type": "yarn", "original_max_position_embeddings": 16}}, "factor is missing"),
        ({"rope_scaling": YARN | {"mscale": "a"}}, "mscale='a' must be a number"),
        ({"rope_scaling": YARN | {"truncate": "false"}}, "truncate='false' must be true or false"),
        ({"rope_scaling": YARN | {"original_max_position_embeddings": 16.5}}, "original_max_position_embeddings=16.5"),
        ({"rope_scaling": YARN | {"beta_fast": 0.5}}, "beta_slow=1.0 must lie between 0 and beta_fast=0.5"),
        ({"rope_parameters": {"full_attention": {"rope_theta": 5.0}}}, "'full_attention': only one rule"),
        ({"rope_parameters": {"rope_type": "linear", "factor": 2.0, "partial_rotary_factor": 0.5}}, "factor=0.5"),
        ({"rope_theta": "fast"}, "rope_theta='fast' must be a number"),
    ],
)
def test_what_is_not_read_is_refused_by_its_field(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        from_hf(BASE | fields)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"rope_scaling": YARN | {"finetuned": True}}, "a.json: rope_type='yarn' has no field finetuned"),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0, "mscale": 1.0}}, "'dynamic' has no field mscale"),
        ({"rope_scaling": YARN, "rope_parameters": {"rope_theta": 5.0}}, "rope_scaling is read; rope_parameters"),
        ({"rope_scaling": {"type": "default", "rope_type": "linear", "factor": 2.0}}, "type='default' is not"),
    ],
)
def test_what_is_left_unread_is_said(fields: dict[str, Any], message: str) -> None:
    with pytest.warns(UserWarning, match=message) as told:
        from_hf(BASE | fields, "a.json")
    assert len(told) == 1 and "\n" not in str(told[0].message)


def test_null_is_as_good_as_absent() -> None:
    """Where transformers has no answer but an exception: a file that says null means the default."""
    plain = from_hf(BASE)
    nothing = dict.fromkeys(("rope_theta", "rope_scaling", "rope_parameters", "original_max_position_embeddings"))
    nothing |= dict.fromkeys(("partial_rotary_factor", "rope_interleaved", "max_position_embeddings", "hidden_act"))
    nothing |= dict.fromkeys(("tie_word_embeddings", "attention_bias", "mlp_bias", "rms_norm_eps", "layer_types"))
    read = from_hf({**BASE, **nothing, "max_position_embeddings": 64})
    assert read == plain
    inside = {"rope_type": None, "type": "linear", "factor": 2.0, "rope_theta": None}
    assert from_hf(BASE | {"rope_scaling": inside, "rope_theta": 77.0}) == from_hf(
        BASE | {"rope_scaling": {"type": "linear", "factor": 2.0}, "rope_theta": 77.0}
    )


@pytest.mark.parametrize(
    ("fields", "wanted"),
    [
        ({"rms_norm_eps": "1e-05"}, {"norm_eps": 1e-5}),
        ({"use_sliding_window": False, "sliding_window": 16}, {"window": None}),
        ({"sliding_window": 64}, {"window": None}),
        ({"layer_types": ["full_attention"] * 2}, {"window": None}),
        ({"hidden_act": "swish", "pretraining_tp": 4, "torch_dtype": "bfloat16"}, {}),
        ({"tie_word_embeddings": True}, {"tie_embeddings": True}),
    ],
)
def test_other_fields_as_real_files_spell_them(fields: dict[str, Any], wanted: dict[str, Any]) -> None:
    config = from_hf(BASE | fields)
    assert {name: getattr(config, name) for name in wanted} == wanted
    assert isinstance(config, LlamaConfig)


def test_a_mistral_has_eight_key_heads_and_no_switch_for_its_window() -> None:
    """As its class in transformers has it: the switch is a field of Qwen's."""
    from transformers import MistralConfig

    mistral = BASE | {"model_type": "mistral", "num_attention_heads": 16}
    assert from_hf(mistral).n_kv_heads == MistralConfig().num_key_value_heads == 8
    with pytest.warns(UserWarning, match="a mistral has no use_sliding_window; its window is 9"):
        assert from_hf(mistral | {"use_sliding_window": False, "sliding_window": 9}).window == 9
