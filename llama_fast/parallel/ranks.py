"""Processes that work as one: join what `torchrun` started, leave without hanging, and end together when one fails.

    torchrun --nproc-per-node 2 -m llama_fast generate --model random:llama-2-7b
    torchrun --nnodes 2 --nproc-per-node 2 ... -m llama_fast generate --model random:llama-2-70b --stages 2

Nothing is launched here. A failure is said once, by the rank that meets it first; the launcher ends the others. Against
what no launcher sees (a stopped process, a lost host, a dead launcher) every rank watches its neighbour's heartbeat.
"""

from __future__ import annotations

import contextlib
import gc
import os
import select
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from types import FrameType
from typing import Any, NoReturn, TypeVar

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from llama_fast.contracts import Shard
from llama_fast.parallel.alone import Whole
from llama_fast.parallel.stages import OverGroups, Stages
from llama_fast.parallel.tensor_parallel import (
    Exchanger,
    OverGroup,
    OverNvlink,
    OverSymmetricMemory,
    TensorParallel,
)

T = TypeVar("T")

BEAT_SECONDS = 1.0
SILENCE_SECONDS = 15.0  # compilers and loaders may keep Python's lock for seconds
STORE_SECONDS = 5.0
MEETING_SECONDS = 45.0
NO_ANSWER = f"it has not answered for {SILENCE_SECONDS:.0f} s"
ONE_SHOT_BYTES = 1 << 18  # on two H200: 9.2 us, NCCL 12.7; larger messages were not measured
COLLECTIVE_SECONDS = 600.0  # ranks may compile or load for minutes before they meet


