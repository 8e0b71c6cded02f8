"""A model class for EleutherAI's lm-evaluation-harness: scores and continuations in batches, through the built runner.

    llama-fast lm-eval --model llama_fast --model_args pretrained=DIR,encoding=int8 --tasks TASK --batch_size 8

Every answer is the one that the harness's own `hf` class gives in batches of one: what is cut, what ends a text, which
turn stays open. It is declared under the entry point group `lm_eval.models`. Harness versions that do not look there
(0.4.13 does not) know the name only after this module is imported, which `llama-fast lm-eval` does before it hands over
to them.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import lm_eval.models  # noqa: F401 - its own models: the harness registers them only while it knows none
import torch
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from llama_fast.build import build
from llama_fast.devices import default_dtype, where
from llama_fast.llama import Llama, Output
from llama_fast.lm_eval_settings import (
    LOG,
    check_arguments,
    checkpoint_settings,
    generation_options,
    has_empty_stop,
    with_defaults,
    without_stops,
)
from llama_fast.recipes import chosen_encoding, optimised
from llama_ref.arguments import floating
from llama_ref.models import resolve
from llama_ref.tokenizers.chat import chat_text
from llama_ref.tokenizers.chat_templates import template_named
from llama_ref.tokenizers.tokenizer_files import TokenizerError

MOST_ROWS = 64
"""Rows of a batch to begin with where the harness is told to find out (`--batch_size auto`)."""

Pair = tuple[Any, list[int], list[int]]
"""A key of the harness's for the answer, the context's ids, the continuation's."""


@dataclass(frozen=True)
class Talk:
    """How conversations become text, and where an answer begins in what a model that thinks aloud says.

    `chat_template` is the name of one of the checkpoint's; `arguments` are what it may ask for.
    """

    chat_template: str | None = None
    arguments: Mapping[str, Any] = field(default_factory=dict)
    enable_thinking: bool | None = None
    think_end_token: str | int | None = None

    def __post_init__(self) -> None:
        if self.enable_thinking and self.think_end_token is None:
            raise ValueError("enable_thinking=True needs think_end_token, behind which the answer begins")

    @property
    def variables(self) -> dict[str, Any]:
        """What a template is told."""
        thinking = {} if self.enable_thinking is None else {"enable_thinking": self.enable_thinking}
        return {**self.arguments, **thinking}

    def answer(self, tokens: list[int], decode: Callable[[list[int]], str], stop: list[str]) -> str:
        """The text that counts, of all new tokens."""
        end = self.think_end_token
        if isinstance(end, str):
            if not end.isdigit():
                return without_stops(decode(tokens), stop, end)
            end = int(end)
        if end is None:
            return without_stops(decode(tokens), stop)
        last = max((i + 1 for i, token in enumerate(tokens) if token == end), default=0)
        return without_stops(decode(tokens[last:]).lstrip(), stop)


