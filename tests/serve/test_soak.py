"""Memory after thousands of short requests: `tox -e heavy`."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
LINE = re.compile(r"(\d+) requests: ([\d.]+) MB, ([\d.]+) given out, (\d+) objects, (\d+) files")


@pytest.mark.heavy
@pytest.mark.timeout(7200)
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc and /proc tell what is counted")
def test_memory_is_flat_over_ten_thousand_requests() -> None:
    """Of the allocator, of Python's objects and of files nothing grows; resident memory, with free lists, by a few megabytes."""
    command = [sys.executable, "-m", "tests.instruments.serving_soak", "--requests", "11000"]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, cwd=ROOT, check=True)
    print(done.stdout)
    found = [[float(value) for value in line.groups()] for line in LINE.finditer(done.stdout)]
    assert len(found) == 11
    _, resident, given_out, objects, files = zip(*found)
    assert max(given_out[1:]) - min(given_out[1:]) < 3
    assert max(objects[1:]) - min(objects[1:]) < 300
    assert len(set(files)) == 1
    assert max(resident) - resident[1] < 15
