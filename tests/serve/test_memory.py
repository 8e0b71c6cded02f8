"""Products of ever new shapes do not pile up in a server."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from llama_fast.serve import memory

GROWTH = """
import psutil, torch
from llama_fast.serve.memory import bound_prepared_products
if {bounded}:
    bound_prepared_products()
weight = torch.randn(576, 576)
def product(rows):
    torch.ops.mkldnn._linear_pointwise(torch.randn(rows, 576), weight, None, "none", [], "")
with torch.no_grad():
    product(400)
    before = psutil.Process().memory_info().rss
    for rows in range(20, 220):
        product(rows)
    print(psutil.Process().memory_info().rss - before)
"""


def grown(bounded: bool) -> float:
    """Megabytes that 200 numbers of rows cost a process."""
    environment = {name: value for name, value in os.environ.items() if name not in memory.CACHES}
    done = subprocess.run(
        [sys.executable, "-c", GROWTH.format(bounded=bounded)],
        capture_output=True, text=True, check=True, env=environment,
    )  # fmt: skip
    return int(done.stdout) / 1e6


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="there is no oneDNN")
def test_few_prepared_products_are_kept() -> None:
    bounded, unbounded = grown(True), grown(False)
    if unbounded < 50:
        pytest.skip(f"this machine's oneDNN keeps {unbounded:.0f} MB for 200 shapes")
    assert bounded < unbounded / 2


def test_what_the_environment_says_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    found = {memory.CACHES[0]: "7"}
    monkeypatch.setattr(os, "environ", found)
    memory.bound_prepared_products()
    assert found == {memory.CACHES[0]: "7", memory.CACHES[1]: str(memory.KEPT)}
