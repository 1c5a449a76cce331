"""The greedy solver: start with as little as possible on the GPU, then buy speed with bytes.

Moves are of groups: items that differ in name and stage only gain the same by the same move, so one
of each group is scored, all groups in one vectorised call, and 128 layers cost what 8 do.

The score of a move is the step time it saves per byte of the tier it spends. Where a step is
limited by one lane, relieving any other saves nothing yet; a small share of all lanes' busy time is
part of the score so that ties go to the move that moves less.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from lohan_fx.errors import InfeasiblePlan
from lohan_fx.planner.cost import (
    TRAFFIC_WIDTH,
    Floats,
    Ints,
    Ledger,
    Room,
    activation_places,
    activation_traffic,
    bucket_places,
    bucket_traffic,
    lane_seconds,
    phase_seconds,
    predict,
    state_section_bytes,
    weight_section_bytes,
)
from lohan_fx.planner.problem import (
    Activation,
    Bucket,
    BucketPlace,
    NothingFits,
    Place,
    Problem,
)
from lohan_fx.planner.solution import Forced, Prediction, Solution

# Share of every lane's busy seconds in the score. Small enough never to outweigh a real gain of the
# step (lanes are at most seven), large enough to stand out from rounding.
_TIE_SHARE = 1e-4
_NO_GAIN = 1e-12
# A move is given up for one spending of a tier after this many members of its group were refused;
# the others are alike but for the stage.
_MOST_REFUSALS = 12
# Rounds of giving up GPU bytes and spending them again; it ends with the first that gains nothing.
_MOST_EXCHANGES = 4

AnyPlace = BucketPlace | Place


class _Spend(enum.IntEnum):
    """The tier whose bytes a phase of the search spends."""

    GPU = 0
    DRAM = 1
    SSD = 2


_ORDERS: tuple[tuple[_Spend, ...], ...] = (
    (_Spend.GPU, _Spend.DRAM, _Spend.SSD, _Spend.GPU, _Spend.DRAM),
    (_Spend.DRAM, _Spend.GPU, _Spend.DRAM, _Spend.SSD, _Spend.GPU),
)


@dataclass(frozen=True, slots=True)
class _Group:
    """Items with the same moves and the same gains, in the order in which they are moved."""

    is_bucket: bool
    members: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class _Move:
    group: int
    source: AnyPlace
    target: AnyPlace


def greedy(problem: Problem, forced: Forced | None = None) -> Solution:
    """A plan that fits, fast by greedy choice.

    Raises NothingFits, with the least each tier must hold, where none is found, and InfeasiblePlan
    for a forced placement that no plan can have.
    """
    forced = forced or Forced()
    _check_forced(problem, forced)
    best = _all_on_gpu(problem, forced)
    if best is None:
        for room in sorted(Room, reverse=True):
            best = _best(problem, forced, room)
            if best is not None:
                break
    if best is None:
        raise NothingFits(_why_not(problem, forced), problem, least_bytes(problem, forced))
    bucket_reasons, activation_reasons = _reasons(problem, best, forced)
    return Solution(
        policy="greedy",
        buckets=best.buckets,
        activations=best.activations,
        windows=best.windows,
        predicted=best.predicted,
        bucket_reasons=bucket_reasons,
        activation_reasons=activation_reasons,
    )


def _rank(solution: Solution) -> tuple[float, int, int]:
    predicted = solution.predicted
    # Steps within a part in a million are the same; then fewer SSD writes, then less DRAM.
    step = float(f"{predicted.step_s:.6e}")
    return step, predicted.ssd_bytes_written_per_step, predicted.peak_bytes["dram"]


# ---- starting points ----


def _check_forced(problem: Problem, forced: Forced) -> None:
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
        if place not in bucket_places(bucket):
            allowed = "; ".join(str(p) for p in bucket_places(bucket))
            raise InfeasiblePlan(f"bucket {bucket.name!r} cannot have {place}; it can: {allowed}")
    for index, kept in forced.activations.items():
        activation = problem.activations[index]
        if kept not in activation_places(activation):
            allowed = ", ".join(activation_places(activation))
            raise InfeasiblePlan(
                f"activation {activation.name!r} cannot be placed {kept!s}; it can be: {allowed}"
            )


def _is_redone_in_place(problem: Problem, activation: Activation) -> bool:
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


def _starts(problem: Problem, forced: Forced) -> list[Ledger]:
    """Plans to begin the search with, each with the least on the GPU.

    One streams from DRAM, one from SSD. The buffers between SSD and the rest are as large as the
    largest bucket that passes through them, so a few large ones (an embedding) may do better in
    DRAM; the second plan is the one with the least DRAM over how many of those it keeps there.
    """
    from_dram = _start(problem, forced, Place.DRAM)
    if not problem.capacities.ssd_bytes:
        return [from_dram]
    return [_start_with_least_dram(problem, forced), from_dram]


def _start_with_least_dram(problem: Problem, forced: Forced) -> Ledger:
    """Of the plans that stream from SSD, all but some of the largest buckets."""
    sizes = sorted({b.numel for b in problem.buckets}, reverse=True)
    starts = [
        _start(problem, forced, Place.SSD, most_numel=most)
        for most in (None, *sizes[1 : _MOST_OUTLIERS + 1])
    ]
    return min(starts, key=lambda ledger: ledger.dram_bytes(ledger.windows(Room.NONE)))


def _start(
    problem: Problem, forced: Forced, lowest: Place, most_numel: int | None = None
) -> Ledger:
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
        elif _is_redone_in_place(problem, a):
            activations.append(Place.RECOMPUTE)
        elif a.can_swap:
            activations.append(lowest)
        else:
            activations.append(Place.GPU)
    return Ledger(problem, buckets, activations)


def _all_on_gpu(problem: Problem, forced: Forced) -> Solution | None:
    """The plan with everything on the GPU, if it fits."""
    on_gpu = BucketPlace(Place.GPU, Place.GPU)
    ledger = Ledger(
        problem,
        [forced.buckets.get(b.index, on_gpu) for b in problem.buckets],
        [forced.activations.get(a.index, Place.GPU) for a in problem.activations],
    )
    return _finish(problem, ledger, Room.STAGE)


def _finish(problem: Problem, ledger: Ledger, room: Room) -> Solution | None:
    windows = ledger.windows(room)
    predicted = predict(problem, ledger.buckets, ledger.activations, windows)
    if any(_excess(problem, predicted)):
        return None
    return Solution(
        policy="greedy",
        buckets=tuple(ledger.buckets),
        activations=tuple(ledger.activations),
        windows=windows,
        predicted=predicted,
    )


def _excess(problem: Problem, predicted: Prediction) -> tuple[int, int, int]:
    have = problem.capacities
    peak = predicted.peak_bytes
    return (
        max(0, peak["gpu"] - have.gpu_bytes),
        max(0, peak["dram"] - have.dram_bytes),
        max(0, peak["ssd"] - have.ssd_bytes),
    )


# ---- the search ----


def _groups(problem: Problem, forced: Forced) -> list[_Group]:
    """Free items by what determines their gains.

    Buckets: the earliest stage first, since its gradients come last and its weights are read first.
    Activations: the latest first, since it is kept for the shortest time.
    """
    by_key: dict[tuple[object, ...], list[int]] = {}
    for b in problem.buckets:
        if b.index not in forced.buckets:
            key: tuple[object, ...] = (
                True,
                b.numel,
                b.weight_bytes,
                b.grad_bytes,
                b.state_bytes,
                b.has_master,
                b.trainable,
                bool(b.forward_stages),
                bool(b.backward_stages),
            )
            by_key.setdefault(key, []).append(b.index)
    for a in problem.activations:
        if a.index not in forced.activations:
            key = (False, a.bytes, a.recompute_s, a.can_swap, _is_redone_in_place(problem, a))
            by_key.setdefault(key, []).append(a.index)
    groups: list[_Group] = []
    for kind, members in by_key.items():
        if kind[0]:
            members.sort(key=lambda i: _first_stage(problem.buckets[i]))
        else:
            members.sort(key=lambda i: -problem.activations[i].forward_stage)
        groups.append(_Group(bool(kind[0]), tuple(members)))
    return groups


def _first_stage(bucket: Bucket) -> int:
    return min((*bucket.forward_stages, *bucket.backward_stages), default=0)


def _item_bytes(item: Bucket | Activation, place: AnyPlace) -> tuple[int, int, int]:
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
    else:
        assert isinstance(place, Place)
        found[place] += item.bytes
    return found[Place.GPU], found[Place.DRAM], found[Place.SSD]


class _Search:
    """One walk through the placements of one problem at one width of windows."""

    def __init__(self, problem: Problem, forced: Forced, room: Room) -> None:
        self.problem = problem
        self.room = room
        self.groups = _groups(problem, forced)
        self.capacity = (
            problem.capacities.gpu_bytes,
            problem.capacities.dram_bytes,
            problem.capacities.ssd_bytes,
        )
        self.moves: list[_Move] = []
        traffic: list[Floats] = []
        sizes: list[tuple[int, int, int]] = []
        for number, group in enumerate(self.groups):
            item = self._item(group, group.members[0])
            places = self._places(item)
            costs = {place: self._traffic(item, place) for place in places}
            held = {place: _item_bytes(item, place) for place in places}
            for source in places:
                for target in places:
                    if source != target:
                        self.moves.append(_Move(number, source, target))
                        traffic.append(costs[target] - costs[source])
                        gpu, dram, ssd = (
                            t - s for t, s in zip(held[target], held[source], strict=True)
                        )
                        sizes.append((gpu, dram, ssd))
        self.traffic = np.array(traffic).reshape(-1, TRAFFIC_WIDTH)
        self.sizes: Ints = np.array(sizes, dtype=np.int64).reshape(-1, 3)

    def _item(self, group: _Group, index: int) -> Bucket | Activation:
        return self.problem.buckets[index] if group.is_bucket else self.problem.activations[index]

    def _places(self, item: Bucket | Activation) -> Sequence[AnyPlace]:
        if isinstance(item, Bucket):
            places: Sequence[AnyPlace] = bucket_places(item)
        else:
            places = activation_places(item)
            if not _is_redone_in_place(self.problem, item):
                places = [p for p in places if p is not Place.RECOMPUTE]
        if not self.problem.capacities.ssd_bytes:
            places = [p for p in places if Place.SSD not in _tiers(p)]
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
        phases = phase_seconds(self.problem, windows, self.room is not Room.NONE, traffic)
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
        phases = phase_seconds(self.problem, windows, self.room is not Room.NONE, stacked)
        value = phases.sum(axis=1)
        with np.errstate(invalid="ignore"):
            saved: Floats = np.nan_to_num(value[0] - value[1:], nan=0.0)
        return saved

    def excess(self, ledger: Ledger) -> tuple[int, int, int]:
        """Bytes over capacity in each tier."""
        peaks = ledger.peaks(ledger.windows(self.room))
        gpu, dram, ssd = (max(0, p - c) for p, c in zip(peaks, self.capacity, strict=True))
        return gpu, dram, ssd

    def run(
        self,
        ledger: Ledger,
        rows: Ints,
        score: Callable[[Floats], Floats],
        accept: Callable[[tuple[int, int, int]], bool],
        done: Callable[[], bool],
        limit: int,
        measure: Callable[[Ledger, Ints], Floats] | None = None,
    ) -> None:
        """Make the best-scoring move among `rows` again and again.

        `score` maps gains (or what `measure` finds instead) to scores, -inf for a move not wanted.
        `accept` sees the excess after a move and may undo it; an undone move of one item is not
        tried again in this run.
        """
        cursors = _Cursors(self, ledger, rows)
        for _ in range(limit):
            if done():
                return
            alive = cursors.alive()
            if not alive.size:
                return
            scores = score((measure or self.gains)(ledger, rows))
            usable = alive[scores[alive] > -np.inf]
            if not usable.size:
                return
            top = scores[usable].max()
            near = usable[scores[usable] >= top - abs(top) * 1e-9]
            at = min(near, key=lambda k: (self.sizes[rows[k], 2], self.sizes[rows[k], 1]))
            self._try(ledger, cursors, int(at), accept)

    def _try(
        self,
        ledger: Ledger,
        cursors: _Cursors,
        at: int,
        accept: Callable[[tuple[int, int, int]], bool],
    ) -> None:
        """Make one move of the row at `at`, on the first of its members that accepts it."""
        move = cursors.moves[at]
        group = self.groups[move.group]
        while (index := cursors.current(at)) is not None:
            _place(ledger, group, index, move.target)
            excess = self.excess(ledger)
            if accept(excess):
                cursors.entered(move.group, move.target, index)
                return
            _place(ledger, group, index, move.source)
            # Only on the GPU does it matter which member it is.
            cursors.skip(at, all_alike=not excess[_Spend.GPU])


def _place(ledger: Ledger, group: _Group, index: int, place: AnyPlace) -> None:
    if isinstance(place, BucketPlace):
        ledger.move_bucket(index, place)
    else:
        ledger.move_activation(index, place)


def _tiers(place: AnyPlace) -> tuple[Place, ...]:
    return (place.weight, place.state) if isinstance(place, BucketPlace) else (place,)


class _Cursors:
    """For each move, the next member of its group that stands at its source and was not refused."""

    def __init__(self, search: _Search, ledger: Ledger, rows: Ints) -> None:
        self._ledger = ledger
        self._groups = search.groups
        self.moves = [search.moves[row] for row in rows]
        self._at = [0] * len(self.moves)
        self._refused: list[set[int]] = [set() for _ in self.moves]
        self._given_up = [False] * len(self.moves)
        self._rank = [{m: k for k, m in enumerate(g.members)} for g in self._groups]
        self._from: dict[tuple[int, AnyPlace], list[int]] = {}
        for k, move in enumerate(self.moves):
            self._from.setdefault((move.group, move.source), []).append(k)

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

    def entered(self, group: int, place: AnyPlace, index: int) -> None:
        """A member arrived at `place`: moves from there may take it."""
        for k in self._from.get((group, place), ()):
            self._at[k] = min(self._at[k], self._rank[group][index])

    def alive(self) -> Ints:
        found = [k for k in range(len(self.moves)) if self.current(k) is not None]
        return np.array(found, dtype=np.int64)


def _best(problem: Problem, forced: Forced, room: Room) -> Solution | None:
    """The best plan over starting points and orders of spending, improved; None if nothing fits."""
    search = _Search(problem, forced, room)
    found: list[tuple[Solution, Ledger]] = []
    for order in _ORDERS:
        for ledger in _starts(problem, forced):
            if _repair(search, ledger):
                for spend in order:
                    _buy(search, ledger, spend)
                _polish(search, ledger)
                solution = _finish(problem, ledger, room)
                if solution is not None:
                    found.append((solution, ledger))
    if not found:
        return None
    best, ledger = min(found, key=lambda pair: _rank(pair[0]))
    for _ in range(_MOST_EXCHANGES):
        _exchange(search, ledger)
        solution = _finish(problem, ledger, room)
        if solution is None or _rank(solution) >= _rank(best):
            break
        best = solution
    return best


def _repair(search: _Search, ledger: Ledger) -> bool:
    """Move items out of tiers that are over capacity, SSD first; False if one stays over."""
    for tier in (_Spend.SSD, _Spend.DRAM, _Spend.GPU):
        before = search.excess(ledger)
        if not before[tier]:
            continue
        sheds = np.flatnonzero(search.sizes[:, tier] < 0)
        shed = -search.sizes[sheds, tier]
        state = {"excess": before}

        def accept(
            after: tuple[int, int, int], state: dict[str, tuple[int, int, int]] = state
        ) -> bool:
            now = state["excess"]
            better = sum(after) < sum(now)
            no_worse = all(a <= n for a, n in zip(after, now, strict=True))
            if better and no_worse:
                state["excess"] = after
            return better and no_worse

        def done(state: dict[str, tuple[int, int, int]] = state, tier: int = tier) -> bool:
            return not state["excess"][tier]

        def score(gain: Floats, shed: Ints = shed) -> Floats:
            return gain / shed

        search.run(ledger, sheds, score, accept, done, limit=4 * _num_items(search))
    return not any(search.excess(ledger))


def _buy(search: _Search, ledger: Ledger, spend: _Spend) -> None:
    """Spend the free bytes of one tier, most seconds per byte first, no other tier's."""
    sizes = search.sizes
    others = [tier for tier in _Spend if tier < spend]
    rows = np.flatnonzero((sizes[:, spend] > 0) & (sizes[:, others] <= 0).all(axis=1))
    if spend is _Spend.GPU:
        rows = np.flatnonzero((sizes[:, 0] > 0) & (sizes[:, 1] <= 0) & (sizes[:, 2] <= 0))
    cost = sizes[rows, spend]
    # The GPU is used as far as it goes, so that a budget that is large enough moves nothing at all.
    least = -_NO_GAIN if spend is _Spend.GPU else _NO_GAIN

    def score(gain: Floats) -> Floats:
        return np.where(gain >= least, gain / cost, -np.inf)

    search.run(ledger, rows, score, _fits, _never, limit=8 * _num_items(search))


