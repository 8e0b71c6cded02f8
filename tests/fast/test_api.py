"""The whole of the generation API: prompts of every kind, every sampling option, logprobs, and conversations."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from llama_fast import Llama, Plan, Sampling, build
from llama_fast.caches.static import Static
from llama_fast.chat import Chat
from llama_fast.encodings.int8 import Int8
from llama_fast.engine.room import common
from llama_fast.engine.sampling import BatchSampler
from llama_fast.recipes import optimised
from llama_fast.speculative.proposers import Ngram
from llama_ref.checkpoint import random_checkpoint, save_checkpoint
from llama_ref.config import LlamaConfig
from llama_ref.tokenizers.chat import chat_ids
from llama_ref.tokenizers.tokenizer import RandomTokenizer

CONFIG = LlamaConfig(48, 2, 6, 2, 10, 72, 259, 512, eos_ids=(7,))
TEXTS = ["one", "another text", "3"]


class Letters(RandomTokenizer):
    """A byte is an id; text comes back."""

    def __init__(self) -> None:
        super().__init__(259, None, ())

    def encode(self, text: str, bos: bool = True) -> list[int]:
        return list(text.encode())

    def decode(self, ids: Any) -> str:
        return bytes(token for token in ids if token < 256).decode(errors="replace")


@pytest.fixture(scope="module", params=[optimised(), Plan(Int8())], ids=["dense, static", "int8, growing"])
def llama(request: pytest.FixtureRequest) -> Llama:
    return Llama(build(random_checkpoint(CONFIG, 3), request.param, "cpu", torch.float32), Letters())


# --- prompts and rows -----------------------------------------------------------------------------


def test_prompts_of_every_kind_one_or_many(llama: Llama) -> None:
    messages = [{"role": "user", "content": "Hi"}]
    ids = chat_ids(llama.tokenizer, messages)
    kinds: list[Any] = ["another text", list(b"another text"), messages]
    together = llama.generate(kinds, 9)
    for kind, output in zip(kinds, together, strict=True):
        alone = llama.generate(kind, 9)
        assert (alone.tokens, alone.text) == (output.tokens, output.text)
    assert together[0].tokens == together[1].tokens
    assert together[2].tokens == llama.generate(ids, 9).ids and together[2].prompt_tokens == len(ids)
    assert [one.text for one in llama.generate(["another text"], 9)] == [together[0].text]
    assert together[0].generated_tokens == len(together[0].ids) and together[0].decode_tokens_per_second > 0
    assert 0 < together[0].first_token_seconds <= together[0].total_seconds


@pytest.mark.parametrize("prompts", ["", [], [""], [["a", "b"]], [[1, 2], []], [1.5], [9999]])
def test_what_is_no_prompt_is_refused(llama: Llama, prompts: Any) -> None:
    with pytest.raises((ValueError, TypeError)):
        llama.generate(prompts, 3)


OPTIONS: list[dict[str, Any]] = [
    {"temperature": 0.9},
    {"temperature": 1.3, "top_k": 5},
    {"temperature": 1.3, "top_p": 0.7},
    {"temperature": 1.3, "min_p": 0.2},
    {"temperature": 1.1, "repetition_penalty": 1.6},
    {"repetition_penalty": 1.6},
    {"temperature": 1.2, "top_k": 40, "top_p": 0.9, "min_p": 0.01, "repetition_penalty": 1.2},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_a_row_draws_the_same_alone_and_among_others(llama: Llama, options: dict[str, Any]) -> None:
    together = llama.generate(TEXTS, 24, seed=5, **options)
    assert [o.tokens for o in together] == [
        llama.generate(t, 24, seed=5 + b, **options).tokens for b, t in enumerate(TEXTS)
    ]
    own = llama.generate(TEXTS, 24, seed=[9, 2, 2], **options)
    assert [o.tokens for o in own] == [
        llama.generate(t, 24, seed=s, **options).tokens for t, s in zip(TEXTS, (9, 2, 2))
    ]
    assert "".join(llama.stream(TEXTS[1], 24, seed=6, **options)) == together[1].text
    if "temperature" in options:
        assert together[0].tokens != llama.generate(TEXTS[0], 24, seed=77, **options).tokens


def test_a_repetition_penalty_forbids_repeating_if_it_is_large(llama: Llama) -> None:
    free, held = llama.generate("aab", 40), llama.generate("aab", 40, repetition_penalty=1e6)
    assert len(set(free.tokens)) < len(free.tokens)
    assert len(set(held.tokens)) == len(held.tokens) and not set(held.tokens) & set(b"aab")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"min_p": 1.5}, "min_p=1.5"),
        ({"repetition_penalty": 0.0}, "repetition_penalty=0.0"),
        ({"seed": [1, 2]}, "2 seeds for 1 prompts"),
        ({"seed": -1}, "seed=-1"),
        ({"logprobs": -1}, "logprobs=-1"),
        ({"stop": [""]}, "a stop string is empty"),
        ({"draft": Ngram(k=2), "repetition_penalty": 1.2}, "cannot be had with a draft"),
        ({"draft": Ngram(k=2), "logprobs": 0}, "not told with a draft"),
    ],
)
def test_impossible_options_are_refused(llama: Llama, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        llama.generate(["abc"], 4, **options)


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ([{"role": "user", "content": "Hi"}, 3], "a prompt is text, token ids, or messages"),
        ([3, {"role": "user", "content": "Hi"}], "a prompt is text, token ids, or messages"),
        ([4, -5], "token id -5 is outside the vocabulary of"),
        ([4, 1000], "token id 1000 is outside the vocabulary of"),
    ],
)
def test_prompts_that_are_none_are_refused(llama: Llama, prompt: Any, message: str) -> None:
    for call in (llama.generate, llama.score, lambda prompt: list(llama.stream(prompt))):
        with pytest.raises(ValueError, match=message):
            call(prompt)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_distributions_are_those_of_transformers(options: dict[str, Any]) -> None:
    from transformers import (
        LogitsProcessorList,
        MinPLogitsWarper,
        RepetitionPenaltyLogitsProcessor,
        TemperatureLogitsWarper,
        TopKLogitsWarper,
        TopPLogitsWarper,
    )

    generator = torch.Generator().manual_seed(3)
    logits_BV = 3 * torch.randn(4, 97, generator=generator)
    written = torch.randint(97, (4, 11), generator=generator)
    makers: dict[str, Any] = {
        "repetition_penalty": RepetitionPenaltyLogitsProcessor,
        "temperature": TemperatureLogitsWarper,
        "top_k": TopKLogitsWarper,
        "top_p": TopPLogitsWarper,
        "min_p": MinPLogitsWarper,
    }
    theirs = LogitsProcessorList([make(options[name]) for name, make in makers.items() if name in options])
    expected = theirs(written, logits_BV.clone()).softmax(-1)  # type: ignore[no-untyped-call]
    chooser = BatchSampler(Sampling(**options), [0] * 4, torch.device("cpu"), written.tolist(), 97)
    if "temperature" not in options:
        assert torch.equal(chooser(logits_BV, torch.arange(4)), expected.argmax(-1))
        return
    seen: list[torch.Tensor] = []
    original = chooser.probabilities
    chooser.probabilities = lambda x: seen.append(original(x)) or seen[-1]  # type: ignore[method-assign,func-returns-value]
    chooser(logits_BV, torch.arange(4))
    torch.testing.assert_close(seen[0], expected, atol=1e-6, rtol=1e-4)
    assert (seen[0] == 0).sum() == (expected == 0).sum()


class Syncs(TorchDispatchMode):
    """Counts the operators that make the host wait for the device's numbers."""

    count = 0

    def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), keywords: Any = None) -> Any:
        name = str(function)
        self.count += any(word in name for word in ("_local_scalar_dense", "nonzero", "masked_select", "unique"))
        return function(*arguments, **(keywords or {}))


