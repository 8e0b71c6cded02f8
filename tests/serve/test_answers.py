"""What the server answers is what the library answers, streamed or not, alone or beside others."""

from __future__ import annotations

import json
import math
import threading
from typing import Any

import pytest

from llama_fast import Llama, Output
from tests.serve.conftest import Running

PROMPT = "the cat sat"
GREEDY: dict[str, Any] = {"temperature": 0}
DRAWN: dict[str, Any] = {"temperature": 0.9, "top_k": 40, "top_p": 0.95, "seed": 11}
PICKY: dict[str, Any] = {"temperature": 1.3, "min_p": 0.02, "repetition_penalty": 1.2, "seed": 5}
SETTINGS = pytest.mark.parametrize("settings", [GREEDY, DRAWN, PICKY], ids=["greedy", "drawn", "picky"])


def streamed(running: Running, path: str, body: dict[str, Any]) -> list[dict[str, Any]]:
    """The chunks of a stream, which must end as OpenAI's do."""
    with running.http as http, http.stream("POST", path, json={**body, "stream": True}) as response:
        assert response.status_code == 200 and response.headers["content-type"].startswith("text/event-stream")
        lines = [line for line in response.iter_lines() if line]
    assert lines[-1] == "data: [DONE]" and all(line.startswith("data: ") for line in lines)
    return [json.loads(line[6:]) for line in lines[:-1]]


def joined(chunks: list[dict[str, Any]]) -> dict[int, tuple[str, str | None]]:
    """Each choice's text and finish_reason."""
    found: dict[int, tuple[str, str | None]] = {}
    for chunk in chunks:
        for choice in chunk["choices"]:
            text, ended = found.get(choice["index"], ("", None))
            assert ended is None
            more = choice["text"] if "text" in choice else choice["delta"].get("content", "")
            found[choice["index"]] = text + more, choice["finish_reason"]
    return found


def alone(llama: Llama, prompt: Any, tokens: int, settings: dict[str, Any], **more: Any) -> Output:
    output = llama.generate(prompt, tokens, **settings, **more)
    assert isinstance(output, Output)
    return output


@SETTINGS
def test_a_completion_is_the_librarys_whole_and_streamed(
    running: Running, llama: Llama, settings: dict[str, Any]
) -> None:
    expected = alone(llama, PROMPT, 60, settings)
    body = {"prompt": PROMPT, "max_tokens": 60, **settings}
    answer = running.post("/v1/completions", body).json()
    (choice,) = answer["choices"]
    assert (choice["text"], choice["finish_reason"]) == (expected.text, expected.finish_reason)
    assert answer["usage"] == {
        "prompt_tokens": expected.prompt_tokens,
        "completion_tokens": len(expected.tokens),
        "total_tokens": expected.prompt_tokens + len(expected.tokens),
    }
    chunks = streamed(running, "/v1/completions", {**body, "stream_options": {"include_usage": True}})
    assert joined(chunks) == {0: (expected.text, expected.finish_reason)}
    assert chunks[-1]["choices"] == [] and chunks[-1]["usage"] == answer["usage"]
    assert all(chunk["usage"] is None for chunk in chunks[:-1])


