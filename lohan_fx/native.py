"""The compiled part of the package: host memory, direct file I/O, CPU Adam, optimizer pipeline.

This is the only module that imports `lohan_fx._native`. Importing it raises NativeUnavailable where
that is missing; planning does not need it. Names, arguments and errors are described in _native.pyi.
"""

from __future__ import annotations

from .errors import NativeUnavailable

try:
    from ._native import (  # noqa: TID251
        AdamJob,
        AdamPipeline,
        AdamStep,
        FileEngine,
        HostBuffer,
        adam_factors,
        adam_update,
        available_isas,
        copy,
        host_available_bytes,
        isa,
        measure,
        usable_cpus,
    )
except ImportError as error:
    raise NativeUnavailable(
        f"the compiled part of lohan_fx does not load ({error}); build it with `pip install .` in the "
        "repository (needs a C++20 compiler and CMake 3.20), with the Python that runs this"
    ) from error

__all__ = [
    "AdamJob",
    "AdamPipeline",
    "AdamStep",
    "FileEngine",
    "HostBuffer",
    "adam_factors",
    "adam_update",
    "available_isas",
    "copy",
    "host_available_bytes",
    "isa",
    "measure",
    "usable_cpus",
]
