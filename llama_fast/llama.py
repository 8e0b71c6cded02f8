"""The face of the library: text in, text out.

from llama_fast import Llama
llama = Llama.from_pretrained("smollm2-135m")
print(llama.generate("Hello, my name is", max_new_tokens=20).text)
"""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any, overload

import torch
from torch import Tensor

from llama_fast.build import build
from llama_fast.devices import default_dtype, where
from llama_fast.engine.caches import Caches
from llama_fast.engine.engine import Engine
from llama_fast.engine.generate import together
from llama_fast.engine.guides import Constraint
from llama_fast.engine.logprobs import TokenLogprob
from llama_fast.engine.prompts import conversation_of, prompt_of, prompts_of
from llama_fast.engine.request import Event, Request, check_ids, check_request, requests_of
from llama_fast.engine.runner import Runner
from llama_fast.engine.sampling import Sampling
from llama_fast.engine.speculation import Speculation, Statistics
from llama_fast.engine.text import TextStream, stop_strings
from llama_fast.engine.transfer import pad
from llama_fast.grammars.asked import Grammar
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


class Llama:
    """A model, its tokenizer and a cache that is kept between calls."""

    def __init__(self, runner: Runner, tokenizer: Tokenizer, chat_template: str | None = None):
        """`chat_template`: the name of the one that makes text of conversations; None is the default one."""
        self.runner = made("runner", runner, "a Runner, as build() makes one", "start", "step", "allocate")
        self.tokenizer = made("tokenizer", tokenizer, "a Tokenizer, as load_tokenizer() gives", "encode", "decode")
        self.chat_template = chat_template
        if chat_template is not None:
            template_named(tokenizer, chat_template)  # a wrong name is said at once
        self.caches = Caches(runner)

    @classmethod
    def from_pretrained(
        cls,
        model: str | Path = DEFAULT_MODEL,
        plan: Plan | str | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | str | None = None,
        chat_template: str | None = None,
        adapter: str | Path | None = None,
    ) -> Llama:
        """Open a model (directory, GGUF file, hub id, "smollm2-135m", "random:NAME[:SEED]") and build it.

        The default plan keeps the checkpoint's encoding, with the static cache and joined projections, not compiled;
        plan="int8" is that plan in int8. dtype="auto" is the device's default, as None is. `chat_template` is the name of
        one of the checkpoint's. `adapter` is a LoRA directory of PEFT. Raises ValueError for what cannot be opened or built.
        """
        device = where(device)
        dtype = default_dtype(device) if dtype is None or dtype == "auto" else floating("dtype", dtype)
        plan = plan_named(plan) if isinstance(plan, str) else plan
        if not isinstance(plan, (Plan, type(None))):
            raise TypeError(f"plan={shown(plan)} must be a Plan, as Plan(encoding=Int8()), or a preset's name, as int8")
        found = resolve(named("model", model))
        checkpoint = found.open(device, dtype, adapter)
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
        frequency_penalty: float = 0.0,
        presence_penalty: float = 0.0,
        logit_bias: Mapping[int, float] | None = None,
        grammar: Grammar | Constraint | None = None,
        seed: int | Sequence[int] = 0,
        stop: str | Iterable[str] | None = (),
        logprobs: int | None = None,
        on_text: Callable[[int, str], None] | None = None,
        draft: Speculation | None = None,
    ) -> Output | list[Output]:
        """Continue one prompt, or several as a batch in which each row answers as it would alone.

        A prompt is text, token ids, or a conversation, which its checkpoint's template makes text. Temperature 0 is
        greedy. Row b draws with seed + b, or with the b-th of several seeds. A row ends at an EOS id of the checkpoint,
        before one of the `stop` strings, or after `max_new_tokens`. `grammar` is what the text must be, as
        `JsonSchema({...})`, `Regex("...")` of `llama_fast.grammars`: a row that ends with "stop" is one of its texts.
        `logprobs`: tell each token's log-probability under the model, and those of as many of the likeliest.
        `on_text(row, piece)` is told the text as it comes. `draft` proposes tokens that are checked several at a time:
        `Draft(runner)`, `Ngram()`; it excludes penalties, a bias, a grammar and logprobs. Raises ValueError for what
        cannot be served.
        """
        found, one = prompts_of("prompts", prompts)
        ids = [self._ids(prompt) for prompt in found]
        stop = stop_strings(stop)
        told = None if logprobs is None else whole("logprobs", logprobs)
        if on_text is not None and not callable(on_text):
            raise TypeError(f"on_text={shown(on_text)} must be called with a row and its text: a function")
        sampling = Sampling(
            temperature,
            top_k,
            top_p,
            seed,
            min_p,
            repetition_penalty,
            frequency_penalty,
            presence_penalty,
            logit_bias,
            self._constraint(grammar, stop),
        )
        requests = self._requests(ids, max_new_tokens, sampling, draft, told)
        began, first = time.perf_counter(), 0.0
        rows: list[list[Event]] = [[] for _ in ids]
        with self._answering(requests, [self.writer(row, stop) for row in ids], draft) as engine:
            while engine.busy:
                for event in engine.step():
                    event.checked()
                    first = first or time.perf_counter() - began
                    rows[event.id].append(event)
                    if event.text and on_text is not None:
                        on_text(event.id, event.text)
        total = time.perf_counter() - began
        outputs = [
            Output(
                "".join(event.text for event in row),
                [event.token for event in row],
                row[-1].finish_reason or "",
                len(request.ids),
                first,
                total,
                engine.statistics,
                None if told is None else [event.logprob for event in row if event.logprob is not None],
            )
            for row, request in zip(rows, requests, strict=True)
        ]
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
        frequency_penalty: float = 0.0,
        presence_penalty: float = 0.0,
        logit_bias: Mapping[int, float] | None = None,
        grammar: Grammar | Constraint | None = None,
        seed: int = 0,
        stop: str | Iterable[str] | None = (),
        draft: Speculation | None = None,
    ) -> Generator[str, None, None]:
        """The continuation's text in pieces as they come; joined, they are the text that `generate` returns.

        No piece splits a character, and none shows a part of a stop string. What cannot be served is refused here, and
        not when the first piece is asked for.
        """
        ids, stop = [self.encode(prompt)], stop_strings(stop)
        sampling = Sampling(
            temperature,
            top_k,
            top_p,
            seed,
            min_p,
            repetition_penalty,
            frequency_penalty,
            presence_penalty,
            logit_bias,
            self._constraint(grammar, stop),
        )
        (request,) = self._requests(ids, max_new_tokens, sampling, draft)
        return self._pieces(request, self.writer(request.ids, stop), draft)

    def _pieces(self, request: Request, writer: TextStream, draft: Speculation | None) -> Generator[str, None, None]:
        with self._answering([request], [writer], draft) as engine:
            while engine.busy:
                yield from (event.text for event in engine.step() if event.checked().text)

    def constraint(self, grammar: Grammar) -> Constraint:
        """A grammar made ready for this model's tokens, for `Sampling(grammar=...)`; raises ValueError with the reason."""
        from llama_fast.grammars.guided import Constrained

        made("grammar", grammar, "a grammar, as JsonSchema({...}) or Regex(...) of llama_fast.grammars", "written")
        try:
            return Constrained(grammar, self._tokens, self.constraint)
        except ValueError as error:
            raise ValueError(f"grammar: {error}") from None

    @cached_property
    def _tokens(self) -> Any:
        """What every grammar knows of the tokens: made when the first one comes."""
        from llama_fast.grammars.guided import Tokens

        return Tokens(self.tokenizer, self.runner.config.vocab_size, self.runner.config.eos_ids)

    def _constraint(self, grammar: Grammar | Constraint | None, stop: Sequence[str]) -> Constraint | None:
        if grammar is None:
            return None
        if stop:
            raise ValueError(f"stop={list(stop)!r:.80} would cut a text that the grammar makes whole: leave one out")
        return self.constraint(grammar) if hasattr(grammar, "written") else grammar  # type: ignore[arg-type, return-value]

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
        check_request(self.runner.config, read, 0, scoring=True)
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

    def _requests(
        self,
        ids: list[list[int]],
        max_new_tokens: int,
        sampling: Sampling,
        draft: Speculation | None,
        logprobs: int | None = None,
    ) -> list[Request]:
        """The requests of a batch, checked before a cache is taken for them."""
        sampling.seeds(len(ids))
        if draft is not None:
            made("draft", draft, "who proposes tokens, as Draft(runner) or Ngram()", "begin", "slack")
        check_request(self.runner.config, ids, max_new_tokens)
        return requests_of(ids, max_new_tokens, sampling, self.runner.config.eos_ids, logprobs)

    @contextmanager
    def _answering(
        self, requests: Sequence[Request], writers: Sequence[TextStream], draft: Speculation | None
    ) -> Iterator[Engine]:
        """An engine for requests that start together; its cache is put back when they have ended, or nobody wants them."""
        length = max(request.positions for request in requests)
        room = length if draft is None else max(length, min(length + draft.slack, self.runner.config.max_context))
        cache = self.caches.take(len(requests), room)
        try:
            with closing(together(self.runner, requests, cache, draft, writers)) as engine:
                yield engine
        finally:
            self.caches.put_back(cache)

    def cache_length(self, batch: int) -> int | None:
        """Slots of the cache kept for this batch size; None if there is none, or a generation is using it."""
        return self.caches.length(batch)
