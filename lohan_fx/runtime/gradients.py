"""Gradients between the backward that makes them and the update that reads them: who comes when, and
the memory they wait in."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from lohan_fx.program import Program

from .buckets import BucketHome
from .device import Arrival, Device
from .memory import HostBytes, Pools
from .store import BucketStore


@dataclass(frozen=True, slots=True)
class GradPlan:
    """What one program's backward does to the buckets, by bucket index."""

    pids: Mapping[int, tuple[int, ...]]  # gradients it makes, in program order
    released: frozenset[int]  # buckets it reads
    order: tuple[int, ...]  # buckets with gradients, in forward order
    most_open: int  # buckets whose gradients wait at the same time, at most

    @classmethod
    def of(cls, program: Program, store: BucketStore) -> GradPlan:
        pids: dict[int, list[int]] = {}
        for move in program.backward:
            if move.op == "grad":
                pids.setdefault(store.bucket_of(move.arg), []).append(move.arg)
        released = frozenset(m.arg for m in program.backward if m.op == "release")
        fetched = [m.arg for m in program.forward if m.op == "fetch"]
        order = [b for b in dict.fromkeys(fetched) if b in pids]
        order += [b for b in pids if b not in set(order)]
        return cls(
            {b: tuple(p) for b, p in pids.items()},
            released,
            tuple(order),
            _most_open(program, pids, released, store),
        )


def _most_open(
    program: Program, pids: Mapping[int, list[int]], released: frozenset[int], store: BucketStore
) -> int:
    """At most how many CPU-updated buckets are between their first gradient and their update."""
    left = {b: len(p) + (b in released) for b, p in pids.items()}
    begun: set[int] = set()
    most = 0
    for move in program.backward:
        if move.op == "grad":
            bucket = store.bucket_of(move.arg)
        elif move.op == "release" and move.arg in left:
            bucket = move.arg
        else:
            continue
        if not store.homes[bucket].updated_by_cpu:
            continue
        left[bucket] -= 1
        if move.op == "grad":
            begun.add(bucket)
        most = max(most, len(begun))
        if left[bucket] == 0:
            begun.discard(bucket)
    return most


@dataclass(slots=True, eq=False)
class GradBuffer:
    """Pinned host memory for one bucket's gradients, in the bucket's layout."""

    memory: HostBytes
    busy: Arrival | None = None  # an upload that still reads it; the next copy out must follow it


class GradBuffers:
    """Host buffers for gradients, allocated once.

    Args:
        homes: the buckets that the CPU updates.
        ring: how many buffers go round among them, each as large as the largest bucket; None gives
            every bucket one of its own.
    """

    def __init__(self, pools: Pools, homes: Sequence[BucketHome], ring: int | None) -> None:
        self._pools = pools
        self._owned: list[HostBytes] = []
        self._own: dict[int, GradBuffer] = {}
        self._ring: deque[GradBuffer] = deque()
        if homes and ring is None:
            for home in homes:
                name = f"the gradient buffer of {home.bucket.name}"
                self._own[home.bucket.index] = self._make(home.bucket.weight_bytes, name)
        elif homes and ring is not None:
            largest = max(home.bucket.weight_bytes for home in homes)
            for number in range(ring):
                self._ring.append(self._make(largest, f"gradient buffer {number}"))
        self.num_ring = len(self._ring)

    def _make(self, nbytes: int, name: str) -> GradBuffer:
        memory = self._pools.host_bytes(nbytes, name, pinned=True)
        self._owned.append(memory)
        return GradBuffer(memory)

    @property
    def nbytes(self) -> int:
        """Bytes of all buffers together."""
        return sum(memory.nbytes for memory in self._owned)

    def take(self, bucket: int) -> GradBuffer | None:
        """The bucket's own buffer, or the next of the ring; None where all are in use."""
        if self._own:
            return self._own[bucket]
        return self._ring.popleft() if self._ring else None

    def give(self, buffer: GradBuffer) -> None:
        """Back to the ring; a bucket's own stays its own."""
        if not self._own:
            self._ring.append(buffer)

    def close(self) -> None:
        self._own.clear()
        self._ring.clear()
        for memory in self._owned:
            self._pools.free_host(memory)
        self._owned.clear()


class GradWindow:
    """GPU gradients whose copies to the host are under way, oldest first."""

    def __init__(self, pools: Pools, device: Device, limit_bytes: int) -> None:
        self._pools = pools
        self._device = device
        self._limit_bytes = limit_bytes
        self._held: deque[tuple[torch.Tensor, Arrival]] = deque()
        self._bytes = 0

    def push(self, grad: torch.Tensor, arrival: Arrival) -> None:
        """Keep `grad`; if the window is over its limit, drop the oldest in compute-stream order."""
        nbytes = grad.numel() * grad.element_size()
        self._pools.gpu.hold(nbytes)
        self._held.append((grad, arrival))
        self._bytes += nbytes
        while self._held and self._bytes > self._limit_bytes:
            self._drop()

    def clear(self) -> None:
        while self._held:
            self._drop()

    def _drop(self) -> None:
        grad, arrival = self._held.popleft()
        self._device.wait(arrival)
        nbytes = grad.numel() * grad.element_size()
        self._bytes -= nbytes
        self._pools.gpu.give(nbytes)
