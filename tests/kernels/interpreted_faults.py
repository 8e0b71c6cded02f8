"""Faults planted in the kernels' calls, judged by the oracle's stages of the pass that runs, in Triton's interpreter.

Run by test_interpreted.py with TRITON_INTERPRET=1.
"""

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from llama_fast.build import build
from llama_fast.compilers.eager import Eager
from llama_fast.encodings.int8 import Int8
from llama_fast.kernels import many_rows, ops
from llama_fast.recipes import fused
from llama_ref.checkpoint import random_checkpoint
from llama_ref.config import LlamaConfig
from oracle.questions.localise import first_beyond
from oracle.subjects.fast import FastSubject
from oracle.verify import references, stage_reports

CONFIG = LlamaConfig(
    dim=48, n_layers=2, n_heads=4, n_kv_heads=2, head_dim=16, ffn_dim=80, vocab_size=61, max_context=96
)
ROWS = [[(7 * i + 3) % 61 for i in range(26)], [(5 * i * i + 1) % 61 for i in range(19)]]
FEW = [row[:12] for row in ROWS]
"""Enough for faults that show in any step."""
Calls = list[int]


@contextmanager
def changed(name: str, change: Callable[..., Any]) -> Iterator[None]:
    """NAME of `ops`, or of `many_rows`, called as change(original, number of the call in its pass, *arguments): two calls a pass
    and kind, one a block."""
    module = ops if hasattr(ops, name) else many_rows
    original, count = getattr(module, name), [0]

    def call(*arguments: Any, **options: Any) -> Any:
        count[0] += 1
        return change(original, count[0] - 1, *arguments, **options)

    setattr(module, name, call)
    try:
        yield
    finally:
        setattr(module, name, original)


def late_position(original: Any, number: int, qkv: Any, rope: Any, dtype: torch.dtype) -> Tensor:
    """The second block turns every token of many rows by the position after its own."""
    if number % 2:
        rope = rope._replace(cos=rope.cos.roll(-1, 0), sin=rope.sin.roll(-1, 0))
    return original(qkv, rope, dtype)  # type: ignore[no-any-return]


def late_step(
    original: Any, number: int, x: Tensor, gain: Tensor, eps: float, weight: Any, scale: Any, rope: Any, **options: Any
) -> Tensor:
    if number % 2 == 0:
        rope = rope._replace(cos=rope.cos.roll(-1, 0), sin=rope.sin.roll(-1, 0))
    return original(x, gain, eps, weight, scale, rope, **options)  # type: ignore[no-any-return]


def wrong_scale(
    original: Any, number: int, a: Tensor, weight: Tensor, scale: Tensor, x: Tensor, **options: Any
) -> Tensor:
    """The last product of the second block: four calls a pass, of which it is the last."""
    return original(a, weight, scale * 1.02 if number % 4 == 3 else scale, x, **options)  # type: ignore[no-any-return]


def early_slots(
    original: Any, number: int, q: Tensor, k: Tensor, v: Tensor, start: Tensor, *rest: Any, **options: Any
) -> Tensor:
    """Of a step of one token, the first block does not see the newest slot."""
    first = number % 2 == 0 and q.shape[0] == len(start)
    return original(q, k, v, (start - 1).clamp(min=0) if first else start, *rest, **options)  # type: ignore[no-any-return]


def lost_tile(original: Any, number: int, a: Tensor, weight: Any, scale: Any, x: Tensor, **options: Any) -> Tensor:
    """The last sixteen inputs of the first block's first product are in no tile."""
    if number % 4 == 0:
        a = a.clone()
        a[:, -16:] = 0
    return original(a, weight, scale, x, **options)  # type: ignore[no-any-return]


def scale_of_the_next_row(
    original: Any, number: int, x: Tensor, gain: Tensor, eps: float, weight: Any, scale: Tensor, **options: Any
) -> Tensor:
    """The second block's gate is scaled by its neighbour's scale."""
    return original(x, gain, eps, weight, scale.roll(1, 0) if number % 2 else scale, **options)  # type: ignore[no-any-return]


def scale_of_the_next_word(original: Any, number: int, x: Tensor, weight: Any, scale: Tensor, **options: Any) -> Tensor:
    """The head's scales are off by one."""
    return original(x, weight, scale.roll(1, 0), **options)  # type: ignore[no-any-return]


def slot_of_another_request(
    original: Any, number: int, q: Tensor, k: Tensor, v: Tensor, start: Tensor, *rest: Any, **options: Any
) -> Tensor:
    """In a step of the second block each row reads the fourth slot of its neighbour."""
    if number % 2 and q.shape[0] == len(start):
        k = k.clone()
        k[:, :, 3] = k[:, :, 3].roll(1, 0)
    return original(q, k, v, start, *rest, **options)  # type: ignore[no-any-return]


def stale_page(
    original: Any, number: int, q: Tensor, k: Tensor, v: Tensor, start: Tensor, *rest: Any, **options: Any
) -> Tensor:
    """Eight slots of the first block's values are those of the page before."""
    if number % 2 == 0:
        v = v.clone()
        v[:, :, 8:16] = v[:, :, :8].clone()
    return original(q, k, v, start, *rest, **options)  # type: ignore[no-any-return]


def found(runner: Any, rows: list[list[int]] = ROWS) -> str:
    truth, yardstick = references(runner, runner.checkpoint)
    first = first_beyond(stage_reports(FastSubject(runner), truth, yardstick, rows))
    return "nothing" if first is None else first.name


def main() -> None:
    checkpoint = random_checkpoint(CONFIG, 1, "cpu", torch.float32)
    runner = build(checkpoint, dataclasses.replace(fused(Int8()), compiler=Eager()), "cpu")
    assert found(runner) == "nothing"
    planted = (
        ("rotate_and_store", late_position, "layers.1.q_rope"),
        ("qkv", late_step, "layers.0.q_rope"),
        ("linear_add", wrong_scale, "layers.1"),
        ("attention", early_slots, "layers.0.attention"),
    )
    in_any_step = (
        ("attention", slot_of_another_request, "layers.1.attention"),
        ("attention", stale_page, "layers.0.attention"),
        ("linear_add", lost_tile, "layers.0.ffn_hidden"),
        ("gated", scale_of_the_next_row, "layers.1.ffn_hidden"),
        ("linear", scale_of_the_next_word, "logits"),
    )
    for name, change, where in (*planted, *in_any_step):
        with changed(name, change):
            seen = found(runner, FEW if (name, change, where) in in_any_step else ROWS)
        assert seen == where, f"{change.__name__}: found at {seen}, planted at {where}"
    print(f"faults: {len(planted) + len(in_any_step)} results agree")


if __name__ == "__main__":
    main()