@SETTINGS
def test_a_chat_is_the_librarys_whole_and_streamed(running: Running, llama: Llama, settings: dict[str, Any]) -> None:
    messages = [{"role": "system", "content": "saw"}, {"role": "user", "content": "a mat"}]
    expected = alone(llama, messages, 50, settings)
    parts = [
        messages[0],
        {"role": "user", "content": [{"type": "text", "text": "a "}, {"type": "text", "text": "mat"}]},
    ]
    for form in (messages, parts):
        for name in ("max_tokens", "max_completion_tokens"):
            body = {"messages": form, name: 50, **settings}
            (choice,) = running.post("/v1/chat/completions", body).json()["choices"]
            assert choice["message"]["content"] == expected.text and choice["message"]["role"] == "assistant"
            assert choice["finish_reason"] == expected.finish_reason
    chunks = streamed(running, "/v1/chat/completions", body)
    assert chunks[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert joined(chunks) == {0: (expected.text, expected.finish_reason)}


def test_a_reply_goes_on_with_last_words_of_the_assistant(running: Running, llama: Llama) -> None:
    messages = [{"role": "user", "content": "a mat"}, {"role": "assistant", "content": "the dogs"}]
    (choice,) = running.post("/v1/chat/completions", {"messages": messages, "max_tokens": 9, **GREEDY}).json()[
        "choices"
    ]
    assert choice["message"]["content"] == alone(llama, messages, 9, GREEDY).text


def test_every_row_answers_as_alone_while_others_run_beside_it(running: Running, llama: Llama) -> None:
    """Twelve clients at once and three rows: some wait, all differ in prompt, settings and length."""
    bodies = [
        {"prompt": PROMPT[: 3 + i], "max_tokens": 20 + 7 * i, **[GREEDY, DRAWN, PICKY][i % 3], "stream": i % 2 == 1}
        for i in range(12)
    ]
    texts: dict[int, str] = {}

    def ask(i: int) -> None:
        if bodies[i]["stream"]:
            texts[i] = joined(streamed(running, "/v1/completions", bodies[i]))[0][0]
        else:
            texts[i] = running.post("/v1/completions", bodies[i]).json()["choices"][0]["text"]

    clients = [threading.Thread(target=ask, args=(i,)) for i in range(len(bodies))]
    for client in clients:
        client.start()
    for client in clients:
        client.join()
    for i, body in enumerate(bodies):
        settings = {name: value for name, value in body.items() if name not in ("prompt", "max_tokens", "stream")}
        assert texts[i] == alone(llama, body["prompt"], body["max_tokens"], settings).text, i


def test_characters_that_are_split_over_tokens_come_whole(running: Running, llama: Llama) -> None:
    """The prompt ends inside a character, and the bias-free random model writes many that are cut."""
    ids = llama.encode("né€")[:-1]
    expected = alone(llama, ids, 120, {"temperature": 1.5, "seed": 3})
    assert any(ord(letter) > 127 and letter != "�" for letter in expected.text)
    chunks = streamed(running, "/v1/completions", {"prompt": ids, "max_tokens": 120, "temperature": 1.5, "seed": 3})
    assert joined(chunks)[0][0] == expected.text


def test_prompts_are_texts_or_ids_one_or_several(running: Running, llama: Llama) -> None:
    """Row b of a batch draws with seed + b, as the library's does."""
    texts = ["the cat", "dogs run home", "a"]
    outputs = llama.generate(texts, 15, **DRAWN)
    assert isinstance(outputs, list)
    for prompt in (texts, [llama.encode(text) for text in texts]):
        answer = running.post("/v1/completions", {"prompt": prompt, "max_tokens": 15, **DRAWN}).json()
        assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2]
        assert [choice["text"] for choice in answer["choices"]] == [output.text for output in outputs]
        assert answer["usage"]["prompt_tokens"] == sum(output.prompt_tokens for output in outputs)
    (choice,) = running.post("/v1/completions", {"prompt": llama.encode("a"), "max_tokens": 15, **GREEDY}).json()[
        "choices"
    ]
    assert choice["text"] == alone(llama, "a", 15, GREEDY).text


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
def test_n_choices_draw_with_the_seeds_that_follow(running: Running, llama: Llama, path: str) -> None:
    messages = [{"role": "user", "content": PROMPT}]
    given: dict[str, Any] = {"prompt": PROMPT} if path == "/v1/completions" else {"messages": messages}
    expected = [alone(llama, next(iter(given.values())), 12, {**DRAWN, "seed": 11 + i}).text for i in range(4)]
    assert len(set(expected)) == 4
    body = {**given, "max_tokens": 12, "n": 4, **DRAWN}
    choices = running.post(path, body).json()["choices"]
    assert [choice.get("text", choice.get("message", {}).get("content")) for choice in choices] == expected
    found = joined(streamed(running, path, body))
    assert [found[i][0] for i in range(4)] == expected


