"""Files on SSD: reads, writes and both at once, through the engine that training uses."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from lohan_fx.errors import LohanError
from lohan_fx.native import FileEngine, HostBuffer
from lohan_fx.units import format_bytes

# Of each disk this much stays free, and at least as much again as is written.
_RESERVE_SHARE = 20
_RESERVE_BYTES = 2**30
_REQUEST_BYTES = 64 * 2**20


@dataclass(frozen=True, slots=True)
class SsdRates:
    """Bytes per second. `mixed` is reads plus writes at once, half and half.

    `direct` is False where O_DIRECT is refused: the figures are then the page cache's.
    """

    read_bytes_per_s: float
    write_bytes_per_s: float
    mixed_bytes_per_s: float
    direct: bool

    @property
    def simplex(self) -> bool:
        """True where mixed traffic is nearer to taking turns than to running side by side."""
        read, write = self.read_bytes_per_s, self.write_bytes_per_s
        turns, beside = 2 * read * write / (read + write), 2 * min(read, write)
        return self.mixed_bytes_per_s < (turns + beside) / 2 or read == write


def check_room(directories: Sequence[Path], nbytes: int) -> None:
    """Raise LohanError unless each disk has room for its part of `nbytes`, with a reserve."""
    for directory in directories:
        try:
            usage = shutil.disk_usage(directory)
        except OSError as exc:
            raise LohanError(
                f"the SSD directory {directory} cannot be used ({exc.strerror}); make it, or name "
                "another"
            ) from exc
        needed = -(-nbytes // len(directories)) + max(usage.total // _RESERVE_SHARE, _RESERVE_BYTES)
        if usage.free < needed:
            raise LohanError(
                f"the disk of {directory} is too full to be measured: {format_bytes(usage.free)} "
                f"free, {format_bytes(needed)} needed; free some, or name another directory"
            )


def ssd_rates(
    directories: Sequence[Path], nbytes: int, block_bytes: int, *, limit_s: float = 10.0
) -> SsdRates:
    """Rates of files of `nbytes` in all, striped over the directories, in transfers of `block_bytes`.

    Each of read, write and mixed moves `nbytes`, or what it can in `limit_s`. The files have no name
    and are gone on return, whatever happens.

    Raises:
        LohanError: a disk is too full, or a directory is not there.
        TransferError: a transfer failed.
    """
    check_room(directories, nbytes)
    with _Files(directories, nbytes, block_bytes) as files:
        files.move("w", limit_s)  # the first write of a preallocated block is another thing
        return SsdRates(
            write_bytes_per_s=files.move("w", limit_s),
            read_bytes_per_s=files.move("r", limit_s),
            mixed_bytes_per_s=files.move("rw", limit_s),
            direct=files.direct,
        )


class _Files:
    """One extent and some buffers, two requests of each kind under way at a time."""

    def __init__(self, directories: Sequence[Path], nbytes: int, block_bytes: int) -> None:
        self._request = min(_REQUEST_BYTES, max(4096, nbytes // 8 // 4096 * 4096))
        self._request = max(self._request, min(block_bytes, nbytes // 4096 * 4096))
        self._count = max(2, nbytes // self._request)
        self._engine = FileEngine([os.fspath(d) for d in directories], block_bytes=block_bytes)
        self._extent = self._engine.allocate(self._count * self._request)
        self._buffers = [HostBuffer(self._request) for _ in range(4)]
        for buffer in self._buffers:  # random: some disks compress
            torch.frombuffer(buffer, dtype=torch.uint8).random_()

    def __enter__(self) -> _Files:
        return self

    def __exit__(self, *_: object) -> None:
        self._engine.close()

    @property
    def direct(self) -> bool:
        return all(self._engine.direct)

    def move(self, kinds: str, limit_s: float) -> float:
        """Bytes per second of requests of `kinds` ("r", "w"), in turns, over the whole extent."""
        start = time.perf_counter()
        tickets: list[int] = []
        moved = 0
        for number in range(self._count):
            if len(tickets) == len(self._buffers):
                self._engine.wait(tickets.pop(0), timeout_s=300.0)
            submit = self._engine.read if kinds[number % len(kinds)] == "r" else self._engine.write
            buffer = self._buffers[number % len(self._buffers)]
            offset = number * self._request
            tickets.append(
                submit(self._extent, offset, buffer.ptr, self._request, f"probe {number}")
            )
            moved += self._request
            if time.perf_counter() - start > limit_s:
                break
        for ticket in tickets:
            self._engine.wait(ticket, timeout_s=300.0)
        return moved / (time.perf_counter() - start)
