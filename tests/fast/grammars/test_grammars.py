"""Texts that a grammar makes whole: every row that stops is one of its texts, alone or beside rows without a grammar."""

from __future__ import annotations

import io
import json
import pickle
import re
import sys
from typing import Any

import pytest
import torch

from llama_fast import Llama, Sampling, build
from llama_fast.chat import Chat
from llama_fast.engine.engine import Engine
from llama_fast.engine.generate import generate
from llama_fast.engine.guides import Guide
from llama_fast.engine.request import Request
from llama_fast.grammars import Choice, Grammar, JsonSchema, Lark, Regex
from llama_fast.recipes import optimised
from llama_fast.speculative.proposers import Ngram
from llama_ref.checkpoint import random_checkpoint
from llama_ref.config import LlamaConfig
from llama_ref.tokenizers.tokenizer import RandomTokenizer

pytest.importorskip("llguidance")

WORDS = (b'{"', b'":', b"ab", b"e\xcc", b"\xf0\x9f\x99", b"  ", b'"}', b"true", b"12")
"""Tokens of several bytes; two end inside a character."""
EOS, OTHER_EOS, END = 257, 258, 259
CONFIG = LlamaConfig(48, 2, 6, 2, 10, 72, 272, 1024, eos_ids=(EOS, OTHER_EOS))


class Bytes(RandomTokenizer):
    """Ids are bytes, three special tokens and some words; the model's table is padded by three ids."""

    def __init__(self) -> None:
        super().__init__(260 + len(WORDS), None, (EOS,))

    def token_bytes(self) -> list[bytes | None]:
        return [*(bytes([byte]) for byte in range(256)), None, None, None, None, *WORDS]

    def encode(self, text: str, bos: bool = True) -> list[int]:
        return list(text.encode())

    def decode(self, ids: Any, skip_special_tokens: bool = True) -> str:
        known = [*self.token_bytes(), b"?", b"?", b"?"]
        return b"".join(known[token] or b"" for token in ids).decode(errors="replace")


@pytest.fixture(scope="module")
def llama() -> Llama:
    return Llama(build(random_checkpoint(CONFIG, 5), optimised(), "cpu", torch.float32), Bytes())


PERSON = {
    "type": "object",
    "properties": {
        "näme": {"type": "string", "maxLength": 6},
        "kind": {"enum": ["a", "ü", None, 3]},
        "next": {"anyOf": [{"$ref": "#/$defs/leaf"}, {"type": "null"}]},
        "at": {
            "type": "array",
            "items": {"type": "integer", "minimum": -5, "maximum": 40},
            "minItems": 1,
            "maxItems": 3,
        },
    },
    "required": ["näme", "kind", "next", "at"],
    "additionalProperties": False,
    "$defs": {"leaf": {"type": "object", "properties": {"v": {"type": "boolean"}}, "required": ["v"]}},
}
COMPACT = JsonSchema(PERSON, spaced=False)


def is_person(text: str) -> bool:
    found = json.loads(text)
    assert list(found) == ["näme", "kind", "next", "at"]
    assert len(found["näme"]) <= 6 and found["kind"] in ("a", "ü", None, 3)
    assert found["next"] is None or isinstance(found["next"]["v"], bool)
    return 1 <= len(found["at"]) <= 3 and all(type(one) is int and -5 <= one <= 40 for one in found["at"])


def test_what_stops_is_valid_and_what_does_not_is_its_beginning(llama: Llama) -> None:
    """Many draws, hot and greedy; those that are cut by the limit are what the grammar had allowed so far."""
    rows = llama.generate(["a"] * 12, 160, temperature=1.5, grammar=COMPACT, seed=3)
    ended = [row for row in rows if row.finish_reason == "stop"]
    assert len(ended) > 4 and all(is_person(row.text) for row in ended)
    short = llama.generate(["a"] * 4, 9, temperature=1.5, grammar=COMPACT, seed=3)
    assert {row.finish_reason for row in short} == {"length"}
    assert all(row.text.startswith('{"näm') or row.text.startswith('{"n') for row in short)
    for one, other in zip(short, rows, strict=False):
        assert other.tokens[:9] == one.tokens


