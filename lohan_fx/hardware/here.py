"""Machines from files, and this one: measured where it has been, else guessed from its GPU's name."""

from __future__ import annotations

import dataclasses
import hashlib
import logging
import os
import platform
from pathlib import Path

import psutil

from lohan_fx.budget import Machine
from lohan_fx.errors import LohanError

from .presets import PRESETS, preset, server
from .rates import Hardware

log = logging.getLogger(__name__)

_GB = 1e9
SSD_WORDS = "; SSD "  # in a source, before what is said of the disks' rates


def cache_dir() -> Path:
    """Where measurements are kept: LOHAN_FX_CACHE, or lohan_fx in the user's cache folder."""
    chosen = os.environ.get("LOHAN_FX_CACHE")
    if chosen:
        return Path(chosen)
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "lohan_fx"


def default_file() -> Path:
    """The file of this machine's rates that planning takes when no hardware is named."""
    return cache_dir() / "machine.json"


def quick_file(gpu_name: str) -> Path:
    """The file of what was measured without being asked for, on this CPU with this GPU."""
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 0
    which = f"{gpu_name}; {cpu_name()}; {cpus} usable"
    return cache_dir() / "machines" / f"{hashlib.sha256(which.encode()).hexdigest()[:16]}.json"


def load(name_or_path: str | os.PathLike[str], num_ssds: int | None = None) -> Hardware:
    """A preset by name, or a machine from the JSON file that measuring it wrote.

    Raises LohanError for an unknown name, or a file that cannot be read or is none of a machine.
    """
    path = Path(name_or_path)
    if path.suffix != ".json":
        return preset(os.fspath(name_or_path), num_ssds)
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as exc:
        raise LohanError(f"the hardware file {path} cannot be read: {exc}") from exc
    try:
        return Hardware.from_json(text)
    except LohanError as exc:
        raise LohanError(f"{path}: {exc}") from exc


def detect() -> Hardware:
    """This machine without a GPU: the "GPU" is an accounted part of its memory.

    Cheap, and without torch: sizes are asked for; rates are those on file (`on_file`), else generic.
    """
    measured = on_file("cpu")
    if measured is not None:
        return as_of_now(measured)
    here = Machine.here()
    return _cpu(here.dram_free_bytes, _free_ssd_bytes(here))


def nearest(gpu_name: str) -> Hardware:
    """This machine with its GPU, given the GPU's name as the driver says it.

    Sizes are this machine's. Rates are those on file (`on_file`), else those of the preset with that
    GPU, else a modest GPU's; `source` says which.
    """
    measured = on_file(gpu_name)
    if measured is not None:
        return as_of_now(measured)
    here = Machine.here()
    known = [p for p in map(preset, PRESETS) if p.gpu_name == gpu_name and p.name[:5] != "lohan"]
    if known:
        base, note = known[0], f"rates of preset {known[0].name} ({known[0].source})"
    else:
        base = server("generic", gpu_name, 0, 100.0, 10.0, 800.0, 20.0)
        note = (
            f"no preset has a {gpu_name!r}, so rates are a modest GPU's; measure this machine with "
            "`python -m lohan_fx.probe`"
        )
    return dataclasses.replace(
        base,
        name=base.name if known else f"generic {gpu_name}",
        source=f"sizes asked of this machine; {note}",
        dram_bytes=here.dram_free_bytes,
        ssd_bytes=_free_ssd_bytes(here),
    )


