"""Ray and the replicas on this machine as a test sees them: a small cluster at free ports, of which no process stays behind."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

import httpx
import psutil

from llama_ref.checkpoint import random_checkpoint, save_checkpoint
from llama_ref.config import LlamaConfig
from llama_ref.tokenizers.tokenizer import RandomTokenizer

ROOT = Path(__file__).resolve().parents[2]
MARK = "LLAMA_FAST_TEST_CLUSTER"
REPLICA = re.compile(r"ray::ServeReplica:default:Replica\b")
SAMPLE = re.compile(r"^(llama_fast_\w+)\{(.*)\} (\S+)$", re.M)


def tiny_model(place: Path) -> Path:
    """A directory with a tiny model of random weights; its tokens are bytes, its texts do not end by themselves."""
    config = LlamaConfig(48, 2, 6, 2, 10, 72, 259, 100_000)
    save_checkpoint(place, config, random_checkpoint(config, 3).weights, tokenizer=RandomTokenizer(259, None, ()))
    return place


class Cluster:
    """A cluster that serves a model by `serve run`, with the arguments of `llama_fast.serve.ray:app`. A context."""

    def __init__(self, cpus: int = 2, **arguments: Any):
        self.mark = uuid.uuid4().hex
        self.folder = Path(tempfile.mkdtemp(prefix="ray"))  # short: sockets stand in it
        self.port, self.url = free_port(), ""
        self.arguments = {"device": "cpu", "name": "tiny", **arguments}
        self.cpus = cpus
        self.environment = {
            **os.environ,
            MARK: self.mark,
            "PYTHONPATH": str(ROOT),
            "HOME": str(self.folder),  # Ray writes a token there
            "RAY_AUTH_MODE": "disabled",
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "60",  # the machine may be busy
            "RAY_raylet_start_wait_time_s": "300",
            "XDG_CACHE_HOME": os.environ.get("XDG_CACHE_HOME", str(Path.home() / ".cache")),
        }
        self.output = self.folder / "serve.log"
        self.serve: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Cluster:
        try:
            self._start()
        except BaseException:
            print(self.said()[-4000:])
            self.close()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if error is not None:
            print(self.said()[-4000:])
        self.close()

    def _start(self) -> None:
        gcs = free_port()
        words = ["--head", f"--port={gcs}", f"--num-cpus={self.cpus}", "--object-store-memory=80000000"]
        words += ["--include-dashboard=false", f"--temp-dir={self.folder}", f"--ray-client-server-port={free_port()}"]
        done = subprocess.run(
            [program("ray"), "start", *words], env=self.environment, capture_output=True, text=True, cwd=self.folder
        )
        assert done.returncode == 0, done.stdout + done.stderr
        app = {"name": "default", "import_path": "llama_fast.serve.ray:app", "args": self.arguments}
        told = {"http_options": {"host": "127.0.0.1", "port": self.port}, "applications": [app]}
        (self.folder / "config.yaml").write_text(json.dumps(told))
        with self.output.open("wb") as output:
            self.serve = subprocess.Popen(
                [program("serve"), "run", f"--address=127.0.0.1:{gcs}", "config.yaml"],
                env=self.environment,
                stdout=output,
                stderr=output,
                cwd=self.folder,
                start_new_session=True,
            )
        self.url = f"http://127.0.0.1:{self.port}"
        until(lambda: self.serve is None or self.serve.poll() is not None or self.is_healthy(), 240)
        assert self.serve.poll() is None, self.said()

    def said(self) -> str:
        """What `serve run` has printed, its replicas' output included."""
        return self.output.read_text(errors="replace") if self.output.is_file() else ""

    def is_healthy(self) -> bool:
        with contextlib.suppress(httpx.HTTPError), self.client(timeout=5.0) as http:
            return http.get("/health").status_code == 200
        return False

    def client(self, **options: Any) -> httpx.Client:
        return httpx.Client(base_url=self.url, trust_env=False, **{"timeout": 120.0, **options})

    def samples(self) -> list[tuple[str, dict[str, str], float]]:
        """What /metrics tells: name, labels, value."""
        with self.client() as http:
            while (answer := http.get("/metrics")).status_code != 200:
                assert answer.json()["error"]["code"] == "slow_replica", answer.text
            page = answer.text
        found = []
        for name, labels, value in SAMPLE.findall(page):
            found.append((name, dict(re.findall(r'(\w+)="([^"]*)"', labels)), float(value)))
        return found

    def count(self, name: str) -> float:
        """A metric, summed over all replicas and labels."""
        return sum(value for found, _, value in self.samples() if found == f"llama_fast_{name}")

    def replicas(self) -> set[str]:
        """Those that /metrics tells of."""
        return {labels["replica"] for name, labels, _ in self.samples() if name == "llama_fast_rows"}

    def processes(self) -> list[psutil.Process]:
        """All that this cluster has started."""
        return list(marked(self.mark))

    def replica_processes(self) -> list[psutil.Process]:
        """Those of the replicas."""
        return [one for one in self.processes() if any(REPLICA.match(word) for word in words_of(one))]

    def close(self) -> None:
        """End all of it."""
        if self.serve is not None and self.serve.poll() is None:
            self.serve.send_signal(signal.SIGINT)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.serve.wait(30)
            self.serve.kill()
            self.serve.wait()
        for _ in range(3):  # a daemon may start another one meanwhile
            left = self.processes()
            for process in left:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()
            psutil.wait_procs(left, 10)
        shutil.rmtree(self.folder, ignore_errors=True)


def marked(mark: str) -> Iterator[psutil.Process]:
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):
            if process.environ().get(MARK) == mark and process.status() != psutil.STATUS_ZOMBIE:
                yield process


def words_of(process: psutil.Process) -> list[str]:
    with contextlib.suppress(psutil.Error):
        return process.cmdline()
    return []


def program(name: str) -> str:
    """A script beside this Python."""
    return str(Path(sys.executable).with_name(name))


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def until(reached: Any, seconds: float = 60.0) -> None:
    """Wait for it; AssertionError if it does not come."""
    end = time.monotonic() + seconds
    while not reached():
        assert time.monotonic() < end, "it did not come"
        time.sleep(0.1)
