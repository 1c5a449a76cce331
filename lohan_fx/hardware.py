"""How fast a machine is, lane by lane: presets with their sources, and a cheap look at this one.

GB is 1e9 bytes. Rates are what a large transfer or multiplication reaches, not data-sheet peaks,
unless the source says so.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import platform
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

import psutil

from lohan_fx.budget import Machine
from lohan_fx.errors import LohanError
from lohan_fx.planner import Lanes

HARDWARE_SCHEMA = 1
_GB = 1e9
_TERA = 1e12


@dataclass(frozen=True, slots=True)
class Hardware:
    """The rates and sizes of one machine. `flops_per_s` is by dtype name; `source` says whence.

    `duplex_factor` is the H2D rate while D2H is busy too, over H2D alone. `dram_copy_bytes_per_s`
    counts bytes read and bytes written. `ssd_simplex`: reads and writes share the device.
    """

    name: str
    source: str
    gpu_name: str
    gpu_memory_bytes: int
    flops_per_s: Mapping[str, float]
    gpu_mem_bytes_per_s: float
    h2d_bytes_per_s: float
    d2h_bytes_per_s: float
    duplex_factor: float
    dram_bytes: int
    dram_copy_bytes_per_s: float
    ssd_bytes: int
    ssd_read_bytes_per_s: float
    ssd_write_bytes_per_s: float
    ssd_simplex: bool
    cpu_adam_params_per_s: float

    def gpu_flops_per_s(self, dtype: str) -> float:
        """FLOP/s of matrix multiplication in a dtype; the slowest known one where it is not known.

        Raises LohanError where no rate is known at all.
        """
        if not self.flops_per_s:
            raise LohanError(f"hardware {self.name!r} has no FLOP rate for any dtype")
        return self.flops_per_s.get(dtype, min(self.flops_per_s.values()))

    def lanes(self) -> Lanes:
        """The rates as the planner reads them."""
        return Lanes(
            h2d_bytes_per_s=self.h2d_bytes_per_s,
            d2h_bytes_per_s=self.d2h_bytes_per_s,
            duplex_factor=self.duplex_factor,
            gpu_bytes_per_s=self.gpu_mem_bytes_per_s,
            ssd_read_bytes_per_s=self.ssd_read_bytes_per_s,
            ssd_write_bytes_per_s=self.ssd_write_bytes_per_s,
            ssd_simplex=self.ssd_simplex,
            cpu_adam_params_per_s=self.cpu_adam_params_per_s,
            dram_bytes_per_s=self.dram_copy_bytes_per_s,
        )

    def machine(self) -> Machine:
        """An idle machine of this sort, to complete a budget with."""
        has_ssd = self.ssd_bytes > 0
        return Machine(
            gpu_bytes=self.gpu_memory_bytes,
            dram_free_bytes=self.dram_bytes,
            ssd_free_bytes=lambda _: self.ssd_bytes,
            default_ssd_dir=Path("/ssd") if has_ssd else None,
        )

    @staticmethod
    def preset(name: str, num_ssds: int | None = None) -> Hardware:
        """A machine by name, see `PRESETS`. `num_ssds` (1 to 12) is for the paper's server alone.

        Raises LohanError for an unknown name, or for SSDs where their number is fixed.
        """
        return _preset(name, num_ssds)

    def to_json(self) -> str:
        return json.dumps({"schema": HARDWARE_SCHEMA, **dataclasses.asdict(self)}, sort_keys=True)

    @classmethod
    def from_json(cls, text: str) -> Hardware:
        """The hardware `to_json` wrote. Raises LohanError on another schema or malformed data."""
        try:
            raw: dict[str, Any] = json.loads(text)
            schema = raw.pop("schema")
            if schema != HARDWARE_SCHEMA:
                raise LohanError(
                    f"this hardware file has schema {schema!r}, this version reads "
                    f"{HARDWARE_SCHEMA}; measure the machine again"
                )
            made = cls(**raw)
        except (AttributeError, KeyError, TypeError, ValueError) as exc:
            raise LohanError(f"this is not a hardware file: {exc}") from exc
        wrong = [f.name for f in dataclasses.fields(cls) if not _is_valid(getattr(made, f.name), f)]
        if wrong:
            raise LohanError(
                f"this is not a hardware file: {wrong[0]} is {getattr(made, wrong[0])!r}"
            )
        return made


def _is_valid(value: object, field: dataclasses.Field[Any]) -> bool:
    """Whether a field read from JSON has its type; rates are above zero, but for a missing SSD's."""
    if field.name == "flops_per_s":
        rates = list(value.values()) if isinstance(value, dict) else [0]
        return all(_is_number(rate) and rate > 0 for rate in rates)
    if field.name.endswith("_bytes"):
        return isinstance(value, int) and not isinstance(value, bool) and value >= 0
    if field.name.endswith(("_per_s", "_factor")):
        return _is_number(value) and (value > 0 or (value == 0 and field.name.startswith("ssd_")))
    return isinstance(value, bool if field.name == "ssd_simplex" else str)


