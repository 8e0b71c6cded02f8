"""Tools: what reaches the template, calls by force, and calls that are read from what the model wrote."""

from __future__ import annotations

import contextlib
import copy
import json
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llama_fast import Llama
from llama_fast.grammars import Choice
from llama_fast.serve.bodies import Tool
from llama_fast.serve.tools import HERMES, LLAMA_3, Call, Offered, Reader, ToolForm, by_force, calls_in, form_of
from tests.serve.conftest import TEMPLATE, Running, Serve

pytest.importorskip("llguidance")

LLAMA_3_TEMPLATE = TEMPLATE.replace(
    "{{ tools | tojson }}", 'Answer with {"name": .., "parameters": {..}} {{ tools | tojson }}'
)
HERMES_TEMPLATE = TEMPLATE.replace(
    "{{ tools | tojson }}", '<tool_call>\n{"name": .., "arguments": {..}}\n</tool_call> {{ tools | tojson }}'
)
WEATHER = {
    "type": "function",
    "function": {
        "name": "wetter-é",
        "description": "The weather",
        "parameters": {
            "type": "object",
            "properties": {"days": {"$ref": "#/$defs/n"}, "unit": {"enum": ["°C", '"F"']}},
            "required": ["days", "unit"],
            "additionalProperties": False,
            "$defs": {"n": {"type": "integer", "minimum": 1, "maximum": 7}},
        },
    },
}
CLOCK = {"type": "function", "function": {"name": "clock"}}
MESSAGES: Any = [{"role": "user", "content": "a mat"}]
BY_NAME: Any = {"type": "function", "function": {"name": "wetter-é"}}


def with_template(llama: Llama, template: str) -> Llama:
    tokenizer: Any = copy.copy(llama.tokenizer)
    tokenizer.chat_template, tokenizer.chat_templates = template, {"default": template}
    return Llama(llama.runner, tokenizer)


@pytest.fixture(scope="module", params=[LLAMA_3_TEMPLATE, HERMES_TEMPLATE], ids=["llama 3", "hermes"])
def calling(request: pytest.FixtureRequest, serve: Serve, llama: Llama) -> Iterator[Running]:
    """A server whose template tells how a call is spelled."""
    with serve() as running:
        object.__setattr__(running.served, "llama", with_template(llama, request.param))
        yield running


@contextlib.contextmanager
def saying(running: Running, text: str, patch: pytest.MonkeyPatch) -> Iterator[None]:
    """The model says this, whatever it is asked: a grammar of one text, unknown to the server."""
    constraint = running.served.llama.constraint(Choice([text]))
    rows = type(running.served).rows

    def one_text(self: Any, body: Any, prompts: Any, each: int, logprobs: int | None, own: Any = None) -> Any:
        made = rows(self, body, prompts, each, logprobs)
        return [(replace(request, sampling=replace(request.sampling, grammar=constraint)), w) for request, w in made]

    with patch.context() as inner:
        inner.setattr(type(running.served), "rows", one_text)
        yield


def spelled(form: ToolForm, *calls: tuple[str, Any]) -> str:
    between = "; " if form.between else "\n"
    objects = [json.dumps({"name": name, form.arguments: given}, ensure_ascii=False) for name, given in calls]
    return between.join(form.before + one + form.after for one in objects)


def told(message: Any) -> list[tuple[str, Any]]:
    assert message.content is None
    return [(call.function.name, json.loads(call.function.arguments)) for call in message.tool_calls]


