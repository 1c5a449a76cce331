"""Machines by name, each with the source of its numbers."""

from __future__ import annotations

import dataclasses

from lohan_fx.errors import LohanError

from .rates import Hardware

_GB = 1e9
_TERA = 1e12
LOHAN_SSDS = 12

# [Note: the SSDs of the paper's server]
# Twelve Intel P5510 of 3.84 TB in RAID-0. What a training step gets from N of them follows from the
# published steps that they limit. 13B (12.84e9 parameters in fact) moves 2P bytes in forward and 28P
# in backward and optimizer, reads and writes half and half. With T_f, the forward as the GPU
# needs it (2P FLOPs a token at 140 TFLOP/s: 1.5, 3.0, 6.0 and 12 s at batch 8, 16, 32 and 64), the
# rate is 28P / (step - T_f):
#
#   drives   batch: step, s            rate, GB/s        the curve below
#    1       32: 90.9    64: 96.9      4.2    4.2         4.3
#    2       32: 53.0    64: 61.0      7.6    7.3         7.6
#    3       32: 42.0    64: 50.0      10.0   9.5        10.2
#    6       32: 28.0                  16.3              15.5
#   12        8: 19.9    16: 20.2      19.5  20.9        20.9
#   12       32: 23.8                  20.2
#
# Two constants explain all rows within 7 %: each byte passes a drive of 5.0 GB/s (the mean of the
# data sheet's 7.0 reading and 4.3 writing is 5.3), N of which work side by side, and after it
# what they share, whose 32 GB/s is the published rate of reads and writes together with 12 drives:
#
#   rate(N) = 1 / (1 / (N * 5.0) + 1 / 32)
#
# It is an effective rate of steps with two state buffers, so the waits of the reference pipeline
# are in it; 32 GB/s of plain transfers are not reached by any published step.
_P5510_BYTES = 3_840 * 10**9
_P5510_BYTES_PER_S = 5.0 * _GB
_SHARED_BYTES_PER_S = 32.0 * _GB


def ssd_array_bytes_per_s(num_ssds: int) -> float:
    """Reads plus writes of the paper's server with `num_ssds` drives, from its published steps."""
    return 1 / (1 / (num_ssds * _P5510_BYTES_PER_S) + 1 / _SHARED_BYTES_PER_S)


# [Note: Adam and DRAM of the paper's server]
# Two Xeon Gold 5320 (26 cores each) with 8 channels of DDR4-2933 each: 2 * 8 * 23.5 = 375 GB/s.
# All cores together usually see two thirds of that. Adam in 16 bit moves 28 bytes a parameter, but its
# streams cross sockets. The published 13B step at batch 8 is 2.1 s longer when state is written only
# after Adam (22.0 s, "naive") instead of beside it (19.9 s); what was hidden is the shorter of the
# two, Adam, as the write takes 9 s: 12.84e9 parameters in 2.1 s, 171 GB/s.
_LOHAN_DRAM_BYTES_PER_S = 250 * _GB
_LOHAN_ADAM_PARAMS_PER_S = 6.1e9

_LOHAN_SOURCE = (
    "LoHan (ICDE 2025, arXiv 2403.06504): dual Xeon Gold 5320, 768 GB DDR4, PCIe 4 measured at "
    "21 GB/s one way; SSD rate fitted to the published steps with 1 to 12 Intel P5510, CPU Adam to "
    "those with and without overlap; {gpu}; DRAM is two thirds of 16 channels of DDR4-2933"
)

