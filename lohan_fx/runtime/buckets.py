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

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from lohan_fx.errors import LohanError, PlanMismatch
from lohan_fx.piecewise import Value, scratch
from lohan_fx.program import Bucket, BucketPlacement, ParamSpec, Tier

from .layout import cast, param_views, stored_pieces
from .memory import HostBytes, Pools, pages
from .resting import InDram, OnGpu, OnSsd, Resting

SECTIONS = ("weight", "master", "exp_avg", "exp_avg_sq")

# Elements in host memory at a time while values are set.
PIECE_NUMEL = 4 << 20


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
        self.streamed = placement.streamed  # see [Note: streamed states]
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
        return self.state is not None and self.state.tier is not Tier.GPU and not self.streamed

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
        in_memory = self.state_tier is Tier.DRAM and self.weight_tier is not Tier.SSD
        return in_memory and not self.streamed

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
            return InDram(self._pools, nbytes, what, pinned=self.streamed)
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
                data_N = cast(data_N, dtype)
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
        inside_P = self.host_section(sections[0])
        size = min(numel, PIECE_NUMEL)
        if all(self.host_section(section) is not None for section in sections) and all(
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
                target_P = self.host_section(section)
                if target_P is None:
                    data = cast(part_P, dtype).view(torch.uint8)
                    place.home.write(place.offset + start * dtype.itemsize, data)
                elif index:
                    target_P[start:stop].copy_(part_P)

    def host_section(self, section: str) -> torch.Tensor | None:
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
        assert self.spare is None, "a second copy does not move"
        if not placement.streamed:
            self._stream(False)
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
        if placement.streamed:
            self._stream(True)
        if self.accum is not None and self.state is not None:
            self._move_accum(self.state.tier)

    def _stream(self, on: bool) -> None:
        if isinstance(self.state, InDram):
            self._pools.pin(self.state.memory, on)
        self.streamed = on

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


def state_section_bytes(bucket: Bucket) -> int:
    """Bytes from one fp32 array of the state to the next: whole pages."""
    return pages(bucket.numel * 4)


def check_placement(bucket: Bucket, placement: BucketPlacement) -> None:
    """Raise PlanMismatch for tiers that no update rule covers."""
    weight, state = placement.weight, placement.state
    if placement.streamed and (
        not bucket.has_master or state is not Tier.DRAM or weight is Tier.SSD
    ):
        raise PlanMismatch(
            f"{bucket.name}: only a state in DRAM, with masters apart from weights on the GPU or in DRAM, "
            f"passes through the GPU, not one in {state} with weights in {weight}"
        )
    if not bucket.trainable:
        return
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
