"""A `llama_fast` runner as a Subject: every route by which it can come to the same logits.

Shapes: B rows, T tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from llama_fast.choosing import SamplingKernels
from llama_fast.engine.generate import generate
from llama_fast.engine.runner import Runner
from llama_fast.engine.sampling import BatchSampler, Sampling
from oracle.subjects.adapters import Rows, padded
from oracle.subjects.listened import Said
from oracle.subjects.subject import Route, Setting, Trace


class FastSubject:
    """A `llama_fast` runner: prefill by `score`, decode and greedy through the runner's own phases and loop.

    `batch` and `cache_length` fix the two shapes that compiled code depends on; None takes what the rows need.
    Fewer rows than `batch` are filled up with copies of the last. `used_cache`: a cache first serves other tokens, and then
    every later question of its size, so that whatever a step reads and has not written shows. `tokens_a_step`: the width of
    the route of several tokens.
    """

    def __init__(
        self,
        runner: Runner,
        batch: int | None = None,
        cache_length: int | None = None,
        used_cache: bool = False,
        tokens_a_step: int | None = None,
    ):
        self.name = str(runner.plan)
        self.vocab_size = runner.config.vocab_size
        self.dtype = runner.dtype
        self.runner = runner
        self.batch = batch
        self.cache_length = cache_length
        self.used_cache = used_cache
        self.tokens_a_step = tokens_a_step
        self._used_caches: dict[tuple[int, int], Any] = {}

    def routes(self) -> Mapping[str, tuple[Route, int]]:
        """Rows one by one; and several tokens a step, each step first fed other tokens, as after a rejected draft."""
        found: dict[str, tuple[Route, int]] = {"rows one by one": (self._alone, -1)}
        if self.tokens_a_step is not None:
            found[f"{self.tokens_a_step} tokens a step, drafts rejected"] = self.several, 0
        return found

    def _alone(self, rows: Rows, splits: Sequence[int]) -> list[Tensor]:
        return [self.decode_logits([row], [split])[0] for row, split in zip(rows, splits, strict=True)]

    @torch.no_grad()
    def several(self, rows: Rows, splits: Sequence[int]) -> list[Tensor]:
        """Steps of `tokens_a_step`; a row's last step reaches back over tokens that the cache already holds."""
        assert self.tokens_a_step is not None
        device, width = self.runner.device, min(self.tokens_a_step, *(len(row) for row in rows))
        cache, first_BV = self._prefilled(rows, splits)
        seen = [[logits_V[None]] for logits_V in first_BV]
        done = list(splits)
        while any(at < len(row) for at, row in zip(done, rows)):
            starts = [min(at, len(row) - width) for at, row in zip(done, rows)]
            start_B = torch.tensor(starts, device=device)
            tokens_BT = torch.tensor([row[at : at + width] for row, at in zip(rows, starts)], device=device)
            self.runner.decode((tokens_BT + 1 + start_B[:, None]) % self.vocab_size, start_B, cache)
            logits_BTV = self.runner.decode(tokens_BT, start_B, cache)
            for b, (row, at) in enumerate(zip(rows, starts)):
                seen[b].append(logits_BTV[b, done[b] - at :].clone())
                done[b] = max(done[b], min(at + width, len(row)))
        return [torch.cat(parts) for parts in seen]

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
        cache, first_BV = self._prefilled(rows, splits)
        seen_sBV = [first_BV]
        for step in range(steps):
            # a row that has ended writes its last token again: overwriting a position with itself changes nothing
            at = [min(split + step, len(row) - 1) for row, split in zip(rows, splits)]
            token_B1 = torch.tensor([[row[i]] for row, i in zip(rows, at)], device=device)
            seen_sBV.append(self.runner.decode(token_B1, torch.tensor(at, device=device), cache)[:, -1].clone())
        together_BsV = torch.stack(seen_sBV, 1)
        return [
            logits_sV[: len(row) - split + 1] for logits_sV, row, split in zip(together_BsV, rows, splits, strict=True)
        ]

    def _prefilled(self, rows: Rows, splits: Sequence[int]) -> tuple[Any, Tensor]:
        """A cache that holds the first tokens of each row, and the logits [B, V] at the last of these."""
        device = self.runner.device
        prompts_BT = padded([row[:split] for row, split in zip(rows, splits)], device, self.vocab_size, 2)
        longest = max(prompts_BT.shape[1], *(len(row) for row in rows))
        cache = self._lent(len(rows), longest)
        return cache, self.runner.prefill(prompts_BT, torch.tensor(splits, device=device), cache).clone()

    def _lent(self, batch: int, length: int) -> Any:
        """A cache; if that is asked for, one that has served: other texts at first, then the questions before this one, whose
        keys and values are moved to other slots, lest they be the right ones."""
        if not self.used_cache:
            return self._cache(batch, length)
        size = batch, self.cache_length or length
        if size not in self._used_caches:
            cache = self._used_caches[size] = self._cache(*size)
            other_B1 = torch.arange(1, batch + 1, device=self.runner.device)[:, None]
            tokens_BT = (torch.arange(size[1], device=self.runner.device) * 31 + 17 * other_B1) % self.vocab_size
            self.runner.prefill(tokens_BT, torch.full_like(other_B1[:, 0], size[1]), cache)
        else:
            for layer in self._used_caches[size].layers:
                for stored in layer.tensors:
                    stored.copy_(stored.roll(7 * stored.shape[-1]))  # seven slots on, or heads of slots
        return self._used_caches[size]

    def greedy(self, prompts: Rows, n: int) -> list[tuple[list[int], Tensor]]:
        return [(tokens, logits) for tokens, _, logits in self._generated(prompts, n, Sampling())]

    def sample(self, prompts: Rows, n: int, setting: Setting, seed: int) -> list[tuple[list[int], Tensor]]:
        return [(tokens, logits) for tokens, _, logits in self._generated(prompts, n, sampling_of(setting, seed))]

    def penalised(self, prompts: Rows, n: int, penalty: float) -> list[tuple[list[int], Tensor]]:
        """n greedy tokens with a repetition penalty, and the logits [n, V] before it."""
        sampling = Sampling(repetition_penalty=penalty)
        return [(tokens, logits) for tokens, _, logits in self._generated(prompts, n, sampling)]

    def until(self, prompts: Rows, n: int, eos_ids: Collection[int]) -> list[tuple[list[int], str]]:
        return [(tokens, reason) for tokens, reason, _ in self._generated(prompts, n, Sampling(), eos_ids)]

    def _generated(
        self, prompts: Rows, n: int, sampling: Sampling, eos_ids: Collection[int] = ()
    ) -> list[tuple[list[int], str, Tensor]]:
        """Tokens, the reason of their end and the logits [n, V] of each prompt, from the runner's own loop."""
        found: list[tuple[list[int], str, Tensor]] = []
        for group, real in self._groups(prompts):
            said = Said(self.runner)
            length = max(2, *(len(row) for row in group)) + n
            done = generate(said.runner, group, n, sampling, eos_ids, self._lent(len(group), length))
            for b, completion in enumerate(done.completions[:real]):
                logits_nV = said.behind(b, completion.prompt_tokens, len(completion.tokens))
                found.append((completion.tokens, completion.finish_reason, logits_nV))
        return found

    @torch.no_grad()
    def trace(self, rows: Rows, splits: Sequence[int]) -> list[Trace]:
        """What every stage showed at every position of each row: the prompt in one prefill, the rest token by token.

        Runs the model as written, not compiled, with the plan's own cache. Of one of eight bits "k_kept" and "v_kept" are what it
        holds at the end: what attention has seen.
        """
        device, steps = self.runner.device, max(len(row) - split for row, split in zip(rows, splits, strict=True))
        seen: list[dict[str, list[Tensor]]] = [{} for _ in rows]

        def keep(counts: Sequence[int]) -> Callable[[str, Tensor], None]:
            def show(stage: str, value_BT: Tensor) -> None:
                for row, count in enumerate(counts):
                    if count:
                        seen[row].setdefault(stage, []).append(value_BT[row, :count].flatten(1).clone())

            return show

        prompts_BT = padded([row[:split] for row, split in zip(rows, splits)], device, self.vocab_size, 2)
        cache = self._cache(len(rows), max(prompts_BT.shape[1], *(len(row) for row in rows)))
        cache.reserve(torch.zeros(len(rows), dtype=torch.int64, device=device), prompts_BT.shape[1])
        self._show(prompts_BT, None, cache, keep(splits))
        for step in range(steps):
            at = [min(split + step, len(row) - 1) for row, split in zip(rows, splits)]
            fresh = [int(split + step < len(row)) for row, split in zip(rows, splits)]
            at_B = torch.tensor(at, device=device)
            cache.reserve(at_B, 1)
            token_B1 = torch.tensor([[row[i]] for row, i in zip(rows, at)], device=device)
            self._show(token_B1, at_B, cache, keep(fresh))
        if getattr(self.runner.plan.cache, "bits", None):
            for number, layer in enumerate(cache.layers):
                for name, kept_BKSd in (("k_kept", layer.k), ("v_kept", layer.v)):
                    for row, tokens in enumerate(rows):
                        kept_TKd = kept_BKSd[row, :, : len(tokens)].transpose(0, 1)
                        seen[row][f"layers.{number}.{name}"] = [kept_TKd.flatten(1).clone()]
        return [{stage: torch.cat(values) for stage, values in row.items()} for row in seen]

    def _show(self, tokens_BT: Tensor, start_B: Tensor | None, cache: Any, show: Callable[[str, Tensor], None]) -> None:
        """A pass that shows its stages; of a model whose layers stand on several processes, those of this one."""

        def phase(model: Any, tokens_BT: Tensor, start_B: Any, cache: Any, choose: Any) -> tuple[Tensor, Tensor]:
            out = model(tokens_BT, start_B, cache, show=show)
            return out.new_zeros(len(out), dtype=torch.int64), out

        self.runner.through(phase, tokens_BT, start_B, cache, self.runner.greedy(len(tokens_BT)))()


