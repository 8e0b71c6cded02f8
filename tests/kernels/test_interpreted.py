"""The Triton kernels on a CPU: each group of checks in its own process, because the interpreter is chosen at import."""

import importlib.util
import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
ENVIRONMENT = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}


def unable() -> str:
    """Why the interpreter cannot run here, or nothing."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed (pip install triton)"
    numpy, triton = (tuple(map(int, version(name).split(".")[:2])) for name in ("numpy", "triton"))
    if numpy >= (2, 4) and triton < (3, 7):
        return f"the interpreter of Triton {version('triton')} needs numpy < 2.4, here is {version('numpy')}"
    return ""


@pytest.mark.skipif(bool(unable()), reason=unable())
@pytest.mark.parametrize(
    "group",
    ["attention", "qkv", "step", "linear", "narrow", "ends", "choosing", "faults", "tiles", "stages", "eight_bits"],
)
def test_kernels_agree_with_float64(group: str) -> None:
    own = {"step", "faults", "tiles", "stages", "eight_bits"}
    script = Path(__file__).with_name(f"interpreted_{group}.py" if group in own else "interpreted.py")
    done = subprocess.run(
        [sys.executable, str(script), group], env=ENVIRONMENT, capture_output=True, text=True, timeout=590
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{group}: " in done.stdout and "results agree" in done.stdout


@pytest.mark.skipif(bool(unable()), reason=unable())
@pytest.mark.parametrize(("group", "ranks"), [("exchange", 3), ("shards", 3)])
def test_ranks_agree_with_one(group: str, ranks: int, tmp_path: Path) -> None:
    """Shared memory stands in for GPUs that reach each other: the kernels, their epochs and inboxes are the same."""
    script = Path(__file__).with_name(f"interpreted_{group}.py")
    jobs = [
        subprocess.Popen(
            [sys.executable, str(script), group, str(rank), str(ranks), str(tmp_path / "memory")],
            env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for rank in range(ranks)
    ]  # fmt: skip
    try:
        said = [job.communicate(timeout=120)[0] for job in jobs]
    finally:
        for job in jobs:
            job.kill()
            job.wait()
    assert [job.returncode for job in jobs] == [0] * ranks, "\n".join(said)
    assert all(f"{group}: " in text and "results agree, bits " in text for text in said)
    assert len({text.split("results agree, bits ")[1] for text in said}) == 1, "all ranks get the same bits"
