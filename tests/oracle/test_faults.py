"""The oracle on trial: one-line faults planted in `llama_fast` must each give DIFFER, at the place where they are.

Each fault replaces one function or method and leaves the rest alone. The second list holds lawful variations: another
order, another kernel, another cache, and these must AGREE.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from llama_fast import model as fast
from llama_fast import plan as plan_module
from llama_fast.build import build
from llama_fast.optimisations import int8, static_cache
from llama_fast.plan import Eager, Plan
from llama_fast.presets import encoding_named, optimised
from llama_fast.sampling import Chooser
from llama_ref.checkpoint import Checkpoint
from llama_ref.config import LlamaConfig
from oracle.compare import Outcome
from oracle.verify import judge_runner, verify

CPU = torch.device("cpu")
BUILD = importlib.import_module("llama_fast.build")  # the package exports the function under this name
Patch = pytest.MonkeyPatch
DENSE, INT8 = optimised(), optimised(encoding_named("int8"))


@dataclass(frozen=True)
class Fault:
    """What is broken, under which plan and type it is judged, and words that must stand in the first fault's place."""

    name: str
    plant: Callable[[Patch], None]
    place: str
    plan: Plan = DENSE
    dtype: torch.dtype = torch.float32


def around(module: Any, name: str, change: Callable[..., Any]) -> Callable[[Patch], None]:
    """Replace module.name by x -> change(original, x)."""

    def plant(patch: Patch) -> None:
        original = getattr(module, name)
        patch.setattr(module, name, lambda *args, **kwargs: change(original, *args, **kwargs))

    return plant


def with_config(**changes: Any) -> Callable[[Patch], None]:
    """RoPE's table made for another config."""
    return around(fast, "rope_table", lambda table, config: table(replace(config, **changes)))


def table_beyond_100(table: Any, config: LlamaConfig) -> Tensor:
    right = table(config)
    return torch.cat([right[:100], right[101:], right[-1:]])


def half_split(original: Any, x_BThd: Tensor, turns: Tensor) -> Tensor:
    cos, sin = turns[:, :, None, :, 0], turns[:, :, None, :, 1]
    a, b = x_BThd.chunk(2, -1)
    return torch.cat([a * cos - b * sin, a * sin + b * cos], -1)


def wrong_way(original: Any, x_BThd: Tensor, turns: Tensor) -> Tensor:
    return original(x_BThd, turns * torch.tensor([1.0, -1.0]))  # type: ignore[no-any-return]


