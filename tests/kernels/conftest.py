"""The interpreter's checks begin when the session does, one group at a time, on the core that most tests leave idle."""

from __future__ import annotations

import subprocess
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import pytest

from tests.kernels.interpreting import ask, unable

POOL = ThreadPoolExecutor(1)
ASKED: dict[str, Future[subprocess.CompletedProcess[str]]] = {}


def pytest_collection_finish(session: pytest.Session) -> None:
    items: list[Any] = [] if unable() or session.config.option.collectonly else session.items
    wanted = [
        item.callspec.params["group"] for item in items if "interpreted_group" in getattr(item, "fixturenames", ())
    ]
    ASKED.update((group, POOL.submit(ask, group)) for group in wanted)


def pytest_sessionfinish() -> None:
    POOL.shutdown(cancel_futures=True)


@pytest.fixture
def interpreted_group(group: str) -> subprocess.CompletedProcess[str]:
    """What the group's process said."""
    return ASKED[group].result()
