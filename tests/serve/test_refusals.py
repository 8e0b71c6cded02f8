"""Bad requests get OpenAI's error body, the right status, and the name of the field; nothing is a traceback or a 500."""

from __future__ import annotations

import json
from typing import Any

import httpx
import pytest
from openai import AuthenticationError, BadRequestError, NotFoundError

from llama_fast.serve.door import Limits
from tests.serve.conftest import Running, Serve, until

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
MESSAGES = [{"role": "user", "content": "a"}]
TOOL = {"type": "function", "function": {"name": "look", "parameters": {"type": "object"}}}


def form(schema: Any) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}


FORMAT = form({"type": "object"})

MALFORMED: list[tuple[str, dict[str, Any], str]] = [
    (COMPLETIONS, {}, "prompt"),
    (COMPLETIONS, {"prompt": []}, "prompt"),
    (COMPLETIONS, {"prompt": [[]]}, "prompt"),
    (COMPLETIONS, {"prompt": [1, "a"]}, "prompt"),
    (COMPLETIONS, {"prompt": [1, True]}, "prompt"),
    (COMPLETIONS, {"prompt": {"text": "a"}}, "prompt"),
    (COMPLETIONS, {"prompt": [-1]}, "prompt"),
    (COMPLETIONS, {"prompt": [5, 99999]}, "prompt"),
    (COMPLETIONS, {"prompt": "half \ud800"}, "prompt"),
    (COMPLETIONS, {"prompt": "a " * 9000}, "prompt"),
    (COMPLETIONS, {"prompt": "a", "max_tokens": -1}, "max_tokens"),
    (COMPLETIONS, {"prompt": "a", "max_tokens": 0}, "max_tokens"),
    (COMPLETIONS, {"prompt": "a", "max_tokens": "9"}, "max_tokens"),
    (COMPLETIONS, {"prompt": "a", "max_tokens": 1.5}, "max_tokens"),
    (COMPLETIONS, {"prompt": "a", "max_tokens": 100_000}, "max_tokens"),
    (COMPLETIONS, {"prompt": "a", "temperature": "hot"}, "temperature"),
    (COMPLETIONS, {"prompt": "a", "temperature": -0.1}, "temperature"),
    (COMPLETIONS, {"prompt": "a", "temperature": True}, "temperature"),
    (COMPLETIONS, {"prompt": "a", "top_p": 0}, "top_p"),
    (COMPLETIONS, {"prompt": "a", "top_k": -2}, "top_k"),
    (COMPLETIONS, {"prompt": "a", "min_p": 1.1}, "min_p"),
    (COMPLETIONS, {"prompt": "a", "repetition_penalty": 0}, "repetition_penalty"),
    (COMPLETIONS, {"prompt": "a", "seed": 2**64}, "seed"),
    (COMPLETIONS, {"prompt": "a", "n": 0}, "n"),
    (COMPLETIONS, {"prompt": "a", "n": 100}, "n"),
    (COMPLETIONS, {"prompt": "a", "n": 3, "best_of": 2}, "best_of"),
    (COMPLETIONS, {"prompt": "a", "best_of": 2, "stream": True}, "best_of"),
    (COMPLETIONS, {"prompt": "a", "logprobs": 21}, "logprobs"),
    (COMPLETIONS, {"prompt": "a", "stop": ""}, "stop"),
    (COMPLETIONS, {"prompt": "a", "stop": [1]}, "stop"),
    (COMPLETIONS, {"prompt": "a", "stop": ["x"] * 17}, "stop"),
    (COMPLETIONS, {"prompt": "a", "stop_token_ids": ["x"]}, "stop_token_ids"),
    (COMPLETIONS, {"prompt": "a", "stream": "yes"}, "stream"),
    (COMPLETIONS, {"prompt": "a", "stream_options": {"include_usage": True}}, "stream_options"),
    (COMPLETIONS, {"prompt": "a", "stream": True, "stream_options": {"x": 1}}, "stream_options"),
    (COMPLETIONS, {"prompt": "a", "frequency_penalty": 2.1}, "frequency_penalty"),
    (COMPLETIONS, {"prompt": "a", "presence_penalty": -2.1}, "presence_penalty"),
    (COMPLETIONS, {"prompt": "a", "presence_penalty": "1"}, "presence_penalty"),
    (COMPLETIONS, {"prompt": "a", "logit_bias": {"5": 100.1}}, "logit_bias"),
    (COMPLETIONS, {"prompt": "a", "logit_bias": {"five": 1}}, "logit_bias"),
    (COMPLETIONS, {"prompt": "a", "logit_bias": {"-5": 1}}, "logit_bias"),
    (COMPLETIONS, {"prompt": "a", "logit_bias": {"99999": 1}}, "logit_bias"),
    (COMPLETIONS, {"prompt": "a", "logit_bias": [5]}, "logit_bias"),
    (COMPLETIONS, {"prompt": "a", "guided_regex": "a"}, "guided_regex"),
    (COMPLETIONS, {"prompt": "a", "structured_outputs": {}}, "structured_outputs"),
    (COMPLETIONS, {"prompt": "a", "structured_outputs": {"regex": "a", "choice": ["b"]}}, "structured_outputs"),
    (COMPLETIONS, {"prompt": "a", "structured_outputs": {"regex": "("}}, "structured_outputs"),
    (COMPLETIONS, {"prompt": "a", "structured_outputs": {"regex": "a\\1"}}, "structured_outputs"),
    (COMPLETIONS, {"prompt": "a", "structured_outputs": {"choice": []}}, "structured_outputs"),
    (COMPLETIONS, {"prompt": "a", "structured_outputs": {"grammar": "start: x"}}, "structured_outputs"),
    (COMPLETIONS, {"prompt": "a", "structured_outputs": {"json": "{"}}, "structured_outputs"),
    (COMPLETIONS, {"prompt": "a", "structured_outputs": {"whitespace_pattern": " "}}, "structured_outputs"),
    (
        COMPLETIONS,
        {"prompt": "a", "structured_outputs": {"regex": "a"}, "response_format": FORMAT},
        "structured_outputs",
    ),
    (COMPLETIONS, {"prompt": "a", "structured_outputs": {"regex": "a"}, "stop": "b"}, "stop"),
    (COMPLETIONS, {"prompt": "a", "response_format": FORMAT, "stop_token_ids": [5]}, "stop_token_ids"),
    (COMPLETIONS, {"prompt": "a", "suffix": "b"}, "suffix"),
    (COMPLETIONS, {"prompt": "a", "temprature": 1}, "temprature"),
    (COMPLETIONS, {"prompt": "a", "messages": MESSAGES}, "messages"),
    (CHAT, {}, "messages"),
    (CHAT, {"messages": []}, "messages"),
    (CHAT, {"messages": "hello"}, "messages"),
    (CHAT, {"messages": [{"content": "a"}]}, "messages"),
    (CHAT, {"messages": [{"role": "king", "content": "a"}]}, "messages"),
    (CHAT, {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}]}, "messages"),
    (CHAT, {"messages": MESSAGES, "top_logprobs": 2}, "top_logprobs"),
    (CHAT, {"messages": MESSAGES, "logprobs": 2}, "logprobs"),
    (CHAT, {"messages": MESSAGES, "max_tokens": 0}, "max_tokens"),
    (CHAT, {"messages": MESSAGES, "max_tokens": 5, "max_completion_tokens": 6}, "max_tokens"),
    (CHAT, {"messages": MESSAGES, "response_format": "json"}, "response_format"),
    (CHAT, {"messages": MESSAGES, "response_format": {"type": "xml"}}, "response_format"),
    (CHAT, {"messages": MESSAGES, "response_format": {"type": "json_schema"}}, "response_format"),
    (CHAT, {"messages": MESSAGES, "response_format": form([])}, "response_format"),
    (CHAT, {"messages": MESSAGES, "response_format": form({"not": {}})}, "response_format"),
    (CHAT, {"messages": MESSAGES, "response_format": form({"type": "array", "uniqueItems": True})}, "response_format"),
    (CHAT, {"messages": MESSAGES, "response_format": form({"oneOf": [{}, {"type": "null"}]})}, "response_format"),
    (CHAT, {"messages": MESSAGES, "response_format": form({"$ref": "#/$defs/a"})}, "response_format"),
    (CHAT, {"messages": MESSAGES, "response_format": form({"$ref": "http://127.0.0.1:1/a"})}, "response_format"),
    (
        CHAT,
        {"messages": MESSAGES, "response_format": form({"type": "integer", "minimum": 2, "maximum": 1})},
        "response_format",
    ),
    (CHAT, {"messages": MESSAGES, "response_format": form({"const": "\ud800"})}, "response_format"),
    (CHAT, {"messages": MESSAGES, "response_format": FORMAT, "tools": [TOOL]}, "response_format"),
    (CHAT, {"messages": MESSAGES, "tools": [TOOL], "tool_choice": "required"}, "tool_choice"),
    (CHAT, {"messages": MESSAGES, "tool_choice": {"type": "function", "function": {"name": "look"}}}, "tool_choice"),
    (CHAT, {"messages": MESSAGES, "tools": [TOOL, TOOL]}, "tools"),
    (CHAT, {"messages": MESSAGES, "tools": [{"type": "function"}]}, "tools"),
    (CHAT, {"messages": MESSAGES, "tools": [], "tool_choice": "required"}, "tool_choice"),
    (CHAT, {"messages": MESSAGES, "tools": "hammer"}, "tools"),
    (CHAT, {"messages": [{"role": "user", "content": "mat " * 5000}]}, "messages"),
    ("/tokenize", {}, "prompt"),
    ("/tokenize", {"prompt": "a", "messages": MESSAGES}, "prompt"),
    ("/tokenize", {"prompt": 5}, "prompt"),
    ("/detokenize", {"tokens": "a"}, "tokens"),
    ("/detokenize", {"tokens": [100_000]}, "tokens"),
]


