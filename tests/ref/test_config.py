"""LlamaConfig reads what others publish, and refuses what it cannot honour by the name of the field."""

from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llama_ref.checkpoint import expected_shapes
from llama_ref.config import NAMED, LlamaConfig, RopeScaling
from llama_ref.formats.gguf_config import from_gguf
from llama_ref.formats.gguf_rope import llama3_rope_factors
from llama_ref.formats.hf_config import from_hf, to_hf
from llama_ref.formats.meta_config import from_meta, meta_ffn_dim

PUBLISHED_PARAMETERS = {
    "llama-2-7b": 6_738_415_616,
    "llama-2-13b": 13_015_864_320,
    "llama-2-70b": 68_976_648_192,
    "llama-3-8b": 8_030_261_248,
    "llama-3.2-1b": 1_235_814_400,
    "llama-3.2-3b": 3_212_749_824,
    "smollm2-135m": 134_515_008,
    "tinyllama-1.1b": 1_100_048_384,
}
SMALL: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 96,
    "vocab_size": 128,
}
SMALL_GGUF: dict[str, Any] = {
    "general.architecture": "llama",
    "llama.embedding_length": 64,
    "llama.block_count": 2,
    "llama.attention.head_count": 4,
    "llama.attention.head_count_kv": 2,
    "llama.feed_forward_length": 96,
    "llama.context_length": 512,
    "llama.attention.layer_norm_rms_epsilon": 1e-5,
    "llama.vocab_size": 128,
}


def small(**changes: Any) -> LlamaConfig:
    fields: dict[str, Any] = {
        "dim": 64,
        "n_layers": 2,
        "n_heads": 4,
        "n_kv_heads": 2,
        "head_dim": 16,
        "ffn_dim": 96,
        "vocab_size": 128,
        "max_context": 512,
    }
    return LlamaConfig(**(fields | changes))