def _is_number(value: object) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


# The SSDs of the paper's server, Intel P5510: 3.84 TB each. Published throughputs imply about
# 4.3 GB/s of reads and writes together from one, 32 GB/s from twelve (PCIe 4 x16 and RAID-0).
_P5510_BYTES = 3_840 * 10**9
_P5510_BYTES_PER_S = 4.3 * _GB
_P5510_MOST_BYTES_PER_S = 32.0 * _GB
LOHAN_SSDS = 12

_LOHAN_SOURCE = (
    "LoHan (ICDE 2025, arXiv 2403.06504): dual Xeon Gold 5320, 768 GB DDR4, PCIe 4 measured at "
    "21 GB/s one way, up to 12 Intel P5510 SSDs with 32 GB/s in all and 4.3 GB/s of one; {gpu}; "
    "CPU Adam and DRAM estimated from 16 channels of DDR4-2933 at two thirds of peak"
)


def _lohan(
    name: str,
    gpu_name: str,
    gpu_memory_bytes: int,
    half_tflops: float,
    gpu_gb_per_s: float,
    note: str,
    num_ssds: int,
) -> Hardware:
    if not 1 <= num_ssds <= LOHAN_SSDS:
        raise LohanError(f"{name} has 1 to {LOHAN_SSDS} SSDs, not {num_ssds}")
    ssd = min(num_ssds * _P5510_BYTES_PER_S, _P5510_MOST_BYTES_PER_S)
    return Hardware(
        name=name,
        source=_LOHAN_SOURCE.format(gpu=note),
        gpu_name=gpu_name,
        gpu_memory_bytes=gpu_memory_bytes,
        flops_per_s={
            "float16": half_tflops * _TERA,
            "bfloat16": half_tflops * _TERA,
            "float32": half_tflops / 4 * _TERA,
        },
        gpu_mem_bytes_per_s=gpu_gb_per_s * _GB,
        h2d_bytes_per_s=21 * _GB,
        d2h_bytes_per_s=21 * _GB,
        duplex_factor=0.9,
        dram_bytes=768 * 10**9,
        dram_copy_bytes_per_s=250 * _GB,
        ssd_bytes=num_ssds * _P5510_BYTES,
        ssd_read_bytes_per_s=ssd,
        ssd_write_bytes_per_s=ssd,
        ssd_simplex=True,
        # 30 bytes a parameter with 16-bit gradients and weights.
        cpu_adam_params_per_s=250 * _GB / 30,
    )


def _desktop(
    name: str, gpu_name: str, gpu_gib: int, half_tflops: float, gpu_gb_per_s: float, note: str
) -> Hardware:
    return Hardware(
        name=name,
        source=(
            f"{note}; PCIe 4 x16 at 21 GB/s as LoHan (arXiv 2403.06504) measured it; host "
            "estimated: 128 GB of dual-channel DDR5 at 60 GB/s, one PCIe 4 NVMe SSD of 2 TB"
        ),
        gpu_name=gpu_name,
        gpu_memory_bytes=gpu_gib * 2**30,
        flops_per_s={
            "float16": half_tflops * _TERA,
            "bfloat16": half_tflops * _TERA,
            "float32": half_tflops / 4 * _TERA,
        },
        gpu_mem_bytes_per_s=gpu_gb_per_s * _GB,
        h2d_bytes_per_s=21 * _GB,
        d2h_bytes_per_s=21 * _GB,
        duplex_factor=0.9,
        dram_bytes=128 * 10**9,
        dram_copy_bytes_per_s=60 * _GB,
        ssd_bytes=2 * 10**12,
        ssd_read_bytes_per_s=6.5 * _GB,
        ssd_write_bytes_per_s=5.0 * _GB,
        ssd_simplex=True,
        cpu_adam_params_per_s=60 * _GB / 30,
    )


