"""Stages on two hosts: the same verdicts as on one, and however one host is lost, the other ends soon and says why.

The hosts are launchers that meet on this machine's own address; `tox -e ranks`, where it may, takes network namespaces.
"""

from __future__ import annotations

import os
import signal
import socket
import time
from pathlib import Path

import pytest

from llama_ref.checkpoint import random_checkpoint, save_checkpoint
from llama_ref.config import LlamaConfig
from llama_ref.tokenizers.tokenizer import RandomTokenizer
from tests.parallel.hosts import Hosts, all_of, both_ended, can_be_made
from tests.parallel.launched import JOB, Launched, errors

EVERYTHING = "LLAMA_FAST_CYCLES" in os.environ
CONFIG = LlamaConfig(
    dim=48, n_layers=3, n_heads=6, n_kv_heads=2, head_dim=10, ffn_dim=72, vocab_size=301, max_context=8192
)
CLI = (
    "-m",
    "llama_fast.ladder.cli",
    "generate",
    "--prompt",
    "ab",
    "--temperature",
    0,
    "--device",
    "cpu",
    "--stages",
    2,
)
ENDLESS = ("--max-new-tokens", 8000, "--stream")
SECONDS = 60
namespaces = pytest.mark.skipif(
    not (EVERYTHING and can_be_made()), reason="takes minutes, and a right to make network namespaces: `tox -e ranks`"
)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("hosts") / "model"
    save_checkpoint(path, CONFIG, dict(random_checkpoint(CONFIG, 3).weights), tokenizer=RandomTokenizer(301, None, ()))
    return path


def free_port() -> int:
    with socket.socket() as asked:
        asked.bind(("127.0.0.1", 0))
        return int(asked.getsockname()[1])


def test_two_launchers_are_one_job(model: Path) -> None:
    node = ("--nnodes=2", "--master-addr=127.0.0.1", f"--master-port={free_port()}")
    job = (*CLI, "--model", model, "--max-new-tokens", 12)
    first, second = ((*node, f"--node-rank={rank}") for rank in range(2))
    with Launched(1, *job, options=first) as one, Launched(1, *job, options=second) as other:
        (code, output), (other_code, silent) = both_ended(one, other, 120)
    assert code == other_code == 0, output + silent
    assert "2 stages" not in silent and output.count("Average tokens/sec") == 1, output


@namespaces
@pytest.mark.parametrize("seconds", [0.0, 0.001], ids=["at once", "1 ms"])
@pytest.mark.parametrize("ranks", [1, 2], ids=["1x2", "2x2"])
def test_the_oracle_agrees_over_two_hosts(seconds: float, ranks: int) -> None:
    asked = (JOB, "stages", 2, "llama2,llama3,biased", "dense,int8", "paged", "eager")
    with Hosts(seconds) as hosts:
        one, other = (hosts.launch(host, ranks, *asked) for host in range(2))
        (code, output), (other_code, others) = both_ended(one, other, 1200)
    assert code == other_code == 0 and "6 verdicts AGREE" in output, output + others


@namespaces
def test_hosts_start_and_stop_again_and_again() -> None:
    with Hosts(0.001) as hosts:
        for _ in range(min(20, int(os.environ["LLAMA_FAST_CYCLES"]))):
            one, other = (hosts.launch(host, 1, JOB, "cycle-stages", 2) for host in range(2))
            for code, output in both_ended(one, other, 120):
                assert code == 0 and not errors(output), output


@namespaces
@pytest.mark.parametrize("how", ["cut off", "stopped", "killed"])
@pytest.mark.parametrize("lost", [1, 0], ids=["the second host", "the first host"])
def test_a_host_that_is_lost_ends_the_other(model: Path, how: str, lost: int) -> None:
    with Hosts() as hosts:
        one, other = (hosts.launch(host, 2, *CLI, "--model", model, *ENDLESS) for host in range(2))
        one.wait_for("ab ", 120)
        jobs = [one, other]
        gone, left = jobs[lost], jobs[1 - lost]
        began = time.monotonic()
        if how == "cut off":
            hosts.cut()
        for process in [] if how == "cut off" else all_of(gone):
            process.send_signal(signal.SIGSTOP if how == "stopped" else signal.SIGKILL)
        code, output = left.ended(SECONDS)
        assert code != 0 and len(errors(output)) == 1, output
        if how == "cut off":  # both are there, and each says that it is alone
            code, output = gone.ended(max(1.0, SECONDS - (time.monotonic() - began)))
            assert code != 0 and len(errors(output)) == 1, output
        for process in all_of(gone) if how == "stopped" else []:
            process.send_signal(signal.SIGCONT)
        if how != "cut off":
            gone.ended(SECONDS)