def test_choosing_never_waits_for_the_device() -> None:
    options = OPTIONS[-1]
    chooser = BatchSampler(Sampling(**options), [1, 2], torch.device("cpu"), [[1, 2], [3]], 97)
    from llama_fast.engine.logprobs import columns

    with Syncs() as syncs:
        logits_BV = torch.randn(2, 97)
        token_B = chooser(logits_BV, torch.tensor([4, 9]))
        chooser.note(token_B)
        columns(token_B[:, None], logits_BV, 3)
    assert syncs.count == 0
    with Syncs() as syncs:
        int(token_B[0])
    assert syncs.count == 1, "the counter counts"


# --- logprobs and scores --------------------------------------------------------------------------


def test_logprobs_are_the_scores_of_the_text(llama: Llama) -> None:
    outputs = llama.generate(TEXTS, 12, temperature=1.5, top_k=9, logprobs=3)
    for text, output in zip(TEXTS, outputs, strict=True):
        assert [entry.token for entry in output.logprobs] == output.tokens
        scores = llama.score(list(text.encode()) + output.tokens)[0][-len(output.tokens) :]
        for entry, score in zip(output.logprobs, scores, strict=True):
            assert math.isclose(entry.logprob, score, abs_tol=2e-4)
            values = list(entry.top.values())
            assert len(values) == 3 and values == sorted(values, reverse=True)
            assert entry.logprob <= values[0] + 1e-6
            assert entry.token not in entry.top or math.isclose(entry.top[entry.token], entry.logprob, abs_tol=1e-6)
    assert llama.generate("abc", 4).logprobs is None
    assert llama.generate("abc", 4, logprobs=0).logprobs[0].top == {}


