"""Draw docs/oracle.svg: `python docs/oracle_picture.py`. The same numbers and bytes at every run on one kind of machine."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from llama_fast.build import build
from llama_fast.model import llama as model
from llama_fast.recipes import optimised
from llama_ref.checkpoint import random_checkpoint
from llama_ref.config import LlamaConfig
from oracle.questions.cases import random_row
from oracle.questions.checkpoints import references
from oracle.questions.judge import Bench
from oracle.report.pictures import BUDGET, drawn
from oracle.subjects.fast import FastSubject

CONFIG = LlamaConfig(
    dim=64, n_layers=2, n_heads=4, n_kv_heads=2, head_dim=24, ffn_dim=96, vocab_size=257, max_context=256
)


def main() -> None:
    checkpoint, row = random_checkpoint(CONFIG, seed=0), random_row(257, 160, seed=1)
    runner = build(checkpoint, optimised(), "cpu", torch.bfloat16)
    bench = Bench(*references(runner, checkpoint))
    bench.prefill(FastSubject(runner), [row])
    (right,) = bench.curves
    table = model.rope_table
    with patch.object(
        model, "rope_table", lambda config: torch.cat([table(config)[:100], table(config)[101:], table(config)[-1:]])
    ):
        faulty = build(checkpoint, optimised(), "cpu", torch.bfloat16)
    bench.prefill(FastSubject(faulty), [row])
    (wrong,) = bench.curves

    def draw(axes: Any) -> None:
        axes.plot(right.yardstick, label="yardstick")
        axes.plot(wrong.subject, label="a fault beyond 100")
        axes.plot(right.subject, label="our twin")
        axes.plot(right.budget, **BUDGET)
        axes.set(yscale="log", xlabel="position", ylabel="relative error")

    picture = drawn(draw).replace("<svg ", '<svg xmlns="http://www.w3.org/2000/svg" ', 1)
    Path(__file__).with_name("oracle.svg").write_text(picture + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
