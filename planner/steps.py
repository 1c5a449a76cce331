"""One training step as a program: pieces of compute and the moves between them, in program order.

A stage is cut into pieces where buckets are first read, so that a weight is waited for where it is
used and not at the start of its stage. The problem does not say how a stage's seconds divide among
its buckets; they are given out by elements, as matrix products take them. Buckets of one stage are
read in the order of their index, and in reverse by the backward.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from lohan_fx.planner.cost import backward_intervals
from lohan_fx.planner.problem import Bucket, BucketPlace, Place, Problem
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
    redo = [0.0] * problem.num_stages
    for a, place in zip(problem.activations, activations, strict=True):
        if place is Place.RECOMPUTE:
            redo[intervals[a.index][0]] += a.recompute_s
    forward = _Pass(problem, buckets, backward=False)
    backward = _Pass(problem, buckets, backward=True)
    for stage in problem.stages:
        readers = [b for b in problem.buckets if stage.index in b.forward_stages]
        forward.add_stage(stage.index, "forward", stage.forward_s, readers)
    for stage in reversed(problem.stages):
        backward.add_backward(stage.index, redo[stage.index])
    swapped = [
        a
        for a, place in zip(problem.activations, activations, strict=True)
        if place in (Place.DRAM, Place.SSD)
    ]
    fw_moves = weight_moves(forward.weights(), windows.fetch_window_bytes, backward=False)
    fw_moves += offload_moves(
        [Use(forward.end_of[a.last_forward_stage], a.index, a.bytes) for a in swapped],
        len(forward.pieces),
        windows.offload_window_bytes,
    )
    bw_moves = weight_moves(backward.weights(), windows.fetch_window_bytes, backward=True)
    bw_moves += reload_moves(
        [Use(backward.start_of[intervals[a.index][0]], a.index, a.bytes) for a in swapped],
        windows.reload_window_bytes,
    )
    bw_moves += backward.gradients()
    fetched = [move.arg for move in in_program_order(fw_moves) if move.op == "fetch"]
    trainable = [b.index for b in problem.buckets if b.trainable]
    order = [index for index in dict.fromkeys(fetched) if problem.buckets[index].trainable]
    order += [index for index in trainable if index not in set(order)]
    return StepProgram(
        forward.program(fw_moves), backward.program(bw_moves), tuple(order), tuple(intervals)
    )


class _Pass:
    """Collects the pieces of one pass, and where in it each bucket is read."""

    def __init__(self, problem: Problem, places: Sequence[BucketPlace], *, backward: bool) -> None:
        self._problem = problem
        self._places = places
        self._backward = backward
        self.pieces: list[Piece] = []
        self.start_of: dict[int, int] = {}  # stage -> its first piece
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

    def add_stage(self, stage: int, what: str, seconds: float, readers: Sequence[Bucket]) -> None:
        """Append the pieces of a stage that reads `readers`, in this order."""
        first = len(self.pieces)
        self._append(stage, what, seconds, readers)
        self._close(stage, first)

    def add_backward(self, stage: int, redo_s: float) -> None:
        """Append a stage's recomputation and backward."""
        first = len(self.pieces)
        row = self._problem.stages[stage]
        readers = self._at.get(stage, [])
        if redo_s > 0:
            again = [b for b in readers if stage in b.forward_stages]
            reads = again if redo_s >= _REDOES_PRODUCTS * row.forward_s else []
            self._append(stage, "recompute", redo_s, reads)
        self._append(stage, "backward", row.backward_s, readers[::-1])
        for bucket in self._final.get(stage, ()):
            inside = stage in bucket.backward_stages
            self._made[bucket.index] = self._last[bucket.index] if inside else len(self.pieces) - 1
        self._close(stage, first)

    def _append(self, stage: int, what: str, seconds: float, readers: Sequence[Bucket]) -> None:
        total = sum(b.numel for b in readers)
        shares: list[float] = []
        for bucket in readers:
            share = bucket.numel / total if total else 1 / len(readers)
            # Nothing happens between buckets that are on the GPU with all that is theirs.
            if not shares or self._moves(bucket):
                self.pieces.append(Piece(stage, what, 0.0, False, False))
                shares.append(0.0)
            shares[-1] += share
            at = len(self.pieces) - 1
            self._first.setdefault(bucket.index, at)
            self._last[bucket.index] = at
        if not readers:
            self.pieces.append(Piece(stage, what, 0.0, False, False))
            shares.append(1.0)
        for k, share in enumerate(reversed(shares), start=1):
            self.pieces[-k] = self.pieces[-k]._replace(seconds=seconds * share)

    def _moves(self, bucket: Bucket) -> bool:
        place = self._places[bucket.index]
        return place.weight is not Place.GPU or (bucket.trainable and place.state is not Place.GPU)

    def _close(self, stage: int, first: int) -> None:
        self.start_of[stage], self.end_of[stage] = first, len(self.pieces)
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
                    bucket.weight_bytes,
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