def on_file(gpu_name: str) -> Hardware | None:
    """What was measured of this machine with this GPU: by `python -m lohan_fx.probe`, else in short.

    A disk that the former left alone has the rates of the latter. Sizes are those of then.
    """
    probed, quick = (_of_this(path, gpu_name) for path in (default_file(), quick_file(gpu_name)))
    if probed is None or quick is None:
        return probed or quick
    if probed.ssd_read_bytes_per_s or not quick.ssd_read_bytes_per_s:
        return probed
    disks = {key: rate for key, rate in quick.details.items() if key.startswith("ssd_")}
    return dataclasses.replace(
        probed,
        source=f"{probed.source}{SSD_WORDS}{quick.source.partition(SSD_WORDS)[2]}",
        ssd_read_bytes_per_s=quick.ssd_read_bytes_per_s,
        ssd_write_bytes_per_s=quick.ssd_write_bytes_per_s,
        ssd_mixed_bytes_per_s=quick.ssd_mixed_bytes_per_s,
        ssd_simplex=quick.ssd_simplex,
        details={**probed.details, **disks},
    )


def as_of_now(found: Hardware) -> Hardware:
    """A measured machine with the sizes of today, and a generic rate for a disk that was not measured."""
    here = Machine.here()
    ssd_bytes = _free_ssd_bytes(here)
    generic = _cpu(here.dram_free_bytes, ssd_bytes)
    # A budget that names a disk needs some rate.
    unmeasured = not found.ssd_read_bytes_per_s
    return dataclasses.replace(
        found,
        dram_bytes=here.dram_free_bytes,
        ssd_bytes=ssd_bytes,
        ssd_read_bytes_per_s=found.ssd_read_bytes_per_s or generic.ssd_read_bytes_per_s,
        ssd_write_bytes_per_s=found.ssd_write_bytes_per_s or generic.ssd_write_bytes_per_s,
        source=found.source + (f"{SSD_WORDS}not measured, taken as 1 GB/s" if unmeasured else ""),
    )


def _of_this(path: Path, gpu_name: str) -> Hardware | None:
    """What a file says, if it is about this machine with this GPU."""
    if not path.exists():
        return None
    try:
        found = load(path)
    except LohanError as exc:
        log.warning("%s is not used: %s", path, exc)
        return None
    if (found.gpu_name, found.cpu_name) != (gpu_name, cpu_name()):
        log.info(
            "%s is not used: it is of %s on %s, this is %s on %s",
            path,
            found.gpu_name,
            found.cpu_name,
            gpu_name,
            cpu_name(),
        )
        return None
    return found


def cpu_name() -> str:
    """The CPU's model and the number of CPUs, as "Intel(R) Xeon(R) ..., 16 CPUs"."""
    model = platform.processor() or platform.machine()
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                model = line.partition(":")[2].strip()
                break
    except OSError:
        pass
    return f"{model}, {os.cpu_count() or 1} CPUs"


def _free_ssd_bytes(machine: Machine) -> int:
    where = machine.default_ssd_dir
    return 0 if where is None else machine.ssd_free_bytes(where)


def _cpu(dram_bytes: int, ssd_bytes: int) -> Hardware:
    cores = psutil.cpu_count(logical=False) or 1
    dram_rate = min(cores * 8.0, 80.0) * _GB
    return Hardware(
        name=f"cpu-{platform.machine()}-{cores}",
        source=(
            "sizes asked of this machine, rates generic: 30 GFLOP/s and 8 GB/s of DRAM a core, "
            "1 GB/s of disk; measure it with `python -m lohan_fx.probe`"
        ),
        gpu_name="cpu",
        gpu_memory_bytes=int(psutil.virtual_memory().total),
        flops_per_s={"float32": cores * 30e9, "bfloat16": cores * 15e9, "float16": cores * 15e9},
        gpu_mem_bytes_per_s=dram_rate,
        h2d_bytes_per_s=dram_rate / 2,
        d2h_bytes_per_s=dram_rate / 2,
        duplex_factor=0.6,
        dram_bytes=dram_bytes,
        dram_bytes_per_s=dram_rate,
        ssd_bytes=ssd_bytes,
        ssd_read_bytes_per_s=1.0 * _GB,
        ssd_write_bytes_per_s=1.0 * _GB,
        ssd_simplex=True,
        cpu_adam_params_per_s=dram_rate / 30,
    )
