"""Random weights of a given shape: each tensor is made when it is read, on its device, and held by nobody.

So a 7B model costs no memory before it is loaded, and the ranks of a tensor-parallel group agree on every number
without talking: a tensor depends on (seed, name) alone.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import torch

from llama_ref.arguments import floating, place, shown, whole
from llama_ref.config import LlamaConfig
from llama_ref.weights import Checkpoint, Key, expected_shapes


@dataclass(frozen=True)
class RandomTensor:
    """Reads as normal numbers with std 1 / sqrt(columns); a norm's weight (one dimension) as 1 + 0.1 x normal.

    Drawn in float32 and rounded, so that bfloat16 and float32 models of one seed are the same model.
    """

    name: str
    seed: int
    shape: tuple[int, ...]
    device: torch.device
    dtype: torch.dtype

    def __getitem__(self, key: Key, /) -> torch.Tensor:
        # the file-like promise: a slice equals the slice of the whole, so the whole is drawn
        generator = torch.Generator(self.device).manual_seed(stable_seed(self.seed, self.name))
        drawn = torch.randn(self.shape, generator=generator, device=self.device, dtype=torch.float32)
        drawn = drawn.mul_(0.1).add_(1.0) if len(self.shape) == 1 else drawn.mul_(self.shape[1] ** -0.5)
        part = drawn[key]
        return part.to(self.dtype) if part.numel() == drawn.numel() else part.to(self.dtype, copy=True)


def random_checkpoint(
    config: LlamaConfig,
    seed: int = 0,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> Checkpoint:
    """A checkpoint of `config` with random weights on `device`; the numbers differ between kinds of device."""
    if not isinstance(config, LlamaConfig):
        raise TypeError(f"config={shown(config)} must be a LlamaConfig")
    seed, device, dtype = whole("seed", seed, 0), place("device", device), floating("dtype", dtype)
    weights = {name: RandomTensor(name, seed, shape, device, dtype) for name, shape in expected_shapes(config).items()}
    return Checkpoint(config, weights)


def stable_seed(seed: int, name: str) -> int:
    """One 63-bit seed per (seed, name), the same in every process: Python's own hash of a string is not."""
    return int.from_bytes(hashlib.sha256(f"{seed}:{name}".encode()).digest()[:8], "little") >> 1
