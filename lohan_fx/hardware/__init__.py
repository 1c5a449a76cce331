"""How fast a machine is, lane by lane: presets with their sources, files of measurements, this machine.

GB is 1e9 bytes. Rates are what a large transfer or multiplication reaches, not data-sheet peaks,
unless the source says so.
"""

from .here import (
    SSD_WORDS,
    as_of_now,
    cache_dir,
    cpu_name,
    default_file,
    detect,
    load,
    nearest,
    on_file,
    quick_file,
)
from .presets import LOHAN_SSDS, PRESETS, ssd_array_bytes_per_s
from .rates import HARDWARE_SCHEMA, Hardware

__all__ = [
    "HARDWARE_SCHEMA",
    "LOHAN_SSDS",
    "PRESETS",
    "SSD_WORDS",
    "Hardware",
    "as_of_now",
    "cache_dir",
    "cpu_name",
    "default_file",
    "detect",
    "load",
    "nearest",
    "on_file",
    "quick_file",
    "ssd_array_bytes_per_s",
]