@pytest.mark.parametrize("name", NAMED)
def test_named_shapes_have_the_published_number_of_parameters(name: str) -> None:
    assert sum(math.prod(shape) for shape in expected_shapes(NAMED[name]).values()) == PUBLISHED_PARAMETERS[name]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"n_kv_heads": 3}, "n_heads=4 is not a multiple of n_kv_heads=3"),
        ({"head_dim": 15}, "head_dim=15 must be even"),
        ({"dim": 0}, "dim=0 must be a positive whole number"),
        ({"n_layers": -2}, "n_layers=-2 must be a positive"),
        ({"n_layers": 1 << 31}, "n_layers=2147483648 is above 10000"),
        ({"vocab_size": 12.5}, "vocab_size=12.5 must be a positive whole"),
        ({"norm_eps": 0.0}, "norm_eps=0.0 must be a positive number"),
        ({"rope_theta": math.nan}, "rope_theta=nan must be a positive number"),
        ({"bos_id": 128}, "bos_id holds 128, outside the vocabulary of 128"),
        ({"eos_ids": (2, -1)}, "eos_ids holds -1, outside"),
    ],
)
def test_impossible_numbers_are_refused_with_the_numbers(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        small(**changes)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("longrope", 4.0), "rope_type='longrope'"),
        (("yarn", 4.0, 1.0, 4.0, 8192, 1.0, 32.0), "beta_slow=32.0"),
        (("yarn", 4.0, 1.0, 4.0, 8192, 32.0, 1.0, 0.0), "attention_factor=0.0"),
        (("linear", 0.5), "factor=0.5"),
        (("llama3", 8.0, 4.0, 4.0), "low_freq_factor=4.0"),
        (("llama3", 8.0, 1.0, 4.0, 0), "original_context=0"),
    ],
)
def test_impossible_rope_scaling_is_refused(arguments: tuple[Any, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RopeScaling(*arguments)


scalings = st.one_of(
    st.none(),
    st.floats(1, 64).map(lambda factor: RopeScaling("linear", factor)),
    st.floats(1, 64).map(lambda factor: RopeScaling("dynamic", factor)),
    st.builds(
        RopeScaling,
        st.just("yarn"),
        st.floats(1, 64),
        original_context=st.integers(1, 1 << 17),
        beta_fast=st.floats(8, 64),
        beta_slow=st.floats(0.5, 2),
        attention_factor=st.none() | st.floats(0.5, 2),
        truncate=st.booleans(),
    ),
    st.builds(
        RopeScaling,
        st.just("llama3"),
        st.floats(1, 64),
        st.floats(0.5, 2),
        st.floats(3, 8),
        st.integers(1, 1 << 17),
    ),
)
configs = st.builds(
    lambda groups, n_kv_heads, half_head_dim, **fields: small(
        n_heads=groups * n_kv_heads, n_kv_heads=n_kv_heads, head_dim=2 * half_head_dim, **fields
    ),
    groups=st.integers(1, 4),
    n_kv_heads=st.integers(1, 4),
    half_head_dim=st.integers(2, 40),
    dim=st.integers(1, 999),
    rope_theta=st.floats(2, 1e6),
    norm_eps=st.floats(1e-8, 1e-2),
    rope_scaling=scalings,
    tie_embeddings=st.booleans(),
    bos_id=st.none() | st.integers(0, 127),
    eos_ids=st.lists(st.integers(0, 127), unique=True, max_size=4).map(tuple),
)


@given(configs)
def test_to_hf_loses_nothing(config: LlamaConfig) -> None:
    assert from_hf(to_hf(config)) == config


@pytest.mark.parametrize("name", NAMED)
def test_transformers_reads_and_writes_the_same_config(name: str) -> None:
    """Its newer spelling (rope_parameters) is what it writes back."""
    from transformers import LlamaConfig as HfLlamaConfig

    written = HfLlamaConfig(**to_hf(NAMED[name])).to_dict()
    assert from_hf(written) == NAMED[name]


def test_absent_hf_fields_take_the_defaults_of_transformers() -> None:
    from transformers import LlamaConfig as HfLlamaConfig

    config = from_hf(SMALL)
    assert config == from_hf(HfLlamaConfig(**SMALL).to_dict())
    assert (config.head_dim, config.n_kv_heads, config.norm_eps, config.rope_theta) == (16, 4, 1e-6, 10000.0)
    assert (config.tie_embeddings, config.bos_id, config.eos_ids, config.rope_scaling) == (False, 1, (2,), None)


@pytest.mark.parametrize(
    ("spelling", "scaling"),
    [
        ({"rope_scaling": None}, None),
        ({"rope_scaling": {"rope_type": "default"}}, None),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, RopeScaling("dynamic", 2.0)),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4}}, RopeScaling("yarn", 4.0, original_context=2048)),
        (
            {"rope_parameters": {"rope_type": "yarn", "factor": 4.0, "mscale": 1.0, "mscale_all_dim": 0.5}},
            RopeScaling(
                "yarn",
                4.0,
                original_context=2048,
                attention_factor=(0.1 * math.log(4) + 1) / (0.05 * math.log(4) + 1),
            ),
        ),
        ({"rope_scaling": {"type": "linear", "factor": 4.0}}, RopeScaling("linear", 4.0)),
        ({"rope_parameters": {"rope_type": "linear", "factor": 4.0}}, RopeScaling("linear", 4.0)),
        (
            {
                "rope_scaling": {
                    "rope_type": "llama3",
                    "factor": 32.0,
                    "low_freq_factor": 1.0,
                    "high_freq_factor": 4.0,
                    "original_max_position_embeddings": 8192,
                }
            },
            RopeScaling("llama3", 32.0),
        ),
    ],
)
def test_rope_scaling_in_every_spelling(spelling: dict[str, Any], scaling: RopeScaling | None) -> None:
    assert from_hf(SMALL | spelling).rope_scaling == scaling


def test_rope_theta_in_both_spellings() -> None:
    old = from_hf(SMALL | {"rope_theta": 5e5})
    new = from_hf(SMALL | {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}})
    assert old == new
    assert old.rope_theta == 5e5


@pytest.mark.parametrize(("value", "ids"), [(None, ()), (7, (7,)), ([7, 9, 7], (7, 9))])
def test_eos_ids_in_every_spelling(value: Any, ids: tuple[int, ...]) -> None:
    assert from_hf(SMALL | {"eos_token_id": value}).eos_ids == ids


