"""Products of two thin matrices: beside a third, or merged into it as it is read, so that nothing of it is held twice."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from llama_ref.weights import Key, LowRank, TensorSource, spans

ROWS_AT_ONCE = 1024


@dataclass(frozen=True)
class Transposed:
    """A matrix [a, b] read as [b, a]."""

    stored: TensorSource

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.stored.shape)[::-1]

    @property
    def dtype(self) -> torch.dtype:
        return self.stored.dtype

    def __getitem__(self, key: Key, /) -> torch.Tensor:
        rows, columns = spans(key, self.shape)
        return self.stored[slice(*columns), slice(*rows)].T


@dataclass(frozen=True)
class Merged:
    """base + scale * up @ down, in float32 (float64 over a float64 base); rows have the length that a magnitude says.

    Sums are made in float64 and rounded once, so that a part read by itself has the numbers that it has in the whole.
    """

    base: TensorSource
    added: LowRank

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.base.shape)

    @property
    def dtype(self) -> torch.dtype:
        return torch.float64 if self.base.dtype is torch.float64 else torch.float32

    def __getitem__(self, key: Key, /) -> torch.Tensor:
        (start, stop), columns = spans(key, self.shape)
        # a row's length is that of all its columns, whichever of them are asked for
        read = slice(*columns) if self.added.magnitude is None else slice(None)
        down = self.added.down[:, read].double()
        wanted = slice(None) if self.added.magnitude is None else slice(*columns)
        blocks = range(start, max(stop, start + 1), ROWS_AT_ONCE)
        parts = (self._rows(slice(row, min(row + ROWS_AT_ONCE, stop)), read, down) for row in blocks)
        return torch.cat([part[:, wanted].to(self.dtype) for part in parts])

    def _rows(self, rows: slice, columns: slice, down: torch.Tensor) -> torch.Tensor:
        """Some rows in float64."""
        part = self.base[rows, columns].double()
        part = part + self.added.scale * (self.added.up[rows, :].to(part) @ down.to(part))
        if self.added.magnitude is None:
            return part
        length: torch.Tensor = torch.linalg.vector_norm(part, dim=1)
        return part * (self.added.magnitude[(rows,)].to(part) / length)[:, None]
