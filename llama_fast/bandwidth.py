"""The read bandwidth of a device, measured: the wall that every rung is held against."""

from __future__ import annotations

import time

import torch

from llama_fast.roofline import GB


def read_bandwidth_gb_per_s(device: torch.device, repeats: int = 10) -> float:
    """The best of several reads, in GB/s, of a tensor far larger than any cache.

    A product with a vector on a CPU (its threads and vector loads are those of a decode step), a sum on a GPU.
    """
    gpu = device.type == "cuda"
    rows = 2**20 if gpu else 2**15
    matrix = torch.ones(rows, 4096, dtype=torch.bfloat16 if gpu else torch.float32, device=device)
    vector = torch.ones(4096, dtype=matrix.dtype, device=device)
    best = float("inf")
    for _ in range(repeats + 2):
        synchronize(device)
        began = time.perf_counter()
        matrix.view(torch.int64).sum() if gpu else matrix @ vector
        synchronize(device)
        best = min(best, time.perf_counter() - began)
    return matrix.numel() * matrix.element_size() / best / GB


def synchronize(device: torch.device) -> None:
    """Wait for a GPU's queued work; a CPU has none."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
