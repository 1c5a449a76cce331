"""Runs a program's moves over GPU, DRAM and SSD. See runtime.py for the parts."""

from __future__ import annotations

from .options import AdamGroup, HyperSource, RuntimeOptions, RuntimeStats
from .runtime import Runtime

__all__ = ["AdamGroup", "HyperSource", "Runtime", "RuntimeOptions", "RuntimeStats"]