# name -> (GPU, half-precision and float32 TFLOP/s, GPU memory GB/s, bytes, source of these). Data
# sheets: dense half-precision tensor throughput with fp32 accumulation 165.2 / 97.5 / 71.0 TFLOP/s,
# float32 82.6 / 48.7 / 35.6, memory 1008 / 716.8 / 936.2 GB/s (4090 / 4080 / 3090).
_GEFORCE = {
    "rtx4090": (
        "NVIDIA GeForce RTX 4090",
        (162.0, 58.0),
        907.0,
        24 * 2**30,
        "RTX 4090: half-precision matmul as LoHan measured it (160-164 TFLOP/s)",
    ),
    "rtx4080": (
        "NVIDIA GeForce RTX 4080",
        (95.6, 34.0),
        645.0,
        16 * 2**30,
        "RTX 4080: half-precision matmul at the 4090's share of the data sheet (98 %)",
    ),
    "rtx3090": (
        "NVIDIA GeForce RTX 3090",
        (69.6, 25.0),
        843.0,
        24 * 2**30,
        "RTX 3090: half-precision matmul at the 4090's share of the data sheet (98 %)",
    ),
}
_GEFORCE_NOTE = "float32 at 70 % and GPU memory at 90 % of the data sheet"


def _lohan(name: str, num_ssds: int) -> Hardware:
    if not 1 <= num_ssds <= LOHAN_SSDS:
        raise LohanError(f"{name} has 1 to {LOHAN_SSDS} SSDs, not {num_ssds}")
    gpu_name, (half, single), bandwidth, memory, note = _GEFORCE[name.removeprefix("lohan-")]
    ssd = ssd_array_bytes_per_s(num_ssds)
    return Hardware(
        name=name,
        source=_LOHAN_SOURCE.format(gpu=f"{note}, {_GEFORCE_NOTE}"),
        gpu_name=gpu_name,
        gpu_memory_bytes=memory,
        flops_per_s=_rates(half, single),
        gpu_mem_bytes_per_s=bandwidth * _GB,
        h2d_bytes_per_s=21 * _GB,
        d2h_bytes_per_s=21 * _GB,
        duplex_factor=0.9,
        dram_bytes=768 * 10**9,
        dram_bytes_per_s=_LOHAN_DRAM_BYTES_PER_S,
        ssd_bytes=num_ssds * _P5510_BYTES,
        # One curve for reads and writes, of which a step has as many.
        ssd_read_bytes_per_s=ssd,
        ssd_write_bytes_per_s=ssd,
        ssd_mixed_bytes_per_s=ssd,
        ssd_simplex=True,
        cpu_adam_params_per_s=_LOHAN_ADAM_PARAMS_PER_S,
    )


def _rates(half_tflops: float, single_tflops: float) -> dict[str, float]:
    return {
        "bfloat16": half_tflops * _TERA,
        "float16": half_tflops * _TERA,
        "float32": single_tflops * _TERA,
    }


def _desktop(name: str) -> Hardware:
    gpu_name, (half, single), bandwidth, memory, note = _GEFORCE[name]
    return Hardware(
        name=name,
        source=(
            f"{note}, {_GEFORCE_NOTE}; PCIe 4 x16 at 21 GB/s as LoHan (arXiv 2403.06504) measured "
            "it; host estimated: 128 GB of dual-channel DDR5 at 60 GB/s, one PCIe 4 NVMe SSD of 2 TB"
        ),
        gpu_name=gpu_name,
        gpu_memory_bytes=memory,
        flops_per_s=_rates(half, single),
        gpu_mem_bytes_per_s=bandwidth * _GB,
        h2d_bytes_per_s=21 * _GB,
        d2h_bytes_per_s=21 * _GB,
        duplex_factor=0.9,
        dram_bytes=128 * 10**9,
        dram_bytes_per_s=60 * _GB,
        ssd_bytes=2 * 10**12,
        ssd_read_bytes_per_s=6.5 * _GB,
        ssd_write_bytes_per_s=5.0 * _GB,
        ssd_simplex=True,
        cpu_adam_params_per_s=60 * _GB / 28,
    )


