"""Penalties, biases and answers of a form, through OpenAI's client: what the library generates, and always valid."""

from __future__ import annotations

import json
import re
import threading
from typing import Any

import pytest
from openai import BadRequestError

from llama_fast import Llama
from llama_fast.engine.guides import Guide
from llama_fast.grammars import Choice, JsonSchema, Lark, Regex
from tests.serve.conftest import Running
from tests.serve.test_answers import GREEDY, PROMPT, alone, joined, streamed

pytest.importorskip("llguidance")

SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "städte": {"type": "array", "items": {"$ref": "#/$defs/city"}, "minItems": 1, "maxItems": 2},
        "kind": {"enum": ["ö\n", 'q"', None, 1.5]},
        "more": {"anyOf": [{"type": "boolean"}, {"const": {"a": ["🙂"]}}]},
    },
    "required": ["städte", "kind", "more"],
    "additionalProperties": False,
    "$defs": {
        "city": {
            "type": "object",
            "properties": {
                "n": {"type": "string", "maxLength": 3},
                "z": {"type": "integer", "minimum": 0, "maximum": 99},
            },
            "required": ["n", "z"],
            "additionalProperties": False,
        }
    },
}
FORMAT: Any = {"type": "json_schema", "json_schema": {"name": "cities", "schema": SCHEMA, "strict": True}}
MESSAGES: Any = [{"role": "user", "content": "a mat"}]


def is_valid(text: str) -> bool:
    found = json.loads(text)
    assert list(found) == ["städte", "kind", "more"] and found["kind"] in ("ö\n", 'q"', None, 1.5)
    assert isinstance(found["more"], bool) or found["more"] == {"a": ["🙂"]}
    for city in found["städte"]:
        assert list(city) == ["n", "z"] and len(city["n"]) <= 3 and type(city["z"]) is int and 0 <= city["z"] <= 99
    return 1 <= len(found["städte"]) <= 2


@pytest.mark.parametrize(
    "more",
    [
        {"frequency_penalty": 1.5},
        {"presence_penalty": -2.0},
        {"logit_bias": {"104": 5, "260": -100}},
        {"frequency_penalty": 0.3, "presence_penalty": 0.2, "logit_bias": {"101": 3.5}},
    ],
)
@pytest.mark.parametrize("temperature", [0, 0.9])
def test_penalties_and_biases_are_the_librarys(
    running: Running, llama: Llama, more: dict[str, Any], temperature: float
) -> None:
    settings = {"temperature": temperature, "seed": 3}
    bias = {int(token): value for token, value in more.get("logit_bias", {}).items()}
    expected = alone(llama, PROMPT, 40, settings, **{**more, "logit_bias": bias})
    assert expected.text != alone(llama, PROMPT, 40, settings).text
    client = running.client()
    whole = client.completions.create(model="tiny", prompt=PROMPT, max_tokens=40, **settings, **more)
    assert whole.choices[0].text == expected.text
    pieces = client.completions.create(model="tiny", prompt=PROMPT, max_tokens=40, stream=True, **settings, **more)
    assert "".join(piece.choices[0].text for piece in pieces) == expected.text
    said = client.chat.completions.create(model="tiny", messages=MESSAGES, max_tokens=20, **settings, **more)
    wanted = alone(llama, MESSAGES, 20, settings, **{**more, "logit_bias": bias})
    assert said.choices[0].message.content == wanted.text
    client.close()


def test_a_schema_is_kept_whole_and_streamed(running: Running, llama: Llama) -> None:
    client = running.client()
    said = client.chat.completions.create(
        model="tiny", messages=MESSAGES, max_tokens=250, n=4, seed=2, temperature=1.3, response_format=FORMAT
    )
    stopped = [one.message.content or "" for one in said.choices if one.finish_reason == "stop"]
    assert len(stopped) >= 1 and all(is_valid(text) for text in stopped)
    expected = [
        alone(llama, MESSAGES, 250, {"temperature": 1.3, "seed": 2 + i}, grammar=JsonSchema(SCHEMA)) for i in range(4)
    ]
    assert [one.message.content for one in said.choices] == [one.text for one in expected]
    assert [one.finish_reason for one in said.choices] == [one.finish_reason for one in expected]
    body = {"messages": MESSAGES, "max_tokens": 250, "n": 4, "seed": 2, "temperature": 1.3, "response_format": FORMAT}
    found = joined(streamed(running, "/v1/chat/completions", body))
    assert found == {i: (one.text, one.finish_reason) for i, one in enumerate(expected)}
    client.close()


def test_any_json_object_and_a_limit_inside_it(running: Running) -> None:
    """`max_tokens` ends an object early: "length", and the text is its beginning."""
    client = running.client()
    reasons = set()
    for seed in range(12):
        said = client.chat.completions.create(
            model="tiny",
            messages=MESSAGES,
            max_tokens=60,
            seed=seed,
            temperature=1.2,
            response_format={"type": "json_object"},
            logit_bias={"125": 4},  # a closing brace, so that some end
        )
        choice = said.choices[0]
        reasons.add(choice.finish_reason)
        text = choice.message.content or ""
        assert text.startswith("{")
        if choice.finish_reason == "stop":
            assert isinstance(json.loads(text), dict)
        else:
            with pytest.raises(ValueError):
                json.loads(text)
    assert reasons == {"stop", "length"}
    client.close()


