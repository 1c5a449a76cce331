"""A machine that nobody has measured is measured in short when its GPU is first used.

[Note: what is on file] `python -m lohan_fx.probe` writes the file that counts (`hardware.default_file`).
What is measured here has files of its own, one for each GPU and CPU (`hardware.quick_file`), so it never
replaces that one, nor what is known of another machine that shares the folder. Rates of disks are among
the details under the disks' numbers: a run on disks that were not measured yet adds those, unless
`lohan_fx.probe` has measured some.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import fcntl
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import torch

from lohan_fx import hardware as machines
from lohan_fx.hardware import Hardware
from lohan_fx.kept import write_kept

from . import disk
from .machine import MIB, QUICK, Effort, gpu_name_of, measure_machine

log = logging.getLogger(__name__)

MAX_FILES = 64
# Ops are timed one by one besides, and clocks that have not settled yet err less than a preset's guess of
# the host.
FIRST = dataclasses.replace(
    QUICK,
    matmul_warm_s=0.2,
    warm_s=0.05,
    measure_s=0.1,
    link_bytes=128 * MIB,
    host_bytes=256 * MIB,
    ssd_limit_s=0.3,
    thorough=False,
)
# Slow disks show what they are by this share of the bytes.
_FEW = 16
_FAST_SSD_BYTES_PER_S = 1e9
_LONGEST_TURN_S = 60.0


def measured_once(
    device: torch.device,
    ssd_dirs: Sequence[Path] = (),
    effort: Effort = FIRST,
    measuring: Callable[[], AbstractContextManager[None]] = nullcontext,
) -> Hardware:
    """This machine with this device: what is on file about it, the rest measured now and kept.

    What cannot be measured has the rates of `hardware.nearest` or `detect`, which a log says; it is
    never an error. See [Note: what is on file].

    Args:
        ssd_dirs: where training may write; their disks' rates are wanted too.
        measuring: is entered while something is measured.
    """
    name = gpu_name_of(device)
    disks = _disks(ssd_dirs)
    found = machines.on_file(name)
    if found is None or _lacks(found, disks):
        with measuring(), _one_at_a_time(), _left_as_it_was(device):
            before = found = machines.on_file(name)  # another process may have measured meanwhile
            if found is None:
                found = _machine(device, effort)
            if found is not None and _lacks(found, disks):
                found = _with_disks(found, ssd_dirs, disks, effort)
            if found is not None and found is not before:
                write_kept(machines.quick_file(name), found.to_json(indent=1).encode(), MAX_FILES)
    if found is None:
        return machines.detect() if device.type == "cpu" else machines.nearest(name)
    return machines.as_of_now(_of_disks(found, disks))


def _machine(device: torch.device, effort: Effort) -> Hardware | None:
    try:
        found = measure_machine(device, effort=effort)
    except Exception as error:  # an estimate must not end a run
        log.warning("this machine cannot be measured, a preset's rates are used: %s", error)
        return None
    source = (
        f"quick automatic measurement of {found.measured}, torch {torch.__version__}; "
        "`python -m lohan_fx.probe` takes longer and is more exact"
    )
    return dataclasses.replace(found, source=source)


# ---- disks ----


def _disks(directories: Sequence[Path]) -> str:
    """The disks behind directories by their device numbers, "" for none or where one is missing."""
    try:
        numbers = {path.stat().st_dev for path in directories}
    except OSError as error:
        log.info("disks are not measured: %s", error)
        return ""
    return "_".join(str(number) for number in sorted(numbers))


def _key(disks: str, kind: str) -> str:
    return f"ssd_disks_{disks}_{kind}_bytes_per_s"


def _lacks(found: Hardware, disks: str) -> bool:
    """True where the disks are to be measured: they were not, nor any by `lohan_fx.probe`."""
    if not disks or _key(disks, "mixed") in found.details:
        return False
    automatic = any(key.startswith("ssd_disks_") for key in found.details)
    return automatic or not found.ssd_read_bytes_per_s


def _of_disks(found: Hardware, disks: str) -> Hardware:
    """With the rates of these disks, where they were measured here."""
    if _key(disks, "mixed") not in found.details:
        return found
    read, write, mixed = (found.details[_key(disks, kind)] for kind in ("read", "write", "mixed"))
    return dataclasses.replace(
        found,
        ssd_read_bytes_per_s=read,
        ssd_write_bytes_per_s=write,
        ssd_mixed_bytes_per_s=mixed,
        ssd_simplex=disk.SsdRates(read, write, mixed, direct=True).simplex,
    )


def _with_disks(found: Hardware, dirs: Sequence[Path], disks: str, effort: Effort) -> Hardware:
    """With these disks measured too; as it is where they cannot be."""
    try:
        rates = _ssd_rates(dirs, effort)
    except Exception as error:  # an estimate must not end a run
        log.warning("disks cannot be measured, a generic rate is used: %s", error)
        return found
    today = datetime.date.today().isoformat()
    details = {
        **found.details,
        _key(disks, "read"): rates.read_bytes_per_s,
        _key(disks, "write"): rates.write_bytes_per_s,
        _key(disks, "mixed"): rates.mixed_bytes_per_s,
    }
    words = found.source.partition(machines.SSD_WORDS)[0]
    source = f"{words}{machines.SSD_WORDS}measured automatically, in short, on {today}"
    return _of_disks(dataclasses.replace(found, details=details, source=source), disks)


def _ssd_rates(dirs: Sequence[Path], effort: Effort) -> disk.SsdRates:
    block, limit_s = effort.ssd_blocks[0], effort.ssd_limit_s
    rates = disk.ssd_rates(dirs, effort.ssd_bytes // _FEW, block, limit_s=limit_s)
    if min(rates.read_bytes_per_s, rates.write_bytes_per_s) < _FAST_SSD_BYTES_PER_S:
        return rates
    return disk.ssd_rates(dirs, effort.ssd_bytes, block, limit_s=limit_s)


# ---- beside others ----


@contextlib.contextmanager
def _one_at_a_time() -> Iterator[None]:
    """Processes measure in turns, as they would see each other; one that waits too long goes on."""
    path = machines.cache_dir() / "measuring.lock"
    with contextlib.ExitStack() as stack:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            file = stack.enter_context(path.open("a"))
            end = time.monotonic() + _LONGEST_TURN_S
            while not _locked(file.fileno()) and time.monotonic() < end:
                time.sleep(0.05)
        except OSError as error:
            log.info("measuring without a lock: %s", error)
        yield


def _locked(fd: int) -> bool:
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


@contextlib.contextmanager
def _left_as_it_was(device: torch.device) -> Iterator[None]:
    """The user's random state stays, and the GPU's memory is given back."""
    on_gpu = device.type == "cuda"
    with torch.random.fork_rng([device] if on_gpu else []):
        try:
            yield
        finally:
            if on_gpu:
                torch.cuda.empty_cache()
