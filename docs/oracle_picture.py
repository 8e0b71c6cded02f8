"""Draw docs/oracle.svg: `python docs/oracle_picture.py`. The same numbers and bytes at every run on one kind of machine."""

from __future__ import annotations

from pathlib import Path
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
from oracle.report.page import Line, chart
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
    lines = [
        Line("yardstick", list(enumerate(right.yardstick))),
        Line("a fault beyond 100", list(enumerate(wrong.subject))),
        Line("our twin", list(enumerate(right.subject))),
        Line("budget", list(enumerate(right.budget)), dashed=True),
    ]
    picture = chart(lines, "position", "relative error")
    picture = picture.replace(
        "<svg ", '<svg xmlns="http://www.w3.org/2000/svg" font-family="sans-serif" font-size="12" ', 1
    )
    Path(__file__).with_name("oracle.svg").write_text(picture + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