def test_best_of_tells_the_likeliest_first(running: Running, llama: Llama) -> None:
    rows = [alone(llama, PROMPT, 10, {"temperature": 1.2, "seed": 30 + i}, logprobs=0) for i in range(5)]
    means = [sum(one.logprob for one in row.logprobs or []) / len(row.tokens) for row in rows]
    order = sorted(range(5), key=lambda i: -means[i])
    body = {"prompt": PROMPT, "max_tokens": 10, "temperature": 1.2, "seed": 30, "n": 2, "best_of": 5}
    answer = running.post("/v1/completions", body).json()
    assert [choice["text"] for choice in answer["choices"]] == [rows[i].text for i in order[:2]]
    assert [choice["index"] for choice in answer["choices"]] == [0, 1] and order[:2] != [0, 1]
    assert answer["usage"]["completion_tokens"] == sum(len(row.tokens) for row in rows)
    assert all(choice["logprobs"] is None for choice in answer["choices"])


def test_logprobs_are_the_librarys(running: Running, llama: Llama) -> None:
    expected = alone(llama, PROMPT, 12, DRAWN, logprobs=3).logprobs
    assert expected is not None
    body = {"prompt": PROMPT, "max_tokens": 12, "logprobs": 3, **DRAWN}
    told = running.post("/v1/completions", body).json()["choices"][0]["logprobs"]
    assert told["token_logprobs"] == pytest.approx([one.logprob for one in expected], abs=1e-5)
    assert len(told["tokens"]) == len(told["top_logprobs"]) == len(told["text_offset"]) == len(expected) > 3
    for top, one, token in zip(told["top_logprobs"], expected, told["tokens"], strict=True):
        assert sorted(top.values())[-3:] == pytest.approx(sorted(one.top.values()), abs=1e-5)
        assert top[token] == pytest.approx(one.logprob, abs=1e-5)  # the chosen one is always among them
    pieces = [chunk["choices"][0]["logprobs"] for chunk in streamed(running, "/v1/completions", body)]
    for name in ("tokens", "token_logprobs", "top_logprobs", "text_offset"):
        assert [one for piece in pieces if piece for one in piece[name]] == told[name]
    messages = [{"role": "user", "content": PROMPT}]
    wanted = alone(llama, messages, 7, DRAWN, logprobs=2).logprobs
    assert wanted is not None
    chat = {"messages": messages, "max_tokens": 7, "logprobs": True, "top_logprobs": 2, **DRAWN}
    content = running.post("/v1/chat/completions", chat).json()["choices"][0]["logprobs"]["content"]
    assert [one["logprob"] for one in content] == pytest.approx([one.logprob for one in wanted], abs=1e-5)
    for one, other in zip(content, wanted, strict=True):
        assert [top["logprob"] for top in one["top_logprobs"]] == pytest.approx(list(other.top.values()), abs=1e-5)
        assert one["bytes"] is None or bytes(one["bytes"]).decode() == one["token"]
    chat.pop("top_logprobs")
    content = running.post("/v1/chat/completions", chat).json()["choices"][0]["logprobs"]["content"]
    assert len(content) == len(wanted) and all(one["top_logprobs"] == [] for one in content)


