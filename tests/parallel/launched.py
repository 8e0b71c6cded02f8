"""Jobs of several ranks as a test sees them: started in a session of their own, watched, and certainly ended."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType, TracebackType

import psutil

ROOT = Path(__file__).resolve().parents[2]
JOB = Path(__file__).with_name("job.py")
MARK = "LLAMA_FAST_TEST_JOB"
"""A variable that all processes of a job inherit."""


class Launched:
    """`python -m torch.distributed.run` with these arguments; a context that leaves no process behind."""

    def __init__(
        self,
        ranks: int,
        *arguments: object,
        options: Sequence[str] = ("--standalone",),
        within: Sequence[str] = (),
        more: Mapping[str, str] = MappingProxyType({}),
    ):
        """`within`: a command that runs another one elsewhere; `more`: of the environment."""
        command = [sys.executable, "-m", "torch.distributed.run", *options, f"--nproc-per-node={ranks}"]
        self.began = time.monotonic()
        self.mark = f"{MARK}={uuid.uuid4()}"
        self.process = subprocess.Popen(
            [*within, *command, *map(str, arguments)],
            env={**environment(), **more, MARK: self.mark.partition("=")[2]},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )

    def __enter__(self) -> Launched:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        for process in self.left_over():
            process.kill()
        self.process.kill()
        self.process.communicate()

    def ranks(self) -> list[psutil.Process]:
        """The processes that the launcher started, by rank."""
        children = psutil.Process(self.process.pid).children()
        return sorted(children, key=lambda child: int(child.environ()["RANK"]))

    def wait_for(self, text: str, seconds: float = 60) -> None:
        """Until standard output has shown `text`."""
        seen, stream = "", self.process.stdout
        assert stream is not None
        deadline = time.monotonic() + seconds
        while text not in seen:
            assert time.monotonic() < deadline and self.process.poll() is None, seen + stream.read()
            seen += stream.read(1)

    def interrupt(self) -> None:
        """What Ctrl-C does: the signal goes to the launcher and to every rank."""
        os.killpg(self.process.pid, signal.SIGINT)

    def ended(self, within_seconds: float = 60) -> tuple[int, str]:
        """Exit code and all further output; fails if it takes longer, or a process of the job is left."""
        output, _ = self.process.communicate(timeout=within_seconds)
        left = self.left_over()
        assert not left, f"left over: {left}"
        return self.process.returncode, output

    def left_over(self) -> list[psutil.Process]:
        """Processes of the job, but for the launcher: by their environment, since each rank has a session of its own."""
        found = []
        for process in psutil.process_iter():
            try:
                entries = Path(f"/proc/{process.pid}/environ").read_bytes().split(b"\0")
            except (ProcessLookupError, PermissionError, FileNotFoundError):
                continue
            if self.mark.encode() in entries and process.pid != self.process.pid:
                found.append(process)
        return found


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"}


def errors(output: str) -> list[str]:
    """The lines in which a rank says what went wrong."""
    return [line for line in output.splitlines() if line.startswith("error: ")]
