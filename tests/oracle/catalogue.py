"""Faults that the oracle must find, each one replaced function or method, and lawful variations that it must let pass.

A fault says how it is tried (`trial`: the part of a verification that can see it) and where it must be found: `first` is
the exact stage that is named, or words of the check that fails. Many are small: some show only past position 100, only
in the second row, only in bfloat16, only where a step has several tokens, only in a cache that was used before.
"""

from __future__ import annotations

import copy
import sys
import unicodedata
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from llama_fast import chat, weights
from llama_fast.arithmetic import pytorch
from llama_fast.caches import growing as growing_cache
from llama_fast.caches import paged as paged_cache
from llama_fast.caches import static as static_cache
from llama_fast.encodings import dense, fp8, int8, sparse24, tiled
from llama_fast.engine import engine, generate, logprobs, pages, request, room, runner, sampling, steps, text, transfer
from llama_fast.engine.caches import Caches
from llama_fast.engine.sampling import BatchSampler, Sampling
from llama_fast.llama import Llama
from llama_fast.model import llama as fast
from llama_fast.model import matrices
from llama_fast.parallel import tensor_parallel
from llama_fast.plan import Plan
from llama_fast.recipes import encoding_named, optimised, paged
from llama_fast.speculative import acceptance, rounds
from llama_fast.speculative import proposers as speculative
from llama_fast.speculative import verification as checks
from llama_ref.checkpoint import Checkpoint
from llama_ref.formats import huggingface, saved
from llama_ref.tokenizers import chat as chats
from llama_ref.tokenizers import tokenizer

Patch = pytest.MonkeyPatch
building = sys.modules["llama_fast.build"]  # the package's `build` is the function
checkpoint_files = sys.modules["llama_ref.checkpoint"]
DENSE, INT8 = optimised(), optimised(encoding_named("int8"))
GROWING = Plan()
PAGED = paged(optimised())
BF16 = torch.bfloat16


@dataclass(frozen=True)
class Fault:
    """What is broken, how it is tried, and where it must be found."""

    name: str
    family: str
    plant: Callable[[Patch], None]
    first: str
    trial: str = "model"
    plan: Plan = DENSE
    dtype: torch.dtype = torch.float32


def around(module: Any, name: str, change: Callable[..., Any]) -> Callable[[Patch], None]:
    """Replace module.name by (...) -> change(original, ...)."""

    def plant(patch: Patch) -> None:
        original = getattr(module, name)
        patch.setattr(module, name, lambda *args, **kwargs: change(original, *args, **kwargs))

    return plant


def both(*plants: Callable[[Patch], None]) -> Callable[[Patch], None]:
    def plant(patch: Patch) -> None:
        for one in plants:
            one(patch)

    return plant


# --- rotary positions


def table(change: Callable[[Tensor], Tensor]) -> Callable[[Patch], None]:
    return around(fast, "rope_table", lambda make, config: change(make(config)))


def with_config(**changes: Any) -> Callable[[Patch], None]:
    return around(fast, "rope_table", lambda make, config: make(replace(config, **changes)))


def rotation(change: Callable[..., Tensor]) -> Callable[[Patch], None]:
    return around(pytorch, "rotate", change)


def half_split(rotate: Any, x_BThd: Tensor, turns: Tensor) -> Tensor:
    cos, sin = turns[:, :, None, :, 0], turns[:, :, None, :, 1]
    a, b = x_BThd.chunk(2, -1)
    return torch.cat([a * cos - b * sin, a * sin + b * cos], -1)


def nan_at_77(rotate: Any, x_BThd: Tensor, turns: Tensor) -> Tensor:
    out: Tensor = rotate(x_BThd, turns)
    if out.shape[1] > 77:
        out[:, 77] = torch.nan
    return out


def late_position(forward: Any, self: Any, tokens: Tensor, start: Tensor | None, *rest: Any, **more: Any) -> Tensor:
    return forward(self, tokens, None if start is None else start - 1, *rest, **more)  # type: ignore[no-any-return]


# --- attention, masks, groups of heads


def attention(change: Callable[..., Tensor]) -> Callable[[Patch], None]:
    return around(pytorch, "attend", change)


def masked(change: Callable[[Tensor], Tensor]) -> Callable[[Patch], None]:
    """Another mask, wherever there is one."""
    return attention(lambda attend, q, k, v, mask: attend(q, k, v, None if mask is None else change(mask)))