@pytest.mark.parametrize("choice", ["required", BY_NAME])
def test_a_call_by_force_keeps_the_tools_schema(calling: Running, choice: Any) -> None:
    client = calling.client()
    said = client.chat.completions.create(
        model="tiny", messages=MESSAGES, tools=[CLOCK, WEATHER], tool_choice=choice, max_tokens=150, n=5, seed=1
    )
    names = set()
    for one in said.choices:
        if one.finish_reason == "tool_calls":
            ((name, given),) = told(one.message)
            names.add(name)
            assert one.message.tool_calls and one.message.tool_calls[0].id.startswith("call_")
            assert (name == "clock" and given == {}) or (1 <= given["days"] <= 7 and given["unit"] in ("°C", '"F"'))
        else:  # cut by the limit: what there is is told as text
            assert one.finish_reason == "length" and one.message.tool_calls is None and one.message.content
    assert names == {"wetter-é"} if choice is BY_NAME else names <= {"wetter-é", "clock"} and names
    chunks = list(
        client.chat.completions.create(
            model="tiny",
            messages=MESSAGES,
            tools=[CLOCK, WEATHER],
            tool_choice=choice,
            max_tokens=150,
            seed=1,
            stream=True,
        )
    )
    deltas = [call for chunk in chunks for call in chunk.choices[0].delta.tool_calls or []]
    first = said.choices[0]
    if first.finish_reason == "tool_calls":
        assert first.message.tool_calls is not None and deltas[0].function is not None
        assert [deltas[0].function.name] == [first.message.tool_calls[0].function.name]
        assert deltas[0].function.arguments == first.message.tool_calls[0].function.arguments
        assert not any(chunk.choices[0].delta.content for chunk in chunks) and deltas[0].index == 0
    assert chunks[-1].choices[0].finish_reason == first.finish_reason
    client.close()