@pytest.mark.parametrize(
    ("grammar", "matches"),
    [
        (Regex(r"[a-c]{3}-\d{2}(é|🙂)+x"), r"[a-c]{3}-\d{2}(é|🙂)+x"),
        (Choice(["yes", 'n"o', "éa"]), r'yes|n"o|éa'),
        (Lark('start: "<" NAME ">" inner? "</>"\ninner: "b" inner?\nNAME: /[a-z]{1,3}/'), r"<[a-z]{1,3}>b*</>"),
        (JsonSchema({"type": "integer", "minimum": 7, "maximum": 9}), "[789]"),
        (JsonSchema({"const": {"é": [1, "🙂"]}}, spaced=False), r'\{"é":\[1,"🙂"\]\}'),
    ],
)
def test_every_kind_of_grammar_is_kept(llama: Llama, grammar: Grammar, matches: str) -> None:
    rows = llama.generate(["a", "another", "b"], 60, temperature=1.2, grammar=grammar, seed=[5, 9, 2])
    assert any(row.finish_reason == "stop" for row in rows)
    for row in rows:
        assert row.finish_reason == "length" or re.fullmatch(matches, row.text), row.text


def test_unequal_rows_that_come_and_go_answer_as_they_would_alone(llama: Llama) -> None:
    """Three slots and seven requests: with grammars and without, greedy and drawn, with penalties and a bias."""
    words, limit = ["the cat", "a", "run home now", "b", "é", "mat", "on"], 40
    settings = [
        {"temperature": 1.0, "grammar": COMPACT},
        {"temperature": 0.9, "top_k": 30},
        {"grammar": Regex("(ab|12){1,5}")},
        {},
        {"temperature": 1.4, "grammar": Choice(["true", "ab"]), "frequency_penalty": 0.5},
        {"frequency_penalty": 1.5, "presence_penalty": 0.5, "logit_bias": {97: 4.0}},
        {"temperature": 1.1, "top_p": 0.8, "min_p": 0.01, "grammar": JsonSchema(True), "repetition_penalty": 1.3},
    ]
    alone = [llama.generate(text, limit, seed=i, **one) for i, (text, one) in enumerate(zip(words, settings))]
    engine = Engine(llama.runner, rows=3, length=64)
    texts, ended = ["" for _ in words], {}
    for i, (text, one) in enumerate(zip(words, settings)):
        made = {**one, "grammar": llama.constraint(one["grammar"]) if "grammar" in one else None}
        ids = llama.encode(text)
        engine.add(Request(ids, limit, Sampling(seed=i, **made), CONFIG.eos_ids), llama.writer(ids))
    while engine.busy:
        for event in engine.step():
            texts[event.id] += event.text
            ended[event.id] = event.finish_reason
    assert texts == [one.text for one in alone]
    assert list(ended.values()) and [ended[i] for i in range(len(words))] == [one.finish_reason for one in alone]


def test_a_text_may_end_by_either_eos_id_and_by_nothing_else(llama: Llama) -> None:
    """Where the text may go on and may end, an EOS id decides; no other special token and no padded id ever comes."""
    rows = llama.generate(["a"] * 30, 12, temperature=2.0, grammar=Regex("(?s:.*)"), seed=1)
    ends = {row.tokens[-1] for row in rows if row.finish_reason == "stop"}
    assert ends <= {EOS, OTHER_EOS} and ends
    known = Bytes().token_bytes()
    for row in rows:
        assert all(token < 269 and known[token] is not None for token in row.tokens[:-1])
        if row.finish_reason == "stop":
            assert row.text.encode() == b"".join(known[token] or b"" for token in row.tokens[:-1])  # valid UTF-8