@dataclass(frozen=True)
class Place:
    """Which process this is, as the launcher says: `rank` of `size`, the `local_rank`-th of its host."""

    rank: int
    size: int
    local_rank: int

    @classmethod
    def of_environment(cls) -> Place | None:
        """None if no launcher started this process. Raises ValueError where its variables are no numbers."""
        if not {"RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"} <= set(os.environ):
            return None
        said = {name: os.environ.get(name, os.environ["RANK"]) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
        wrong = [f"{name}={value}" for name, value in said.items() if not value.isdecimal()]
        if wrong:
            raise ValueError(f"a launcher's variables must be numbers: {', '.join(wrong)}")
        return cls(int(said["RANK"]), int(said["WORLD_SIZE"]), int(said["LOCAL_RANK"]))


def device_of_rank(device: torch.device) -> torch.device:
    """The device that is this rank's own: "cuda" -> "cuda:1" on local rank 1. ValueError if there are too few GPUs."""
    place = Place.of_environment()
    if place is None or device.type != "cuda":
        return device
    count = torch.cuda.device_count()
    if place.local_rank >= count:
        raise ValueError(f"rank {place.rank} needs GPU {place.local_rank}, but {count} are visible on this host")
    torch.cuda.set_device(place.local_rank)
    return torch.device("cuda", place.local_rank)


class Member:
    """This process's part in a group of ranks: its shard, and how it leaves. Alone, where no launcher is, it is whole."""

    def __init__(self, shard: Shard, device: torch.device, watch: Watch | None = None):
        self.shard = shard
        self.device = device
        self.watch = watch

    @property
    def size(self) -> int:
        """Processes that work as one."""
        return 1 if self.watch is None else self.watch.place.size

    def in_stages(self, stages: int, exchanger: str | None = None) -> Shard:
        """This process's part of a model in so many pipeline stages, each cut over as many ranks; all ranks call it alike.

        ValueError where the ranks do not divide over the stages.
        """
        if self.watch is None:
            if stages != 1:
                raise ValueError(f"stages={stages}: no launcher started this process: use torchrun")
            return self.shard
        return laid_out(self.watch.place, self.device, stages, exchanger)

    def leave(self) -> None:
        """With all others, when all is done; nobody leaves before everybody is here. After a failure call `fail`."""
        if self.watch is not None:
            meet(self.device)
            self.watch.stop(COLLECTIVE_SECONDS)
            leave_group()


def join(
    device: torch.device | str,
    collective_seconds: float | None = None,
    exchanger: str | None = None,
    stages: int = 1,
) -> Member:
    """Join the group of the launcher that started this process: NCCL on GPUs, gloo on CPUs.

    The model is cut into `stages`, and each of them over as many ranks (all of them, for one). `exchanger` as in
    `exchanger_named`; by default the fastest that the devices allow. A collective that some rank does not join within
    `collective_seconds` (LLAMA_FAST_TIMEOUT_SECONDS, or ten minutes) is an error. Raises ValueError where the group cannot be
    formed.
    """
    place = Place.of_environment()
    device = device_of_rank(torch.device(device))
    if place is None:
        if stages != 1:
            raise ValueError(f"stages={stages}: no launcher started this process: use torchrun")
        return Member(Whole(), device)
    check_stages(place.size, stages)
    seconds = collective_seconds or float(os.environ.get("LLAMA_FAST_TIMEOUT_SECONDS", COLLECTIVE_SECONDS))
    watch = Watch(place)
    watch.start()
    try:
        form_group(place, device, seconds)
        shard = laid_out(place, device, stages, exchanger)
    except BaseException:
        watch.stop()
        raise
    return Member(shard, device, watch)


def check_stages(size: int, stages: int) -> None:
    """ValueError where so many ranks do not make so many stages."""
    if not 1 <= stages <= size or size % stages:
        raise ValueError(f"stages={stages} do not divide {size} ranks: each stage takes as many")


def laid_out(place: Place, device: torch.device, stages: int, exchanger: str | None = None) -> Shard:
    """This rank's part, with the groups by which it speaks. Neighbouring ranks, as those of one host, share a stage."""
    check_stages(place.size, stages)
    size = place.size // stages
    if stages == 1:
        tensor = TensorParallel(place.rank, size, exchanger_named(exchanger, place, device))
        tensor.all_reduce(torch.zeros(8, device=device))  # the first message connects the ranks
        return tensor
    mesh = init_device_mesh(device.type, (stages, size), mesh_dim_names=("stage", "tensor"))
    rows, columns = mesh["tensor"].get_group(), mesh["stage"].get_group()
    index, at = divmod(place.rank, size)
    pairs: list[Any] = []
    for stage in range(stages - 1):
        both = [dist.new_group([stage * size + t, (stage + 1) * size + t]) for t in range(size)]
        pairs.append(both[at])
    everyone, line = OverGroup(), OverGroups(index, stages, columns, pairs)
    everyone(torch.zeros(8, device=device))
    within: Shard = Whole()
    if size > 1:
        within = TensorParallel(at, size, exchanger_named(exchanger, Place(at, size, place.local_rank), device, rows))
        within.all_reduce(torch.zeros(8, device=device))
    connect_line(line, device)
    return Stages(index, stages, within, line, everyone)


def connect_line(line: OverGroups, device: torch.device) -> None:
    """The first messages of a line."""
    hello = torch.zeros(1, 1, 1, device=device)
    if not line.first:
        line.take(hello)
    if not line.last:
        line.give(hello)
    line.tell(torch.zeros(1, dtype=torch.int64, device=device), hello)()


@contextlib.contextmanager
def in_stages(
    device: torch.device | str, stages: int, collective_seconds: float | None = None, exchanger: str | None = None
) -> Iterator[Shard]:
    """`join` for programs that a launcher started, and leave at the end. Raises ValueError outside a launcher."""
    member = join(device, collective_seconds, exchanger, stages)
    if member.watch is None:
        raise ValueError("no launcher started this process: use torchrun (RANK and WORLD_SIZE are not set)")
    try:
        yield member.shard
    except BaseException:
        member.watch.stop(SILENCE_SECONDS)
        raise
    member.leave()


@contextlib.contextmanager
def tensor_parallel(
    device: torch.device | str, collective_seconds: float | None = None, exchanger: str | None = None
) -> Iterator[TensorParallel]:
    """The same for a model in one stage."""
    with in_stages(device, 1, collective_seconds, exchanger) as shard:
        assert isinstance(shard, TensorParallel)
        yield shard


def form_group(place: Place, device: torch.device, collective_seconds: float) -> None:
    on_gpu = device.type == "cuda"
    # multicast can put the GPUs of a shared host out of service
    os.environ.setdefault("NCCL_NVLS_ENABLE", "0")
    os.environ.setdefault("TORCH_SYMM_MEM_DISABLE_MULTICAST", "1")
    meeting: Any = dist
    try:
        # a store of our own patience: on a port that somebody else listens on, a client would wait as long as a collective
        store, _, _ = next(
            meeting.rendezvous("env://", place.rank, place.size, timeout=timedelta(seconds=MEETING_SECONDS))
        )
        dist.init_process_group(
            "nccl" if on_gpu else "gloo",
            store=meeting.PrefixStore("default_pg", store),
            rank=place.rank,
            world_size=place.size,
            timeout=timedelta(seconds=collective_seconds),
            device_id=device if on_gpu else None,
        )
    except (RuntimeError, dist.DistError) as error:
        where = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        raise ValueError(f"the {place.size} ranks could not meet at {where}: {first_line(error)}") from error


def exchanger_named(name: str | None, place: Place, device: torch.device, group: Any = None) -> Exchanger:
    """ "group": functional collectives. "one-shot": PyTorch's sum over symmetric memory. "exchange": our own kernels', in which
    the product of one row sends its own part; "apart": the same, but the sum behind it sends it.

    None is "exchange" for the GPUs of one host that reach each other's memory, and "group" everywhere else. `place` is this
    process's among those of `group`, by default all.
    """
    if name not in (None, "group", "one-shot", "exchange", "apart"):
        raise ValueError(f"unknown exchanger {name!r} (known: group, one-shot, exchange, apart)")
    hosts_ranks = int(os.environ.get("LOCAL_WORLD_SIZE", "0"))
    # neighbours: those of a host, or an equal part of them
    one_host = hosts_ranks > 0 and hosts_ranks % place.size == 0
    if name == "group" or (
        name is None and not (device.type == "cuda" and one_host and place.size > 1 and reach(device))
    ):
        return OverGroup(group)
    if name == "one-shot":
        from torch.distributed import _symmetric_memory as symmetric

        over: Any = group or dist.group.WORLD
        buffer = symmetric.empty(ONE_SHOT_BYTES, dtype=torch.uint8, device=device)
        symmetric.rendezvous(buffer, over)
        return OverSymmetricMemory(buffer, ONE_SHOT_BYTES, group)
    from llama_fast.kernels.exchange import over_nvlink

    return OverNvlink(over_nvlink(place.rank, place.size, device, apart=name == "apart", group=group), group)


def reach(device: torch.device) -> bool:
    """Whether this GPU reads the memory of all other visible ones, and our kernels can be imported."""
    from llama_fast import kernels

    others = [peer for peer in range(torch.cuda.device_count()) if peer != device.index]
    return kernels.available() and all(torch.cuda.can_device_access_peer(device.index, peer) for peer in others)


def meet(device: torch.device) -> None:
    """Until every rank is here with its work done, so that none takes away what another still reads."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    dist.barrier()


def leave_group() -> None:
    """Within seconds, come what may: a communicator waits for CUDA graphs that recorded it and may still be alive."""
    limit = threading.Timer(10, hard_exit, args=(0,))
    limit.daemon = True
    limit.start()
    gc.collect()
    dist.destroy_process_group()
    limit.cancel()
    limit.join()


class Watch:
    """Threads that beat, listen to the next rank's beat, and end this process on a signal or on silence."""

    def __init__(self, place: Place):
        self.place = place
        self.ended = threading.Event()
        self.wake, self.waker = socket.socketpair()
        self.waker.setblocking(False)
        self.thread = threading.Thread(target=self.run, daemon=True, name="watch over ranks")
        self.before: dict[int, object] = {}
        self.grace_seconds = 0.0
        """What a signal leaves this process to end by itself, as a server does that tells its clients."""
        self.signal: int | None = None
        """The first signal that came while there was such grace."""
        self.next_rank = (place.rank + 1) % place.size
        self.heard_at = self.answered_at = time.monotonic()
        """When the next rank was heard last, and when the launcher's store answered."""
        self.trouble = NO_ANSWER
        self.silent = threading.Event()
        """Whether the heartbeat has ended."""

    def start(self) -> None:
        if threading.current_thread() is threading.main_thread():
            # A blocked main thread runs no handler of Python's; a byte on a socket reaches the thread all the same.
            signal.set_wakeup_fd(self.waker.fileno(), warn_on_full_buffer=False)
            for number in (signal.SIGINT, signal.SIGTERM):
                self.before[number] = signal.signal(number, ignore)
        self.thread.start()

    def stop(self, patience_seconds: float = STORE_SECONDS) -> None:
        """Be over before Python is: a thread that then still talks to the store would abort the process."""
        self.ended.set()
        if self.before:
            signal.set_wakeup_fd(-1)
            for number, handler in self.before.items():
                signal.signal(number, handler)  # type: ignore[arg-type]
        self.waker.send(b"\0")
        self.thread.join(patience_seconds)  # after a failure it may be at a port where nobody answers

    def run(self) -> None:
        threading.Thread(target=self.beat, daemon=True, name="heartbeat").start()
        while not self.ended.is_set():
            readable, _, _ = select.select([self.wake], [], [], BEAT_SECONDS)
            if readable:
                self.obey(self.wake.recv(1)[0])
                continue
            silence, unanswered = (time.monotonic() - since for since in (self.heard_at, self.answered_at))
            if self.ended.is_set():
                break
            if unanswered > SILENCE_SECONDS:
                fail(f"the launcher cannot be reached any more: {self.trouble}", 1)
            if silence > SILENCE_SECONDS:
                fail(f"rank {self.next_rank} has not been heard for {SILENCE_SECONDS:.0f} s", 1)
        self.silent.wait(STORE_SECONDS)

    def beat(self) -> None:
        """In a thread of its own: a store whose host is gone without a word leaves a call of it waiting for ever."""
        store: Any | None = None
        heard = 0
        while not self.ended.wait(BEAT_SECONDS):
            try:
                store = store or connect()
                store.add(f"beat/{self.place.rank}", 1)
                beats = store.add(f"beat/{self.next_rank}", 0)
            except Exception as error:  # the store's client raises RuntimeError and its own kinds, by version
                self.trouble = first_line(error)
                continue
            self.answered_at, self.trouble = time.monotonic(), NO_ANSWER
            if beats != heard or not heard:  # silence counts from the first beat on
                heard, self.heard_at = beats, self.answered_at
        self.silent.set()

    def obey(self, number: int) -> None:
        if self.grace_seconds and number in (signal.SIGINT, signal.SIGTERM):
            if self.signal is None:
                self.signal = number
                late = threading.Timer(self.grace_seconds, self.end, args=(number,))
                late.daemon = True
                late.start()
            return
        self.end(number)

    def end(self, number: int) -> None:
        """End this process as a signal asks for."""
        if number == signal.SIGINT:
            fail("interrupted", 128 + number)
        if number == signal.SIGTERM:  # if a rank has failed and could speak, it has: then this stays unsaid
            fail("ended by the launcher: another rank has died, or the job was cancelled", 128 + number)


def ignore(number: int, frame: FrameType | None) -> None:
    """A signal's handler where the thread acts."""


def connect() -> Any:
    """A connection of its own to the launcher's store: one in use by a blocked call cannot be shared."""
    tcp: Any = dist
    store = tcp.TCPStore(
        os.environ["MASTER_ADDR"],
        int(os.environ["MASTER_PORT"]),
        is_master=False,
        timeout=timedelta(seconds=STORE_SECONDS),
        wait_for_workers=False,
    )
    return tcp.PrefixStore(f"llama_fast/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)


def fail(message: str, code: int) -> NoReturn:
    """End this process at once, whatever its threads do. Of all ranks the first to get here says why."""
    place = Place.of_environment()
    claims = [1 if place is None or place.local_rank == 0 else 2]  # where there is nobody to ask: one of each host
    if place is not None and place.size > 1:

        def claim() -> None:
            with contextlib.suppress(Exception):
                claims.append(connect().add("failed", 1))

        asking = threading.Thread(target=claim, daemon=True)
        asking.start()
        asking.join(STORE_SECONDS)  # a stranger's port accepts a connection and never answers
    if claims[-1] == 1:
        print(f"\nerror: {message}", file=sys.stderr, flush=True)  # another rank may be in the middle of a line of text
    hard_exit(code)


def hard_exit(code: int) -> NoReturn:
    """Without teardown, which can wait for ranks that are gone."""
    with contextlib.suppress(Exception):
        sys.stdout.flush()
    os._exit(code)


def explained(error: BaseException) -> str:
    """One line for an error that another rank's end caused, or for any other."""
    line = first_line(error)
    lost = isinstance(error, dist.DistError) or any(word in line.lower() for word in ("gloo", "nccl", "connection"))
    return f"another rank has ended or does not answer ({line})" if lost else line


def first_line(error: BaseException) -> str:
    """The first line of what an error says, without a C++ trace."""
    lines = str(error).strip().splitlines()
    return " ".join(lines[0].split())[:300] if lines else type(error).__name__


def only_first_speaks() -> None:
    """Standard output is rank 0's: what the others print goes nowhere."""
    if not is_first():
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115 - open as long as the process


def one_after_another(do: Callable[[], T]) -> T:
    """What `do` returns, the first rank of each host before the others: it may fill a cache that they then read."""
    place = Place.of_environment()
    if place is None or not dist.is_initialized():
        return do()
    result = do() if place.local_rank == 0 else None
    dist.barrier()
    return do() if place.local_rank else result  # type: ignore[return-value]


def is_first() -> bool:
    """Whether this process is to write files: rank 0, or the only one."""
    place = Place.of_environment()
    return place is None or place.rank == 0
