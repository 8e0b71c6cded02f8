"""The face of the library: text in, text out.

from llama_fast import Llama
llama = Llama.from_pretrained("smollm2-135m")
print(llama.generate("Hello, my name is", max_new_tokens=20).text)
"""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, overload

import torch
from torch import Tensor

from llama_fast.build import build, default_dtype, where
from llama_fast.contracts import KVCache
from llama_fast.engine.generate import check, check_ids, pad, stream
from llama_fast.engine.logprobs import Logprobs, TokenLogprob
from llama_fast.engine.prompts import conversation_of, prompt_of, prompts_of
from llama_fast.engine.runner import Runner
from llama_fast.engine.sampling import Sampling
from llama_fast.engine.speculation import Speculation, Statistics
from llama_fast.engine.text import TextStream, stop_strings
from llama_fast.plan import Plan
from llama_fast.recipes import chosen_encoding, optimised, plan_named
from llama_ref.arguments import floating, made, named, row_of_ids, rows_of_ids, shown, whole
from llama_ref.models import DEFAULT_MODEL, resolve
from llama_ref.tokenizers.chat import chat_text, may_go_on
from llama_ref.tokenizers.chat_templates import template_named
from llama_ref.tokenizers.contract import Tokenizer

Message = Mapping[str, Any]
Prompt = str | Sequence[int] | Sequence[Message] | Tensor
"""Text, token ids, or a conversation [{"role": "user", "content": "Hi"}, ...], whose reply is wanted. See `prompts`.

A conversation that ends with words of the assistant is continued in them.
"""


@dataclass(frozen=True)
class Output:
    """One prompt's continuation: the text that follows the prompt, leading space and all.

    `finish_reason`: "stop" (an EOS id, or a stop string, which `text` leaves out) or "length". The two times belong to
    the whole call: a batch shares them.
    """

    text: str
    tokens: list[int]
    finish_reason: str
    prompt_tokens: int
    first_token_seconds: float
    total_seconds: float
    speculation: Statistics | None = None
    logprobs: list[TokenLogprob] | None = None

    @property
    def ids(self) -> list[int]:
        """The new tokens' ids."""
        return self.tokens

    @property
    def generated_tokens(self) -> int:
        return len(self.tokens)

    @property
    def decode_tokens_per_second(self) -> float:
        """This row's tokens after the first, per second after the first token came; 0 where there is none."""
        seconds = self.total_seconds - self.first_token_seconds
        return (len(self.tokens) - 1) / seconds if len(self.tokens) > 1 and seconds > 0 else 0.0


@dataclass(frozen=True)
class Score:
    """A text's tokens after the first: natural log-probabilities, and whether each was the likeliest at its place."""

    logprobs: list[float]
    greedy: list[bool]


@dataclass
class Row:
    """One prompt's continuation while it grows."""

    writer: TextStream
    tokens: list[int] = field(default_factory=list)
    pieces: list[str] = field(default_factory=list)
    ended: bool = False

    def take(self, token: int, eos_ids: Sequence[int]) -> str:
        """Add a token; the text it completes."""
        self.tokens.append(token)
        self.pieces.append(self.writer.push(token))
        self.ended = self.writer.stopped or token in eos_ids
        return self.pieces[-1]

    def said(self, steps: Iterable[Sequence[int | None]], eos_ids: Sequence[int]) -> Iterator[str]:
        """The pieces of a row that is alone in its batch, as they come."""
        for (token,) in steps:
            if token is not None and (piece := self.take(token, eos_ids)):
                yield piece
            if self.ended:
                break
        if rest := self.finish():
            yield rest

    def finish(self) -> str:
        """The text that was held back."""
        self.pieces.append(self.writer.finish())
        self.ended = self.ended or self.writer.stopped
        return self.pieces[-1]


