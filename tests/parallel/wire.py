"""A wire between two network interfaces of this namespace: every frame that one hears the other says, so much later.

    python tests/parallel/wire.py LEFT RIGHT SECONDS

What a kernel with netem does; without it, frames are carried by hand. A wire that is stopped, or ended, is a cable that is cut.
"""

from __future__ import annotations

import heapq
import select
import socket
import sys
import time

EVERY_PROTOCOL = 3
OUTGOING = socket.PACKET_OUTGOING


def carry(left: str, right: str, seconds: float) -> None:
    """For ever."""
    ends = []
    for name in (left, right):
        end = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(EVERY_PROTOCOL))
        end.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 24)
        end.bind((name, 0))
        ends.append(end)
    under_way: list[tuple[float, int, int, bytes]] = []
    count = 0
    print("carrying", flush=True)
    while True:
        wait = max(0.0, under_way[0][0] - time.monotonic()) if under_way else None
        heard, _, _ = select.select(ends, [], [], wait)
        for end in heard:
            frame, address = end.recvfrom(1 << 16)
            if address[2] != OUTGOING:
                count += 1
                heapq.heappush(under_way, (time.monotonic() + seconds, count, 1 - ends.index(end), frame))
        while under_way and under_way[0][0] <= time.monotonic():
            _, _, to, frame = heapq.heappop(under_way)
            ends[to].send(frame)


if __name__ == "__main__":
    carry(sys.argv[1], sys.argv[2], float(sys.argv[3]))
