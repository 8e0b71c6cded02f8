"""The read bandwidth of a device, measured: the wall that every rung is held against."""

from __future__ import annotations

import time

import torch

from llama_fast.roofline import GB


def read_bandwidth_gb_per_s(device: torch.device, repeats: int = 10) -> float:
    """The best of several reads, in GB/s, of a tensor far larger than any cache: its norm on a CPU, its sum on a GPU."""
    gpu = device.type == "cuda"
    data = torch.ones(2**29 if gpu else 2**27, dtype=torch.int64 if gpu else torch.float32, device=device)
    best = float("inf")
    for _ in range(repeats + 2):
        synchronize(device)
        began = time.perf_counter()
        data.sum() if gpu else torch.linalg.vector_norm(data)
        synchronize(device)
        best = min(best, time.perf_counter() - began)
    return data.nbytes / best / GB


def synchronize(device: torch.device) -> None:
    """Wait for a GPU's queued work; a CPU has none."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
