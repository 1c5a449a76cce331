"""Placement as a mixed-integer program over groups of identical items.

Integers: for each group and place, how many of its items are there. Continuous: seconds of each
phase, at least what every lane needs. The inequalities, one method each:

  one place each  over places p: sum of count[g, p] = size of group g
  levels          a buffer is as large as the largest item that passes through it
  phases          seconds[phase] >= every lane's limit, with its rivals (see cost._limits)
  spilling        with speculation, forward and backward together >= Adam and DRAM
  SSD             bytes of all sections <= capacity
  DRAM            bytes of items, gradients and buffers <= capacity
  GPU             at a position: what is used, residents and windows <= capacity
  writes          bytes written to SSD <= bytes a day * step / seconds of a day

[Note: presence is convex]
Every item is on the GPU while it is used, wherever it is placed. What a resident one adds is its
presence between uses. Of n residents of a group, at least max(0, n - zeros) add their bytes at a
position where `zeros` of the group add none; exactly that many if those that add none come first in
the order in which the group is made resident. So one number per group and position replaces an
integer per layer, and a row is needed only for positions that a solution would violate.

[Note: two readings]
Without a Room this is a relaxation: every placement that the checker accepts, at any windows,
satisfies it in no more seconds than it says, so its optimum bounds theirs from below. With a Room
it is meant to be carried out: windows and buffers are those of that Room, rounded up where they
depend on the placement in a way that is not linear.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from ortools.linear_solver import pywraplp

from lohan_fx.planner.choice import SECONDS_PER_DAY
from lohan_fx.planner.ledger import (
    FETCH_SHARE,
    WINDOW_SHARE,
    Room,
    gradient_interval,
    tight_positions,
)
from lohan_fx.planner.lots import SORTS, Lot, Stock, stock
from lohan_fx.planner.problem import PAGE, BucketPlace, Overlap, Place, Problem
from lohan_fx.planner.solution import Forced
from lohan_fx.planner.traffic import (
    BACKWARD,
    FORWARD,
    LANES,
    NUM_PHASES,
    SPILLING_LANES,
    STREAM_BYTES,
    Floats,
    Ints,
    lane_seconds,
    optimizer_phase,
    stage_traffic,
    updates_spill,
)

_GPU, _H2D, _D2H, _READ, _WRITE, _ADAM, _DRAM = range(len(LANES))

# Of the sizes that pass through a buffer, this many of the largest are told apart, and as many of
# the rest, evenly by magnitude; those between are rounded.
_MOST_LEVELS = 8
# Rounds of adding the positions that a solution violates, and how many a round.
_MOST_ROUNDS = 10
_NEW_POSITIONS = 6
# With many lots, which make a solve slow: a bound is one after any round, and repairs mend counts.
_FEW_ROUNDS = 3
_MIP_GAP = 1e-4
# Share of a capacity by which a row may be violated; repairs take care of it.
_TOLERATED = 1e-6
# Limits that do not depend on the clock: the same problem has the same answer everywhere.
_MOST_NODES = 500
# Above this many lots the relaxation is rounded: of its counts no more than a few are fractions, about
# one a row that limits the step.
_MOST_INTEGRAL_LOTS = 100
# Steps within this share are equals, among which SSD writes and then DRAM decide.
_EQUAL = 1e-6
# In a bound, items whose seconds are a smaller share of the step's count as none: GLOP may find rows that
# have such coefficients infeasible. A bound only gets lower by what is left out.
_NEGLIGIBLE = 1e-9
# What a proof in floating point gives away, as a share.
_PROOF_SLACK = 1e-6

Terms = list[tuple[Any, float]]  # of solver variables
Counts = tuple[tuple[float, ...], ...]


@dataclass(frozen=True, slots=True)
class Answer:
    """What a program found: counts by lot and place, and what it says they take."""

    lots: tuple[Lot, ...]
    counts: Counts
    step_s: float


def place_counts(
    problem: Problem,
    forced: Forced,
    room: Room,
    cutoff_s: float = math.inf,
    *,
    streams: bool = False,
    spills: bool = False,
) -> Answer | None:
    """The best counts at one width of windows, found within a fixed effort.

    None without any, or with none that take less than `cutoff_s`. With `streams`, states may pass
    through the GPU for their updates; `spills`: see `updates_spill`.
    """
    program = partial(_Program, problem, forced, room, streams=streams, spills=spills)
    relaxed = program(integral=False)
    if not relaxed.settle() or relaxed.bound_s() >= cutoff_s:
        return None
    if streams or not relaxed.has_few_lots:
        return relaxed.rounded()
    exact = program(integral=True, positions=relaxed.positions)
    if not exact.settle():
        return None
    found = exact.answer()
    return exact.with_fewer_writes(found) or found


def bound_seconds(problem: Problem, forced: Forced) -> float | None:
    """Seconds that no placement's step is below, by the cost model; None where none can fit."""
    program = partial(_Program, problem, forced, None, streams=True, spills=True)
    relaxed = program(integral=False)
    if not relaxed.settle():
        return None
    bound = relaxed.bound_s()
    if not relaxed.has_few_lots:
        return bound * (1 - _PROOF_SLACK)
    exact = program(integral=True, positions=relaxed.positions)
    if exact.solve():
        bound = max(bound, exact.bound_s())
    return bound * (1 - _PROOF_SLACK)