def refusal(response: httpx.Response) -> dict[str, Any]:
    """The error of a refusal, whose body has OpenAI's form."""
    body = response.json()
    assert body.keys() == {"error"} and body["error"].keys() == {"message", "type", "param", "code"}
    assert body["error"]["message"] and body["error"]["type"] and "\n" not in body["error"]["message"]
    error: dict[str, Any] = body["error"]
    return error


@pytest.mark.parametrize(("path", "body", "field"), MALFORMED)
def test_a_malformed_request_is_refused_by_its_field(running: Running, path: str, body: Any, field: str) -> None:
    with running.http as http:
        response = http.post(path, content=json.dumps(body), headers={"content-type": "application/json"})
    error = refusal(response)
    assert (response.status_code, error["param"]) == (400, field)
    assert error["message"].startswith(field) and error["type"] == "invalid_request_error"


def test_what_asks_for_nothing_is_taken(running: Running) -> None:
    nothing = {
        "frequency_penalty": 0, "presence_penalty": 0.0, "logit_bias": {}, "response_format": {"type": "text"},
        "stop": None, "seed": None, "n": None, "top_k": -1, "user": "me", "metadata": {"a": "b"}, "store": False,
        "stop_token_ids": [], "max_tokens": 3.0, "temperature": 1,
    }  # fmt: skip
    assert running.post(COMPLETIONS, {"prompt": "a", "suffix": None, "best_of": None, **nothing}).status_code == 200
    assert running.post(CHAT, {"messages": MESSAGES, "tools": [], "tool_choice": "none", **nothing}).status_code == 200


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"[]", b"null", b'"a"', b"\xff", b'{"prompt": NaN}', b"[" * 100_000, b'{"seed": ' + b"9" * 5000],
)
def test_what_is_no_json_object_is_refused(running: Running, content: bytes) -> None:
    with running.http as http:
        response = http.post(COMPLETIONS, content=content, headers={"content-type": "application/json"})
    assert response.status_code == 400 and refusal(response)