def scaled_q(original: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    return original(q * 1.002, k, v, mask)  # type: ignore[no-any-return]


def softmax_scale(original: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    return original(q * (24 / 23) ** 0.5, k, v, mask)  # type: ignore[no-any-return]


def tiled_groups(original: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    order = torch.arange(q.shape[2]).view(k.shape[1], -1).T.flatten()  # head h reads kv head h % K
    return original(q[:, :, order], k, v, mask)[:, :, order.argsort()]  # type: ignore[no-any-return]


def sees_next(original: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    if mask is None:
        mask = torch.ones(q.shape[1], k.shape[2], dtype=torch.bool).tril(1)[None, None]
    return original(q, k, v, mask)  # type: ignore[no-any-return]


def sees_next_slot(original: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    return original(q, k, v, None if mask is None else mask | mask.roll(1, -1))  # type: ignore[no-any-return]


def forgets_first(original: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    if mask is not None and mask[..., 60:].any():  # only from position 60 on
        mask = mask.clone()
        mask[..., 0] = False
    return original(q, k, v, mask)  # type: ignore[no-any-return]


def row_0_for_all(original: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    return original(q, k[:1].expand_as(k), v[:1].expand_as(v), mask)  # type: ignore[no-any-return]


def shifted_write(original: Any, slots: Tensor, new: Tensor, position_BT: Tensor) -> Tensor:
    return original(slots, new, (position_BT + 1).clamp(max=slots.shape[2] - 1))  # type: ignore[no-any-return]


def write_of_row_0(original: Any, slots: Tensor, new: Tensor, position_BT: Tensor) -> Tensor:
    return original(slots, new[:1].expand_as(new), position_BT)  # type: ignore[no-any-return]


def write_at_row_0s_position(original: Any, slots: Tensor, new: Tensor, position_BT: Tensor) -> Tensor:
    return original(slots, new, position_BT[:1].expand_as(position_BT))  # type: ignore[no-any-return]


def late_position(original: Any, self: Any, tokens: Tensor, start: Tensor | None, *rest: Any, **more: Any) -> Tensor:
    return original(self, tokens, None if start is None else start - 1, *rest, **more)  # type: ignore[no-any-return]


def logits_of_the_padding(original: Any, *args: Any, last_B: Tensor | None = None, **more: Any) -> Tensor:
    last_B = None if last_B is None else last_B.max().expand_as(last_B)
    return original(*args, last_B=last_B, **more)  # type: ignore[no-any-return]


def coarse_norm(original: Any, self: Any, x: Tensor) -> Tensor:
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps) * self.weight


def scaled_weights(name: str, factor: float) -> Callable[[Patch], None]:
    def change(original: Any, checkpoint: Checkpoint, stem: str, *rest: Any, **more: Any) -> dict[str, Tensor]:
        parts = original(checkpoint, stem, *rest, **more)
        if stem == name:
            parts = {part: value * factor for part, value in parts.items()}
        return parts  # type: ignore[no-any-return]

    return around(BUILD, "encode_one", change)


def rolled_scale(original: Any, self: Any, x: Tensor) -> Tensor:
    return F.linear(x, self.weight.to(x.dtype)) * self.scale.view(-1).roll(1).to(x.dtype)


def scale_of_columns(original: Any, self: Any, x: Tensor) -> Tensor:
    columns = self.scale.view(-1).to(x.dtype).repeat(1 + x.shape[-1] // len(self.scale))[: x.shape[-1]]
    return F.linear(x * columns, self.weight.to(x.dtype))


def encode_with(change: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> Callable[[Patch], None]:
    return around(int8.Int8, "encode", lambda original, *args: change(original(*args)))


def towards_zero(original: Any, self: Any, weight: Tensor, dtype: torch.dtype) -> dict[str, Tensor]:
    parts = original(self, weight, dtype)
    steps = (weight.float() / parts["scale"].float()).trunc()
    return {**parts, "weight": steps.to(torch.int8)}


def second_best(original: Any, self: Any, logits_BV: Tensor, position_B: Tensor) -> Tensor:
    best = logits_BV.topk(2).indices
    return torch.where(position_B % 10 == 9, best[:, 1], best[:, 0])


def coarse_silu(original: Any, x: Tensor) -> Tensor:
    return F.gelu(x)


def no_second_residual(
    original: Any,
    self: Any,
    x: Tensor,
    turns: Tensor,
    position: Tensor,
    mask: Any,
    cache: Any,
    observe: Any = None,
    name: str = "",
) -> Tensor:
    x = x + self.attention(x, turns, position, mask, cache, observe, name)
    return self.feed_forward(x, observe, name)  # type: ignore[no-any-return]


def nan_at_77(original: Any, x_BThd: Tensor, turns: Tensor) -> Tensor:
    out = original(x_BThd, turns)
    if out.shape[1] > 77:
        out[:, 77] = torch.nan
    return out  # type: ignore[no-any-return]


def unrotated_keys(original: Any, x_BThd: Tensor, turns: Tensor) -> Tensor:
    return x_BThd if x_BThd.shape[2] == 2 else original(x_BThd, turns)


def norm_eps(factor: float) -> Callable[[Patch], None]:
    def change(original: Any, self: Any, weight: Tensor, eps: float) -> None:
        original(self, weight, eps * factor)

    return around(fast.RMSNorm, "__init__", change)


def swapped_gate(original: Any, self: Any, x: Tensor) -> tuple[Tensor, ...]:
    parts = original(self, x)
    return tuple(reversed(parts)) if len(parts) == 2 else parts


FAULTS = [
    Fault("theta x 2", with_config(rope_theta=20000.0), "rope"),
    Fault("theta off by 0.01%", with_config(rope_theta=10001.0), "rope"),
    Fault("theta off by 0.01% in bf16", with_config(rope_theta=10001.0), "rope", dtype=torch.bfloat16),
    Fault("bf16 rope table", around(fast, "rope_table", lambda t, c: t(c).bfloat16().float()), "rope"),
    Fault("rope table wrong beyond 100", around(fast, "rope_table", table_beyond_100), "rope table"),
    Fault("rope on halves", around(fast, "rotate", half_split), "q_rope"),
    Fault("rope the other way", around(fast, "rotate", wrong_way), "q_rope"),
    Fault("keys not rotated", around(fast, "rotate", unrotated_keys), "k_rope"),
    Fault("NaN at position 77", around(fast, "rotate", nan_at_77), "NaN"),
    Fault("q x 1.002", around(fast, "attend", scaled_q), "attention"),
    Fault("softmax scale of another width", around(fast, "attend", softmax_scale), "attention"),
    Fault("kv heads tiled", around(fast, "attend", tiled_groups), "attention"),
    Fault("prefill sees one ahead", around(fast, "attend", sees_next), "attention"),
    Fault("decode sees one slot ahead", around(fast, "attend", sees_next_slot), "attention"),
    Fault("decode forgets position 0", around(fast, "attend", forgets_first), "attention"),
    Fault("row 0 for the batch", around(fast, "attend", row_0_for_all), "attention"),
    Fault("cache written one later", around(static_cache, "write_at", shifted_write), "attention"),
    Fault("cache of row 0", around(static_cache, "write_at", write_of_row_0), "attention"),
    Fault("growing cache of row 0", around(plan_module, "write_at", write_of_row_0), "attention", Plan()),
    Fault("positions of row 0", around(static_cache, "write_at", write_at_row_0s_position), "attention"),
    Fault("decode one position early", around(fast.Llama, "forward", late_position), "rope"),
    Fault("prefill's last token is padding", around(fast.Llama, "forward", logits_of_the_padding), "decode"),
    Fault("eps x 10", norm_eps(10.0), "norm"),
    Fault("norm in bf16", around(fast.RMSNorm, "forward", coarse_norm), "norm", dtype=torch.bfloat16),
    Fault("wk of one layer x 1.001", scaled_weights("layers.1.attention.wk", 1.001), "layers.1.k"),
    Fault("w2 of one layer x 1.001", scaled_weights("layers.0.feed_forward.w2", 1.001), "layers.0.ffn_out"),
    Fault("gelu for silu", around(fast.F, "silu", coarse_silu), "ffn_hidden"),
    Fault("gate and up swapped", around(fast.Joined, "forward", swapped_gate), "ffn_hidden"),
    Fault("second residual missing", around(fast.Block, "forward", no_second_residual), "layers.0 block"),
    Fault("scale of the next row", around(int8.Int8Linear, "forward", rolled_scale), "layers.0.q", INT8),
    Fault("scale along columns", around(int8.Int8Linear, "forward", scale_of_columns), "layers.0.q", INT8),
    Fault("scales stored one row off", encode_with(lambda p: p | {"scale": p["scale"].roll(1, 0)}), "weights", INT8),
    Fault("rounding towards zero", around(int8.Int8, "encode", towards_zero), "weights", INT8),
    Fault("sometimes the second best", around(Chooser, "__call__", second_best), "own logits"),
]


def judged(checkpoint: Checkpoint, plan: Plan, dtype: torch.dtype) -> tuple[Outcome, str]:
    """The outcome, and everything that failed in words."""
    certificate = verify(checkpoint, plan, CPU, dtype)
    stage = certificate.first_fault
    place = "" if stage is None else stage.name + (" block" if stage.name.count(".") == 1 else "")
    return certificate.outcome, " | ".join([place, *(f"{c.name} {c.where}" for c in certificate.verdict.failures)])


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_a_planted_fault_differs_where_it_is(fault: Fault, tiny: Checkpoint, monkeypatch: Patch) -> None:
    fault.plant(monkeypatch)
    outcome, failed = judged(tiny, fault.plan, fault.dtype)
    assert outcome is Outcome.DIFFER
    assert fault.place in failed
    if fault.place.startswith("layers."):
        assert failed.startswith(fault.place)


QUICK = ("theta x 2", "rope on halves", "decode sees one slot ahead", "cache written one later", "eps x 10")


@pytest.mark.parametrize("fault", [f for f in FAULTS if f.name in QUICK], ids=lambda fault: fault.name)
def test_the_quick_verdict_beside_a_rung_sees_the_gross_ones(
    fault: Fault, tiny: Checkpoint, monkeypatch: Patch
) -> None:
    fault.plant(monkeypatch)
    assert judge_runner(build(tiny, fault.plan, CPU, fault.dtype), tiny, cache_length=256).outcome is Outcome.DIFFER


def plain_attention(original: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    q, k, v = q.transpose(1, 2).float(), k.float(), v.float()
    share = q.shape[1] // k.shape[1]
    score = q @ k.repeat_interleave(share, 1).mT / q.shape[-1] ** 0.5
    allowed = torch.ones(score.shape[-2:], dtype=torch.bool).tril() if mask is None else mask
    out = score.masked_fill(~allowed, -torch.inf).softmax(-1) @ v.repeat_interleave(share, 1)
    return out.transpose(1, 2)


def typed(original: Any, q: Tensor, *rest: Any) -> Tensor:
    return plain_attention(original, q, *rest).to(q.dtype)


def split_sum(original: Any, self: Any, x: Tensor) -> Tensor:
    half = x.shape[-1] // 2
    wide, weight = x.float(), self.weight.float()
    return (F.linear(wide[..., :half], weight[:, :half]) + F.linear(wide[..., half:], weight[:, half:])).to(x.dtype)


def lawful(patch: Patch) -> None:
    pass


VARIATIONS = [
    ("as it stands", lawful, DENSE),
    ("growing cache, projections apart", lawful, Plan()),
    ("static cache, projections apart", lawful, replace(DENSE, fuse_projections=False)),
    ("int8", lawful, INT8),
    ("int8, growing cache", lawful, replace(INT8, cache=Plan().cache, compiler=Eager())),
    ("attention written out in float32", around(fast, "attend", typed), DENSE),
    ("sums in two halves", around(plan_module.DenseLinear, "forward", split_sum), DENSE),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name, plant, plan", VARIATIONS, ids=[name for name, _, _ in VARIATIONS])
def test_a_lawful_variation_agrees(
    name: str, plant: Callable[[Patch], None], plan: Plan, dtype: torch.dtype, tiny: Checkpoint, monkeypatch: Patch
) -> None:
    plant(monkeypatch)
    certificate = verify(tiny, plan, CPU, dtype)
    assert certificate.outcome is Outcome.AGREE, certificate.to_text()
    assert judge_runner(build(tiny, plan, CPU, dtype), tiny, cache_length=256).outcome is Outcome.AGREE