class Llama:
    """A model, its tokenizer and a cache that is kept between calls."""

    def __init__(self, runner: Runner, tokenizer: Tokenizer, chat_template: str | None = None):
        """`chat_template`: the name of the one that makes text of conversations; None is the default one."""
        self.runner = made("runner", runner, "a Runner, as build() makes one", "start", "step", "allocate")
        self.tokenizer = made("tokenizer", tokenizer, "a Tokenizer, as load_tokenizer() gives", "encode", "decode")
        self.chat_template = chat_template
        if chat_template is not None:
            template_named(tokenizer, chat_template)  # a wrong name is said at once
        self._cache: dict[int, KVCache] = {}

    @classmethod
    def from_pretrained(
        cls,
        model: str | Path = DEFAULT_MODEL,
        plan: Plan | str | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | str | None = None,
        chat_template: str | None = None,
    ) -> Llama:
        """Open a model (directory, GGUF file, hub id, "smollm2-135m", "random:NAME[:SEED]") and build it.

        The default plan keeps the checkpoint's encoding, with the static cache and joined projections, not compiled;
        plan="int8" is that plan in int8. dtype="auto" is the device's default, as None is. `chat_template` is the name of
        one of the checkpoint's. Raises ValueError for what cannot be opened or built.
        """
        device = where(device)
        dtype = default_dtype(device) if dtype is None or dtype == "auto" else floating("dtype", dtype)
        plan = plan_named(plan) if isinstance(plan, str) else plan
        if not isinstance(plan, (Plan, type(None))):
            raise TypeError(f"plan={shown(plan)} must be a Plan, as Plan(encoding=Int8()), or a preset's name, as int8")
        found = resolve(named("model", model))
        checkpoint = found.open(device, dtype)
        plan = plan or optimised(chosen_encoding(None, checkpoint))
        return cls(build(checkpoint, plan, device, dtype), found.tokenizer(), chat_template)

    @overload
    def generate(self, prompts: str, max_new_tokens: int = ..., **options: Any) -> Output: ...

    @overload
    def generate(self, prompts: Sequence[Any], max_new_tokens: int = ..., **options: Any) -> Any: ...

    def generate(  # type: ignore[misc]  # the overloads leave the options to this signature
        self,
        prompts: Prompt | Sequence[Prompt],
        max_new_tokens: int = 200,
        *,
        temperature: float = 0.0,
        top_k: int | None = None,
        top_p: float = 1.0,
        min_p: float = 0.0,
        repetition_penalty: float = 1.0,
        seed: int | Sequence[int] = 0,
        stop: str | Iterable[str] | None = (),
        logprobs: int | None = None,
        on_text: Callable[[int, str], None] | None = None,
        draft: Speculation | None = None,
    ) -> Output | list[Output]:
        """Continue one prompt, or several as a batch in which each row answers as it would alone.

        A prompt is text, token ids, or a conversation, which its checkpoint's template makes text. Temperature 0 is
        greedy. Row b draws with seed + b, or with the b-th of several seeds. A row ends at an EOS id of the checkpoint,
        before one of the `stop` strings, or after `max_new_tokens`. `logprobs`: tell each token's log-probability under
        the model, and those of as many of the likeliest. `on_text(row, piece)` is told the text as it comes. `draft`
        proposes tokens that are checked several at a time: `Draft(runner)`, `Ngram()`; it excludes a repetition penalty
        and logprobs. Raises ValueError for what cannot be served.
        """
        found, one = prompts_of("prompts", prompts)
        ids = [self._ids(prompt) for prompt in found]
        rows = [Row(self.writer(prompt, stop)) for prompt in ids]
        told = None if logprobs is None else Logprobs(len(ids), whole("logprobs", logprobs))
        if on_text is not None and not callable(on_text):
            raise TypeError(f"on_text={shown(on_text)} must be called with a row and its text: a function")
        eos_ids = self.runner.config.eos_ids
        began, first = time.perf_counter(), 0.0
        sampling = Sampling(temperature, top_k, top_p, seed, min_p, repetition_penalty)
        steps, counted = self._steps(ids, max_new_tokens, sampling, eos_ids, draft, told)
        with closing(steps):
            for step in steps:
                first = first or time.perf_counter() - began
                for b, (row, token) in enumerate(zip(rows, step, strict=True)):
                    if token is None or row.ended:
                        continue
                    piece = row.take(token, eos_ids)
                    if piece and on_text is not None:
                        on_text(b, piece)
                if all(row.ended for row in rows):
                    break
        total = time.perf_counter() - began
        outputs = []
        for b, row in enumerate(rows):
            rest = row.finish()
            if rest and on_text is not None:
                on_text(b, rest)
            reason, text = "stop" if row.ended else "length", "".join(row.pieces)
            of_row = None if told is None else told.rows[b][: len(row.tokens)]
            outputs.append(Output(text, row.tokens, reason, len(ids[b]), first, total, counted, of_row))
        return outputs[0] if one else outputs

    def stream(
        self,
        prompt: Prompt,
        max_new_tokens: int = 200,
        *,
        temperature: float = 0.0,
        top_k: int | None = None,
        top_p: float = 1.0,
        min_p: float = 0.0,
        repetition_penalty: float = 1.0,
        seed: int = 0,
        stop: str | Iterable[str] | None = (),
        draft: Speculation | None = None,
    ) -> Generator[str, None, None]:
        """The continuation's text in pieces as they come; joined, they are the text that `generate` returns.

        No piece splits a character, and none shows a part of a stop string. What cannot be served is refused here, and
        not when the first piece is asked for.
        """
        ids = [self.encode(prompt)]
        row = Row(self.writer(ids[0], stop))
        sampling = Sampling(temperature, top_k, top_p, seed, min_p, repetition_penalty)
        self._check(ids, max_new_tokens, sampling, draft)
        return self._pieces(ids, row, max_new_tokens, sampling, draft)

    def _pieces(
        self, ids: list[list[int]], row: Row, max_new_tokens: int, sampling: Sampling, draft: Speculation | None
    ) -> Generator[str, None, None]:
        eos_ids = self.runner.config.eos_ids
        with closing(self._steps(ids, max_new_tokens, sampling, eos_ids, draft)[0]) as steps:
            yield from row.said(steps, eos_ids)

    def encode(self, prompt: Prompt) -> list[int]:
        """A prompt's ids: text by the tokenizer, a conversation by its template, ids as they are."""
        return self._ids(prompt_of("prompt", prompt))

    def _ids(self, prompt: str | list[int] | list[Message]) -> list[int]:
        if isinstance(prompt, str):
            return self.tokenizer.encode(prompt)
        if prompt and isinstance(prompt[0], Mapping):
            return self.tokenizer.encode(self.chat_text(prompt), bos=False)  # type: ignore[arg-type]  # messages, all of them
        check_ids(prompt, self.runner.config.vocab_size)  # type: ignore[arg-type]  # or ids, all of them
        return prompt  # type: ignore[return-value]

    def chat_text(self, messages: Sequence[Message]) -> str:
        """A conversation as text, up to where a reply starts; last words of the assistant are left open."""
        messages = conversation_of("messages", messages)
        goes_on = may_go_on(messages)
        return chat_text(self.tokenizer, messages, not goes_on, goes_on, self.chat_template)

    def writer(self, ids: Sequence[int], stop: str | Iterable[str] | None = ()) -> TextStream:
        """What makes text of the tokens that follow `ids`; an EOS id has none, whatever the tokenizer's files call it."""
        spelled = partial(self.tokenizer.decode, skip_special_tokens=False)
        return TextStream(self._shown, stop_strings(stop), ids, spelled)

    def decode(self, ids: Sequence[int]) -> str:
        """The text of some ids, without special tokens and EOS ids."""
        ids = row_of_ids("ids", ids)
        check_ids(ids, self.runner.config.vocab_size)
        return self._shown(ids)

    def _shown(self, ids: Sequence[int]) -> str:
        ends = {*self.runner.config.eos_ids, *self.tokenizer.eos_ids}
        return self.tokenizer.decode([token for token in ids if token not in ends])

    def score(self, texts: Prompt | Sequence[Prompt]) -> list[list[float]]:
        """The log-probability of every token after the first, for each text (or ids, or conversation)."""
        return [row.logprobs for row in self.score_ids([self._ids(one) for one in prompts_of("texts", texts)[0]])]

    @torch.no_grad()
    def score_ids(self, rows: Sequence[Sequence[int]]) -> list[Score]:
        """Every token after the first of each row: its log-probability, and whether it is the likeliest.

        A row may be one token longer than the context.
        """
        rows = rows_of_ids("rows", rows)
        read = [row[:-1] or row for row in rows]  # what would follow the last token is not asked
        check(self.runner, read, 0, scoring=True)
        check_ids([row[-1] for row in rows], self.runner.config.vocab_size)
        logits_BTV = self.runner.score(pad(read, self.runner.device)[0])
        scores = []
        for row, logits_TV in zip(rows, logits_BTV, strict=True):
            wanted_T1 = torch.tensor(row[1:], dtype=torch.int64, device=logits_BTV.device)[:, None]
            logits_TV = logits_TV[: len(row) - 1].float()
            logprobs_T = logits_TV.log_softmax(-1).gather(-1, wanted_T1)[:, 0]
            greedy_T = logits_TV.argmax(-1) == wanted_T1[:, 0]
            scores.append(Score(logprobs_T.tolist(), greedy_T.tolist()))
        return scores

    def _steps(
        self,
        ids: list[list[int]],
        max_new_tokens: int,
        sampling: Sampling,
        eos_ids: Sequence[int],
        draft: Speculation | None,
        logprobs: Logprobs | None = None,
    ) -> tuple[Generator[list[int | None], None, None], Statistics | None]:
        """The steps, and the counts that they fill in if there is a draft."""
        needed = self._check(ids, max_new_tokens, sampling, draft)
        if draft is None:
            cache = self._lend_cache(len(ids), needed)
            steps = stream(self.runner, ids, max_new_tokens, sampling, eos_ids, cache, logprobs)
            return self._returning(cache, len(ids), steps), None
        if logprobs is not None:
            raise ValueError("logprobs are not told with a draft: score() the text afterwards")
        cache = self._lend_cache(len(ids), min(needed + draft.slack, self.runner.config.max_context))
        try:
            session = draft.begin(self.runner, ids, max_new_tokens, sampling, eos_ids, cache)
        except ValueError:
            self._return_cache(cache, len(ids))
            raise
        return self._returning(cache, len(ids), session.steps()), session.statistics

    def _check(self, ids: list[list[int]], max_new_tokens: int, sampling: Sampling, draft: Speculation | None) -> int:
        """The positions that a request needs, before anything is lent for it."""
        sampling.seeds(len(ids))
        if draft is not None:
            made("draft", draft, "who proposes tokens, as Draft(runner) or Ngram()", "begin", "slack")
        return check(self.runner, ids, max_new_tokens)

    def cache_length(self, batch: int) -> int | None:
        """Slots of the cache kept for this batch size; None if there is none, or a generation is using it."""
        return self._cache[batch].length if batch in self._cache else None

    def _lend_cache(self, batch: int, length: int) -> KVCache | None:
        """The batch size's last cache if it is long enough: the same addresses and shapes, so compiled code stays.

        It is nobody else's until it is returned: generations may be interleaved, and each then has its own.
        """
        if not self.runner.plan.cache.fixed_addresses:
            return None
        kept = self._cache.pop(batch, None)
        return kept if kept is not None and kept.length >= length else self.runner.allocate(batch, length)

    def _return_cache(self, cache: KVCache | None, batch: int) -> None:
        if cache is not None and cache.length > (self.cache_length(batch) or 0):
            self._cache[batch] = cache

    def _returning(
        self, cache: KVCache | None, batch: int, steps: Iterator[list[int | None]]
    ) -> Generator[list[int | None], None, None]:
        try:
            yield from steps
        finally:
            self._return_cache(cache, batch)
