"""The reference as truth, as yardstick and as a Subject; what every Subject shares.

Shapes: B rows, T tokens, V vocabulary, O orders of summation.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import Tensor

from llama_ref.arguments import floating, place, shown, whole
from llama_ref.checkpoint import TensorSource
from llama_ref.config import LlamaConfig
from llama_ref.model import (
    PARTS,
    Observer,
    amplitude,
    attend,
    inverse_frequencies,
    island,
    project,
    rms_norm,
    rotate,
    rotations,
)
from llama_ref.model import Llama as Reference
from oracle.statistics.budget import ORDERS
from oracle.statistics.orders import Order
from oracle.subjects.subject import Subject, Trace

Rows = Sequence[Sequence[int]]
HELD_BYTES = 2 << 30  # weights up to here are read once and kept; larger ones are read (or drawn) anew for every pass


def padded(rows: Rows, device: torch.device, vocab_size: int, width: int = 0) -> Tensor:
    """Rows as one tensor [B, T], padded on the right with ids that are not zeros, so that a leak would show."""
    width = max(width, *(len(row) for row in rows))
    filler = [(7919 * (i + 1)) % vocab_size for i in range(width)]
    return torch.tensor([[*row, *filler[len(row) :]] for row in rows], device=device)


class Weights(Mapping[str, Tensor]):
    """Weights as a runner of `dtype` holds them: every tensor rounded once (None: as they are).

    Small models are read once and kept on `device`, of larger ones each tensor is made when it is used.
    """

    def __init__(self, weights: Mapping[str, TensorSource], dtype: torch.dtype | None, device: torch.device):
        self._names = list(weights)
        self._weights = weights
        self._dtype = dtype
        self._device = device
        self._held: dict[str, Tensor] = {}
        self._room = HELD_BYTES

    def __getitem__(self, name: str) -> Tensor:
        if name in self._held:
            return self._held[name]
        source = self._weights[name]
        tensor = source[:].to(self._device)
        tensor = tensor if self._dtype is None else tensor.to(self._dtype)
        if tensor.nbytes <= self._room:
            self._room -= tensor.nbytes
            self._held[name] = tensor
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


class ReadOnce(Mapping[str, TensorSource]):
    """The tensors of a file. Each part that is asked for is read and decoded once, and everybody gets a copy of it.

    Truth, runners and what they are compared with ask for all tensors half a dozen times. What lies in memory already is as it
    is, and of large models what does not fit is read anew.
    """

    def __init__(self, weights: Mapping[str, TensorSource]):
        self.room = HELD_BYTES
        self._sources: dict[str, TensorSource] = {
            name: source if hasattr(source, "device") else HeldSource(source, self) for name, source in weights.items()
        }

    def __getitem__(self, name: str) -> TensorSource:
        return self._sources[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._sources)

    def __len__(self) -> int:
        return len(self._sources)


class HeldSource:
    """One tensor of a file, and the parts of it that were read."""

    def __init__(self, source: TensorSource, all: ReadOnce):
        self.shape, self.dtype = source.shape, source.dtype
        self._source, self._all = source, all
        self._held: dict[str, Tensor] = {}

    def __getitem__(self, key: slice | tuple[slice, ...]) -> Tensor:
        name = repr(key)
        if name in self._held:
            return self._held[name].clone()
        part = self._source[key]
        if part.nbytes <= self._all.room:
            self._all.room -= part.nbytes
            self._held[name] = part.clone()
        return part


class RefSubject:
    """`llama_ref`: as truth in float64, as yardstick in the subject's type, or itself judged. It has no cache."""

    def __init__(
        self,
        config: LlamaConfig,
        weights: Mapping[str, TensorSource],
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
        name: str = "reference",
        model: Callable[[Tensor], Tensor] | None = None,
    ):
        """`model` replaces the reference's own forward pass: tests plant faults there."""
        if not isinstance(config, LlamaConfig):
            raise TypeError(f"config={shown(config)} must be a LlamaConfig")
        if not isinstance(weights, Mapping):
            raise TypeError(f"weights={shown(weights)} must be a mapping of names to tensors, as Checkpoint.weights")
        dtype, device = floating("dtype", dtype), place("device", device)
        self.name = name
        self.config = config
        self.vocab_size = config.vocab_size
        self.dtype = dtype
        self.device = device
        self.weights = weights
        self._model = model or Reference(config, weights, dtype)

    @torch.no_grad()
    def prefill_logits(self, rows: Rows) -> list[Tensor]:
        logits_BTV = self._model(padded(rows, self.device, self.vocab_size))
        return [logits_TV[: len(row)] for logits_TV, row in zip(logits_BTV, rows, strict=True)]

    def decode_logits(self, rows: Rows, splits: Sequence[int]) -> list[Tensor]:
        return [logits_TV[split - 1 :] for logits_TV, split in zip(self.prefill_logits(rows), splits, strict=True)]

    def greedy(self, prompts: Rows, n: int) -> list[tuple[list[int], Tensor]]:
        return greedy_by_recomputation(self, prompts, n)

    @torch.no_grad()
    def stages_of_block(self, layer: int, seen: Sequence[Trace]) -> list[Trace]:
        """Every stage of a block for each row, computed from what the subject showed of the stage's inputs.

        Where the subject did not show a stage's input, the value computed here stands in: a subject that shows only
        whole blocks is judged block by block.
        """
        c, name = self.config, f"layers.{layer}"
        w = {part: self.weight(f"{name}.{part}.weight") for part in PARTS}  # typed once for all rows
        b = {part: self.weight(f"{name}.{part}.bias") for part in PARTS if f"{name}.{part}.bias" in self.weights}
        inputs = [self._typed(row[f"layers.{layer - 1}" if layer else "embedding"]) for row in seen]
        lengths = [len(row) for row in inputs]
        out: list[Trace] = [{} for _ in seen]

        def give(stage: str, value_1N: Tensor) -> Tensor:
            """The values [1, N, ...] of all rows, one row behind the other; those that the subject showed in their place."""
            parts = value_1N[0].split(lengths)
            for row, part in zip(out, parts, strict=True):
                row[f"{name}.{stage}"] = part.flatten(1)
            shown = (row.get(f"{name}.{stage}") for row in seen)
            kept = [p if s is None else self._typed(s).view(p.shape) for p, s in zip(parts, shown, strict=True)]
            return torch.cat(kept)[None]

        x_1ND = torch.cat(inputs)[None]
        N = x_1ND.shape[1]
        n_1ND = give("attention_norm", rms_norm(x_1ND, w["attention_norm"], c.norm_eps))
        q = give("q", project(n_1ND, w, b, "attention.wq").view(1, N, c.n_heads, c.head_dim))
        k = give("k", project(n_1ND, w, b, "attention.wk").view(1, N, c.n_kv_heads, c.head_dim))
        v = give("v", project(n_1ND, w, b, "attention.wv").view(1, N, c.n_kv_heads, c.head_dim))
        turns_Td = rotations(c, max(lengths, default=0), island(self.dtype), x_1ND.device)
        turns_Nd = torch.cat([turns_Td[:length] for length in lengths])
        q, k = give("q_rope", rotate(q, turns_Nd)), give("k_rope", rotate(k, turns_Nd))
        k, v = (self._kept(seen, f"{name}.{stage}", part) for stage, part in (("k_kept", k), ("v_kept", v)))
        alone = zip(q.split(lengths, 1), k.split(lengths, 1), v.split(lengths, 1), strict=True)
        a = give("attention", torch.cat([attend(*of_row, window=c.window) for of_row in alone], 1))
        x_1ND = x_1ND + give("attention_out", project(a.reshape(1, N, -1), w, b, "attention.wo"))
        n_1ND = give("ffn_norm", rms_norm(x_1ND, w["ffn_norm"], c.norm_eps))
        gate, up = project(n_1ND, w, b, "feed_forward.w1"), project(n_1ND, w, b, "feed_forward.w3")
        hidden = give("ffn_hidden", gate * torch.sigmoid(gate) * up)
        x_1ND = x_1ND + give("ffn_out", project(hidden, w, b, "feed_forward.w2"))
        for row, part in zip(out, x_1ND[0].split(lengths), strict=True):
            row[name] = part
        return out

    def _kept(self, seen: Sequence[Trace], stage: str, computed_1NKd: Tensor) -> Tensor:
        """Keys or values as a cache that rounds them holds them, if the subject shows such ones."""
        if not all(stage in row for row in seen):
            return computed_1NKd
        return torch.cat([self._typed(row[stage]) for row in seen]).view(computed_1NKd.shape)

    @torch.no_grad()
    def embeddings(self, rows: Rows) -> list[Tensor]:
        """The rows of the table for each row of tokens, [T, D]."""
        table = self.weights["tok_embeddings.weight"][:].to(self.device)
        return [self._typed(table[torch.tensor(list(row), device=self.device)]) for row in rows]

    @torch.no_grad()
    def stages_of_ends(self, rows: Rows, seen: Sequence[Trace]) -> list[Trace]:
        """The embedding, the final norm and the logits of each row, each from what the subject showed of its input."""
        c = self.config
        out: list[Trace] = [{"embedding": value} for value in self.embeddings(rows)]
        last = f"layers.{c.n_layers - 1}"
        shown = [(row, trace) for row, trace in zip(out, seen, strict=True) if last in trace]
        if not shown:
            return out
        lengths = [len(trace[last]) for _, trace in shown]
        whole_ND = torch.cat([self._typed(trace[last]) for _, trace in shown])
        norms = rms_norm(whole_ND, self.weight("norm.weight"), c.norm_eps).split(lengths)
        inputs_ND = torch.cat([self._typed(t.get("norm", norm)) for (_, t), norm in zip(shown, norms, strict=True)])
        head = self.weight("tok_embeddings.weight" if c.tie_embeddings else "output.weight")
        for (row, _), norm, logits in zip(shown, norms, (inputs_ND @ head.T).split(lengths), strict=True):
            row |= {"norm": norm, "logits": logits}
        return out

    @torch.no_grad()
    def tail_logits(self, tokens: Sequence[int], count: int) -> Tensor:
        """Logits [count, V] at the last positions of a long row, of a model of one block.

        Only the last positions ask, all are asked: the whole window costs no more than its keys and values.
        """
        c, T = self.config, len(tokens)
        assert c.n_layers == 1
        table, device = self.weight("tok_embeddings.weight"), self.device
        w = {part: self.weight(f"layers.0.{part}.weight") for part in PARTS}
        b = {part: self.weight(f"layers.0.{part}.bias") for part in PARTS if f"layers.0.{part}.bias" in self.weights}
        x_1TD = self._typed(table[torch.tensor(list(tokens), device=device)])[None]
        n_1TD = rms_norm(x_1TD, w["attention_norm"], c.norm_eps)
        turns_Td = rotations(c, T, island(self.dtype), device)
        q = rotate(project(n_1TD[:, -count:], w, b, "attention.wq").view(1, count, -1, c.head_dim), turns_Td[-count:])
        k = rotate(project(n_1TD, w, b, "attention.wk").view(1, T, -1, c.head_dim), turns_Td)
        v = project(n_1TD, w, b, "attention.wv").view(1, T, -1, c.head_dim)
        k, v = (part.repeat_interleave(c.n_heads // c.n_kv_heads, dim=2) for part in (k, v))
        score = torch.einsum("bthd,bshd->bhts", q, k).to(island(self.dtype)) / c.head_dim**0.5
        position, own = torch.arange(T, device=device), torch.arange(T - count, T, device=device)[:, None]
        unseen = (position > own) | (position <= own - (c.window or T))
        a = torch.einsum("bhts,bshd->bthd", score.masked_fill(unseen, -torch.inf).softmax(-1).to(q.dtype), v)
        x_1TD = x_1TD[:, -count:] + project(a.reshape(1, count, -1), w, b, "attention.wo")
        n_1TD = rms_norm(x_1TD, w["ffn_norm"], c.norm_eps)
        gate, up = project(n_1TD, w, b, "feed_forward.w1"), project(n_1TD, w, b, "feed_forward.w3")
        x_1TD = x_1TD + project(gate * torch.sigmoid(gate) * up, w, b, "feed_forward.w2")
        n_1TD = rms_norm(x_1TD, self.weight("norm.weight"), c.norm_eps)
        return n_1TD[0] @ (table if c.tie_embeddings else self.weight("output.weight")).T

    @torch.no_grad()
    def turned_queries(self, tokens: Sequence[int], cos_sin_Td2: Tensor) -> Tensor:
        """The first block's queries [T, H d] of tokens that stand at the positions of these cosines and sines."""
        c, name = self.config, "layers.0.attention.wq"
        w = {"wq": self.weight(f"{name}.weight")}
        b = {"wq": self.weight(f"{name}.bias")} if f"{name}.bias" in self.weights else {}
        x_1TD = self._typed(self.weight("tok_embeddings.weight")[torch.tensor(list(tokens), device=self.device)])[None]
        n_1TD = rms_norm(x_1TD, self.weight("layers.0.attention_norm.weight"), c.norm_eps)
        q_1Thd = project(n_1TD, w, b, "wq").view(1, len(tokens), -1, c.head_dim)
        turns_Td = torch.view_as_complex(cos_sin_Td2.to(self.device, island(self.dtype)).contiguous())
        return rotate(q_1Thd, turns_Td)[0].flatten(1)

    def at_far_positions(self) -> RefSubject:
        """Itself: it has one way to make its angles."""
        return self

    def weight(self, name: str) -> Tensor:
        return self._typed(self.weights[name][:])

    def _typed(self, value: Tensor) -> Tensor:
        return value.to(device=self.device, dtype=self.dtype)


class StoredReference(Reference):
    """The reference over stored matrices: these stay exact, and their products are rounded (by an `Order`) after the sum."""

    def __call__(self, tokens_BT: Tensor, observe: Observer = lambda stage, value: None) -> Tensor:
        config, device = self.config, tokens_BT.device
        x_BTD = self._weight("tok_embeddings.weight", device)[tokens_BT].to(self.dtype)
        for layer in range(config.n_layers):
            x_BTD = self.block(layer, x_BTD)
        x_BTD = rms_norm(x_BTD, self._weight("norm.weight", device), config.norm_eps)
        head = "tok_embeddings.weight" if config.tie_embeddings else "output.weight"
        return x_BTD @ self._weight(head, device).T

    def _weight(self, name: str, device: torch.device) -> Tensor:
        return stored_or_typed(self._weights[name][:].to(device), self.dtype)


def stored_or_typed(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """A matrix with its stored numbers, exact in float32; a vector in the type of the arithmetic."""
    return weight.float() if weight.dim() == 2 else weight.to(dtype)


class Yardstick(RefSubject):
    """The reference in a subject's own type, in several legal orders of summation: every value is [O, T, ...].

    What the type costs is the mean over these orders, not the luck of one. Over `stored` matrices it does what an encoding
    promises: the stored numbers are exact, and scaled after the product.
    """

    def __init__(
        self,
        config: LlamaConfig,
        weights: Mapping[str, TensorSource],
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
        orders: int = ORDERS,
        stored: bool = False,
    ):
        model = StoredReference(config, weights, dtype) if stored else None
        super().__init__(config, weights, dtype, device, "yardstick", model)
        self.orders, self.stored = whole("orders", orders, 1), stored
        self.exponentials = False

    def at_far_positions(self) -> Yardstick:
        """The same for texts of some hundred positions, where it shows how frequencies were made: orders that multiply angles
        out in float32 have them from exponentials, which is as lawful as powers, and errs more."""
        other = copy.copy(self)
        other.exponentials = True
        return other

    def weight(self, name: str) -> Tensor:
        if not self.stored:
            return super().weight(name)
        return stored_or_typed(self.weights[name][:].to(self.device), self.dtype)

    def prefill_logits(self, rows: Rows) -> list[Tensor]:
        several = []
        for seed in range(self.orders):
            with Order(seed, self.exponentials):
                several.append(super().prefill_logits(rows))
        return [torch.stack(of_row) for of_row in zip(*several)]

    def tail_logits(self, tokens: Sequence[int], count: int) -> Tensor:
        several = []
        for seed in range(self.orders):
            with Order(seed, exponentials=True):
                several.append(super().tail_logits(tokens, count))
        return torch.stack(several)

    def turned_queries(self, tokens: Sequence[int], cos_sin_Td2: Tensor) -> Tensor:
        several = []
        for seed in range(self.orders):
            with Order(seed):
                several.append(super().turned_queries(tokens, cos_sin_Td2))
        return torch.stack(several)

    def stages_of_block(self, layer: int, seen: Sequence[Trace]) -> list[Trace]:
        several = []
        for seed in range(self.orders):
            with Order(seed):
                several.append(super().stages_of_block(layer, [_of_order(trace, seed) for trace in seen]))
        return [_stacked(of_row) for of_row in zip(*several)]

    def stages_of_ends(self, rows: Rows, seen: Sequence[Trace]) -> list[Trace]:
        several = []
        for seed in range(self.orders):
            with Order(seed):
                several.append(super().stages_of_ends(rows, [_of_order(trace, seed) for trace in seen]))
        return [_stacked(of_row) for of_row in zip(*several)]


def _of_order(trace: Trace, order: int) -> Trace:
    """What the subject showed, and where it did not, what this order gave itself."""
    return {name: value[order] if value.dim() == 3 else value for name, value in trace.items()}


def _stacked(traces: Sequence[Trace]) -> Trace:
    return {name: torch.stack([trace[name] for trace in traces]) for name in traces[0]}


def greedy_by_recomputation(subject: Subject, prompts: Rows, n: int) -> list[tuple[list[int], Tensor]]:
    """Greedy decoding by whole sequences: for subjects without a cache of their own."""
    rows = [list(prompt) for prompt in prompts]
    for _ in range(n):
        for row, logits_TV in zip(rows, subject.prefill_logits(rows), strict=True):
            row.append(int((logits_TV[-1] == logits_TV[-1].max()).int().argmax()))
    logits = subject.prefill_logits([row[:-1] for row in rows])
    return [
        (row[len(prompt) :], logits_TV[len(prompt) - 1 :])
        for row, prompt, logits_TV in zip(rows, prompts, logits, strict=True)
    ]


def stage_widths(config: LlamaConfig) -> dict[str, int]:
    """How many features every stage of the reference has, under its name; the logits are no stage here."""
    heads, kv_heads = config.n_heads * config.head_dim, config.n_kv_heads * config.head_dim
    others = {"q": heads, "q_rope": heads, "attention": heads, "ffn_hidden": config.ffn_dim}
    others |= dict.fromkeys(("k", "v", "k_rope"), kv_heads)
    of_block = dict.fromkeys(("attention_norm", "attention_out", "ffn_norm", "ffn_out"), config.dim) | others
    widths = {"embedding": config.dim, "norm": config.dim}
    for layer in range(config.n_layers):
        widths |= {f"layers.{layer}": config.dim}
        widths |= {f"layers.{layer}.{stage}": width for stage, width in of_block.items()}
    return widths


def angles(config: LlamaConfig, length: int) -> Tensor:
    """The rotary angles of the specification, float64 [length, d/2]."""
    return torch.outer(torch.arange(length, dtype=torch.float64), inverse_frequencies(config))


def radius(config: LlamaConfig) -> float:
    """The length of the specification's rotated unit vectors: 1 but for YaRN."""
    return amplitude(config)
