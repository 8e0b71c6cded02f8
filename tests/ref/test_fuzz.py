"""300 mutated files in every run of the tests; `python -m tests.ref.fuzz` makes 20,000, each from a seed of its own."""

from __future__ import annotations

from pathlib import Path

from tests.ref.fuzz import CONFIG, TARGETS, fuzz, mutated, run_case, write_seeds

FIRST = 100_000  # others than those of the long run


def test_a_damaged_file_is_refused_in_our_words_or_read(tmp_path: Path) -> None:
    counts, findings = fuzz(FIRST, 300, tmp_path)
    assert not findings
    assert sum(counts.values()) == 300
    outcomes = {line.rpartition(": ")[2] for line in counts}
    assert outcomes == {"accepted", "refused"}  # neither alone: the damage is neither too great nor too small


def test_a_fault_is_found(tmp_path: Path, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    """A loader that lets a wrong exception out, or takes memory, is a finding."""
    import tests.ref.fuzz as module

    (tmp_path / "seeds").mkdir()
    write_seeds(tmp_path / "seeds")
    held = [bytearray(600_000_000)]  # a peak of earlier work hides nothing
    held.clear()

    def greedy(work: Path, kind: str) -> None:
        held.append(bytearray(400_000_000))

    def wrong(work: Path, kind: str) -> None:
        raise KeyError("x")

    for fault, told in ((wrong, "KeyError: 'x'"), (greedy, "grew by")):
        monkeypatch.setattr(module, "_load", fault)
        assert told in run_case(3, tmp_path / "seeds", tmp_path / "work")[1]
    held.clear()


def test_a_case_is_the_same_every_time() -> None:
    import random

    data = bytes(range(256)) * 8
    assert mutated("x.bin", data, random.Random(7)) == mutated("x.bin", data, random.Random(7)) != data
    assert CONFIG.n_layers == 2 and len(TARGETS) == 28
