"""Messages of the first rank to all others. They go beside what the devices exchange, over gloo, so that no GPU waits."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

FIRST_BYTES = 4096
"""What goes in one broadcast: a message's length and its beginning, which of most messages is all."""
HEAD_BYTES = 8
PATIENCE = timedelta(days=3650)
"""An idle server says nothing for days. That a rank has died is seen by its connection, by the launcher and by `ranks.Watch`."""


class Orders:
    """A way from rank 0 to the others. All ranks make it together, and then one calls `send` as often as the others `receive`."""

    def __init__(self) -> None:
        self._group: Any = dist.new_group(backend="gloo", timeout=PATIENCE)

    def send(self, message: bytes) -> None:
        """Give a message to every other rank. RuntimeError if one has ended."""
        whole = len(message).to_bytes(HEAD_BYTES, "little") + message
        first, rest = whole[:FIRST_BYTES], whole[FIRST_BYTES:]
        self._broadcast(torch.frombuffer(bytearray(first.ljust(FIRST_BYTES, b"\0")), dtype=torch.uint8))
        if rest:
            self._broadcast(torch.frombuffer(bytearray(rest), dtype=torch.uint8))

    def receive(self) -> bytes:
        """Wait for the next message. RuntimeError if the first rank has ended."""
        first = bytes(self._broadcast(torch.empty(FIRST_BYTES, dtype=torch.uint8)).numpy())
        length, found = int.from_bytes(first[:HEAD_BYTES], "little"), first[HEAD_BYTES:]
        missing = length - len(found)
        if missing > 0:
            found += bytes(self._broadcast(torch.empty(missing, dtype=torch.uint8)).numpy())
        return found[:length]

    def _broadcast(self, bytes_N: torch.Tensor) -> torch.Tensor:
        dist.broadcast(bytes_N, 0, self._group)
        return bytes_N