def _h100() -> Hardware:
    return Hardware(
        name="h100-80gb",
        source=(
            "measured on one H100 80GB HBM3 box with 16 Sapphire Rapids cores (torch 2.11, CUDA "
            "13.0): copies of large pinned buffers, one virtual disk with O_DIRECT in 8 MiB blocks, "
            "CPU Adam with 16 threads, which reads and writes 28 bytes a parameter and so shows the "
            "DRAM rate; bf16 matmul of an 8192 cube; GPU memory bandwidth is 85 % of the data sheet's "
            "3.35 TB/s; float32 matmul is 75 % of its 67 TFLOP/s"
        ),
        gpu_name="NVIDIA H100 80GB HBM3",
        gpu_memory_bytes=int(79.18 * 2**30),
        flops_per_s=_rates(779.6, 50.0),
        gpu_mem_bytes_per_s=2850 * _GB,
        h2d_bytes_per_s=54.554 * _GB,
        d2h_bytes_per_s=55.022 * _GB,
        duplex_factor=44.701 / 54.554,
        dram_bytes=125 * 2**30,
        dram_bytes_per_s=5.78 * 28 * _GB,
        ssd_bytes=64 * 2**30,
        ssd_read_bytes_per_s=1.872 * _GB,
        ssd_write_bytes_per_s=2.943 * _GB,
        ssd_simplex=True,
        cpu_adam_params_per_s=5.7e9,
        # Plain pinned allocation; the runtime's pre-faulted way is faster, but not measured there.
        pinned_alloc_bytes_per_s=1.552 * _GB,
    )


def server(
    name: str, gpu_name: str, gpu_bytes: int, half: float, single: float, memory: float, link: float
) -> Hardware:
    """A data-centre GPU in a generic host; TFLOP/s of two precisions, GB/s of memory and PCIe."""
    return Hardware(
        name=name,
        source=(
            "data sheet at 75 % of dense matmul peak and 85 % of memory bandwidth, PCIe at 85 % of "
            "x16; host estimated: 1 TB of DRAM at 250 GB/s, four NVMe SSDs"
        ),
        gpu_name=gpu_name,
        gpu_memory_bytes=gpu_bytes,
        flops_per_s=_rates(half, single),
        gpu_mem_bytes_per_s=memory * _GB,
        h2d_bytes_per_s=link * _GB,
        d2h_bytes_per_s=link * _GB,
        duplex_factor=0.82,
        dram_bytes=10**12,
        dram_bytes_per_s=250 * _GB,
        ssd_bytes=4 * 3_840 * 10**9,
        ssd_read_bytes_per_s=24 * _GB,
        ssd_write_bytes_per_s=16 * _GB,
        ssd_simplex=True,
        cpu_adam_params_per_s=250 * _GB / 28,
    )


def _a100() -> Hardware:
    # Data sheet: 312 and 19.5 TFLOP/s, 2039 GB/s.
    return server(
        "a100-80gb", "NVIDIA A100-SXM4-80GB", 80 * 2**30, 0.75 * 312, 0.75 * 19.5, 1733.0, 26.8
    )


def _h200() -> Hardware:
    # The H100's chip under the same power limit, so its matmul rates; 4800 GB/s on the data sheet.
    made = server("h200", "NVIDIA H200", 141 * 10**9, 779.6, 50.0, 4080.0, 54.0)
    return dataclasses.replace(
        made,
        source=(
            "matmul and PCIe as measured on the H100 (preset h100-80gb), whose chip it has; GPU memory "
            "at 85 % of the data sheet's 4.8 TB/s; host estimated: 1 TB of DRAM at 250 GB/s, four "
            "NVMe SSDs"
        ),
    )


_LOHAN_GPUS = ("lohan-rtx4090", "lohan-rtx4080", "lohan-rtx3090")
PRESETS = (*_LOHAN_GPUS, *_GEFORCE, "a100-80gb", "h100-80gb", "h200")


def preset(name: str, num_ssds: int | None = None) -> Hardware:
    """A machine by name; see Hardware.preset."""
    if name in _LOHAN_GPUS:
        return _lohan(name, LOHAN_SSDS if num_ssds is None else num_ssds)
    if name not in PRESETS:
        raise LohanError(f"there is no hardware preset {name!r}; there are {', '.join(PRESETS)}")
    if num_ssds is not None:
        raise LohanError(
            f"the number of SSDs of {name} is fixed; it varies for {', '.join(_LOHAN_GPUS)}"
        )
    if name in _GEFORCE:
        return _desktop(name)
    return {"a100-80gb": _a100, "h100-80gb": _h100, "h200": _h200}[name]()
