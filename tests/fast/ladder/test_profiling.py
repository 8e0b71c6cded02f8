"""The account of a decode step: overlaps counted once, idle time told apart, everything adds up."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch.profiler import profile

from llama_fast.build import build
from llama_fast.caches.static import Static
from llama_fast.ladder.profiling import Decoder, Span, account, decode_some, kind, profile_decoding
from llama_fast.plan import Plan
from llama_fast.speculative.proposers import Draft
from llama_ref.checkpoint import Checkpoint


def test_overlaps_count_once_and_idle_time_is_named() -> None:
    spans = [
        Span("_in_registers", 100, 140),
        Span("_attend", 130, 150),  # begins under the one before it (programmatic dependent launch)
        Span("_in_registers", 132, 138),  # wholly inside
        Span("void gemv2T", 154, 174),  # after a gap of 4
        Span("triton_poi_fused_add", 194, 198),  # after 20 without a kernel: the host
        Span("_norm", 400, 500),  # outside the window
    ]
    times = account(Span("window", 100, 200), spans, steps=2)
    assert (times.products, times.attention, times.generated, times.other) == (30.0, 5.0, 2.0, 0.0)
    assert (times.gaps, times.host) == (3.0, 10.0)
    assert times.total == times.products + times.attention + times.generated + times.gaps + times.host == 50.0
    assert str(times) == "50 us a token: products 30, attention 5, generated 2, gaps 3, host 10"


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("triton_red_fused_mm_t_view_9", "generated"),
        ("triton_red_fused__fused_rms_norm__to_copy_mm_mul_t_view_15", "generated"),
        ("nvjet_hsh_64x8_64x16_4x1_v_bz_TNT", "products"),
        ("aten::addmm", "products"),
        ("cudnn_generated_fort_native_sdpa_sm80_flash_fprop", "attention"),
        ("aten::_scaled_dot_product_flash_attention_for_cpu", "attention"),
        ("## Call CompiledFxGraph fabc ##", "generated"),
        ("triton_per_fused__scaled_dot_product_8", "generated"),
        ("_norm", "other"),
        ("Memcpy DtoD (Device -> Device)", "other"),
    ],
)
def test_kernels_are_told_apart_by_name(name: str, expected: str) -> None:
    assert kind(name) == expected


def test_a_trace_is_written_and_the_account_adds_up(checkpoint: Checkpoint, tmp_path: Path) -> None:
    plain, static = build(checkpoint, Plan(), "cpu"), build(checkpoint, Plan(cache=Static()), "cpu")
    trace = tmp_path / "made" / "trace.json"
    decoders = [Decoder("baseline", plain), Decoder("static", static, static.allocate(1, 67))]
    times = profile_decoding(decoders, [5, 6, 7], trace)
    assert list(times) == ["baseline", "static"]
    for account_of in times.values():
        parts = account_of.products + account_of.attention + account_of.other + account_of.generated
        assert account_of.products > 0 and account_of.attention > 0 and account_of.other > 0
        assert 0.3 * account_of.total < parts <= 1.001 * account_of.total
    names = {event.get("name") for event in json.loads(trace.read_text())["traceEvents"]}
    assert {"decode: baseline", "decode: static"} <= names
    with pytest.raises(OSError, match="cannot write the trace"):
        profile_decoding([Decoder("baseline", plain)], [5], tmp_path)
    assert torch.is_grad_enabled()


@pytest.mark.parametrize("new_tokens", [2, 3, 12, 64])
def test_rounds_of_speculation_are_accounted_by_the_tokens_they_bring(checkpoint: Checkpoint, new_tokens: int) -> None:
    target, drafting = (build(checkpoint, Plan(cache=Static()), "cpu") for _ in range(2))
    decoder = Decoder("speculative", target, target.allocate(1, 80), Draft(drafting, k=3))
    with profile() as profiler:
        tokens = decode_some(decoder, [5, 6, 7], new_tokens)
    inside = next(e for e in profiler.events() or [] if e.name == "decode: speculative").time_range
    embedded = [
        e for e in profiler.events() or [] if e.name == "aten::embedding" and inside.start <= e.time_range.start
    ]
    forwards = sum(e.time_range.end <= inside.end for e in embedded)
    if new_tokens == 64:  # the draft agrees with its twin: four tokens for three of its steps and one check
        assert tokens == 32 and forwards == tokens
    assert 1 <= tokens <= max(1, new_tokens - 2)
