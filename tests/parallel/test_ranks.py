"""Ranks that are real processes, over gloo: they agree with one process, and they end."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
JOB = Path(__file__).with_name("job.py")


def torchrun(ranks: int, *arguments: object, seconds: float = 240) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [*command, *map(str, arguments)], env=environment, capture_output=True, text=True, timeout=seconds
    )


@pytest.mark.parametrize(
    ("ranks", "shapes", "dtypes", "encodings", "how"),
    [
        (2, "tied,one", "float32,bfloat16", "int8", "eager"),
        (3, "plain", "float32", "dense", "eager"),
        (2, "tied", "float32", "int8", "compiled"),
    ],
)
def test_the_oracle_agrees(ranks: int, shapes: str, dtypes: str, encodings: str, how: str) -> None:
    done = torchrun(ranks, JOB, "agree", shapes, dtypes, encodings, how)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"verdicts AGREE on {ranks} ranks" in done.stdout
