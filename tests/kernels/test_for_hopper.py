"""The kernels through Triton's compiler: what the interpreter takes, it may still refuse."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed (pip install triton)")
@pytest.mark.parametrize("capability", [90, 86])
def test_kernels_compile_side_by_side_and_nothing_is_launched(capability: int) -> None:
    """For a Hopper all kernels with its own tiles; for 8.6, whose programs have least shared memory, every general tile."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    script = Path(__file__).with_name("compiled.py")
    done = subprocess.run(
        [sys.executable, str(script), str(capability)],
        env=environment | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "_in_registers" in done.stdout and "_on_tensor_cores" in done.stdout
