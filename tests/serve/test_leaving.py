"""Clients that leave, servers that stop, engines that fail: rows become free, and clients are told."""

from __future__ import annotations

import json
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import httpx
import pytest

from llama_fast import Llama
from llama_fast.ladder import cli
from llama_ref.checkpoint import random_checkpoint, save_checkpoint
from llama_ref.config import LlamaConfig
from llama_ref.tokenizers.tokenizer import RandomTokenizer
from tests.serve.conftest import Running, Serve, until

PATH = "/v1/completions"
ENDLESS: dict[str, Any] = {"prompt": "the cat", "max_tokens": 2000, "ignore_eos": True}


class Leaver:
    """A client that sends a request and hangs up when it is told to."""

    def __init__(self, running: Running, body: dict[str, Any], path: str = PATH):
        host, port = running.url.removeprefix("http://").split(":")
        self.socket = socket.create_connection((host, int(port)), timeout=20)
        content = json.dumps(body).encode()
        head = f"POST {path} HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: {len(content)}\r\n\r\n"
        self.socket.sendall(head.encode() + content)

    def leave(self) -> None:
        self.socket.close()


@pytest.mark.parametrize("body", [ENDLESS, {**ENDLESS, "n": 3}], ids=["one row", "three rows"])
@pytest.mark.parametrize("stream", [True, False], ids=["streamed", "whole"])
def test_a_client_that_hangs_up_frees_its_rows(running: Running, stream: bool, body: dict[str, Any]) -> None:
    until(running.is_empty)
    before = running.count("generated_tokens_total"), running.count("cancelled_rows_total")
    client = Leaver(running, {**body, "stream": stream})
    until(lambda: running.count("generated_tokens_total") > before[0] + 20)
    assert running.count("rows_in_use") == body.get("n", 1)
    client.leave()
    until(running.is_empty)
    assert running.count("generated_tokens_total") - before[0] < 1900
    assert running.count("cancelled_rows_total") - before[1] == body.get("n", 1)


def test_a_client_that_hangs_up_while_it_waits_is_forgotten(running: Running) -> None:
    holders = [Leaver(running, {**ENDLESS, "stream": True}) for _ in range(3)]
    until(lambda: running.count("rows_in_use") == 3)
    waiting = [Leaver(running, {**ENDLESS, "stream": stream}) for stream in (True, False)]
    until(lambda: running.count("queue_rows") == 2)
    for client in waiting:
        client.leave()
    until(lambda: running.count("queue_rows") == 0)
    assert running.count("rows_in_use") == 3
    for client in holders:
        client.leave()
    until(running.is_empty)


def test_clients_come_at_random_and_vanish_and_nothing_is_left(serve: Serve, llama: Llama) -> None:
    """Eight clients, each five requests, half of which hang up; the others' texts are right."""
    expected = {tokens: llama.generate("the cat", tokens).text for tokens in range(1, 41)}  # type: ignore[union-attr]
    wrong: list[object] = []
    with serve(rows=3) as running:

        def visit(seed: int) -> None:
            chance = random.Random(seed)
            for _ in range(5):
                time.sleep(chance.random() / 50)
                if chance.random() < 0.5:
                    client = Leaver(running, {**ENDLESS, "stream": chance.random() < 0.5})
                    time.sleep(chance.random() / 20)
                    client.leave()
                    continue
                tokens = chance.randint(1, 40)
                body = {"prompt": "the cat", "max_tokens": tokens, "temperature": 0, "n": chance.randint(1, 2)}
                answer = running.post(PATH, body).json()
                if {choice["text"] for choice in answer["choices"]} != {expected[tokens]}:
                    wrong.append(answer)

        clients = [threading.Thread(target=visit, args=(seed,)) for seed in range(8)]
        for client in clients:
            client.start()
        for client in clients:
            client.join()
        until(running.is_empty)
        assert not wrong
        assert running.count("rows_in_use") == running.count("queue_rows") == 0
        assert (
            running.post(PATH, {"prompt": "the cat", "max_tokens": 9, "temperature": 0}).json()["choices"][0]["text"]
            == (expected[9])
        )


