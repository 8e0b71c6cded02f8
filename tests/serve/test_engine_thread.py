"""The event loop's side of the engine's thread: nobody has to listen for a row to end, and nothing waits for ever."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Awaitable, Callable

import pytest

from llama_fast import Llama
from llama_fast.build import rebuild
from llama_fast.engine.engine import Engine
from llama_fast.engine.request import Request
from llama_fast.engine.runner import Runner
from llama_fast.recipes import paged
from llama_fast.serve.engine_thread import EngineThread
from llama_fast.serve.errors import ApiError
from llama_fast.serve.metrics import Metrics

ENDLESS = Request([1, 2, 3], 2000)


def started(
    llama: Llama,
    play: Callable[[EngineThread], Awaitable[None]],
    timeout: float = 60.0,
    max_queue: int = 2,
    runner: Runner | None = None,
) -> None:
    """Play with a thread whose engine has two rows."""

    async def run() -> None:
        thread = EngineThread(Engine(runner or llama.runner, 2, 2048), Metrics(), max_queue, timeout)
        thread.start()
        try:
            await play(thread)
        finally:
            await thread.stop()
        assert thread.unfinished == 0 and not thread.engine.busy and thread.engine.free == 2

    asyncio.run(run())


async def until(reached: Callable[[], bool]) -> None:
    end = time.monotonic() + 20
    while not reached():
        assert time.monotonic() < end, "it did not come"
        await asyncio.sleep(0.002)


def test_rows_whose_time_is_up_are_free_though_nobody_listens(llama: Llama) -> None:
    """As of a client that does not read what it is sent."""

    async def play(thread: EngineThread) -> None:
        group = thread.answer([(ENDLESS, llama.writer(ENDLESS.ids))] * 2)
        await until(lambda: thread.engine.free == 0)
        await until(lambda: thread.unfinished == 0)
        assert thread.engine.free == 2
        assert thread.metrics.registry.get_sample_value("llama_fast_cancelled_rows_total") == 2
        with pytest.raises(ApiError, match=r"not complete within 0\.1 s"):
            async for _ in group:
                pass

    started(llama, play, timeout=0.1)


def test_a_closed_group_is_cancelled_once(llama: Llama) -> None:
    async def play(thread: EngineThread) -> None:
        group = thread.answer([(ENDLESS, llama.writer(ENDLESS.ids))] * 2)
        await until(lambda: thread.engine.free == 0)
        group.close()
        group.close()
        await until(lambda: thread.unfinished == 0)
        count = thread.metrics.registry.get_sample_value("llama_fast_cancelled_rows_total")
        assert count == 2

    started(llama, play)


def test_jobs_run_between_steps_and_tell_their_errors(llama: Llama) -> None:
    async def play(thread: EngineThread) -> None:
        assert (await thread.run(threading.current_thread)).name == "engine"
        with pytest.raises(ZeroDivisionError):
            await thread.run(lambda: 1 // 0)
        with pytest.raises(ApiError) as late:
            await thread.run(lambda: time.sleep(0.3))
        assert late.value.status == 408

    started(llama, play, timeout=0.1)


def test_a_job_does_not_outlive_the_server(llama: Llama) -> None:
    async def play(thread: EngineThread) -> None:
        first = asyncio.ensure_future(thread.run(lambda: time.sleep(0.3)))
        second = asyncio.ensure_future(thread.run(lambda: None))
        await asyncio.sleep(0)
        await thread.finish(0)
        for job in (first, second):
            with pytest.raises(ApiError) as ended:
                await job
            assert ended.value.code == "stopping"
        with pytest.raises(ApiError, match="stopping"):
            thread.answer([(ENDLESS, llama.writer(ENDLESS.ids))])

    started(llama, play)


def test_what_the_engine_refuses_is_told(llama: Llama) -> None:
    """Endpoints check before; what they overlook is a refusal all the same."""

    async def play(thread: EngineThread) -> None:
        group = thread.answer([(Request([99_999], 3), llama.writer([1]))])
        with pytest.raises(ApiError, match="token id 99999 is outside the vocabulary") as refused:
            await group.__anext__()
        assert refused.value.status == 400
        await until(lambda: thread.unfinished == 0)

    started(llama, play)


def test_tokens_that_were_there_and_rows_that_made_way_are_counted(llama: Llama) -> None:
    """Two pages of 32 positions are reused by the second request; then two rows want more pages than the pool has."""
    begin = [(7 * i) % 200 + 3 for i in range(70)]

    async def play(thread: EngineThread) -> None:
        async def told(requests: list[Request]) -> None:
            async for _ in thread.answer([(request, llama.writer(request.ids)) for request in requests]):
                pass

        def counts() -> list[float | None]:
            names = ("llama_fast_reused_prompt_tokens_total", "llama_fast_pre_emptions_total")
            return [thread.metrics.registry.get_sample_value(name) for name in names]

        await told([Request(begin, 3)])
        assert counts() == [0, 0]
        await told([Request([*begin, 9], 3)])
        assert counts() == [64, 0]
        await told([Request([5 + n] * 40, 150) for n in range(2)])
        assert (counts()[1] or 0) >= 1

    started(llama, play, runner=rebuild(llama.runner, paged(llama.runner.plan, 256)))