@pytest.mark.parametrize("field", ["temperature", "top_p", "min_p", "repetition_penalty", "frequency_penalty"])
@pytest.mark.parametrize("value", ["NaN", "1e999", "-Infinity"])
def test_what_is_no_number_is_refused(running: Running, field: str, value: str) -> None:
    with running.http as http:
        content = f'{{"prompt": "a", "{field}": {value}}}'
        response = http.post(COMPLETIONS, content=content, headers={"content-type": "application/json"})
    assert (response.status_code, refusal(response)["param"]) == (400, field)


def test_unknown_paths_methods_types_and_models_are_told(running: Running) -> None:
    with running.http as http:
        responses = {
            404: [http.get("/v1/nothing"), http.get("/v1/models/other"), http.get("/docs")],
            405: [http.get(COMPLETIONS), http.put("/health"), http.delete("/v1/models")],
            400: [http.post(COMPLETIONS, content=b'{"prompt": "a"}', headers={"content-type": "text/plain"})],
        }
    for status, found in responses.items():
        for response in found:
            assert response.status_code == status and refusal(response)
    response = running.post(COMPLETIONS, {"prompt": "a", "model": "other"})
    error = refusal(response)
    assert (response.status_code, error["param"], error["code"]) == (404, "model", "model_not_found")


