"""The wall: the fastest of several ways to read counts, and the most that was ever seen."""

from __future__ import annotations

from itertools import cycle

import pytest
import torch

from llama_fast.ladder.bandwidth import Wall, read_bandwidth_gb_per_s


@pytest.mark.parametrize("seconds", [[4.0, 1.0, 2.0], [1.0, 5.0, 5.0], [3.0, 2.0, 1.0]])
def test_the_fastest_reader_counts(monkeypatch: pytest.MonkeyPatch, seconds: list[float]) -> None:
    took = cycle(seconds)
    monkeypatch.setattr("llama_fast.ladder.bandwidth._cpu_seconds", lambda work: next(took))
    assert read_bandwidth_gb_per_s(torch.device("cpu"), seconds=0.01) == pytest.approx(2**29 / 1e9)


def test_a_short_look_measures_all_the_same() -> None:
    assert 0.1 < read_bandwidth_gb_per_s(torch.device("cpu"), seconds=1e-9) < 1e4


@pytest.mark.parametrize(("device", "most"), [("cpu", [20.0, 30.0, 30.0]), ("cuda", [20.0, 20.0, 20.0])])
def test_the_wall_is_the_most_that_was_seen(monkeypatch: pytest.MonkeyPatch, device: str, most: list[float]) -> None:
    seen = iter([20.0, 30.0, 10.0])
    monkeypatch.setattr("llama_fast.ladder.bandwidth.read_bandwidth_gb_per_s", lambda device: next(seen))
    wall = Wall(torch.device(device))
    found = [wall.gb_per_s]
    for _ in range(2):
        wall.look_again()
        found.append(wall.gb_per_s)
    assert found == most