def sees_next(attend: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    if mask is None:
        mask = torch.ones(q.shape[1], k.shape[2], dtype=torch.bool).tril(1)[None, None]
    return attend(q, k, v, mask)  # type: ignore[no-any-return]


def forgets_first(mask: Tensor) -> Tensor:
    return mask & ~((torch.arange(mask.shape[-1]) == 0) & mask[..., 60:].any(-1, keepdim=True))


def one_step_sees_itself(mask: Tensor) -> Tensor:
    return mask[:, :, -1:].expand_as(mask)  # the tokens of a step see those after them


def tiled_groups(attend: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    order = torch.arange(q.shape[2]).view(k.shape[1], -1).T.flatten()  # head h reads kv head h % K
    return attend(q[:, :, order], k, v, mask)[:, :, order.argsort()]  # type: ignore[no-any-return]


def reversed_groups_in_decode(attend: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    if q.shape[1] == 1:
        k, v = k.flip(1), v.flip(1)
    return attend(q, k, v, mask)  # type: ignore[no-any-return]


def silent_last_head(attend: Any, q: Tensor, *rest: Any) -> Tensor:
    out = attend(q, *rest).clone()
    out[:, :, -1] = 0
    return out  # type: ignore[no-any-return]


def rows_masked(change: Callable[[Tensor], Tensor], when: Callable[[int, int], bool]) -> Callable[[Patch], None]:
    """Another mask [B, 1, T, S] where when(B, T)."""
    return masked(lambda mask: change(mask) if when(mask.shape[0], mask.shape[2]) else mask)


def in_bf16_beyond(count: int, change: Callable[[Tensor], Tensor]) -> Callable[[Patch], None]:
    """Another mask where values are bf16 and there are more slots than so many."""

    def attend(original: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        wrong = mask is not None and q.dtype is BF16 and k.shape[2] > count
        return original(q, k, v, change(mask) if wrong and mask is not None else mask)  # type: ignore[no-any-return]

    return attention(attend)


def coarse_positions(place: Any, self: Any, table: Tensor, tokens: Tensor, start: Tensor | None, cache: Any) -> Any:
    """Angles of positions that were rounded to eight significant bits, less one: right up to 128."""
    step = place(self, table, tokens, start, cache)
    if cache.layers[0].k.dtype is not BF16:
        return step
    return step._replace(
        cos_sin_BTd2=table[
            (step.position_BT // 2).bfloat16().long() * 2 + step.position_BT % 2 * (step.position_BT < 128)
        ]
    )


def equal_rows_share(attend: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """Rows of one length read the keys of the first."""
    if mask is not None and len(mask) > 1 and mask.shape[2] == 1 and bool((mask == mask[:1]).all()):
        k = k[:1].expand_as(k)
    return attend(q, k, v, mask)  # type: ignore[no-any-return]


def late_slots_of_later_blocks(write: Any, slots: Tensor, new: Tensor, at: Tensor) -> Tensor:
    """Beyond slot 159 the next one is written, but not in a pass's first block."""
    late_slots_of_later_blocks.calls += 1  # type: ignore[attr-defined]
    later = (late_slots_of_later_blocks.calls - 1) // 2 % 2  # type: ignore[attr-defined]  # keys, values; two blocks
    return write(slots, new, torch.where((at > 159) & (later == 1), (at + 1).clamp(max=slots.shape[2] - 1), at))  # type: ignore[no-any-return]


late_slots_of_later_blocks.calls = 0  # type: ignore[attr-defined]


# --- caches


def writing(change: Callable[..., Tensor], module: Any = static_cache) -> Callable[[Patch], None]:
    return around(module, "write_at", change)


def first_write_wins(write: Any, slots: Tensor, new: Tensor, position_BT: Tensor) -> Tensor:
    kept = slots.clone()
    write(slots, new, position_BT)
    slots.copy_(torch.where(kept != 0, kept, slots))
    return slots


def wraps_at(count: int) -> Callable[[Patch], None]:
    return writing(lambda write, slots, new, at: write(slots, new, torch.where(at == count, at - 1, at)))


# --- pages


def never_forgotten(forgotten: Any, self: Any) -> int:
    """A page that another row takes is still known for what it held."""
    page, content = next(iter(self._kept)), self._content[next(iter(self._kept))]
    number = self._known[content][1]
    forgotten(self)
    self._known[content] = page, number
    return page  # type: ignore[no-any-return]


def found_by_tokens_alone(find: Any, self: Any, tokens: Any) -> list[int]:
    """Pages of the same tokens, whatever stood before these."""
    of_tokens = {part: page for (_, part), (page, _) in self._known.items()}
    parts = self._parts(tokens)
    known = [part in of_tokens for part in parts]
    return [of_tokens[part] for part in parts[: (*known, False).index(False)]]


def without_the_first_token(parts: Any, self: Any, tokens: Any) -> list[tuple[int, ...]]:
    first, *others = parts(self, tokens) or [()]
    return [first[1:], *others] if first else []


def counted_once(hold: Any, self: Any, held: Any) -> None:
    """A page that two rows hold is free when one of them ends."""
    hold(self, held)
    for page in held:
        self.holders[page] = 1


def given_back_twice(release: Any, self: Any, held: Any) -> None:
    self.holders = [max(1, count) if page in held else count for page, count in enumerate(self.holders)]
    release(self, held)


def counted_wrongly(patch: Patch) -> None:
    around(pages.Pages, "hold", counted_once)(patch)
    around(pages.Pages, "release", given_back_twice)(patch)


def said_forgotten(make_way: Any, self: Any) -> None:
    make_way(self)
    self.ids = self.request.ids


def newest_page_of_row_0(grow: Any, self: Any, row: Any) -> bool:
    """Where a row grows, it is told a page of the first row's."""
    grown: bool = grow(self, row)
    if row.slot and self.of_slots[0]:
        self._cache.assign(row.slot, [*self.of_slots[row.slot][:-1], self.of_slots[0][-1]])
    return grown


def with_what_is_not_read(patch: Patch) -> None:
    """A page is known when its last token is chosen, before that token's keys are there."""
    patch.setattr(request.Row, "stored", property(lambda self: [*self.request.ids, *self.tokens]))


# --- norms, residuals, feed-forward


def norm(change: Callable[..., Tensor]) -> Callable[[Patch], None]:
    return around(fast.RMSNorm, "forward", change)


def norm_eps(factor: float) -> Callable[[Patch], None]:
    return around(fast.RMSNorm, "__init__", lambda init, self, weight, eps: init(self, weight, eps * factor))


def coarse_norm(forward: Any, self: Any, x: Tensor) -> Tensor:
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps) * self.weight


def block(change: Callable[..., Tensor]) -> Callable[[Patch], None]:
    """Another Block.forward: change(block, x, layer, step)."""
    return around(fast.Block, "forward", lambda forward, *arguments: change(*arguments))


def attended(block: Any, x: Tensor, layer: Any, step: Any) -> Tensor:
    """The residual stream after a block's attention."""
    a = block.operations.attend(block.operations.qkv(x, block.attention_norm, block.qkv, layer, step), layer, step)
    return block.operations.add(a.flatten(2), block.wo, x, step.part("attention_out"))  # type: ignore[no-any-return]


def fed(block: Any, x: Tensor, step: Any) -> Tensor:
    """The residual stream after a block's feed-forward."""
    h = block.operations.gated(x, block.ffn_norm, block.gate_up, step)
    return block.operations.add(h, block.w2, x, step.part("ffn_out"))  # type: ignore[no-any-return]


def no_second_residual(block: Any, x: Tensor, layer: Any, step: Any) -> Tensor:
    x = attended(block, x, layer, step)
    return fed(block, x, step) - x


def coarse_residual(block: Any, x: Tensor, layer: Any, step: Any) -> Tensor:
    return fed(block, attended(block, x, layer, step).half().float(), step)


def parallel_block(block: Any, x: Tensor, layer: Any, step: Any) -> Tensor:
    return attended(block, x, layer, step) + fed(block, x, step) - x


def slightly_short_residual(block: Any, x: Tensor, layer: Any, step: Any) -> Tensor:
    x = attended(block, x, layer, step)
    y = fed(block, x, step) - x
    return x + (y * 0.9999 if step.name.endswith("1") else y)


def swapped_gate(forward: Any, self: Any, x: Tensor) -> tuple[Tensor, ...]:
    parts = forward(self, x)
    return tuple(reversed(parts)) if len(parts) == 2 else parts


# --- weights as loaded and as encoded


def scaled_weights(name: str, factor: float) -> Callable[[Patch], None]:
    def change(encode: Any, checkpoint: Checkpoint, stem: str, *rest: Any, **more: Any) -> Any:
        stored = encode(checkpoint, stem, *rest, **more)
        scaled = {part: value * factor for part, value in stored.parts.items()}
        return replace(stored, parts=scaled) if stem == name else stored

    return around(weights, "encode_one", change)


def swapped_weights(one: str, other: str) -> Callable[[Patch], None]:
    def change(encode: Any, checkpoint: Checkpoint, stem: str, *rest: Any) -> Any:
        other_stem = {one: other, other: one}.get(stem, stem)
        there = f"{other_stem}.weight" in checkpoint.weights  # a model cut to its first block has not both
        return encode(checkpoint, other_stem if there else stem, *rest)

    return around(weights, "encode_one", change)


def embedding(change: Callable[[Tensor], Tensor]) -> Callable[[Patch], None]:
    return around(dense.Dense, "rows", lambda rows, self, ids, *rest: rows(self, change(ids), *rest))


def encode_with(change: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> Callable[[Patch], None]:
    return around(int8.Int8, "encode", lambda original, *args: change(original(*args)))


def towards_zero(encode: Any, self: Any, weight: Tensor, dtype: torch.dtype) -> dict[str, Tensor]:
    parts = encode(self, weight, dtype)
    return {**parts, "weight": (weight.float() / parts["scale"].float()).trunc().to(torch.int8)}


def rolled_scale(product: Any, self: Any, x: Tensor, parts: Any) -> Tensor:
    return F.linear(x, parts["weight"].to(x.dtype)) * parts["scale"].view(-1).roll(1).to(x.dtype)


def scale_of_columns(product: Any, self: Any, x: Tensor, parts: Any) -> Tensor:
    scale, weight = parts["scale"], parts["weight"]
    columns = scale.view(-1).to(x.dtype).repeat(1 + x.shape[-1] // len(scale))[: x.shape[-1]]
    return F.linear(x * columns, weight.to(x.dtype))


def rounded_matrix(product: Any, self: Any, x: Tensor, parts: Any) -> Tensor:
    """The matrix is made in the type of the arithmetic before it multiplies."""
    return F.linear(x, parts["weight"].to(x.dtype) * parts["scale"].to(x.dtype))


def rounded_once_more(rows: int) -> Callable[..., Tensor]:
    """The same for the products of so many outputs, which are summed wide, and rounded once."""

    def product(original: Any, self: Any, x: Tensor, parts: Any) -> Tensor:
        if parts["weight"].shape[0] != rows:
            return original(self, x, parts)  # type: ignore[no-any-return]
        matrix = (parts["weight"].to(x.dtype) * parts["scale"].to(x.dtype)).float()
        return F.linear(x.float(), matrix).to(x.dtype)

    return product


def rounded_scales(product: Any, self: Any, x: Tensor, parts: Any) -> Tensor:
    scale = parts["scale"]
    return product(self, x, {**parts, "scale": (scale.float() / 2**-9).round().clamp(min=1).to(scale.dtype) * 2**-9})


def unsigned(product: Any, self: Any, x: Tensor, parts: Any) -> Tensor:
    return F.linear(x, parts["weight"].view(torch.uint8).to(x.dtype)) * parts["scale"].view(-1).to(x.dtype)


# --- logits


def shown(change: Callable[..., Tensor]) -> Callable[[Patch], None]:
    """What Llama.forward returns, changed; stages are seen as they were."""
    return around(fast.Llama, "forward", lambda forward, *args, **more: change(forward(*args, **more)))


def last_ids_lost(logits: Tensor) -> Tensor:
    return torch.cat([logits[..., :-2], logits[..., -3:-2], logits[..., -3:-2]], -1)


def logits_of_the_padding(forward: Any, *args: Any, last_B: Tensor | None = None, **more: Any) -> Tensor:
    last_B = None if last_B is None else last_B.max().expand_as(last_B)
    return forward(*args, last_B=last_B, **more)  # type: ignore[no-any-return]


# --- the generation loop


def all_end_together(step: Any, self: Any) -> Any:
    events = step(self)
    if any(event.finish_reason == "stop" for event in events):
        self.close()
    return events


def first_token_may_not_end(take: Any, self: Any, *args: Any) -> Any:
    event = take(self, *args)
    if len(self.tokens) == 1 and event.finish_reason == "stop":
        self.finish_reason, event = None, event._replace(finish_reason=None)
    return event


def never_ends(take: Any, self: Any, *args: Any) -> Any:
    self.request = replace(self.request, eos_ids=())
    return take(self, *args)


def second_best(choose: Any, self: Any, logits_BV: Tensor, position_B: Tensor) -> Tensor:
    best = logits_BV.topk(2).indices
    return torch.where(position_B % 10 == 9, best[:, 1], best[:, 0])


def same_position(choose: Any, self: Any, logits_BV: Tensor, position_B: Tensor) -> Tensor:
    return choose(self, logits_BV, position_B // 2)  # type: ignore[no-any-return]


# --- sampling


def chosen_with(change: Callable[[Sampling], Sampling]) -> Callable[[Patch], None]:
    """Rows of a BatchSampler with other settings than theirs."""
    return around(
        BatchSampler,
        "set_rows",
        lambda set_rows, self, first, settings, *rest: set_rows(self, first, [change(one) for one in settings], *rest),
    )


def with_temperature(change: Callable[[float], float]) -> Callable[[Patch], None]:
    return chosen_with(lambda one: replace(one, temperature=change(one.temperature) if one.temperature else 0.0))


def with_top_k(change: Callable[[int], int]) -> Callable[[Patch], None]:
    return chosen_with(lambda one: replace(one, top_k=None if one.top_k is None else change(one.top_k)))


def first_seed(set_rows: Any, self: Any, first: int, settings: Any, *rest: Any) -> None:
    set_rows(self, first, [replace(one, seed=settings[0].seed) for one in settings], *rest)


def ahead_of_row_0(hash_ahead: Any, self: Any, part: slice) -> None:
    hash_ahead(self, part)
    if self.ahead_BSL is not None:
        self.ahead_BSL = self.ahead_BSL[:1].expand_as(self.ahead_BSL)


def likeliest_told(columns: Any, token_B1: Tensor, logits_BV: Tensor, top: int) -> Tensor:
    found: Tensor = columns(token_B1, logits_BV, top)
    return torch.cat([found[:, :1], logits_BV.double().log_softmax(-1).amax(-1, keepdim=True), found[:, 2:]], -1)


def absolute_floor(keep_likely: Any, p_BV: Tensor, min_p: Tensor) -> Tensor:
    kept_BV = torch.where((p_BV >= min_p) | (p_BV == p_BV.amax(-1, keepdim=True)), p_BV, 0.0)
    return kept_BV / kept_BV.sum(-1, keepdim=True)


def plain_steps_greedy(run: Any, self: Any, state: Any, k: int, behind: bool) -> Any:
    choose = self.choose
    self.choose = choose if k else self.greedy
    try:
        return run(self, state, k, behind)
    finally:
        self.choose = choose


def saves_one_file(save: Any, self: Any, directory: Any) -> None:
    name, words = next(iter(self._files.items()))
    (directory / name).write_text(words, encoding="utf-8")


def flips_short_stripes(encode: Any, self: Any, weight: Tensor, dtype: torch.dtype) -> dict[str, Tensor]:
    parts: dict[str, Tensor] = encode(self, weight, dtype)
    return {name: part.flip(0) for name, part in parts.items()} if len(weight) < 20 else parts


def without_the_last(keep: Any, p_BV: Tensor, top_p: Tensor) -> Tensor:
    sorted_BV, order_BV = p_BV.sort(dim=-1, descending=True, stable=True)
    kept_BV = torch.where((sorted_BV.cumsum(-1) <= top_p) | (torch.arange(p_BV.shape[-1]) == 0), sorted_BV, 0.0)
    p_BV = torch.zeros_like(p_BV).scatter(-1, order_BV, kept_BV)
    return p_BV / p_BV.sum(-1, keepdim=True)


def highest_id(choose: Any, self: Any, logits_BV: Tensor, position_B: Tensor) -> Tensor:
    if not self.greedy:
        return choose(self, logits_BV, position_B)  # type: ignore[no-any-return]
    return logits_BV.shape[-1] - 1 - logits_BV.flip(-1).argmax(-1)


def not_renormalised(keep: Any, p_BV: Tensor, top_p: Tensor) -> Tensor:
    kept: Tensor = keep(p_BV, top_p)
    return torch.where(kept > 0, p_BV, 0.0)


# --- rows that come and go


def after_start(change: Callable[[Any, int, int], None]) -> Callable[[Patch], None]:
    """change(steps, first slot, rows) once rows have joined others that decode."""

    def start(original: Any, self: Any, first: int, rows: Any) -> None:
        original(self, first, rows)
        if len(rows) < len(self.slots):
            change(self, first, len(rows))

    return around(steps.PlainSteps, "start", start)


def of_the_row_before(*names: str) -> Callable[[Patch], None]:
    """These tensors of the sampler stay what they were when a row joins."""

    def set_rows(original: Any, self: Any, first: int, settings: Any, *rest: Any) -> None:
        kept = {name: getattr(self, name).clone() for name in names}
        original(self, first, settings, *rest)
        if any(one is not None for i, one in enumerate(self.settings) if i != first):
            for name, value in kept.items():
                getattr(self, name)[first] = value[first]

    return around(BatchSampler, "set_rows", set_rows)


def with_tokens_of_the_row_before(set_rows: Any, self: Any, first: int, settings: Any, *rest: Any) -> None:
    before = None if self.seen_BV is None else self.seen_BV.clone()
    set_rows(self, first, settings, *rest)
    if before is not None and self.seen_BV is not None:
        self.seen_BV |= before


def never_stepping(name: str) -> Callable[[Any, int, int], None]:
    def change(self: Any, first: int, count: int) -> None:
        value = getattr(self, name)
        value[first : first + count] = value.max()

    return change


def ends_of_all_rows(take: Any, self: Any, *args: Any) -> Any:
    """A row ends where any row of its slot did."""
    kept = ends_of_all_rows.kept.setdefault(self.slot, set())  # type: ignore[attr-defined]
    kept |= set(self.request.eos_ids)
    self.request = replace(self.request, eos_ids=tuple(kept))
    return take(self, *args)


ends_of_all_rows.kept = {}  # type: ignore[attr-defined]


def for_who_stands_there(take: Any, self: Any) -> Any:
    if self.under_way:
        self.under_way[0] = list(self.slots)
    return take(self)


def into_a_copy(rows: Any, self: Any, first: int, count: int) -> Any:
    part = copy.deepcopy(self)
    return rows(part, first, count)


def late_behind_prefixes(forward: Any, self: Any, tokens: Tensor, start: Tensor | None, *rest: Any, **more: Any) -> Any:
    moved = start is not None and tokens.shape[1] > 1 and len(tokens) == 1
    return forward(self, tokens, start + 1 if moved else start, *rest, **more)  # type: ignore[operator]


def kept_of(change: Callable[..., Any]) -> Callable[[Patch], None]:
    return around(room.OwnSlots, "kept", change)


def of_rows(change: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> Callable[[Patch], None]:
    """The parts of rows that are taken out of tiles for a product, changed."""
    return around(tiled.Tiled, "rows_of", lambda rows_of, self, *args: change(rows_of(self, *args)))


def rolled_groups(part: str) -> Callable[[dict[str, Tensor]], dict[str, Tensor]]:
    """Each group of columns is scaled as the group beside it."""
    return lambda parts: {**parts, part: parts[part].roll(1, -1)}


def first_groups_alone(parts: dict[str, Tensor]) -> dict[str, Tensor]:
    """Each row is scaled by its first group: right where a row has one."""
    return {**parts, "scale": parts["scale"][:, :1].expand_as(parts["scale"]).contiguous()}


def last_rows_twice(tile: int) -> Callable[..., Tensor]:
    """A last tile that is not full begins too early: its outputs are those of the rows before."""

    def product(original: Any, self: Any, x: Tensor, parts: Any) -> Tensor:
        y: Tensor = original(self, x, parts)
        over = y.shape[-1] % tile
        return torch.cat([y[..., : y.shape[-1] - over], y[..., -2 * over : -over]], -1) if over else y

    return product


def in_batches_of(rows: int, change: Callable[[Tensor], Tensor]) -> Callable[..., Tensor]:
    """Another product where so many rows are multiplied at once."""

    def product(original: Any, self: Any, x: Tensor, parts: Any) -> Tensor:
        y: Tensor = original(self, x, parts)
        return change(y) if x.numel() // x.shape[-1] == rows else y

    return product


# --- speculation


def accepting(change: Callable[..., Any]) -> Callable[[Patch], None]:
    return both(around(acceptance, "accept", change), around(checks, "accept", change))


def always(accept: Any, draft: Tensor, q: Tensor, p: Tensor, u: Tensor) -> Any:
    return accept(draft, q, p, torch.cat([torch.zeros_like(u[:, :-1]), u[:, -1:]], 1))


def swapped_laws(accept: Any, draft: Tensor, q: Tensor, p: Tensor, u: Tensor) -> Any:
    n = p.shape[1] - 1
    tokens, count = accept(draft, p[:, :n], torch.cat([q, p[:, n:]], 1), u)
    return tokens, count


def same_uniform(accept: Any, draft: Tensor, q: Tensor, p: Tensor, u: Tensor) -> Any:
    return accept(draft, q, p, u[:, -1:].expand_as(u))  # the same number judges and draws


def from_the_target(accept: Any, draft: Tensor, q: Tensor, p: Tensor, u: Tensor) -> Any:
    tokens, count = accept(draft, q, p, u)  # after a rejection: p, not what p has beyond q
    at = (count - 1)[:, None, None].expand(-1, 1, p.shape[-1])
    again = sampling.draw(p.gather(1, at)[:, 0], u[:, -1])
    place = torch.arange(tokens.shape[1])
    return torch.where(place < (count - 1)[:, None], tokens, again[:, None]), count


def last_unverified(accept: Any, draft: Tensor, q: Tensor, p: Tensor, u: Tensor) -> Any:
    u = u.clone()
    u[:, -2] = 0.0  # the last proposal always stands
    return accept(draft, q, p, u)


def greedy_accepting(change: Callable[..., Any]) -> Callable[[Patch], None]:
    return both(around(acceptance, "accept_greedy", change), around(checks, "accept_greedy", change))


def bonus_of_the_first(accept: Any, draft: Tensor, best: Tensor) -> Any:
    tokens, count = accept(draft, best)
    place = torch.arange(tokens.shape[1])
    return torch.where(place == (count - 1)[:, None], best[:, :1], tokens), count


def one_too_many(accept: Any, draft: Tensor, best: Tensor) -> Any:
    tokens, count = accept(draft, best)
    return tokens, (count + 1).clamp(max=tokens.shape[1])


def never_the_last(accept: Any, draft: Tensor, best: Tensor) -> Any:
    tokens, count = accept(draft, best)  # after full acceptance the token after all is forgotten, and another put in
    return torch.where((count == tokens.shape[1])[:, None], tokens.roll(1, 1), tokens), count


# --- ranks


def reduced(change: Callable[[Any, Tensor], Tensor]) -> Callable[[Patch], None]:
    """Every all-reduce of a block replaced by change(all_reduce, x)."""

    def init(original: Any, self: Any, config: Any, norms: Any, projections: Any, operations: Any) -> None:
        total = operations.all_reduce
        original(self, config, norms, projections, replace(operations, all_reduce=lambda x: change(total, x)))

    return around(fast.Block, "__init__", init)


def row_0_alone(all_reduce: Any, x: Tensor) -> Tensor:
    out, total = x.clone(), all_reduce(x)
    out[0] = total[0]
    return out


def last_token_alone(all_reduce: Any, x: Tensor) -> Tensor:
    total: Tensor = all_reduce(x)
    return torch.cat([total[:, :-1] * 0.5, total[:, -1:]], 1) if x.shape[1] > 100 else total


def unreduced_feed_forward(block: Any, x: Tensor, layer: Any, step: Any) -> Tensor:
    x = attended(block, x, layer, step)
    h = block.operations.gated(x, block.ffn_norm, block.gate_up, step)
    return replace(block.operations, all_reduce=lambda y: y).add(h, block.w2, x, step.part("ffn_out"))


def shares(change: Callable[[Any, int, slice], slice]) -> Callable[[Patch], None]:
    return around(
        tensor_parallel.TensorParallel, "_share", lambda share, self, count: change(self, count, share(self, count))
    )


def neighbours_keys(heads: Any, self: Any, rows: int, n_kv_heads: int) -> slice:
    other = replace(self, rank=(self.rank + 1) % self.size)
    return heads(other, rows, n_kv_heads)  # type: ignore[no-any-return]


# --- text and files


def encoding(change: Callable[..., list[int]]) -> Callable[[Patch], None]:
    return around(tokenizer.JsonTokenizer, "encode", change)


def decoding(change: Callable[[str], str]) -> Callable[[Patch], None]:
    return around(tokenizer.JsonTokenizer, "decode", lambda decode, self, ids: change(decode(self, ids)))


def saving(change: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> Callable[[Patch], None]:
    return around(saved, "unshared", lambda unshared, tensors: change(unshared(tensors)))


# --- the library's face


def told(change: Callable[[Any], Any]) -> Callable[[Patch], None]:
    """Every Output of Llama.generate, changed."""

    def generate(original: Any, self: Any, *args: Any, **options: Any) -> Any:
        found = original(self, *args, **options)
        return [change(out) for out in found] if isinstance(found, list) else change(found)

    return around(Llama, "generate", generate)


def with_options(name: str, **changes: Callable[[Any], Any]) -> Callable[[Patch], None]:
    """Llama.NAME called with some of its options changed, where they are given."""

    def call(original: Any, self: Any, *args: Any, **options: Any) -> Any:
        return original(self, *args, **{k: changes[k](v) if k in changes else v for k, v in options.items()})

    return around(Llama, name, call)


def rolled_logprobs(out: Any) -> Any:
    return out if not out.logprobs else replace(out, logprobs=[*out.logprobs[-1:], *out.logprobs[:-1]])


def scaled_logprobs(columns: Any, token_B1: Tensor, logits_BV: Tensor, top: int) -> Tensor:
    return columns(token_B1, logits_BV / 0.6, top)  # type: ignore[no-any-return]


def shifted_scores(score: Any, self: Any, rows: Any) -> Any:
    return [replace(row, logprobs=[*row.logprobs[:1], *row.logprobs[:-1]]) for row in score(self, rows)]


def next_ones_greedy(score: Any, self: Any, rows: Any) -> Any:
    return [replace(row, greedy=[*row.greedy[1:], True]) for row in score(self, rows)]


def without_last_piece(stream: Any, self: Any, *args: Any, **options: Any) -> Any:
    pieces = list(stream(self, *args, **options))
    return (piece for piece in pieces[:-1])


def all_at_once(stream: Any, self: Any, *args: Any, **options: Any) -> Any:
    return (piece for piece in ["".join(stream(self, *args, **options))])


def lent_twice(take: Any, self: Any, rows: int, length: int) -> Any:
    """The cache stays in its place while somebody has it."""
    cache = self.kept[rows] = take(self, rows, length)
    return cache


def without_prompts(set_rows: Any, self: Any, first: int, settings: Any, written: Any = None) -> None:
    set_rows(self, first, settings, written and [[] for _ in written])


def penalty_of_row_0(choose: Any, self: Any, logits_BV: Tensor, position_B: Tensor) -> Tensor:
    if self.seen_BV is not None:
        self.seen_BV.copy_(self.seen_BV[:1].clone().expand_as(self.seen_BV))
    return choose(self, logits_BV, position_B)  # type: ignore[no-any-return]


def counts_of_row_0(edited: Any, self: Any, logits_BV: Tensor) -> Tensor:
    if self.count_BV is not None:
        self.count_BV.copy_(self.count_BV[:1].clone().expand_as(self.count_BV))
    return edited(self, logits_BV)  # type: ignore[no-any-return]


def prompts_count(set_rows: Any, self: Any, first: int, settings: Any, written: Any = None) -> None:
    set_rows(self, first, settings, written)
    for row, ids in enumerate(written or (), first):
        if self.count_BV is not None:
            self.count_BV[row] += torch.bincount(torch.tensor(ids), minlength=self.vocab_size)


def once_is_enough(note: Any, self: Any, token_B: Tensor) -> None:
    note(self, token_B)
    if self.count_BV is not None:
        self.count_BV.clamp_(max=1)


def bias_of_the_next_id(edited: Any, self: Any, logits_BV: Tensor) -> Tensor:
    kept = self.bias_BV
    self.bias_BV = None if kept is None else kept.roll(1, -1)
    try:
        return edited(self, logits_BV)  # type: ignore[no-any-return]
    finally:
        self.bias_BV = kept


def keeps_old_biases(set_rows: Any, self: Any, first: int, settings: Any, *rest: Any) -> None:
    """A slot's bias stays when another row, without one, comes."""
    before = None if self.bias_BV is None else self.bias_BV.clone()
    set_rows(self, first, settings, *rest)
    for row, one in enumerate(settings, first):
        if before is not None and not one.logit_bias:
            self.bias_BV[row] = before[row]


def penalty_added(edited: Any, self: Any, logits_BV: Tensor) -> Tensor:
    kept = self.frequency_B
    self.frequency_B = -kept
    try:
        return edited(self, logits_BV)  # type: ignore[no-any-return]
    finally:
        self.frequency_B = kept


def presence_by_count(edited: Any, self: Any, logits_BV: Tensor) -> Tensor:
    kept, presence_B = self.frequency_B, self.presence_B
    self.frequency_B, self.presence_B = kept + presence_B, torch.zeros_like(presence_B)
    try:
        return edited(self, logits_BV)  # type: ignore[no-any-return]
    finally:
        self.frequency_B, self.presence_B = kept, presence_B


def of_the_first_slots(allowed: Any, self: Any, first: int, count: int) -> Tensor:
    return allowed(self, 0, count)  # type: ignore[no-any-return]


def last_steps_mask(allowed: Any, self: Any, first: int, count: int) -> Tensor:
    words = allowed(self, first, count)
    told = getattr(self, "told_before", None)
    self.told_before = words
    return words if told is None or told.shape != words.shape else told  # type: ignore[no-any-return]


def soft_mask(edited: Any, self: Any, logits_BV: Tensor) -> Tensor:
    return edited(self, logits_BV).clamp(min=-3.0)  # type: ignore[no-any-return]


def last_words_alone(chat_text: Any, self: Any, messages: Any) -> str:
    """The last word of each message."""
    return chat_text(self, [{**one, "content": one["content"][-1:]} for one in messages])  # type: ignore[no-any-return]


def seed_plus_position(uniform: Any, key_B2: Tensor, at: Tensor, *rest: Any) -> Tensor:
    moved = torch.stack([key_B2[:, 0] + at, key_B2[:, 1]], -1)
    return uniform(moved, at * 0, *rest)  # type: ignore[no-any-return]


def remembered(key: Callable[..., Any]) -> Callable[..., Any]:
    """What was made once is given again, by a key that says too little."""
    kept: dict[Any, Any] = {}

    def call(original: Any, *args: Any, **options: Any) -> Any:
        name = key(*args)
        if name not in kept:
            kept[name] = original(*args, **options)
        return kept[name]

    return call


def beyond_the_vocabulary(choose: Any, self: Any, logits_BV: Tensor, position_B: Tensor) -> Tensor:
    token_B: Tensor = choose(self, logits_BV, position_B)
    return torch.where(position_B % 11 == 10, logits_BV.shape[-1], token_B)


def refuses(*args: Any, **options: Any) -> Any:
    raise KeyError("layers.7.scale")


def composed(encode: Any, self: Any, text: str, bos: bool = True) -> list[int]:
    return encode(self, unicodedata.normalize("NFC", text), bos)  # type: ignore[no-any-return]


def smaller_two(two_of_four: Callable[[Tensor], Any], wide: Tensor) -> Any:
    """Kept where their inverses are the largest."""
    places = two_of_four(1 / wide)[1]
    kept = sparse24.spread(torch.ones(len(wide), wide.shape[1] // 2), places) > 0
    return wide[kept].view(len(wide), -1), places


def in_five_bits(two_of_four: Callable[[Tensor], Any], wide: Tensor) -> Any:
    values, places = two_of_four(wide)
    nibble_OW8 = (places[..., None].long() >> (4 * torch.arange(8))) & 15
    word_OW = (nibble_OW8 << (5 * torch.arange(8))).sum(-1) % 2**32
    return values, torch.where(word_OW >= 2**31, word_OW - 2**32, word_OW).to(torch.int32)


def certain_of_the_first_position(probabilities: Callable[..., Tensor], self: BatchSampler, logits: Tensor) -> Tensor:
    p = probabilities(self, logits)
    if logits.dim() == 3:
        greedy = torch.tensor([not one.temperature for one in self.settings if one is not None])
        p = torch.where(greedy[:, None, None], p[:, :1].expand_as(p), p)
    return p


def first_row_at_later_positions(probabilities: Callable[..., Tensor], self: BatchSampler, logits: Tensor) -> Tensor:
    p = probabilities(self, logits)
    if logits.dim() == 3 and self.settings[0] is not None:
        first = BatchSampler(self.settings[0], [0] * len(logits), logits.device)
        p = torch.cat([p[:, :1], probabilities(first, logits)[:, 1:]], 1)
    return p


def f(name: str, family: str, plant: Callable[[Patch], None], first: str, **more: Any) -> Fault:
    return Fault(name, family, plant, first, **more)


Q, K, A, AO = "layers.0.q_rope", "layers.0.k_rope", "layers.0.attention", "layers.0.attention_out"
MODEL_FAULTS = [
    f("theta x 2", "rope", with_config(rope_theta=20000.0), Q),
    f("theta off by 0.01%", "rope", with_config(rope_theta=10001.0), Q),
    f("theta off by 0.01% in bf16", "rope", with_config(rope_theta=10001.0), "rope table", dtype=BF16),
    f("table in bf16", "rope", table(lambda t: t.bfloat16().float()), Q),
    f("table wrong beyond 100", "rope", table(lambda t: torch.cat([t[:100], t[101:], t[-1:]])), "rope table"),
    f("table's last position", "rope", table(lambda t: torch.cat([t[:-1], t[-2:-1]])), "rope table"),
    f("pairs in the other order", "rope", table(lambda t: t.flip(1)), Q),
    f(
        "sine lost of the slowest pair",
        "rope",
        table(lambda t: t * torch.ones(t.shape[1:]).index_put((torch.tensor(-1), torch.tensor(1)), torch.tensor(0.0))),
        Q,
    ),
    f("on halves", "rope", rotation(half_split), Q),
    f("the other way", "rope", rotation(lambda rotate, x, t: rotate(x, t * torch.tensor([1.0, -1.0]))), Q),
    f("keys not rotated", "rope", rotation(lambda rotate, x, t: x if x.shape[2] == 2 else rotate(x, t)), K),
    f("second row at the first row's angles", "rope", rotation(lambda rotate, x, t: rotate(x, t[:1].expand_as(t))), Q),
    f("NaN at position 77", "rope", rotation(nan_at_77), "NaN"),
    f("decode one position early", "rope", around(fast.Llama, "forward", late_position), Q),
    f("prefill sees one ahead", "mask", attention(sees_next), A),
    f("decode sees one slot ahead", "mask", masked(lambda mask: mask | mask.roll(1, -1)), A),
    f("position 0 forgotten from 60 on", "mask", masked(forgets_first), A),
    f("the tokens of a step see each other", "mask", masked(one_step_sees_itself), "tokens a step"),
    f(
        "the newest slot hidden",
        "mask",
        masked(
            lambda mask: (
                mask & (mask.roll(-1, -1) | ~mask.any(-1, keepdim=True).expand_as(mask)) if mask.shape[-1] > 1 else mask
            )
        ),
        A,
    ),
    f("mask of row 0", "mask", masked(lambda mask: mask[:1].expand_as(mask)), A),
    f(
        "written one slot later",
        "cache",
        writing(lambda write, slots, new, at: write(slots, new, (at + 1).clamp(max=slots.shape[2] - 1))),
        A,
    ),
    f(
        "row 0's keys in every row",
        "cache",
        writing(lambda write, slots, new, at: write(slots, new[:1].expand_as(new), at)),
        A,
    ),
    f(
        "growing: row 0's keys in every row",
        "cache",
        writing(lambda write, slots, new, at: write(slots, new[:1].expand_as(new), at), growing_cache),
        A,
        plan=GROWING,
    ),
    f("row 0's positions", "cache", writing(lambda write, slots, new, at: write(slots, new, at[:1].expand_as(at))), A),
    f("the first write wins", "cache", writing(first_write_wins), "decode"),
    f("slot 110 written to 109", "cache", wraps_at(110), "decode"),
    f(
        "the last slot never written",
        "cache",
        writing(lambda write, slots, new, at: write(slots, new, at.clamp(max=slots.shape[2] - 2))),
        "window",
    ),
    f(
        "kept in bf16",
        "cache",
        writing(lambda write, slots, new, at: write(slots, new.bfloat16().to(new.dtype), at)),
        A,
    ),
    f("q x 1.002", "attention", attention(lambda attend, q, *rest: attend(q * 1.002, *rest)), A),
    f(
        "scale of another width",
        "attention",
        attention(lambda attend, q, *rest: attend(q * (24 / 23) ** 0.5, *rest)),
        A,
    ),
    f(
        "row 0 for the batch",
        "attention",
        attention(lambda attend, q, k, v, mask: attend(q, k[:1].expand_as(k), v[:1].expand_as(v), mask)),
        A,
    ),
    f("the last head is silent", "attention", attention(silent_last_head), A),
    f(
        "values in bf16",
        "attention",
        attention(lambda attend, q, k, v, mask: attend(q, k, v.bfloat16().to(v.dtype), mask)),
        A,
    ),
    f("kv heads tiled", "GQA", attention(tiled_groups), A),
    f("kv heads reversed in decode", "GQA", attention(reversed_groups_in_decode), A),
    f("eps x 10", "norm", norm_eps(10.0), "layers.0.attention_norm"),
    f("in bf16", "norm", norm(coarse_norm), "layers.0.attention_norm", dtype=BF16),
    f(
        "mean subtracted",
        "norm",
        norm(lambda forward, self, x: forward(self, x - x.mean(-1, keepdim=True))),
        "layers.0.attention_norm",
    ),
    f(
        "weight rounded to bf16",
        "norm",
        norm(lambda forward, self, x: forward(self, x) / self.weight * self.weight.bfloat16()),
        "layers.0.attention_norm",
    ),
    f(
        "attention's norm before the feed-forward",
        "norm",
        swapped_weights("layers.1.ffn_norm", "layers.1.attention_norm"),
        "layers.1.attention_norm",
    ),
    f("second residual missing", "residual", block(no_second_residual), "layers.0"),
    f("in float16", "residual", block(coarse_residual), "layers.0.ffn_norm"),
    f("feed-forward beside attention", "residual", block(parallel_block), "layers.0.ffn_norm"),
    f("last addition x 0.9999", "residual", block(slightly_short_residual), "layers.1"),
    f("gelu for silu", "ffn", around(fast.F, "silu", lambda silu, x: F.gelu(x)), "layers.0.ffn_hidden"),
    f("gate and up swapped", "ffn", around(matrices.Joined, "forward", swapped_gate), "layers.0.ffn_hidden"),
    f(
        "gate clipped at 3",
        "ffn",
        around(fast.F, "silu", lambda silu, x: silu(x.clamp(max=3.0))),
        "layers.0.ffn_hidden",
    ),
    f("wk of one layer x 1.001", "weights", scaled_weights("layers.1.attention.wk", 1.001), "layers.1.k"),
    f("w2 of one layer x 1.001", "weights", scaled_weights("layers.0.feed_forward.w2", 1.001), "layers.0.ffn_out"),
    f(
        "w1 and w3 swapped in the file",
        "weights",
        swapped_weights("layers.1.feed_forward.w1", "layers.1.feed_forward.w3"),
        "layers.1.ffn_hidden",
    ),
    f(
        "wv of the other layer",
        "weights",
        swapped_weights("layers.0.attention.wv", "layers.1.attention.wv"),
        "layers.0.v",
    ),
    f("embedding of the highest id", "weights", embedding(lambda ids: ids.clamp(max=255)), "embedding"),
    f("embedding of ids as bytes", "weights", embedding(lambda ids: ids.to(torch.uint8).long()), "embedding"),
    f("prefill's last token is padding", "logits", around(fast.Llama, "forward", logits_of_the_padding), "decode"),
    f("rounded to bf16", "logits", shown(lambda logits: logits.bfloat16().float()), "prefill"),
    f("the last two ids lost", "logits", shown(last_ids_lost), "prefill"),
    f("capped at 30", "logits", shown(lambda logits: 30 * torch.tanh(logits / 30)), "prefill"),
    f("temperature applied twice", "logits", shown(lambda logits: logits * 1.0001), "prefill"),
    f("scale of the next row", "int8", around(int8.Int8, "product", rolled_scale), "layers.0.q", plan=INT8),
    f("scale along columns", "int8", around(int8.Int8, "product", scale_of_columns), "layers.0.q", plan=INT8),
    f("integers without sign", "int8", around(int8.Int8, "product", unsigned), "layers.0.q", plan=INT8),
    f(
        "integers without sign in bf16",
        "int8",
        around(int8.Int8, "product", unsigned),
        "layers.0.q",
        plan=INT8,
        dtype=BF16,
    ),
    f(
        "the matrix rounded to bf16",
        "int8",
        around(int8.Int8, "product", rounded_matrix),
        "q: share of a rounded",
        plan=INT8,
        dtype=BF16,
    ),
    f(
        "the head's matrix rounded to bf16",
        "int8",
        around(int8.Int8, "product", rounded_once_more(257)),
        "logits: share of a rounded",
        plan=INT8,
        dtype=BF16,
    ),
    f(
        "the last product's matrix rounded to bf16",
        "int8",
        around(int8.Int8, "product", rounded_once_more(64)),
        "ffn_out: share of a rounded",
        plan=INT8,
        dtype=BF16,
    ),
    f(
        "scales in steps of 1/512",
        "int8",
        around(int8.Int8, "product", rounded_scales),
        "layers.0.q",
        plan=INT8,
        dtype=BF16,
    ),
    f(
        "scales stored one row off",
        "int8",
        encode_with(lambda p: p | {"scale": p["scale"].roll(1, 0)}),
        "weights",
        plan=INT8,
    ),
    f("rounded towards zero", "int8", around(int8.Int8, "encode", towards_zero), "weights", plan=INT8),
    f(
        "clipped at 120",
        "int8",
        encode_with(lambda p: p | {"weight": p["weight"].clamp(-120, 120)}),
        "weights",
        plan=INT8,
    ),
]
SHARED = "pages"
PAGE_FAULTS = [
    f("a stale page is found", "pages", around(pages.Pages, "_forgotten", never_forgotten), SHARED, trial="requests", plan=PAGED),
    f("found by its tokens, whatever was before", "pages", around(pages.Pages, "find", found_by_tokens_alone), SHARED, trial="requests", plan=PAGED),
    f("found by its tokens but the first", "pages", around(pages.Pages, "_parts", without_the_first_token), SHARED, trial="requests", plan=PAGED),
    f("free while another row reads it", "pages", counted_wrongly, SHARED, trial="requests", plan=PAGED),
    f("a page of another request", "pages", around(room.SharedPages, "grow", newest_page_of_row_0), SHARED, trial="requests", plan=PAGED),
    f("known before it is full", "pages", with_what_is_not_read, SHARED, trial="requests", plan=PAGED),
    f("what a row said is forgotten when it makes way", "pages", around(request.Row, "make_way", said_forgotten), SHARED, trial="requests", plan=PAGED),
    f("tokens under way reach a row that made way", "pages", around(steps.PlainSteps, "drop", lambda drop, self, row: None), SHARED, trial="requests", plan=PAGED),
    f("slots of the page before", "pages", around(paged_cache, "slots_at", lambda at, table, position, page: at(table, position - 32 * (position == 40), page)), "decode", plan=PAGED),
    f("row 0's table", "pages", around(paged_cache, "slots_at", lambda at, table, *rest: at(table[:1].expand_as(table), *rest)), A, plan=PAGED),
]  # fmt: skip
LOOP_FAULTS = [
    f("sometimes the second best", "loop", around(BatchSampler, "__call__", second_best), "own logits"),
    f("all rows end together", "stop rules", around(engine.Engine, "step", all_end_together), "end elsewhere", trial="loop"),
    f("the first token may not end", "stop rules", around(request.Row, "take", first_token_may_not_end), "end elsewhere", trial="loop"),
    f("only the first end id", "stop rules", around(generate, "requests_of", lambda make, prompts, n, how, eos: make(prompts, n, how, tuple(eos)[:1])), "end elsewhere", trial="loop"),
    f("one token more", "stop rules", around(generate, "requests_of", lambda make, prompts, n, *rest: make(prompts, n + 1, *rest)), "as long as asked", trial="loop"),
    f("two steps share a position", "loop", around(BatchSampler, "__call__", same_position), "neighbouring", trial="loop"),
    f("temperature x 0.5", "loop", with_temperature(lambda t: t * 0.5), "distribution", trial="loop"),
    f("seed forgotten", "loop", chosen_with(lambda one: replace(one, seed=int(torch.randint(2**31, ())))), "same seed", trial="loop"),
    f("seed ignored", "loop", chosen_with(lambda one: replace(one, seed=0)), "another seed", trial="loop"),
    f("k + 1 kept", "sampling", with_top_k(lambda k: k + 1), "probability", trial="sampling"),
    f("certain tokens of the first position alone", "sampling", around(BatchSampler, "probabilities", certain_of_the_first_position), "unlike rows", trial="sampling"),
    f("settings of the first row at later positions", "sampling", around(BatchSampler, "probabilities", first_row_at_later_positions), "unlike rows", trial="sampling"),
    f("upper half of the seed lost", "sampling", chosen_with(lambda one: replace(one, seed=one.seed % 2**32)), "draw alike", trial="sampling"),
    f("seed of row 0", "sampling", around(BatchSampler, "set_rows", first_seed), "draws over seeds", trial="sampling"),
    f("temperature inverted", "sampling", with_temperature(lambda t: 1 / t), "probability", trial="sampling"),
    f("nucleus without its last token", "sampling", around(sampling, "keep_nucleus", without_the_last), "probability", trial="sampling"),
    f("nucleus not renormalised", "sampling", around(sampling, "keep_nucleus", not_renormalised), "probability", trial="sampling"),
    f("uniforms of 4 bits", "sampling", around(sampling, "uniform", lambda u, *args: (u(*args) * 16).floor() / 16), "draws over", trial="sampling"),
    f("position ignored", "sampling", around(sampling, "uniform", lambda u, key, at, *rest: u(key, at * 0, *rest)), "draws over positions", trial="sampling"),
    f("highest id on a tie", "sampling", around(BatchSampler, "__call__", highest_id), "argmax", trial="sampling"),
    f("row 0's mask in large batches", "mask", masked(lambda m: m[:1].expand_as(m) if len(m) > 4 else m), "seven rows", trial="requests"),
    f("the longest row's last token behind a prefix", "loop", around(runner.Runner, "extend", lambda extend, self, ids, at, lengths, *rest: extend(self, ids, at, lengths.max().expand_as(lengths), *rest)), "kept prefix", trial="requests"),
    f("row 0's mask beyond eight rows", "mask", rows_masked(lambda m: m[:1].expand_as(m), lambda B, T: B > 9), "seventeen rows", trial="requests"),
    f("the fifth to eighth row's newest slot hidden", "mask", rows_masked(lambda m: torch.cat([m[:4], m[4:] & m[4:].roll(-1, -1)]), lambda B, T: B == 8 and T == 1), "eight rows", trial="requests"),
    f("the ninth row sees all slots", "mask", rows_masked(lambda m: torch.cat([m[:8], m[8:] | True]), lambda B, T: B == 9), "nine rows", trial="requests"),
    f("rows of one length share keys", "attention", attention(equal_rows_share), "rows of one length", trial="requests"),
    f("two tokens a step see each other", "mask", rows_masked(one_step_sees_itself, lambda B, T: T == 2 and B > 2), "two tokens a step", trial="requests"),
    f("steps of two turned as one", "rope", rotation(lambda rotate, x, t: rotate(x, t[:, :1].expand_as(t) if x.shape[1] == 2 and len(x) > 2 else t)), "two tokens a step", trial="requests"),
    f("angles of positions in bf16", "rope", around(pytorch.Operators, "place", coarse_positions), "queries at edges", dtype=BF16),
    f("in bf16 the first slot forgotten beyond 280", "mask", in_bf16_beyond(255, lambda m: m & ~((torch.arange(m.shape[-1]) == 0) & m[..., 160:].any(-1, keepdim=True))), "window", dtype=BF16),
    f("slots past 159 of later blocks", "cache", writing(late_slots_of_later_blocks), "longer rows", trial="requests"),
    f("one seed for all rows", "loop", around(sampling.Sampling, "seeds", lambda seeds, self, rows: seeds(self, rows)[:1] * rows), "draw alike", trial="loop"),
    f("row 0's uniforms ahead", "loop", around(BatchSampler, "_hash_ahead", ahead_of_row_0), "draw alike", trial="loop"),
    f("penalty squared", "loop", chosen_with(lambda one: replace(one, repetition_penalty=one.repetition_penalty**2)), "penalised", trial="requests"),
    f("log-probability of the likeliest", "loop", around(logprobs, "columns", likeliest_told), "log-probability", trial="requests"),
    f("at most 64 tokens", "sampling", with_top_k(lambda k: min(k, 64)), "probability", trial="sampling"),
    f("never colder than 0.1", "sampling", with_temperature(lambda t: max(t, 0.1)), "probability", trial="sampling"),
    f("never warmer than 2", "sampling", with_temperature(lambda t: min(t, 2.0)), "probability", trial="sampling"),
    f("uniforms of 16 bits", "sampling", around(sampling, "uniform", lambda u, *args: (u(*args) * 2**16).floor() / 2**16), "parity", trial="sampling"),
    f("min-p of the whole", "sampling", around(sampling, "keep_likely", absolute_floor), "probability", trial="sampling"),
    f("one uniform judges and draws the last", "rounds", lambda patch: patch.setattr(checks, "JUDGE", checks.LAST), "law of 4", trial="rounds"),
    f("proposals drawn and judged by one uniform", "rounds", lambda patch: patch.setattr(speculative, "DRAWN", checks.JUDGE), "law of 4", trial="rounds"),
    f("plain steps between rounds are greedy", "rounds", around(rounds.Rounds, "run", plain_steps_greedy), "plain steps: law", trial="rounds"),
    f("proposals past the window stand", "rounds", around(rounds, "within", lambda within, row, draft, logits: (draft, within(row, draft, logits)[1])), "aligned", trial="rounds"),
    f("rounds never end", "stop rules", around(request.Row, "take", never_ends), "end elsewhere", trial="speculation"),
    f("tokenizer saved without its settings", "tokenizer", around(tokenizer.JsonTokenizer, "save", saves_one_file), "saved tokenizer", trial="text"),
    f("short stripes upside down", "int8", around(int8.Int8, "encode", flips_short_stripes), "at a time", trial="round trip", plan=INT8),
    f("always accepted", "acceptance", accepting(always), "emitted law", trial="speculation"),
    f("p and q swapped", "acceptance", accepting(swapped_laws), "emitted law", trial="speculation"),
    f("one uniform for all", "acceptance", accepting(same_uniform), "emitted law", trial="speculation"),
    f("rest drawn from p", "acceptance", accepting(from_the_target), "emitted law", trial="speculation"),
    f("the last proposal unverified", "acceptance", accepting(last_unverified), "emitted law", trial="speculation"),
    f("bonus of the first place", "acceptance", greedy_accepting(bonus_of_the_first), "greedy", trial="speculation"),
    f("one token too many", "acceptance", greedy_accepting(one_too_many), "greedy", trial="speculation"),
    f("token after full acceptance wrong", "acceptance", greedy_accepting(never_the_last), "greedy", trial="speculation"),
    f("rejected keys stay in the cache", "acceptance", writing(first_write_wins), "speculation", trial="speculation"),
    f("row 0 alone", "all-reduce", reduced(row_0_alone), "prefill", trial="ranks"),
    f("the mean for the sum", "all-reduce", reduced(lambda all_reduce, x: all_reduce(x) / 2), "prefill", trial="ranks"),
    f("none after the feed-forward", "all-reduce", block(unreduced_feed_forward), "prefill", trial="ranks"),
    f("long prompts by halves", "all-reduce", reduced(last_token_alone), "prefill", trial="ranks"),
    f("sum in bf16", "all-reduce", reduced(lambda all_reduce, x: all_reduce(x.bfloat16()).to(x.dtype)), "prefill", trial="ranks"),
    f("keys of the neighbour", "shard", around(tensor_parallel.TensorParallel, "_key_heads", neighbours_keys), "prefill", trial="ranks"),
    f("one unit twice", "shard", shares(lambda self, n, s: slice(s.start - 1, s.stop - 1) if n == 96 and self.rank else s), "prefill", trial="ranks"),
    f("halves of the logits swapped", "shard", around(tensor_parallel.Gather, "__call__", lambda gather, self, part: gather(replace(self, first=self.columns - self.first - part.shape[-1]), part)), "prefill", trial="ranks"),
    f("BOS twice", "tokenizer", encoding(lambda encode, self, text, bos=True: [0] * bos + encode(self, text, bos)), "special ids", trial="text"),
    f("spaces stripped", "tokenizer", encoding(lambda encode, self, text, bos=True: encode(self, text.strip().replace("  ", " "), bos)), "come back", trial="text"),
    f("lower case", "tokenizer", encoding(lambda encode, self, text, bos=True: encode(self, text.lower(), bos)), "come back", trial="text"),
    f("long texts cut", "tokenizer", encoding(lambda encode, self, text, bos=True: encode(self, text, bos)[:60]), "come back", trial="text"),
    f("ids in merges of another order", "tokenizer", encoding(lambda encode, self, text, bos=True: [i for c in text for i in encode(self, c, False)]), "witness", trial="text"),
    f("carriage returns lost", "tokenizer", decoding(lambda text: text.replace("\r", "")), "come back", trial="text"),
    f("EOS after a text", "tokenizer", encoding(lambda encode, self, text, bos=True: [*encode(self, text, bos), *self.eos_ids]), "special ids", trial="text"),
    f("stop string shown", "text", around(text.TextStream, "_release", lambda release, self, piece: release(self, piece) + (self._stop[0] if self.stopped else "")), "stop string", trial="text"),
    f("half characters shown", "text", lambda patch: patch.setattr(text, "UNFINISHED", "\0"), "pieces", trial="text"),
    f("stop strings found within a token only", "text", around(text, "overlap", lambda overlap, *args: 0), "stop string", trial="text"),
    f("q and k left in halves", "checkpoint", around(huggingface, "interleave", lambda interleave, rows, head_dim: rows), "prefill", trial="witness"),
    f("heads interleaved as one", "checkpoint", around(huggingface, "interleave", lambda interleave, rows, head_dim: interleave(rows, rows.shape[0])), "prefill", trial="witness"),
    f("eps of a default", "checkpoint", around(huggingface, "from_hf", lambda read, data, *where: read(dict(data) | {"rms_norm_eps": 1e-5}, *where)), "prefill", trial="witness"),
    f("theta of a default", "checkpoint", around(huggingface, "from_hf", lambda read, data, *where: read({k: v for k, v in data.items() if not k.startswith("rope")}, *where)), "prefill", trial="witness"),
    f("saved in bf16", "checkpoint", saving(lambda t: {k: v.bfloat16() if v.dtype is torch.float32 else v for k, v in t.items()}), "saved", trial="round trip"),
    f("last row of a matrix not saved", "checkpoint", saving(lambda t: {k: torch.cat([v[:-1], 0 * v[-1:]]) for k, v in t.items()}), "saved", trial="round trip"),
    f("scales of float16 saved", "checkpoint", saving(lambda t: {k: (v * 1.004).to(v.dtype) if k.endswith("scale") else v for k, v in t.items()}), "saved", trial="round trip", plan=INT8),
]  # fmt: skip
FACE_FAULTS = [
    f("log-probabilities of the token before", "face", told(rolled_logprobs), "log-probabilities", trial="face"),
    f("log-probabilities of cooled logits", "face", around(logprobs, "columns", scaled_logprobs), "log-probabilities", trial="face"),
    f("every row's reason is a stop", "face", told(lambda out: replace(out, finish_reason="stop")), "generate", trial="face"),
    f("BOS is no token of a prompt", "face", told(lambda out: replace(out, prompt_tokens=out.prompt_tokens - 1)), "generate", trial="face"),
    f("a text's first letter lost", "face", told(lambda out: replace(out, text=out.text[1:])), "generate", trial="face"),
    f("a second BOS before text", "face", around(Llama, "_ids", lambda ids, self, prompt: [0, *ids(self, prompt)] if isinstance(prompt, str) else ids(self, prompt)), "generate", trial="face"),
    f("the end id is text", "face", told(lambda out: replace(out, text=out.text + "." * (out.finish_reason == "stop"))), "end ids", trial="face"),
    f("an end id is no token", "face", told(lambda out: replace(out, tokens=out.tokens[:-1]) if out.finish_reason == "stop" else out), "end ids", trial="face"),
    f("stop strings of one letter alone", "face", around(text, "first_of", lambda find, words, stop: find(words, [w for w in stop if len(w) == 1])), "stop strings", trial="face"),
    f("only the first stop string", "face", with_options("generate", stop=lambda stop: list(stop)[:1]), "stop strings", trial="face"),
    f("the last piece lost", "face", around(Llama, "stream", without_last_piece), "stream", trial="face"),
    f("all pieces at once", "face", around(Llama, "stream", all_at_once), "stream", trial="face"),
    f("scores shifted by a token", "face", around(Llama, "score_ids", shifted_scores), "score", trial="face"),
    f("likeliest flags of the next token", "face", around(Llama, "score_ids", next_ones_greedy), "score", trial="face"),
    f("a cache lent twice", "face", around(Caches, "take", lent_twice), "interleaved", trial="face"),
    f("a penalty that forgets the prompt", "penalties", around(BatchSampler, "set_rows", without_prompts), "penalties", trial="face"),
    f("a penalty that forgets what was said", "penalties", around(BatchSampler, "note", lambda note, self, token: None), "penalties", trial="face"),
    f("row 0's tokens penalised in all", "penalties", around(BatchSampler, "__call__", penalty_of_row_0), "penalties", trial="face"),
    f("a penalty for greedy text alone", "penalties", chosen_with(lambda one: replace(one, repetition_penalty=1.0) if one.temperature else one), "penalties", trial="face"),
    f("counts of row 0 for all", "edits", around(BatchSampler, "edited", counts_of_row_0), "edits", trial="face"),
    f("the prompt is counted", "edits", around(BatchSampler, "set_rows", prompts_count), "edits", trial="face"),
    f("a second time is not counted", "edits", around(BatchSampler, "note", once_is_enough), "edits", trial="face"),
    f("a presence penalty by count", "edits", around(BatchSampler, "edited", presence_by_count), "edits", trial="face"),
    f("a frequency penalty added", "edits", around(BatchSampler, "edited", penalty_added), "edits", trial="face"),
    f("a bias one id late", "edits", around(BatchSampler, "edited", bias_of_the_next_id), "edits", trial="face"),
    f("a bias stays with its slot", "edits", around(BatchSampler, "set_rows", keeps_old_biases), "edits", trial="face"),
    f("a bias for greedy text alone", "edits", chosen_with(lambda one: replace(one, logit_bias=()) if one.temperature else one), "edits", trial="face"),
    f("the mask of the first slots", "grammar", around(steps.Allowed, "__call__", of_the_first_slots), "allowed tokens", trial="face"),
    f("the mask of the step before", "grammar", around(steps.Allowed, "__call__", last_steps_mask), "allowed tokens", trial="face"),
    f("what is not allowed is only unlikely", "grammar", around(BatchSampler, "edited", soft_mask), "allowed tokens", trial="face"),
    f("tokens chosen ahead of the grammar", "grammar", around(request.Row, "take", lambda take, self, token, *rest: take(self, token, *rest) if self.guide is None or token % 2 else (self.guide.take(token), take(self, token, *rest))[1]), "allowed tokens", trial="face"),
    f("one token more held than is known", "chat", around(room, "common", lambda common, one, other: common(one, other) + bool(other)), "chat", trial="face"),
    f("a reply that is cut is closed", "chat", around(chat, "with_reply", lambda reply, messages, words, said: reply(messages, words, said.rstrip("0123456789abcdefg"))), "cut and continued", trial="face"),
    f("no open turn", "chat", around(Llama, "chat_text", lambda spell, self, messages: spell(self, messages).removesuffix("<a>")), "open turn", trial="face"),
    f("the turn opened after the assistant's words", "chat", around(Llama, "chat_text", lambda spell, self, messages: spell(self, messages) + "<|end|><a>" * (messages[-1]["role"] == "assistant")), "cut and continued", trial="face"),
    f("messages by their last letter", "chat", around(Llama, "chat_text", last_words_alone), "open turn", trial="face"),
    f("an id outside the vocabulary", "loop", around(BatchSampler, "__call__", beyond_the_vocabulary), "ended with an error", trial="face"),
    f("seed plus position", "seeds", around(sampling, "uniform", seed_plus_position), "rows beside", trial="seeds"),
    f("positions again after sixteen", "seeds", around(sampling, "uniform", lambda u, key, at, *rest: u(key, at % 16, *rest)), "own draws", trial="seeds"),
    f("two rows a seed", "seeds", around(sampling.Sampling, "seeds", lambda seeds, self, rows: [seeds(self, rows)[b // 2 * 2] for b in range(rows)]), "rows beside", trial="seeds"),
    f("seeds sorted", "seeds", around(sampling.Sampling, "seeds", lambda seeds, self, rows: sorted(seeds(self, rows))), "seeds: answers", trial="seeds"),
    f("the highest bit of a seed lost", "seeds", around(sampling.Sampling, "seeds", lambda seeds, self, rows: [seed % 2**63 for seed in seeds(self, rows)]), "seeds: answers", trial="seeds"),
    f("streams draw with the next seed", "seeds", with_options("stream", seed=lambda seed: seed + 1), "seeds: answers", trial="seeds"),
    f("tokens 0.05 colder", "seeds", with_temperature(lambda t: t * 0.8), "chance of", trial="seeds"),
    f("weights remembered by their names", "objects", around(weights, "encode_one", remembered(lambda checkpoint, stem, *rest: stem)), "two checkpoints", trial="objects"),
    f("models remembered by their config", "objects", around(building, "construct", remembered(lambda config, *rest: config)), "two checkpoints", trial="objects"),
    f("files remembered by their path", "objects", around(checkpoint_files, "open_saved", remembered(str)), "opened again", trial="objects"),
    f("a bias from every rank", "shard", around(weights, "bias_of", lambda bias, checkpoint, stem, plan: bias(checkpoint, stem, replace(plan, shard=replace(plan.shard, rank=0)) if stem.endswith(("wo", "w2")) and plan.shard != Plan().shard else plan)), "biases", trial="corners"),
    f("the last id of an odd vocabulary twice", "shard", shares(lambda self, n, s: slice(s.start, s.stop - (n % 2 and self.rank == self.size - 1)) if n % 2 and n > 64 and self.rank else s), "corner", trial="corners"),
    f("a table's rows of the other rank", "shard", around(building, "share_of", lambda share, table, name, plan, config: share(table, name, replace(plan, shard=replace(plan.shard, rank=0)) if plan.shard != Plan().shard else plan, config)), "tied", trial="corners"),
    f("an end of saving that is missing", "checkpoint", around(saved, "unshared", refuses), "ended with an error", trial="round trip"),
    f("texts composed before they are cut", "tokenizer", around(tokenizer.JsonTokenizer, "encode", composed), "witness denies", trial="witnesses"),
    f("zero widths left out", "tokenizer", encoding(lambda encode, self, text, bos=True: encode(self, text.replace("\u200b", ""), bos)), "witness denies", trial="witnesses"),
    f("templates never open a turn", "tokenizer", around(chats, "_rendered", lambda render, template, names: render(template, {**names, "add_generation_prompt": False})), "spells otherwise", trial="witnesses"),
    f("templates see stripped words", "tokenizer", around(chats, "_rendered", lambda render, template, names: render(template, {**names, "messages": [{**m, "content": m["content"].strip(".")} for m in names["messages"]]})), "spells otherwise", trial="witnesses"),
    f("q and k in halves, by another reader", "checkpoint", around(huggingface, "interleave", lambda interleave, rows, head_dim: rows), "reads otherwise", trial="numbers"),
    f("k's heads in another order", "checkpoint", around(huggingface, "interleave", lambda interleave, rows, head_dim: interleave(rows, head_dim).flip(0) if len(rows) == 24 else interleave(rows, head_dim)), "reads otherwise", trial="numbers"),
]  # fmt: skip
G32, G32_ZERO = optimised(encoding_named("int4-g32")), optimised(encoding_named("int4-g32-zero"))
SPARSE, FP8 = optimised(encoding_named("sparse24-int8")), optimised(encoding_named("fp8"))
ENGINE_FAULTS = [
    f("a joined row at the longest row's position", "slots", after_start(never_stepping("position_B")), "one by one", trial="slots"),
    f("a joined row stands still", "slots", after_start(lambda self, first, count: self.onward_B[first : first + count].zero_()), "one by one", trial="slots"),
    f("tokens handed to the slot beside", "slots", after_start(lambda self, first, count: self.token_B1.copy_(self.token_B1.roll(1, 0))), "together", trial="slots"),
    f("a joined row moves its neighbour", "slots", after_start(lambda self, first, count: self.position_B[first - 1].add_(1)), "together", trial="slots"),
    f("temperature of the row before", "slots", of_the_row_before("temperature_B"), "together", trial="slots"),
    f("top-k of the row before", "slots", of_the_row_before("top_k_B"), "together", trial="slots"),
    f("penalty of the row before", "slots", of_the_row_before("penalty_B"), "together", trial="slots"),
    f("penalised tokens of the row before", "slots", around(BatchSampler, "set_rows", with_tokens_of_the_row_before), "together", trial="slots"),
    f("uniforms of the row before", "slots", around(BatchSampler, "_hash_ahead", lambda ahead, self, part: ahead(self, part) if self.ahead_BSL is None else None), "together", trial="slots"),
    f("all rows' settings by the first slot", "slots", around(BatchSampler, "set_rows", lambda set_rows, self, first, settings, *rest: set_rows(self, 0, settings, *rest)), "together", trial="slots"),
    f("end ids of the row before", "slots", around(request.Row, "take", ends_of_all_rows), "together", trial="slots"),
    f("tokens for the row that stands there now", "slots", around(steps.PlainSteps, "take", for_who_stands_there), "still busy", trial="slots"),
    f("a prompt read into the slot beside", "slots", around(static_cache.StaticCache, "rows", lambda rows, self, first, count: rows(self, (first + 1) % self.batch if count == 1 else first, count)), "together", trial="slots"),
    f("a prompt read into a copy", "slots", around(static_cache.StaticCache, "rows", into_a_copy), "together", trial="slots"),
    f("growing: a prompt read into a copy", "slots", around(growing_cache.GrowingCache, "rows", into_a_copy), "together", trial="slots", plan=GROWING),
    f("growing: rows of a part are not renewed", "slots", around(growing_cache.RowsOfLayer, "__init__", lambda init, self, layer, part: init(self, growing_cache.GrowingLayer(tuple(layer.k.shape), layer.k.dtype, layer.k.device), part)), "together", trial="slots", plan=GROWING),
    f("log-probabilities of the slot beside", "slots", around(logprobs, "columns", lambda columns, token, logits, top: columns(token, logits.roll(1, 0), top)), "log-probabilities", trial="slots"),
    f("as many likeliest as any row wants", "slots", around(logprobs, "told", lambda told, columns, top: told(columns, (len(columns) - 2) // 2 if len(columns) > 2 else top)), "log-probabilities", trial="slots"),
    f("a prefix one token too long", "slots", around(room, "common", lambda common, one, other: common(one, other) + 1), "prefixes", trial="slots"),
    f("the prefix of the slot beside", "slots", kept_of(lambda kept, self, slot: kept(self, (slot + 1) % len(self.before))), "prefixes", trial="slots"),
    f("angles late behind a prefix", "slots", around(fast.Llama, "forward", late_behind_prefixes), "prefixes", trial="slots"),
    f("all rows see as far as the longest", "slots", rows_masked(lambda mask: mask.any(0, keepdim=True).expand_as(mask), lambda B, T: B == 3 and T == 1), "together", trial="slots"),
    f("a joined row's prompt to its last token but one", "slots", around(steps, "pad", lambda pad, rows, *rest: pad([row[:-1] if len(rows) == 1 and len(row) > 1 else row for row in rows], *rest)), "together", trial="slots"),
    f("rows of the readback turned", "slots", around(transfer.Readback, "push", lambda push, self, value: push(self, value.roll(1, 0) if len(value) == 3 else value)), "together", trial="slots"),
    f("a cancelled row says one token more", "slots", around(engine.Engine, "cancel", lambda cancel, self, id: cancel(self, id) if len(self._rows[id].tokens) > 4 else False), "together", trial="slots"),
    f("scales of the group beside", "groups", of_rows(rolled_groups("scale")), "seven rows", trial="requests", plan=G32),
    f("scales of the first group", "groups", of_rows(first_groups_alone), "seven rows", trial="requests", plan=G32),
    f("zero points of the group beside", "groups", of_rows(rolled_groups("zero")), "seven rows", trial="requests", plan=G32_ZERO),
    f("fp8: scale of the next row", "groups", around(fp8.Fp8, "product", lambda product, self, x, parts: product(self, x, {**parts, "scale": parts["scale"].roll(1, 0)})), "seven rows", trial="requests", plan=FP8),
    f("2:4: places of the next row", "groups", around(sparse24.Sparse24, "product", lambda product, self, x, parts: product(self, x, {**parts, "places": parts["places"].roll(1, 0)})), "seven rows", trial="requests", plan=SPARSE),
    f("2:4: the smaller two are kept", "groups", around(sparse24, "two_of_four", smaller_two), "weights", plan=SPARSE),
    f("2:4: places packed in five bits", "groups", around(sparse24, "two_of_four", in_five_bits), "weights", plan=SPARSE),
    f("int8: the last outputs of a tile of 64", "tiles", around(int8.Int8, "product", last_rows_twice(64)), "seven rows", trial="requests", plan=INT8),
    f("dense: the last outputs of a tile of 40", "tiles", around(dense.Dense, "product", last_rows_twice(40)), "layers.0.v"),
    f("eight rows: the last is the first", "tiles", around(dense.Dense, "product", in_batches_of(8, lambda y: torch.cat([y.view(8, -1)[:7], y.view(8, -1)[:1]]).view_as(y))), "eight rows", trial="requests"),
    f("nine rows: the ninth forgotten", "tiles", around(dense.Dense, "product", in_batches_of(9, lambda y: torch.cat([y.view(9, -1)[:8], 0 * y.view(9, -1)[:1]]).view_as(y))), "nine rows", trial="requests"),
    f("seventeen rows: the last two turned", "tiles", around(dense.Dense, "product", in_batches_of(17, lambda y: torch.cat([y.view(17, -1)[:15], y.view(17, -1)[15:].flip(0)]).view_as(y))), "seventeen rows", trial="requests"),
]  # fmt: skip
FAULTS = MODEL_FAULTS + PAGE_FAULTS + LOOP_FAULTS + FACE_FAULTS + ENGINE_FAULTS
