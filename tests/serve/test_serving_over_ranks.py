"""A server of several ranks: its texts are those of one process, and it ends everywhere, soon, and in one line."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from llama_fast import Llama
from llama_ref.checkpoint import save_checkpoint
from tests.parallel.launched import Launched, errors

PATH = "/v1/completions"
ENDLESS: dict[str, Any] = {"prompt": "the cat", "max_tokens": 2000, "ignore_eos": True, "stream": True}


@pytest.fixture(scope="module")
def directory(llama: Llama, tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("ranks") / "model"
    checkpoint = llama.runner.checkpoint
    save_checkpoint(place, checkpoint.config, dict(checkpoint.weights), tokenizer=llama.tokenizer)
    return place


class Job(Launched):
    """A server of two ranks, of three rows."""

    def __init__(self, directory: Path, *more: object):
        flags = ("--device", "cpu", "--model", directory, "--name", "tiny", "--port", 0, "--rows", 3)
        super().__init__(2, "-m", "llama_fast", "serve", *flags, *more)

    def client(self) -> httpx.Client:
        """A client, when the server is there."""
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        while " at http://" not in line:
            assert line, "the job has ended"
            line = self.process.stdout.readline()
        return httpx.Client(base_url=line.split(" at ")[1].split(": ")[0], trust_env=False, timeout=60)


def events(response: httpx.Response) -> Iterator[str]:
    return (line for line in response.iter_lines() if line)


def expected(llama: Llama, prompt: str, tokens: int, **options: Any) -> str:
    found: Any = llama.generate(prompt, tokens, **options)
    return str(found.text)


@pytest.mark.parametrize(
    "more", [(), ("--stages", 2), ("--draft", "ngram", "--speculate", 3)], ids=["plain", "in stages", "speculating"]
)
def test_texts_of_two_ranks_are_those_of_one_and_ctrl_c_ends_them(
    llama: Llama, directory: Path, more: tuple[object, ...]
) -> None:
    """Among clients that leave; ends by stop strings, whose end only text tells; and a prompt's own log-probabilities."""
    drafts = "--draft" in more
    asked: list[tuple[str, int, dict[str, Any]]] = [
        ("the cat", 40, {"stop": ["a"]}),
        ("é€ dogs run home and", 25, {}),
        ("a mat", 60, {"stop": ["zz", "on"]}),
        ("saw the dogs run", 33, {}),
        *([] if drafts else [("home", 30, {"temperature": 0.9, "seed": 5, "top_k": 40})]),
    ]
    texts: dict[int, str] = {}
    with Job(directory, *more) as job, job.client() as http:

        def ask(number: int) -> None:
            prompt, tokens, options = asked[number]
            body = {"prompt": prompt, "max_tokens": tokens, "temperature": 0, **options}
            texts[number] = http.post(PATH, json=body).json()["choices"][0]["text"]

        with http.stream("POST", PATH, json=ENDLESS) as leaving:
            next(events(leaving))
            clients = [threading.Thread(target=ask, args=(number,)) for number in range(len(asked))]
            for client in clients:
                client.start()
        for client in clients:
            client.join()
        if not drafts:
            body = {"prompt": "the cat sat", "max_tokens": 0, "echo": True, "logprobs": 1}
            scored = http.post(PATH, json=body).json()["choices"][0]["logprobs"]["token_logprobs"]
            assert scored[1:] == pytest.approx(llama.score(["the cat sat"])[0], abs=1e-4)
        else:
            refused = http.post(PATH, json={"prompt": "a", "logprobs": 1})
            assert refused.status_code == 400 and "draft" in refused.json()["error"]["message"]
        with http.stream("POST", PATH, json=ENDLESS) as response:
            lines = events(response)
            next(lines)
            began = time.monotonic()
            job.interrupt()
            rest = list(lines)
        code, output = job.ended()
        assert time.monotonic() - began < 15  # 3.6 s where the machine is free
    assert code != 0 and errors(output) == ["error: interrupted"], output
    assert "stopping" in rest[-1] or "[DONE]" in rest[-1]
    assert texts == {
        number: expected(llama, prompt, tokens, **options) for number, (prompt, tokens, options) in enumerate(asked)
    }
    assert len(set(texts.values())) == len(asked)


@pytest.mark.parametrize("victim", [1, 0], ids=["a follower", "the first"])
def test_a_rank_that_dies_ends_the_server_with_one_line(directory: Path, victim: int) -> None:
    with Job(directory) as job, job.client() as http, http.stream("POST", PATH, json=ENDLESS) as response:
        lines = events(response)
        next(lines)
        job.ranks()[victim].kill()
        code, output = job.ended()
        if victim:
            assert "engine_failed" in list(lines)[-1]
    assert code != 0
    assert len(errors(output)) == 1 and "another rank has" in errors(output)[0], output


def test_a_rank_that_dies_while_nothing_is_asked_ends_the_server_too(directory: Path) -> None:
    with Job(directory) as job, job.client() as http:
        assert http.get("/health").status_code == 200
        job.ranks()[1].kill()
        code, output = job.ended(20)
    assert code != 0
    assert len(errors(output)) == 1 and "another rank has" in errors(output)[0], output
