"""Commands and tests in forks of one warm process: PyTorch is imported once, our own code anew in every fork.

    with Warm(tree) as warm:
        warm.ask(Question(verify="--model tiny --dtype bfloat16"))
        warm.ask(Question(verify="--model tiny --ranks 2", cover=True)).lines
        warm.ask(Question(tests=["tests/fast/model"]))

The warm process never imports `llama_fast`, `oracle` or a test, so that each fork reads them from the tree as it stands by then.
`verify` asks what the command asks, but it ends at its first answer that is not AGREE, the process beside starts when it is
listened to, and the order may be another. With `cover`, an answer holds the lines of `llama_fast` that ran, of tests by the test
that ran them. A compiler runs lines as no trace shows: there nothing is compiled, and what asks whether it is gets a yes.
"""

from __future__ import annotations

import contextlib
import json
import os
import resource
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

MEMORY_BYTES = 12 << 30  # of address space beyond what the warm process has
POLL_SECONDS = 0.01
ALLOWED = ("-W", "ignore::pytest.PytestAssertRewriteWarning")  # what is imported already cannot be rewritten
TAIL = 200_000
"""Characters of an output that an answer tells."""


@dataclass(frozen=True)
class Question:
    """One command, `verify` with these words (`--ranks N` among them: in so many forks), or these tests in this order."""

    verify: str = ""
    tests: list[str] = field(default_factory=list)
    seconds: float = 300
    processor_seconds: int = 600
    """Of each process, which says more than the clock where a machine is shared."""
    cover: bool = False
    only: list[str] = field(default_factory=list)
    """Of `verify` these parts alone; none: all."""
    loops_last: bool = False
    """Whether what does not depend on the model is asked after what does, and not before."""


@dataclass(frozen=True)
class Answer:
    """Exit code (None: not ended in time), the end of the output, and the lines that ran: {file: {line: [tests]}}."""

    code: int | None
    output: str
    seconds: float
    lines: dict[str, dict[str, list[str]]] = field(default_factory=dict)


class Warm:
    """The warm process of a tree, which is the working directory of all that it is asked."""

    def __init__(self, tree: Path):
        environment = {"PYTHONPATH": str(tree), "PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1"}
        self._child = subprocess.Popen(
            [sys.executable, "-m", "tests.instruments.warm"],
            cwd=tree,
            env=os.environ | environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def __enter__(self) -> Warm:
        return self

    def __exit__(self, *_: object) -> None:
        self._child.communicate()

    def ask(self, question: Question) -> Answer:
        assert self._child.stdin is not None and self._child.stdout is not None
        self._child.stdin.write(json.dumps(asdict(question)) + "\n")
        self._child.stdin.flush()
        return Answer(**json.loads(self._child.stdout.readline()))


def main() -> None:
    _import_what_others_wrote()
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for line in sys.stdin:
        print(json.dumps(asdict(_answer(Question(**json.loads(line))))), file=answers, flush=True)


def _import_what_others_wrote() -> None:
    import coverage
    import gguf
    import hypothesis
    import pytest
    import safetensors.torch
    import torch._dynamo
    import torch._inductor.compile_fx
    import torch.distributed
    import typer
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    assert all(
        (coverage, gguf, hypothesis, pytest, safetensors, torch, typer, AutoTokenizer, LlamaConfig, LlamaForCausalLM)
    )


def _answer(question: Question) -> Answer:
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="warm-") as folder:
        said = Path(folder) / "said"
        pid = _forked(lambda: _first_fork(question, Path(folder)), said, question.processor_seconds)
        code = _ended(pid, began + question.seconds)
        with contextlib.suppress(ProcessLookupError):  # with all that it started
            os.killpg(pid, signal.SIGKILL)
        if code is None:
            os.waitpid(pid, 0)
        lines: dict[str, dict[str, list[str]]] = {}
        for part in sorted(Path(folder).glob("lines*")):
            for file, of_file in json.loads(part.read_text()).items():
                for line, tests in of_file.items():
                    known = lines.setdefault(file, {}).setdefault(line, [])
                    known += [test for test in tests if test not in known]
        output = said.read_text(encoding="utf-8", errors="replace")[-TAIL:]
    return Answer(code, output, round(time.monotonic() - began, 2), lines)


