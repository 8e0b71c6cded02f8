"""Where the seconds of a fresh process go until its first tokens: `python tests/instruments/cold_start.py [flags of generate]`.

    python tests/instruments/cold_start.py                                          a GPU: random:llama-2-7b, fused
    python tests/instruments/cold_start.py --model smollm2-135m --device cpu        another model, another plan

Two processes run `llama-fast generate --max-new-tokens 2` with the flags given: the first finds no compiled kernels (an empty
TRITON_CACHE_DIR and TORCHINDUCTOR_CACHE_DIR), the second those of the first. Printed are seconds of wall time by phase, each
without the phases inside it. Tiles that earlier processes chose are used, and none are chosen (LLAMA_FAST_FIND_TILES=0): choosing
is a cost of its own, once a card and shape.
"""

from __future__ import annotations

import functools
import importlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ON_A_GPU = ["--model", "random:llama-2-7b", "--fused"]
BEGAN, TOLD = "COLD_START_BEGAN", "COLD_START_TOLD"  # what a process that is looked at finds in its environment
START, EXIT, REST = "Python starts", "the process ends", "all else"
PHASES = {
    "llama_fast.ladder.cli:resolve": "the model is found",
    "llama_fast.ladder.cli:build": "weights are made or read, encoded, copied",
    "llama_fast.arithmetic.triton:Kernels.compile_ahead": "kernels are compiled, or found in the cache",
    "llama_fast.arithmetic.triton:Kernels.choose_tiles": "tiles are looked up",
    "llama_fast.compilers.graphed:Recordings.record": "CUDA graphs are recorded",
    "llama_fast.compilers.graphed:Recordings.__call__": "a first pass: kernels are loaded and run; replays",
    "llama_fast.ladder.cli:warm_up": "the rest of the first tokens: a cache, a sampler",
    "llama_fast.ladder.cli:continued": "the tokens that are shown",
}
"""What is timed, as module:name, and what its time is called."""


class Clock:
    """Seconds by phase, of each what no phase within it took. `began` is a time of `time.monotonic`, which processes share."""

    def __init__(self, began: float):
        self.seconds: dict[str, float] = {}
        self._last, self._open = began, [START]

    def turn(self, name: str) -> None:
        """The phase ends, and `name` begins."""
        now = time.monotonic()
        self.seconds[self._open[-1]] = self.seconds.get(self._open[-1], 0.0) + now - self._last
        self._last, self._open[-1] = now, name

    @contextmanager
    def within(self, name: str) -> Iterator[None]:
        """A phase inside the one that goes on behind it."""
        outer = self._open[-1]
        self.turn(outer)
        self._open.append(name)
        try:
            yield
        finally:
            self.turn(name)
            self._open.pop()

    def watch(self, place: str, name: str) -> None:
        """From now on the function at "module:Class.method" is a phase; it ends when the GPU has done what it began."""
        import torch

        module, _, path = place.partition(":")
        *owners, last = path.split(".")
        owner = functools.reduce(getattr, owners, importlib.import_module(module))
        function = getattr(owner, last)

        @functools.wraps(function)
        def watched(*arguments: Any, **options: Any) -> Any:
            with self.within(name):
                result = function(*arguments, **options)
                if torch.cuda.is_initialized() and not torch.cuda.is_current_stream_capturing():
                    torch.cuda.synchronize()
                return result

        setattr(owner, last, watched)


def look_at_oneself(flags: Sequence[str]) -> None:
    """Be `llama-fast generate` with these flags, and write the seconds of each phase to the file that TOLD names."""
    clock = Clock(float(os.environ[BEGAN]))
    sys.argv = ["llama-fast", "generate", *flags]
    from llama_ref.interrupts import quiet_until_run

    quiet_until_run()
    clock.turn("import torch")
    import torch

    clock.turn("import llama_fast and its command line")
    from llama_fast.ladder import cli

    clock.turn("CUDA is looked for, and its context made")
    if "cpu" not in flags and torch.cuda.is_available():
        torch.zeros(1, device="cuda")
        torch.cuda.synchronize()
    if "--fused" in flags:
        clock.turn("import Triton and the kernels")
        importlib.import_module("llama_fast.kernels.first_use")
    clock.turn(REST)
    for place, name in PHASES.items():
        clock.watch(place, name)
    try:
        cli.main()
    except SystemExit as end:
        if end.code:
            raise
    clock.turn(EXIT)
    Path(os.environ[TOLD]).write_text(json.dumps({"seconds": clock.seconds, "ended": time.monotonic()}))


def seconds_of(flags: Sequence[str], caches: Path) -> dict[str, float]:
    """The phases of one fresh process, which keeps its compiled kernels in a folder."""
    told = caches / "told.json"
    kept = {"TRITON_CACHE_DIR": str(caches / "triton"), "TORCHINDUCTOR_CACHE_DIR": str(caches / "inductor")}
    environment = {**os.environ, **kept, "LLAMA_FAST_FIND_TILES": "0", TOLD: str(told), BEGAN: str(time.monotonic())}
    subprocess.run([sys.executable, __file__, *flags], env=environment, check=True, timeout=300)
    ended, found = time.monotonic(), json.loads(told.read_text())
    return {**found["seconds"], EXIT: ended - found["ended"]}


def table(columns: dict[str, dict[str, float]]) -> str:
    """Phases by process, in the order in which they are first met, and the whole."""
    names = list(dict.fromkeys(name for seconds in columns.values() for name in seconds))
    lines = ["| seconds | " + " | ".join(columns) + " |"]
    lines += [
        f"| {name} | " + " | ".join(f"{of.get(name, 0.0):.2f}" for of in columns.values()) + " |" for name in names
    ]
    return "\n".join(
        [*lines, "| the whole | " + " | ".join(f"{sum(of.values()):.2f}" for of in columns.values()) + " |"]
    )


def main(flags: Sequence[str]) -> None:
    asked = [*(flags or ON_A_GPU), "--max-new-tokens", "2"]
    with tempfile.TemporaryDirectory() as caches:
        print(table({process: seconds_of(asked, Path(caches)) for process in ("cold", "warm")}))


if __name__ == "__main__":
    look_at_oneself(sys.argv[1:]) if BEGAN in os.environ else main(sys.argv[1:])
