"""Biases, a window and every RoPE kind: the oracle knows them too, and finds what is left out."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from llama_fast.build import build
from llama_fast.encodings.int8 import Int8
from llama_fast.plan import Plan
from llama_ref.checkpoint import random_checkpoint
from llama_ref.config import LlamaConfig, RopeScaling
from oracle.questions.localise import first_beyond
from oracle.statistics.compare import Outcome
from oracle.subjects.fast import FastSubject
from oracle.verify import references, stage_reports, verify

SMALL = LlamaConfig(48, 2, 6, 2, 12, 72, 101, 192)
YARN = RopeScaling("yarn", 4.0, original_context=48)
VARIANTS: dict[str, dict[str, Any]] = {
    "biases": {"attention_bias": True, "mlp_bias": True},
    "window": {"window": 20},
    "linear": {"rope_scaling": RopeScaling("linear", 2.0)},
    "dynamic": {"rope_scaling": RopeScaling("dynamic", 2.0)},
    "llama3": {"rope_scaling": RopeScaling("llama3", 8.0, original_context=48)},
    "yarn": {"rope_scaling": YARN},
    "everything": {"attention_bias": True, "mlp_bias": True, "window": 33, "rope_scaling": YARN},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_variant_agrees(variant: str) -> None:
    checkpoint = random_checkpoint(dataclasses.replace(SMALL, **VARIANTS[variant]), 5)
    certificate = verify(checkpoint, Plan(Int8(), fuse_projections=True), torch.device("cpu"), torch.float32)
    if variant == "everything":  # which no config.json can say: its round trip cannot be asked, and nothing else fails
        assert [check.name for check in certificate.verdict.failures] == ["round trip: round trip"]
        assert certificate.outcome is Outcome.EMPTY
        return
    assert certificate.outcome is Outcome.AGREE, certificate.verdict.failures


@pytest.mark.parametrize(
    ("variant", "without", "stage"),
    [
        ("biases", {"attention_bias": False, "mlp_bias": False}, "layers.0.q"),
        ("window", {"window": None}, "layers.0.attention"),
        ("window", {"window": 21}, "layers.0.attention"),
        ("yarn", {"rope_scaling": None}, "layers.0.q_rope"),
        ("yarn", {"rope_scaling": dataclasses.replace(YARN, attention_factor=1.0)}, "layers.0.q_rope"),
        ("yarn", {"rope_scaling": dataclasses.replace(YARN, truncate=False)}, "layers.0.q_rope"),
    ],
)
def test_what_is_left_out_is_found_where_it_belongs(variant: str, without: dict[str, Any], stage: str) -> None:
    right = random_checkpoint(dataclasses.replace(SMALL, **VARIANTS[variant]), 5)
    wrong = dataclasses.replace(right.config, **without)
    weights = (
        {name: w for name, w in right.weights.items() if wrong.attention_bias or not name.endswith(".bias")}
        if variant == "biases"
        else right.weights
    )
    runner = build(dataclasses.replace(right, config=wrong, weights=weights), Plan(), "cpu", torch.float32)
    truth, yardstick = references(build(right, Plan(), "cpu", torch.float32), right)
    generator = torch.Generator().manual_seed(1)
    rows = [torch.randint(101, (length,), generator=generator).tolist() for length in (70, 41)]
    fault = first_beyond(stage_reports(FastSubject(runner), truth, yardstick, rows))
    assert fault is not None and fault.name == stage


def test_one_missing_bias_is_named() -> None:
    checkpoint = random_checkpoint(dataclasses.replace(SMALL, **VARIANTS["biases"]), 5)
    runner = build(checkpoint, Plan(), "cpu", torch.float32)
    block: Any = runner.model.blocks[1]
    block.w2.bias.zero_()
    truth, yardstick = references(runner, checkpoint)
    fault = first_beyond(stage_reports(FastSubject(runner), truth, yardstick, [list(range(60)), list(range(3, 40))]))
    assert fault is not None and fault.name == "layers.1.ffn_out"