def _forked(do: Callable[[], int], said: Path | None = None, processor_seconds: int = 0) -> int:
    """The process that does it; `said` takes what it prints, and makes it the first of a group of its own."""
    pid = os.fork()
    if pid:
        return pid
    code = 3
    try:
        if said is not None:
            os.setsid()
            out = os.open(said, os.O_WRONLY | os.O_CREAT)
            os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
            os.dup2(out, 1)
            os.dup2(out, 2)
            now = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
            resource.setrlimit(resource.RLIMIT_AS, (now + MEMORY_BYTES, now + MEMORY_BYTES))
            resource.setrlimit(resource.RLIMIT_CPU, (processor_seconds, processor_seconds + 1))
        code = do()
    except BaseException as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
    with contextlib.suppress(Exception):
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(code)


def _ended(pid: int, until: float) -> int | None:
    while time.monotonic() < until:
        ended, status = os.waitpid(pid, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        time.sleep(POLL_SECONDS)
    return None


def _first_fork(question: Question, folder: Path) -> int:
    if question.tests:
        return _tests(question, folder)
    words = question.verify.split()
    if "--ranks" not in words:
        return _verify(words, question, folder / "lines")
    at = words.index("--ranks")
    count, words = int(words[at + 1]), words[:at] + words[at + 2 :]
    with socket.socket() as door:
        door.bind(("127.0.0.1", 0))
        port = door.getsockname()[1]
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    os.environ |= {"WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count)}

    def of_rank(rank: int) -> int:
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
        return _verify(words, question, folder / f"lines{rank}")

    for rank in range(count):
        _forked(lambda rank=rank: of_rank(rank))  # type: ignore[misc]
    for _ in range(count):
        code = os.waitstatus_to_exitcode(os.wait()[1])
        if code:  # the others are ended with the group
            return code
    return 0


LOOPS = ("face", "seeds", "objects", "rows that come and go", "loop", "sampling")


def _verify(words: list[str], question: Question, lines: Path) -> int:
    sys.argv = ["llama-oracle", "verify", "--device", "cpu", *words]
    with _covered(lines) if question.cover else contextlib.nullcontext():
        if question.cover and "--compile" in words:
            import torch._dynamo

            torch._dynamo.config.disable = True
            torch.compiler.is_compiling = lambda: True
        import oracle.cli
        import oracle.verify
        from oracle.questions.checkpoints import OtherProcess
        from oracle.report.certificate import Certificate
        from oracle.statistics.compare import Outcome

        ask, finish = Certificate.ask, oracle.cli.finish
        late: dict[str, Any] = {}

        def ask_and_end(certificate: Certificate, part: str, asked: Any) -> None:
            if question.only and part not in question.only:
                return
            if question.loops_last and part in LOOPS:
                late[part] = asked
                return
            ask(certificate, part, asked)
            if certificate.parts[part].outcome is not Outcome.AGREE:
                print(certificate.to_text(), flush=True)
                os._exit(1)

        def ask_the_rest(certificate: Certificate, *others: Any, **named: Any) -> None:
            for part, asked in late.items():
                ask(certificate, part, asked)
            finish(certificate, *others, **named)

        class Later(OtherProcess):
            def _start(self) -> Any:
                return None

            def _listened(self) -> Any:
                self._child = super()._start()
                return super()._listened()

            def end(self) -> None:
                if self._child is not None:
                    super().end()

        Certificate.ask = ask_and_end  # type: ignore[method-assign]
        oracle.cli.finish = ask_the_rest
        oracle.verify.OtherProcess = Later  # type: ignore[misc]
        try:
            oracle.cli.main()
        except SystemExit as end:
            return int(end.code or 0)
    return 0


def _tests(question: Question, folder: Path) -> int:
    import pytest

    words = ["-q", "-x", "--tb=line", "-p", "no:cacheprovider", *ALLOWED, *question.tests]
    if not question.cover:
        return int(pytest.main(words))
    with _covered(folder / "lines") as cover:

        class ByTest:
            @pytest.hookimpl(hookwrapper=True)
            def pytest_runtest_protocol(self, item: pytest.Item) -> Iterator[None]:
                cover.switch_context(item.nodeid)
                yield
                cover.switch_context("")

        return int(pytest.main([*words, "--durations=0"], plugins=[ByTest()]))


@contextlib.contextmanager
def _covered(lines: Path) -> Iterator[Any]:
    """The lines of `llama_fast` that run, written at the end."""
    import coverage

    cover = coverage.Coverage(data_file=None, source=[str(Path.cwd() / "llama_fast")], config_file=False)
    cover.start()
    try:
        yield cover
    finally:
        cover.stop()
        data = cover.get_data()
        found = {
            Path(file).relative_to(Path.cwd()).as_posix(): {
                str(line): by for line, by in data.contexts_by_lineno(file).items()
            }
            for file in data.measured_files()
        }
        lines.write_text(json.dumps(found))


if __name__ == "__main__":
    main()
