"""`transformers` as third witness: an independent reader of the same directory, and an independent Llama.

It agrees with `llama_ref` within float32's own error, in logits and in greedy tokens; and where it must not, it differs.
"""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from llama_fast.build import build
from llama_fast.recipes import optimised
from llama_ref.checkpoint import Checkpoint, open_checkpoint
from llama_ref.generate import greedy
from llama_ref.model import Llama
from oracle.questions.cases import Case, standard_case
from oracle.questions.judge import Bench, judge
from oracle.questions.localise import first_beyond, judge_rope_table, judge_stages
from oracle.statistics.compare import Outcome, unit_roundoff
from oracle.subjects.adapters import RefSubject, angles
from oracle.subjects.fast import FastSubject
from oracle.subjects.others import HFSubject

transformers = pytest.importorskip("transformers")

LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 5e5,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
SHAPES: dict[str, dict[str, Any]] = {
    "as many kv heads, untied": {"num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 16},
    "grouped, tied": {"num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 24, "tie_word_embeddings": True},
    "one kv head, wide": {"num_attention_heads": 3, "num_key_value_heads": 1, "head_dim": 80},
    "llama3 rope": {
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "rope_parameters": LLAMA3_ROPE,
    },
}


@pytest.fixture(scope="module", params=list(SHAPES))
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Checkpoint]:
    """A random model of `transformers`, and what `llama_ref` reads from the directory it was saved to."""
    config = transformers.LlamaConfig(
        vocab_size=199,
        hidden_size=48,
        intermediate_size=96,
        num_hidden_layers=2,
        max_position_embeddings=256,
        rms_norm_eps=1e-5,
        attn_implementation="eager",
        **SHAPES[request.param],
    )
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for weight in model.parameters():  # std 1/sqrt(columns): with the default 0.02 even a wrong theta is invisible
            weight.normal_(1.0, 0.1) if weight.dim() == 1 else weight.normal_(0.0, weight.shape[1] ** -0.5)
    path: Path = tmp_path_factory.mktemp("witness")
    model.save_pretrained(path)
    return model, open_checkpoint(path)


def case_of(checkpoint: Checkpoint) -> Case:
    return standard_case(checkpoint.config.vocab_size, checkpoint.config.max_context)


def bench_of(checkpoint: Checkpoint, dtype: torch.dtype = torch.float32) -> Bench:
    truth = RefSubject(checkpoint.config, checkpoint.weights, torch.float64)
    return Bench(truth, RefSubject(checkpoint.config, checkpoint.weights, dtype))


def test_the_witness_agrees_on_prefill_cache_and_greedy(pair: tuple[Any, Checkpoint]) -> None:
    model, checkpoint = pair
    verdict = judge(HFSubject(model), bench_of(checkpoint), case_of(checkpoint))
    assert verdict.outcome is Outcome.AGREE, verdict.failures


def test_the_fast_twin_agrees_on_the_same_directory(pair: tuple[Any, Checkpoint]) -> None:
    _, checkpoint = pair
    subject = FastSubject(build(checkpoint, optimised(), "cpu", torch.float32))
    verdict = judge(subject, bench_of(checkpoint), case_of(checkpoint))
    assert verdict.outcome is Outcome.AGREE, verdict.failures


def test_greedy_tokens_are_the_same(pair: tuple[Any, Checkpoint]) -> None:
    model, checkpoint = pair
    prompt = list(case_of(checkpoint).prompts[0])
    ((theirs, _),) = HFSubject(model).greedy([prompt], 16)
    assert greedy(Llama(checkpoint.config, checkpoint.weights, torch.float32), prompt, 16) == theirs


def test_the_witness_is_judged_block_by_block(pair: tuple[Any, Checkpoint]) -> None:
    model, checkpoint = pair
    rows = [row[:64] for row in case_of(checkpoint).rows]
    truth, plain = (RefSubject(checkpoint.config, checkpoint.weights, t) for t in (torch.float64, torch.float32))
    traces = HFSubject(model).trace(rows, [64, 64])
    stages = judge_stages(rows, traces, truth, plain, 2, unit_roundoff(torch.float32))
    assert [stage.name for stage in stages] == ["embedding", "layers.0", "norm", "logits"]
    assert first_beyond(stages) is None


def test_a_wrong_theta_makes_the_witness_differ(pair: tuple[Any, Checkpoint]) -> None:
    model, checkpoint = pair
    config = replace(checkpoint.config, rope_theta=checkpoint.config.rope_theta * 1.001)
    other = replace(checkpoint, config=config)
    rows = case_of(checkpoint).rows
    assert bench_of(other).prefill(HFSubject(model), rows).outcome is Outcome.DIFFER


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_the_witness_agrees_in_bfloat16(attention: str, pair: tuple[Any, Checkpoint]) -> None:
    _, checkpoint = pair
    weights = {name: source[:].bfloat16() for name, source in checkpoint.weights.items()}
    bench = bench_of(replace(checkpoint, weights=weights), torch.bfloat16)
    narrow = transformers.LlamaForCausalLM.from_pretrained(
        checkpoint.path, dtype=torch.bfloat16, attn_implementation=attention
    )
    verdict = judge(HFSubject(narrow.eval()), bench, case_of(checkpoint))
    assert verdict.outcome is Outcome.AGREE, verdict.failures


def test_a_whole_model_cast_to_bfloat16_differs_by_its_angles(pair: tuple[Any, Checkpoint]) -> None:
    """A mistake often made: `.to(bfloat16)` rounds RoPE's frequencies too, which loading in bfloat16 does not.

    In bfloat16 logits it may drown; the named check of the angles sees it always.
    """
    model, checkpoint = pair

    def table(of: Any) -> torch.Tensor:
        cos, sin = of.model.rotary_emb(torch.zeros(1), torch.arange(256)[None])
        half = checkpoint.config.head_dim // 2
        return torch.stack([cos[0, :, :half], sin[0, :, :half]], -1)

    loaded = transformers.LlamaForCausalLM.from_pretrained(checkpoint.path, dtype=torch.bfloat16)
    cast = copy.deepcopy(model).to(torch.bfloat16)
    angle_Td = angles(checkpoint.config, 256)
    assert judge_rope_table(table(loaded), angle_Td).outcome is Outcome.AGREE
    assert judge_rope_table(table(cast), angle_Td).outcome is Outcome.DIFFER
