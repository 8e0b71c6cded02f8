"""10,000 requests that schemathesis makes of the served OpenAPI document, most of them malformed: `tox -e malformed`."""

from __future__ import annotations

import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from llama_fast.serve.door import Limits
from tests.serve.conftest import Running, Serve, until

PROGRAM = Path(sys.executable).with_name("st")
REFUSED = int(os.environ.get("LLAMA_FAST_MALFORMED", 10_000))
PATH = "/v1/completions"
ASKED = {"prompt": "the cat sat", "max_tokens": 12, "temperature": 0, "logprobs": 2}


@pytest.mark.heavy
@pytest.mark.timeout(7200)
@pytest.mark.skipif(not PROGRAM.exists(), reason="schemathesis is not installed here")
def test_malformed_requests_are_refused_and_leave_nothing(serve: Serve, tmp_path: Path) -> None:
    """No status of 500 and above, nothing left in the engine, and a later answer as it was."""
    with serve(rows=2, length=64, limits=Limits(timeout=20)) as running:
        before = running.post(PATH, ASKED).json()["choices"]
        seed = 0
        while refused(running) < REFUSED:
            seed += 1
            fuzz(running, seed, tmp_path)
            print(f"after {seed} runs: {dict(sorted(statuses(running).items()))}", flush=True)
        until(running.is_empty)
        assert not [status for status in statuses(running) if status >= "500"]
        assert running.post(PATH, ASKED).json()["choices"] == before


def fuzz(running: Running, seed: int, place: Path) -> None:
    """Some thousand requests; a failure is a status of 500 and above, or no answer at all."""
    options = ["--mode", "all" if seed % 4 == 1 else "negative", "--checks", "not_a_server_error", "--seed", str(seed)]
    options += [
        "--phases",
        "examples,coverage,fuzzing",
        "--max-examples",
        "400",
        "--request-timeout",
        "60",
        "--no-shrink",
    ]
    options += ["--suppress-health-check", "all", "--no-color"]
    command = [str(PROGRAM), "run", f"{running.url}/openapi.json", *options]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=place)
    assert done.returncode == 0, done.stdout[-8000:]


def statuses(running: Running) -> Counter[str]:
    """How many requests were answered with each status."""
    found: Counter[str] = Counter()
    for metric in running.served.metrics.requests.collect():
        for sample in metric.samples:
            if sample.name.endswith("_total"):
                found[sample.labels["status"]] += int(sample.value)
    return found


def refused(running: Running) -> int:
    return sum(count for status, count in statuses(running).items() if status.startswith("4"))
