"""However a job of several ranks ends, it ends everywhere, soon, and one rank says why."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from llama_fast.parallel import ranks
from llama_ref.checkpoint import random_checkpoint, save_checkpoint
from llama_ref.config import LlamaConfig
from llama_ref.tokenizers.tokenizer import RandomTokenizer
from tests.parallel.launched import JOB, Launched, environment, errors

CONFIG = LlamaConfig(
    dim=48, n_layers=2, n_heads=6, n_kv_heads=2, head_dim=10, ffn_dim=72, vocab_size=301, max_context=8192
)
CLI = ("-m", "llama_fast.ladder.cli", "generate", "--prompt", "ab", "--temperature", 0, "--device", "cpu", "--model")
ENDLESS = ("--max-new-tokens", 8000, "--stream")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("ranks") / "model"
    save_checkpoint(path, CONFIG, dict(random_checkpoint(CONFIG, 3).weights), tokenizer=RandomTokenizer(301, None, ()))
    return path


@pytest.fixture
def taken_port() -> Iterator[int]:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        yield taken.getsockname()[1]


def test_it_starts_and_stops_again_and_again() -> None:
    for _ in range(int(os.environ.get("LLAMA_FAST_CYCLES", "3"))):
        with Launched(2, JOB, "cycle") as job:
            code, output = job.ended()
            assert code == 0 and not errors(output), output


def test_a_text_over_ranks_is_the_text_of_one(model: Path) -> None:
    alone = subprocess.run(
        [sys.executable, *map(str, (*CLI, model, "--max-new-tokens", 12))],
        env=environment(), capture_output=True, text=True, timeout=120,
    ).stdout.splitlines()  # fmt: skip
    with Launched(2, *CLI, model, "--max-new-tokens", 12) as job:
        code, output = job.ended(120)
    assert code == 0, output
    assert alone[0] in output.splitlines() and output.count("Average tokens/sec") == 1, output


def test_a_rank_that_dies_ends_the_job(model: Path) -> None:
    with Launched(2, *CLI, model, *ENDLESS) as job:
        job.wait_for("ab ")
        job.ranks()[1].kill()
        code, output = job.ended()
    assert code != 0
    assert len(errors(output)) == 1 and "another rank has" in errors(output)[0], output


def test_ctrl_c_ends_all_ranks(model: Path) -> None:
    with Launched(2, *CLI, model, *ENDLESS) as job:
        job.wait_for("ab ")
        job.interrupt()
        code, output = job.ended()
    assert code != 0
    assert errors(output) == ["error: interrupted"], output


def test_heads_that_do_not_divide(model: Path) -> None:
    with Launched(4, *CLI, model) as job:
        code, output = job.ended()
    assert code != 0
    assert errors(output) == ["error: n_heads=6 does not divide over 4 ranks"], output


def test_a_rank_that_does_not_come_is_waited_for_as_long_as_was_said() -> None:
    with Launched(2, JOB, "absent") as job:
        code, output = job.ended()
    assert code != 0
    assert len(errors(output)) == 1 and "another rank has ended or does not answer" in errors(output)[0], output


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_no_gpu_at_all(model: Path) -> None:
    with Launched(2, *CLI, model, "--device", "cuda") as job:
        code, output = job.ended()
    assert code != 0
    assert len(errors(output)) == 1 and "sees no CUDA device" in errors(output)[0], output


def test_a_missing_gpu_is_named_with_its_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    launcher = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "3", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}
    for name, value in launcher.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(ValueError, match="rank 3 needs GPU 3, but 2 are visible on this host"):
        ranks.device_of_rank(torch.device("cuda"))


def test_a_launcher_whose_port_is_taken(taken_port: int) -> None:
    options = (f"--master-port={taken_port}", "--master-addr=127.0.0.1")
    with Launched(2, JOB, "cycle", options=options) as job:
        code, output = job.ended()
    assert code != 0 and re.search("address already in use|EADDRINUSE", output, re.I), output


def test_ranks_started_by_hand_on_a_port_that_is_taken(model: Path, taken_port: int) -> None:
    """As another launcher than torchrun may do it: rank 0 itself opens the port."""
    by_hand = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(taken_port)}
    done = subprocess.run(
        [sys.executable, *map(str, (*CLI, model))],
        env={**environment(), **by_hand}, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert done.returncode == 2
    assert len(errors(done.stderr)) == 1 and f"could not meet at 127.0.0.1:{taken_port}" in done.stderr, done.stderr


@pytest.mark.skipif("LLAMA_FAST_CYCLES" not in os.environ, reason="takes a minute: `tox -e ranks`")
def test_a_stopped_process_is_noticed(model: Path) -> None:
    """No launcher sees it: the neighbour does, by its heartbeat. The launcher then takes 30 s to kill what does not answer."""
    with Launched(2, *CLI, model, *ENDLESS) as job:
        job.wait_for("ab ")
        job.ranks()[1].send_signal(signal.SIGSTOP)
        code, output = job.ended(75)
    assert code != 0
    assert errors(output) == ["error: rank 1 has not been heard for 15 s"], output
