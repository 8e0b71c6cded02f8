"""Ranks that are real processes, over gloo: whatever they are asked, they agree with one process.

`tox -e ranks` asks for every number of ranks, type, encoding and compiler, and for the default model.
"""

from __future__ import annotations

import os

import pytest

from tests.parallel.launched import JOB, Launched

EVERYTHING = "LLAMA_FAST_CYCLES" in os.environ
SAMPLE = [
    (2, "tied,one", "float32,bfloat16", "int8", "eager"),
    (3, "plain", "float32", "dense", "eager"),
]
MATRIX = [
    (ranks, shapes, "float32,bfloat16", "dense,int8", how)
    for how, shapes in (("eager", "plain,tied,one,four"), ("compiled", "plain,tied,one"))
    for ranks in (1, 2, 3, 4)
]


@pytest.mark.parametrize(("ranks", "shapes", "dtypes", "encodings", "how"), MATRIX if EVERYTHING else SAMPLE)
def test_the_oracle_agrees(ranks: int, shapes: str, dtypes: str, encodings: str, how: str) -> None:
    with Launched(ranks, JOB, "agree", shapes, dtypes, encodings, how) as job:
        code, output = job.ended(3600 if EVERYTHING else 240)
    assert code == 0 and f"verdicts AGREE on {ranks} ranks" in output, output


def test_speculating_ranks_never_diverge() -> None:
    with Launched(2, JOB, "speculate") as job:
        code, output = job.ended(240)
    assert code == 0 and "6 speculative texts alike on 2 ranks" in output, output


@pytest.mark.skipif(not EVERYTHING, reason="takes minutes: `tox -e ranks`")
def test_the_default_model_on_three_ranks() -> None:
    with Launched(3, JOB, "default") as job:
        code, output = job.ended(1200)
    assert code == 0 and output.count("AGREE on 3 ranks") == 2, output
