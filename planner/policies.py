"""What other systems do, as placements on our problem.

Each function decides where things live as its system would; movement, windows and the simulator are
ours, so that plans differ in placement (and, through `default_overlap`, in when the optimizer runs)
and in nothing else. One that cannot run raises NothingFits, naming the tier; one whose step cannot be
below `cutoff_s` seconds may raise NotFaster instead of being replayed.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Sequence

from lohan_fx.planner.choice import NotFaster, fits_at_all, fitting, replayed
from lohan_fx.planner.least import check_forced, is_redone_in_place
from lohan_fx.planner.ledger import Ledger, rooms
from lohan_fx.planner.problem import (
    Activation,
    Bucket,
    BucketPlace,
    NothingFits,
    Overlap,
    Place,
    Problem,
)
from lohan_fx.planner.solution import Forced, Solution

G, D, S, R = Place.GPU, Place.DRAM, Place.SSD, Place.RECOMPUTE

_OVERLAPS = {
    "zero-infinity": Overlap.SERIAL,
    "zero-offload": Overlap.SERIAL,
    "lohan": Overlap.BACKWARD,
}


def default_overlap(policy: str) -> Overlap | None:
    """When the system of that name runs its optimizer; None where a caller may choose."""
    return _OVERLAPS.get(policy)


# ---- DeepSpeed ----


def zero_infinity(
    problem: Problem, forced: Forced | None = None, cutoff_s: float = math.inf
) -> Solution:
    """ZeRO-Infinity (SC 2021, arXiv 2104.07857) with everything offloaded to NVMe.

    Weights and optimizer state are on SSD and stream layer by layer; activation checkpointing keeps
    the inputs of layers on the GPU and recomputes the rest. The CPU updates after the backward.
    """
    forced = _checked(problem, forced)
    ledger = _ledger(problem, forced, (S, S), _checkpointed(problem))
    return fitting(problem, ledger, "zero-infinity", cutoff_s)


def zero_offload(
    problem: Problem, forced: Forced | None = None, cutoff_s: float = math.inf
) -> Solution:
    """ZeRO-Offload (USENIX ATC 2021, arXiv 2101.06840), in DeepSpeed's ZeRO-3 form.

    Optimizer state is in DRAM and the CPU updates it after the backward. 16-bit weights stay on the
    GPU where they fit, else they stream from DRAM. Inputs of layers stay on the GPU, the rest is
    recomputed.
    """
    forced = _checked(problem, forced)
    homes = ((G, D), (D, D))
    return _first_that_fits(
        problem, forced, "zero-offload", homes, _checkpointed(problem), cutoff_s
    )


# ---- activations only ----


def keep_all(
    problem: Problem, forced: Forced | None = None, cutoff_s: float = math.inf
) -> Solution:
    """All activations stay on the GPU, as in plain PyTorch.

    Weights and state stay there too where there is room, else they stream from DRAM, else from SSD.
    """
    forced = _checked(problem, forced)
    kept = [G] * len(problem.activations)
    return _first_that_fits(problem, forced, "keep-all", _HOMES, kept, cutoff_s)


def checkpoint_all(
    problem: Problem, forced: Forced | None = None, cutoff_s: float = math.inf
) -> Solution:
    """Only the inputs of layers stay on the GPU; the rest is recomputed (Chen et al., 2016,
    arXiv 1604.06174, one segment a layer).

    Weights and state stay there too where there is room, else they stream from DRAM, else from SSD.
    """
    forced = _checked(problem, forced)
    redone = _checkpointed(problem)
    return _first_that_fits(problem, forced, "checkpoint-all", _HOMES, redone, cutoff_s)


def swap_all(
    problem: Problem, forced: Forced | None = None, cutoff_s: float = math.inf
) -> Solution:
    """All activations that can be are swapped to DRAM (vDNN, MICRO 2016, arXiv 1602.08124), or to
    SSD where DRAM is too small.

    Weights and state stay on the GPU where there is room, else they stream from DRAM, else from SSD.
    """
    forced = _checked(problem, forced)
    failure: NothingFits | None = None
    for tier in (D, S):
        swapped = [tier if a.can_swap else G for a in problem.activations]
        try:
            return _first_that_fits(problem, forced, "swap-all", _HOMES, swapped, cutoff_s)
        except NothingFits as exc:
            failure = failure or exc
    assert failure is not None
    raise failure


# ---- weights and states on the GPU ----


def flashneuron(
    problem: Problem, forced: Forced | None = None, cutoff_s: float = math.inf
) -> Solution:
    """FlashNeuron (FAST 2021): activations go to SSD, directly, as far as the GPU is too small.

    Weights and state stay on the GPU. Values are chosen in the order in which they are made, since
    those are idle longest, and no more than needed; nothing is recomputed.
    """
    forced = _checked(problem, forced)
    order = [(a.index, S) for a in _by_making(problem) if a.can_swap]
    return _evicted(problem, forced, "flashneuron", order, cutoff_s)


def capuchin(
    problem: Problem, forced: Forced | None = None, cutoff_s: float = math.inf
) -> Solution:
    """Capuchin (ASPLOS 2020): swap what the link can hide, recompute what is cheaper than the rest.

    Weights and state stay on the GPU. Values idle longest are swapped to DRAM first while copies fit
    beside the compute of a pass. After that, each is recomputed or swapped, whichever takes less
    time, most bytes a second of it first. No more is evicted than needed.
    """
    forced = _checked(problem, forced)
    lanes = problem.lanes
    hidden_s = sum(s.forward_s for s in problem.stages)
    order: list[tuple[int, Place]] = []
    rest: list[tuple[float, int, Place]] = []
    for a in _by_making(problem):
        out_s = a.bytes / lanes.d2h_bytes_per_s if lanes.d2h_bytes_per_s else float("inf")
        in_s = a.bytes / lanes.h2d_bytes_per_s if lanes.h2d_bytes_per_s else float("inf")
        if a.can_swap and out_s <= hidden_s:
            hidden_s -= out_s
            order.append((a.index, D))
            continue
        costs = [(out_s + in_s, D)] if a.can_swap else []
        if is_redone_in_place(problem, a):
            costs.append((a.recompute_s, R))
        if costs:
            seconds, place = min(costs)
            rest.append((seconds / max(1, a.bytes), a.index, place))
    order += [(index, place) for _, index, place in sorted(rest)]
    return _evicted(problem, forced, "capuchin", order, cutoff_s)


def checkmate(
    problem: Problem, forced: Forced | None = None, cutoff_s: float = math.inf
) -> Solution:
    """Checkmate (MLSys 2020, arXiv 1910.02653): what to recompute, by integer programming.

    Weights and state stay on the GPU and nothing is swapped; the least recompute time that fits.
    """
    from lohan_fx.planner.optimal import placements

    forced = _checked(problem, forced)
    found: list[Solution] = []
    slower: NotFaster | None = None
    redone = _ledger(problem, forced, (G, G), _checkpointed(problem))
    try:
        # Raises NothingFits where not even recomputing all of it fits.
        found.append(fitting(problem, redone, "checkmate", cutoff_s))
    except NotFaster as exc:
        slower = exc
    unswapped = dataclasses.replace(
        problem,
        activations=tuple(dataclasses.replace(a, can_swap=False) for a in problem.activations),
    )
    pinned = {b.index: _near(b, G, G) for b in problem.buckets} | dict(forced.buckets)
    kept = {i: p for i, p in forced.activations.items() if p in (G, R)}
    if len(kept) == len(forced.activations):
        for solution in placements(unswapped, Forced(pinned, kept)):
            try:
                found.append(replayed(problem, solution, cutoff_s))
            except NotFaster as exc:
                slower = exc
    if not found:
        assert slower is not None
        raise slower
    best = min(found, key=lambda s: s.predicted.step_s)
    return dataclasses.replace(best, policy="checkmate")


def g10(problem: Problem, forced: Forced | None = None, cutoff_s: float = math.inf) -> Solution:
    """G10 (MICRO 2023, arXiv 2310.09443): tensors migrate by how long they are idle.

    What is idle longest, times its bytes, leaves the GPU first: to SSD while transfers fit beside the
    compute of a step, else to DRAM. No more leaves than needed; nothing is recomputed. G10 brings a
    state back for the GPU to update it; here the CPU updates what is not on the GPU.
    """
    forced = _checked(problem, forced)
    return _evicted(problem, forced, "g10", _by_idleness(problem), cutoff_s)


# ---- shared ----

_HOMES = ((G, G), (D, D), (S, S))


def _checked(problem: Problem, forced: Forced | None) -> Forced:
    forced = forced or Forced()
    check_forced(problem, forced)
    return forced


def _near(bucket: Bucket, weight: Place, state: Place) -> BucketPlace:
    """These tiers, or for a bucket that cannot have them those of its state."""
    if not bucket.trainable:
        return BucketPlace(weight, weight)
    if not bucket.has_master and (weight is G) != (state is G):
        return BucketPlace(state, state)
    return BucketPlace(weight, state)


def _checkpointed(problem: Problem) -> list[Place]:
    """Activation checkpointing a layer: its inputs stay, what is made inside is made again.

    What cannot be made again here (the results of attention) goes to DRAM, so that it takes no more
    of the GPU than where it can.
    """
    places = []
    for a in problem.activations:
        crosses = a.first_backward_stage > a.forward_stage
        if is_redone_in_place(problem, a):
            places.append(R)
        else:
            places.append(D if a.can_swap and not crosses else G)
    return places


def _by_making(problem: Problem) -> list[Activation]:
    return sorted(problem.activations, key=lambda a: (a.forward_stage, a.index))


def _ledger(
    problem: Problem, forced: Forced, home: tuple[Place, Place], activations: Sequence[Place]
) -> Ledger:
    return Ledger(
        problem,
        [forced.buckets.get(b.index, _near(b, *home)) for b in problem.buckets],
        [forced.activations.get(i, place) for i, place in enumerate(activations)],
    )


def _first_that_fits(
    problem: Problem,
    forced: Forced,
    policy: str,
    homes: Iterable[tuple[Place, Place]],
    activations: Sequence[Place],
    cutoff_s: float,
) -> Solution:
    """The first home for weights and state that fits; NothingFits of the last that does not."""
    failure: NothingFits | None = None
    possible = [home for home in homes if S not in home or problem.capacities.ssd_bytes]
    for home in possible:
        if home is not possible[-1] and _exceeds(problem, forced, home):
            continue
        try:
            return fitting(problem, _ledger(problem, forced, home, activations), policy, cutoff_s)
        except NothingFits as exc:
            failure = exc
    assert failure is not None
    raise failure


def _exceeds(problem: Problem, forced: Forced, home: tuple[Place, Place]) -> bool:
    """True if what the GPU holds of weights and states at this home is alone more than it has."""
    held = 0
    for b in problem.buckets:
        place = forced.buckets.get(b.index, _near(b, *home))
        held += b.weight_bytes * (place.weight is G) + b.state_bytes * (place.state is G)
    return held > problem.capacities.gpu_bytes


Eviction = tuple[int, Place | BucketPlace]


def _evicted(
    problem: Problem,
    forced: Forced,
    policy: str,
    order: Sequence[Eviction],
    cutoff_s: float,
) -> Solution:
    """Everything on the GPU but the first items of `order`, as many as it takes.

    A place is a BucketPlace for a bucket and a Place for an activation.
    """
    order = [
        (index, place)
        for index, place in order
        if index not in (forced.buckets if isinstance(place, BucketPlace) else forced.activations)
    ]
    last: list[Place] = [G] * len(problem.activations)
    for index, place in order:
        if isinstance(place, Place):
            last[index] = place
    # Opened with all that is recomputed, as a ledger must be, and moved back.
    ledger = _ledger(problem, forced, (G, G), last)
    everything = ledger.copy()
    _move(everything, [(i, p) for i, p in order if isinstance(p, BucketPlace)])
    if not fits_at_all(problem, everything):
        return fitting(problem, everything, policy, cutoff_s)
    _move(ledger, [(i, G) for i, p in order if isinstance(p, Place)])
    for room in rooms(problem):
        trial = ledger.copy()
        for step in ((), *((item,) for item in order)):
            _move(trial, step)
            if fits_at_all(problem, trial, (room,)):
                return fitting(problem, trial, policy, cutoff_s)
    return fitting(problem, everything, policy, cutoff_s)


def _move(ledger: Ledger, items: Iterable[Eviction]) -> None:
    for index, place in items:
        if isinstance(place, BucketPlace):
            ledger.move_bucket(index, place)
        else:
            ledger.move_activation(index, place)


def _by_idleness(problem: Problem) -> list[Eviction]:
    """States, weights and activations by idle seconds times bytes, each with the tier it goes to."""
    num_stages, lanes = problem.num_stages, problem.lanes
    ends = [0.0]
    for stage in problem.stages:
        ends.append(ends[-1] + stage.forward_s)
    for stage in reversed(problem.stages):
        ends.append(ends[-1] + stage.backward_s)
    step_s = ends[-1]
    rows: list[tuple[float, int, int, bool]] = []  # idle seconds, bytes, index, is a bucket
    for b in problem.buckets:
        used = sum(problem.stages[s].forward_s for s in b.forward_stages)
        used += sum(problem.stages[s].backward_s for s in b.backward_stages)
        rows.append((step_s - used, b.weight_bytes + b.state_bytes, b.index, True))
    for a in problem.activations:
        if a.can_swap:
            until = ends[2 * num_stages - 1 - a.first_backward_stage]
            idle = max(0.0, until - ends[a.last_forward_stage + 1])
            rows.append((idle, a.bytes, a.index, False))
    rows.sort(key=lambda row: (-row[0] * row[1], row[2], row[3]))
    rate = min(lanes.ssd_read_bytes_per_s, lanes.ssd_write_bytes_per_s)
    free_s = step_s if problem.capacities.ssd_bytes and rate else 0.0
    order: list[Eviction] = []
    for _, num_bytes, index, is_bucket in rows:
        takes_s = 2 * num_bytes / rate if rate else 0.0
        tier = D
        if takes_s <= free_s:
            free_s -= takes_s
            tier = S
        if is_bucket:
            order.append((index, _near(problem.buckets[index], tier, tier)))
        else:
            order.append((index, tier))
    return order
