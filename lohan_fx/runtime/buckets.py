"""Where each bucket's weights and optimizer state are at rest, and blocking access to their values.

Nothing here is asynchronous: it fills, reads and migrates buckets while no move is under way. During
a step the rest of the runtime only asks where the bytes are.

Shapes: P = elements of one bucket, padding included; N = elements of one parameter.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from lohan_fx.errors import LohanError, PlanMismatch
from lohan_fx.program import Bucket, BucketPlacement, ParamSpec, Tier

from .memory import PAGE, DeviceBytes, HostBytes, Pools, pages

SECTIONS = ("weight", "master", "exp_avg", "exp_avg_sq")


class Resting(Protocol):
    """One allocation of a bucket in one tier; offsets and sizes are bytes."""

    tier: Tier

    def read(self, offset: int, out: torch.Tensor) -> None:
        """Fill `out`, a 1-D uint8 CPU tensor, from `offset` on."""
        ...

    def write(self, offset: int, data: torch.Tensor) -> None:
        """Store `data`, a 1-D uint8 tensor, from `offset` on."""
        ...

    def zero(self) -> None: ...
    def free(self) -> None: ...


class OnGpu:
    """Bytes in device memory."""

    tier = Tier.GPU

    def __init__(self, pools: Pools, nbytes: int, what: str) -> None:
        self._pools = pools
        # A tensor made in inference mode could never be updated outside of it.
        with torch.inference_mode(False):
            self.memory: DeviceBytes = pools.device_bytes(nbytes, what)

    def read(self, offset: int, out: torch.Tensor) -> None:
        out.copy_(self.memory.bytes[offset : offset + out.numel()])

    def write(self, offset: int, data: torch.Tensor) -> None:
        self.memory.bytes[offset : offset + data.numel()].copy_(data)

    def zero(self) -> None:
        self.memory.bytes.zero_()

    def free(self) -> None:
        self._pools.free_device(self.memory)


class InDram:
    """Bytes in host memory; pinned where a device copy touches them."""

    tier = Tier.DRAM

    def __init__(self, pools: Pools, nbytes: int, what: str, *, pinned: bool) -> None:
        self._pools = pools
        self.memory: HostBytes = pools.host_bytes(nbytes, what, pinned=pinned)

    def read(self, offset: int, out: torch.Tensor) -> None:
        out.copy_(self.memory.bytes[offset : offset + out.numel()])

    def write(self, offset: int, data: torch.Tensor) -> None:
        self.memory.bytes[offset : offset + data.numel()].copy_(data)

    def zero(self) -> None:
        self.memory.bytes.zero_()

    def free(self) -> None:
        self._pools.free_host(self.memory)


class OnSsd:
    """Bytes in one extent. Unaligned pieces are read, changed and written back by whole pages."""

    tier = Tier.SSD

    def __init__(self, pools: Pools, nbytes: int, what: str) -> None:
        self._pools = pools
        self._what = what
        self._nbytes = pages(nbytes)
        self.extent = pools.extent(nbytes, what)

    def _transfer(self, write: bool, offset: int, address: int, nbytes: int) -> None:
        engine, waits = self._pools.engine, self._pools.waits
        assert engine is not None
        move = engine.write if write else engine.read
        with waits.counted("placing"):
            engine.wait(move(self.extent, offset, address, nbytes, self._what), waits.deadline_s)

    def _chunks(self, offset: int, nbytes: int) -> Iterable[tuple[int, int, int, int]]:
        """Cut a byte range into bounce-sized runs of pages.

        Yields (first page's offset, bytes of pages, start within them, bytes wanted).
        """
        room = self._pools.bounce().nbytes
        at, end = offset, offset + nbytes
        while at < end:
            base = at // PAGE * PAGE
            stop = min(end, base + room)
            yield base, pages(stop - base), at - base, stop - at
            at = stop

    def read(self, offset: int, out: torch.Tensor) -> None:
        bounce = self._pools.bounce()
        done = 0
        for base, size, start, wanted in self._chunks(offset, out.numel()):
            self._transfer(False, base, bounce.address, size)
            out[done : done + wanted].copy_(bounce.bytes[start : start + wanted])
            done += wanted

    def write(self, offset: int, data: torch.Tensor) -> None:
        bounce = self._pools.bounce()
        done = 0
        for base, size, start, wanted in self._chunks(offset, data.numel()):
            edges = set()
            if start:
                edges.add(0)
            if start + wanted < size:
                edges.add(size - PAGE)
            for page in edges:
                self._transfer(False, base + page, bounce.address + page, PAGE)
            bounce.bytes[start : start + wanted].copy_(data[done : done + wanted])
            self._transfer(True, base, bounce.address, size)
            done += wanted

    def zero(self) -> None:
        bounce = self._pools.bounce()
        bounce.bytes.zero_()
        for base, size, _, _ in self._chunks(0, self._nbytes):
            self._transfer(True, base, bounce.address, size)

    def free(self) -> None:
        self._pools.free_extent(self.extent)


@dataclass(frozen=True, slots=True)
class Place:
    """Where one section starts: an allocation and a byte offset in it."""

    home: Resting
    offset: int


class BucketHome:
    """One bucket at rest: its weights in one tier, its state in another."""

    def __init__(self, pools: Pools, bucket: Bucket, placement: BucketPlacement) -> None:
        check_placement(bucket, placement)
        self._pools = pools
        self.bucket = bucket
        self.dtype: torch.dtype = getattr(torch, bucket.dtype)
        self.weight: Resting = self._allocate_weight(placement.weight)
        try:
            self.state: Resting | None = (
                self._allocate_state(placement.state) if bucket.trainable else None
            )
        except BaseException:
            self.weight.free()
            raise
        self._state_sections = SECTIONS[1:] if bucket.has_master else SECTIONS[2:]
        self._views: list[torch.Tensor] | None = None

    @property
    def weight_tier(self) -> Tier:
        return self.weight.tier

    @property
    def state_tier(self) -> Tier | None:
        """None for a frozen bucket."""
        return None if self.state is None else self.state.tier

    @property
    def updated_by_cpu(self) -> bool:
        return self.state is not None and self.state.tier is not Tier.GPU

    def _allocate_weight(self, tier: Tier) -> Resting:
        what = f"the weights of {self.bucket.name}"
        nbytes = self.bucket.weight_bytes
        if tier is Tier.GPU:
            return OnGpu(self._pools, nbytes, what)
        if tier is Tier.DRAM:
            return InDram(self._pools, nbytes, what, pinned=True)
        return OnSsd(self._pools, nbytes, what)

    def _allocate_state(self, tier: Tier) -> Resting:
        what = f"the optimizer state of {self.bucket.name}"
        nbytes = state_section_bytes(self.bucket) * (3 if self.bucket.has_master else 2)
        if tier is Tier.GPU:
            return OnGpu(self._pools, nbytes, what)
        if tier is Tier.DRAM:
            return InDram(self._pools, nbytes, what, pinned=False)
        return OnSsd(self._pools, nbytes, what)

    def place(self, section: str) -> Place:
        """Where a section is; the master of an fp32 bucket is its weight."""
        if section == "weight" or (section == "master" and not self.bucket.has_master):
            return Place(self.weight, 0)
        if self.state is None:
            raise LohanError(f"{self.bucket.name} is frozen: it has no optimizer state")
        index = self._state_sections.index(section)
        return Place(self.state, index * state_section_bytes(self.bucket))

    def section_dtype(self, section: str) -> torch.dtype:
        return self.dtype if section == "weight" else torch.float32

    def device_section(self, section: str) -> torch.Tensor:
        """A section that is in device memory, as a typed tensor of shape (P,)."""
        place = self.place(section)
        assert isinstance(place.home, OnGpu)
        dtype = self.section_dtype(section)
        nbytes = self.bucket.numel * dtype.itemsize
        return place.home.memory.bytes[place.offset : place.offset + nbytes].view(dtype)

    def views(self) -> list[torch.Tensor]:
        """The parameters of a GPU-resident bucket; made once."""
        assert isinstance(self.weight, OnGpu)
        if self._views is None:
            self._views = param_views(self.bucket, self.dtype, self.weight.memory.bytes)
        return list(self._views)

    def load(self, spec: ParamSpec, section: str) -> torch.Tensor:
        """One parameter's values of a section, as a CPU tensor of its shape and stride."""
        place, dtype = self.place(section), self.section_dtype(section)
        flat_N = torch.empty(spec.numel, dtype=dtype)
        place.home.read(place.offset + spec.offset * dtype.itemsize, flat_N.view(torch.uint8))
        return flat_N.as_strided(spec.shape, spec.stride)

    def store(self, spec: ParamSpec, section: str, value: torch.Tensor) -> None:
        """Set one parameter's values of a section, rounding to its dtype."""
        place, dtype = self.place(section), self.section_dtype(section)
        flat_N = dense(spec, value.detach(), dtype)
        place.home.write(place.offset + spec.offset * dtype.itemsize, flat_N.view(torch.uint8))

    def fill(self, values: MutableMapping[int, torch.Tensor]) -> None:
        """Take each parameter's value out of `values`; moments start at zero."""
        self.weight.zero()
        if self.state is not None:
            self.state.zero()
        for spec in self.bucket.params:
            self.set_value(spec, values[spec.pid])
            del values[spec.pid]

    def set_value(self, spec: ParamSpec, value: torch.Tensor) -> None:
        """Set a parameter's master and, rounded from that, its weight."""
        if self.bucket.has_master:
            self.store(spec, "master", value)
            value = value.detach().to(torch.float32)
        self.store(spec, "weight", value)

    def free(self) -> None:
        self.weight.free()
        if self.state is not None:
            self.state.free()

    def move(self, placement: BucketPlacement) -> None:
        """Go to other tiers, weights first; on failure each part is whole, in its old or new tier.

        Raises:
            LohanError: no room; nothing was moved, or the weights only.
        """
        check_placement(self.bucket, placement)
        if placement.weight is not self.weight.tier:
            moved = self._allocate_weight(placement.weight)
            self._copy(self.weight, moved, self.bucket.weight_bytes)
            self.weight, old = moved, self.weight
            self._views = None
            old.free()
        if self.state is not None and placement.state is not self.state.tier:
            moved = self._allocate_state(placement.state)
            nbytes = state_section_bytes(self.bucket) * len(self._state_sections)
            self._copy(self.state, moved, nbytes)
            self.state, old = moved, self.state
            old.free()

    def _copy(self, source: Resting, to: Resting, nbytes: int) -> None:
        if isinstance(to, InDram):
            source.read(0, to.memory.bytes[:nbytes])
        elif isinstance(source, InDram):
            to.write(0, source.memory.bytes[:nbytes])
        else:
            step = 8 << 20
            chunk = torch.empty(min(step, nbytes), dtype=torch.uint8)
            for at in range(0, nbytes, step):
                part = chunk[: min(step, nbytes - at)]
                source.read(at, part)
                to.write(at, part)


class BucketStore:
    """All buckets of one model, by index, and their parameters by pid."""

    def __init__(self, pools: Pools) -> None:
        self._pools = pools
        self.homes: dict[int, BucketHome] = {}
        self._where: dict[int, tuple[int, ParamSpec]] = {}

    def adopt(
        self,
        buckets: Sequence[Bucket],
        values: MutableMapping[int, torch.Tensor],
        placements: Sequence[BucketPlacement],
    ) -> None:
        """Place every bucket and fill it, one at a time, emptying `values` on the way.

        On failure the values are back in `values`, masters as fp32, and nothing is held.
        """
        try:
            self._adopt(buckets, values, placements)
        except BaseException:
            self.give_back(values)
            raise

    def _adopt(
        self,
        buckets: Sequence[Bucket],
        values: MutableMapping[int, torch.Tensor],
        placements: Sequence[BucketPlacement],
    ) -> None:
        for bucket, placement in zip(buckets, placements, strict=True):
            for spec in bucket.params:
                _check_dense(spec)
                self._where[spec.pid] = (bucket.index, spec)
            home = BucketHome(self._pools, bucket, placement)
            self.homes[bucket.index] = home
            home.fill(values)
        self._pools.drop_bounce()

    def give_back(self, values: MutableMapping[int, torch.Tensor]) -> None:
        """Undo adopt()."""
        while self.homes:
            _, home = self.homes.popitem()
            section = "master" if home.bucket.trainable else "weight"
            for spec in home.bucket.params:
                if spec.pid not in values:
                    values[spec.pid] = home.load(spec, section)
            home.free()
        self._where.clear()
        self._pools.drop_bounce()

    def migrate(self, placements: Mapping[int, BucketPlacement]) -> None:
        """Move buckets to new tiers, one at a time, in an order that finds room.

        Raises:
            LohanError: what is left cannot move within the budgets; every bucket is whole.
        """
        left = [
            index
            for index, placement in placements.items()
            if self._tiers(index) != (placement.weight, placement.state)
        ]
        depth = {Tier.SSD: 0, Tier.DRAM: 1, Tier.GPU: 2}
        left.sort(key=lambda i: depth[placements[i].weight] + depth[placements[i].state])
        while left:
            stuck, refusal = [], None
            for index in left:
                try:
                    self.homes[index].move(placements[index])
                except LohanError as error:
                    stuck.append(index)
                    refusal = error
            if refusal is not None and len(stuck) == len(left):
                raise refusal
            left = stuck
        self._pools.drop_bounce()

    def _tiers(self, index: int) -> tuple[Tier, Tier | None]:
        home = self.homes[index]
        return home.weight_tier, home.state_tier

    def find(self, pid: int) -> tuple[BucketHome, ParamSpec]:
        """Raises LohanError for a pid that no bucket holds."""
        if pid not in self._where:
            raise LohanError(f"parameter {pid} is in no bucket of this model")
        index, spec = self._where[pid]
        return self.homes[index], spec

    def bucket_of(self, pid: int) -> int:
        return self._where[pid][0]

    def specs(self) -> Iterable[ParamSpec]:
        return (spec for _, spec in self._where.values())


def state_section_bytes(bucket: Bucket) -> int:
    """Bytes from one fp32 array of the state to the next: whole pages."""
    return pages(bucket.numel * 4)


def check_placement(bucket: Bucket, placement: BucketPlacement) -> None:
    """Raise PlanMismatch for tiers that no update rule covers."""
    if not bucket.trainable:
        return
    weight, state = placement.weight, placement.state
    if state is Tier.GPU and weight is not Tier.GPU:
        raise PlanMismatch(
            f"{bucket.name}: a state on the GPU is updated there and needs its weights there, not in "
            f"{weight}"
        )
    if not bucket.has_master and weight is Tier.GPU and state is not Tier.GPU:
        raise PlanMismatch(
            f"{bucket.name}: an fp32 weight is its own master, so with the weight on the GPU the "
            f"state must be there too, not in {state}"
        )


def param_views(bucket: Bucket, dtype: torch.dtype, memory: torch.Tensor) -> list[torch.Tensor]:
    """The parameters in a buffer of `bucket.weight_bytes` bytes, in the bucket's order."""
    typed_P = memory.view(dtype)
    start = typed_P.storage_offset()
    return [typed_P.as_strided(p.shape, p.stride, start + p.offset) for p in bucket.params]


def same_layout(
    shape: Sequence[int], stride: Sequence[int], other_shape: Sequence[int], other: Sequence[int]
) -> bool:
    """True where both put every element at the same place; strides of size-1 dimensions are moot."""
    return tuple(shape) == tuple(other_shape) and all(
        n == 1 or a == b for n, a, b in zip(shape, stride, other, strict=True)
    )


def dense(spec: ParamSpec, value: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The elements of `value` in the order in which the bucket stores them, shape (N,).

    A view where `value` has that layout and dtype already, else a copy on its device.
    """
    if value.dtype == dtype and same_layout(spec.shape, spec.stride, value.shape, value.stride()):
        return value.as_strided((spec.numel,), (1,), value.storage_offset())
    flat_N = torch.empty(spec.numel, dtype=dtype, device=value.device)
    flat_N.as_strided(spec.shape, spec.stride).copy_(value)
    return flat_N


def _check_dense(spec: ParamSpec) -> None:
    span = 1 + sum((n - 1) * s for n, s in zip(spec.shape, spec.stride, strict=True))
    if math.prod(spec.shape) != spec.numel or (spec.numel and span != spec.numel):
        raise LohanError(
            f"{spec.name} has shape {spec.shape} and stride {spec.stride}, which is not dense; make "
            "it contiguous before compiling"
        )


def host_address(home: Resting) -> int:
    """The address of an allocation in DRAM."""
    assert isinstance(home, InDram)
    return home.memory.address
