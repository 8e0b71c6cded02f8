"""The oracle on trial: every fault of the catalogue must give DIFFER at its place, every lawful variation AGREE."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import trials
from _pytest.mark import ParameterSet
from catalogue import FAULTS, MODEL_FAULTS, Fault
from variations import VARIATIONS, Variation

from llama_fast.build import build
from llama_ref.checkpoint import Checkpoint
from oracle.statistics.compare import Outcome
from oracle.verify import judge_runner

QUICK = ("theta x 2", "on halves", "decode sees one slot ahead", "written one slot later", "eps x 10")


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of `transformers` with eps and theta that are no defaults."""
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=199,
        hidden_size=48,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        rms_norm_eps=2e-4,
        rope_parameters={"rope_type": "default", "rope_theta": 3e4},
    )
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config)
    with torch.no_grad():
        for weight in model.parameters():
            weight.normal_(1.0, 0.1) if weight.dim() == 1 else weight.normal_(0.0, weight.shape[1] ** -0.5)
    path: Path = tmp_path_factory.mktemp("witness")
    model.save_pretrained(path)
    return path


def tried(fault: Fault, checkpoint: Checkpoint, directory: Path) -> trials.Found:
    if fault.trial in ("witness", "numbers"):
        return {"witness": trials.witness, "numbers": trials.tensors}[fault.trial](directory)
    return trials.TRIALS[fault.trial](checkpoint, fault.plan, fault.dtype)


def test_the_catalogue_is_large_and_its_names_are_its_own() -> None:
    assert len(FAULTS) >= 225 and len(VARIATIONS) >= 28
    assert len({(fault.family, fault.name) for fault in FAULTS}) == len(FAULTS)
    assert len({variation.name for variation in VARIATIONS}) == len(VARIATIONS)


def sampled() -> list[ParameterSet]:
    """All faults; two of three are for `tox -e faults`, which asks the whole catalogue."""
    marks = ([], [pytest.mark.heavy], [pytest.mark.heavy])
    return [
        pytest.param(fault, marks=marks[number % 3], id=f"{fault.family}: {fault.name}")
        for number, fault in enumerate(FAULTS)
    ]


@pytest.mark.parametrize("fault", sampled())
def test_a_planted_fault_differs_where_it_is(
    fault: Fault, tiny: Checkpoint, directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fault.plant(monkeypatch)
    found = tried(fault, tiny, directory)
    assert found.verdict.outcome is Outcome.DIFFER
    if fault.first.startswith(("layers.", "embedding")):
        assert found.first == fault.first
    else:
        assert fault.first in found.words


def test_without_a_fault_every_trial_agrees(tiny: Checkpoint, directory: Path) -> None:
    found = {name: trial(tiny, FAULTS[0].plan, torch.float32) for name, trial in trials.TRIALS.items()}
    found |= {"witness": trials.witness(directory), "numbers": trials.tensors(directory)}
    assert {name: each.words for name, each in found.items()} == dict.fromkeys(found, "")
    assert all(each.verdict.outcome is Outcome.AGREE for each in found.values())


@pytest.mark.parametrize("fault", [f for f in MODEL_FAULTS if f.name in QUICK], ids=lambda fault: fault.name)
def test_the_quick_verdict_beside_a_rung_sees_the_gross_ones(
    fault: Fault, tiny: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    fault.plant(monkeypatch)
    assert judge_runner(build(tiny, fault.plan, "cpu", fault.dtype), tiny, cache_length=256).outcome is Outcome.DIFFER


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("variation", VARIATIONS, ids=lambda variation: variation.name)
def test_a_lawful_variation_agrees(
    variation: Variation, dtype: torch.dtype, tiny: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = variation.tried(tiny, dtype, 1, monkeypatch)
    assert found.verdict.outcome is Outcome.AGREE, found.words
