"""What a plan may use of each tier, as the user says it and as the machine completes it."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import psutil

from lohan_fx.errors import BudgetError, LohanError
from lohan_fx.units import format_bytes, parse_bytes

# A directory that is not named yet; `resolve` finds one.
SsdDir = tuple[Path | None, int | None]

_EXAMPLE = "gpu=24GB, dram=100GB, ssd=/mnt/a:1TB+/mnt/b:1TB"
# Left to the rest of the machine when DRAM or SSD is not in the budget.
_MARGIN_SHARE = 10
_DRAM_MARGIN_BYTES = 2 * 2**30


@dataclass(frozen=True, slots=True)
class Capacities:
    """What a plan may use of each tier, in bytes."""

    gpu_bytes: int
    dram_bytes: int
    ssd_bytes: int


@dataclass(frozen=True, slots=True)
class Machine:
    """What can still be had on a machine. `ssd_free_bytes` asks for one directory."""

    gpu_bytes: int
    dram_free_bytes: int
    ssd_free_bytes: Callable[[Path], int]
    default_ssd_dir: Path | None

    @classmethod
    def here(cls, gpu_bytes: int = 0) -> Machine:
        """This machine as it is now; the GPU is the caller's to ask, as this needs no torch."""
        return cls(gpu_bytes, _free_dram_bytes(), _free_ssd_bytes, _default_ssd_dir())