def test_echo_scores_the_prompt_as_the_library_does(running: Running, llama: Llama) -> None:
    ids = llama.encode("the dogs saw a mat")
    (expected,) = llama.score_ids([ids])
    for prompt in ("the dogs saw a mat", ids):
        body = {"prompt": prompt, "max_tokens": 0, "echo": True, "logprobs": 2, **GREEDY}
        answer = running.post("/v1/completions", body).json()
        (choice,) = answer["choices"]
        assert choice["text"] == "the dogs saw a mat" and choice["finish_reason"] == "length"
        assert answer["usage"]["completion_tokens"] == 0
        told = choice["logprobs"]
        assert told["token_logprobs"][0] is None and told["top_logprobs"][0] is None
        assert told["token_logprobs"][1:] == pytest.approx(expected.logprobs, abs=1e-5)
        assert [
            math.isclose(max(top.values()), one) for top, one in zip(told["top_logprobs"][1:], expected.logprobs)
        ] == (expected.greedy)
        assert "".join(told["tokens"]) == "<s>the dogs saw a mat"
        assert told["text_offset"] == [0, *[len("".join(told["tokens"][1:i])) for i in range(1, len(ids))]]
    more = {**body, "max_tokens": 5}
    (choice,) = running.post("/v1/completions", more).json()["choices"]
    assert choice["text"] == "the dogs saw a mat" + alone(llama, ids, 5, GREEDY).text
    assert len(choice["logprobs"]["tokens"]) == len(ids) + 5
    chunks = streamed(running, "/v1/completions", more)
    assert joined(chunks)[0][0] == choice["text"]
    assert sum(len(chunk["choices"][0]["logprobs"]["tokens"]) for chunk in chunks) == len(ids) + 5


def test_a_stop_string_that_spans_pieces_ends_a_text(running: Running, llama: Llama) -> None:
    free = alone(llama, PROMPT, 60, GREEDY)
    writer, pieces = llama.writer(llama.encode(PROMPT)), []
    for token in free.tokens:
        pieces.append(writer.push(token))
    at = next(i for i in range(8, 50) if pieces[i] and pieces[i + 1] and "�" not in pieces[i] + pieces[i + 1])
    stop = pieces[at][-1] + pieces[at + 1][0]
    expected = alone(llama, PROMPT, 60, GREEDY, stop=["never", stop])
    assert expected.finish_reason == "stop" and stop not in expected.text
    body = {"prompt": PROMPT, "max_tokens": 60, "stop": ["never", stop], **GREEDY}
    (choice,) = running.post("/v1/completions", body).json()["choices"]
    assert (choice["text"], choice["finish_reason"]) == (expected.text, "stop")
    assert joined(streamed(running, "/v1/completions", body)) == {0: (expected.text, "stop")}


def test_a_stop_id_ends_a_text_and_is_not_shown(running: Running, llama: Llama) -> None:
    free = alone(llama, PROMPT, 40, {"temperature": 1.0, "seed": 8})
    at = next(
        i for i in range(5, 40) if free.tokens[i] not in free.tokens[:i] and llama.decode([free.tokens[i]]) != "�"
    )
    body = {"prompt": PROMPT, "max_tokens": 40, "temperature": 1.0, "seed": 8, "stop_token_ids": [free.tokens[at]]}
    answer = running.post("/v1/completions", body).json()
    (choice,) = answer["choices"]
    assert choice["finish_reason"] == "stop" and answer["usage"]["completion_tokens"] == at + 1
    assert choice["text"] == alone(llama, PROMPT, at, {"temperature": 1.0, "seed": 8}).text


def test_ignore_eos_goes_on(running: Running) -> None:
    """Among many draws some end early; with ignore_eos none does."""
    body = {"prompt": PROMPT, "max_tokens": 100, "temperature": 2, "n": 12, "seed": 1}
    ended = running.post("/v1/completions", body).json()["choices"]
    assert {choice["finish_reason"] for choice in ended} == {"stop", "length"}
    answer = running.post("/v1/completions", {**body, "ignore_eos": True}).json()
    assert {choice["finish_reason"] for choice in answer["choices"]} == {"length"}
    assert answer["usage"]["completion_tokens"] == 1200
    assert not any("</s>" in choice["text"] for choice in answer["choices"])


def test_tools_reach_the_template(running: Running, llama: Llama) -> None:
    tools = [{"type": "function", "function": {"name": "look", "parameters": {"type": "object"}}}]
    messages = [{"role": "user", "content": "a"}]
    plain = llama.encode(messages)
    for more, with_tools in (({"tools": tools}, True), ({"tools": tools, "tool_choice": "none"}, False), ({}, False)):
        body = {"messages": messages, "max_tokens": 1, **more}
        used = running.post("/v1/chat/completions", body).json()["usage"]["prompt_tokens"]
        assert (used > len(plain) + 20) is with_tools and (used == len(plain)) is not with_tools


