"""Measure how far innocent implementations scatter, and write the tails that budgets are made of.

    python -m oracle.spread [--seeds 12] [--models 1] [--only logits|stages] [--out oracle/data/spread.json]
    python -m oracle.spread --device cuda --only stages [--seeds 4]        the parts of a block as a GPU computes them

Innocent are the reference, our twin, and `transformers` with its two attentions, each in several orders of summation
(`oracle.statistics.orders`), on random models of three shapes and, with --models, on SmolLM2-135M with real text. For the
parts of a block it is our twin, with each attention kernel that PyTorch has. A GPU's kernels err otherwise than a CPU's
(float32 attention in three products of TF32), so it has a table of its own, measured on the 7B shape too. The seeds from
1000 on are left to tests, which check the factors on orders that made none of them.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import tempfile
import warnings
from collections import Counter, defaultdict
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from llama_fast.build import build
from llama_fast.plan import Plan
from llama_fast.recipes import optimised
from llama_ref.checkpoint import Checkpoint, open_checkpoint
from llama_ref.config import LlamaConfig
from llama_ref.models import DEFAULT_MODEL, resolve
from oracle.questions.cases import standard_case
from oracle.questions.judge import Bench
from oracle.statistics.budget import KINDS, ORDERS, STATISTICS, TABLES, kind_of
from oracle.statistics.compare import ratios, unit_roundoff
from oracle.statistics.orders import Order
from oracle.subjects.adapters import RefSubject, Weights, Yardstick
from oracle.subjects.fast import FastSubject
from oracle.subjects.others import HFSubject
from oracle.subjects.subject import Subject, Trace

SHAPES: dict[str, dict[str, int]] = {
    "tiny": {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2},
    "deep": {"hidden_size": 96, "intermediate_size": 256, "num_attention_heads": 6, "num_key_value_heads": 6},
    "wide": {"hidden_size": 768, "intermediate_size": 2048, "num_attention_heads": 6, "num_key_value_heads": 2},
}
LAYERS = {"tiny": 2, "deep": 5, "wide": 1}
TAIL_SHARES = {"whole": 0.1, "window": 0.05, "position_rms": 0.01, "position_max": 0.01}
TOO_FEW = 20  # numbers that a tail must rest on
GPU_MODEL = "random:llama-2-7b"
ATTENTIONS = {"cpu": ("", "MATH"), "cuda": ("", "MATH", "EFFICIENT_ATTENTION")}
"""PyTorch's own choice, and kernels that it might have chosen."""
USUAL_ANGLES = "usual angles"


@dataclass
class Sample:
    """Log-ratios of one statistic: by who made them (implementation, order, model's shape, stage)."""

    by: dict[str, list[Tensor]] = field(default_factory=lambda: defaultdict(list))

    def add(self, who: str, ratio: Tensor) -> None:
        self.by[who].append(ratio[ratio > 0].log().double())

    def tail(self, share: float) -> dict[str, float]:
        """The worst mean, and an exponential fitted to the largest `share` of what all differ from their means."""
        groups = [torch.cat(values) for values in self.by.values()]
        groups = [group for group in groups if len(group)]
        worst = max(float(group.mean()) for group in groups)
        rest = torch.cat([group - group.mean() for group in groups]).sort(descending=True).values
        count = max(min(TOO_FEW, len(rest) - 1), int(share * len(rest)))
        start = float(rest[count])
        scale = float((rest[:count] - start).mean())
        scale *= 1 + 2 / math.sqrt(count)  # two standard errors of an exponential's mean upwards
        return {"worst": worst, "start": start, "share": count / len(rest), "scale": scale}


Samples = dict[str, dict[str, Sample]]


