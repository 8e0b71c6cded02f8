"""LoRA directories: the logits of the adapted model are those of peft, which wrote the directory and applies it itself."""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from llama_ref.checkpoint import Checkpoint, CheckpointError, expected_shapes, open_checkpoint, with_adapter
from llama_ref.convert import convert
from llama_ref.model import Llama
from tests.ref.conftest import SaveTiny

LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
TIED = {"tie_word_embeddings": True}
BIASED = {"attention_bias": True, "mlp_bias": True}
ADAPTER = "adapter_model.safetensors"
DOWN = "base_model.model.model.layers.1.self_attn.k_proj.lora_A.weight"
TOKENS = torch.randint(101, (2, 12), generator=torch.Generator().manual_seed(3))


@dataclass(frozen=True)
class Trained:
    """A base model and an adapter of it, as saved, and the logits [2, 12, V] of both together, by peft, and of the base alone."""

    model: Path
    adapter: Path
    logits: Tensor
    plain: Tensor


Train = Callable[..., Trained]


@pytest.fixture(scope="module")
def train(save_tiny: SaveTiny, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Train]:
    """train({"tie_word_embeddings": True}, target_modules=...) saves a tiny base and an adapter whose numbers are all drawn."""
    import peft
    import transformers

    def train(changes: dict[str, Any] | None = None, **fields: Any) -> Trained:
        folder = tmp_path_factory.mktemp("adapter")
        model = save_tiny(**(changes or {})).directory
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # peft's, of what is done here on purpose
            base = transformers.LlamaForCausalLM.from_pretrained(model).eval()
            with torch.no_grad():
                plain = base(TOKENS).logits
            adapted = peft.get_peft_model(base, peft.LoraConfig(**({"r": 4, "lora_alpha": 6} | fields)))
            draw(adapted)
            adapted.save_pretrained(folder)
            fresh = transformers.LlamaForCausalLM.from_pretrained(model)
            again = peft.PeftModel.from_pretrained(fresh, folder).eval()
            with torch.no_grad():
                return Trained(model, folder, again(TOKENS).logits, plain)

    before = transformers.utils.logging.get_verbosity()
    transformers.utils.logging.set_verbosity_error()
    yield train
    transformers.utils.logging.set_verbosity(before)


def draw(adapted: Any) -> None:
    """Numbers for all that would be trained, large enough to be seen."""
    random = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for _, tensor in adapted.named_parameters():
            if tensor.requires_grad:
                tensor.add_(0.2 * torch.randn(tensor.shape, generator=random))


def logits_of(checkpoint: Checkpoint) -> Tensor:
    return Llama(checkpoint.config, checkpoint.weights, torch.float32)(TOKENS)


def assert_same_logits(found: Tensor, trained: Trained) -> None:
    """Equal to float32's rounding, where the adapter moved them by a thousand times as much."""
    scale = trained.logits.abs().max()
    assert found.shape == trained.logits.shape
    assert (trained.logits - trained.plain).abs().max() > 1e-2 * scale
    assert (found - trained.logits).abs().max() < 1e-5 * scale


CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "two modules": ({}, {"target_modules": ["q_proj", "v_proj"]}),
    "every module by name": ({}, {"target_modules": LINEAR}),
    "all-linear": ({}, {"target_modules": "all-linear"}),
    "the modules of peft's own choice": ({"model_type": "llama"}, {}),
    "a regular expression": ({}, {"target_modules": r".*layers\.1\.(self_attn\.[qk]|mlp\.down)_proj"}),
    "a whole name": ({}, {"target_modules": ["model.layers.1.self_attn.k_proj"]}),
    "modules left out": ({}, {"target_modules": LINEAR, "exclude_modules": ["q_proj", "layers.0.mlp.up_proj"]}),
    "modules left out by expression": ({}, {"target_modules": "all-linear", "exclude_modules": r".*\.0\..*"}),
    "one layer": ({}, {"target_modules": LINEAR, "layers_to_transform": 1}),
    "layers of a pattern": (
        {},
        {"target_modules": ["o_proj"], "layers_to_transform": [0], "layers_pattern": ["layers"]},
    ),
    "rank and alpha patterns": (
        {},
        {
            "target_modules": LINEAR,
            "rank_pattern": {"q_proj": 2, "^model.layers.0.mlp.(up|gate)_proj": 7, "1.mlp.up_proj": 3},
            "alpha_pattern": {"k_proj": 5, "layers.1.self_attn.q_proj": 9.5},
        },
    ),
    "rslora": ({}, {"target_modules": LINEAR, "use_rslora": True, "rank_pattern": {"o_proj": 9}}),
    "dora": ({}, {"target_modules": [*LINEAR, "lm_head"], "use_dora": True, "use_rslora": True}),
    "dora in a model with biases": (BIASED, {"target_modules": LINEAR, "use_dora": True, "bias": "all"}),
    "all biases": (BIASED, {"target_modules": ["q_proj", "down_proj"], "bias": "all"}),
    "the pairs' biases": (BIASED, {"target_modules": ["q_proj", "k_proj", "up_proj"], "bias": "lora_only"}),
    "no biases of a model that has some": (BIASED, {"target_modules": LINEAR}),
    "lora_bias": (BIASED, {"target_modules": LINEAR, "lora_bias": True, "use_rslora": True}),
    "lora_bias, q alone, in a model without biases": ({}, {"target_modules": ["q_proj"], "lora_bias": True}),
    "lora_bias, down alone, in a model without biases": ({}, {"target_modules": ["down_proj"], "lora_bias": True}),
    "embeddings and head": ({}, {"target_modules": ["embed_tokens", "lm_head", "q_proj"]}),
    "embeddings of a tied model": (TIED, {"target_modules": ["embed_tokens", "v_proj"]}),
    "the head of a tied model": (TIED, {"target_modules": ["lm_head"]}),
    "both tables of a tied model": (TIED, {"target_modules": ["lm_head", "embed_tokens"]}),
    "both tables, kept tied": (TIED, {"target_modules": ["embed_tokens"], "ensure_weight_tying": True}),
    "a head of its own": ({}, {"target_modules": ["k_proj"], "modules_to_save": ["lm_head"]}),
    "a head of its own in a tied model": (TIED, {"target_modules": ["k_proj"], "modules_to_save": ["lm_head"]}),
    "embeddings of their own in a tied model": (TIED, {"target_modules": LINEAR, "modules_to_save": ["embed_tokens"]}),
    "both tables of their own, kept tied": (
        TIED,
        {"target_modules": ["k_proj"], "modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
    ),
    "whole parts of a block": (
        {},
        {"target_modules": LINEAR, "modules_to_save": ["mlp", "norm", "layers.1.self_attn"]},
    ),
    "whole parts with biases": (BIASED, {"target_modules": LINEAR, "modules_to_save": ["k_proj"], "bias": "all"}),
    "another start that leaves the base": ({}, {"target_modules": LINEAR, "init_lora_weights": "gaussian"}),
    "heads of 24, no groups": (
        {"head_dim": 24, "num_key_value_heads": 4},
        {"target_modules": LINEAR},
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_the_adapted_model_is_that_of_peft(train: Train, case: str) -> None:
    changes, fields = CASES[case]
    changes = {name: value for name, value in changes.items() if name != "model_type"}
    trained = train(changes, **fields)
    checkpoint = with_adapter(open_checkpoint(trained.model), trained.adapter)
    assert_same_logits(logits_of(checkpoint), trained)
    assert {name: tuple(t.shape) for name, t in checkpoint.weights.items()} == expected_shapes(checkpoint.config)


@pytest.fixture(scope="module")
def rich(train: Train) -> Trained:
    """An adapter of every module, in a model with biases."""
    fields = {"bias": "all", "lora_bias": True, "rank_pattern": {"q_proj": 3}, "modules_to_save": ["norm"]}
    return train(BIASED, target_modules=LINEAR, **fields)


@pytest.fixture
def damaged(rich: Trained, tmp_path: Path) -> Path:
    """A copy of its adapter, to be changed."""
    return Path(shutil.copytree(rich.adapter, tmp_path / "adapter"))


def edit(directory: Path, **changes: Any) -> Path:
    file = directory / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    return directory


def edit_tensors(directory: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    tensors = {name: tensor.clone() for name, tensor in load_file(directory / ADAPTER).items()}
    change(tensors)
    save_file(tensors, directory / ADAPTER)


def refused(model: Path, adapter: Path, *fragments: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        with_adapter(open_checkpoint(model), adapter)
    assert "\n" not in str(caught.value)
    for fragment in fragments:
        assert fragment in str(caught.value)


@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
def test_a_part_read_by_itself_is_that_part_of_the_whole(rich: Trained, train: Train, dora: bool) -> None:
    """To the last bit: several ranks, and rows encoded in stripes, then hold the numbers of one matrix."""
    trained = train({}, target_modules=LINEAR, use_dora=True) if dora else rich
    checkpoint = with_adapter(open_checkpoint(trained.model), trained.adapter)
    for weight in checkpoint.weights.values():
        whole = weight[:]
        assert tuple(whole.shape) == tuple(weight.shape) and whole.dtype == weight.dtype
        assert torch.equal(weight[3:11], whole[3:11])
        assert weight[5:5].shape[0] == 0
        if whole.ndim == 2:
            assert torch.equal(weight[1:14, 7:], whole[1:14, 7:])
            assert torch.equal(weight[:, 2:9], whole[:, 2:9])


def test_a_matrix_of_many_rows_is_merged_in_parts(monkeypatch: pytest.MonkeyPatch, rich: Trained) -> None:
    before = logits_of(with_adapter(open_checkpoint(rich.model), rich.adapter))
    monkeypatch.setattr("llama_ref.formats.low_rank.ROWS_AT_ONCE", 7)
    assert torch.equal(logits_of(with_adapter(open_checkpoint(rich.model), rich.adapter)), before)


def test_a_model_in_metas_layout_is_adapted_too(train: Train, tmp_path: Path) -> None:
    """Its rows of q and k stand in another order than the adapter's."""
    trained = train({}, target_modules=LINEAR)
    convert(trained.model, tmp_path / "meta", "meta")
    with pytest.warns(UserWarning, match="made for the model"):
        checkpoint = with_adapter(open_checkpoint(tmp_path / "meta"), trained.adapter)
    assert_same_logits(logits_of(checkpoint), trained)


def test_a_bfloat16_base_is_not_rounded_again(rich: Trained, tmp_path: Path) -> None:
    """What the adapter adds is often below bf16's last digit: the sum stays in float32 until a plan asks for less."""
    model = Path(shutil.copytree(rich.model, tmp_path / rich.model.name))
    tensors = {name: tensor.bfloat16() for name, tensor in load_file(model / "model.safetensors").items()}
    save_file(tensors, model / "model.safetensors")
    name = "layers.0.feed_forward.w2.weight"
    plain = open_checkpoint(model)
    adapted = with_adapter(plain, rich.adapter).weights[name]
    stored = load_file(rich.adapter / ADAPTER)
    up, down = (stored[f"base_model.model.model.layers.0.mlp.down_proj.lora_{side}.weight"] for side in "BA")
    assert adapted.dtype == adapted[:].dtype == torch.float32
    torch.testing.assert_close(adapted[:], plain.weights[name][:].float() + 6 / 4 * (up @ down))


def test_two_adapters_are_added(train: Train) -> None:
    import peft
    import transformers

    first, second = (
        train({}, target_modules=modules, lora_alpha=alpha)
        for modules, alpha in ((["q_proj", "up_proj"], 3), (["q_proj", "o_proj"], 5))
    )
    with pytest.warns(UserWarning, match="made for the model"):
        both = with_adapter(with_adapter(open_checkpoint(first.model), first.adapter), second.adapter)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # peft's, of transformers
        base = transformers.LlamaForCausalLM.from_pretrained(first.model)
        model = peft.PeftModel.from_pretrained(base, first.adapter, "one")
        model.load_adapter(second.adapter, "two")
        model.base_model.set_adapter(["one", "two"])
    with torch.no_grad():
        theirs = model.eval()(TOKENS).logits
    assert (theirs - first.logits).abs().max() > 1e-2 * theirs.abs().max()
    assert (logits_of(both) - theirs).abs().max() < 1e-5 * theirs.abs().max()


def test_a_pickled_adapter_is_read(rich: Trained, damaged: Path) -> None:
    torch.save(load_file(damaged / ADAPTER), damaged / "adapter_model.bin")
    (damaged / ADAPTER).unlink()
    assert_same_logits(logits_of(with_adapter(open_checkpoint(rich.model), damaged)), rich)


@pytest.mark.parametrize(
    ("changes", "fragments"),
    [
        ({"peft_type": "LOHA"}, ("peft_type='LOHA'", "known: LORA")),
        ({"peft_type": None}, ("peft_type=None",)),
        ({"use_dora": True}, ("14 missing", "self_attn.q_proj.lora_magnitude_vector")),
        ({"use_dora": 1}, ("use_dora=1 must be true or false",)),
        ({"use_qalora": True}, ("use_qalora=True",)),
        ({"layer_replication": [[0, 2], [1, 2]]}, ("layer_replication=[[0, 2], [1, 2]]",)),
        ({"target_parameters": ["mlp.experts"]}, ("target_parameters=['mlp.experts']",)),
        ({"trainable_token_indices": [3]}, ("trainable_token_indices=[3]",)),
        ({"alora_invocation_tokens": [3]}, ("alora_invocation_tokens=[3]",)),
        ({"megatron_config": {"a": 1}}, ("megatron_config={'a': 1}",)),
        ({"init_lora_weights": "pissa_niter_16"}, ("init_lora_weights='pissa_niter_16' changes the base model",)),
        ({"init_lora_weights": "OLoRA"}, ("init_lora_weights='OLoRA'", "path_initial_model_for_weight_conversion")),
        ({"init_lora_weights": "loftq"}, ("init_lora_weights='loftq'",)),
        ({"init_lora_weights": 1}, ("init_lora_weights=1 ",)),
        ({"bias": "some"}, ("bias='some'", "none, all, lora_only")),
        ({"r": 0}, ("r=0 must be a positive whole number",)),
        ({"lora_alpha": "x"}, ("lora_alpha='x' must be a number",)),
        ({"rank_pattern": {"q_proj": 3, "k_proj": 5}}, ("4 misshapen", "k_proj.lora_A.weight is [4, 32], not [5, 32]")),
        ({"rank_pattern": {"q_proj": 3, "(": 5}}, ("rank_pattern holds", "no regular expression")),
        ({"rank_pattern": {"q_proj": "3"}}, ("q_proj='3' must be a number",)),
        ({"alpha_pattern": ["q_proj"]}, ("alpha_pattern=['q_proj'] must be an object",)),
        ({"target_modules": "*"}, ("no regular expression",)),
        ({"target_modules": {"q_proj": 1}}, ("target_modules={'q_proj': 1} must be a list of names",)),
        ({"target_modules": ["query"], "modules_to_save": None}, ("target_modules=('query',) names no module",)),
        ({"target_modules": ["q_proj"]}, ("extra: base_model.model.model.layers.0",)),
        ({"target_modules": [*LINEAR, "lm_head"]}, ("missing: base_model.model.lm_head.lora_A.weight",)),
        ({"modules_to_save": ["norm", "lm_head"]}, ("1 missing: base_model.model.lm_head.weight",)),
        ({"lora_bias": False}, ("14 extra", "lora_B.bias")),
        ({"bias": "none", "use_rslora": "yes"}, ("use_rslora='yes' must be true or false",)),
        ({"target_modules": "all-linear", "layers_to_transform": [0]}, ("layers_to_transform is for target_modules",)),
        ({"layers_to_transform": ["0"]}, ("layers_to_transform=['0'] must be",)),
        ({"layers_pattern": ["("], "layers_to_transform": [0]}, ("layers_pattern holds",)),
        ({"exclude_modules": "["}, ("no regular expression",)),
    ],
)  # fmt: skip
def test_what_the_config_cannot_mean_is_refused_by_name(
    rich: Trained, damaged: Path, changes: dict[str, Any], fragments: tuple[str, ...]
) -> None:
    refused(rich.model, edit(damaged, **changes), *fragments)


@pytest.mark.parametrize(
    ("change", "fragments"),
    [
        (lambda t: t.update({"base_model.model.model.x": t.popitem()[1]}), ("1 missing", "1 extra: base_model.model.model.x")),
        (lambda t: t.update({DOWN: t[DOWN][:, :-1].contiguous()}), (f"1 misshapen: {DOWN} is [4, 31], not [4, 32]",)),
        (lambda t: t.update({DOWN: t[DOWN].to(torch.int8)}), (f"{DOWN} is stored as int8",)),
        (lambda t: t.clear(), ("missing",)),
        (lambda t: t.update({DOWN.replace("lora_A", "lora_A.default"): t.pop(DOWN)}), ("lora_A.default",)),
    ],
)  # fmt: skip
def test_tensors_that_do_not_fit_are_named_with_their_numbers(
    rich: Trained, damaged: Path, change: Any, fragments: tuple[str, ...]
) -> None:
    edit_tensors(damaged, change)
    refused(rich.model, damaged, ADAPTER, *fragments)


def test_an_adapter_of_another_shape_is_refused_with_numbers(rich: Trained, save_tiny: SaveTiny) -> None:
    refused(save_tiny(num_hidden_layers=1, **BIASED).directory, rich.adapter, "extra", "layers.1")
    refused(save_tiny(hidden_size=48, **BIASED).directory, rich.adapter, "is [4, 32], not [4, 48]")
    refused(save_tiny().directory, rich.adapter, "extra", "base_layer.bias")


def test_the_lengths_of_what_is_looked_up_are_refused(train: Train) -> None:
    trained = train({}, target_modules=["embed_tokens", "q_proj"], use_dora=True)
    refused(trained.model, trained.adapter, "use_dora=true is not supported for model.embed_tokens")


def test_a_directory_without_an_adapter_is_refused(rich: Trained, tmp_path: Path) -> None:
    refused(rich.model, tmp_path / "none", "no such directory")
    refused(rich.model, tmp_path, "adapter_config.json: no such file")
    shutil.copy(rich.adapter / "adapter_config.json", tmp_path)
    refused(rich.model, tmp_path, f"{ADAPTER}: no such file")
    with pytest.raises(TypeError, match="adapter=5 must be a name or a path"):
        with_adapter(open_checkpoint(rich.model), 5)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"base_model_name_or_path": "org/Another-Llama"}, "made for the model 'org/Another-Llama', and applied to"),
        ({"fan_in_fan_out": True}, "fan_in_fan_out is true, but no matrix of a Llama is stored so"),
        ({"a_field_of_tomorrow": 3}, "a_field_of_tomorrow is not read"),
    ],
)
def test_what_is_not_followed_is_said(rich: Trained, damaged: Path, changes: dict[str, Any], told: str) -> None:
    with pytest.warns(UserWarning, match=told):
        checkpoint = with_adapter(open_checkpoint(rich.model), edit(damaged, **changes))
    assert_same_logits(logits_of(checkpoint), rich)


def test_the_models_own_name_is_known_wherever_it_lies(rich: Trained, damaged: Path, tmp_path: Path) -> None:
    cached = tmp_path / "models--org--Llama" / "snapshots" / "0a1b"
    shutil.copytree(rich.model, cached)
    with_adapter(open_checkpoint(cached), edit(damaged, base_model_name_or_path="org/llama"))
    with_adapter(open_checkpoint(cached), edit(damaged, base_model_name_or_path=None))
