"""What any correct implementation may do: other orders of summation, kernels, caches, joints, roundings in wider types.

Each variation is judged as a subject, on a model of its own seed. These must AGREE, every one, at the stated rate.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import trials
from catalogue import DENSE, GROWING, INT8, PAGED, around, attention, norm
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from llama_fast.arithmetic import pytorch
from llama_fast.build import build
from llama_fast.encodings import dense, int8
from llama_fast.model import llama as fast
from llama_fast.plan import Plan
from llama_ref.checkpoint import Checkpoint
from oracle.questions.cases import Split, standard_case
from oracle.questions.checkpoints import judge_window, references
from oracle.questions.face import Faces, judge_face
from oracle.questions.judge import Bench, judge
from oracle.questions.localise import judge_stages, summary
from oracle.questions.objects import judge_objects
from oracle.questions.requests import judge_requests
from oracle.questions.seeds import judge_seeds
from oracle.questions.slots import judge_slots
from oracle.questions.stored import judge_stored, rounded_reference
from oracle.questions.threads import RankedSubject
from oracle.statistics.compare import unit_roundoff
from oracle.statistics.orders import Order
from oracle.subjects.adapters import RefSubject, Weights
from oracle.subjects.fast import FastSubject
from oracle.subjects.others import CallableSubject
from oracle.subjects.subject import Subject
from oracle.verify import bench_for, shown_stages

Patch = pytest.MonkeyPatch


class Within(FastSubject):
    """A subject whose calls, and none of the reference's, run inside a context."""

    enter: Callable[[], Any]

    def prefill_logits(self, rows: Any) -> list[Tensor]:
        with self.enter():
            return super().prefill_logits(rows)

    def decode_logits(self, rows: Any, splits: Any) -> list[Tensor]:
        with self.enter():
            return super().decode_logits(rows, splits)

    def several(self, rows: Any, splits: Any) -> list[Tensor]:
        with self.enter():
            return super().several(rows, splits)

    def greedy(self, prompts: Any, n: int) -> list[tuple[list[int], Tensor]]:
        with self.enter():
            return super().greedy(prompts, n)

    def trace(self, rows: Any, splits: Any) -> list[Any]:
        with self.enter():
            return super().trace(rows, splits)


def as_it_is(seed: int) -> Any:
    return contextlib.nullcontext()


@dataclass(frozen=True)
class Variation:
    """A plan, what is replaced, and the context that the subject runs in; or another kind of subject."""

    name: str
    plan: Plan = DENSE
    plant: Callable[[Patch], None] = lambda patch: None
    inside: Callable[[int], Any] = as_it_is
    batch: int | None = 2
    cache: int | None = 160
    other: Callable[[Checkpoint, torch.dtype], Subject] | None = None

    def tried(self, checkpoint: Checkpoint, dtype: torch.dtype, seed: int, patch: Patch) -> trials.Found:
        """Stages and logits by all routes of this variation on a case of its own; the references run without it."""
        config = checkpoint.config
        case = replace(trials.short_case(standard_case(config.vocab_size, config.max_context, seed=seed)), new_tokens=6)
        case = replace(case, splits=(Split((105, 70), (129, 96)), Split((126, 2), (129, 8))))
        if self.other is not None:
            subject = self.other(checkpoint, dtype)
            return trials.Found({"logits": judge(subject, bench_for(checkpoint, dtype, trials.CPU), case)})
        runner = build(checkpoint, self.plan, device="cpu", dtype=dtype)
        truth, yardstick = references(runner, checkpoint)
        bench = Bench(truth, yardstick)
        with patch.context() as inner:
            self.plant(inner)
            runner = build(checkpoint, self.plan, device="cpu", dtype=dtype)
            subject = Within(runner, self.batch, self.cache, used_cache=True, tokens_a_step=1 + seed % 7)
            subject.enter = lambda: self.inside(seed)
            parts = {"logits": judge(subject, bench, case)}
            cut, traces = shown_stages(subject, truth, case.rows)
            stages = judge_stages(cut, traces, truth, yardstick, config.n_layers, unit_roundoff(dtype))
            parts["stages"] = summary(stages)
            if self.plan.encoding.name != "dense" and dtype is not torch.float32:
                rounded = rounded_reference(truth, dtype)
                parts["stored numbers"] = judge_stored(cut, traces, truth, rounded, config.n_layers)
        return trials.Found(parts)

    def asked_more(self, checkpoint: Checkpoint, dtype: torch.dtype, patch: Patch) -> trials.Found:
        """Rows of many numbers, the window, the library's face, seeds and objects; of a variation that is a plan or a
        replacement, since these questions build their own models."""
        if self.other is not None or self.batch != 2 or self.inside is not as_it_is:
            return trials.Found({})
        with patch.context() as inner:
            self.plant(inner)
            parts = {
                "requests": judge_requests(checkpoint, self.plan, trials.CPU, dtype),
                "window": judge_window(checkpoint, self.plan, trials.CPU, dtype)[0],
            }
            if dtype is torch.float32:
                faces = Faces(self.plan, trials.CPU)
                parts |= {"face": judge_face(self.plan, trials.CPU), "objects": judge_objects(faces)}
                parts |= {"seeds": judge_seeds(faces), "slots": judge_slots(faces)}
        return trials.Found(parts)


