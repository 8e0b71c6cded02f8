"""How a kernel is launched; and how the kernels of a step are compiled side by side before the first of them runs.

Triton compiles a kernel when it is first launched, in a second or so, one after another. Most of that is spent in LLVM and in
the assembler, which let other threads run: `triton.AsyncCompileMode` (Triton's documentation) has several compiled at once.
"""

import functools
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import triton

THREADS = min(8, os.cpu_count() or 1)

_compiling_only: ContextVar[bool] = ContextVar("compiling_only", default=False)


def launch(kernel: Any, grid: tuple[int, ...]) -> Callable[..., Any]:
    """`kernel[grid]`; inside `compiled_together` it is compiled for its arguments, and that is all."""
    return functools.partial(kernel.warmup, grid=grid) if _compiling_only.get() else kernel[grid]  # type: ignore[no-any-return]


@contextmanager
def compiled_together(trials: bool = False) -> Iterator[None]:
    """Inside, launches write nothing; at the end all kernels that were to be launched are ready.

    What fails to compile raises at the end, as it would have at its launch; of `trials` it raises at its launch alone. In Triton's interpreter, and where Triton has no
    such mode, nothing is compiled ahead: the `with` block is to hold nothing but launches whose results are not used.
    """
    if triton.knobs.runtime.interpret or not hasattr(triton, "AsyncCompileMode"):
        yield
        return
    before = _compiling_only.set(True)
    try:
        kept_back = {"ignore_errors": True} if trials else {}
        with ThreadPoolExecutor(THREADS) as pool, triton.AsyncCompileMode(pool, **kept_back):
            yield
    finally:
        _compiling_only.reset(before)