def _h100() -> Hardware:
    return Hardware(
        name="h100-80gb",
        source=(
            "measured on one H100 80GB HBM3 box with 16 Sapphire Rapids cores (torch 2.11, CUDA "
            "13.0): copies of large pinned buffers, 8192-cube bf16 matmul, one virtual disk with "
            "O_DIRECT in 8 MiB blocks; GPU memory bandwidth is 85 % of the data sheet's 3.35 TB/s; "
            "float32 matmul is estimated, CPU Adam is DRAM copy bandwidth over 30 bytes a parameter"
        ),
        gpu_name="NVIDIA H100 80GB HBM3",
        gpu_memory_bytes=int(79.18 * 2**30),
        flops_per_s={
            "bfloat16": 779.6 * _TERA,
            "float16": 779.6 * _TERA,
            "float32": 50.0 * _TERA,
        },
        gpu_mem_bytes_per_s=2850 * _GB,
        h2d_bytes_per_s=54.554 * _GB,
        d2h_bytes_per_s=55.022 * _GB,
        duplex_factor=44.701 / 54.554,
        dram_bytes=125 * 2**30,
        dram_copy_bytes_per_s=79.9 * _GB,
        ssd_bytes=64 * 2**30,
        ssd_read_bytes_per_s=1.872 * _GB,
        ssd_write_bytes_per_s=2.943 * _GB,
        ssd_simplex=True,
        cpu_adam_params_per_s=79.9 * _GB / 30,
    )


def _server(
    name: str, gpu_name: str, gpu_bytes: int, half_tflops: float, gpu_gb_per_s: float, link: float
) -> Hardware:
    return Hardware(
        name=name,
        source=(
            "data sheet at 75 % of dense matmul peak and 85 % of memory bandwidth, PCIe at 85 % of "
            "x16; host estimated: 1 TB of DRAM at 250 GB/s, four NVMe SSDs"
        ),
        gpu_name=gpu_name,
        gpu_memory_bytes=gpu_bytes,
        flops_per_s={
            "bfloat16": half_tflops * _TERA,
            "float16": half_tflops * _TERA,
            "float32": half_tflops / 16 * _TERA,
        },
        gpu_mem_bytes_per_s=gpu_gb_per_s * _GB,
        h2d_bytes_per_s=link * _GB,
        d2h_bytes_per_s=link * _GB,
        duplex_factor=0.82,
        dram_bytes=10**12,
        dram_copy_bytes_per_s=250 * _GB,
        ssd_bytes=4 * 3_840 * 10**9,
        ssd_read_bytes_per_s=24 * _GB,
        ssd_write_bytes_per_s=16 * _GB,
        ssd_simplex=True,
        cpu_adam_params_per_s=250 * _GB / 30,
    )


# name -> (GPU, memory bytes, half-precision TFLOP/s, GPU memory GB/s, source of the GPU numbers)
_LOHAN_GPUS = {
    "lohan-rtx4090": (
        "NVIDIA GeForce RTX 4090",
        24 * 10**9,
        162.0,
        900.0,
        "RTX 4090 measured at 160-164 TFLOP/s",
    ),
    "lohan-rtx4080": (
        "NVIDIA GeForce RTX 4080",
        16 * 10**9,
        95.0,
        640.0,
        "RTX 4080 scaled from the 4090's measurement by data-sheet tensor throughput",
    ),
    "lohan-rtx3090": (
        "NVIDIA GeForce RTX 3090",
        24 * 10**9,
        69.0,
        840.0,
        "RTX 3090 scaled from the 4090's measurement by data-sheet tensor throughput",
    ),
}
PRESETS = (
    *_LOHAN_GPUS,
    "rtx4090",
    "rtx3090",
    "a100-80gb",
    "h100-80gb",
    "h200",
)


