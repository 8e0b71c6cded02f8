"""The two Llamas, a `transformers` model and any callable, as Subjects. The only file here that imports the Llamas.

Shapes: B rows, T tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor

from llama_fast.build import Runner
from llama_fast.generate import generate
from llama_ref.checkpoint import TensorSource
from llama_ref.config import LlamaConfig
from llama_ref.model import PARTS, amplitude, attend, inverse_frequencies, island, project, rms_norm, rotate, rotations
from llama_ref.model import Llama as Reference
from oracle.localise import Trace
from oracle.subject import Subject

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
        self.name = name
        self.config = config
        self.vocab_size = config.vocab_size
        self.dtype = dtype
        self.device = torch.device(device)
        self._weights = weights
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
        name = f"layers.{layer}"
        weights = {part: self.weight(f"{name}.{part}.weight") for part in PARTS}  # typed once for all rows
        biases = {part: self.weight(f"{name}.{part}.bias") for part in PARTS if f"{name}.{part}.bias" in self._weights}
        return [self._stages_of_row(layer, row, weights, biases) for row in seen]

    def _stages_of_row(self, layer: int, seen: Trace, w: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> Trace:
        c, name = self.config, f"layers.{layer}"
        out: Trace = {}

        def give(stage: str, value: Tensor) -> Tensor:
            out[f"{name}.{stage}"] = value
            shown = seen.get(f"{name}.{stage}")
            return value if shown is None else self._typed(shown).view(value.shape)

        x_1TD = self._typed(seen[f"layers.{layer - 1}" if layer else "embedding"])[None]
        T = x_1TD.shape[1]
        n_1TD = give("attention_norm", rms_norm(x_1TD, w["attention_norm"], c.norm_eps))
        q = give("q", project(n_1TD, w, b, "attention.wq").view(1, T, c.n_heads, c.head_dim))
        k = give("k", project(n_1TD, w, b, "attention.wk").view(1, T, c.n_kv_heads, c.head_dim))
        v = give("v", project(n_1TD, w, b, "attention.wv").view(1, T, c.n_kv_heads, c.head_dim))
        turns_Td = rotations(c, T, island(self.dtype), x_1TD.device)
        q, k = give("q_rope", rotate(q, turns_Td)), give("k_rope", rotate(k, turns_Td))
        a = give("attention", attend(q, k, v, c.window))
        x_1TD = x_1TD + give("attention_out", project(a.reshape(1, T, -1), w, b, "attention.wo"))
        n_1TD = give("ffn_norm", rms_norm(x_1TD, w["ffn_norm"], c.norm_eps))
        gate, up = project(n_1TD, w, b, "feed_forward.w1"), project(n_1TD, w, b, "feed_forward.w3")
        hidden = give("ffn_hidden", gate * torch.sigmoid(gate) * up)
        x_1TD = x_1TD + give("ffn_out", project(hidden, w, b, "feed_forward.w2"))
        out[name] = x_1TD
        return {stage: value[0].flatten(1) for stage, value in out.items()}

    @torch.no_grad()
    def stages_of_ends(self, tokens: Sequence[int], seen: Trace) -> Trace:
        """The embedding, the final norm and the logits of one row, each from what the subject showed of its input."""
        table = self.weight("tok_embeddings.weight")
        out: Trace = {"embedding": table[torch.tensor(list(tokens), device=self.device)]}
        last = seen.get(f"layers.{self.config.n_layers - 1}")
        if last is not None:
            out["norm"] = rms_norm(self._typed(last), self.weight("norm.weight"), self.config.norm_eps)
            head = table if self.config.tie_embeddings else self.weight("output.weight")
            out["logits"] = self._typed(seen.get("norm", out["norm"])) @ head.T
        return out

    def weight(self, name: str) -> Tensor:
        return self._typed(self._weights[name][:])

    def _typed(self, value: Tensor) -> Tensor:
        return value.to(device=self.device, dtype=self.dtype)


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


class FastSubject:
    """A `llama_fast` runner: prefill by `score`, decode and greedy through the runner's own phases and loop.

    `batch` and `cache_length` fix the two shapes that compiled code depends on; None takes what the rows need.
    Fewer rows than `batch` are filled up with copies of the last.
    """

    def __init__(self, runner: Runner, batch: int | None = None, cache_length: int | None = None):
        self.name = str(runner.plan)
        self.vocab_size = runner.config.vocab_size
        self.dtype = runner.dtype
        self.runner = runner
        self.batch = batch
        self.cache_length = cache_length

    def _groups(self, rows: Rows) -> Iterator[tuple[list[Sequence[int]], int]]:
        size = self.batch or len(rows)
        for begin in range(0, len(rows), size):
            group = list(rows[begin : begin + size])
            yield group + [group[-1]] * (size - len(group)), len(group)

    def _cache(self, batch: int, needed: int) -> Any:
        return self.runner.allocate(batch, self.cache_length or needed)

    def prefill_logits(self, rows: Rows) -> list[Tensor]:
        found: list[Tensor] = []
        for group, real in self._groups(rows):
            logits_BTV = self.runner.score(padded(group, self.runner.device, self.vocab_size, 2))
            found += [logits_TV[: len(row)].clone() for logits_TV, row in zip(logits_BTV[:real], group)]
        return found

    @torch.no_grad()  # as the runner itself: in inference mode compiled code would be compiled again
    def decode_logits(self, rows: Rows, splits: Sequence[int]) -> list[Tensor]:
        found: list[Tensor] = []
        for begin, (group, real) in zip(range(0, len(rows), self.batch or len(rows)), self._groups(rows)):
            cuts = list(splits[begin : begin + real])
            cuts += [cuts[-1]] * (len(group) - real)
            found += self._decode_group(group, cuts)[:real]
        return found

    def _decode_group(self, rows: Rows, splits: Sequence[int]) -> list[Tensor]:
        device, steps = self.runner.device, max(len(row) - split for row, split in zip(rows, splits, strict=True))
        prompts_BT = padded([row[:split] for row, split in zip(rows, splits)], device, self.vocab_size, 2)
        cache = self._cache(len(rows), max(prompts_BT.shape[1], *(len(row) for row in rows)))
        seen_sBV = [self.runner.prefill(prompts_BT, torch.tensor(splits, device=device), cache).clone()]
        for step in range(steps):
            # a row that has ended writes its last token again: overwriting a position with itself changes nothing
            at = [min(split + step, len(row) - 1) for row, split in zip(rows, splits)]
            token_B1 = torch.tensor([[row[i]] for row, i in zip(rows, at)], device=device)
            seen_sBV.append(self.runner.decode(token_B1, torch.tensor(at, device=device), cache)[:, -1].clone())
        together_BsV = torch.stack(seen_sBV, 1)
        return [
            logits_sV[: len(row) - split + 1] for logits_sV, row, split in zip(together_BsV, rows, splits, strict=True)
        ]

    def greedy(self, prompts: Rows, n: int) -> list[tuple[list[int], Tensor]]:
        found: list[tuple[list[int], Tensor]] = []
        for group, real in self._groups(prompts):
            recorder = Recorder(self.runner)
            cache = self._cache(len(group), max(2, *(len(row) for row in group)) + n)
            done = generate(cast(Runner, recorder), group, n, cache=cache)
            logits_BnV = torch.stack(recorder.logits, 1)
            found += [
                (completion.tokens, logits_nV[: len(completion.tokens)])
                for completion, logits_nV in list(zip(done.completions, logits_BnV, strict=True))[:real]
            ]
        return found

    @torch.no_grad()
    def trace(self, rows: Rows, splits: Sequence[int]) -> list[Trace]:
        """What every stage showed at every position of each row: the prompt in one prefill, the rest token by token.

        Runs the model as written, not compiled, with the plan's own cache.
        """
        device, steps = self.runner.device, max(len(row) - split for row, split in zip(rows, splits, strict=True))
        seen: list[dict[str, list[Tensor]]] = [{} for _ in rows]

        def keep(counts: Sequence[int]) -> Callable[[str, Tensor], None]:
            def observe(stage: str, value_BT: Tensor) -> None:
                for row, count in enumerate(counts):
                    if count:
                        seen[row].setdefault(stage, []).append(value_BT[row, :count].flatten(1).clone())

            return observe

        prompts_BT = padded([row[:split] for row, split in zip(rows, splits)], device, self.vocab_size, 2)
        cache = self._cache(len(rows), max(prompts_BT.shape[1], *(len(row) for row in rows)))
        model = self.runner.model
        cache.reserve(torch.zeros(len(rows), dtype=torch.int64, device=device), prompts_BT.shape[1])
        model(prompts_BT, None, cache, observe=keep(splits))
        for step in range(steps):
            at = [min(split + step, len(row) - 1) for row, split in zip(rows, splits)]
            fresh = [int(split + step < len(row)) for row, split in zip(rows, splits)]
            at_B = torch.tensor(at, device=device)
            cache.reserve(at_B, 1)
            token_B1 = torch.tensor([[row[i]] for row, i in zip(rows, at)], device=device)
            model(token_B1, at_B, cache, observe=keep(fresh))
        return [{stage: torch.cat(values) for stage, values in row.items()} for row in seen]


class Recorder:
    """A runner that also keeps the logits of every step. They are cloned: a CUDA graph overwrites its outputs."""

    def __init__(self, runner: Runner):
        self._runner = runner
        self.logits: list[Tensor] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._runner, name)

    def start(self, *arguments: Any) -> tuple[Tensor, Tensor]:
        token_B, logits_BV = self._runner.start(*arguments)
        self.logits.append(logits_BV.clone())
        return token_B, logits_BV

    def step(self, *arguments: Any) -> tuple[Tensor, Tensor]:
        token_B, logits_BTV = self._runner.step(*arguments)
        self.logits.append(logits_BTV[:, -1].clone())
        return token_B, logits_BTV


class HFSubject:
    """A `transformers` causal language model, row by row, with its own cache and its own `generate`."""

    def __init__(self, model: Any, name: str = "transformers"):
        self.name = name
        self.model = model
        self.vocab_size: int = model.config.vocab_size
        self.dtype: torch.dtype = model.dtype
        self.device: torch.device = model.device

    def _row(self, tokens: Sequence[int]) -> Tensor:
        return torch.tensor([list(tokens)], device=self.device)

    @torch.no_grad()
    def prefill_logits(self, rows: Rows) -> list[Tensor]:
        return [self.model(self._row(row)).logits[0] for row in rows]

    @torch.no_grad()
    def decode_logits(self, rows: Rows, splits: Sequence[int]) -> list[Tensor]:
        found = []
        for row, split in zip(rows, splits, strict=True):
            step = self.model(self._row(row[:split]), use_cache=True)
            seen = [step.logits[0, -1]]
            for token in row[split:]:
                step = self.model(self._row([token]), past_key_values=step.past_key_values, use_cache=True)
                seen.append(step.logits[0, -1])
            found.append(torch.stack(seen))
        return found

    @torch.no_grad()
    def greedy(self, prompts: Rows, n: int) -> list[tuple[list[int], Tensor]]:
        found = []
        for prompt in prompts:
            done = self.model.generate(
                self._row(prompt),
                attention_mask=torch.ones(1, len(prompt), dtype=torch.int64, device=self.device),
                max_new_tokens=n,
                min_new_tokens=None,
                do_sample=False,
                eos_token_id=None,
                pad_token_id=0,
                return_dict_in_generate=True,
                output_logits=True,
            )
            found.append((done.sequences[0, len(prompt) :].tolist(), torch.cat(done.logits)))
        return found

    @torch.no_grad()
    def trace(self, rows: Rows, splits: Sequence[int]) -> list[Trace]:
        """Embedding, whole blocks but the last (which it shows after the final norm only), and logits, by prefill."""
        traces: list[Trace] = []
        for row in rows:
            out = self.model(self._row(row), output_hidden_states=True)
            *states, norm = (state[0] for state in out.hidden_states)
            traces.append(
                {"embedding": states[0], "norm": norm, "logits": out.logits[0]}
                | {f"layers.{i}": state for i, state in enumerate(states[1:])}
            )
        return traces


@dataclass
class CallableSubject:
    """Any function tokens [B, T] -> logits [B, T, V]; without a cache, so that decoding means recomputing."""

    function: Callable[[Tensor], Tensor]
    vocab_size: int
    dtype: torch.dtype
    name: str = "callable"
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    @torch.no_grad()
    def prefill_logits(self, rows: Rows) -> list[Tensor]:
        logits_BTV = self.function(padded(rows, self.device, self.vocab_size))
        return [logits_TV[: len(row)] for logits_TV, row in zip(logits_BTV, rows, strict=True)]

    def decode_logits(self, rows: Rows, splits: Sequence[int]) -> list[Tensor]:
        return [logits_TV[split - 1 :] for logits_TV, split in zip(self.prefill_logits(rows), splits, strict=True)]

    def greedy(self, prompts: Rows, n: int) -> list[tuple[list[int], Tensor]]:
        return greedy_by_recomputation(self, prompts, n)


def angles(config: LlamaConfig, length: int) -> Tensor:
    """The rotary angles of the specification, float64 [length, d/2]."""
    return torch.outer(torch.arange(length, dtype=torch.float64), inverse_frequencies(config))


def radius(config: LlamaConfig) -> float:
    """The length of the specification's rotated unit vectors: 1 but for YaRN."""
    return amplitude(config)