def test_openais_client_raises_what_it_should(running: Running) -> None:
    client = running.client()
    with pytest.raises(BadRequestError) as refused:
        client.completions.create(model="tiny", prompt="a", frequency_penalty=3)
    assert refused.value.param == "frequency_penalty"
    with pytest.raises(NotFoundError):
        client.completions.create(model="other", prompt="a")
    client.close()


def test_the_key_opens_all_but_the_page_and_the_health_check(serve: Serve) -> None:
    with serve(api_key="secret") as running:
        with running.http as http:
            for given in (
                {},
                {"authorization": "Bearer wrong"},
                {"authorization": "secret"},
                {"authorization": "Bearer sécret"},
            ):
                head = {name: value.encode() for name, value in given.items()}
                responses = [http.get("/v1/models", headers=head), http.get("/metrics", headers=head)]
                responses.append(http.post(COMPLETIONS, json={"prompt": "a"}, headers=head))
                for response in responses:
                    assert response.status_code == 401 and refusal(response)["code"] == "invalid_api_key"
            assert http.get("/").status_code == http.get("/health").status_code == 200
            assert http.get("/metrics", headers={"authorization": "Bearer secret"}).status_code == 200
        client, stranger = running.client(api_key="secret"), running.client(api_key="other")
        assert client.completions.create(model="tiny", prompt="a").choices
        with pytest.raises(AuthenticationError):
            stranger.models.list()
        client.close()
        stranger.close()


def test_a_body_that_is_too_large_is_refused(serve: Serve) -> None:
    with serve(limits=Limits(max_body=1000)) as running, running.http as http:
        told = http.post(COMPLETIONS, json={"prompt": "a" * 1001})
        chunked = http.post(COMPLETIONS, content=iter([b'{"prompt": "', b"a" * 900, b"a" * 900, b'"}']),
                            headers={"content-type": "application/json"})  # fmt: skip
        for response in (told, chunked):
            assert response.status_code == 413 and "1000 bytes" in refusal(response)["message"]
        assert http.post(COMPLETIONS, json={"prompt": "a" * 900}).status_code == 200


def test_a_body_that_does_not_come_is_not_waited_for(serve: Serve) -> None:
    import socket

    with serve(limits=Limits(timeout=0.3)) as running:
        host, port = running.url.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port)), timeout=10) as slow:
            slow.sendall(b"POST /v1/completions HTTP/1.1\r\nhost: a\r\ncontent-type: application/json\r\n")
            slow.sendall(b'content-length: 50\r\n\r\n{"prompt"')
            assert slow.recv(1000).startswith(b"HTTP/1.1 408 ")


def test_a_full_queue_is_told_at_once(serve: Serve) -> None:
    endless = {"prompt": "a", "max_tokens": 2000, "ignore_eos": True, "stream": True}
    with serve(rows=1, limits=Limits(max_queue=1)) as running, running.http as http:
        with http.stream("POST", COMPLETIONS, json=endless), http.stream("POST", COMPLETIONS, json=endless):
            until(lambda: running.count("queue_rows") == 1 and running.count("rows_in_use") == 1)
            for stream in (False, True):
                response = running.post(COMPLETIONS, {"prompt": "a", "stream": stream})
                assert response.status_code == 429 and refusal(response)["code"] == "queue_full"
                assert response.headers["retry-after"] == "1"
            scored = running.post(COMPLETIONS, {"prompt": "ab", "echo": True, "logprobs": 1, "max_tokens": 0})
            assert scored.status_code == 429
        until(running.is_empty)
        assert running.post(COMPLETIONS, {"prompt": "a"}).status_code == 200


def test_a_request_that_takes_too_long_is_cancelled_and_told(serve: Serve) -> None:
    endless = {"prompt": "a", "max_tokens": 2000, "ignore_eos": True, "n": 3}
    with serve(rows=2, limits=Limits(timeout=0.2)) as running:
        response = running.post(COMPLETIONS, endless)
        assert response.status_code == 408 and refusal(response)["code"] == "timeout"
        assert response.headers["x-should-retry"] == "false"
        until(running.is_empty)
        with running.http as http, http.stream("POST", COMPLETIONS, json={**endless, "stream": True}) as streamed:
            last = [line for line in streamed.iter_lines() if line][-1]
        assert json.loads(last.removeprefix("data: "))["error"]["code"] == "timeout"
        until(running.is_empty)