def test_tokens_are_the_likeliest_of_those_allowed(llama: Llama) -> None:
    """Greedy, with a grammar that leaves one class of bytes: each token is the argmax of the model's logits there."""
    ids = llama.encode("the dogs")
    out = llama.generate(ids, 12, grammar=Regex("[A-Z]{12}"), logprobs=272)
    assert out.finish_reason == "stop" and re.fullmatch("[A-Z]{12}", out.text)
    for entry in out.logprobs or []:
        capitals = {token: value for token, value in entry.top.items() if 65 <= token <= 90}
        assert entry.token == max(capitals, key=lambda token: capitals[token])


def test_it_streams_and_a_sampling_holds_it(llama: Llama) -> None:
    options: dict[str, Any] = {"temperature": 1.0, "seed": 4}
    whole = llama.generate("a", 60, grammar=COMPACT, **options).text
    assert "".join(llama.stream("a", 60, grammar=COMPACT, **options)) == whole
    ready = llama.constraint(COMPACT)
    assert llama.generate("a", 60, grammar=ready, **options).text == whole
    sampling = Sampling(1.0, seed=4, grammar=ready)
    ids = llama.encode("a")
    assert llama.decode(generate(llama.runner, [ids], 60, sampling, CONFIG.eos_ids).completions[0].tokens) == whole
    chat = Chat(llama, max_new_tokens=60, sampling=Sampling(grammar=llama.constraint(Choice(["true", "12"]))))
    assert "".join(chat.say("a")) in ("true", "12") and "".join(chat.say("b")) in ("true", "12")


def test_a_grammar_travels_to_another_process_as_what_was_asked(llama: Llama) -> None:
    """The model goes by a name there; the grammar is made again over its tokens."""
    buffer = io.BytesIO()
    writing = pickle.Pickler(buffer)
    writing.persistent_id = lambda value: "llama" if value is llama else None  # type: ignore[method-assign]
    writing.dump(Request([97], 60, Sampling(1.0, seed=4, grammar=llama.constraint(COMPACT)), CONFIG.eos_ids))
    reading = pickle.Unpickler(io.BytesIO(buffer.getvalue()))
    reading.persistent_load = lambda name: {"llama": llama}[name]  # type: ignore[method-assign]
    request = reading.load()
    assert len(buffer.getvalue()) < 5000
    done = generate(llama.runner, [request.ids], 60, request.sampling, request.eos_ids)
    assert (
        llama.decode(done.completions[0].tokens)
        == llama.generate("a", 60, temperature=1.0, seed=4, grammar=COMPACT).text
    )


class Failing:
    """A guide that gives up after some tokens, as a grammar that is too complex does."""

    ends = (EOS, OTHER_EOS)
    failure: str | None = None
    complete = False

    def __init__(self, tokens: int = 3):
        self._left = tokens

    def begin(self) -> Guide:
        return Failing(self._left)

    def allow(self, words_W: torch.Tensor) -> None:
        words_W.zero_()
        words_W[3] = 2  # the letter a

    def take(self, token: int) -> None:
        assert token == 97
        self._left -= 1
        if not self._left:
            self.failure = "too complex"


def test_a_row_whose_grammar_gives_up_is_told_and_the_others_go_on(llama: Llama) -> None:
    engine = Engine(llama.runner, rows=2, length=32)
    failing = engine.add(Request([1, 2], 9, Sampling(grammar=Failing())))
    other = engine.add(Request([3], 9))
    events = []
    while engine.busy:
        events += engine.step()
    last = [event for event in events if event.id == failing][-1]
    assert (last.finish_reason, last.failure) == ("failed", "too complex")
    assert len([event for event in events if event.id == failing]) == 3
    assert [event.finish_reason for event in events if event.id == other][-1] == "length"
    with pytest.raises(ValueError, match="grammar: too complex"):
        llama.generate([1, 2], 9, grammar=Failing())  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="grammar: too complex"):
        list(llama.stream([1, 2], 9, grammar=Failing()))  # type: ignore[arg-type]


