"""The engine in a thread of its own, and the event loop's side of it: rows go in by a queue, events come out by another.

One thread adds, steps and cancels. Between two steps it looks for what is new, so that a row whose client left is free within
a step. All counting is done in the event loop's thread, which therefore needs no lock.
"""

from __future__ import annotations

import asyncio
import contextlib
import queue
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from llama_fast.engine.engine import Engine
from llama_fast.engine.request import FAILED, Event, Request, Writer
from llama_fast.serve.errors import ApiError
from llama_fast.serve.metrics import Metrics

T = TypeVar("T")
Command = Callable[[], None]


@dataclass(eq=False)
class Ticket:
    """A row on its way through the engine."""

    request: Request
    writer: Writer
    index: int
    """Which of its group's rows it is."""
    group: Group
    id: int | None = None
    """The engine's number of it, once it is there."""
    told: float = 0.0
    """When it came, then when its last token did."""
    tokens: int = 0
    open: bool = True
    """Whether the event loop still counts it."""
    dropped: bool = False
    """Whether its cancellation is on its way."""


class Group:
    """The rows of one HTTP request. Iterate over lists of (index, event) until all have ended; `close` cancels what has not.

    A list has what came since the last one: a client that is slower than the engine gets several tokens at once.
    """

    def __init__(self, thread: EngineThread, rows: Sequence[tuple[Request, Writer]]):
        self._thread = thread
        self.inbox: asyncio.Queue[tuple[int, Event | ApiError]] = asyncio.Queue()
        self.tickets = [Ticket(request, writer, i, self) for i, (request, writer) in enumerate(rows)]
        self._left = len(rows)
        self._timer: asyncio.TimerHandle | None = None
        self._error: ApiError | None = None

    def __aiter__(self) -> Group:
        return self

    async def __anext__(self) -> list[tuple[int, Event]]:
        if not self._left:
            raise StopAsyncIteration
        if self._error is not None:
            raise self._error
        found = [self._checked(*await self.inbox.get())]
        while self._left and not self.inbox.empty() and self._error is None:
            index, event = self.inbox.get_nowait()
            if isinstance(event, ApiError):
                self._error = event  # what came before it is told first
            else:
                found.append(self._checked(index, event))
        return found

    def _checked(self, index: int, event: Event | ApiError) -> tuple[int, Event]:
        if isinstance(event, ApiError):
            raise event
        self._left -= event.finish_reason is not None
        return index, event

    def close(self) -> None:
        """Cancel every row that has not ended; again does nothing."""
        if self._timer is not None:
            self._timer.cancel()
        left = [ticket for ticket in self.tickets if ticket.open and not ticket.dropped]
        for ticket in left:
            ticket.dropped = True
        self._thread.drop(left)

    def expire_after(self, seconds: float) -> None:
        """Cancel the rows after so long, and raise an ApiError 408 where the group is iterated over."""
        self._timer = asyncio.get_running_loop().call_later(seconds, self._expire, seconds)

    def _expire(self, seconds: float) -> None:
        error = ApiError(408, f"the answer was not complete within {seconds:g} s: it is cancelled", code="timeout")
        self.inbox.put_nowait((0, error))
        self.close()


