"""How checks are run in Triton's interpreter."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
ENVIRONMENT = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}


def unable() -> str:
    """Why the interpreter cannot run here, or nothing."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed (pip install triton==3.6.0 'numpy<2.4')"
    import numpy

    if tuple(int(part) for part in numpy.__version__.split(".")[:2]) >= (2, 4):
        return f"Triton's interpreter needs numpy < 2.4, here is {numpy.__version__}"
    return ""


def ask(group: str) -> subprocess.CompletedProcess[str]:
    """A group of checks, behind whatever else wants the processor."""
    script = Path(__file__).with_name("interpreted_step.py" if group == "step" else "interpreted.py")
    command = ["nice", sys.executable, str(script), group]
    return subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=900)
