"""Two hosts on one machine: network namespaces, each with one interface, and a wire between them that can be slow or cut."""

from __future__ import annotations

import array
import fcntl
import os
import shutil
import signal
import socket
import struct
import subprocess
import sys
import threading
from pathlib import Path
from types import TracebackType

import psutil

from tests.parallel.launched import Launched

NAMES = ("llama-a", "llama-b")
MIDDLE = "llama-wire"
ADDRESSES = ("10.77.31.1", "10.77.31.2")
PORT = 29471
SIOCETHTOOL = 0x8946
OFFLOADS = {"tx checksums": 0x17, "segmentation of TCP": 0x1F, "generic segmentation": 0x24}
"""What a driver leaves to hardware, by ethtool's numbers: a frame that is carried by hand must be whole."""


def can_be_made() -> bool:
    """Whether this process may make network namespaces."""
    if shutil.which("ip") is None or os.geteuid() != 0:
        return False
    made = subprocess.run(["ip", "netns", "add", MIDDLE], capture_output=True).returncode == 0
    return made and subprocess.run(["ip", "netns", "del", MIDDLE], capture_output=True).returncode == 0


class Hosts:
    """Two hosts, `seconds` apart; a context that leaves no namespace and no process behind."""

    def __init__(self, seconds: float = 0.0):
        self.seconds = seconds
        self.jobs: list[Launched] = []

    def __enter__(self) -> Hosts:
        self._clear()
        for name in (*NAMES, MIDDLE):
            run("ip", "netns", "add", name)
        for i, name in enumerate(NAMES):
            here, there = f"host{i}", f"wire{i}"
            run("ip", "link", "add", here, "netns", name, "type", "veth", "peer", "name", there, "netns", MIDDLE)
            run("ip", "netns", "exec", name, "ip", "link", "set", "lo", "up")
            run("ip", "netns", "exec", name, "ip", "addr", "add", f"{ADDRESSES[i]}/24", "dev", here)
            whole = [sys.executable, __file__, here]
            run("ip", "netns", "exec", name, *whole, env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])})
            for namespace, link in ((name, here), (MIDDLE, there)):
                run("ip", "netns", "exec", namespace, "ip", "link", "set", link, "up")
            etc = Path("/etc/netns") / name  # what `ip netns exec` shows as /etc/hosts: nobody answers for names here
            etc.mkdir(parents=True, exist_ok=True)
            (etc / "hosts").write_text(
                "127.0.0.1 localhost\n" + "".join(f"{a} {n}\n" for a, n in zip(ADDRESSES, NAMES, strict=True))
            )
        wire = [sys.executable, str(Path(__file__).with_name("wire.py")), "wire0", "wire1", str(self.seconds)]
        self.wire = subprocess.Popen(["ip", "netns", "exec", MIDDLE, *wire], stdout=subprocess.PIPE, text=True)
        assert self.wire.stdout is not None and self.wire.stdout.readline() == "carrying\n"
        return self

    def launch(self, host: int, ranks: int, *arguments: object) -> Launched:
        """One host's launcher, of a job of two hosts."""
        node = ("--nnodes=2", f"--node-rank={host}", f"--master-addr={ADDRESSES[0]}", f"--master-port={PORT}")
        within = ("ip", "netns", "exec", NAMES[host])
        job = Launched(ranks, *arguments, options=node, within=within, more={"GLOO_SOCKET_IFNAME": f"host{host}"})
        self.jobs.append(job)
        return job

    def cut(self) -> None:
        """No frame arrives any more, and nobody is told."""
        self.wire.send_signal(signal.SIGSTOP)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        for job in self.jobs:
            job.__exit__(kind, error, at)
        self.wire.send_signal(signal.SIGCONT)
        self.wire.kill()
        self.wire.communicate()
        self._clear()

    def _clear(self) -> None:
        for name in (*NAMES, MIDDLE):
            subprocess.run(["ip", "netns", "del", name], capture_output=True)
            shutil.rmtree(Path("/etc/netns") / name, ignore_errors=True)


def all_of(job: Launched) -> list[psutil.Process]:
    """A host's launcher and its ranks."""
    return [psutil.Process(job.process.pid), *job.left_over()]


def both_ended(one: Launched, other: Launched, within_seconds: float) -> list[tuple[int, str]]:
    """Exit code and output of two jobs, each of which must end in so many seconds from now and leave no process."""
    found: list[tuple[int, str] | None] = [None, None]

    def wait(i: int, job: Launched) -> None:
        found[i] = job.ended(within_seconds)

    threads = [threading.Thread(target=wait, args=pair) for pair in enumerate((one, other))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found[0] is not None and found[1] is not None, "a host's processes have not ended"
    return [found[0], found[1]]


def run(*command: str, env: dict[str, str] | None = None) -> None:
    subprocess.run(command, check=True, capture_output=True, env=env)


def say_whole_frames(interface: str) -> None:
    """Have an interface of this namespace finish its frames itself."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asking:
        for number in OFFLOADS.values():
            value = array.array("B", struct.pack("II", number, 0))
            request = struct.pack("16sP", interface.encode(), value.buffer_info()[0])
            fcntl.ioctl(asking, SIOCETHTOOL, request)


if __name__ == "__main__":
    say_whole_frames(sys.argv[1])
