"""How a bucket stores parameters: in the order of their strides, one after the other.

Shapes: N = elements of one parameter.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch

from lohan_fx.errors import LohanError
from lohan_fx.piecewise import Value, in_memory, scratch
from lohan_fx.program import Bucket, ParamSpec


def param_views(bucket: Bucket, dtype: torch.dtype, memory: torch.Tensor) -> list[torch.Tensor]:
    """The parameters in a buffer of `bucket.weight_bytes` bytes, in the bucket's order."""
    typed_P = memory.view(dtype)
    start = typed_P.storage_offset()
    return [typed_P.as_strided(p.shape, p.stride, start + p.offset) for p in bucket.params]


def same_layout(
    shape: Sequence[int], stride: Sequence[int], other_shape: Sequence[int], other: Sequence[int]
) -> bool:
    """True where both put every element at the same place; strides of size-1 dimensions are moot."""
    return tuple(shape) == tuple(other_shape) and all(
        n == 1 or a == b for n, a, b in zip(shape, stride, other, strict=True)
    )


def dense(spec: ParamSpec, value: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The elements of `value` in the order in which the bucket stores them, shape (N,).

    A view where `value` has that layout and dtype already, else a copy on its device.
    """
    if value.dtype == dtype and same_layout(spec.shape, spec.stride, value.shape, value.stride()):
        return value.as_strided((spec.numel,), (1,), value.storage_offset())
    flat_N = torch.empty(spec.numel, dtype=dtype, device=value.device)
    flat_N.as_strided(spec.shape, spec.stride).copy_(value)
    return flat_N


def stored_pieces(
    spec: ParamSpec, value: Value, dtype: torch.dtype
) -> Callable[[int, int], torch.Tensor]:
    """A function that gives elements [start, stop) of `value` in the order a bucket stores them.

    Pieces may still have the value's own dtype and device. A value in memory passes through `dtype`
    as a whole only where its layout differs from the bucket's.
    """
    if not isinstance(value, torch.Tensor):
        row_major = torch.empty(spec.shape, device="meta").stride()
        if same_layout(spec.shape, spec.stride, value.shape, row_major):
            return value.piece
        value = in_memory(value)
    value = value.detach()
    if same_layout(spec.shape, spec.stride, value.shape, value.stride()):
        flat_N = value.as_strided((spec.numel,), (1,), value.storage_offset())
    else:
        flat_N = dense(spec, value, dtype)
    return lambda start, stop: flat_N[start:stop]


def cast(data_N: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """As .to(dtype), in memory that goes back at once."""
    if data_N.dtype == dtype:
        return data_N
    return scratch(data_N.numel(), dtype).copy_(data_N)


def check_dense(spec: ParamSpec) -> None:
    span = 1 + sum((n - 1) * s for n, s in zip(spec.shape, spec.stride, strict=True))
    if math.prod(spec.shape) != spec.numel or (spec.numel and span != spec.numel):
        raise LohanError(
            f"{spec.name} has shape {spec.shape} and stride {spec.stride}, which is not dense; make "
            "it contiguous before compiling"
        )