@register_model("llama_fast")
class LlamaFast(TemplateLM):  # type: ignore[misc]  # the harness has no types
    """Any model that `Llama.from_pretrained` opens, under the plan that the arguments name."""

    backend = "causal"

    def __init__(
        self,
        pretrained: str = "smollm2-135m",
        device: str | None = None,
        dtype: torch.dtype | str | None = None,
        encoding: str | None = None,
        compile: bool = False,
        batch_size: int | str = 8,
        max_batch_size: int | None = None,
        max_length: int | None = None,
        max_gen_toks: int = 256,
        add_bos_token: bool | None = None,
        prefix_token_id: int | None = None,
        tokenizer: str | None = None,
        chat_template: str | None = None,
        chat_template_args: Mapping[str, Any] | None = None,
        enable_thinking: bool | None = None,
        think_end_token: str | int | None = None,
        peft: str | None = None,
        **others: Any,
    ):
        """The harness passes its `--model_args` by these names, which are those of its `hf` class where that has them.

        `add_bos_token` None does as the tokenizer's files say. `tokenizer`: another model's. ValueError for what cannot
        be opened or built, and for arguments of the `hf` class that would change answers and do not exist here.
        """
        super().__init__()
        check_arguments(others)
        self._talk = Talk(chat_template, chat_template_args or {}, enable_thinking, think_end_token)
        self.batch_size, self._adapts = rows_of(batch_size, max_batch_size)
        to = device_for(device)
        kind = default_dtype(to) if dtype is None or dtype == "auto" else floating("dtype", dtype)
        found = resolve(pretrained)
        checkpoint = found.open(to, kind, peft)
        plan = optimised(chosen_encoding(encoding, checkpoint), bool(compile))
        words = (found if tokenizer is None else resolve(str(tokenizer))).tokenizer()
        self.llama = Llama(build(checkpoint, plan, to, kind), words, chat_template)
        self._stated = checkpoint_settings(found.path)
        self.max_gen_toks, self.add_bos_token, self.prefix = max_gen_toks, add_bos_token, prefix_token_id
        context = self.llama.runner.config.max_context
        self.max_length = context if max_length is None else max_length
        if not 1 <= self.max_length <= context:
            raise ValueError(f"max_length={max_length} must lie in 1..{context}, the model's context")
        self._name = str(tokenizer or pretrained)

    @property
    def tokenizer_name(self) -> str:
        """Part of the harness's key for requests that it keeps: the tokenizer, and the template where one is named."""
        name = self._name.replace("/", "__")
        return name if self.llama.chat_template is None else f"{name}__{self.llama.chat_template}"

    @property
    def eot_token_id(self) -> int | None:
        """What ends a text."""
        return next(iter((*self.llama.tokenizer.eos_ids, *self.llama.runner.config.eos_ids)), None)

    @property
    def prefix_token_id(self) -> int:
        """What stands before a text without context: BOS, else EOS. ValueError where the model has neither."""
        named = (self.prefix, self.llama.tokenizer.bos_id, self.eot_token_id)
        prefix = next((token for token in named if token is not None), None)
        if prefix is None:
            raise ValueError("the model has neither BOS nor EOS to stand before a text: give prefix_token_id")
        return prefix

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **unused: Any) -> list[int]:
        if add_special_tokens is None and string.startswith(self._spelled(self.prefix_token_id)):
            add_special_tokens = False  # a template has put it there
        return self._encode(string, False if add_special_tokens is False else self.add_bos_token)

    def tok_decode(self, tokens: int | Sequence[int], skip_special_tokens: bool = True) -> str:
        ids = [tokens] if isinstance(tokens, int) else list(tokens)
        return self.llama.tokenizer.decode(ids, skip_special_tokens=skip_special_tokens)

    def loglikelihood(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """As the harness's own, after a look at what it would stumble over."""
        if self._talk.enable_thinking:
            raise ValueError(
                "enable_thinking=True is for tasks that generate: there is no thinking in a log-likelihood"
            )
        for context, continuation in (request.args for request in requests):
            if context == "" and not self.tok_encode(continuation, add_special_tokens=False):
                raise ValueError(f"a request has no tokens to score: context '', continuation {continuation!r:.80}")
        answers: list[tuple[float, bool]] = super().loglikelihood(requests, disable_tqdm=disable_tqdm)
        return answers

    def _loglikelihood_tokens(self, requests: Sequence[Pair], **unused: Any) -> list[tuple[float, bool]]:
        """(sum of the continuation's log-probabilities, whether greedy decoding would give it), in the order asked."""
        for request in requests:
            self._check_pair(request)
        answers: list[tuple[float, bool]] = [(0.0, True)] * len(requests)
        # what the last token predicts is not asked: a row may be one longer than the context
        whole = [(context + continuation)[-(self.max_length + 1) :] for _, context, continuation in requests]
        for batch, scores in self._in_batches(whole, lambda batch: self.llama.score_ids([whole[i] for i in batch])):
            for i, score in zip(batch, scores, strict=True):
                key, asked = requests[i][0], len(requests[i][2])
                answers[i] = (sum(score.logprobs[-asked:]), all(score.greedy[-asked:]))
                if key is not None:
                    self.cache_hook.add_partial("loglikelihood", key, answers[i])
        return answers

    def _check_pair(self, request: Pair) -> None:
        """ValueError for what the harness's own class does not score either."""
        key, context, continuation = request
        shown = f"a request (context {key[0][-40:]!r}, continuation {key[1][:40]!r})" if key else "a request"
        if not context:
            raise ValueError(f"{shown} has no token before the continuation: the model's texts do not start with BOS")
        if not continuation:
            raise ValueError(f"{shown} has no tokens to score")
        if len(continuation) > self.max_length:
            raise ValueError(f"{shown} asks for {len(continuation)} tokens, the model's context is {self.max_length}")

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """Log-probability of whole texts, in windows of the context that overlap by one token."""
        windows: list[Pair] = []
        owners: list[int] = []
        for i, request in enumerate(requests):
            cut = get_rolling_token_windows(
                self.tok_encode(request.args[0]), self.prefix_token_id, max_seq_len=self.max_length, context_len=1
            )
            for context, continuation in map(make_disjoint_window, cut):
                windows.append((None, list(context), list(continuation)))
                owners.append(i)
        totals = [0.0] * len(requests)
        for owner, (logprob, _) in zip(owners, self._loglikelihood_tokens(windows), strict=True):
            totals[owner] += logprob
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Continuations, batched by length among requests with equal settings; cut before the first stop string."""
        answers = [""] * len(requests)
        groups: dict[str, list[int]] = {}
        for i, request in enumerate(requests):
            groups.setdefault(repr(sorted(request.args[1].items())), []).append(i)
        for members in groups.values():
            texts = self._continued([requests[i].args[0] for i in members], dict(requests[members[0]].args[1]))
            for i, text in zip(members, texts, strict=True):
                answers[i] = text
                self.cache_hook.add_partial("generate_until", requests[i].args, text)
        return answers

    def _continued(self, prompts: Sequence[str], settings: dict[str, Any]) -> list[str]:
        """What follows each prompt, under one request's settings."""
        whole_length = settings.pop("max_length", None)  # transformers' limit of prompt and answer together
        options, new_tokens = generation_options(with_defaults(settings, self._stated), self.max_gen_toks)
        room = self.max_length - new_tokens
        if room < 1:
            raise ValueError(f"max_gen_toks={new_tokens} leaves no room in a context of {self.max_length}")
        if self.eot_token_id is not None:
            options["stop"] = list(dict.fromkeys([*options["stop"], self._spelled(self.eot_token_id)]))
        rows = [self._prompt_ids(prompt)[-room:] for prompt in prompts]
        texts = [""] * len(rows)
        if has_empty_stop(settings):
            LOG.warning("until holds an empty text: an answer ends after its first token, as of the hf class")
            new_tokens, whole_length = 1, None
        for limit, members in limits_of(rows, new_tokens, whole_length).items():
            ask = partial(self._generated, rows, members, limit, options)
            for batch, outputs in self._in_batches([rows[i] for i in members], ask):
                for j, output in zip(batch, outputs, strict=True):
                    texts[members[j]] = self._talk.answer(output.tokens, self.llama.decode, options["stop"])
        return texts

    def _generated(
        self, rows: list[list[int]], members: list[int], limit: int, options: dict[str, Any], batch: list[int]
    ) -> list[Output]:
        """What follows some of the rows. Each draws by its own number, so that one that is asked twice differs.

        The harness hands its `--seed` on through PyTorch's generator.
        """
        asked = [members[j] for j in batch]
        seed = options.get("seed", torch.initial_seed() % 2**63)
        seeds = [seed + i for i in asked]
        outputs: list[Output] = self.llama.generate([rows[i] for i in asked], limit, **{**options, "seed": seeds})
        return outputs

    def apply_chat_template(self, chat_history: Sequence[Mapping[str, Any]], add_generation_prompt: bool = True) -> str:
        """A conversation as text; without a prompt for the next turn, the last one stays open."""
        try:
            return self._chat_text(chat_history, add_generation_prompt)
        except TokenizerError as error:
            without = [message for message in chat_history if message["role"] != "system"]
            if error.__cause__ is None or len(without) == len(chat_history):
                raise
            LOG.warning("%s: trying without the system's words", error)
            return self._chat_text(without, add_generation_prompt)

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """The template's text. A name is that of the template which makes every conversation from now on."""
        if chat_template is False or chat_template is None:
            return None
        if isinstance(chat_template, str):
            template_named(self.llama.tokenizer, chat_template)
            self.llama.chat_template = chat_template
        return template_named(self.llama.tokenizer, self.llama.chat_template)

    def _chat_text(self, messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool) -> str:
        words, name = self.llama.tokenizer, self.llama.chat_template
        return chat_text(
            words, messages, add_generation_prompt, not add_generation_prompt, name, **self._talk.variables
        )

    def _prompt_ids(self, text: str) -> list[int]:
        """The ids of a text that is to be continued. Only BOS counts as a beginning that a template has put there."""
        lead = self.llama.tokenizer.special_tokens.get("bos_token")
        return self._encode(text, False if lead and text.startswith(lead) else self.add_bos_token)

    def _encode(self, text: str, bos: bool | None) -> list[int]:
        """Ids of a text; `bos` None puts BOS before it if the tokenizer's files say so, True in any case."""
        lead = self.llama.tokenizer.bos_id
        if bos and lead is not None:
            return [lead, *self.llama.tokenizer.encode(text, bos=False)]
        return self.llama.tokenizer.encode(text, bos=bos is None)

    def _spelled(self, token: int) -> str:
        return self.tok_decode(token, skip_special_tokens=False)

    def _in_batches(
        self, rows: Sequence[Sequence[int]], ask: Callable[[list[int]], Any]
    ) -> Iterator[tuple[list[int], Any]]:
        """Batches of `rows`, as indices, and what `ask` answers; smaller ones where memory is short, if it may adapt."""
        left = [i for batch in batches(rows, self.batch_size) for i in batch]
        while left:
            batch = left[: self.batch_size]
            try:
                answer = ask(batch)
            except torch.OutOfMemoryError:
                if not self._adapts or self.batch_size == 1:
                    raise
                self.batch_size //= 2
                torch.cuda.empty_cache()
                continue
            yield batch, answer
            left = left[len(batch) :]


def device_for(name: str | None) -> torch.device:
    """The device of this name; without a GPU the CPU, as of the harness's `hf` class: the harness asks for cuda unasked."""
    if name is not None and str(name).partition(":")[0] == "cuda" and not torch.cuda.is_available():
        LOG.warning("device=%s: this PyTorch sees no CUDA device, the CPU is taken", name)
        return torch.device("cpu")
    return where(name)


def rows_of(batch_size: int | str, most: int | str | None) -> tuple[int, bool]:
    """Rows of a batch, and whether they may become fewer: (8, None) -> 8, False; ("auto:4", 32) -> 32, True."""
    if most is not None and (not str(most).isdecimal() or int(most) < 1):
        raise ValueError(f"max_batch_size={most}: a whole number of rows")
    if str(batch_size).partition(":")[0] == "auto":
        return int(most or MOST_ROWS), True
    if not str(batch_size).isdecimal() or int(batch_size) < 1:
        raise ValueError(f"batch_size={batch_size}: a whole number of rows, or auto")
    return int(batch_size), False


def limits_of(rows: Sequence[Sequence[int]], new_tokens: int, whole_length: int | None) -> dict[int, list[int]]:
    """New tokens -> the rows that may have so many; `whole_length` counts prompt and answer.

    ([[1, 2], [1, 2, 3]], 9, None) -> {9: [0, 1]}; ([[1, 2], [1, 2, 3]], 9, 5) -> {3: [0], 2: [1]}
    """
    found: dict[int, list[int]] = {}
    for i, row in enumerate(rows):
        limit = new_tokens if whole_length is None else int(whole_length) - len(row)
        if limit < 1:
            raise ValueError(f"generation setting max_length={whole_length}: a prompt has {len(row)} tokens already")
        found.setdefault(limit, []).append(i)
    return found


def batches(rows: Sequence[Sequence[int]], size: int) -> Iterator[list[int]]:
    """Indices of rows of like length together, the longest first, so that too little memory shows at once."""
    order = sorted(range(len(rows)), key=lambda i: -len(rows[i]))
    for begin in range(0, len(order), size):
        yield order[begin : begin + size]


def main(arguments: Sequence[str]) -> None:
    """The harness's own command line, with `--model llama_fast` known to it."""
    from lm_eval.__main__ import cli_evaluate

    sys.argv = ["lm_eval", *arguments]
    cli_evaluate()