def _exchange(search: _Search, ledger: Ledger) -> None:
    """Give up what the GPU holds and the step does not need, then spend the room again.

    What was bought early may have been made worthless by what came later: once nothing waits for
    weights, those on the GPU could be recomputed activations instead.
    """
    sizes = search.sizes
    rows = np.flatnonzero((sizes[:, 0] < 0) & (sizes[:, 2] <= 0))
    freed = -sizes[rows, 0]

    def for_nothing(saved: Floats) -> Floats:
        return np.where(saved >= -_NO_GAIN, freed * 1.0, -np.inf)

    limit = 4 * _num_items(search)
    search.run(ledger, rows, for_nothing, _fits, _never, limit, measure=search.steps)
    rows = np.flatnonzero((sizes[:, 0] > 0) & (sizes[:, 2] <= 0))
    cost = sizes[rows, 0]

    def for_time(saved: Floats) -> Floats:
        return np.where(saved > _NO_GAIN, saved / cost, -np.inf)

    search.run(ledger, rows, for_time, _fits, _never, limit, measure=search.steps)
    for spend in _ORDERS[0]:
        _buy(search, ledger, spend)
    _polish(search, ledger)


def _never() -> bool:
    return False


def _polish(search: _Search, ledger: Ledger) -> None:
    """Make any move that still shortens the step."""
    rows = np.arange(len(search.moves))

    def score(gain: Floats) -> Floats:
        return np.where(gain > 1e-9, gain, -np.inf)

    search.run(ledger, rows, score, _fits, _never, limit=2 * _num_items(search))


