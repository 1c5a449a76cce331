"""All measurements of one machine, put together as its Hardware."""

from __future__ import annotations

import dataclasses
import datetime
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch

from lohan_fx.budget import Machine
from lohan_fx.hardware import Hardware, cpu_name

from . import device as gpu
from . import disk, host

log = logging.getLogger(__name__)

MIB = 2**20


@dataclass(frozen=True, slots=True)
class Effort:
    """Sizes and times of the measurements. Times are per measurement, before and while it counts.

    `adam_params` should come to gigabytes: server CPUs have caches of 300 MB, and what goes through
    DRAM in training does not fit. What only informs are Adam in fp32, plain pinned allocation, and other
    patterns of DRAM than copies.
    """

    matmul_size: int
    matmul_warm_s: float
    warm_s: float
    measure_s: float
    gpu_bytes: int
    link_bytes: int
    host_bytes: int
    adam_params: int
    ssd_bytes: int
    ssd_blocks: tuple[int, ...]
    ssd_limit_s: float
    thorough: bool = True  # False leaves out what only informs

    def within(self, machine_bytes: int, gpu_free_bytes: int) -> Effort:
        """The same with arrays that a small machine can hold: at most a fortieth of it each."""
        host_most, gpu_most = machine_bytes // 40, gpu_free_bytes // 8
        return dataclasses.replace(
            self,
            gpu_bytes=min(self.gpu_bytes, gpu_most),
            link_bytes=min(self.link_bytes, host_most, gpu_most) // 4096 * 4096,
            host_bytes=min(self.host_bytes, host_most) // 4096 * 4096,
            adam_params=min(self.adam_params, host_most // 4),
        )


# The block size that the runtime uses; rates for planning are of this one.
_BLOCK_BYTES = 8 * MIB
FULL = Effort(
    matmul_size=8192,
    matmul_warm_s=3.0,
    warm_s=0.5,
    measure_s=1.0,
    gpu_bytes=2**30,
    link_bytes=2**30,
    host_bytes=2**30,
    adam_params=200_000_000,
    ssd_bytes=8 * 2**30,
    ssd_blocks=(MIB, 4 * MIB, _BLOCK_BYTES, 16 * MIB),
    ssd_limit_s=10.0,
)
QUICK = Effort(
    matmul_size=4096,
    matmul_warm_s=0.5,
    warm_s=0.1,
    measure_s=0.2,
    gpu_bytes=256 * MIB,
    link_bytes=256 * MIB,
    host_bytes=512 * MIB,
    adam_params=200_000_000,
    ssd_bytes=2**30,
    ssd_blocks=(_BLOCK_BYTES,),
    ssd_limit_s=3.0,
)
_DTYPES = (torch.bfloat16, torch.float16, torch.float32)

Report = Callable[[str], None]


def gpu_name_of(device: torch.device) -> str:
    """The GPU's name as the driver says it; "cpu" for the CPU as device."""
    return "cpu" if device.type == "cpu" else torch.cuda.get_device_name(device)


def measure_machine(
    device: torch.device,
    ssd_dirs: Sequence[Path] = (),
    effort: Effort = FULL,
    report: Report = lambda _: None,
) -> Hardware:
    """This machine as measured now.

    Args:
        device: whose matrix products, memory and link count as the GPU's.
        ssd_dirs: directories on the disks to measure, striped as training would; none: the SSD's
            rates are 0, which stands for not measured.
        report: is told what is measured next, in a few words.

    Raises:
        LohanError: a disk is too full or not there. Nothing is left on it, whatever happens.
    """
    disk.check_room(ssd_dirs, effort.ssd_bytes)
    on_cpu = device.type == "cpu"
    here = Machine.here()
    gpu_name = gpu_name_of(device)
    if on_cpu:
        gpu_free, gpu_total = here.dram_free_bytes, psutil.virtual_memory().total
    else:
        gpu_free, gpu_total = torch.cuda.mem_get_info(device)
    effort = effort.within(here.dram_free_bytes, gpu_free)
    details: dict[str, float] = {}
    times = {"warm_s": effort.warm_s, "measure_s": effort.measure_s}

    flops = {}
    warm_s = effort.warm_s if on_cpu else effort.matmul_warm_s
    for dtype in _DTYPES:
        name = str(dtype).removeprefix("torch.")
        report(f"matrix products in {name}")
        try:
            flops[name] = gpu.matmul_flops_per_s(
                device, dtype, effort.matmul_size, warm_s=warm_s, measure_s=effort.measure_s
            )
        except RuntimeError as exc:  # some devices have no kernels for some dtypes
            log.info("no matrix product in %s: %s", name, exc)
    report("GPU memory")
    gpu_memory = gpu.memory_bytes_per_s(device, effort.gpu_bytes, **times)
    report("host to device, device to host")
    link = gpu.link_rates(device, effort.link_bytes, **times)
    details["link_both_each_bytes_per_s"] = link.both_each_bytes_per_s
    report("pinned memory")
    pinned = gpu.pinned_alloc_bytes_per_s(device, effort.link_bytes)
    if effort.thorough and not on_cpu:
        plain = gpu.plain_pinned_alloc_bytes_per_s(effort.link_bytes)
        details["pinned_alloc_plain_bytes_per_s"] = plain
    if not on_cpu:
        torch.cuda.empty_cache()

    report("DRAM")
    dram = [host.dram_copy_bytes_per_s(effort.host_bytes, **times)]
    details["dram_copy_bytes_per_s"] = dram[0]
    if effort.thorough:
        dram.append(host.dram_triad_bytes_per_s(effort.host_bytes, **times))
        details["dram_triad_bytes_per_s"] = dram[1]
    for dtype_name, moved in host.ADAM_BYTES.items():
        if dtype_name == "float32" and not effort.thorough:
            continue
        report(f"Adam on the CPU, {dtype_name}")
        rate = host.adam_params_per_s(effort.adam_params, dtype_name, **times)
        details[f"cpu_adam_{dtype_name}_params_per_s"] = rate
        dram.append(rate * moved)
    report("Adam on the CPU, into second copies")
    ahead = host.adam_ahead_params_per_s(effort.adam_params, **times)
    report("Adam beside copies")
    beside, copied = host.adam_while_copying(device, effort.adam_params, effort.link_bytes, **times)
    details["cpu_adam_while_copying_params_per_s"] = beside
    details["copies_while_adam_bytes_per_s"] = copied
    dram.append(beside * host.ADAM_BYTES["bfloat16"] + copied)

    ssd = _measure_ssd(ssd_dirs, effort, details, report)
    where = here.default_ssd_dir
    return Hardware(
        name=f"measured {gpu_name}",
        source=(
            f"measured with `python -m lohan_fx.probe` on {datetime.date.today().isoformat()}, torch "
            f"{torch.__version__}"
        ),
        gpu_name=gpu_name,
        gpu_memory_bytes=int(gpu_total),
        flops_per_s=flops,
        gpu_mem_bytes_per_s=gpu_memory,
        h2d_bytes_per_s=link.h2d_bytes_per_s,
        d2h_bytes_per_s=link.d2h_bytes_per_s,
        duplex_factor=min(
            1.0,
            link.both_each_bytes_per_s / min(link.h2d_bytes_per_s, link.d2h_bytes_per_s),
        ),
        dram_bytes=here.dram_free_bytes,
        # No pattern reaches more than the memory has: the fastest of all is nearest to it.
        dram_bytes_per_s=max(dram),
        ssd_bytes=0 if where is None else here.ssd_free_bytes(where),
        ssd_read_bytes_per_s=0.0 if ssd is None else ssd.read_bytes_per_s,
        ssd_write_bytes_per_s=0.0 if ssd is None else ssd.write_bytes_per_s,
        ssd_mixed_bytes_per_s=0.0 if ssd is None else ssd.mixed_bytes_per_s,
        ssd_simplex=True if ssd is None else ssd.simplex,
        cpu_adam_params_per_s=details["cpu_adam_bfloat16_params_per_s"],
        cpu_adam_ahead_params_per_s=ahead,
        pinned_alloc_bytes_per_s=pinned,
        measured=datetime.date.today().isoformat(),
        cpu_name=cpu_name(),
        details=details,
    )


def _measure_ssd(
    directories: Sequence[Path], effort: Effort, details: dict[str, float], report: Report
) -> disk.SsdRates | None:
    """All directories together in every block size, then each alone; the first at 8 MiB counts."""
    if not directories:
        return None
    runs = [(directories, block, "ssd") for block in effort.ssd_blocks]
    if len(directories) > 1:
        runs += [([one], _BLOCK_BYTES, f"ssd_dir{k}") for k, one in enumerate(directories)]
    chosen: disk.SsdRates | None = None
    for dirs, block, prefix in runs:
        report(f"{', '.join(map(str, dirs))} in blocks of {block / MIB:.3g} MiB")
        rates = disk.ssd_rates(dirs, effort.ssd_bytes, block, limit_s=effort.ssd_limit_s)
        if chosen is None or (block == _BLOCK_BYTES and len(dirs) == len(directories)):
            chosen = rates
        for kind in ("read", "write", "mixed"):
            key = f"{prefix}_block{block}_{kind}_bytes_per_s"
            details[key] = getattr(rates, f"{kind}_bytes_per_s")
    assert chosen is not None
    if not chosen.direct:
        log.warning("a disk refuses O_DIRECT: its figures are of the page cache, not of the disk")
    return chosen