class EngineThread:
    """An engine that asyncio talks to."""

    def __init__(self, engine: Engine, metrics: Metrics, max_queue: int, timeout: float):
        """At most `max_queue` rows wait for a slot; a request may take `timeout` seconds, waiting included."""
        self.engine, self.metrics, self.max_queue, self.timeout = engine, metrics, max_queue, timeout
        self.on_failure: Callable[[], None] = lambda: None
        """What is called, in the event loop, if the engine breaks."""
        self.rows = len(engine.slots)
        self.failure: str | None = None
        self.stopping = False
        self._commands: queue.SimpleQueue[Command | None] = queue.SimpleQueue()
        self._tickets: dict[int, Ticket] = {}  # of the engine's thread, by the engine's numbers
        self._open: set[Ticket] = set()  # of the event loop
        self._jobs: set[asyncio.Future[Any]] = set()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None
        metrics.rows.set(self.rows)

    # In the event loop

    def start(self) -> None:
        """Start the thread; its events go to the event loop that runs now."""
        self._loop = asyncio.get_running_loop()
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    @property
    def unfinished(self) -> int:
        """Rows that are answered or wait, and jobs."""
        return len(self._open) + len(self._jobs)

    def answer(self, rows: Sequence[tuple[Request, Writer]]) -> Group:
        """Have these rows answered; ApiError 429 if the queue has no room for them, 503 if the server is stopping."""
        self.check_open()
        if len(rows) > self.rows + self.max_queue:
            most = self.rows + self.max_queue
            raise ApiError(400, f"n: {len(rows)} rows of one request exceed the {most} that this server holds", "n")
        self._check_room(len(rows))
        group = Group(self, rows)
        group.expire_after(self.timeout)
        self._open.update(group.tickets)
        self._count()
        now = time.perf_counter()
        for ticket in group.tickets:
            ticket.told = now
        self._commands.put(lambda: self._add(group.tickets))
        return group

    async def run(self, job: Callable[[], T]) -> T:
        """Run a job in the engine's thread, between two steps."""
        self.check_open()
        self._check_room(1)
        assert self._loop is not None
        done: asyncio.Future[T] = self._loop.create_future()
        self._jobs.add(done)

        def settle(set_it: Callable[[Any], None], value: Any) -> None:
            if not done.done():
                set_it(value)

        def work() -> None:
            if done.cancelled():
                return
            try:
                result = job()
            except Exception as error:
                self._tell(settle, done.set_exception, error)
            else:
                self._tell(settle, done.set_result, result)

        self._commands.put(work)
        try:
            return await asyncio.wait_for(done, self.timeout)
        except asyncio.TimeoutError:
            raise ApiError(408, f"there was no answer within {self.timeout:g} s", code="timeout") from None
        finally:
            self._jobs.discard(done)

    def _check_room(self, rows: int) -> None:
        if self.unfinished + rows > self.rows + self.max_queue:
            waiting = max(0, self.unfinished - self.rows)
            raise ApiError(429, f"the queue is full: {waiting} wait", code="queue_full")

    def check_open(self) -> None:
        """ApiError 503 if nothing new is taken."""
        if self.failure is not None:
            raise ApiError(503, f"the engine has failed: {self.failure}", code="engine_failed")
        if self.stopping:
            raise ApiError(503, "the server is stopping", code="stopping")

    def drop(self, tickets: Sequence[Ticket]) -> None:
        """Nobody wants these rows any more."""
        if tickets:
            self.metrics.cancelled_rows.inc(len(tickets))
            self._commands.put(lambda: self._cancel(tickets))

    async def finish(self, seconds: float) -> None:
        """Take nothing new, wait at most so long for what runs, and then end it with an error that clients are told."""
        self.stopping = True
        end = time.perf_counter() + seconds
        while self.unfinished and time.perf_counter() < end:
            await asyncio.sleep(0.02)
        error = ApiError(503, "the server was stopped before this answer was complete", code="stopping")
        for ticket in list(self._open):
            ticket.group.inbox.put_nowait((ticket.index, error))
        self._end_jobs(error)

    async def stop(self) -> None:
        """Cancel every row and end the thread."""
        self.stopping = True
        self._commands.put(None)
        if self._thread is not None:
            await asyncio.to_thread(self._thread.join)

    def _deliver(self, news: Sequence[tuple[Ticket, Event | ApiError | None]]) -> None:
        """Hand events to their groups; None for a row that was cancelled."""
        for ticket, event in news:
            if event is not None:
                ticket.group.inbox.put_nowait((ticket.index, event))
            if event is None or isinstance(event, ApiError) or event.finish_reason is not None:
                ticket.open = False
                self._open.discard(ticket)
        self._count()

    def _count(self) -> None:
        self.metrics.rows_in_use.set(min(self.rows, self.unfinished))
        self.metrics.queue.set(max(0, self.unfinished - self.rows))

    def _failed(self, reason: str) -> None:
        self.failure = reason
        error = ApiError(500, f"the engine has failed: {reason}", code="engine_failed")
        self._deliver([(ticket, error) for ticket in list(self._open)])
        self._end_jobs(error)
        self.on_failure()

    def _end_jobs(self, error: ApiError) -> None:
        for job in self._jobs:
            if not job.done():
                job.set_exception(error)

    # In the engine's thread

    def _run(self) -> None:
        try:
            while self._obey():
                self._step()
        except Exception as error:  # of the device, or our own bug: nothing that runs can be trusted any more
            self._tell(self._failed, " ".join(f"{type(error).__name__}: {error}".split())[:300])
        finally:
            with contextlib.suppress(Exception):
                self.engine.close()
            self._tell(self._deliver, [(ticket, None) for ticket in self._tickets.values()])

    def _obey(self) -> bool:
        """Do all that was commanded; wait for a command if there is nothing to step. False at the end."""
        wait = not self.engine.busy
        while True:
            try:
                command = self._commands.get(block=wait)
            except queue.Empty:
                return True
            if command is None:
                return False
            command()
            wait = False

    def _add(self, tickets: Sequence[Ticket]) -> None:
        for ticket in tickets:
            try:
                ticket.id = self.engine.add(ticket.request, ticket.writer)
            except ValueError as error:
                self._tell(self._deliver, [(ticket, ApiError(400, str(error)))])
            else:
                self._tickets[ticket.id] = ticket

    def _cancel(self, tickets: Sequence[Ticket]) -> None:
        for ticket in tickets:
            if ticket.id is not None and self.engine.cancel(ticket.id):
                del self._tickets[ticket.id]
        self._tell(self._deliver, [(ticket, None) for ticket in tickets])

    def _step(self) -> None:
        news: list[tuple[Ticket, Event | ApiError | None]] = []
        reused, made_way = self.engine.reused_tokens, self.engine.pre_emptions
        events, now = self.engine.step(), time.perf_counter()
        self.metrics.reused_tokens.inc(self.engine.reused_tokens - reused)
        self.metrics.pre_emptions.inc(self.engine.pre_emptions - made_way)
        for event in events:
            ticket = self._tickets[event.id]
            (self.metrics.between_tokens if ticket.tokens else self.metrics.first_token).observe(now - ticket.told)
            if not ticket.tokens:
                self.metrics.prompt_tokens.inc(len(ticket.request.ids))
            ticket.told, ticket.tokens = now, ticket.tokens + 1
            if event.finish_reason is not None:
                del self._tickets[event.id]
            failed = event.finish_reason == FAILED
            news.append(
                (ticket, ApiError(400, f"the grammar: {event.failure}", code="grammar_failed") if failed else event)
            )
        if news:
            self.metrics.generated_tokens.inc(len(news))
            self._tell(self._deliver, news)

    def _tell(self, function: Callable[..., None], *arguments: Any) -> None:
        assert self._loop is not None
        with contextlib.suppress(RuntimeError):  # the event loop is closed: nobody listens
            self._loop.call_soon_threadsafe(function, *arguments)
