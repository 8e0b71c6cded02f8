"""One engine on several ranks: the first rank's is asked, and tells the others before each step what it was asked since the last.

Every rank chooses the same tokens from the same logits, so engines that are asked the same do the same: they take the same steps,
whose sums they need each other for. A rank that has chosen otherwise is noticed one step later, and ends.
"""

from __future__ import annotations

import io
import pickle
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

from llama_fast.engine.engine import Engine
from llama_fast.engine.request import Event, Request, Writer
from llama_fast.llama import Llama

T = TypeVar("T")
Outcome = Sequence[tuple[int, int, str | None]] | str | None
"""What all ranks must agree on: a step's events (id, token, finish reason), or a job's error."""


class Sender(Protocol):
    """The first rank's end of a way to the others."""

    def send(self, message: bytes) -> None:
        """Give a message to every other rank."""


class Receiver(Protocol):
    """Another rank's end of it."""

    def receive(self) -> bytes:
        """Wait for the next message."""


@dataclass(frozen=True)
class Add:
    """A request, as number `id`; `letter` is the request and its writer, which has seen no token yet."""

    id: int
    letter: bytes

    def obey(self, engine: Engine, letters: Letters) -> None:
        found = engine.add(*letters.read(self.letter))
        if found != self.id:
            raise RuntimeError(f"the ranks differ: request {self.id} of the first is request {found} here")


@dataclass(frozen=True)
class Cancel:
    """Nobody wants request `id` any more."""

    id: int

    def obey(self, engine: Engine, letters: Letters) -> None:
        engine.cancel(self.id)


@dataclass(frozen=True)
class Message:
    """What the first rank does now: first the orders, then a job, or a step where there is none; `last`: then no more.

    `before` is what its last step or job brought.
    """

    before: Outcome
    orders: Sequence[Add | Cancel] = ()
    job: Callable[[], Any] | None = None
    last: bool = False


class LeadingEngine(Engine):
    """The first rank's engine, which is used as any other: the other ranks follow. Arguments are those of `Engine`."""

    def __init__(self, sender: Sender, llama: Llama, *arguments: Any, **options: Any):
        super().__init__(llama.runner, *arguments, **options)
        self._sender, self._letters = sender, Letters(llama)
        self._orders: list[Add | Cancel] = []
        self._outcome: Outcome = None
        self._closed = False

    def add(self, request: Request, writer: Writer | None = None) -> int:
        try:
            letter = self._letters.written((request, writer))
        except (TypeError, AttributeError, pickle.PicklingError) as error:
            raise ValueError(f"the other ranks cannot be told of this request: {error}") from None
        id = super().add(request, writer)
        self._orders.append(Add(id, letter))
        return id

    def cancel(self, id: int) -> bool:
        found = super().cancel(id)
        self._orders.append(Cancel(id))
        return found

    def step(self) -> list[Event]:
        self._send()
        events = super().step()
        self._outcome = told(events)
        return events

    def everywhere(self, job: Callable[[], T]) -> Callable[[], T]:
        """A job that runs on all ranks when it is called, and returns what it returned on this one."""

        def led() -> T:
            self._send(job)
            self._outcome = None
            try:
                return job()
            except Exception as error:
                self._outcome = type(error).__name__
                raise

        return led

    def close(self) -> None:
        """Cancel all requests, here and everywhere; the others then stop following."""
        super().close()
        if not self._closed:
            self._closed = True
            self._send(last=True)

    def _send(self, job: Callable[[], Any] | None = None, last: bool = False) -> None:
        self._sender.send(self._letters.written(Message(self._outcome, self._orders, job, last)))
        self._orders = []


def follow(engine: Engine, receiver: Receiver, llama: Llama) -> None:
    """Do what the first rank's engine does, until it is closed. RuntimeError if they differ, or if that rank has ended."""
    letters, outcome = Letters(llama), None
    while True:
        message: Message = letters.read(receiver.receive())
        if message.before != outcome:
            raise RuntimeError(f"the ranks differ: the first has {message.before!r:.200}, this one {outcome!r:.200}")
        for order in message.orders:
            order.obey(engine, letters)
        if message.last:
            return
        outcome = told(engine.step()) if message.job is None else error_of(message.job)


def told(events: Sequence[Event]) -> Outcome:
    """What of a step's events all ranks must agree on."""
    return [(event.id, event.token, event.finish_reason) for event in events]


def error_of(job: Callable[[], Any]) -> str | None:
    """Run a job; the name of its error, which the first rank tells to whom it concerns."""
    try:
        job()
    except Exception as error:
        return type(error).__name__
    return None


class Letters:
    """Messages as bytes. What every rank has by itself, the model and its parts (runner, tokenizer, ...), goes by its name."""

    def __init__(self, llama: Llama):
        self._llama = llama

    def written(self, message: Any) -> bytes:
        """The message as bytes. TypeError, AttributeError or PicklingError for what cannot travel, as an open file."""
        parts = {name: value for name, value in vars(self._llama).items() if type(value).__module__ != "builtins"}
        buffer = io.BytesIO()
        Writing(buffer, {id(value): name for name, value in {**parts, WHOLE: self._llama}.items()}).dump(message)
        return buffer.getvalue()

    def read(self, letter: bytes) -> Any:
        """A message of the first rank, with this rank's own model in it."""
        return Reading(io.BytesIO(letter), self._llama).load()


WHOLE = ""
"""The name of the model itself."""


class Writing(pickle.Pickler):
    """Names of some objects, by their ids, stand for them."""

    def __init__(self, buffer: io.BytesIO, names: Mapping[int, str]):
        super().__init__(buffer, pickle.HIGHEST_PROTOCOL)
        self._names = names

    def persistent_id(self, value: Any) -> str | None:
        return self._names.get(id(value))


class Reading(pickle.Unpickler):
    """A name stands for that part of a model."""

    def __init__(self, buffer: io.BytesIO, llama: Llama):
        super().__init__(buffer)
        self._llama = llama

    def persistent_load(self, name: str) -> Any:
        return self._llama if name == WHOLE else getattr(self._llama, name)