def written_out(attend: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    q_BHTd, k, v = q.transpose(1, 2).float(), k.float(), v.float()
    share = q_BHTd.shape[1] // k.shape[1]
    score = q_BHTd @ k.repeat_interleave(share, 1).mT / q.shape[-1] ** 0.5
    allowed = torch.ones(score.shape[-2:], dtype=torch.bool).tril() if mask is None else mask
    out = score.masked_fill(~allowed, -torch.inf).softmax(-1) @ v.repeat_interleave(share, 1)
    return out.transpose(1, 2).to(q.dtype)


def split_linear(pieces: int) -> Callable[[Patch], None]:
    def product(_: Any, self: Any, x: Tensor, parts: Any) -> Tensor:
        pairs = zip(x.float().chunk(pieces, -1), parts["weight"].float().chunk(pieces, -1))
        total = sum(F.linear(a, b) for a, b in pairs)
        assert isinstance(total, Tensor)
        return total.to(x.dtype)

    return around(dense.Dense, "product", product)


def row_by_row(product: Any, self: Any, x: Tensor, parts: Any) -> Tensor:
    return torch.stack([product(self, row, parts) for row in x.reshape(-1, x.shape[-1])]).view(*x.shape[:-1], -1)


def in_double(product: Any, self: Any, x: Tensor, parts: Any) -> Tensor:
    return F.linear(x.double(), parts["weight"].double()).to(x.dtype)


def one_rounding(product: Any, self: Any, x: Tensor, parts: Any) -> Tensor:
    return (F.linear(x.float(), parts["weight"].float()) * parts["scale"].float().view(-1)).to(x.dtype)


def by_hand(forward: Any, self: Any, x: Tensor) -> Tensor:
    wide = x.float()
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)).to(x.dtype) * self.weight


def norm_in_double(forward: Any, self: Any, x: Tensor) -> Tensor:
    wide = x.double()
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)).to(x.dtype) * self.weight


def complex_rotation(rotate: Any, x: Tensor, turns: Tensor) -> Tensor:
    pairs = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)).contiguous())
    return torch.view_as_real(pairs * torch.view_as_complex(turns.contiguous())[:, :, None]).flatten(-2).to(x.dtype)


def angles_in_float32(table: Any, config: Any) -> Tensor:
    exponent = torch.arange(0, config.head_dim, 2).float() / config.head_dim
    angle = torch.arange(config.max_context).float()[:, None] / config.rope_theta**exponent
    return torch.stack([angle.cos(), angle.sin()], -1)


def angles_by_exponentials(table: Any, config: Any) -> Tensor:
    exponent = torch.arange(0, config.head_dim, 2).float() / config.head_dim
    frequency = (-exponent * torch.tensor(config.rope_theta).float().log()).exp()
    angle = torch.arange(config.max_context).float()[:, None] * frequency
    return torch.stack([angle.cos(), angle.sin()], -1)


def exp_silu(silu: Any, x: Tensor) -> Tensor:
    return (x.float() / (1 + (-x.float()).exp())).to(x.dtype)


def reference(checkpoint: Checkpoint, dtype: torch.dtype) -> Subject:
    weights = Weights(checkpoint.weights, dtype, trials.CPU)
    return RefSubject(checkpoint.config, weights, dtype)


def log_probabilities(checkpoint: Checkpoint, dtype: torch.dtype) -> Subject:
    model = reference(checkpoint, dtype)

    def function(tokens_BT: Tensor) -> Tensor:
        return torch.stack(model.prefill_logits(tokens_BT.tolist())).float().log_softmax(-1)

    return CallableSubject(function, checkpoint.config.vocab_size, dtype)


def backend(kind: SDPBackend) -> Callable[[int], Any]:
    return lambda seed: sdpa_kernel([kind, SDPBackend.MATH])


VARIATIONS = [
    Variation("as it stands"),
    Variation("cache that grows, projections apart", GROWING, cache=None),
    Variation("cache of pages", PAGED),
    Variation("static cache, projections apart", replace(DENSE, fuse_projections=False)),
    Variation("int8", INT8),
    Variation("int8, cache that grows", replace(INT8, cache=Plan().cache), cache=None),
    Variation("int8, rounded once", INT8, plant=around(int8.Int8, "product", one_rounding)),
    Variation("any order of summation", inside=lambda seed: Order(1000 + seed)),
    Variation("any order, projections apart", GROWING, cache=None, inside=lambda seed: Order(3000 + seed)),
    Variation("any order, int8", INT8, inside=lambda seed: Order(5000 + seed)),
    Variation("attention by the math backend", inside=backend(SDPBackend.MATH)),
    Variation("attention by the flash backend", inside=backend(SDPBackend.FLASH_ATTENTION)),
    Variation("attention written out in float32", plant=attention(written_out)),
    Variation("sums in two halves", plant=split_linear(2)),
    Variation("sums in eight parts", plant=split_linear(8)),
    Variation("products row by row", plant=around(dense.Dense, "product", row_by_row)),
    Variation("products in float64, rounded once", plant=around(dense.Dense, "product", in_double)),
    Variation("norm by hand", plant=norm(by_hand)),
    Variation("norm in float64", plant=norm(norm_in_double)),
    Variation("rotation by complex numbers", plant=around(pytorch, "rotate", complex_rotation)),
    Variation("angles multiplied out in float32", plant=around(fast, "rope_table", angles_in_float32)),
    Variation("angles from exponentials in float32", plant=around(fast, "rope_table", angles_by_exponentials)),
    Variation("silu by its exponential", plant=around(fast.F, "silu", exp_silu)),
    Variation("one row at a time", batch=1),
    Variation("batch of five", batch=5),
    Variation("long cache", cache=256),
    Variation("the reference itself", other=reference),
    Variation("log-probabilities of the reference", other=log_probabilities),
    Variation("two ranks", other=lambda checkpoint, dtype: RankedSubject(checkpoint, DENSE, dtype, 2)),
]