def test_scores_do_not_depend_on_the_rows_beside(llama: Llama) -> None:
    together = llama.score(TEXTS)
    for text, row in zip(TEXTS, together, strict=True):
        if len(text) > 1:
            assert all(math.isclose(a, b, abs_tol=1e-4) for a, b in zip(llama.score(text)[0], row, strict=True))
    greedy = llama.score_ids([[*b"abc", *llama.generate("abc", 6).tokens]])[0].greedy
    assert greedy[-6:] == [True] * len(greedy[-6:])


# --- conversations --------------------------------------------------------------------------------


def test_a_turn_reads_only_what_is_new_and_answers_the_same(llama: Llama) -> None:
    chat, messages = Chat(llama, "Be brief", 12), [{"role": "system", "content": "Be brief"}]
    reused = []
    for text in ("Hello there", "and more", "again"):
        answer = "".join(chat.say(text))
        messages.append({"role": "user", "content": text})
        assert answer == llama.generate(messages, 12).text
        messages.append({"role": "assistant", "content": answer.strip()})
        assert chat.messages == messages
        reused.append(chat.reused_tokens)
        assert chat.prompt_tokens == len(chat_ids(llama.tokenizer, messages[:-1]))
    assert reused[0] == 0 and 40 < reused[1] < reused[2]
    chat.forget()
    assert chat.messages == messages[:1]
    assert "".join(chat.say("Hello there")) == llama.generate(messages[:2], 12).text


def test_an_interrupted_reply_stays_said(llama: Llama) -> None:
    chat = Chat(llama, None, 30)
    pieces = chat.say("Hello there")
    first = next(pieces) + next(pieces)
    pieces.close()
    assert chat.messages[-1] == {"role": "assistant", "content": first.strip()}
    history = [*chat.messages, {"role": "user", "content": "go on"}]
    assert "".join(chat.say("go on")) == llama.generate(history, 30).text
    assert chat.reused_tokens > 10


def test_a_conversation_beyond_the_context_is_refused_and_forgets_the_turn(llama: Llama) -> None:
    chat = Chat(llama, None, 8)
    list(chat.say("a"))
    before = list(chat.messages)
    with pytest.raises(ValueError, match="the model's context is 512: start anew"):
        list(chat.say("x" * 600))
    assert chat.messages == before
    list(chat.say("b" * 300))  # a longer cache than before
    assert len(chat.messages) == 4


def test_common() -> None:
    assert (common([1, 2, 3], [1, 2, 4]), common([], [1]), common([1], [1, 2])) == (2, 0, 1)


# --- the command ----------------------------------------------------------------------------------


@pytest.fixture
def model(tmp_path: Path) -> Path:
    config = dataclasses.replace(CONFIG, eos_ids=(), max_context=100_000)
    save_checkpoint(
        tmp_path / "model", config, random_checkpoint(config, 3).weights, tokenizer=RandomTokenizer(259, None, ())
    )
    return tmp_path / "model"


CHAT = [sys.executable, "-u", "-m", "llama_fast.ladder.cli", "chat", "--temperature", "0", "--model"]


