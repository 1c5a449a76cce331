"""A bucket's fp32 sums of gradients: see [Note: accumulation] in buckets.py."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import torch

from lohan_fx.program import ParamSpec

from .buckets import BucketHome


def sum_of(home: BucketHome, spec: ParamSpec) -> torch.Tensor:
    """One parameter's sum, of shape (N,), in device or host memory."""
    return home.sums()[spec.offset : spec.offset + spec.numel]


def add_on_device(home: BucketHome, spec: ParamSpec, grad_N: torch.Tensor) -> torch.Tensor:
    """The parameter's sum with a gradient added in fp32, in compute-stream order."""
    sum_N = sum_of(home, spec)
    if spec.pid in home.accumulated:
        sum_N.add_(grad_N)
    else:
        sum_N.copy_(grad_N)
    home.accumulated[spec.pid] = None
    return sum_N


def adds_of(
    home: BucketHome, specs: Sequence[ParamSpec], arrived: Collection[int]
) -> tuple[str, ...]:
    """What the CPU is to do with each sum, as native.AdamJob names it; `arrived` have a gradient."""
    return tuple(
        "keep" if s.pid not in arrived else "add" if s.pid in home.accumulated else "set"
        for s in specs
    )
