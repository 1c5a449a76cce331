"""Moves of groups of items, and what making them does to one placement.

Items that differ in name and stage only gain the same by the same move, so one of each group is
scored, all groups in one vectorised call, and 128 layers cost what 8 do. Where hardly two items are
alike, those of about the same size share a group; what a move costs is still each item's own.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from lohan_fx.planner.choice import Excess, Scarce, excess_bytes
from lohan_fx.planner.least import is_redone_in_place
from lohan_fx.planner.ledger import Ledger, Room
from lohan_fx.planner.places import activation_places, bucket_places, streamed_places
from lohan_fx.planner.problem import Activation, Bucket, BucketPlace, Place, Problem
from lohan_fx.planner.solution import Forced, Windows
from lohan_fx.planner.traffic import (
    TRAFFIC_WIDTH,
    Floats,
    Ints,
    activation_traffic,
    bucket_traffic,
    lane_seconds,
    phase_seconds,
    spare_bytes,
    state_section_bytes,
    weight_section_bytes,
    written_bytes,
)

# Share of every lane's busy seconds in the score. Small enough never to outweigh a real gain of the
# step (lanes are at most seven), large enough to stand out from rounding.
_TIE_SHARE = 1e-4
NO_GAIN = 1e-12
# A move is given up for one spending of a tier after this many members of its group were refused;
# the others are alike but for the stage.
_MOST_REFUSALS = 12
# Of a group with more members than this, several are moved before moves are scored again.
_SHARE_AT_ONCE = 12
# Of more moves than this, several are made before they are scored again.
_ROWS_AT_ONCE = 1000

AnyPlace = BucketPlace | Place


# Above this many groups of identical items, items of about the same size are grouped.
_MOST_GROUPS = 150
_LEAST_WIDTH = 1.02


@dataclass(frozen=True, slots=True)
class Group:
    """Items with the same moves and about the same gains, in the order in which they are moved.

    `typical` is the one whose gains and sizes stand for all.
    """

    is_bucket: bool
    members: tuple[int, ...]
    typical: int


@dataclass(frozen=True, slots=True)
class Move:
    group: int
    source: AnyPlace
    target: AnyPlace


def group_items(problem: Problem, forced: Forced, *, exact: bool = False) -> list[Group]:
    """Free items by what determines their gains.

    Buckets: the earliest stage first, since its gradients come last and its weights are read first.
    Activations: the latest first, since it is kept for the shortest time. Where that makes too many
    groups and they need not be `exact`, sizes within a factor of one another count as the same; the
    factor is `_LEAST_WIDTH` squared as often as it takes.
    """
    groups = _grouped(problem, forced, 0.0)
    width = math.log(_LEAST_WIDTH)
    while not exact and len(groups) > _MOST_GROUPS and width < _MOST_WIDTH:
        groups = _grouped(problem, forced, width)
        width *= 2
    return groups


# The logarithm of a factor that no two sizes in use differ by.
_MOST_WIDTH = 64.0


def _grouped(problem: Problem, forced: Forced, width: float) -> list[Group]:
    """Free items, grouped by sizes that are the same, or within a factor of exp(`width`)."""
    by_key: dict[tuple[object, ...], list[int]] = {}
    for b in problem.buckets:
        if b.index not in forced.buckets:
            by_key.setdefault(_bucket_key(problem, b, width), []).append(b.index)
    for a in problem.activations:
        if a.index not in forced.activations:
            by_key.setdefault(_activation_key(problem, a, width), []).append(a.index)
    return _in_order(problem, by_key)


def pinned_groups(problem: Problem, forced: Forced) -> list[tuple[Group, AnyPlace]]:
    """Forced items in groups as of `group_items`, with the place of each."""
    by_key: dict[tuple[object, ...], list[int]] = {}
    for index, place in forced.buckets.items():
        by_key.setdefault((*_bucket_key(problem, problem.buckets[index]), place), []).append(index)
    for index, kept in forced.activations.items():
        key = _activation_key(problem, problem.activations[index])
        by_key.setdefault((*key, kept), []).append(index)
    groups = _in_order(problem, by_key)
    return [
        (g, forced.buckets[g.typical] if g.is_bucket else forced.activations[g.typical])
        for g in groups
    ]


def _bucket_key(problem: Problem, b: Bucket, width: float = 0.0) -> tuple[object, ...]:
    reads = bool(b.forward_stages), bool(b.backward_stages)
    size = (_size_class(n, width) for n in (b.numel, b.weight_bytes, b.grad_bytes, b.state_bytes))
    return (True, *size, b.has_master, b.trainable, problem.may_speculate(b.index), *reads)


def _activation_key(problem: Problem, a: Activation, width: float = 0.0) -> tuple[object, ...]:
    redone = a.can_recompute, is_redone_in_place(problem, a)
    size = _size_class(a.bytes, width), _size_class(a.recompute_s, width)
    return (False, *size, a.can_swap, *redone)


def _size_class(amount: float, width: float) -> float:
    return math.floor(math.log(amount) / width) if width and amount > 0 else amount


def _in_order(problem: Problem, by_key: dict[tuple[object, ...], list[int]]) -> list[Group]:
    groups: list[Group] = []
    for kind, members in by_key.items():
        if kind[0]:
            members.sort(key=lambda i: _first_stage(problem.buckets[i]))
        else:
            members.sort(key=lambda i: -problem.activations[i].forward_stage)
        groups.append(
            Group(bool(kind[0]), tuple(members), _typical(problem, bool(kind[0]), members))
        )
    return groups


def _typical(problem: Problem, is_bucket: bool, members: Sequence[int]) -> int:
    """The member of the middle size."""
    if is_bucket:
        by_size = sorted(members, key=lambda i: problem.buckets[i].weight_bytes)
    else:
        by_size = sorted(members, key=lambda i: problem.activations[i].bytes)
    return by_size[len(members) // 2]


def _first_stage(bucket: Bucket) -> int:
    return min((*bucket.forward_stages, *bucket.backward_stages), default=0)


def item_bytes(
    problem: Problem, item: Bucket | Activation, place: AnyPlace
) -> tuple[int, int, int]:
    """Resident bytes of an item in (GPU, DRAM, SSD), for scoring; windows are not in it."""
    found = {Place.GPU: 0, Place.DRAM: 0, Place.SSD: 0, Place.RECOMPUTE: 0}
    if isinstance(item, Bucket):
        assert isinstance(place, BucketPlace)
        on_ssd = Place.SSD
        found[place.weight] += (
            weight_section_bytes(item) if place.weight is on_ssd else item.weight_bytes
        )
        found[place.state] += (
            state_section_bytes(item) if place.state is on_ssd else item.state_bytes
        )
        found[Place.DRAM] += spare_bytes(problem, item, place)
    else:
        assert isinstance(place, Place)
        found[place] += item.bytes
    return found[Place.GPU], found[Place.DRAM], found[Place.SSD]


class Search:
    """One walk through the placements of one problem at one width of windows.

    `streams`: states may pass through the GPU for their updates. `spills`: see `updates_spill`.
    """

    def __init__(
        self,
        problem: Problem,
        forced: Forced,
        room: Room,
        *,
        streams: bool = False,
        spills: bool = False,
    ) -> None:
        self.problem = problem
        self.room = room
        self.streams = streams
        self.spills = spills
        self.groups = group_items(problem, forced)
        self.moves: list[Move] = []
        traffic: list[Floats] = []
        sizes: list[list[int]] = []
        for number, group in enumerate(self.groups):
            item = self._item(group, group.typical)
            places = self._places(item)
            costs = {place: self._traffic(item, place) for place in places}
            held = {place: item_bytes(problem, item, place) for place in places}
            for source in places:
                for target in places:
                    if source != target:
                        self.moves.append(Move(number, source, target))
                        traffic.append(costs[target] - costs[source])
                        more = [t - s for t, s in zip(held[target], held[source], strict=True)]
                        sizes.append([*more, round(written_bytes(traffic[-1]))])
        self.traffic = np.array(traffic).reshape(-1, TRAFFIC_WIDTH)
        self.sizes: Ints = np.array(sizes, dtype=np.int64).reshape(-1, len(Scarce))

    def _item(self, group: Group, index: int) -> Bucket | Activation:
        return self.problem.buckets[index] if group.is_bucket else self.problem.activations[index]

    def _places(self, item: Bucket | Activation) -> Sequence[AnyPlace]:
        if isinstance(item, Bucket):
            places: Sequence[AnyPlace] = bucket_places(item)
            if self.streams:
                places = [*places, *streamed_places(self.problem, item)]
        else:
            places = activation_places(item)
            if not is_redone_in_place(self.problem, item):
                places = [p for p in places if p is not Place.RECOMPUTE]
        if not self.problem.capacities.ssd_bytes:
            places = [p for p in places if Place.SSD not in tiers(p)]
        return places

    def _traffic(self, item: Bucket | Activation, place: AnyPlace) -> Floats:
        if isinstance(item, Bucket):
            assert isinstance(place, BucketPlace)
            return bucket_traffic(self.problem, item, place)
        assert isinstance(place, Place)
        return activation_traffic(item, place)

    def potential(self, ledger: Ledger, traffic: Floats) -> Floats:
        """What the search lowers, for traffic vectors [N, TRAFFIC_WIDTH]: step seconds, and a
        little of every lane's."""
        windows = ledger.windows(self.room)
        phases = self._phase_s(windows, traffic)
        busy = lane_seconds(self.problem.lanes, traffic)
        total: Floats = phases.sum(axis=1) + _TIE_SHARE * busy.sum(axis=(1, 2))
        return total

    def gains(self, ledger: Ledger, rows: Ints) -> Floats:
        """Seconds that one item of each move in `rows` saves now."""
        at = ledger.traffic[None, :]
        stacked = np.concatenate([at, at + self.traffic[rows]])
        value = self.potential(ledger, stacked)
        with np.errstate(invalid="ignore"):
            gain: Floats = np.nan_to_num(value[0] - value[1:], nan=0.0, posinf=1e30, neginf=-1e30)
        return gain

    def steps(self, ledger: Ledger, rows: Ints) -> Floats:
        """Seconds of step time alone that one item of each move in `rows` saves now."""
        at = ledger.traffic[None, :]
        stacked = np.concatenate([at, at + self.traffic[rows]])
        windows = ledger.windows(self.room)
        phases = self._phase_s(windows, stacked)
        value = phases.sum(axis=1)
        with np.errstate(invalid="ignore"):
            saved: Floats = np.nan_to_num(value[0] - value[1:], nan=0.0)
        return saved

    def step_s(self, ledger: Ledger) -> float:
        """Seconds of the step as placed now."""
        windows = ledger.windows(self.room)
        return float(self._phase_s(windows, ledger.traffic[None, :]).sum())

    def _phase_s(self, windows: Windows, traffic: Floats) -> Floats:
        ahead = self.room is not Room.NONE
        return phase_seconds(self.problem, windows, ahead, traffic, spills=self.spills)

    def excess(self, ledger: Ledger) -> Excess:
        """Bytes over what there is of each scarce thing."""
        return excess_bytes(
            self.problem,
            ledger.peaks(ledger.windows(self.room)),
            round(written_bytes(ledger.traffic)),
            lambda: self.step_s(ledger),
        )

    def run(
        self,
        ledger: Ledger,
        rows: Ints,
        score: Callable[[Floats], Floats],
        accept: Callable[[Excess], bool],
        done: Callable[[], bool],
        limit: int,
        measure: Callable[[Ledger, Ints], Floats] | None = None,
    ) -> None:
        """Make the best-scoring move among `rows` again and again.

        `score` maps gains (or what `measure` finds instead) to scores, -inf for a move not wanted.
        `accept` sees the excess after a move and may undo it; an undone move of one item is not
        tried again in this run.
        """
        cursors = Cursors(self, ledger, rows)
        measure = measure or self.gains
        at_once = 1 + len(rows) // _ROWS_AT_ONCE
        for _ in range(limit):
            if done():
                return
            alive = cursors.alive()
            if not alive.size:
                return
            gains = measure(ledger, rows)
            scores = score(gains)
            usable = alive[scores[alive] > -np.inf]
            if not usable.size:
                return
            top = scores[usable].max()
            near = usable[scores[usable] >= top - abs(top) * 1e-9]
            best = int(near[np.lexsort((self.sizes[rows[near], 1], self.sizes[rows[near], 2]))[0]])
            more = len(self.groups[cursors.moves[best].group].members) // _SHARE_AT_ONCE
            while self._try(ledger, cursors, best, accept) and more > 0 and not done():
                # Where nothing else has become the bottleneck, the same move is the best again.
                if not self._gains_as_before(ledger, rows, best, gains, measure):
                    break
                more -= 1
            if at_once == 1:
                continue
            # Of many groups of few members, the next best too.
            for at in map(int, usable[np.argsort(-scores[usable], kind="stable")[:at_once]]):
                if done():
                    return
                if (
                    at != best
                    and cursors.current(at) is not None
                    and self._gains_as_before(ledger, rows, at, gains, measure)
                ):
                    self._try(ledger, cursors, at, accept)

    def _gains_as_before(
        self,
        ledger: Ledger,
        rows: Ints,
        at: int,
        gains: Floats,
        measure: Callable[[Ledger, Ints], Floats],
    ) -> bool:
        before = float(gains[at])
        now = float(measure(ledger, rows[at : at + 1])[0])
        return now >= before - abs(before) * 1e-6

    def _try(
        self,
        ledger: Ledger,
        cursors: Cursors,
        at: int,
        accept: Callable[[Excess], bool],
    ) -> bool:
        """Make one move of the row at `at`, on the first of its members that accepts it."""
        move = cursors.moves[at]
        group = self.groups[move.group]
        while (index := cursors.current(at)) is not None:
            put(ledger, group, index, move.target)
            excess = self.excess(ledger)
            if accept(excess):
                cursors.entered(move.group, move.target, index)
                return True
            put(ledger, group, index, move.source)
            # Only on the GPU does it matter which member it is.
            cursors.skip(at, all_alike=not excess[Scarce.GPU])
        return False


