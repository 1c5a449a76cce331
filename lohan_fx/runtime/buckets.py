"""Where each bucket's weights and optimizer state are at rest, and blocking access to their values.

Nothing here is asynchronous: it fills, reads and migrates buckets while no move is under way. During
a step the rest of the runtime only asks where the bytes are.

Shapes: P = elements of one bucket, padding included; N = elements of one parameter.

[Note: accumulation]
Where gradients are accumulated, every trainable bucket has an fp32 sum of P elements: on the GPU if its
state is there, else in DRAM. `accumulated` holds the parameters whose part of it counts, with the sum's
L2 norm and largest magnitude where they have been measured. Both go along when the bucket moves.

[Note: second copies]
Where updates are made before step() has decided (speculation.py), they go into a second copy of weights
and state, and swap() makes that the bucket's values. The old values then are the second copy. An update
writes every element but padding, which is zero in both.
"""

from __future__ import annotations

import contextlib
import math
from collections import deque
from collections.abc import Callable, Iterable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from lohan_fx.errors import LohanError, PlanMismatch, TransferError
from lohan_fx.piecewise import Piecewise, Value, in_memory, scratch
from lohan_fx.program import Bucket, BucketPlacement, ParamSpec, Tier

from .memory import PAGE, DeviceBytes, HostBytes, Pools, pages, slices

SECTIONS = ("weight", "master", "exp_avg", "exp_avg_sq")

# Elements in host memory at a time while values are set.
PIECE_NUMEL = 4 << 20


class Resting(Protocol):
    """One allocation of a bucket in one tier; offsets and sizes are bytes."""

    tier: Tier

    def read(self, offset: int, out: torch.Tensor) -> None:
        """Fill `out`, a 1-D uint8 CPU tensor, from `offset` on."""
        ...

    def write(self, offset: int, data: torch.Tensor) -> None:
        """Store `data`, a 1-D uint8 tensor, from `offset` on."""
        ...

    def zero(self, offset: int, nbytes: int) -> None: ...
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

    def zero(self, offset: int, nbytes: int) -> None:
        self.memory.bytes[offset : offset + nbytes].zero_()

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

    def zero(self, offset: int, nbytes: int) -> None:
        self.memory.bytes[offset : offset + nbytes].zero_()

    def free(self) -> None:
        self._pools.free_host(self.memory)


class OnSsd:
    """Bytes in one extent, with several transfers in flight through the pools' bounce.

    Unaligned pieces are read, changed and written back by whole pages.
    """

    tier = Tier.SSD

    def __init__(self, pools: Pools, nbytes: int, what: str) -> None:
        self._pools = pools
        self._what = what
        self._nbytes = pages(nbytes)
        self.extent = pools.extent(nbytes, what)

    def read(self, offset: int, out: torch.Tensor, through: HostBytes | None = None) -> None:
        """See Resting; `through` is memory of whole pages to use in place of the pools' bounce,
        which belongs to the thread that runs steps."""

        def take(run: _Run, bounce: HostBytes) -> None:
            found = bounce.bytes[run.start : run.start + run.wanted]
            out[run.done : run.done + run.wanted].copy_(found)

        self._stream(False, offset, out.numel(), after=take, through=through)

    def write(self, offset: int, data: torch.Tensor) -> None:
        def put(run: _Run, bounce: HostBytes) -> None:
            edges = set()
            if run.start:
                edges.add(0)
            if run.start + run.wanted < run.nbytes:
                edges.add(run.nbytes - PAGE)
            for page in edges:
                self._wait(self._begin(False, run.base + page, bounce.address + page, PAGE))
            source = data[run.done : run.done + run.wanted]
            bounce.bytes[run.start : run.start + run.wanted].copy_(source)

        self._stream(True, offset, data.numel(), before=put)

    def zero(self, offset: int, nbytes: int) -> None:
        clean: set[int] = set()

        def put(run: _Run, bounce: HostBytes) -> None:
            if bounce.address not in clean:
                bounce.bytes.zero_()
                clean.add(bounce.address)

        assert offset % PAGE == 0
        self._stream(True, offset, min(pages(nbytes), self._nbytes - offset), before=put)

    def free(self) -> None:
        self._pools.free_extent(self.extent)

    def _begin(self, write: bool, offset: int, address: int, nbytes: int) -> int:
        engine = self._pools.engine
        assert engine is not None
        move = engine.write if write else engine.read
        return move(self.extent, offset, address, nbytes, self._what)

    def _wait(self, ticket: int) -> None:
        engine, waits = self._pools.engine, self._pools.waits
        assert engine is not None
        engine.wait(ticket, waits.deadline_s)

    def _stream(
        self,
        write: bool,
        offset: int,
        nbytes: int,
        before: Callable[[_Run, HostBytes], None] | None = None,
        after: Callable[[_Run, HostBytes], None] | None = None,
        through: HostBytes | None = None,
    ) -> None:
        """Transfer a byte range run by run, calling `before` and `after` each transfer."""
        parts = slices(through, 4) if through is not None else self._pools.bounce(nbytes)
        flight: deque[tuple[int, _Run, HostBytes]] = deque()

        def land() -> None:
            ticket, run, bounce = flight[0]
            self._wait(ticket)
            flight.popleft()
            if after is not None:
                after(run, bounce)

        try:
            with self._pools.waits.counted("placing"):
                for index, run in enumerate(_runs(offset, nbytes, parts[0].nbytes)):
                    if len(flight) == len(parts):
                        land()
                    bounce = parts[index % len(parts)]
                    if before is not None:
                        before(run, bounce)
                    ticket = self._begin(write, run.base, bounce.address, run.nbytes)
                    flight.append((ticket, run, bounce))
                while flight:
                    land()
        except BaseException:
            self._let_land(flight, through is None)
            raise

    def _let_land(self, flight: Iterable[tuple[int, _Run, HostBytes]], shared: bool) -> None:
        """After a failure: what is still in flight must not touch memory that is used again."""
        engine = self._pools.engine
        assert engine is not None
        for ticket, _, _ in flight:
            if not engine.done(ticket):
                with contextlib.suppress(TransferError):
                    self._wait(ticket)
            if not engine.done(ticket) and shared:
                self._pools.forget_bounce()


