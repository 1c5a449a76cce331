"""Groups of identical items as a linear program sees them: what one item costs at each place."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from lohan_fx.planner.least import is_redone_in_place
from lohan_fx.planner.ledger import Span, activation_spans, bucket_spans, gradient_spans
from lohan_fx.planner.moves import AnyPlace, Group, group_items, pinned_groups, tiers
from lohan_fx.planner.places import (
    activation_places,
    backward_intervals,
    bucket_places,
    streamed_places,
)
from lohan_fx.planner.problem import (
    GPU_ALIGN,
    PAGE,
    Activation,
    Bucket,
    BucketPlace,
    Place,
    Problem,
    align_up,
)
from lohan_fx.planner.solution import Forced
from lohan_fx.planner.traffic import (
    TRAFFIC_WIDTH,
    Floats,
    Ints,
    accumulator_bytes,
    activation_traffic,
    bucket_traffic,
    lane_seconds,
    spare_bytes,
    state_buffer_bytes,
    state_section_bytes,
    stream_piece,
    weight_section_bytes,
    written_bytes,
)

G, D, S, R = Place.GPU, Place.DRAM, Place.SSD, Place.RECOMPUTE
SORTS = ("fetch", "swap", "grad", "state", "inbound", "outbound", "stream")


@dataclass(frozen=True, slots=True)
class Presence:
    """What items at some places of a group add to the GPU: `size` bytes each, from the second on
    where `zeros` is 1, and so on; `zeros` is by position. See [Note: presence is convex].
    """

    places: tuple[int, ...]
    size: int
    zeros: Ints


@dataclass(frozen=True, slots=True)
class Lot:
    """One group, and one item's share of everything at each of its places, in their order."""

    group: Group
    trainable: bool
    places: tuple[AnyPlace, ...]
    seconds: Floats  # [place, phase, lane], each lane alone
    chain: Floats  # [place, 3]: SSD read, SSD write and Adam seconds of updates through buffers
    dram: tuple[int, ...]
    ssd: tuple[int, ...]
    written: tuple[int, ...]
    buffered: dict[str, tuple[int, ...]]  # by sort: bytes that pass through its buffer
    presence: tuple[Presence, ...]

    @property
    def size(self) -> int:
        return len(self.group.members)


@dataclass(frozen=True, slots=True)
class Stock:
    """All lots of a problem.

    `base` is the bytes on the GPU at each position whatever is decided, `kept` the backward stages
    at which each activation is there (see cost.backward_intervals).
    """

    lots: tuple[Lot, ...]
    base: Ints
    kept: tuple[tuple[int, int], ...]


def stock(problem: Problem, forced: Forced, relaxed: bool, streams: bool) -> Stock:
    """The lots of a problem.

    `relaxed`: every place that the checker accepts, with the least it can cost. Otherwise only what
    a search considers, at no less than it costs when members are made resident in their order.
    `streams`: states may pass through the GPU for their updates.
    """
    kept = _intervals(problem, forced, relaxed)
    num_positions = 2 * problem.num_stages + 1
    base: Ints = np.zeros(num_positions, dtype=np.int64)
    base += problem.fixed_gpu_bytes + problem.gpu_margin_bytes
    for stage in problem.stages:
        base[stage.index] += stage.forward_workspace_bytes
        base[num_positions - 2 - stage.index] += stage.backward_workspace_bytes
    lots = []
    groups: list[tuple[Group, AnyPlace | None]] = [
        *((group, None) for group in group_items(problem, forced, exact=relaxed)),
        *pinned_groups(problem, forced),
    ]
    for group, pinned in groups:
        lot = _lot(problem, group, pinned, kept, relaxed, streams)
        for index in group.members:
            for start, end, size in _used_spans(problem, group, index, kept):
                base[start:end] += size
        lots.append(lot)
    return Stock(tuple(lots), base, tuple(kept))


