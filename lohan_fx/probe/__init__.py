"""Measurements of a machine, each a plain function that returns numbers, and all of them together.

`device` measures matrix products, memory and links, `host` DRAM and Adam, `disk` files; `machine`
puts them into a `Hardware` for `python -m lohan_fx.probe`, `once` in short where nobody has run that. On
the CPU as device the "GPU" figures are the CPU's own and the links are memory copies.
"""

from .machine import FULL, QUICK, Effort, measure_machine
from .once import measured_once

__all__ = ["FULL", "QUICK", "Effort", "measure_machine", "measured_once"]