def test_mistral_is_a_llama_with_a_window() -> None:
    mistral = SMALL | {"model_type": "mistral", "num_key_value_heads": 4}
    assert from_hf(mistral | {"sliding_window": None}).window is None
    assert from_hf(mistral).window == 4096
    assert from_hf(mistral | {"sliding_window": 512, "max_position_embeddings": 512}).window is None
    config = from_hf(mistral | {"sliding_window": 7})
    assert config.window == 7 and from_hf(to_hf(config)) == config


def test_biases_are_read() -> None:
    config = from_hf(SMALL | {"attention_bias": True, "mlp_bias": True})
    assert config.attention_bias and config.mlp_bias
    assert from_hf(to_hf(config)) == config
    shapes = expected_shapes(config)
    assert shapes["layers.1.attention.wk.bias"] == (64,) and shapes["layers.0.feed_forward.w2.bias"] == (64,)
    assert sum(name.endswith(".bias") for name in shapes) == 14


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "qwen2"}, "model_type='qwen2'"),
        ({"model_type": None}, "model_type=None"),
        ({"model_type": ["llama"]}, r"model_type=\['llama'\]"),
        ({"model_type": "mistral", "attention_bias": True}, "attention_bias=True"),
        ({"attention_bias": "yes"}, "attention_bias='yes'"),
        ({"sliding_window": 1024}, "sliding_window=1024"),
        ({"tie_word_embeddings": "false"}, "tie_word_embeddings='false' must be true or false"),
        ({"rms_norm_eps": "small"}, "rms_norm_eps='small' must be a number"),
        ({"hidden_size": 64.0}, "hidden_size=64.0 must be a positive whole number"),
        ({"num_hidden_layers": 0}, "num_hidden_layers=0 must be a positive whole number"),
        ({"bos_token_id": [1]}, r"bos_token_id=\[1\] must be one token id"),
        ({"bos_token_id": "<s>"}, "bos_token_id='<s>' must be a token id"),
        ({"layer_types": 7}, "layer_types=7 must be a list"),
        ({"rope_interleaved": True}, "rope_interleaved=True"),
        ({"model_type": "mistral", "sliding_window": 0}, "window=0 must be a positive"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "layer_types holds 'sliding_attention'"),
        ({"hidden_act": "gelu"}, "hidden_act='gelu'"),
        ({"quantization_config": {"bits": 4}}, "quantization_config="),
        ({"quantization_config": {}}, r"quantization_config=\{\} is not supported"),
        ({"quantization_config": "int8"}, "quantization_config='int8' is not supported"),
        (
            {"quantization_config": {"modules": ["x"] * 40, "quant_method": "awq"}},
            r"=\{'quant_method': 'awq', 'modules'",
        ),
        ({"compression_config": {"quant_method": "compressed-tensors"}}, r"compression_config=\{'quant_method': 'comp"),
        ({"quantization": {"group_size": 64, "bits": 4}}, r"quantization=\{'group_size': 64, 'bits': 4\} is not"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5"),
        ({"rope_scaling": {"rope_type": "longrope", "factor": 4.0}}, "rope_type='longrope'"),
        ({"rope_scaling": {"rope_type": "yarn"}}, "factor is missing"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "low_freq_factor is missing"),
        ({"hidden_size": None}, "hidden_size is missing"),
        ({"hidden_size": "64"}, "hidden_size='64' must be a number"),
        ({"hidden_size": 63}, "hidden_size=63 does not divide over num_attention_heads=4"),
        ({"eos_token_id": "</s>"}, "eos_token_id='</s>'"),
    ],
)
def test_a_config_that_is_no_plain_llama_names_the_field(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        from_hf(SMALL | changes)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "params", "context"),
    [
        ("llama-2-7b", {"dim": 4096, "multiple_of": 256, "n_heads": 32, "n_layers": 32, "vocab_size": -1}, 4096),
        ("llama-2-13b", {"dim": 5120, "multiple_of": 256, "n_heads": 40, "n_layers": 40, "vocab_size": -1}, 4096),
        (
            "llama-2-70b",
            {
                "dim": 8192,
                "multiple_of": 4096,
                "ffn_dim_multiplier": 1.3,
                "n_heads": 64,
                "n_kv_heads": 8,
                "n_layers": 80,
                "vocab_size": -1,
            },
            4096,
        ),
    ],
)
def test_meta_params_give_the_named_shapes(name: str, params: dict[str, Any], context: int) -> None:
    read = from_meta(params | {"norm_eps": 1e-5}, vocab_size=32000, max_context=context)
    assert read == NAMED[name]