def test_chat_answers_line_by_line(model: Path) -> None:
    lines = "hello\n\nmore\n/reset\nhello\n/exit\nnot read\n"
    done = subprocess.run([*CHAT, str(model), "--max-new-tokens", "4"], input=lines, capture_output=True, text=True)
    assert done.returncode == 0 and done.stderr == ""
    first, second, third = done.stdout.splitlines()
    assert first == third != second and len(first.split()) == 4


def listen(process: subprocess.Popen[bytes], count: int) -> None:
    """Until it has said so many bytes: far more than a prompt, so that it is in the middle of a reply."""
    assert process.stdout is not None
    while count > 0:
        piece = os.read(process.stdout.fileno(), count)
        assert piece, "it ended"
        count -= len(piece)


def test_chat_survives_an_interrupt_in_a_reply(model: Path) -> None:
    process = subprocess.Popen(
        [*CHAT, str(model), "--max-new-tokens", "90000"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        bufsize=0,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a job in the background inherits it ignored
    )
    assert process.stdin is not None and process.stdout is not None
    process.stdin.write(b"hello\n")
    listen(process, 200)
    process.send_signal(signal.SIGINT)
    told = b""
    while b"[interrupted]\n" not in told:
        piece = os.read(process.stdout.fileno(), 1 << 16)
        assert piece, "it ended"
        told += piece
    process.stdin.write(b"go on\n")
    listen(process, 200)
    process.send_signal(signal.SIGINT)
    process.stdin.write(b"/exit\n")
    process.stdout.read()
    assert process.wait(60) == 0
    process.stdin.close()
    process.stdout.close()


def test_generate_tells_logprobs_and_writes_a_trace(model: Path, tmp_path: Path) -> None:
    out, trace = tmp_path / "out.json", tmp_path / "trace.json"
    command = [sys.executable, "-m", "llama_fast.ladder.cli", "generate", "--model", str(model), "--prompt", "ab"]
    command += ["--max-new-tokens", "3", "--min-p", "0.01", "--repetition-penalty", "1.1", "--logprobs", "2"]
    done = subprocess.run([*command, "--json", str(out), "--profile", str(trace)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    sample = json.loads(out.read_text())["samples"][0]
    assert [entry["token"] for entry in sample["logprobs"]] == sample["tokens"]
    assert len(sample["logprobs"][0]["top"]) == 2
    assert any("aten::" in event.get("name", "") for event in json.loads(trace.read_text())["traceEvents"])


def test_generations_may_be_interleaved(llama: Llama) -> None:
    one, other = "Hello", "something else"
    alone = [llama.generate(prompt, 12).text for prompt in (one, other)]
    assert alone[0] != alone[1]
    pieces = list(itertools.zip_longest(llama.stream(one, 12), llama.stream(other, 12), fillvalue=""))
    assert ["".join(of) for of in zip(*pieces)] == alone
    inside: list[str] = []
    llama.generate(one, 12, on_text=lambda row, piece: inside.append(llama.generate(other, 12).text))
    assert inside and set(inside) == {alone[1]}
    told: list[str] = []
    for piece in llama.stream(one, 12):
        told.append(piece)
        llama.generate(other, 3)
    assert "".join(told) == alone[0]


def test_a_cache_is_kept_whatever_ends_a_generation(llama: Llama) -> None:
    if not isinstance(llama.runner.plan.cache, Static):
        pytest.skip("a growing cache is allocated anew for every call")
    llama.generate("Hello", 400)  # as long as the context: no request needs a longer one
    kept = llama.caches.kept[1]
    next(llama.stream("Hello", 12))  # dropped at once
    with pytest.raises(ZeroDivisionError):
        llama.generate("Hello", 12, on_text=lambda row, piece: 1 / 0)  # type: ignore[arg-type,return-value]
    with pytest.raises(ValueError):
        llama.generate("Hello", 12, draft=Ngram(k=10_000))
    assert llama.caches.kept[1] is kept


def test_static_caches_are_not_shared_with_generate(llama: Llama) -> None:
    if not isinstance(llama.runner.plan.cache, Static):
        pytest.skip("a growing cache is allocated anew for every call")
    chat = Chat(llama, None, 6)
    first = "".join(chat.say("Hello"))
    llama.generate("something else", 6)
    history = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": first.strip()}]
    assert "".join(chat.say("more")) == llama.generate([*history, {"role": "user", "content": "more"}], 6).text
