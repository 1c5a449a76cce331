"""Measurements of a machine in sizes that take no time."""

from __future__ import annotations

import pytest

from lohan_fx.probe import Effort, disk

TINY = Effort(
    matmul_size=64,
    matmul_warm_s=0.0,
    warm_s=0.0,
    measure_s=0.0,
    gpu_bytes=4096,
    link_bytes=8192,
    host_bytes=8192,
    adam_params=1000,
    ssd_bytes=64 * 4096,
    ssd_blocks=(4096, 8192),
    ssd_limit_s=5.0,
)


def allow_full_disks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Disks may be rather full."""
    monkeypatch.setattr(disk, "_RESERVE_SHARE", 10**9)
    monkeypatch.setattr(disk, "_RESERVE_BYTES", 0)