class _Program:
    """One mixed-integer program, or its linear relaxation where it is not `integral`.

    Bytes are in shares of a capacity and seconds in shares of the step's compute, so that
    coefficients are about one.
    """

    def __init__(
        self,
        problem: Problem,
        forced: Forced,
        room: Room | None,
        *,
        integral: bool,
        streams: bool,
        spills: bool,
        positions: Sequence[int] = (),
    ) -> None:
        self.problem = problem
        self.room = room
        self.integral = integral
        self.spills = spills
        self.stock: Stock = stock(problem, forced, relaxed=room is None, streams=streams)
        self.positions: list[int] = []
        self._solver = pywraplp.Solver.CreateSolver("SCIP" if integral else "GLOP")
        self._infinity = self._solver.infinity()
        self._compute = lane_seconds(problem.lanes, stage_traffic(problem)[None, :])[0]
        self._scale_s = float(self._compute.sum()) or 1.0
        self._counts = self._one_place_each()
        self._levels = {sort: self._level(sort) for sort in SORTS}
        self._seconds = [
            self._solver.NumVar(0, self._infinity, f"seconds[{phase}]")
            for phase in range(NUM_PHASES)
        ]
        self._limit_phases()
        self._limit_ssd()
        self._dram = self._limit_dram()
        self._limit_writes()
        self._gpu_adam = self._gpu_adam_bytes()
        self._windows = self._window_terms()
        for position in positions or self._first_positions():
            self._limit_gpu(position)
        self._minimize([(variable, 1.0) for variable in self._seconds])

    # ---- solving ----

    def settle(self) -> bool:
        """Solve, adding positions that are violated until none is; False without a solution."""
        for _ in range(_MOST_ROUNDS if self.has_few_lots else _FEW_ROUNDS):
            if not self.solve():
                return False
            violated = self._violated()
            if not violated:
                return True
            for position in violated:
                self._limit_gpu(position)
        return self.solve()

    def solve(self) -> bool:
        parameters = pywraplp.MPSolverParameters()
        if self.integral:
            parameters.SetDoubleParam(parameters.RELATIVE_MIP_GAP, _MIP_GAP)
            self._solver.SetSolverSpecificParametersAsString(f"limits/totalnodes = {_MOST_NODES}")
        status = self._solver.Solve(parameters)
        return status in (pywraplp.Solver.OPTIMAL, pywraplp.Solver.FEASIBLE)

    def answer(self) -> Answer:
        return Answer(
            lots=self.stock.lots,
            counts=self._values(),
            step_s=self._scale_s * sum(float(v.solution_value()) for v in self._seconds),
        )

    @property
    def has_few_lots(self) -> bool:
        return len(self.stock.lots) <= _MOST_INTEGRAL_LOTS

    def rounded(self) -> Answer:
        """The answer with whole counts, those of a lot still adding up to its size."""
        found = self.answer()
        counts = tuple(
            _whole(row, lot.size) for lot, row in zip(found.lots, found.counts, strict=True)
        )
        return Answer(found.lots, counts, found.step_s)

    def bound_s(self) -> float:
        """Seconds below which no solution of this program is. Before `with_fewer_writes` only."""
        objective = self._solver.Objective()
        found: float = objective.BestBound() if self.integral else objective.Value()
        return found * self._scale_s

    def with_fewer_writes(self, found: Answer) -> Answer | None:
        """An answer with as short a step, fewest bytes written to SSD, then least DRAM; or None."""
        written = [
            (variable, float(lot.written[k]))
            for lot, row in zip(self.stock.lots, self._counts, strict=True)
            for k, variable in enumerate(row)
            if lot.written[k]
        ]
        if not any(v.solution_value() > 0.5 for v, _ in (*written, *self._dram)):
            return None
        names = [v for row in self._counts for v in row]
        values = [n for row in found.counts for n in row]
        self._at_most(
            found.step_s / self._scale_s * (1 + _EQUAL), [(v, 1.0) for v in self._seconds]
        )
        ssd = max((amount for _, amount in written), default=1.0)
        dram = max((amount for _, amount in self._dram), default=1.0)
        self._minimize(
            [
                *((v, amount / ssd) for v, amount in written),
                *((v, 1e-4 * amount / dram) for v, amount in self._dram),
            ]
        )
        self._solver.SetHint(names, values)
        return self.answer() if self.solve() and not self._violated() else None

    def _values(self) -> Counts:
        cast = round if self.integral else float
        return tuple(tuple(cast(v.solution_value()) for v in row) for row in self._counts)

    # ---- building ----

    def _at_most(self, most: float, terms: Terms) -> None:
        """A row: the sum of the terms <= most."""
        row = self._solver.Constraint(-self._infinity, most)
        together: dict[int, tuple[Any, float]] = {}
        for variable, factor in terms:
            index = variable.index()
            before = together[index][1] if index in together else 0.0
            together[index] = variable, before + factor
        for variable, factor in together.values():
            row.SetCoefficient(variable, factor)

    def _minimize(self, terms: Terms) -> None:
        objective = self._solver.Objective()
        objective.Clear()
        objective.SetMinimization()
        for variable, factor in terms:
            objective.SetCoefficient(variable, objective.GetCoefficient(variable) + factor)

    def _one_place_each(self) -> list[list[Any]]:
        rows = []
        for number, lot in enumerate(self.stock.lots):
            make = self._solver.IntVar if self.integral else self._solver.NumVar
            row = [make(0, lot.size, f"{number}:{place}") for place in lot.places]
            sum_is = self._solver.Constraint(lot.size, lot.size)
            for variable in row:
                sum_is.SetCoefficient(variable, 1.0)
            rows.append(row)
        return rows

    def _switch(self, name: str) -> Any:
        make = self._solver.IntVar if self.integral else self._solver.NumVar
        return make(0, 1, name)

    def _switched_by(self, switch: Any, wanted: Callable[[Lot, int], bool]) -> bool:
        """Rows: the switch is on where any item is at a wanted place. False without any."""
        found = False
        for lot, row in zip(self.stock.lots, self._counts, strict=True):
            terms = [(v, 1.0) for k, v in enumerate(row) if wanted(lot, k)]
            if terms:
                found = True
                self._at_most(0.0, [*terms, (switch, -float(lot.size))])
        return found

    def _level(self, sort: str) -> list[tuple[int, Any]]:
        """Switches for the largest that passes through a buffer: on for every size up to it."""
        seen = sorted({n for lot in self.stock.lots for n in lot.buffered[sort] if n})
        if len(seen) > 2 * _MOST_LEVELS:
            large = seen[-_MOST_LEVELS:]
            ends = np.searchsorted(seen, np.geomspace(seen[0], large[0], _MOST_LEVELS))
            seen = sorted({*large, *(seen[int(at)] for at in ends)})
        steps: list[tuple[int, Any]] = []
        for number, size in enumerate(seen):
            switch = self._switch(f"{sort}>={size}")
            above = seen[number + 1] if number + 1 < len(seen) else None
            if self.room is None:  # rounded down to this size
                low, high = size, above or seen[-1] + 1
            else:  # rounded up to it
                low, high = (seen[number - 1] + 1 if number else 1), size + 1
            self._switched_by(switch, lambda lot, k: low <= lot.buffered[sort][k] < high)  # noqa: B023
            if steps:
                self._at_most(0.0, [(switch, 1.0), (steps[-1][1], -1.0)])
            steps.append((size, switch))
        return steps

    def _largest(self, sort: str, factor: float) -> Terms:
        """`factor` times the largest size of a sort."""
        sizes = [0, *(size for size, _ in self._levels[sort])]
        return [
            (switch, factor * (size - below))
            for below, (size, switch) in zip(sizes, self._levels[sort], strict=False)
        ]

    def _per_item(self, amount: Callable[[Lot, int], float]) -> Terms:
        return [
            (variable, value)
            for lot, row in zip(self.stock.lots, self._counts, strict=True)
            for k, variable in enumerate(row)
            if (value := float(amount(lot, k)))
        ]

    def _limit_phases(self) -> None:
        """Every phase takes what each lane needs, and what lanes that share a link need together."""
        problem, lanes = self.problem, self.problem.lanes
        # A link slower than one way at a time would be a concave limit; one way at a time bounds it.
        shared = min(1.0, 1.0 / lanes.duplex_factor - 1.0)
        still = self.room is Room.NONE
        spills = updates_spill(problem, spills=self.spills) and not still
        for lane in SPILLING_LANES if spills else ():
            both = [*self._lane_terms(FORWARD, lane), *self._lane_terms(BACKWARD, lane)]
            self._phases_at_least((FORWARD, BACKWARD), 0.0, both)
        for phase in range(NUM_PHASES):
            alone = [self._lane_terms(phase, lane) for lane in range(len(LANES))]
            gpu = self._compute[phase][_GPU]
            limits = [
                [*alone[_H2D], *((v, shared * s) for v, s in alone[_D2H])],
                [*alone[_D2H], *((v, shared * s) for v, s in alone[_H2D])],
            ]
            if not (spills and phase == BACKWARD):
                limits += [alone[lane] for lane in SPILLING_LANES]
            if lanes.ssd_simplex:
                limits.append([*alone[_READ], *alone[_WRITE]])
            else:
                limits += [alone[_READ], alone[_WRITE]]
            if phase == optimizer_phase(problem.overlap):
                limits += self._chain_terms()
            self._phase_at_least(phase, gpu, alone[_GPU])
            for terms in limits:
                if still:
                    self._phase_at_least(phase, gpu, [*alone[_GPU], *terms])
                elif terms:
                    self._phase_at_least(phase, 0.0, terms)

    def _phase_at_least(self, phase: int, constant_s: float, terms: Terms) -> None:
        self._phases_at_least((phase,), constant_s, terms)

    def _phases_at_least(self, phases: Sequence[int], constant_s: float, terms: Terms) -> None:
        """A row: these phases together take `constant_s` and the terms, in seconds."""
        shares = [(v, s / self._scale_s) for v, s in terms]
        least = _NEGLIGIBLE if self.room is None else 0.0  # of equal plans they tell which is best
        self._at_most(
            -constant_s / self._scale_s,
            [
                *((v, n) for v, n in shares if n > least),
                *((self._seconds[phase], -1.0) for phase in phases),
            ],
        )

    def _lane_terms(self, phase: int, lane: int) -> Terms:
        return self._per_item(lambda lot, k: lot.seconds[k, phase, lane])

    def _chain_terms(self) -> list[Terms]:
        """The optimizer's pipeline through its buffers; with three, Adam alone limits it."""
        read = self._per_item(lambda lot, k: lot.chain[k, 0])
        write = self._per_item(lambda lot, k: lot.chain[k, 1])
        adam = self._per_item(lambda lot, k: lot.chain[k, 2])
        if self.problem.overlap is Overlap.NAIVE:
            return [[*read, *adam, *write]]
        if self.room in (Room.NONE, Room.ITEM):
            return [[*read, *adam], [*read, *write]]
        return []

    def _limit_ssd(self) -> None:
        capacity = self.problem.capacities.ssd_bytes
        if capacity:
            self._at_most(1.0, self._per_item(lambda lot, k: lot.ssd[k] / capacity))

    def _limit_dram(self) -> Terms:
        """Items, gradients and buffers fit; returns the terms, in bytes."""
        roomy = self.room is not None and self.room.is_wide
        terms = self._per_item(lambda lot, k: lot.dram[k])
        if not self.problem.overlap.waits_for_step:
            terms += self._largest("grad", self._grad_buffers())
        terms += self._largest("state", 3 if roomy else 2)
        terms += self._largest("inbound", 4 if roomy else 2)
        terms += self._largest("outbound", 4 if roomy else 2)
        if self.problem.ssd_bounce_bytes:
            switch = self._switch("on_ssd")
            if self._switched_by(switch, lambda lot, k: lot.ssd[k] > 0):
                terms.append((switch, float(self.problem.ssd_bounce_bytes)))
        capacity = self.problem.capacities.dram_bytes
        # All slots of activations together are whole pages.
        slack = PAGE if self.room is not None and self._levels["swap"] else 0
        room = max(0, capacity - capacity % PAGE if slack else capacity)
        scale = float(capacity or 1)
        self._at_most(room / scale, [(v, n / scale) for v, n in terms])
        return terms

    def _grad_buffers(self) -> int:
        """Buffers for gradients: in a relaxation the least that is allowed."""
        if self.room is None:
            return 2
        open_in: Ints = np.zeros(self.problem.num_stages, dtype=np.int64)
        for lot in self.stock.lots:
            if any(lot.buffered["grad"]):
                for index in lot.group.members:
                    first, last = gradient_interval(self.problem.buckets[index])
                    open_in[last : first + 1] += 1
        return max(2, int(open_in.max())) + (2 if self.room.is_wide else 0)

    def _limit_writes(self) -> None:
        most_a_day = self.problem.max_ssd_bytes_per_day
        if most_a_day is None:
            return
        most_a_step = most_a_day / SECONDS_PER_DAY * self._scale_s
        terms = self._per_item(lambda lot, k: lot.written[k])
        scale = max([most_a_step, *(amount for _, amount in terms)]) or 1.0
        self._at_most(
            0.0,
            [
                *((v, amount / scale) for v, amount in terms),
                *((v, -most_a_step / scale) for v in self._seconds),
            ],
        )

    # ---- the GPU, by position ----

    def _limit_gpu(self, position: int) -> None:
        """At this position: what is used, what is resident besides, windows <= capacity."""
        self.positions.append(position)
        capacity = float(self.problem.capacities.gpu_bytes or 1)
        terms: Terms = [*self._windows[position], *self._gpu_adam[position]]
        for lot, row in zip(self.stock.lots, self._counts, strict=True):
            for presence in lot.presence:
                zeros = int(presence.zeros[position])
                if zeros >= lot.size:
                    continue
                residents = [(row[k], 1.0) for k in presence.places]
                if zeros:
                    more = self._solver.NumVar(0, lot.size, "")
                    self._at_most(zeros, [*residents, (more, -1.0)])
                    residents = [(more, 1.0)]
                terms += [(v, presence.size * n) for v, n in residents]
        free = self.problem.capacities.gpu_bytes - int(self.stock.base[position])
        self._at_most(free / capacity, [(v, n / capacity) for v, n in terms])

    def _usage(self) -> Floats:
        """Bytes on the GPU at every position as counted by this program's rows."""
        used: Floats = self.stock.base.astype(np.float64)
        for lot, row in zip(self.stock.lots, self._counts, strict=True):
            for presence in lot.presence:
                count = sum(row[k].solution_value() for k in presence.places)
                used += presence.size * np.maximum(0.0, count - presence.zeros)
        for position, terms in enumerate(zip(self._windows, self._gpu_adam, strict=True)):
            used[position] += sum(n * v.solution_value() for part in terms for v, n in part)
        return used

    def _violated(self) -> list[int]:
        """Positions without a row that are over capacity, the fullest first, a few."""
        over = self._usage() - self.problem.capacities.gpu_bytes * (1 + _TOLERATED)
        over[self.positions] = 0.0
        return [int(at) for at in np.argsort(-over, kind="stable")[:_NEW_POSITIONS] if over[at] > 0]

    def _first_positions(self) -> list[int]:
        """Where the GPU is fullest whatever is decided, and where most residents meet."""
        num_stages, base = self.problem.num_stages, self.stock.base
        halves = (slice(0, num_stages), slice(num_stages, 2 * num_stages))
        fullest = [half.start + int(base[half].argmax()) for half in halves]
        return sorted({*fullest, num_stages - 1, num_stages, 2 * num_stages})

    def _gpu_adam_bytes(self) -> list[Terms]:
        """By position: temporaries of updates on the GPU, if any state is there."""
        num_stages = self.problem.num_stages
        terms: list[Terms] = [[] for _ in range(2 * num_stages + 1)]
        if not self.problem.gpu_adam_workspace_bytes:
            return terms
        size = float(self.problem.gpu_adam_workspace_bytes)
        always, switch = self._switch("streams"), self._switch("gpu_adam")
        if self._switched_by(always, _is_streamed):
            self._at_most(0.0, [(always, 1.0), (switch, -1.0)])
            terms = [[(always, size)] for _ in terms]
        if self._switched_by(switch, _has_gpu_state):
            waits = self.problem.overlap.waits_for_step
            turn = [2 * num_stages] if waits else range(num_stages, 2 * num_stages)
            for position in turn:
                terms[position] = [(switch, size)]
        return terms

    def _window_terms(self) -> list[Terms]:
        """By position: bytes in windows, each full as far as there is anything to move."""
        num_stages = self.problem.num_stages
        grad = self._window("grad", WINDOW_SHARE, self._moved("grad"))
        ring = self._largest("stream", STREAM_BYTES)
        terms: list[Terms] = [list(ring) for _ in range(2 * num_stages + 1)]
        for position in range(num_stages, 2 * num_stages):
            terms[position] += grad
        if self.room in (None, Room.NONE):
            return terms
        closed = set(tight_positions(self.problem)) if self.room is Room.AROUND else set()
        for sort, share in (("fetch", FETCH_SHARE), ("out", WINDOW_SHARE), ("in", WINDOW_SHARE)):
            moved = self._moved(sort)
            levels = self._levels["fetch" if sort == "fetch" else "swap"]
            window = self._window("fetch" if sort == "fetch" else "swap", share, moved)
            widest = max(
                [size for size, _ in levels],
                default=0,
            )
            if self.room is not None and self.room.is_wide:
                widest = max(widest, self._stage_window_bytes(share, moved))
            for half in (slice(0, num_stages), slice(num_stages, 2 * num_stages)):
                total = np.cumsum(moved[half])
                waiting = total - moved[half] if sort == "out" else total[-1] - total
                for at in np.flatnonzero(waiting):
                    if sort != "out" and half.start + int(at) in closed:
                        continue
                    if waiting[at] < widest:
                        terms[half.start + int(at)].append((levels[0][1], float(waiting[at])))
                    else:
                        terms[half.start + int(at)] += window
        return terms

    def _window(self, sort: str, share: int, moved: Ints) -> Terms:
        """Bytes of one window: the largest item, or in a wide Room up to a stage's worth."""
        if self.room is None or not self.room.is_wide or not self._levels[sort]:
            return self._largest(sort, 1.0)
        capacity = float(self.problem.capacities.gpu_bytes or 1)
        wide = self._stage_window_bytes(share, moved)
        # In shares of the capacity: a solver takes coefficients below 1e-9 for nothing.
        window = self._solver.NumVar(0, self._infinity, f"window {sort}")
        self._at_most(0.0, [*self._largest(sort, 1.0 / capacity), (window, -1.0)])
        self._at_most(0.0, [(self._levels[sort][0][1], wide / capacity), (window, -1.0)])
        return [(window, capacity)]

    def _stage_window_bytes(self, share: int, moved: Ints) -> int:
        return min(int(moved.max()), self.problem.capacities.gpu_bytes // share)

    def _moved(self, sort: str) -> Ints:
        """Bytes that move for each position's sake if all that may move does."""
        num_stages = self.problem.num_stages
        moved: Ints = np.zeros(2 * num_stages, dtype=np.int64)
        for lot in self.stock.lots:
            largest = max(lot.buffered["swap" if sort in ("out", "in") else sort], default=0)
            for index in lot.group.members if largest else ():
                for position in _moves_at(self.problem, self.stock, lot, index, sort):
                    moved[position] += largest
        return moved


def _whole(row: Sequence[float], total: int) -> tuple[float, ...]:
    """Whole numbers that add up to `total`, each near its own: the largest remainders round up."""
    floors = [math.floor(n + 1e-9) for n in row]
    by_remainder = sorted(range(len(row)), key=lambda k: (floors[k] - row[k], k))
    for k in by_remainder[: total - sum(floors)]:
        floors[k] += 1
    return tuple(floors)


def _moves_at(problem: Problem, held: Stock, lot: Lot, index: int, sort: str) -> list[int]:
    """Positions for whose sake an item moves: its first use of a pass, or its last (out)."""
    num_stages = problem.num_stages
    if not lot.group.is_bucket:
        last = problem.activations[index].last_forward_stage
        return [last if sort == "out" else 2 * num_stages - 1 - held.kept[index][0]]
    bucket = problem.buckets[index]
    if sort == "grad":
        assert bucket.grad_stage is not None
        return [2 * num_stages - 1 - bucket.grad_stage]
    found = list(bucket.forward_stages[:1])
    return [*found, *(2 * num_stages - 1 - s for s in bucket.backward_stages[-1:])]


def _has_gpu_state(lot: Lot, k: int) -> bool:
    place = lot.places[k]
    return lot.trainable and isinstance(place, BucketPlace) and place.state is Place.GPU


def _is_streamed(lot: Lot, k: int) -> bool:
    place = lot.places[k]
    return isinstance(place, BucketPlace) and place.streamed