def _intervals(problem: Problem, forced: Forced, relaxed: bool) -> list[tuple[int, int]]:
    """backward_intervals with all recomputed that may be; in a relaxation, with nothing."""
    redone = [
        R
        if not relaxed
        and (
            forced.activations.get(a.index) is R
            or (a.index not in forced.activations and is_redone_in_place(problem, a))
        )
        else G
        for a in problem.activations
    ]
    return backward_intervals(problem, redone)


def _lot(
    problem: Problem,
    group: Group,
    pinned: AnyPlace | None,
    kept: Sequence[tuple[int, int]],
    relaxed: bool,
    streams: bool,
) -> Lot:
    places: list[AnyPlace]
    if group.is_bucket:
        bucket = problem.buckets[group.typical]
        places = list(bucket_places(bucket))
        places += streamed_places(problem, bucket) if streams else ()
    else:
        activation = problem.activations[group.typical]
        places = list(activation_places(activation))
        if not relaxed and not is_redone_in_place(problem, activation):
            places = [p for p in places if p is not R]
    if not problem.capacities.ssd_bytes:
        places = [p for p in places if S not in tiers(p)]
    if pinned is not None:
        places = [pinned]
    traffic = np.zeros((len(places), TRAFFIC_WIDTH))
    for k, place in enumerate(places):
        if group.is_bucket:
            assert isinstance(place, BucketPlace)
            traffic[k] = bucket_traffic(problem, bucket, place)
        else:
            assert isinstance(place, Place)
            traffic[k] = activation_traffic(activation, place)
    seconds = lane_seconds(problem.lanes, traffic)
    possible = [k for k in range(len(places)) if np.isfinite(seconds[k]).all()]
    places = [places[k] for k in possible]
    traffic, seconds = traffic[possible], seconds[possible]
    lanes = problem.lanes
    rates = (lanes.ssd_read_bytes_per_s, lanes.ssd_write_bytes_per_s, lanes.cpu_adam_params_per_s)
    # A place that needs a lane that is not there is gone by now, so amounts over no rate are 0.
    chain = traffic[:, -3:] / np.array([rate or 1.0 for rate in rates])
    dram, ssd, buffered = [], [], []
    for place in places:
        if group.is_bucket:
            assert isinstance(place, BucketPlace)
            held, passing = _bucket_bytes(problem, bucket, place)
        else:
            assert isinstance(place, Place)
            held, passing = _activation_bytes(activation, place)
        dram.append(held[0])
        ssd.append(held[1])
        buffered.append(passing)
    return Lot(
        group=group,
        trainable=group.is_bucket and bucket.trainable,
        places=tuple(places),
        seconds=seconds,
        chain=chain,
        dram=tuple(dram),
        ssd=tuple(ssd),
        written=tuple(round(written_bytes(row)) for row in traffic),
        buffered={sort: tuple(row.get(sort, 0) for row in buffered) for sort in SORTS},
        presence=_presence(problem, group, places, kept, relaxed),
    )


def _bucket_bytes(
    problem: Problem, bucket: Bucket, place: BucketPlace
) -> tuple[tuple[int, int], dict[str, int]]:
    """((DRAM, SSD) bytes, bytes through buffers by sort) of one bucket; see cost.Ledger."""
    section = weight_section_bytes(bucket)
    dram = section if place.weight is D else 0
    ssd = section if place.weight is S else 0
    passing = {}
    if place.weight is not G and (bucket.forward_stages or bucket.backward_stages):
        passing["fetch"] = align_up(bucket.weight_bytes, GPU_ALIGN)
    if place.weight is S:
        passing["inbound"] = section
    if place.streamed:
        passing["stream"] = stream_piece(bucket)
        dram += state_section_bytes(bucket)
    elif bucket.trainable and place.state is not G:
        gradient = align_up(bucket.grad_bytes, PAGE)
        passing["grad"] = gradient
        passing["state"] = state_buffer_bytes(bucket, place)
        dram += gradient if problem.overlap.waits_for_step else 0
        dram += accumulator_bytes(bucket) if problem.accumulates else 0
        dram += state_section_bytes(bucket) if place.state is D else 0
        dram += spare_bytes(problem, bucket, place)
        ssd += state_section_bytes(bucket) if place.state is S else 0
    return (dram, ssd), passing


