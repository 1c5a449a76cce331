"""Plans as one self-contained HTML page: memory over time, lanes, tensors, stages, differences; or as a
trace for Perfetto.

`python -m lohan_fx.view plan.json --html out.html`. The page holds its data, style and scripts, asks
the network for nothing and is the same bytes for the same plans.
"""

from __future__ import annotations

from .page import render, write
from .perfetto import trace_bytes

__all__ = ["render", "trace_bytes", "write"]