def test_a_text_that_the_model_has_no_token_for_is_told() -> None:
    class NoDigits(Bytes):
        def token_bytes(self) -> list[bytes | None]:
            return [None if one in (b"7", b"12") else one for one in super().token_bytes()]

    poor = Llama(build(random_checkpoint(CONFIG, 5), optimised(), "cpu", torch.float32), NoDigits())
    with pytest.raises(ValueError, match=r"grammar: "):
        poor.generate(["a", "b"], 9, grammar=Regex("a7"))


@pytest.mark.parametrize(
    ("grammar", "message"),
    [
        (Regex("("), "unclosed group"),
        (Regex("(?=a)b"), "look-around"),
        (Lark("start: nothing"), "nothing"),
        (JsonSchema({"not": {"type": "string"}}), "not"),
        (JsonSchema({"type": "array", "uniqueItems": True}), "uniqueItems"),
        (JsonSchema({"type": "object", "x-guidance": {"lenient": True}, "if": {}}), "if"),
        (JsonSchema({"$ref": "#/$defs/none"}), "none"),
        (JsonSchema({"$ref": "https://example.com/a.json"}), "example.com"),
        (JsonSchema({"oneOf": [{"type": "integer"}, {"minimum": 3}]}), "oneOf"),
        (JsonSchema({"type": "strin"}), "strin"),
        (JsonSchema(False), "false"),
        (JsonSchema("{"), "no JSON"),
        (JsonSchema({"const": "\ud800"}), "escape"),
        (JsonSchema({"a": {1, 2}}), "no JSON"),
    ],
)
def test_what_cannot_be_kept_is_refused_in_one_line(llama: Llama, grammar: Grammar, message: str) -> None:
    with pytest.raises(ValueError, match=message) as refused:
        llama.generate("a", 5, grammar=grammar)
    assert str(refused.value).startswith("grammar: ") and "\n" not in str(refused.value)


def test_what_would_break_the_promise_is_refused_by_name(llama: Llama) -> None:
    with pytest.raises(ValueError, match="stop="):
        llama.generate("a", 5, grammar=Regex("a+"), stop="b")
    with pytest.raises(ValueError, match="stop="):
        Chat(llama, sampling=Sampling(grammar=llama.constraint(Regex("a+"))), stop="b")
    with pytest.raises(ValueError, match="eos_ids: token 9 "):
        Request([1], 5, Sampling(grammar=llama.constraint(Regex("a+"))), eos_ids=[9, EOS])
    with pytest.raises(ValueError, match="grammar looks at"):
        llama.generate("a", 5, grammar=Regex("a+"), draft=Ngram())
    for name, value in (("frequency_penalty", 1.0), ("presence_penalty", 1.0), ("logit_bias", {5: 1.0})):
        with pytest.raises(ValueError, match=f"{name} .* draft"):
            llama.generate("a", 5, draft=Ngram(), **{name: value})
    with pytest.raises(ValueError, match="logit_bias: token id 272 is outside the vocabulary of 272"):
        llama.generate("a", 5, logit_bias={272: 1.0})
    with pytest.raises(TypeError, match="grammar='a'"):
        llama.generate("a", 5, grammar="a")  # type: ignore[arg-type]
    for wrong in (lambda: Choice([]), lambda: Choice(["a", ""]), lambda: JsonSchema(3), lambda: Regex(b"a")):  # type: ignore[arg-type]
        with pytest.raises((TypeError, ValueError)):
            wrong()


def test_a_missing_package_is_told_in_one_line(llama: Llama, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "llguidance", None)
    with pytest.raises(
        ValueError, match=r"^grammar: grammars need the package llguidance: pip install 'llama-fast\[grammar\]'$"
    ):
        llama.generate("a", 5, grammar=Regex("a+"))
