"""The places that items may have, and when activations are on the GPU in backward for them."""

from __future__ import annotations

from collections.abc import Sequence

from lohan_fx.planner.problem import (
    Activation,
    Bucket,
    BucketPlace,
    Overlap,
    Place,
    Problem,
)

G, D, S = Place.GPU, Place.DRAM, Place.SSD
_MASTERED = (
    BucketPlace(G, G),
    BucketPlace(G, D),
    BucketPlace(G, S),
    BucketPlace(D, D),
    BucketPlace(D, S),
    BucketPlace(S, D),
    BucketPlace(S, S),
)
_STREAMED = (BucketPlace(G, D, streamed=True), BucketPlace(D, D, streamed=True))
# Without a separate master the weight is what Adam updates, so it stays with whoever does that.
_UNMASTERED = tuple(p for p in _MASTERED if (p.weight is G) == (p.state is G))
_FROZEN = tuple(p for p in _MASTERED if p.weight is p.state)


def bucket_places(bucket: Bucket) -> tuple[BucketPlace, ...]:
    """The places a bucket may have in any problem, fastest first: all but `streamed_places`."""
    if not bucket.trainable:
        return _FROZEN
    return _MASTERED if bucket.has_master else _UNMASTERED


def streamed_places(problem: Problem, bucket: Bucket) -> tuple[BucketPlace, ...]:
    """The places of a bucket whose state is copied to the GPU and back for its updates."""
    allowed = not problem.accumulates and problem.overlap is not Overlap.NAIVE
    return _STREAMED if allowed and bucket.trainable and bucket.has_master else ()


def activation_places(activation: Activation) -> tuple[Place, ...]:
    """The places an activation may have, fastest first."""
    swap = (Place.DRAM, Place.SSD) if activation.can_swap else ()
    redo = (Place.RECOMPUTE,) if activation.can_recompute else ()
    return (Place.GPU, *swap, *redo)


def backward_intervals(problem: Problem, places: Sequence[Place]) -> list[tuple[int, int]]:
    """(first, last) backward stage at which each activation is on the GPU, first >= last.

    A value needed to recompute another is there when that other is first used, and so on back.
    """
    first = [a.first_backward_stage for a in problem.activations]
    last = [a.last_backward_stage for a in problem.activations]
    for index in readers_first(problem.activations):
        if places[index] is Place.RECOMPUTE:
            for need in problem.activations[index].needs:
                first[need] = max(first[need], first[index])
                last[need] = min(last[need], first[index])
    return list(zip(first, last, strict=True))


def readers_first(activations: Sequence[Activation]) -> list[int]:
    """Indices such that every activation comes before all it needs."""
    waiting = [0] * len(activations)
    for a in activations:
        for need in a.needs:
            waiting[need] += 1
    ready = [index for index, count in enumerate(waiting) if count == 0]
    order: list[int] = []
    while ready:
        index = ready.pop()
        order.append(index)
        for need in activations[index].needs:
            waiting[need] -= 1
            if waiting[need] == 0:
                ready.append(need)
    return order
