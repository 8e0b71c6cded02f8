"""The instrument that says where the seconds of a fresh process go: no second is lost, and none counted twice."""

from __future__ import annotations

import time

import pytest

from tests.instruments.cold_start import Clock, table


def test_the_phases_of_a_clock_are_the_whole_time_whatever_is_inside_what() -> None:
    began = time.monotonic()
    clock = Clock(began)
    clock.turn("outer")
    with clock.within("inner"):
        time.sleep(0.02)
        with clock.within("innermost"):
            time.sleep(0.05)
    with pytest.raises(ValueError, match="as it was"), clock.within("inner"):
        raise ValueError("as it was")
    clock.turn("end")
    took = time.monotonic() - began
    assert sum(clock.seconds.values()) == pytest.approx(took, abs=1e-3)
    assert clock.seconds["innermost"] >= 0.05 and clock.seconds["inner"] >= 0.02
    assert clock.seconds["inner"] + clock.seconds["innermost"] <= took
    assert list(clock.seconds) == ["Python starts", "outer", "inner", "innermost"]


def test_the_table_has_a_row_for_every_phase_of_any_process() -> None:
    lines = table({"cold": {"a": 1.0, "b": 2.5}, "warm": {"a": 0.5, "c": 0.25}}).splitlines()
    assert lines[0] == "| seconds | cold | warm |" and lines[-1] == "| the whole | 3.50 | 0.75 |"
    assert lines[1:4] == ["| a | 1.00 | 0.50 |", "| b | 2.50 | 0.00 |", "| c | 0.00 | 0.25 |"]
