"""How a command ends that is not let finish: Ctrl-C at any time after its first milliseconds, a reader that has gone."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from llama_ref.checkpoint import random_checkpoint, save_checkpoint
from llama_ref.config import LlamaConfig
from llama_ref.interrupts import is_command
from llama_ref.tokenizers.tokenizer import RandomTokenizer

MODEL = ["--model", "random:smollm2-135m", "--device", "cpu"]
SCRIPT = "import sys; sys.argv[0] = '/some/bin/{name}'; from {module} import main; main()"
COMMANDS = {
    "llama-fast": [sys.executable, "-c", SCRIPT.format(name="llama-fast", module="llama_fast.ladder.cli"), "generate"],
    "llama-oracle": [sys.executable, "-c", SCRIPT.format(name="llama-oracle", module="oracle.cli"), "verify"],
    "llama_fast.ladder.cli": [sys.executable, "-m", "llama_fast.ladder.cli", "generate"],
    "llama_fast": [sys.executable, "-m", "llama_fast", "generate"],
    "oracle.cli": [sys.executable, "-m", "oracle.cli", "verify"],
    "oracle": [sys.executable, "-m", "oracle", "verify"],
}


def started(command: list[str]) -> subprocess.Popen[str]:
    """A command that Ctrl-C reaches: a job in the background would inherit it ignored."""
    return subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


def until_ours_is_loaded(process: subprocess.Popen[str]) -> None:
    """Until Python has come to our packages, of which PyTorch's libraries are the sign; before that nobody can help."""
    maps, ends = Path(f"/proc/{process.pid}/maps"), time.monotonic() + 60
    while time.monotonic() < ends and process.poll() is None and maps.parent.is_dir():
        if "libtorch" in maps.read_text():
            return
        time.sleep(0.005)


@pytest.mark.parametrize("seconds", [0.0, 0.1, 0.5, 1.0, 3.0])
@pytest.mark.parametrize("name", ["llama-fast", "llama-oracle"])
def test_ctrl_c_ends_a_command_with_130_and_no_traceback(name: str, seconds: float) -> None:
    check_ctrl_c(name, seconds)


@pytest.mark.parametrize("name", ["llama_fast.ladder.cli", "llama_fast", "oracle.cli", "oracle"])
def test_ctrl_c_ends_a_module_with_130_and_no_traceback(name: str) -> None:
    check_ctrl_c(name, 0.0)


def check_ctrl_c(name: str, seconds: float) -> None:
    process = started([*COMMANDS[name], *MODEL])
    until_ours_is_loaded(process)
    time.sleep(seconds)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert "Traceback" not in err and "KeyboardInterrupt" not in err and "Error" not in err, err


COLLECTING = """
import gc, sys
sys.argv[0] = sys.argv[1]
import llama_ref.interrupts as ours
before = gc.isenabled()
ours.quiet_until_run()
while_loading = gc.isenabled()
ours.loud()
print(before, while_loading, gc.isenabled(), gc.get_freeze_count() > 0)
"""


@pytest.mark.parametrize(
    ("program", "told"),
    [("/some/bin/llama-fast", "True False True True"), ("/some/bin/another", "True True True False")],
)
def test_a_command_collects_no_garbage_while_it_loads_and_another_program_as_ever(program: str, told: str) -> None:
    process = started([sys.executable, "-c", COLLECTING, program])
    assert process.communicate(timeout=60) == (told + "\n", "")


def test_a_program_that_imports_us_keeps_its_ctrl_c() -> None:
    code = "import signal, llama_fast, oracle; print(signal.getsignal(signal.SIGINT) is signal.default_int_handler)"
    process = started([sys.executable, "-c", code])
    assert process.communicate(timeout=60)[0] == "True\n"


@pytest.mark.parametrize(
    ("argv", "words", "wanted"),
    [
        (["/usr/bin/llama-fast", "generate"], ["python", "/usr/bin/llama-fast", "generate"], True),
        (["llama-oracle.exe"], ["python"], True),
        (["-m", "bench"], ["python", "-m", "llama_fast.ladder.cli", "bench"], True),
        (["-m"], ["python", "-u", "-moracle"], True),
        (["-m", "x"], ["python", "-m", "pytest", "tests/oracle"], False),
        (["-m"], ["python", "-m", "torch.distributed.run"], False),
        (["/my/program.py", "llama-fast"], ["python", "/my/program.py", "llama-fast"], False),
        (["-c"], ["python", "-c", "import llama_fast"], False),
        ([], [], False),
    ],
)
def test_a_command_is_told_by_its_words(argv: list[str], words: list[str], wanted: bool) -> None:
    assert is_command(argv, words) is wanted


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = LlamaConfig(48, 2, 6, 2, 10, 72, 259, 100_000)
    place = tmp_path_factory.mktemp("endings") / "model"
    save_checkpoint(place, config, random_checkpoint(config, 3).weights, tokenizer=RandomTokenizer(259, None, ()))
    return place


@pytest.mark.parametrize("stream", [[], ["--stream"]])
def test_a_reader_that_has_gone_ends_a_command_without_a_word(model: Path, stream: list[str]) -> None:
    samples = ["--num-samples", "1000", "--max-new-tokens", "9", "--device", "cpu"]
    process = started(
        [sys.executable, "-m", "llama_fast.ladder.cli", "generate", "--model", str(model), *samples, *stream]
    )
    assert process.stdout is not None and process.stderr is not None
    process.stdout.readline()
    process.stdout.close()
    err = process.stderr.read()
    assert (process.wait(60), err) == (141, "")
    process.stderr.close()


def test_output_that_nobody_can_take_is_one_line_or_none(model: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "llama_fast.ladder.cli",
        "generate",
        "--model",
        str(model),
        "--max-new-tokens",
        "3",
    ]
    with open("/dev/full", "w") as full:
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 2 and done.stderr == "error: [Errno 28] No space left on device\n"
    read, write = os.pipe()
    os.close(read)
    both = subprocess.run([sys.executable, "-m", "oracle", "frobnicate"], stdout=write, stderr=write)
    os.close(write)
    assert both.returncode == 2
    closed = subprocess.run(["sh", "-c", 'exec "$@" >&-', "sh", *command], stderr=subprocess.PIPE, text=True)
    assert (closed.returncode, closed.stderr) == (0, "")