def test_meta_params_of_llama_3() -> None:
    params = {
        "dim": 4096,
        "n_layers": 32,
        "n_heads": 32,
        "n_kv_heads": 8,
        "vocab_size": 128256,
        "multiple_of": 1024,
        "ffn_dim_multiplier": 1.3,
        "rope_theta": 500000.0,
    }
    read = from_meta(params, max_context=8192)
    assert (read.ffn_dim, read.rope_theta, read.bos_id, read.eos_ids[0]) == (14336, 500000.0, 128000, 128001)
    scaled = from_meta(params | {"use_scaled_rope": True}, max_context=131072)
    assert scaled.rope_scaling == RopeScaling("llama3", 8.0)


@pytest.mark.parametrize(
    ("shape", "factor"),
    [
        ({"dim": 2048, "n_layers": 16, "ffn_dim_multiplier": 1.5, "multiple_of": 256}, 32.0),
        ({"dim": 3072, "n_layers": 28, "n_heads": 24, "ffn_dim_multiplier": 1.0, "multiple_of": 256}, 32.0),
        ({"dim": 4096, "n_layers": 32, "ffn_dim_multiplier": 1.3, "multiple_of": 1024}, 8.0),
        ({"dim": 2048, "n_layers": 16, "multiple_of": 256, "rope_scaling_factor": 8.0}, 8.0),
    ],
)
def test_the_small_models_of_llama_3_2_have_their_own_rope_factor(shape: dict[str, Any], factor: float) -> None:
    """Neither their params.json nor Meta's first code says so; their config.json does."""
    common = {"n_heads": 32, "n_kv_heads": 8, "vocab_size": 128256, "norm_eps": 1e-5, "rope_theta": 500000.0}
    read = from_meta(common | shape | {"use_scaled_rope": True}, tie_embeddings=True)
    assert read.rope_scaling == RopeScaling("llama3", factor)
    if shape["dim"] == 2048 and factor == 32:
        published = NAMED["llama-3.2-1b"]
        assert (read.ffn_dim, read.rope_scaling, read.max_context) == (
            published.ffn_dim,
            published.rope_scaling,
            published.max_context,
        )


