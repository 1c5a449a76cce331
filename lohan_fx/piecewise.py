"""Values that may be outside of memory, and are read piece by piece."""

from __future__ import annotations

import math
import mmap
from typing import Protocol

import torch


class Piecewise(Protocol):
    """A tensor whose values are elsewhere, in a file for instance."""

    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def dtype(self) -> torch.dtype: ...

    def piece(self, start: int, stop: int) -> torch.Tensor:
        """Elements [start, stop) of the flattened (row-major) tensor, on the CPU."""
        ...


Value = torch.Tensor | Piecewise


def in_memory(value: Value) -> torch.Tensor:
    """All of a value as a tensor; one that is a tensor already is returned as it is."""
    if isinstance(value, torch.Tensor):
        return value
    return value.piece(0, math.prod(value.shape)).view(value.shape)


def scratch(numel: int, dtype: torch.dtype) -> torch.Tensor:
    """A 1-D CPU tensor with undefined contents, whose memory goes back to the system when it is dropped.

    The C library keeps and splits aligned blocks of some MiB: made and dropped again and again they
    add up to many times their size.
    """
    nbytes = numel * dtype.itemsize
    if nbytes < 1 << 20:
        return torch.empty(numel, dtype=dtype)
    return torch.frombuffer(mmap.mmap(-1, nbytes), dtype=dtype, count=numel)