def test_calls_that_the_model_chose_are_read(calling: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    form = form_of(calling.served.llama.tokenizer.chat_template or "")
    assert form is not None
    calls = [("clock", {"é": [1, {"b": None}]}), ("wetter-é", {})]
    client = calling.client()
    options: Any = {"model": "tiny", "messages": MESSAGES, "tools": [CLOCK, WEATHER], "max_tokens": 300}
    with saying(calling, spelled(form, *calls), monkeypatch):
        said = client.chat.completions.create(**options)
        assert told(said.choices[0].message) == calls and said.choices[0].finish_reason == "tool_calls"
        first = client.chat.completions.create(parallel_tool_calls=False, **options)
        assert told(first.choices[0].message) == calls[:1]
        pieces = list(client.chat.completions.create(stream=True, **options))
        deltas = [call for piece in pieces for call in piece.choices[0].delta.tool_calls or []]
        assert [(one.index, one.function and one.function.name) for one in deltas] == [(0, "clock"), (1, "wetter-é")]
        plain = client.chat.completions.create(tool_choice="none", **options)
        assert plain.choices[0].message.content == spelled(form, *calls) and not plain.choices[0].message.tool_calls
    unknown = spelled(form, ("hammer", {}))
    for text in (unknown, "the cat", unknown[:-3], '{"cat": 1}', form.before + "[]" + form.after):
        with saying(calling, text, monkeypatch):
            whole = client.chat.completions.create(**options).choices[0]
            assert (whole.message.content, whole.message.tool_calls, whole.finish_reason) == (text, None, "stop")
            pieces = list(client.chat.completions.create(stream=True, **options))
            assert "".join(piece.choices[0].delta.content or "" for piece in pieces) == text
    client.close()


def test_a_conversation_with_calls_reaches_the_template(serve: Serve, llama: Llama) -> None:
    """Arguments, which OpenAI spells as text, are an object there; what is none is refused."""
    template = (
        "{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }}"
        "{% for c in m['tool_calls'] or [] %}{{ c.function.name }}={{ c.function.arguments.a }}{% endfor %}|{% endfor %}"
    )
    call = {"id": "x", "type": "function", "function": {"name": "f", "arguments": '{"a": 7}'}}
    turns = [
        *MESSAGES,
        {"role": "assistant", "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "x", "content": "on"},
    ]
    with serve() as running:
        object.__setattr__(running.served, "llama", with_template(llama, template))
        ids = running.post("/tokenize", {"messages": turns}).json()["tokens"]
        assert llama.tokenizer.decode(ids) == "[user] a mat|[assistant] f=7|[tool] on|"
        for wrong in ("{", "[1]", "7"):
            bad = {**call, "function": {"name": "f", "arguments": wrong}}
            response = running.post(
                "/v1/chat/completions", {"messages": [*MESSAGES, {"role": "assistant", "tool_calls": [bad]}]}
            )
            assert response.status_code == 400 and response.json()["error"]["param"] == "messages"


def test_an_answer_goes_back_as_the_client_got_it(calling: Running) -> None:
    """A call by force, its result, and the next answer: the conversation as OpenAI's client keeps it."""
    client = calling.client()
    options: Any = {"model": "tiny", "tools": [CLOCK], "max_tokens": 60, "temperature": 0}
    first = client.chat.completions.create(messages=MESSAGES, tool_choice="required", **options).choices[0].message
    assert first.tool_calls is not None
    result = {"role": "tool", "tool_call_id": first.tool_calls[0].id, "content": "noon"}
    second = client.chat.completions.create(messages=[*MESSAGES, first, result], **options).choices[0].message
    third = client.chat.completions.create(
        messages=[*MESSAGES, first, result, second, {"role": "user", "content": "a"}], **options
    )
    assert third.choices[0].finish_reason in ("stop", "length", "tool_calls")
    client.close()


def test_forms_are_known_by_their_templates() -> None:
    assert form_of(LLAMA_3_TEMPLATE) is LLAMA_3 and form_of(HERMES_TEMPLATE) is HERMES
    assert (
        form_of(HERMES_TEMPLATE.replace('"', '\\"')) is HERMES
        and form_of(LLAMA_3_TEMPLATE.replace('"', '\\"')) is LLAMA_3
    )
    assert form_of(TEMPLATE) is None, "it takes tools, and does not say how a call is spelled"
    assert form_of('{"name": "x", "parameters": {}}') is None, "it takes no tools"


NAMES = st.sampled_from(["clock", "wetter-é", 'q"'])
VALUES: Any = st.recursive(
    st.none() | st.booleans() | st.integers(-9, 9) | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=2),
    max_leaves=4,
)
CALLS = st.lists(st.tuples(NAMES, st.dictionaries(st.text(max_size=3), VALUES, max_size=2)), min_size=1, max_size=3)


@given(CALLS, st.sampled_from([LLAMA_3, HERMES]), st.data())
def test_what_is_spelled_is_read_and_any_other_text_stays_itself(
    calls: list[tuple[str, Any]], form: ToolForm, data: st.DataObject
) -> None:
    """In any pieces; and a text that is cut somewhere is told as it is."""
    text = spelled(form, *calls)
    names = frozenset(("clock", "wetter-é", 'q"'))
    assert calls_in(text, form, names) == [Call(*one) for one in calls]
    assert calls_in(text.replace("}; {", "}\n{"), form, names) == [Call(*one) for one in calls]
    assert calls_in(text, form, names - {calls[-1][0]}) == []
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=4)))
    reader, content = Reader(Offered(form, names)), ""
    for start, end in zip([0, *cuts], [*cuts, len(text)]):
        content += reader.read(text[start:end], None).text
    end = reader.read("", "stop")
    assert (content, end.calls, end.finish_reason) == ("", [Call(*one) for one in calls], "tool_calls")
    reader, cut = Reader(Offered(form, names)), data.draw(st.integers(0, len(text) - 1))
    shown = reader.read(text[:cut], None).text + reader.read("", "length").text
    assert shown == text[:cut]


@given(st.text(max_size=30))
def test_any_text_comes_out_of_a_reader_whole(text: str) -> None:
    for form in (LLAMA_3, HERMES):
        reader = Reader(Offered(form, frozenset(["clock"])))
        shown = "".join(reader.read(letter, None).text for letter in text)
        assert shown + reader.read("", "stop").text == text


def test_the_grammar_of_a_call_is_of_the_templates_form(llama: Llama) -> None:
    tools = [Tool.model_validate(one) for one in (WEATHER, CLOCK)]
    out = llama.generate("a", 200, temperature=1.0, seed=2, grammar=by_force(HERMES, tools))
    assert out.text.startswith('<tool_call>\n{"name": "') and '"arguments": ' in out.text
