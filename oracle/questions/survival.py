"""An exception inside a question is an answer that names its place: a sampler that gives an id outside the vocabulary is at
fault, and not the question."""

from __future__ import annotations

import traceback
from collections.abc import Callable
from pathlib import Path

import torch

from oracle.statistics.compare import Check, Unjudgeable, Verdict, empty

SUBJECTS = ("llama_fast", "llama_ref")


def survived(name: str, ask: Callable[[], Verdict]) -> Verdict:
    """The answer; a failed check where it ended with an error. EMPTY where memory was short; what cannot be judged is raised."""
    try:
        return ask()
    except Unjudgeable:
        raise
    except (MemoryError, torch.OutOfMemoryError) as error:
        return empty(f"{name}: memory", told_of(error))
    except Exception as error:
        return Verdict((Check(f"{name}: ended with an error", 1, 0, f"{told_of(error)} ({place_of(error)})"),))


def told_of(error: BaseException) -> str:
    """ "IndexError: index 7 is out of bounds"."""
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"


def place_of(error: BaseException) -> str:
    """The innermost line of the subject's that the error passed through, or the innermost of all: "sampling.py:93"."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if any(part in Path(frame.filename).parts for part in SUBJECTS)]
    frame = (own or frames)[-1]
    return f"{Path(frame.filename).name}:{frame.lineno}"
