"""One training step as a program: pieces of compute and the moves between them, in program order.

A stage is cut into pieces where buckets are first read, so that a weight is waited for where it is
used and not at the start of its stage. The problem does not say how a stage's seconds divide among
its buckets; they are given out by elements, as matrix products take them. Buckets of one stage are
read in the order of their index, and in reverse by the backward.

It is cut, too, where swapped activations leave and return. Recomputation stands right before the first use
of what it makes, unless it is most of a forward: then all of it is at the start of the stage.
"""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from lohan_fx.planner.places import backward_intervals, readers_first
from lohan_fx.planner.problem import GPU_ALIGN, Bucket, BucketPlace, Place, Problem, align_up
from lohan_fx.planner.schedule import (
    Placed,
    Use,
    WeightUse,
    gradient_move,
    in_program_order,
    offload_moves,
    reload_moves,
    weight_moves,
)
from lohan_fx.planner.solution import Windows

# Recomputation that takes this share of a stage's forward does the matrix products again, so it
# reads the weights; less is norms and pointwise work, which does not.
_REDOES_PRODUCTS = 0.5


class Piece(NamedTuple):
    """Compute that nothing interrupts. `opens` and `closes` are true at the ends of its stage."""

    stage: int
    what: str  # "forward", "recompute" or "backward"
    seconds: float
    opens: bool
    closes: bool


@dataclass(frozen=True, slots=True)
class PassProgram:
    """What one pass does: `moves[p]` come before piece p, and the last ones after every piece."""

    pieces: tuple[Piece, ...]
    moves: tuple[tuple[Placed, ...], ...]

    def in_order(self) -> list[Placed]:
        """All moves, in program order."""
        return [move for here in self.moves for move in here]


@dataclass(frozen=True, slots=True)
class StepProgram:
    """One step. `update_order` are the trainable buckets in the order in which step() updates them."""

    forward: PassProgram
    backward: PassProgram
    update_order: tuple[int, ...]
    intervals: tuple[tuple[int, int], ...]  # of activations, as cost.backward_intervals


def step_program(
    problem: Problem,
    buckets: Sequence[BucketPlace],
    activations: Sequence[Place],
    windows: Windows,
) -> StepProgram:
    """The program of a placement, by the rules of `schedule`."""
    intervals = backward_intervals(problem, activations)
    swapped = [
        a
        for a, place in zip(problem.activations, activations, strict=True)
        if place in (Place.DRAM, Place.SSD)
    ]
    leaving = [(a.last_forward_stage, a.leaves_at) for a in swapped]
    redone, first_use = _first_uses(problem, activations, intervals)
    returning = [(intervals[a.index][0], first_use[a.index]) for a in swapped]
    leaves, returns = _by_stage(leaving), _by_stage(returning)
    forward = _Pass(problem, buckets, backward=False)
    backward = _Pass(problem, buckets, backward=True)
    for stage in problem.stages:
        readers = [b for b in problem.buckets if stage.index in b.forward_stages]
        forward.add_forward(stage.index, readers, leaves.get(stage.index, ()))
    for stage in reversed(problem.stages):
        backward.add_backward(stage.index, redone[stage.index], returns.get(stage.index, ()))
    fw_closed, bw_closed = windows.closed_stages(problem.num_stages)
    fw_ends = sorted(forward.end_of[stage] for stage in fw_closed)
    bw_ends = sorted(backward.end_of[stage] for stage in bw_closed)
    fw_moves = weight_moves(
        forward.weights(), windows.fetch_window_bytes, backward=False, closed_ends=fw_ends
    )
    fw_moves += offload_moves(
        [
            Use(forward.position[at], a.index, align_up(a.bytes, GPU_ALIGN))
            for a, at in zip(swapped, leaving, strict=True)
        ],
        len(forward.pieces),
        windows.offload_window_bytes,
    )
    bw_moves = weight_moves(
        backward.weights(), windows.fetch_window_bytes, backward=True, closed_ends=bw_ends
    )
    bw_moves += reload_moves(
        [
            Use(backward.position[at], a.index, align_up(a.bytes, GPU_ALIGN))
            for a, at in zip(swapped, returning, strict=True)
        ],
        windows.reload_window_bytes,
        bw_ends,
    )
    bw_moves += backward.gradients()
    fetched = [move.arg for move in in_program_order(fw_moves) if move.op == "fetch"]
    trainable = [b.index for b in problem.buckets if b.trainable]
    order = [index for index in dict.fromkeys(fetched) if problem.buckets[index].trainable]
    order += [index for index in trainable if index not in set(order)]
    return StepProgram(
        forward.program(fw_moves), backward.program(bw_moves), tuple(order), tuple(intervals)
    )


