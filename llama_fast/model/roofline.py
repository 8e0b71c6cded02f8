"""How fast a token can be: the bytes a decode step must read, over the bandwidth. Arithmetic with units, no timing.

At batch 1 every weight is used once per token, so reading them is the floor of a step's time. A step reads each matrix
as it is stored, of an untied embedding table one row per token, and the keys and values of the positions in use.
GB = 1e9 bytes. MBU (model bandwidth utilisation) = bytes per step x steps per second / bandwidth.
"""

from __future__ import annotations

from torch import nn

from llama_fast.model.llama import Llama
from llama_ref.config import LlamaConfig

GB = 1e9

DATASHEET_GB_PER_S = {
    "NVIDIA A100-PCIE-40GB": 1555,
    "NVIDIA A100-SXM4-40GB": 1555,
    "NVIDIA A100 80GB PCIe": 1935,
    "NVIDIA A100-SXM4-80GB": 2039,
    "NVIDIA H100 80GB HBM3": 3352,
    "NVIDIA H100 PCIe": 2039,
    "NVIDIA H200": 4800,
}
"""Memory bandwidth by the name that CUDA reports, from the vendor's datasheets."""


def stored_bytes(model: nn.Module) -> int:
    """Bytes of all weights, those that share storage once; the rotary table is not a weight."""
    largest: dict[int, int] = {}
    for name, tensor in model.named_buffers():
        if name != "rope_table":
            at = tensor.untyped_storage().data_ptr()
            largest[at] = max(largest.get(at, 0), tensor.nbytes)
    return sum(largest.values())


def weight_bytes_per_step(model: Llama, batch: int = 1) -> int:
    """Bytes of weights that one decode step of `batch` rows reads.

    Of the embedding table that is a row for each token, or nothing beside the head, if the head is (part of) that table.
    """
    table = {} if model.embedding is None else dict(model.embedding.named_buffers())
    head = () if model.head is None else model.head.buffers()
    tied = {tensor.untyped_storage().data_ptr() for tensor in head}
    looked_up = sum(
        min(batch, tensor.shape[0]) * tensor[0].nbytes
        for tensor in table.values()
        if tensor.untyped_storage().data_ptr() not in tied
    )
    rest = {
        name: tensor
        for name, tensor in model.named_buffers(remove_duplicate=False)
        if not name.startswith("embedding.")
    }
    del rest["rope_table"]
    return looked_up + sum(tensor.nbytes for tensor in rest.values())


def cache_bytes_per_step(config: LlamaConfig, batch: int, positions: float, element_bytes: int) -> float:
    """Bytes of keys and values of `positions` positions in each of `batch` rows."""
    return 2.0 * config.n_layers * config.n_kv_heads * config.head_dim * positions * batch * element_bytes


def floor_steps_per_second(bytes_per_step: float, bandwidth_gb_per_s: float) -> float:
    """The most steps per second: 13.2e9 bytes at 3090 GB/s -> 234."""
    return bandwidth_gb_per_s * GB / bytes_per_step


def mbu(bytes_per_step: float, steps_per_second: float, bandwidth_gb_per_s: float) -> float:
    """The share of the bandwidth that reading the bytes of a step takes."""
    return bytes_per_step * steps_per_second / (bandwidth_gb_per_s * GB)
