"""A server whose engine is helped by a draft: what it writes, what it refuses, and who waits for whom."""

from __future__ import annotations

import threading
from typing import Any

import pytest

from llama_fast import Llama
from llama_fast.speculative.proposers import Draft, Ngram
from tests.serve.conftest import Serve, until
from tests.serve.test_leaving import ENDLESS, Leaver

PATH = "/v1/completions"
PROMPTS = ["the cat sat on a mat", "é€ dogs", "saw the dogs run home and", "a"]


@pytest.mark.parametrize("draft", ["ngram", "its own model"])
def test_texts_are_those_without_a_draft_while_clients_come_and_leave(serve: Serve, llama: Llama, draft: str) -> None:
    """A draft that is the model itself is always right, an n-gram lookup now and then."""
    expected = {prompt: llama.generate(prompt, 40, temperature=0).text for prompt in PROMPTS}  # type: ignore[union-attr]
    wrong: list[object] = []
    with serve(rows=2, draft=Ngram(3) if draft == "ngram" else Draft(llama.runner, 3)) as running:

        def visit(number: int) -> None:
            for turn in range(3):
                if (number + turn) % 3 == 0:
                    before = running.count("generated_tokens_total")
                    client = Leaver(running, {**ENDLESS, "max_tokens": 1500, "stream": bool(turn % 2)})
                    until(lambda before=before: running.count("generated_tokens_total") > before)  # type: ignore[misc]
                    client.leave()
                prompt = PROMPTS[(number + turn) % 4]
                answer = running.post(PATH, {"prompt": prompt, "max_tokens": 40, "temperature": 0}).json()
                if answer["choices"][0]["text"] != expected[prompt]:
                    wrong.append(answer)

        clients = [threading.Thread(target=visit, args=(number,)) for number in range(4)]
        for client in clients:
            client.start()
        for client in clients:
            client.join()
        until(running.is_empty)
        assert not wrong
        statistics = running.served.thread.engine.statistics
        assert statistics is not None and statistics.rounds > 0
        assert draft == "ngram" or statistics.acceptance == 1


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
@pytest.mark.parametrize(
    ("fields", "says"),
    [({"logprobs": 1}, "logprobs are not told"), ({"repetition_penalty": 1.2}, "repetition_penalty looks at")],
)
def test_what_a_draft_excludes_is_refused(serve: Serve, stream: bool, fields: dict[str, Any], says: str) -> None:
    with serve(draft=Ngram(3)) as running:
        answer = running.post(PATH, {"prompt": "the cat", "stream": stream, **fields})
        assert answer.status_code == 400 and says in answer.json()["error"]["message"]
        assert running.is_empty()