def test_a_server_that_stops_lets_short_answers_end_and_tells_the_others(
    serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("llama_fast.serve.server.GRACE_SECONDS", 0.2)
    answers: dict[str, Any] = {}
    with serve() as running:

        def ask(name: str, body: dict[str, Any]) -> None:
            answers[name] = running.post(PATH, body)

        bodies = {"whole": ENDLESS, "streamed": {**ENDLESS, "stream": True}}
        clients = [threading.Thread(target=ask, args=item) for item in bodies.items()]
        for client in clients:
            client.start()
        until(lambda: running.count("rows_in_use") == 2)
        began = time.monotonic()
        running.server.should_exit = True
        for client in clients:
            client.join()
        assert time.monotonic() - began < 5
    assert answers["whole"].status_code == 503 and answers["whole"].json()["error"]["code"] == "stopping"
    last = [line for line in answers["streamed"].text.split("\n") if line][-1]
    assert json.loads(last.removeprefix("data: "))["error"]["code"] == "stopping"


def test_an_engine_that_fails_is_told_and_ends_the_server(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    with serve() as running:
        client = Leaver(running, ENDLESS)
        until(lambda: running.count("rows_in_use") == 1)

        def fail() -> None:
            raise RuntimeError("the device\nis gone")

        monkeypatch.setattr(running.served.thread.engine, "step", fail)
        assert client.socket.recv(2000).startswith(b"HTTP/1.1 500 ")
        until(lambda: running.server.should_exit)
        client.leave()
    assert running.served.thread.failure == "RuntimeError: the device is gone"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = LlamaConfig(48, 2, 6, 2, 10, 72, 259, 100_000)
    place = tmp_path_factory.mktemp("model") / "model"
    save_checkpoint(place, config, random_checkpoint(config, 3).weights, tokenizer=RandomTokenizer(259, None, ()))
    return place


def command(*words: str) -> list[str]:
    return [sys.executable, "-m", "llama_fast", "serve", "--device", "cpu", *words]


def test_ctrl_c_ends_the_command_within_seconds(model: Path) -> None:
    words = command("--model", str(model), "--port", "0", "--name", "x", "--length", "90000", "--rows", "2")
    process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    line = process.stdout.readline()
    assert line.startswith("x at http://127.0.0.1:") and line.endswith(": 2 rows of 90000 positions\n")
    url = line.split(" at ")[1].split(": ")[0]
    with httpx.Client(base_url=url, trust_env=False, timeout=60) as http:
        assert http.get("/health").json() == {"status": "ok"}
        body = {"prompt": "abc", "max_tokens": 80_000, "stream": True}
        with http.stream("POST", PATH, json=body) as response:
            lines = response.iter_lines()
            next(lines)
            began = time.monotonic()
            process.send_signal(signal.SIGINT)
            rest = [line for line in lines if line]
    assert "stopping" in rest[-1]
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out, err) == (130, "", "")
    assert time.monotonic() - began < 15  # 3.6 s where the machine is free


def test_what_cannot_be_served_is_one_line(model: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        done = subprocess.run(command("--model", str(model), "--port", port), capture_output=True, text=True)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith(f"error: cannot listen at 127.0.0.1:{port}") and done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        ({"cache": "growing"}, "unknown cache 'growing' .known: static, paged."),
        ({"cache": "static", "cache_tokens": 64}, "--cache-tokens is for a paged cache"),
        (
            {"compile": True, "cache_tokens": 64, "device": "cpu"},
            "--cache-tokens is for a paged cache: say --cache paged",
        ),
    ],
)
def test_a_cache_that_cannot_be_is_refused_before_the_model_is_sought(flags: dict[str, Any], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        cli.serve(model="no/such/model", **flags)
