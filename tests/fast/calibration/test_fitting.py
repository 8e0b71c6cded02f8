"""The one pass in which a model is fitted: on the inputs that its rounded matrices give, layer by layer, and reproducibly."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from llama_fast.build import build
from llama_fast.calibration.fitting import INPUTS, Fit, calibrated
from llama_fast.calibration.moments import Moments
from llama_fast.calibration.text import calibration_rows
from llama_fast.encodings.int4 import Int4
from llama_fast.encodings.int8 import Int8
from llama_fast.encodings.sparse24 import Sparse24
from llama_fast.model.matrices import Stored
from llama_fast.plan import Plan
from llama_ref.checkpoint import Checkpoint, random_checkpoint
from llama_ref.config import LlamaConfig
from oracle.subjects.fast import FastSubject

CONFIG = LlamaConfig(
    dim=64, n_layers=2, n_heads=4, n_kv_heads=2, head_dim=16, ffn_dim=96, vocab_size=101, max_context=64, window=24
)
INPUT_STAGES = {"qkv": "attention_norm", "wo": "attention", "gate_up": "ffn_norm", "w2": "ffn_hidden"}
TOKENS = torch.randint(101, (5, 48), generator=torch.Generator().manual_seed(4))


def model(**changes: object) -> Checkpoint:
    return random_checkpoint(dataclasses.replace(CONFIG, **changes), 3, "cpu", torch.float32)  # type: ignore[arg-type]


@dataclasses.dataclass(frozen=True)
class Recording(Fit):
    """A fit that keeps the moments which its matrices were fitted to."""

    seen: dict[str, Moments] = dataclasses.field(default_factory=dict)

    def fitted(self, stems: tuple[str, ...], moments: Moments) -> list[Stored]:
        self.seen[stems[0]] = moments
        return super().fitted(stems, moments)


def tensors_of(fit: Fit) -> dict[str, torch.Tensor]:
    return {
        f"{stem}.{part}": tensor for stem, stored in calibrated(fit, TOKENS) for part, tensor in stored.tensors.items()
    }


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_every_matrix_is_fitted_to_the_inputs_that_the_rounded_model_gives_it(tied: bool) -> None:
    original = dataclasses.replace(model(tie_embeddings=tied, attention_bias=True), encodings={})
    fit = Recording(original, Int4(32))
    made = Checkpoint(original.config, tensors_of(fit), None, "int4-g32")
    subject = FastSubject(build(made, Plan(Int4(32)), "cpu", torch.float32))
    traces = subject.trace(TOKENS.tolist(), [TOKENS.shape[1]] * len(TOKENS))
    found = 0
    for layer in range(CONFIG.n_layers):
        for role, names in INPUTS.items():
            x = torch.cat([trace[f"layers.{layer}.{INPUT_STAGES[role]}"] for trace in traces])
            H = fit.seen[f"layers.{layer}.{names[0]}"].H
            torch.testing.assert_close(H, x.T @ x / len(x), rtol=1e-3, atol=1e-5 * float(H.abs().max()))
            found += 1
    assert found == len(fit.seen) - (not tied), "the head of an untied model is fitted too"


@pytest.mark.parametrize("kind", [Int4(32, True), Sparse24()], ids=lambda kind: kind.name)
def test_the_same_text_gives_the_same_tensors(kind: Int4 | Sparse24) -> None:
    first, again = tensors_of(Fit(model(), kind)), tensors_of(Fit(model(), kind))
    assert first.keys() == again.keys() and all(torch.equal(first[name], again[name]) for name in first)
    parts = (("norm", "weight"), ("layers.1.attention.wo", "weight"))
    other = dict(calibrated(Fit(model(), kind), TOKENS.flip(1)))
    same = [torch.equal(first[f"{stem}.{part}"], other[stem].parts[part]) for stem, part in parts]
    assert same == [True, False]


def test_what_the_encoding_leaves_alone_is_as_it_was_stored() -> None:
    original = model()
    narrow = Checkpoint(CONFIG, {name: w[:].bfloat16() for name, w in original.weights.items()})
    found = tensors_of(Fit(narrow, Sparse24()))
    for name in ("norm.weight", "layers.1.ffn_norm.weight", "tok_embeddings.weight"):
        assert torch.equal(found[name], narrow.weights[name][:])
    assert {found[f"{stem}.weight"].dtype for stem in ("output", "layers.0.attention.wq")} == {torch.bfloat16}


def test_a_head_may_be_stored_otherwise() -> None:
    for head, kind in (("int8", torch.int8), ("dense", torch.float32)):
        original = dataclasses.replace(model(), encodings={"output": head})
        found = tensors_of(Fit(original, Int4(32)))
        assert found["output.weight"].dtype is kind and found["layers.0.attention.wq.weight"].dtype is torch.int32


def test_singular_moments_and_dead_inputs_are_said() -> None:
    original = model()
    weights = dict(original.weights)
    weights["layers.1.ffn_norm.weight"] = original.weights["layers.1.ffn_norm.weight"][:].clone()
    weights["layers.1.ffn_norm.weight"][3] = 0
    said: list[str] = []
    tensors = {}
    for stem, stored in calibrated(Fit(Checkpoint(CONFIG, weights), Int4(32), notice=said.append), TOKENS):
        tensors[stem] = stored
    assert said == ["layers.1.feed_forward.w1: 1 of 64 inputs are never active in the text"]
    assert Int4(32).decode(tensors["layers.1.feed_forward.w1"].parts)[:, 3].any(), "another text may reach them"


def test_an_encoding_that_has_no_fit_is_refused() -> None:
    with pytest.raises(ValueError, match="the encoding int8 cannot be fitted to a text"):
        Fit(model(), Int8())


def test_a_text_becomes_whole_rows_and_a_shorter_one_is_said() -> None:
    def encode(text: str) -> list[int]:
        return list(text.encode())

    rows, notice = calibration_rows("ab" * 2000, encode, 3, 256)
    assert rows.shape == (3, 256) and not notice
    rows, notice = calibration_rows("ab" * 300, encode, 4, 256)
    assert rows.shape == (2, 256) and notice == "the calibration text gives 2 rows of 256 tokens where 4 were asked for"
    rows, notice = calibration_rows("ab" * 100, encode, 4, 256)
    assert rows.shape == (1, 200) and "1 rows of 200" in notice
    with pytest.raises(ValueError, match="has 100 tokens: at least 128 are needed"):
        calibration_rows("ab" * 50, encode)


def test_rows_beyond_the_context_are_refused() -> None:
    with pytest.raises(ValueError, match="rows of 65 tokens exceed the model's context of 64"):
        list(calibrated(Fit(model(), Int4(32)), torch.zeros(1, 65, dtype=torch.int64)))