def put(ledger: Ledger, group: Group, index: int, place: AnyPlace) -> None:
    if isinstance(place, BucketPlace):
        ledger.move_bucket(index, place)
    else:
        ledger.move_activation(index, place)


def tiers(place: AnyPlace) -> tuple[Place, ...]:
    return (place.weight, place.state) if isinstance(place, BucketPlace) else (place,)


class Cursors:
    """For each move, the next member of its group that stands at its source and was not refused."""

    def __init__(self, search: Search, ledger: Ledger, rows: Ints) -> None:
        self._ledger = ledger
        self._groups = search.groups
        self.moves = [search.moves[row] for row in rows]
        self._at = [0] * len(self.moves)
        self._refused: list[set[int]] = [set() for _ in self.moves]
        self._given_up = [False] * len(self.moves)
        self._rank: dict[int, dict[int, int]] = {}
        self._of_group: dict[int, list[int]] = {}
        self._from: dict[tuple[int, AnyPlace], list[int]] = {}
        for k, move in enumerate(self.moves):
            self._of_group.setdefault(move.group, []).append(k)
            self._from.setdefault((move.group, move.source), []).append(k)
        self._alive = np.zeros(len(self.moves), dtype=np.bool_)
        self._changed = set(range(len(self.moves)))  # moves for which _alive may be wrong

    def current(self, k: int) -> int | None:
        """The member that the move numbered `k` would move; None if there is none left."""
        if self._given_up[k]:
            return None
        move, refused = self.moves[k], self._refused[k]
        group = self._groups[move.group]
        buckets, activations = self._ledger.buckets, self._ledger.activations
        while self._at[k] < len(group.members):
            index: int = group.members[self._at[k]]
            now = buckets[index] if group.is_bucket else activations[index]
            if now == move.source and index not in refused:
                return index
            self._at[k] += 1
        return None

    def skip(self, k: int, all_alike: bool) -> None:
        """The current member of move `k` was refused, and with it the rest if they are all alike."""
        index = self.current(k)
        if index is not None:
            self._refused[k].add(index)
        if all_alike or len(self._refused[k]) >= _MOST_REFUSALS:
            self._given_up[k] = True
        self._changed.add(k)

    def entered(self, group: int, place: AnyPlace, index: int) -> None:
        """A member arrived at `place`: moves from there may take it."""
        if group not in self._rank:
            self._rank[group] = {m: k for k, m in enumerate(self._groups[group].members)}
        for k in self._from.get((group, place), ()):
            self._at[k] = min(self._at[k], self._rank[group][index])
        self._changed.update(self._of_group[group])

    def alive(self) -> Ints:
        """Numbers of the moves that have a member left."""
        for k in self._changed:
            self._alive[k] = self.current(k) is not None
        self._changed.clear()
        return np.flatnonzero(self._alive)