@dataclass(frozen=True, slots=True)
class Budget:
    """Bytes per tier. What is None is taken from the machine by `resolve`.

    `ssd` lists (directory, capacity). An empty one means no SSD; a directory of None is chosen by
    `resolve`, a capacity of None is what is free there, less a margin.
    """

    gpu: int
    dram: int | None = None
    ssd: tuple[SsdDir, ...] | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "gpu", _size("gpu", self.gpu))
        if self.dram is not None:
            object.__setattr__(self, "dram", _size("dram", self.dram))
        if self.ssd is not None:
            object.__setattr__(self, "ssd", tuple(_ssd_dir(entry) for entry in _listed(self.ssd)))
            named = [path for path, _ in self.ssd if path is not None]
            for path in named:
                if named.count(path) > 1:
                    raise BudgetError(f"the SSD directory {path} is in the budget twice")

    @classmethod
    def parse(cls, text: str | int | Budget) -> Budget:
        """A budget from "gpu=24GB, dram=100GB, ssd=/mnt/a:1TB+/mnt/b", "24GB" or bytes (GPU only).

        `ssd=2TB` leaves the directory open, `ssd=/mnt/a` the capacity, `ssd=none` means no SSD. A
        Budget is returned as it is.
        """
        if isinstance(text, Budget):
            return text
        if not isinstance(text, str) or "=" not in text:
            return cls(gpu=_size("gpu", text))
        values: dict[str, str] = {}
        for part in text.split(","):
            key, equals, value = (piece.strip() for piece in part.partition("="))
            if not equals or not value:
                raise BudgetError(
                    f"{part.strip()!r} in the budget is not tier=size; try {_EXAMPLE!r}"
                )
            if key not in ("gpu", "dram", "ssd"):
                raise BudgetError(f"{key!r} is not a tier; they are gpu, dram and ssd")
            if key in values:
                raise BudgetError(f"{key} is in the budget twice")
            values[key] = value
        if "gpu" not in values:
            raise BudgetError(f"the budget {text!r} does not say gpu=...; try {_EXAMPLE!r}")
        ssd: tuple[SsdDir, ...] | None = None
        if "ssd" in values:
            none = values["ssd"].lower() == "none"
            ssd = () if none else tuple(_parse_ssd(entry) for entry in values["ssd"].split("+"))
        dram = _size("dram", values["dram"]) if "dram" in values else None
        return cls(gpu=_size("gpu", values["gpu"]), dram=dram, ssd=ssd)

    @property
    def ssd_bytes(self) -> int:
        """Bytes over all directories; those without a capacity do not count before `resolve`."""
        return sum(capacity or 0 for _, capacity in self.ssd or ())

    def capacities(self) -> Capacities:
        """Bytes per tier, for the planner.

        Raises BudgetError for a budget that `resolve` has not completed.
        """
        if self.dram is None or self.ssd is None or any(size is None for _, size in self.ssd):
            raise BudgetError(f"the budget {self} is not complete; resolve it first")
        return Capacities(self.gpu, self.dram, self.ssd_bytes)

    def resolve(self, machine: Machine | None = None) -> Budget:
        """The same budget with every None filled in from what the machine has free, less a margin.

        Without `machine` it is this one, now. What is free is rounded down by up to 1/64, so that it is
        mostly the same from run to run, and with it the plan. Sizes asked for are kept as they are,
        free or not.
        """
        machine = Machine.here() if machine is None else machine
        dram = self.dram
        if dram is None:
            free = machine.dram_free_bytes
            dram = max(0, free - max(free // _MARGIN_SHARE, min(_DRAM_MARGIN_BYTES, free // 2)))
            dram = _steady(dram)
        ssd = self.ssd
        if ssd is None:
            ssd = ((None, None),) if machine.default_ssd_dir is not None else ()
        return Budget(self.gpu, dram, tuple(_resolve_ssd(entry, machine) for entry in ssd))

    def __str__(self) -> str:
        parts = [f"gpu={format_bytes(self.gpu)}"]
        if self.dram is not None:
            parts.append(f"dram={format_bytes(self.dram)}")
        if self.ssd is not None:
            dirs = "+".join(_ssd_words(path, capacity) for path, capacity in self.ssd)
            parts.append(f"ssd={dirs or 'none'}")
        return ", ".join(parts)


def _size(tier: str, value: str | int) -> int:
    try:
        return parse_bytes(value)
    except LohanError as exc:
        raise BudgetError(f"{tier} in the budget: {exc}") from None


def _listed(ssd: object) -> Iterable[object]:
    if isinstance(ssd, str | Path):
        return (ssd,)
    if not isinstance(ssd, list | tuple):
        raise BudgetError(f"ssd in the budget is a list of directories, not {ssd!r}")
    return ssd


def _ssd_dir(entry: object) -> SsdDir:
    """A directory as it may be given to the constructor: a path, "path:size" or a pair."""
    if isinstance(entry, Path):
        return entry, None
    if isinstance(entry, str):
        return _parse_ssd(entry)
    if isinstance(entry, tuple) and len(entry) == 2:
        path, capacity = entry
        where = None if path is None else Path(path)
        return where, None if capacity is None else _size("ssd", capacity)
    raise BudgetError(f"{entry!r} is not an SSD directory; write '/mnt/a:1TB' or (path, bytes)")


def _parse_ssd(text: str) -> SsdDir:
    """One of "/mnt/a:1TB", "/mnt/a" and "1TB"."""
    text = text.strip()
    if not text:
        raise BudgetError(f"there is an empty SSD directory in the budget; try {_EXAMPLE!r}")
    path, colon, size = text.rpartition(":")
    if colon and path:
        return Path(path), _size(f"ssd {path}", size)
    if text[0].isdigit():
        return None, _size("ssd", text)
    return Path(text), None


def _ssd_words(path: Path | None, capacity: int | None) -> str:
    words = [] if path is None else [str(path)]
    if capacity is not None:
        words.append(format_bytes(capacity))
    return ":".join(words) or "any"


def _steady(free_bytes: int) -> int:
    """Rounded down to seven significant bits."""
    step: int = 1 << max(0, free_bytes.bit_length() - 7)
    return free_bytes // step * step


def _resolve_ssd(entry: SsdDir, machine: Machine) -> SsdDir:
    path, capacity = entry
    path = path or machine.default_ssd_dir
    if path is None:
        raise BudgetError("no directory on a disk was found for the SSD; write ssd=/a/dir:size")
    if capacity is None:
        free = machine.ssd_free_bytes(path)
        capacity = _steady(free - free // _MARGIN_SHARE)
    return path, capacity


# ---- this machine ----


def _free_dram_bytes() -> int:
    """What can be allocated without swapping: the kernel's estimate, within the cgroup's limit."""
    free = int(psutil.virtual_memory().available)
    for limit_file, used_file in (
        ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
        (
            "/sys/fs/cgroup/memory/memory.limit_in_bytes",
            "/sys/fs/cgroup/memory/memory.usage_in_bytes",
        ),
    ):
        try:
            limit, used = Path(limit_file).read_text().strip(), Path(used_file).read_text().strip()
        except OSError:
            continue
        if limit != "max":
            free = min(free, max(0, int(limit) - int(used)))
    return free


def _free_ssd_bytes(path: Path) -> int:
    try:
        return shutil.disk_usage(path).free
    except OSError as exc:
        raise BudgetError(
            f"the SSD directory {path} cannot be used ({exc.strerror}); make it, or name another"
        ) from exc


def _default_ssd_dir() -> Path | None:
    """The temporary directory or the current one, whichever is on a disk; None if neither is."""
    for name in (tempfile.gettempdir(), os.getcwd()):
        path = Path(name).resolve()
        if not _is_in_memory(path):
            return path
    return None


def _is_in_memory(path: Path) -> bool:
    """True for a path on tmpfs or ramfs, which would spend DRAM and not a disk."""
    best, kind = -1, ""
    for partition in psutil.disk_partitions(all=True):
        mount = Path(partition.mountpoint)
        if path.is_relative_to(mount) and len(mount.parts) >= best:
            best, kind = len(mount.parts), partition.fstype
    return kind in ("tmpfs", "ramfs")
