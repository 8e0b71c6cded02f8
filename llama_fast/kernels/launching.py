"""How a kernel is launched; and how the kernels of a step are compiled side by side before the first of them runs.

Triton compiles a kernel when it is first launched, in a second or so, one after another. Most of that is spent in LLVM and in
the assembler, which let other threads run: `triton.AsyncCompileMode` (Triton's documentation) has several compiled at once. So
does the C compiler, by which Triton builds what launches a kernel, one for each list of argument types.
"""

import contextlib
import functools
import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextvars import ContextVar
from typing import Any

import triton

THREADS = min(16, os.cpu_count() or 1)

_compiling: ContextVar[set[Any] | None] = ContextVar("compiling", default=None)
"""The kernels that are under way, where launches only compile."""


def launch(kernel: Any, grid: tuple[int, ...]) -> Callable[..., Any]:
    """`kernel[grid]`; inside `compiled_together` it is compiled for its arguments, and that is all."""
    under_way = _compiling.get()
    if under_way is None:
        return kernel[grid]  # type: ignore[no-any-return]

    def compile_only(*arguments: Any, **options: Any) -> None:
        future = getattr(kernel.warmup(*arguments, grid=grid, **options), "future", None)
        if future is not None and future not in under_way:  # else it is compiled, or asked for already
            under_way.add(future)
            future.add_done_callback(build_launcher)

    return compile_only


@contextlib.contextmanager
def compiled_together(trials: bool = False) -> Iterator[None]:
    """Inside, launches write nothing; at the end all kernels that were to be launched are ready.

    What fails to compile raises at the end, as it would have at its launch; of `trials` it raises at its launch alone. In Triton's
    interpreter, and where Triton has no such mode, nothing is compiled ahead: the `with` block is to hold nothing but launches
    whose results are not used.
    """
    if triton.knobs.runtime.interpret or not hasattr(triton, "AsyncCompileMode"):
        yield
        return
    triton_ready().join()
    before = _compiling.set(set())
    try:
        kept_back = {"ignore_errors": True} if trials else {}
        with ThreadPoolExecutor(THREADS) as pool, triton.AsyncCompileMode(pool, **kept_back):
            yield
    finally:
        _compiling.reset(before)


def build_launcher(compiled: Future[Any]) -> None:
    """Have what launches a kernel built, in the thread that has compiled it: Triton finds the file in its cache at the first launch.

    What fails here fails again there, where it can be told.
    """
    launcher = getattr(triton.runtime.driver.active, "launcher_cls", None)
    with contextlib.suppress(Exception):
        if launcher is not None:
            kernel = compiled.result()
            launcher(kernel.src, kernel.metadata)


@functools.cache
def triton_ready() -> threading.Thread:
    """A thread that does what Triton does once a process before it compiles: it reads all of itself, to know its caches' files by
    it, and builds what asks the driver. Started early, while weights are read or made."""
    thread = threading.Thread(target=_ready, name="triton-ready", daemon=True)
    thread.start()
    return thread


def _ready() -> None:
    with contextlib.suppress(Exception):  # what fails here fails again where it is needed
        triton.runtime.cache.triton_key()
        triton.runtime.driver.active.utils  # noqa: B018