@pytest.mark.parametrize(
    ("asked", "grammar", "matches"),
    [
        ({"regex": r"[ab]{2}\d(é|🙂)"}, Regex(r"[ab]{2}\d(é|🙂)"), r"[ab]{2}\d(é|🙂)"),
        ({"choice": ["cat", "dögs", 'a"']}, Choice(["cat", "dögs", 'a"']), r'cat|dögs|a"'),
        ({"grammar": 'start: "<" /[a-z]/ ">"'}, Lark('start: "<" /[a-z]/ ">"'), "<[a-z]>"),
        (
            {"json": {"enum": [1, [2]]}, "disable_any_whitespace": True},
            JsonSchema({"enum": [1, [2]]}, False),
            r"1|\[2\]",
        ),
        ({"json": '{"const": true}'}, JsonSchema({"const": True}), "true"),
    ],
)
def test_structured_outputs_are_vllms(
    running: Running, llama: Llama, asked: dict[str, Any], grammar: Any, matches: str
) -> None:
    client = running.client()
    extra = {"structured_outputs": asked}
    settings: dict[str, Any] = {"temperature": 1.1, "seed": 6}
    expected = alone(llama, PROMPT, 30, settings, grammar=grammar)
    done = client.completions.create(model="tiny", prompt=PROMPT, max_tokens=30, extra_body=extra, **settings)
    assert (done.choices[0].text, done.choices[0].finish_reason) == (expected.text, "stop")
    assert re.fullmatch(matches, expected.text)
    said = client.chat.completions.create(model="tiny", messages=MESSAGES, max_tokens=30, extra_body=extra, **settings)
    assert re.fullmatch(matches, said.choices[0].message.content or "")
    client.close()


def test_rows_of_all_kinds_run_side_by_side(running: Running, llama: Llama) -> None:
    """Nine clients and three rows: with a schema, a choice, penalties, and nothing."""
    kinds: list[tuple[dict[str, Any], dict[str, Any]]] = [
        ({"response_format": FORMAT}, {"grammar": JsonSchema(SCHEMA)}),
        ({"structured_outputs": {"choice": ["the cat", "a mat"]}}, {"grammar": Choice(["the cat", "a mat"])}),
        ({"frequency_penalty": 1.0}, {"frequency_penalty": 1.0}),
        ({}, {}),
    ]
    texts: dict[int, str] = {}

    def ask(i: int) -> None:
        body = {"prompt": PROMPT[i % 5 :], "max_tokens": 30 + 9 * i, "temperature": 1.0, "seed": i, **kinds[i % 4][0]}
        texts[i] = running.post("/v1/completions", body).json()["choices"][0]["text"]

    clients = [threading.Thread(target=ask, args=(i,)) for i in range(9)]
    for client in clients:
        client.start()
    for client in clients:
        client.join()
    for i in range(9):
        settings = {"temperature": 1.0, "seed": i}
        assert texts[i] == alone(llama, PROMPT[i % 5 :], 30 + 9 * i, settings, **kinds[i % 4][1]).text, i


def test_a_prompt_is_echoed_before_what_is_made_to_fit(running: Running) -> None:
    body = {"prompt": PROMPT, "max_tokens": 9, "echo": True, "logprobs": 0, "n": 2, "best_of": 3, "seed": 4}
    answer = running.post("/v1/completions", {**body, "structured_outputs": {"choice": ["12", "on"]}}).json()
    assert all(choice["text"] in (PROMPT + "12", PROMPT + "on") for choice in answer["choices"])
    for choice in answer["choices"]:
        assert "".join(choice["logprobs"]["tokens"]).endswith(choice["text"])


class GivesUp:
    """A grammar that cannot go on after two tokens."""

    ends = range(300)
    complete = False

    def __init__(self) -> None:
        self.failure: str | None = None
        self._taken = 0

    def begin(self) -> Guide:
        return GivesUp()

    def allow(self, words_W: Any) -> None:
        pass

    def take(self, token: int) -> None:
        self._taken += 1
        self.failure = "too complex" if self._taken == 2 else None


def test_a_grammar_that_gives_up_is_told_and_the_server_goes_on(
    running: Running, llama: Llama, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(llama, "constraint", lambda grammar: GivesUp())
    body = {"prompt": PROMPT, "max_tokens": 9, "structured_outputs": {"regex": "a"}, **GREEDY}
    response = running.post("/v1/completions", body)
    assert response.status_code == 400 and response.json()["error"]["code"] == "grammar_failed"
    assert "too complex" in response.json()["error"]["message"]
    with running.http as http, http.stream("POST", "/v1/completions", json={**body, "stream": True}) as stream:
        lines = [line for line in stream.iter_lines() if line]
    assert json.loads(lines[-1][6:])["error"]["code"] == "grammar_failed"
    assert running.post("/v1/completions", {"prompt": PROMPT, **GREEDY}).status_code == 200


def test_what_is_not_kept_is_refused_with_the_librarys_reason(running: Running) -> None:
    client = running.client()
    wrong: Any = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "array", "uniqueItems": True}}}
    with pytest.raises(BadRequestError) as refused:
        client.chat.completions.create(model="tiny", messages=MESSAGES, response_format=wrong)
    assert refused.value.param == "response_format" and "uniqueItems" in str(refused.value)
    client.close()


def test_a_missing_package_is_told_by_the_field(running: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "llguidance", None)
    body = {"messages": MESSAGES, "response_format": {"type": "json_object"}}
    response = running.post("/v1/chat/completions", body)
    assert response.status_code == 400 and response.json()["error"]["param"] == "response_format"
    assert "llama-fast[grammar]" in response.json()["error"]["message"]
