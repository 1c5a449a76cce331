"""Measurements of a machine, each a plain function that returns numbers, and all of them together.

`device` measures matrix products, memory and links, `host` DRAM and Adam, `disk` files; `machine`
puts them into a `Hardware`. On the CPU as device the "GPU" figures are the CPU's own and the links
are memory copies. `python -m lohan_fx.probe` runs it.
"""

from .machine import FULL, QUICK, Effort, measure_machine

__all__ = ["FULL", "QUICK", "Effort", "measure_machine"]
