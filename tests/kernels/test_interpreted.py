"""The Triton kernels on a CPU: each group of checks in its own process, because the interpreter is chosen at import."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def unable() -> str:
    """Why the interpreter cannot run here, or nothing."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed (pip install triton==3.6.0 'numpy<2.4')"
    import numpy

    if tuple(int(part) for part in numpy.__version__.split(".")[:2]) >= (2, 4):
        return f"Triton's interpreter needs numpy < 2.4, here is {numpy.__version__}"
    return ""


@pytest.mark.skipif(bool(unable()), reason=unable())
@pytest.mark.parametrize("group", ["linear", "qkv", "attention", "ends", "operators", "step"])
def test_kernels_agree_with_float64(group: str) -> None:
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    script = Path(__file__).with_name("interpreted.py")
    if group == "step":
        script = script.with_name("interpreted_step.py")
    done = subprocess.run(
        [sys.executable, str(script), group], env=environment, capture_output=True, text=True, timeout=900
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{group}: " in done.stdout and "results agree" in done.stdout