@dataclass(frozen=True, slots=True)
class _Run:
    """Pages that one transfer moves: `wanted` bytes from `start` on are those asked for, of which
    `done` came in earlier runs."""

    base: int
    nbytes: int
    start: int
    wanted: int
    done: int


def _runs(offset: int, nbytes: int, room: int) -> Iterable[_Run]:
    """Cut a byte range into runs of at most `room` bytes."""
    at, end = offset, offset + nbytes
    while at < end:
        base = at // PAGE * PAGE
        stop = min(end, base + room)
        yield _Run(base, pages(stop - base), at - base, stop - at, at - offset)
        at = stop


@dataclass(frozen=True, slots=True)
class Place:
    """Where one section starts: an allocation and a byte offset in it."""

    home: Resting
    offset: int


@dataclass(slots=True)
class Spare:
    """A second copy of a bucket's weights and state in DRAM; see [Note: second copies]."""

    weight: InDram
    state: InDram

    def free(self) -> None:
        self.weight.free()
        self.state.free()


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
        self.spare: Spare | None = None
        # Sums of gradients over several backwards, fp32, next to the state: see [Note: accumulation].
        self.accum: Resting | None = None
        self.accumulated: dict[int, tuple[float, float] | None] = {}
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

    def _allocate_accum(self, state: Tier) -> Resting:
        what = f"the gradient accumulator of {self.bucket.name}"
        nbytes = 4 * self.bucket.numel
        if state is Tier.GPU:
            return OnGpu(self._pools, nbytes, what)
        return InDram(self._pools, nbytes, what, pinned=False)

    def accumulate(self, on: bool) -> None:
        """Have an accumulator, or not; what it holds is kept."""
        if self.state is None or on == (self.accum is not None):
            return
        if self.accum is not None:
            self.accum.free()
            self.accumulated.clear()
        self.accum = self._allocate_accum(self.state.tier) if on else None

    @property
    def may_speculate(self) -> bool:
        """True where the CPU updates from and to memory alone."""
        return self.state_tier is Tier.DRAM and self.weight_tier is not Tier.SSD

    def keep_spare(self, on: bool) -> None:
        """Have a second copy, or not; its values mean nothing."""
        if self.spare is not None and not on:
            self.spare.free()
            self.spare = None
        elif self.spare is None and on and self.may_speculate:
            weight = self._allocate_weight(Tier.DRAM)
            try:
                state = self._allocate_state(Tier.DRAM)
            except BaseException:
                weight.free()
                raise
            assert isinstance(weight, InDram) and isinstance(state, InDram)
            self.spare = Spare(weight, state)

    def swap(self) -> None:
        """Let the second copy be the bucket's values; weights on the GPU are to be uploaded from it."""
        spare = self.spare
        assert spare is not None and isinstance(self.state, InDram)
        self.state, spare.state = spare.state, self.state
        if isinstance(self.weight, InDram):
            self.weight, spare.weight = spare.weight, self.weight

    def addresses_in(self, spare: Spare) -> dict[str, int]:
        """Where a second copy has master and moments."""
        size, base = state_section_bytes(self.bucket), spare.state.memory.address
        found = {name: base + size * number for number, name in enumerate(self._state_sections)}
        return {"master": spare.weight.memory.address, **found}

    def sums(self) -> torch.Tensor:
        """The accumulator, of shape (P,), in device or host memory."""
        assert isinstance(self.accum, OnGpu | InDram)
        return self.accum.memory.bytes[: 4 * self.bucket.numel].view(torch.float32)

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

    def read_piece(
        self,
        spec: ParamSpec,
        section: str,
        start: int,
        out_N: torch.Tensor,
        through: HostBytes | None = None,
    ) -> None:
        """Fill `out_N`, of the section's dtype, from the stored element `start` of a parameter on.

        `through` is for threads other than that of the steps; see OnSsd.read.
        """
        place, dtype = self.place(section), self.section_dtype(section)
        assert out_N.dtype == dtype
        offset, out = place.offset + (spec.offset + start) * dtype.itemsize, out_N.view(torch.uint8)
        if through is not None and isinstance(place.home, OnSsd):
            place.home.read(offset, out, through)
        else:
            place.home.read(offset, out)

    def store(self, spec: ParamSpec, sections: Sequence[str], value: Value) -> None:
        """Set one parameter's values of `sections`, piece by piece.

        Each section rounds from the one before it, the first one from the value.
        """
        piece = stored_pieces(spec, value, self.section_dtype(sections[0]))
        for start in range(0, spec.numel, PIECE_NUMEL):
            data_N = piece(start, min(start + PIECE_NUMEL, spec.numel)).to("cpu")
            for section in sections:
                place, dtype = self.place(section), self.section_dtype(section)
                data_N = _cast(data_N, dtype)
                at = place.offset + (spec.offset + start) * dtype.itemsize
                place.home.write(at, data_N.view(torch.uint8))

    def fill(self, values: Mapping[int, Value], moments: Mapping[int, tuple[Value, Value]]) -> None:
        """Set every parameter. Moments that are not given become zero, as does padding.

        Each byte is written once.
        """
        specs = self.bucket.params
        if self.bucket.has_master:
            self._fill(("master", "weight"), {s.pid: values[s.pid] for s in specs})
        else:
            self._fill(("weight",), {s.pid: values[s.pid] for s in specs})
        if self.state is None:
            return
        for index, section in enumerate(("exp_avg", "exp_avg_sq")):
            given = {s.pid: moments[s.pid][index] for s in specs if s.pid in moments}
            place = self.place(section)
            if given:
                self._fill((section,), given)
            elif not isinstance(place.home, InDram):  # whose pages are zero from the start
                place.home.zero(place.offset, self.bucket.numel * 4)

    def _fill(self, sections: Sequence[str], values: Mapping[int, Value]) -> None:
        """Set whole sections, zero where there is no value; as for store().

        What rests in DRAM is converted right into place.
        """
        numel, dtype = self.bucket.numel, self.section_dtype(sections[0])
        pieces = [
            (spec, stored_pieces(spec, values[spec.pid], dtype))
            for spec in self.bucket.params
            if spec.pid in values
        ]
        inside_P = self._in_dram(sections[0])
        size = min(numel, PIECE_NUMEL)
        if all(self._in_dram(section) is not None for section in sections) and all(
            isinstance(value, torch.Tensor) and value.device.type == "cpu"
            for value in values.values()
        ):
            size = numel  # there is nothing to hold a piece in
        image_P = scratch(size, dtype) if inside_P is None else inside_P
        for start in range(0, numel, max(size, 1)):
            stop = min(start + size, numel)
            part_P = image_P[: stop - start].zero_() if inside_P is None else inside_P[start:stop]
            for spec, piece in pieces:
                first, last = max(spec.offset, start), min(spec.offset + spec.numel, stop)
                if first < last:
                    found_N = piece(first - spec.offset, last - spec.offset)
                    part_P[first - start : last - start].copy_(found_N)
            for index, section in enumerate(sections):
                place, dtype = self.place(section), self.section_dtype(section)
                target_P = self._in_dram(section)
                if target_P is None:
                    data = _cast(part_P, dtype).view(torch.uint8)
                    place.home.write(place.offset + start * dtype.itemsize, data)
                elif index:
                    target_P[start:stop].copy_(part_P)

    def _in_dram(self, section: str) -> torch.Tensor | None:
        """A section as a typed tensor of shape (P,) where it is in DRAM."""
        place, dtype = self.place(section), self.section_dtype(section)
        if not isinstance(place.home, InDram):
            return None
        nbytes = self.bucket.numel * dtype.itemsize
        return place.home.memory.bytes[place.offset : place.offset + nbytes].view(dtype)

    def zero_moments(self) -> None:
        for section in ("exp_avg", "exp_avg_sq"):
            place = self.place(section)
            place.home.zero(place.offset, self.bucket.numel * 4)

    def set_value(self, spec: ParamSpec, value: Value) -> None:
        """Set a parameter's master and, rounded from that, its weight."""
        self.store(spec, ("master", "weight") if self.bucket.has_master else ("weight",), value)

    def free(self) -> None:
        self.weight.free()
        for part in (self.state, self.accum, self.spare):
            if part is not None:
                part.free()

    def move(self, placement: BucketPlacement) -> None:
        """Go to other tiers, weights first; on failure each part is whole, in its old or new tier.

        Raises:
            LohanError: no room; nothing was moved, or the weights only.
        """
        check_placement(self.bucket, placement)
        self.keep_spare(False)
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
        if self.accum is not None and self.state is not None:
            self._move_accum(self.state.tier)

    def _move_accum(self, state: Tier) -> None:
        assert self.accum is not None
        if (self.accum.tier is Tier.GPU) != (state is Tier.GPU):
            moved = self._allocate_accum(state)
            self._copy(self.accum, moved, 4 * self.bucket.numel)
            self.accum, old = moved, self.accum
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
        self._sources: dict[int, Piecewise] = {}  # while adopting: what was placed from a file

    def adopt(
        self,
        buckets: Sequence[Bucket],
        values: MutableMapping[int, Value],
        placements: Sequence[BucketPlacement],
        moments: Mapping[int, tuple[Value, Value]],
        progress: Callable[[int], None],
    ) -> None:
        """Place every bucket and fill it, one at a time, emptying `values` on the way.

        `progress` is told the bytes of each bucket placed. On failure the values are back in
        `values`, masters as fp32, and nothing is held.
        """
        try:
            self._adopt(buckets, values, placements, moments, progress)
        except BaseException:
            self.give_back(values)
            raise

    def _adopt(
        self,
        buckets: Sequence[Bucket],
        values: MutableMapping[int, Value],
        placements: Sequence[BucketPlacement],
        moments: Mapping[int, tuple[Value, Value]],
        progress: Callable[[int], None],
    ) -> None:
        for bucket, placement in zip(buckets, placements, strict=True):
            for spec in bucket.params:
                _check_dense(spec)
                self._where[spec.pid] = (bucket.index, spec)
            home = BucketHome(self._pools, bucket, placement)
            self.homes[bucket.index] = home
            home.fill(values, moments)
            for spec in bucket.params:
                value = values.pop(spec.pid)
                if not isinstance(value, torch.Tensor):
                    self._sources[spec.pid] = value
            progress(bucket.weight_bytes + bucket.state_bytes)
        self._sources.clear()
        self._pools.drop_bounce()

    def give_back(self, values: MutableMapping[int, Value]) -> None:
        """Undo adopt()."""
        while self.homes:
            _, home = self.homes.popitem()
            section = "master" if home.bucket.trainable else "weight"
            for spec in home.bucket.params:
                if spec.pid in self._sources:
                    values[spec.pid] = self._sources.pop(spec.pid)
                elif spec.pid not in values:
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
        for index in left:
            self.homes[index].keep_spare(False)
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

    def accumulate(self, on: bool) -> None:
        """Give every trainable bucket an fp32 sum for its gradients, or none.

        Raises:
            LohanError: a budget is exceeded; says by which bucket's.
        """
        for home in self.homes.values():
            home.accumulate(on)

    def keep_spares(self, on: bool) -> None:
        """Give every bucket that may speculate a second copy, or none to any.

        Raises:
            LohanError: a budget is exceeded; says by which bucket's.
        """
        for home in self.homes.values():
            home.keep_spare(on)

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


def stored_pieces(
    spec: ParamSpec, value: Value, dtype: torch.dtype
) -> Callable[[int, int], torch.Tensor]:
    """A function that gives elements [start, stop) of `value` in the order a bucket stores them.

    Pieces may still have the value's own dtype and device. A value in memory passes through `dtype`
    as a whole only where its layout differs from the bucket's.
    """
    if not isinstance(value, torch.Tensor):
        row_major = torch.empty(spec.shape, device="meta").stride()
        if same_layout(spec.shape, spec.stride, value.shape, row_major):
            return value.piece
        value = in_memory(value)
    value = value.detach()
    if same_layout(spec.shape, spec.stride, value.shape, value.stride()):
        flat_N = value.as_strided((spec.numel,), (1,), value.storage_offset())
    else:
        flat_N = dense(spec, value, dtype)
    return lambda start, stop: flat_N[start:stop]


def _cast(data_N: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """As .to(dtype), in memory that goes back at once."""
    if data_N.dtype == dtype:
        return data_N
    return scratch(data_N.numel(), dtype).copy_(data_N)


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