def test_meta_params_without_a_vocabulary_ask_for_it() -> None:
    with pytest.raises(ValueError, match="vocab_size=-1"):
        from_meta({"dim": 64, "n_layers": 2, "n_heads": 4, "vocab_size": -1})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dim": "64"}, "dim='64' must be a number"),
        ({"vocab_size": "x"}, "vocab_size='x' must be a number"),
        ({"vocab_size": 0}, "vocab_size=0 must be a positive"),
        ({"multiple_of": 0}, "multiple_of=0 must be a positive"),
        ({"ffn_dim_multiplier": "big"}, "ffn_dim_multiplier='big' must be a number"),
        ({"use_scaled_rope": "yes"}, "use_scaled_rope='yes' must be true or false"),
        ({"max_seq_len": 0.5}, "max_seq_len=0.5 must be a positive whole"),
        ({"n_kv_heads": []}, "n_kv_heads=.. must be a number"),
    ],
)
def test_params_that_say_no_number_name_the_field(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        from_meta({"dim": 64, "n_layers": 2, "n_heads": 4, "vocab_size": 128} | changes)


@given(st.integers(1, 20000), st.sampled_from([1, 32, 256, 4096]))
def test_meta_ffn_width_is_the_next_multiple(dim: int, multiple_of: int) -> None:
    width = meta_ffn_dim(dim, multiple_of, None)
    assert width % multiple_of == 0
    assert 0 <= width - int(8 * dim / 3) < multiple_of


def test_gguf_metadata() -> None:
    read = from_gguf(SMALL_GGUF, tie_embeddings=True)
    assert read == small(tie_embeddings=True)
    per_layer = SMALL_GGUF | {"llama.attention.head_count_kv": [2, 2], "llama.attention.key_length": 24}
    assert from_gguf(per_layer, tie_embeddings=True) == small(tie_embeddings=True, head_dim=24)
    linear = SMALL_GGUF | {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 2.0}
    assert from_gguf(linear, tie_embeddings=False).rope_scaling == RopeScaling("linear", 2.0)
    ends = SMALL_GGUF | {"tokenizer.ggml.eos_token_id": 2, "tokenizer.ggml.eot_token_id": 7}
    assert from_gguf(ends, tie_embeddings=False).eos_ids == (2, 7)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"general.architecture": "qwen2"}, "general.architecture='qwen2'"),
        ({"llama.expert_count": 8}, "llama.expert_count=8"),
        ({"llama.rope.scaling.type": "yarn"}, "llama.rope.scaling.type='yarn'"),
        ({"llama.attention.head_count_kv": [1, 2]}, "head_count_kv differs between layers"),
        ({"llama.rope.dimension_count": 8, "llama.attention.key_length": 16}, "rope.dimension_count=8 differs"),
        ({"llama.block_count": None}, "llama.block_count is missing"),
        ({"llama.attention.head_count": None}, "llama.attention.head_count is missing"),
        ({"llama.attention.head_count": 4.0}, r"llama\.attention\.head_count=4\.0 must be a positive whole number"),
        ({"llama.attention.head_count_kv": "22"}, r"llama\.attention\.head_count_kv='22' must be a number"),
        (
            {"llama.attention.head_count_kv": [2.5, 2.5]},
            r"llama\.attention\.head_count_kv=2\.5 must be a positive whole",
        ),
        ({"llama.attention.head_count_kv": ["2", "2"]}, r"llama\.attention\.head_count_kv='2' must be a number"),
        ({"llama.attention.head_count_kv": [[2], [2]]}, r"llama\.attention\.head_count_kv=\[2\] must be a number"),
        ({"llama.attention.head_count_kv": []}, "llama.attention.head_count_kv differs between layers"),
        ({"llama.attention.head_count_kv": 0}, r"llama\.attention\.head_count_kv=0 must be a positive whole number"),
        ({"llama.attention.key_length": 16.0}, r"llama\.attention\.key_length=16\.0 must be a positive whole number"),
        ({"llama.feed_forward_length": None}, "llama.feed_forward_length is missing"),
        ({"llama.rope.freq_base": "far"}, r"llama\.rope\.freq_base='far' must be a number"),
        ({"llama.vocab_size": "many"}, r"llama\.vocab_size='many' must be a number"),
        ({"tokenizer.ggml.tokens": "abc"}, r"tokenizer\.ggml\.tokens='abc' must be an array"),
        ({"tokenizer.ggml.tokens": 5}, r"tokenizer\.ggml\.tokens=5 must be an array"),
    ],
)
def test_gguf_metadata_of_no_plain_llama_names_the_field(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        from_gguf(SMALL_GGUF | changes, tie_embeddings=False)


def hf_rope_factors(config: LlamaConfig) -> list[float]:
    """By what transformers divides the rotary frequencies of this config."""
    from transformers import LlamaConfig as HfLlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    frequencies, _ = ROPE_INIT_FUNCTIONS["llama3"](HfLlamaConfig(**to_hf(config)), "cpu")
    plain = [config.rope_theta ** (-2 * pair / config.head_dim) for pair in range(config.head_dim // 2)]
    return [a / b for a, b in zip(plain, frequencies.tolist())]


def test_gguf_rope_factors_are_recognised_as_the_llama3_rule() -> None:
    config = NAMED["llama-3.2-1b"]
    factors = hf_rope_factors(config)
    assert len(set(factors)) > 3  # kept, blended and divided ones
    assert config.rope_scaling is not None
    assert llama3_rope_factors(config.rope_scaling, config.rope_theta, config.head_dim) == pytest.approx(factors)
    metadata = SMALL_GGUF | {"llama.attention.key_length": 64, "llama.rope.freq_base": 500000.0}
    read = from_gguf(metadata, tie_embeddings=True, rope_factors=factors)
    assert read.rope_scaling is not None
    assert read.rope_scaling.factor == pytest.approx(32.0)
    with pytest.raises(ValueError, match=r"rope_freqs\.weight does not follow"):
        from_gguf(metadata, tie_embeddings=True, rope_factors=list(reversed(factors)))
    with pytest.raises(ValueError, match="holds 31 factors for a head dimension of 64"):
        from_gguf(metadata, tie_embeddings=True, rope_factors=factors[1:])