def _activation_bytes(
    activation: Activation, place: Place
) -> tuple[tuple[int, int], dict[str, int]]:
    """((DRAM, SSD) bytes, bytes through buffers by sort) of one activation; see cost.Ledger."""
    slot, section = align_up(activation.bytes, GPU_ALIGN), align_up(activation.bytes, PAGE)
    if place is D:
        return (slot, 0), {"swap": slot}
    if place is S:
        return (0, section), {"swap": slot, "inbound": section, "outbound": section}
    return (0, 0), {}


# ---- presence on the GPU ----


def _used_spans(
    problem: Problem, group: Group, index: int, kept: Sequence[tuple[int, int]]
) -> list[Span]:
    """Where an item is on the GPU wherever it is placed."""
    if group.is_bucket:
        return bucket_spans(problem, problem.buckets[index], BucketPlace(D, D))
    return activation_spans(problem, problem.activations[index], D, kept[index])


def _presence(
    problem: Problem,
    group: Group,
    places: Sequence[AnyPlace],
    kept: Sequence[tuple[int, int]],
    relaxed: bool,
) -> tuple[Presence, ...]:
    """What residents add to `_used_spans`."""
    num_positions = 2 * problem.num_stages + 1
    used: Ints = np.zeros((len(group.members), num_positions), dtype=np.int64)
    for row, index in enumerate(group.members):
        for start, end, _ in _used_spans(problem, group, index, kept):
            used[row, start:end] = 1
    found = []
    if not group.is_bucket:
        keeps = tuple(k for k, place in enumerate(places) if place is G)
        held = np.zeros_like(used)
        for row, index in enumerate(group.members):
            activation = problem.activations[index]
            for start, end, _ in activation_spans(problem, activation, G, kept[index]):
                held[row, start:end] = 1
        size = align_up(problem.activations[group.typical].bytes, GPU_ALIGN)
        if keeps and size:
            found.append(Presence(keeps, size, _zeros(held & (1 - used), relaxed)))
        return tuple(found)
    bucket = problem.buckets[group.typical]
    weights = tuple(k for k, p in enumerate(places) if isinstance(p, BucketPlace) and p.weight is G)
    states = tuple(k for k, p in enumerate(places) if isinstance(p, BucketPlace) and p.state is G)
    size = align_up(bucket.weight_bytes, GPU_ALIGN)
    if weights and size:
        found.append(Presence(weights, size, _zeros(1 - used, relaxed)))
    if states and bucket.trainable:
        section = state_section_bytes(bucket)
        section += accumulator_bytes(bucket) if problem.accumulates else 0
        found.append(Presence(states, section, np.zeros(num_positions, dtype=np.int64)))
    streamed = tuple(k for k, p in enumerate(places) if isinstance(p, BucketPlace) and p.streamed)
    gradient = align_up(bucket.grad_bytes, GPU_ALIGN)
    for updated, place in ((states, BucketPlace(G, G)), (streamed, BucketPlace(G, D, True))):
        if updated and gradient:
            gathered = np.zeros_like(used)
            for row, index in enumerate(group.members):
                for start, end, _ in gradient_spans(problem, problem.buckets[index], place):
                    gathered[row, start:end] = 1
            found.append(Presence(updated, gradient, _zeros(gathered, relaxed)))
    return tuple(found)


def _zeros(added: Ints, relaxed: bool) -> Ints:
    """How many members add nothing, by position: all of those, or the ones before any that adds."""
    if relaxed:
        counts: Ints = (1 - added).sum(axis=0)
        return counts
    leading: Ints = np.cumprod(1 - added, axis=0).sum(axis=0)
    return leading
