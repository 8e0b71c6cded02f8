"""A cache of eight bits is judged by what it keeps, by attention over that, and by its loss; faults of each are named."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor

from llama_fast.build import build
from llama_fast.caches import eight_bits, writing
from llama_fast.caches.eight_bits import EightBitLayer
from llama_fast.caches.paged import Paged
from llama_fast.caches.static import Static
from llama_fast.plan import Plan
from llama_fast.recipes import encoding_named, optimised
from llama_ref.checkpoint import random_checkpoint
from llama_ref.config import LlamaConfig
from oracle.plans import Words
from oracle.questions.cases import random_row
from oracle.questions.eight_bits import judge_loss
from oracle.report.certificate import Certificate
from oracle.statistics.compare import Outcome
from oracle.verify import _verify_eight_bits, references, verify

CONFIG = LlamaConfig(
    dim=48, n_layers=2, n_heads=6, n_kv_heads=3, head_dim=8, ffn_dim=80, vocab_size=101, max_context=128
)
ROWS = [random_row(101, length, seed=length) for length in (60, 41, 23)]
CPU = torch.device("cpu")


def asked(cache: Any, dtype: torch.dtype = torch.float32, encoding: str = "dense") -> Certificate:
    checkpoint = random_checkpoint(CONFIG, 4, "cpu", torch.float32)
    runner = build(checkpoint, Plan(encoding_named(encoding), cache=cache), "cpu", dtype)
    certificate = Certificate({})
    truth, yardstick = references(runner, checkpoint)
    certificate.ask("eight bits", lambda: _verify_eight_bits(certificate, "", runner, truth, yardstick, ROWS))
    return certificate


@pytest.mark.parametrize("cache", [Static(bits=8), Paged(page=4, bits=8)], ids=["slots", "pages"])
@pytest.mark.parametrize(
    ("dtype", "encoding"), [(torch.float32, "dense"), (torch.bfloat16, "dense"), (torch.bfloat16, "int8")]
)
def test_what_is_kept_and_attention_over_it_agree(cache: Any, dtype: torch.dtype, encoding: str) -> None:
    verdict = asked(cache, dtype, encoding).parts["eight bits"]
    assert verdict.outcome is Outcome.AGREE, verdict
    assert {check.name for check in verdict.checks} == {"kept", "attention"}


def coarser(x: Tensor) -> tuple[Tensor, Tensor]:
    wide = x.float()
    step = (wide.abs().amax(-1, keepdim=True) / 120).clamp(min=1e-30)
    return (wide / step).round().to(torch.int8), step


def cut_off(x: Tensor) -> tuple[Tensor, Tensor]:
    wide = x.float()
    step = (wide.abs().amax(-1, keepdim=True) / 127).clamp(min=1e-30)
    return (wide / step).to(torch.int8), step


def of_all_heads(x: Tensor) -> tuple[Tensor, Tensor]:
    wide = x.float()
    step = (wide.abs().amax((-1, -2), keepdim=True) / 127).clamp(min=1e-30).expand(*wide.shape[:-1], 1)
    return (wide / step).round().to(torch.int8), step


@pytest.mark.parametrize("fault", [coarser, cut_off, of_all_heads], ids=lambda fault: fault.__name__)
def test_integers_that_are_not_those_promised_differ(fault: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(eight_bits, "in_steps", fault)
    verdict = asked(Static(bits=8)).parts["eight bits"]
    assert [check.name for check in verdict.failures] == ["kept"]


def test_attention_that_takes_a_step_for_anothers_differs(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is read afterwards is right; what attention read was not."""
    own = EightBitLayer.parts

    def parts(layer: EightBitLayer) -> Any:
        for rows, k, v in own(layer):
            yield rows, k, v * layer.steps.v.roll(1, 1) / layer.steps.v.clamp(min=1e-20)

    monkeypatch.setattr(EightBitLayer, "parts", parts)
    certificate = asked(Static(bits=8))
    failures = certificate.parts["eight bits"].failures
    assert [check.name for check in failures] == ["attention"] and "layers.0" in failures[0].where


def test_steps_that_are_written_a_position_late_differ(monkeypatch: pytest.MonkeyPatch) -> None:
    own = writing.write_at

    def late(slots: Tensor, new: Tensor, position: Tensor) -> Tensor:
        return own(slots, new.roll(1, 1) if new.shape[-1] == 1 else new, position)

    monkeypatch.setattr("llama_fast.caches.static.write_at", late)
    assert asked(Static(bits=8)).parts["eight bits"].outcome is Outcome.DIFFER


def test_the_loss_is_judged_and_a_lossier_cache_is_beyond_it(monkeypatch: pytest.MonkeyPatch) -> None:
    config = dataclasses.replace(CONFIG, max_context=600)
    checkpoint = random_checkpoint(config, 4, "cpu", torch.float32)
    exact = build(checkpoint, Plan(cache=Static()), "cpu", torch.float32)
    narrow = build(checkpoint, Plan(cache=Static(bits=8)), "cpu", torch.float32)
    rows = [random_row(101, 300, seed=seed) for seed in (1, 2)]
    assert judge_loss(narrow, exact, rows).outcome is Outcome.AGREE
    assert judge_loss(narrow, exact, [rows[0][:20]]).outcome is Outcome.EMPTY

    def three_bits(x: Tensor) -> tuple[Tensor, Tensor]:
        step = (x.float().abs().amax(-1, keepdim=True) / 1).clamp(min=1e-30)
        return (x.float() / step).round().to(torch.int8), step

    monkeypatch.setattr(eight_bits, "in_steps", three_bits)
    assert judge_loss(narrow, exact, rows).outcome is Outcome.DIFFER


def test_a_plan_of_eight_bits_is_verified_whole() -> None:
    checkpoint = random_checkpoint(CONFIG, 4, "cpu", torch.float32)
    certificate = verify(checkpoint, dataclasses.replace(optimised(), cache=Paged(bits=8)), CPU, torch.float32)
    assert certificate.outcome is Outcome.AGREE, certificate
    assert "float32 eight bits" in certificate.parts and "paged in 8 bits" in str(certificate)


def test_words_spell_it() -> None:
    assert Words("dense", cache="paged", cache_bits=8).plan().cache == Paged(bits=8)
    with pytest.raises(ValueError, match="--cache-bits is for a static or a paged cache"):
        Words("dense", cache="growing", cache_bits=8).plan()