def main(words: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=12)
    parser.add_argument("--models", type=int, default=1, help="1: also SmolLM2-135M on its text; on a GPU the 7B shape")
    parser.add_argument("--only", choices=("logits", "stages"), help="measure these, keep the file's other tails")
    parser.add_argument("--device", choices=tuple(TABLES), default="cpu")
    parser.add_argument("--out", type=Path, help="default: the device's table")
    asked = parser.parse_args(words)
    if asked.device != "cpu" and asked.only != "stages":
        parser.error(f"on {asked.device} the parts of a block are measured, and no logits: --only stages")
    device, table = torch.device(asked.device), asked.out or TABLES[asked.device]
    samples: Samples = defaultdict(lambda: defaultdict(Sample))
    runs: Counter[str] = Counter()
    for seed in range(asked.seeds):
        for shape in SHAPES:
            if shape == "wide" and seed >= max(1, asked.seeds // 4):
                continue
            with tempfile.TemporaryDirectory() as directory:
                for dtype in (torch.float32, torch.bfloat16):
                    models = random_models(shape, seed, dtype, directory)
                    runs += one_model(samples, shape, *models, dtype, seed, device, asked.only)
        print(f"seed {seed}: {runs.total()} runs", file=sys.stderr, flush=True)
    if asked.models:
        for dtype in (torch.float32, torch.bfloat16):
            name, models = ("smollm2", default_models(dtype)) if asked.device == "cpu" else ("7b", gpu_models(dtype))
            runs += one_model(samples, name, *models, dtype, 0, device, asked.only)
            print(f"{name}: {runs.total()} runs", file=sys.stderr, flush=True)
    tails = {
        key: {name: by_name[name].tail(TAIL_SHARES[name]) for name in STATISTICS} for key, by_name in samples.items()
    }
    rounded = {
        key: {name: {k: round(v, 5) for k, v in tail.items()} for name, tail in of.items()} for key, of in tails.items()
    }
    before = json.loads(table.read_text(encoding="utf-8")) if asked.only and table.exists() else {}
    counts = before.get("runs", {}) | runs
    document = {"torch": torch.__version__, "runs": counts, "tails": before.get("tails", {}) | rounded}
    table.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


def random_models(shape: str, seed: int, dtype: torch.dtype, directory: str) -> tuple[Checkpoint, dict[str, Any], Any]:
    """A random model as a checkpoint and as `transformers` reads it from the same directory. Each seed has its own RoPE theta,
    whose powers round in their own way."""
    import transformers

    rope = {"rope_type": "default", "rope_theta": 10_000.0 * 1.1**seed}
    config = transformers.LlamaConfig(
        vocab_size=257, num_hidden_layers=LAYERS[shape], max_position_embeddings=256, rms_norm_eps=1e-5,
        rope_parameters=rope, **SHAPES[shape],
    )  # fmt: skip
    if not (Path(directory) / "config.json").exists():
        torch.manual_seed(seed)
        model = transformers.LlamaForCausalLM(config)
        with torch.no_grad():
            for weight in model.parameters():
                weight.normal_(1.0, 0.1) if weight.dim() == 1 else weight.normal_(0.0, weight.shape[1] ** -0.5)
        model.save_pretrained(directory)
    theirs = {
        name: transformers.LlamaForCausalLM.from_pretrained(directory, dtype=dtype, attn_implementation=name).eval()
        for name in ("eager", "sdpa")
    }
    return open_checkpoint(directory), theirs, None


def default_models(dtype: torch.dtype) -> tuple[Checkpoint, dict[str, Any], Any]:
    """SmolLM2-135M, and its tokenizer for the text."""
    import transformers

    found = resolve(DEFAULT_MODEL)
    assert found.path is not None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = transformers.AutoModelForCausalLM.from_pretrained(
            found.path.parent, gguf_file=found.path.name, dtype=dtype
        ).eval()
    return found.open(), {"sdpa": theirs}, found.tokenizer().encode


def gpu_models(dtype: torch.dtype) -> tuple[Checkpoint, dict[str, Any], Any]:
    """The 7B shape, drawn where it is used."""
    return resolve(GPU_MODEL).open(torch.device("cuda"), dtype), {}, None


def one_model(
    samples: Samples,
    shape: str,
    checkpoint: Checkpoint,
    theirs: dict[str, Any],
    encode: Any,
    dtype: torch.dtype,
    seed: int,
    device: torch.device,
    only: str | None = None,
) -> Counter[str]:
    """Add every innocent run on one model; their numbers, of "logits" and "stages"."""
    config, narrow = checkpoint.config, "narrow" if dtype is torch.bfloat16 else "wide"
    case = standard_case(config.vocab_size, config.max_context, encode, seed=2 * seed + 1)
    weights = Weights(checkpoint.weights, dtype, device)
    truth = RefSubject(config, weights, torch.float64, device)
    one, many = RefSubject(config, weights, dtype, device), Yardstick(config, weights, dtype, device)
    unit = unit_roundoff(dtype)
    benches = {"one": Bench(truth, one), "many": Bench(truth, many)}
    runs: Counter[str] = Counter()
    if only != "logits":
        yardsticks = {"one": one, "many": many}
        runs["stages"] = stage_runs(samples, shape, checkpoint, truth, yardsticks, dtype, seed, case.rows)
    if only == "stages":
        return runs
    known = {name: bench.of(case.rows) for name, bench in benches.items()}
    for who, subject, order in innocents(replace(checkpoint, weights=dict(weights)), theirs, dtype, seed):
        with Order(order):
            found = [subject.prefill_logits(case.rows)]
            found.append(subject.decode_logits(case.rows, case.splits[0].starts) if shape != "smollm2" else [])
        runs["logits"] += 1
        for name, rows in known.items():
            for route, starts in ((0, [1] * len(rows)), (1, case.splits[0].starts)):
                if found[route]:
                    t = [t[s - 1 :] for (t, _), s in zip(rows, starts)]
                    y = [y[..., s - 1 :, :] for (_, y), s in zip(rows, starts)]
                    for statistic, ratio in ratios(found[route], t, y, unit).items():
                        if route == 0 or statistic != "whole":
                            samples[f"logits {narrow} {name}"][statistic].add(f"{who} {shape}", ratio)
    return runs


def innocents(
    checkpoint: Checkpoint, theirs: dict[str, Any], dtype: torch.dtype, seed: int
) -> Iterator[tuple[str, Subject, int]]:
    """(name, subject, order of summation). Orders above those of the yardstick, and the library's own but for the reference."""
    config = checkpoint.config
    own = [ORDERS + 4 * seed + i for i in range(2)]
    reference = RefSubject(config, checkpoint.weights, dtype)
    yield from (("reference", reference, order) for order in own)
    for name, plan in (("plain twin", Plan()), ("joined twin", optimised())):
        twin = FastSubject(build(checkpoint, plan, "cpu", dtype))
        yield from ((name, twin, order) for order in (0, own[1] + 1))
    for name, model in theirs.items():
        yield from ((f"transformers {name}", HFSubject(model), order) for order in (0, own[1] + 2))


def stage_runs(
    samples: Samples,
    shape: str,
    checkpoint: Checkpoint,
    truth: RefSubject,
    yardsticks: dict[str, RefSubject],
    dtype: torch.dtype,
    seed: int,
    rows: Any,
) -> int:
    """Every part of every block on the subject's own inputs; attention by each of the device's ways."""
    narrow, layers = "narrow" if dtype is torch.bfloat16 else "wide", range(checkpoint.config.n_layers)
    layers = layers if len(layers) < 8 else range(0, len(layers), 6)  # of a deep model every sixth block stands for all
    cut = [rows[0][:72], rows[1][:55]]
    orders = (0, ORDERS + 4 * seed, ORDERS + 4 * seed + 1)
    ways = [(order, way) for way in (*ATTENTIONS[truth.device.type], USUAL_ANGLES) for order in orders]
    for order, way in ways:
        judged = {"": set(KINDS.values()) | {"pointwise"}, USUAL_ANGLES: {"rope"}}.get(way, {"attention"})
        with Order(order), as_usual() if way == USUAL_ANGLES else attention_by(way):
            traces = FastSubject(build(checkpoint, optimised(), truth.device, dtype)).trace(cut, [64, 55])
        shown: list[Trace] = [dict(trace) for trace in traces]
        for layer in layers:
            true = truth.stages_of_block(layer, shown)
            for name, yardstick in yardsticks.items():
                plain = yardstick.stages_of_block(layer, shown)
                for stage in true[0]:
                    if stage in traces[0] and kind_of(stage) in judged:
                        seen, t, y = ([row[stage] for row in part] for part in (traces, true, plain))
                        # Odd orders have their angles in float32: of a RoPE another implementation, of the rest another order.
                        which = f"{stage.split('.', 2)[-1]} {shape} {order and 1 + order % 2} {way}"
                        if way == USUAL_ANGLES:  # which do not scatter: each table is its own maker
                            which += f" {seed}"
                        who = which if stage.count(".") > 1 else "block"
                        of_kind = samples[f"{kind_of(stage)} {narrow} {name}"]
                        for statistic, ratio in ratios(seen, t, y, unit_roundoff(dtype), stage=True).items():
                            of_kind[statistic].add(who, ratio)
    return len(ways)


def as_usual() -> AbstractContextManager[Any]:
    """Angles from powers in float32, as most implementations have them."""

    def table(config: LlamaConfig) -> Tensor:
        power = torch.arange(0, config.head_dim, 2).float() / config.head_dim
        angle = torch.outer(torch.arange(config.max_context).float(), 1.0 / config.rope_theta**power)
        return torch.stack([angle.cos(), angle.sin()], -1)

    return patch("llama_fast.model.llama.rope_table", table)


def attention_by(way: str) -> AbstractContextManager[Any]:
    """PyTorch's attention by the backend of this name, and by the plain formula where that cannot; "": as it chooses."""
    return sdpa_kernel([getattr(SDPBackend, way), SDPBackend.MATH]) if way else nullcontext()


if __name__ == "__main__":
    main()