def _fits(excess: tuple[int, int, int]) -> bool:
    return not any(excess)


def _num_items(search: _Search) -> int:
    return sum(len(group.members) for group in search.groups) + 1


# ---- words ----


def least_bytes(problem: Problem, forced: Forced | None = None) -> dict[str, int]:
    """The least each tier must hold, in bytes.

    `gpu`: with all else streamed, recomputed or swapped, and nothing moving ahead. `dram`: with as
    much on SSD as makes it least. `ssd`: with the DRAM of this problem filled first.
    """
    forced = forced or Forced()
    ledger = _start_with_least_dram(problem, forced)
    gpu, dram, everything = ledger.peaks(ledger.windows(Room.NONE))
    spare = max(0, problem.capacities.dram_bytes - dram)
    return {"gpu": gpu, "dram": dram, "ssd": max(0, everything - spare)}


def _why_not(problem: Problem, forced: Forced) -> str:
    """Per tier, the least that could work and what there is."""
    least = least_bytes(problem, forced)
    have = problem.capacities
    budget = {"gpu": have.gpu_bytes, "dram": have.dram_bytes, "ssd": have.ssd_bytes}
    names = {"gpu": "GPU", "dram": "DRAM", "ssd": "SSD"}
    lines = []
    for tier, name in names.items():
        verdict = "enough" if budget[tier] >= least[tier] else f"{_gb(least[tier])} at least"
        lines.append(f"{name}: {verdict}, the budget has {_gb(budget[tier])}")
    text = "no plan fits the budget. " + "; ".join(lines)
    if all(budget[tier] >= least[tier] for tier in names):
        text += ". Each tier alone would do, together they do not; any one of them larger may help"
    without_ssd = _start(problem, forced, Place.DRAM)
    dram = without_ssd.peaks(without_ssd.windows(Room.NONE))[1]
    text += f". Without any SSD, DRAM would have to hold {_gb(dram)}"
    pinned = [
        *(problem.buckets[i].name for i in forced.buckets),
        *(problem.activations[i].name for i in forced.activations),
    ]
    if pinned:
        text += f". Forced placements: {', '.join(pinned[:8])}"
        text += " and more" if len(pinned) > 8 else ""
    if budget["gpu"] < least["gpu"]:
        text += f". {_gpu_peak_words(problem, forced)}"
    return text + "."


