"""Numbers on their way between the host and the device: neither waits for the other.

Shapes: B rows, T tokens, N numbers of a row.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

IN_FLIGHT = 4
"""Tokens that a GPU may be ahead of the host: enough to hide the launch of one, little to waste at the end of a text."""


def upload(values: Any, device: torch.device, dtype: torch.dtype | None = None) -> Tensor:
    """A tensor of Python's numbers on the device. From pinned memory the copy takes its turn there, and the host goes on."""
    tensor = torch.as_tensor(values, dtype=dtype)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def pad(prompts: Sequence[Sequence[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """Prompts padded on the right to [B, T], and their lengths [B]; T >= 2, because a compiler makes 1 a case of its own."""
    width = max(2, *(len(prompt) for prompt in prompts))
    padded = [[*prompt, *[0] * (width - len(prompt))] for prompt in prompts]
    return upload(padded, device), upload([len(prompt) for prompt in prompts], device)


class Readback:
    """Rows of numbers on their way to the host, oldest first; on a CPU they are there at once.

    On a GPU they travel by a stream of their own: behind a copy to the host, kernels of the same stream start late.
    """

    def __init__(self, device: torch.device):
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self.depth = 0 if self._stream is None else IN_FLIGHT
        self._pending: deque[tuple[Tensor, torch.cuda.Event | None]] = deque()

    def push(self, rows_BN: Tensor) -> None:
        rows_BN = rows_BN.clone()  # what the next step writes over
        if self._stream is None:
            self._pending.append((rows_BN, None))
            return
        host_BN = torch.empty(
            rows_BN.shape, dtype=rows_BN.dtype, pin_memory=True
        )  # from PyTorch's pool of pinned blocks
        self._stream.wait_stream(torch.cuda.current_stream(rows_BN.device))
        with torch.cuda.stream(self._stream):
            host_BN.copy_(rows_BN, non_blocking=True)
            arrived = self._stream.record_event()
        rows_BN.record_stream(self._stream)
        self._pending.append((host_BN, arrived))

    def pop(self) -> list[list[Any]]:
        rows_BN, arrived = self._pending.popleft()
        if arrived is not None:
            arrived.synchronize()
        return rows_BN.tolist()  # type: ignore[no-any-return]
