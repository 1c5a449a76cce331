"""Where a search begins: placements with the least on the GPU, and the least each tier must hold."""

from __future__ import annotations

from lohan_fx.errors import InfeasiblePlan
from lohan_fx.planner.ledger import Ledger, Room
from lohan_fx.planner.places import activation_places, bucket_places, streamed_places
from lohan_fx.planner.problem import Activation, BucketPlace, Place, Problem
from lohan_fx.planner.solution import Forced


def check_forced(problem: Problem, forced: Forced) -> None:
    """Raise InfeasiblePlan for a forced placement that no plan can have."""
    for kind, keys, count in (
        ("bucket", forced.buckets, len(problem.buckets)),
        ("activation", forced.activations, len(problem.activations)),
    ):
        unknown = [key for key in keys if not 0 <= key < count]
        if unknown:
            raise InfeasiblePlan(f"a place is forced on {kind} {unknown[0]}; there are {count}")
    for index, place in forced.buckets.items():
        bucket = problem.buckets[index]
        possible = (*bucket_places(bucket), *streamed_places(problem, bucket))
        if place not in possible:
            allowed = "; ".join(map(str, possible))
            raise InfeasiblePlan(f"bucket {bucket.name!r} cannot have {place}; it can: {allowed}")
    for index, kept in forced.activations.items():
        activation = problem.activations[index]
        if kept not in activation_places(activation):
            allowed = ", ".join(activation_places(activation))
            raise InfeasiblePlan(
                f"activation {activation.name!r} cannot be placed {kept!s}; it can be: {allowed}"
            )


def is_redone_in_place(problem: Problem, activation: Activation) -> bool:
    """True if recomputing it where backward first reads it finds its needs there anyway.

    Recomputing a layer's input in the layer above would bring in that layer's inner values, and
    those their own inputs: the whole forward at once. Such values are kept or swapped.
    """
    if not activation.can_recompute:
        return False
    at = activation.first_backward_stage
    needs = [problem.activations[need] for need in activation.needs]
    return all(n.last_backward_stage - 1 <= at <= n.first_backward_stage for n in needs)


# Bucket sizes larger than most that a start may keep off the SSD.
_MOST_OUTLIERS = 3


def starts(problem: Problem, forced: Forced) -> list[Ledger]:
    """Plans to begin the search with, each with the least on the GPU.

    One streams from DRAM, one from SSD. The buffers between SSD and the rest are as large as the
    largest bucket that passes through them, so a few large ones (an embedding) may do better in
    DRAM; the second plan is the one with the least DRAM over how many of those it keeps there.
    """
    from_dram = start(problem, forced, Place.DRAM)
    if not problem.capacities.ssd_bytes:
        return [from_dram]
    return [start_with_least_dram(problem, forced), from_dram]


def start_with_least_dram(problem: Problem, forced: Forced) -> Ledger:
    """Of the plans that stream from SSD, all but some of the largest buckets."""
    sizes = sorted({b.numel for b in problem.buckets}, reverse=True)
    starts = [
        start(problem, forced, Place.SSD, most_numel=most)
        for most in (None, *sizes[1 : _MOST_OUTLIERS + 1])
    ]
    return min(starts, key=lambda ledger: ledger.dram_bytes(ledger.windows(Room.NONE)))


def start(problem: Problem, forced: Forced, lowest: Place, most_numel: int | None = None) -> Ledger:
    """The plan with the least on the GPU: all streamed from `lowest`, recomputed or swapped.

    Buckets of more than `most_numel` elements stream from DRAM.
    """
    buckets = []
    for b in problem.buckets:
        tier = Place.DRAM if most_numel is not None and b.numel > most_numel else lowest
        buckets.append(forced.buckets.get(b.index, BucketPlace(tier, tier)))
    activations: list[Place] = []
    for a in problem.activations:
        if a.index in forced.activations:
            activations.append(forced.activations[a.index])
        elif is_redone_in_place(problem, a):
            activations.append(Place.RECOMPUTE)
        elif a.can_swap:
            activations.append(lowest)
        else:
            activations.append(Place.GPU)
    return Ledger(problem, buckets, activations)


def least_bytes(problem: Problem, forced: Forced | None = None) -> dict[str, int]:
    """The least each tier must hold, in bytes.

    `gpu`: with all else streamed, recomputed or swapped, nothing moving ahead, and the margin.
    `dram`: with as much on SSD as makes it least. `ssd`: with the DRAM of this problem filled first.
    """
    forced = forced or Forced()
    ledger = start_with_least_dram(problem, forced)
    gpu, dram, everything = ledger.peaks(ledger.windows(Room.NONE))
    spare = max(0, problem.capacities.dram_bytes - dram)
    return {"gpu": gpu + problem.gpu_margin_bytes, "dram": dram, "ssd": max(0, everything - spare)}