def _by_stage(uses: Sequence[tuple[int, float]]) -> dict[int, set[float]]:
    shares: dict[int, set[float]] = {}
    for stage, share in uses:
        shares.setdefault(stage, set()).add(share)
    return shares


def _first_uses(
    problem: Problem, places: Sequence[Place], intervals: Sequence[tuple[int, int]]
) -> tuple[list[dict[float, float]], list[float]]:
    """(seconds of recomputation of each stage by where they stand, first use of each activation).

    Both are shares of the seconds of the backward without recomputation, in the stage that uses an
    activation first. What is recomputed reads what it needs right before its own first use.
    """
    rows = problem.activations
    again = [a for a, place in zip(rows, places, strict=True) if place is Place.RECOMPUTE]
    total = [0.0] * problem.num_stages
    for a in again:
        total[intervals[a.index][0]] += a.recompute_s
    at_start = [
        redo_s >= _REDOES_PRODUCTS * stage.forward_s
        for redo_s, stage in zip(total, problem.stages, strict=True)
    ]
    first_use = []
    for a in rows:
        stage = intervals[a.index][0]
        own = a.returns_at if stage == a.first_backward_stage else 1.0
        first_use.append(0.0 if total[stage] and at_start[stage] else own)
    for index in readers_first(rows):
        if places[index] is Place.RECOMPUTE:
            for need in rows[index].needs:
                if intervals[need][0] == intervals[index][0]:
                    first_use[need] = min(first_use[need], first_use[index])
    redone: list[dict[float, float]] = [{} for _ in problem.stages]
    for a in again:
        if a.recompute_s > 0:
            here = redone[intervals[a.index][0]]
            here[first_use[a.index]] = here.get(first_use[a.index], 0.0) + a.recompute_s
    return redone, first_use