def _gpu_peak_words(problem: Problem, forced: Forced) -> str:
    """Where the GPU is fullest in the plan with the least on it."""
    ledger = _start(problem, forced, Place.SSD)
    used = ledger.gpu_bytes(ledger.windows(Room.NONE))
    position, num_stages = int(used.argmax()), problem.num_stages
    if position >= 2 * num_stages:
        return "The GPU is fullest during the optimizer's turn"
    forward = position < num_stages
    stage = problem.stages[position if forward else 2 * num_stages - 1 - position]
    temporary = stage.forward_workspace_bytes if forward else stage.backward_workspace_bytes
    text = f"The GPU is fullest in the {'forward' if forward else 'backward'} of {stage.name!r}"
    if temporary:
        text += f", whose temporaries alone take {_gb(temporary)}"
    return f"{text}; a smaller batch or shorter sequences make it emptier"


def _gb(num_bytes: int) -> str:
    for scale, unit in ((10**9, "GB"), (10**6, "MB"), (10**3, "kB")):
        if num_bytes >= scale:
            return f"{num_bytes / scale:.2f} {unit}"
    return f"{num_bytes} bytes"


def _reasons(
    problem: Problem, solution: Solution, forced: Forced
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """One line per bucket and per activation: why it is where it is."""
    search = _Search(problem, forced, Room.STAGE)
    words = _move_words(search, problem, solution)
    group_of = {
        (group.is_bucket, member): number
        for number, group in enumerate(search.groups)
        for member in group.members
    }
    resident = _is_resident(solution)

    def reason(is_bucket: bool, index: int, place: AnyPlace) -> str:
        number = group_of.get((is_bucket, index))
        if number is None:
            return "forced"
        if resident:
            return "everything fits on the GPU"
        return words.get((number, place), "there is no other place for it")

    return (
        tuple(reason(True, i, place) for i, place in enumerate(solution.buckets)),
        tuple(reason(False, i, place) for i, place in enumerate(solution.activations)),
    )


def _is_resident(solution: Solution) -> bool:
    """True if nothing moves in a step."""
    return all(p.state is Place.GPU for p in solution.buckets) and all(
        p is Place.GPU for p in solution.activations
    )


def _move_words(
    search: _Search, problem: Problem, solution: Solution
) -> dict[tuple[int, AnyPlace], str]:
    """For each group and place in it, what moving one of its items away would gain or cost."""
    if not search.moves:
        return {}
    ledger = Ledger(problem, solution.buckets, solution.activations)
    steps = search.steps(ledger, np.arange(len(search.moves)))
    least = solution.predicted.step_s * 1e-6
    best: dict[tuple[int, AnyPlace], tuple[float, AnyPlace]] = {}
    for move, saved in zip(search.moves, steps, strict=True):
        key = (move.group, move.source)
        if key not in best or saved > best[key][0]:
            best[key] = (float(saved), move.target)
    words = {}
    for key, (saved, target) in best.items():
        if saved > least:
            words[key] = f"{target!s} would save {saved * 1e3:.3g} ms a step, but has no room"
        elif saved < -least:
            words[key] = f"any other place costs at least {-saved * 1e3:.3g} ms a step more"
        else:
            words[key] = "no other place would make the step shorter"
    return words
