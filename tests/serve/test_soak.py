"""Memory after thousands of short requests, and a server after hundreds of clients that vanish: `tox -e heavy`."""

from __future__ import annotations

import random
import re
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path

import pytest

from llama_fast import Llama
from llama_fast.serve.door import Limits
from tests.serve.conftest import Serve, until
from tests.serve.test_leaving import ENDLESS, PATH, Leaver

ROOT = Path(__file__).parents[2]
LINE = re.compile(r"(\d+) requests: ([\d.]+) MB, ([\d.]+) given out, (\d+) objects, (\d+) files")


@pytest.mark.heavy
@pytest.mark.timeout(7200)
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc and /proc tell what is counted")
def test_memory_is_flat_over_ten_thousand_requests() -> None:
    """Of the allocator, of Python's objects and of files nothing grows; resident memory, with free lists, by a few megabytes."""
    command = [sys.executable, "-m", "tests.instruments.serving_soak", "--requests", "11000"]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, cwd=ROOT, check=True)
    print(done.stdout)
    found = [[float(value) for value in line.groups()] for line in LINE.finditer(done.stdout)]
    assert len(found) == 11
    _, resident, given_out, objects, files = zip(*found)
    assert max(given_out[1:]) - min(given_out[1:]) < 3
    assert max(objects[1:]) - min(objects[1:]) < 300
    assert len(set(files)) == 1
    assert max(resident) - resident[1] < 15


@pytest.mark.heavy
def test_hundreds_of_clients_vanish_from_a_full_queue_with_a_time_limit_and_nothing_is_left(
    serve: Serve, llama: Llama
) -> None:
    """No answer is a 500, and the next one is right."""
    with serve(rows=3, limits=Limits(max_queue=6, timeout=1.0)) as running:
        answered: Counter[int] = Counter()

        def visit(seed: int) -> None:
            chance = random.Random(seed)
            for _ in range(40):
                if chance.random() < 0.6:
                    body = {**ENDLESS, "stream": chance.random() < 0.5, "n": chance.randint(1, 2)}
                    client = Leaver(running, body)
                    time.sleep(chance.random() / 15)
                    client.leave()
                else:
                    body = {**ENDLESS, "max_tokens": chance.choice([5, 2000])}
                    answered[running.post(PATH, body).status_code] += 1

        clients = [threading.Thread(target=visit, args=(seed,)) for seed in range(12)]
        for client in clients:
            client.start()
        for client in clients:
            client.join()
        until(running.is_empty)
        print(dict(answered))
        assert answered.keys() == {200, 408, 429}
        expected = llama.generate("the cat", 9, temperature=0).text  # type: ignore[union-attr]
        answer = running.post(PATH, {"prompt": "the cat", "max_tokens": 9, "temperature": 0}).json()
        assert answer["choices"][0]["text"] == expected
