"""Settings that every test shares."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch
from hypothesis import settings

settings.register_profile("project", deadline=None, derandomize=True, print_blob=True)
settings.load_profile("project")


def pytest_configure(config: pytest.Config) -> None:
    """Of tests side by side (`pytest -n auto`) each has a core to itself, as tiny models want no more."""
    if hasattr(config, "workerinput"):
        torch.set_num_threads(1)


@pytest.fixture
def two_threads() -> Iterator[None]:
    """For what is compiled, or shared out, for several."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest first, for cores that share the work. Those marked `gpu` are skipped, in words, where there is no GPU."""
    items.sort(key=lambda item: "kernels" not in item.path.parts)
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(autouse=True)
def _stay_in_place(tmp_path: object) -> object:
    """A test that writes into the working directory is a defect: this notices one."""
    before = set(os.listdir())
    yield
    new = set(os.listdir()) - before - {".pytest_cache", "__pycache__", ".hypothesis"}
    assert not new, f"the test left {sorted(new)} in the working directory"
