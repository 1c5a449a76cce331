"""The state of one moment, read while training goes on.

[Note: copy on update]
A bucket is read by the saving thread, or copied by the thread of the steps right before its update
overwrites it; also in the middle of being read: what is left of it then comes from the copy. Buckets
are read in the order in which updates will come, so that few need a copy. Copies take `limit_bytes`
at most: an update that finds no room waits until the saving thread has read its bucket, which it does
next.
"""

from __future__ import annotations

import enum
import threading
import time
from collections.abc import Callable, Iterator, Sequence

import torch

from lohan_fx.errors import TransferError
from lohan_fx.piecewise import scratch

from .inventory import Item

ReadPiece = Callable[[int, str, int, torch.Tensor], None]


class BucketState(enum.Enum):
    """Where a bucket's values as they were are.

    LEFT: at rest; an update must not overwrite them yet. The saving thread may be reading them.
    COPYING: as LEFT, and being copied by the thread of the steps.
    COPIED: in a copy, from which the saving thread reads on.
    DONE: read.
    """

    LEFT = enum.auto()
    COPYING = enum.auto()
    COPIED = enum.auto()
    DONE = enum.auto()


class Snapshot:
    """Items of all buckets, each read once, as they were when this was made.

    Args:
        groups: bucket -> its items, in the order in which the saving thread is to read them. Items
            under a negative number are never updated.
        read_at_rest: reads for the saving thread.
        copy_at_rest: reads for the thread of the steps.
        deadline_s: how long an update waits at most.
    """

    def __init__(
        self,
        groups: dict[int, Sequence[Item]],
        read_at_rest: ReadPiece,
        copy_at_rest: ReadPiece,
        *,
        limit_bytes: int,
        deadline_s: float,
    ) -> None:
        self.copied_bytes = 0
        self.peak_copied_bytes = 0
        self.waited_s = 0.0
        self._groups = groups
        self._states = dict.fromkeys(groups, BucketState.LEFT)
        self._read_at_rest = read_at_rest
        self._copy_at_rest = copy_at_rest
        self._limit_bytes = limit_bytes
        self._deadline_s = deadline_s
        self._copies: dict[tuple[int, str], torch.Tensor] = {}
        self._urgent: list[int] = []
        self._given_up = False
        self._changed = threading.Condition()
        self._reading = threading.Lock()  # held while values at rest are read, and copies appear

    # The thread of the steps

    def before_update(self, bucket: int) -> None:
        """Return when the bucket may be overwritten. See [Note: copy on update].

        Raises:
            TransferError: the saving thread has not got to it within the deadline.
        """
        with self._changed:
            if self._given_up or self._states.get(bucket, BucketState.DONE) is BucketState.DONE:
                return
            nbytes = sum(item.spec.numel * item.stored.itemsize for item in self._groups[bucket])
            if self._states[bucket] is BucketState.LEFT:
                if self.copied_bytes + nbytes > self._limit_bytes:
                    self._urgent.append(bucket)
                else:
                    self._states[bucket] = BucketState.COPYING
                    self.copied_bytes += nbytes
                    self.peak_copied_bytes = max(self.peak_copied_bytes, self.copied_bytes)
            if self._states[bucket] is not BucketState.COPYING:
                self._wait_for(bucket)
                return
        try:
            copies = {(item.pid, item.section): self._copy(item) for item in self._groups[bucket]}
        except BaseException:
            with self._changed:
                self.copied_bytes -= nbytes
                if self._states[bucket] is BucketState.COPYING:
                    self._states[bucket] = BucketState.LEFT
                self._changed.notify_all()
            raise
        with self._changed:
            if self._given_up or self._states[bucket] is BucketState.DONE:  # read meanwhile
                self.copied_bytes -= nbytes
                self._states[bucket] = BucketState.DONE
            else:
                with self._reading:
                    self._copies.update(copies)
                self._states[bucket] = BucketState.COPIED
            self._changed.notify_all()

    def _copy(self, item: Item) -> torch.Tensor:
        copy_N = scratch(item.spec.numel, item.stored)
        self._copy_at_rest(item.pid, item.section, 0, copy_N)
        return copy_N

    def _wait_for(self, bucket: int) -> None:
        """Until nothing of the bucket is left to read at rest."""
        start = time.monotonic()
        after = (BucketState.DONE, BucketState.COPIED)
        done = self._changed.wait_for(
            lambda: self._states[bucket] in after, timeout=self._deadline_s
        )
        self.waited_s += time.monotonic() - start
        if not done:
            raise TransferError(
                f"the update of bucket {bucket} has waited {self._deadline_s:g} s for the checkpoint "
                "being saved in the background; its disk hangs, or is too slow for this deadline"
            )

    # The saving thread

    def items(self) -> Iterator[Item]:
        """Every item once; an item may be read until the next one is asked for."""
        while True:
            with self._changed:
                bucket = self._next()
            if bucket is None:
                return
            yield from self._groups[bucket]
            with self._changed:
                self._drop(bucket)
                self._states[bucket] = BucketState.DONE
                self._changed.notify_all()

    def _next(self) -> int | None:
        """What an update waits for, then copies (they take memory), then the order given."""
        while True:
            while self._urgent:
                bucket = self._urgent.pop(0)
                if self._states[bucket] is BucketState.LEFT:
                    return bucket
            for wanted in (BucketState.COPIED, BucketState.LEFT):
                for bucket, state in self._states.items():
                    if state is wanted:
                        return bucket
            if BucketState.COPYING not in self._states.values():
                return None
            self._changed.wait()

    def read(self, pid: int, section: str, start: int, out_N: torch.Tensor) -> None:
        """As Session.read_piece, of that moment."""
        with self._reading:
            copy_N = self._copies.get((pid, section))
            if copy_N is None:
                self._read_at_rest(pid, section, start, out_N)
                return
        out_N.copy_(copy_N[start : start + out_N.numel()])

    def give_up(self) -> None:
        """Let updates go on; the rest is not wanted."""
        with self._changed:
            self._given_up = True
            for bucket, state in self._states.items():
                self._drop(bucket)
                if state is not BucketState.COPYING:
                    self._states[bucket] = BucketState.DONE
            self._changed.notify_all()

    def _drop(self, bucket: int) -> None:
        for item in self._groups[bucket]:
            copy_N = self._copies.pop((item.pid, item.section), None)
            if copy_N is not None:
                self.copied_bytes -= copy_N.numel() * copy_N.dtype.itemsize