def _preset(name: str, num_ssds: int | None) -> Hardware:
    if name in _LOHAN_GPUS:
        gpu_name, memory, tflops, bandwidth, note = _LOHAN_GPUS[name]
        count = LOHAN_SSDS if num_ssds is None else num_ssds
        return _lohan(name, gpu_name, memory, tflops, bandwidth, note, count)
    if name not in PRESETS:
        raise LohanError(f"there is no hardware preset {name!r}; there are {', '.join(PRESETS)}")
    if num_ssds is not None:
        raise LohanError(f"the number of SSDs of {name} is fixed; it varies for {_lohan_names()}")
    if name == "h100-80gb":
        return _h100()
    if name == "rtx4090":
        note = "RTX 4090: matmul as LoHan measured it, memory at 90 % of the data sheet"
        return _desktop(name, "NVIDIA GeForce RTX 4090", 24, 162.0, 900.0, note)
    if name == "rtx3090":
        note = "RTX 3090: data-sheet tensor throughput (fp32 accumulation), memory at 90 % of it"
        return _desktop(name, "NVIDIA GeForce RTX 3090", 24, 69.0, 840.0, note)
    if name == "a100-80gb":
        return _server(name, "NVIDIA A100-SXM4-80GB", 80 * 10**9, 234.0, 1730.0, 25.0)
    return _server(name, "NVIDIA H200", 141 * 10**9, 742.0, 4080.0, 54.0)


def load(name_or_path: str | os.PathLike[str], num_ssds: int | None = None) -> Hardware:
    """A preset by name, or a machine from the JSON file that measuring it wrote."""
    path = Path(name_or_path)
    if path.suffix != ".json":
        return _preset(os.fspath(name_or_path), num_ssds)
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as exc:
        raise LohanError(f"the hardware file {path} cannot be read: {exc}") from exc
    return Hardware.from_json(text)


def detect() -> Hardware:
    """This machine without a GPU: the "GPU" is an accounted part of its memory.

    Cheap, and without torch: sizes are asked for, rates are generic.
    """
    here = Machine.here()
    return _cpu(here.dram_free_bytes, _free_ssd_bytes(here))


def nearest(gpu_name: str) -> Hardware:
    """This machine with its GPU, given the GPU's name as the driver says it.

    Sizes are this machine's. Rates are those of the preset with that GPU, or of a modest GPU where
    there is none; `source` says which.
    """
    here = Machine.here()
    known = [
        p for p in map(_preset_of, PRESETS) if p.gpu_name == gpu_name and p.name[:5] != "lohan"
    ]
    if known:
        base, note = known[0], f"rates of preset {known[0].name} ({known[0].source})"
    else:
        base = _server("generic", gpu_name, 0, 100.0, 800.0, 20.0)
        note = f"no preset has a {gpu_name!r}, so rates are a modest GPU's; measure this machine"
    return dataclasses.replace(
        base,
        name=base.name if known else f"generic {gpu_name}",
        source=f"sizes asked of this machine; {note}",
        dram_bytes=here.dram_free_bytes,
        ssd_bytes=_free_ssd_bytes(here),
    )


def _free_ssd_bytes(machine: Machine) -> int:
    where = machine.default_ssd_dir
    return 0 if where is None else machine.ssd_free_bytes(where)


def _preset_of(name: str) -> Hardware:
    return _preset(name, None)


def _cpu(dram_bytes: int, ssd_bytes: int) -> Hardware:
    cores = psutil.cpu_count(logical=False) or 1
    dram_rate = min(cores * 8.0, 80.0) * _GB
    return Hardware(
        name=f"cpu-{platform.machine()}-{cores}",
        source=(
            "sizes asked of this machine, rates generic: 30 GFLOP/s and 8 GB/s of DRAM a core, "
            "1 GB/s of disk"
        ),
        gpu_name="cpu",
        gpu_memory_bytes=int(psutil.virtual_memory().total),
        flops_per_s={"float32": cores * 30e9, "bfloat16": cores * 15e9, "float16": cores * 15e9},
        gpu_mem_bytes_per_s=dram_rate,
        h2d_bytes_per_s=dram_rate / 2,
        d2h_bytes_per_s=dram_rate / 2,
        duplex_factor=0.6,
        dram_bytes=dram_bytes,
        dram_copy_bytes_per_s=dram_rate,
        ssd_bytes=ssd_bytes,
        ssd_read_bytes_per_s=1.0 * _GB,
        ssd_write_bytes_per_s=1.0 * _GB,
        ssd_simplex=True,
        cpu_adam_params_per_s=dram_rate / 30,
    )


def _lohan_names() -> str:
    return ", ".join(_LOHAN_GPUS)