def sampling_of(setting: Setting, seed: int = 0) -> Sampling:
    """The oracle's words for how tokens are drawn in the twin's."""
    return Sampling(setting.temperature, setting.top_k, setting.top_p, seed, setting.min_p)


class FastSampler:
    """The BatchSampler of `llama_fast` by itself, with the kernels that a plan gives it."""

    def __init__(self, device: torch.device, kernels: SamplingKernels | None = None):
        self.device, self.kernels = device, kernels

    def _chooser(self, setting: Setting, seeds: Sequence[int]) -> BatchSampler:
        chooser = BatchSampler(sampling_of(setting), seeds, self.device)
        chooser.kernels = self.kernels
        return chooser

    def probabilities(self, logits_BV: Tensor, setting: Setting) -> Tensor:
        return self._chooser(setting, [0] * len(logits_BV)).probabilities(logits_BV)

    def several(self, logits_BTV: Tensor, settings: Sequence[Setting]) -> Tensor:
        chooser = BatchSampler.of_free_rows(len(settings), self.device, logits_BTV.shape[-1])
        chooser.kernels = self.kernels
        chooser.set_rows(0, [sampling_of(setting) for setting in settings])
        return chooser.probabilities(logits_BTV)

    def draw(self, logits_BV: Tensor, setting: Setting, seeds: Sequence[int], positions: Sequence[int]) -> Tensor:
        return self._chooser(setting, seeds)(logits_BV, torch.tensor(list(positions), device=self.device))