class _Pass:
    """Collects the pieces of one pass, and where in it each bucket is read."""

    def __init__(self, problem: Problem, places: Sequence[BucketPlace], *, backward: bool) -> None:
        self._problem = problem
        self._places = places
        self._backward = backward
        self.pieces: list[Piece] = []
        # (stage, share of its seconds) -> the piece that begins there.
        self.position: dict[tuple[int, float], int] = {}
        self.end_of: dict[int, int] = {}  # stage -> past its last piece
        self._first: dict[int, int] = {}  # bucket -> first piece that reads it
        self._last: dict[int, int] = {}
        self._made: dict[int, int] = {}  # bucket -> piece that makes its last gradient
        self._at: dict[int, list[Bucket]] = {}
        self._final: dict[int, list[Bucket]] = {}
        if backward:
            for bucket in problem.buckets:
                for stage in bucket.backward_stages:
                    self._at.setdefault(stage, []).append(bucket)
                if bucket.grad_stage is not None:
                    self._final.setdefault(bucket.grad_stage, []).append(bucket)

    def add_forward(self, stage: int, readers: Sequence[Bucket], shares: Iterable[float]) -> None:
        """Append a stage's forward, which reads `readers` in this order, cut at `shares` of it."""
        first = len(self.pieces)
        seconds = self._problem.stages[stage].forward_s
        self.position |= self._append(stage, "forward", seconds, readers, shares)
        self._close(stage, first)

    def add_backward(
        self, stage: int, redone: Mapping[float, float], shares: Iterable[float]
    ) -> None:
        """Append a stage's recomputation, seconds by share of the backward, and its backward."""
        first = len(self.pieces)
        row = self._problem.stages[stage]
        readers = self._at.get(stage, [])
        redo_s = sum(redone.values())
        again = [b for b in readers if stage in b.forward_stages]
        if again and redo_s > 0 and redo_s >= _REDOES_PRODUCTS * row.forward_s:
            self._append(stage, "recompute", redo_s, again)
            redone = {}
        position = self._append(stage, "backward", row.backward_s, readers[::-1], shares, redone)
        self.position |= position
        self.position[stage, 0.0] = first
        for bucket in self._final.get(stage, ()):
            inside = stage in bucket.backward_stages
            self._made[bucket.index] = self._last[bucket.index] if inside else len(self.pieces) - 1
        self._close(stage, first)

    def _append(
        self,
        stage: int,
        what: str,
        seconds: float,
        readers: Sequence[Bucket],
        shares: Iterable[float] = (),
        redone: Mapping[float, float] | None = None,
    ) -> dict[tuple[int, float], int]:
        """Append pieces of compute, and of recomputation where `redone` has it.

        Returns the piece that begins at each share of the seconds at which it is cut.
        """
        redone = redone or {}
        total = sum(b.numel for b in readers)
        weights = [b.numel / total if total else 1 / len(readers) for b in readers]
        ends = list(itertools.accumulate(weights))
        starts = [0.0, *ends][: len(readers)]
        # Nothing happens between buckets that are on the GPU with all that is theirs.
        moving = [at for at, bucket in zip(starts, readers, strict=True) if self._moves(bucket)]
        bounds = sorted({0.0, *(at for at in (*moving, *shares, *redone) if at < 1.0)})
        position, at = {}, []
        for low, high in itertools.pairwise([*bounds, 1.0]):
            position[stage, low] = len(self.pieces)
            if low in redone:
                self.pieces.append(Piece(stage, "recompute", redone[low], False, False))
            at.append(len(self.pieces))
            self.pieces.append(Piece(stage, what, seconds * (high - low), False, False))
        position[stage, 1.0] = len(self.pieces)
        if 1.0 in redone:
            self.pieces.append(Piece(stage, "recompute", redone[1.0], False, False))
        for bucket, start, end in zip(readers, starts, ends, strict=True):
            first = bisect.bisect_right(bounds, start) - 1
            self._first.setdefault(bucket.index, at[first])
            self._last[bucket.index] = at[max(first, bisect.bisect_left(bounds, end) - 1)]
        return position

    def _moves(self, bucket: Bucket) -> bool:
        place = self._places[bucket.index]
        return place.weight is not Place.GPU or (bucket.trainable and place.state is not Place.GPU)

    def _close(self, stage: int, first: int) -> None:
        self.end_of[stage] = len(self.pieces)
        self.pieces[first] = self.pieces[first]._replace(opens=True)
        self.pieces[-1] = self.pieces[-1]._replace(closes=True)

    def weights(self) -> list[WeightUse]:
        uses = []
        for index, first in self._first.items():
            bucket, place, last = (
                self._problem.buckets[index],
                self._places[index],
                self._last[index],
            )
            resident = place.weight is Place.GPU
            uses.append(
                WeightUse(
                    index,
                    first,
                    last,
                    self.end_of[self.pieces[last].stage],
                    align_up(bucket.weight_bytes, GPU_ALIGN),
                    resident=resident,
                    refreshed=resident and bucket.trainable and place.state is not Place.GPU,
                )
            )
        return uses

    def gradients(self) -> list[Placed]:
        return [gradient_move(piece, bucket) for bucket, piece in self._made.items()]

    def program(self, moves: Sequence[Placed]) -> PassProgram:
        at: list[list[Placed]] = [[] for _ in range(len(self.pieces) + 1)]
        for move in in_program_order(moves):
            at[move.position].append(move)
        return PassProgram(tuple(self.pieces), tuple(tuple(here) for here in at))