def test_a_chat_without_a_limit_takes_the_room_there_is(running: Running, llama: Llama) -> None:
    words = 1990 * 100 // len(llama.encode(" mat" * 100))
    messages = [{"role": "user", "content": " mat" * words}]
    answer = running.post("/v1/chat/completions", {"messages": messages, "ignore_eos": True, **GREEDY}).json()
    assert answer["usage"]["total_tokens"] == running.served.length


def test_a_seed_is_drawn_where_none_is_given(running: Running) -> None:
    texts = {
        running.post("/v1/completions", {"prompt": "a", "max_tokens": 20}).json()["choices"][0]["text"]
        for _ in range(3)
    }
    assert len(texts) == 3


def test_tokenize_and_detokenize_are_the_tokenizers(running: Running, llama: Llama) -> None:
    text = "the cat é€ saw"
    told = running.post("/tokenize", {"prompt": text}).json()
    assert told == {"tokens": llama.encode(text), "count": len(llama.encode(text)), "max_model_len": 2048}
    assert (
        running.post("/tokenize", {"prompt": text, "add_special_tokens": False}).json()["tokens"] == told["tokens"][1:]
    )
    messages = [{"role": "user", "content": "a"}]
    assert running.post("/tokenize", {"messages": messages}).json()["tokens"] == llama.encode(messages)
    assert running.post("/detokenize", {"tokens": told["tokens"]}).json() == {"prompt": "<s>" + text}
    assert running.post("/detokenize", {"tokens": []}).json() == {"prompt": ""}


def test_openais_client_is_served(running: Running, llama: Llama) -> None:
    client = running.client()
    assert [model.id for model in client.models.list()] == ["tiny"] and client.models.retrieve("tiny").id == "tiny"
    expected = alone(llama, PROMPT, 20, GREEDY).text
    whole = client.completions.create(model="tiny", prompt=PROMPT, max_tokens=20, temperature=0)
    assert whole.choices[0].text == expected and whole.usage is not None and whole.usage.completion_tokens == 20
    pieces = client.completions.create(model="tiny", prompt=PROMPT, max_tokens=20, temperature=0, stream=True)
    assert "".join(piece.choices[0].text for piece in pieces) == expected
    messages: Any = [{"role": "user", "content": PROMPT}]
    reply = alone(llama, messages, 20, GREEDY).text
    said = client.chat.completions.create(model="tiny", messages=messages, max_tokens=20, temperature=0, logprobs=True)
    assert said.choices[0].message.content == reply
    chunks = list(
        client.chat.completions.create(
            model="tiny",
            messages=messages,
            max_tokens=20,
            temperature=0,
            stream=True,
            stream_options={"include_usage": True},
        )
    )
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == reply
    assert chunks[-1].usage is not None and chunks[-1].usage.completion_tokens == 20
    client.close()


def test_the_page_asks_no_other_host(running: Running) -> None:
    with running.http as http:
        response = http.get("/")
    assert response.status_code == 200 and "<title>llama-fast</title>" in response.text
    assert "http://" not in response.text and "https://" not in response.text and "src=" not in response.text
    assert "default-src 'none'" in response.headers["content-security-policy"]


def test_metrics_count_what_was_done(running: Running) -> None:
    names = (
        "prompt_tokens_total",
        "generated_tokens_total",
        "first_token_seconds_count",
        "between_tokens_seconds_count",
    )
    before = [running.count(name) for name in names]
    running.post("/v1/completions", {"prompt": [1, 2, 3, 4, 5], "max_tokens": 9, "ignore_eos": True, "n": 2})
    assert [running.count(name) - old for name, old in zip(names, before)] == [10, 18, 2, 16]
    with running.http as http:
        page = http.get("/metrics")
    assert page.headers["content-type"].startswith("text/plain")
    assert 'llama_fast_requests_total{path="/v1/completions",status="200"}' in page.text
    assert "llama_fast_rows 3.0" in page.text and "llama_fast_queue_rows 0.0" in page.text
