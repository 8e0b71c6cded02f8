"""A model class for EleutherAI's lm-evaluation-harness: scores and continuations in batches, through the built runner.

    llama-fast lm-eval --model llama_fast --model_args pretrained=DIR,encoding=int8 --tasks TASK --batch_size 8

It is declared under the entry point group `lm_eval.models`. Harness versions that do not look there (0.4.13 does not)
know the name only after this module is imported, which `llama-fast lm-eval` does before it hands over to them.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from typing import Any

import lm_eval.models  # noqa: F401 - its own models: the harness registers them only while it knows none
import torch
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from llama_fast.build import build, default_dtype, where
from llama_fast.llama import Llama
from llama_fast.recipes import encoding_named, optimised
from llama_ref.chat import chat_text
from llama_ref.models import resolve


@register_model("llama_fast")
class LlamaFast(TemplateLM):  # type: ignore[misc]  # the harness has no types
    """Any model that `Llama.from_pretrained` opens, under the plan that the arguments name."""

    backend = "causal"

    def __init__(
        self,
        pretrained: str = "smollm2-135m",
        device: str | None = None,
        dtype: str | None = None,
        encoding: str | None = None,
        compile: bool = False,
        batch_size: int | str = 8,
        max_batch_size: int | None = None,
        max_length: int | None = None,
        max_gen_toks: int = 256,
        add_bos_token: bool | None = None,
    ):
        """`add_bos_token` None does as the tokenizer's files say. ValueError for what cannot be opened or built."""
        super().__init__()
        if not str(batch_size).isdecimal() or int(batch_size) < 1:
            raise ValueError(f"batch_size={batch_size}: a whole number of rows")
        to = where(device)
        kind = default_dtype(to) if dtype in (None, "auto") else getattr(torch, str(dtype), None)
        if not isinstance(kind, torch.dtype):
            raise ValueError(f"unknown dtype {dtype!r}")
        found = resolve(str(pretrained))
        checkpoint = found.open(to, kind)
        plan = optimised(encoding_named(encoding or checkpoint.encoding), bool(compile))
        self.llama = Llama(build(checkpoint, plan, to, kind), found.tokenizer())
        self.batch_size, self.max_gen_toks, self.add_bos_token = int(batch_size), max_gen_toks, add_bos_token
        self.max_length = min(max_length or sys.maxsize, self.llama.runner.config.max_context)
        self._name = str(pretrained)

    @property
    def tokenizer_name(self) -> str:
        """Part of the harness's key for requests that it keeps."""
        return self._name.replace("/", "__")

    @property
    def eot_token_id(self) -> int:
        """What ends a text; the prefix of a text without context where the model has no BOS."""
        return next(iter((*self.llama.tokenizer.eos_ids, *self.llama.runner.config.eos_ids)), 0)

    @property
    def prefix_token_id(self) -> int:
        bos = self.llama.tokenizer.bos_id
        return self.eot_token_id if bos is None else bos

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **unused: Any) -> list[int]:
        bos = self.add_bos_token if add_special_tokens is None else add_special_tokens
        lead = self.llama.tokenizer.special_tokens.get("bos_token")
        if lead and string.startswith(lead):
            bos = False  # a template has put it there
        return self.llama.tokenizer.encode(string, bos=bos is not False)

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], **unused: Any
    ) -> list[tuple[float, bool]]:
        """(sum of the continuation's log-probabilities, whether greedy decoding would give it), in the order asked."""
        answers: list[tuple[float, bool]] = [(0.0, True)] * len(requests)
        whole = [(context + continuation)[-(self.max_length + 1) :] for _, context, continuation in requests]
        for batch in batches(whole, self.batch_size):
            # what the last token predicts is not asked: a row may be one longer than the context
            scores = self.llama.score_ids([whole[i] for i in batch])
            for i, score in zip(batch, scores, strict=True):
                asked, pair = len(requests[i][2]), requests[i][:1]
                first = max(0, len(score.logprobs) - asked)
                answers[i] = (sum(score.logprobs[first:]), all(score.greedy[first:]))
                if isinstance(pair[0], tuple):
                    self.cache_hook.add_partial("loglikelihood", pair[0], answers[i])
        return answers

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """Log-probability of whole texts, in windows of the context that overlap by one token."""
        windows: list[tuple[None, list[int], list[int]]] = []
        owners: list[int] = []
        for i, request in enumerate(requests):
            cut = get_rolling_token_windows(
                self.tok_encode(request.args[0]), self.prefix_token_id, max_seq_len=self.max_length - 1, context_len=1
            )
            for context, continuation in map(make_disjoint_window, cut):
                windows.append((None, list(context), list(continuation)))
                owners.append(i)
        totals = [0.0] * len(requests)
        for owner, (logprob, _) in zip(owners, self._loglikelihood_tokens(windows), strict=True):
            totals[owner] += logprob
        return totals

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Continuations, batched by length among requests with equal settings; cut before the first stop string."""
        answers = [""] * len(requests)
        groups: dict[str, list[int]] = {}
        for i, request in enumerate(requests):
            groups.setdefault(repr(sorted(request.args[1].items())), []).append(i)
        for members in groups.values():
            settings = dict(requests[members[0]].args[1])
            options, new_tokens = generation_options(settings, self.max_gen_toks)
            room = self.max_length - new_tokens
            if room < 1:
                raise ValueError(f"max_gen_toks={new_tokens} leaves no room in a context of {self.max_length}")
            ids = [self.tok_encode(requests[i].args[0])[-room:] for i in members]
            for batch in batches(ids, self.batch_size):
                outputs = self.llama.generate([ids[j] for j in batch], new_tokens, **options)
                for j, output in zip(batch, outputs, strict=True):
                    answers[members[j]] = output.text
                    self.cache_hook.add_partial("generate_until", requests[members[j]].args, output.text)
        return answers

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        return chat_text(self.llama.tokenizer, chat_history, add_generation_prompt)

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        return self.llama.tokenizer.chat_template if chat_template else ""


def batches(rows: Sequence[Sequence[int]], size: int) -> Iterator[list[int]]:
    """Indices of rows of like length together, the longest first, so that too little memory shows at once."""
    order = sorted(range(len(rows)), key=lambda i: -len(rows[i]))
    for begin in range(0, len(order), size):
        yield order[begin : begin + size]


def generation_options(settings: dict[str, Any], most: int) -> tuple[dict[str, Any], int]:
    """The harness's words in ours, and the number of new tokens; ValueError for a word we do not know.

    {"until": ["\\n"], "do_sample": False, "temperature": 0.7} -> {"stop": ["\\n"], "temperature": 0.0}, most
    """
    until = settings.pop("until", [])
    tokens = int(settings.pop("max_gen_toks", settings.pop("max_new_tokens", most)))
    sampled = settings.pop("do_sample", settings.get("temperature", 0) != 0)
    options: dict[str, Any] = {"stop": [until] if isinstance(until, str) else [word for word in until if word]}
    temperature = float(settings.pop("temperature", 1.0))
    options["temperature"] = temperature if sampled else 0.0
    for name in ("top_k", "top_p", "min_p", "repetition_penalty", "seed"):
        if name in settings:
            options[name] = settings.pop(name)
    if settings:
        raise ValueError(f"generation setting {sorted(settings)[0]!r} is not supported")
    return options, tokens


def main(arguments: Sequence[str]) -> None:
    """The harness's own command line, with `--model llama_fast` known to it."""
    from lm_eval.__main__ import cli_evaluate

    sys.argv = ["lm_eval", *arguments]
    cli_evaluate()
