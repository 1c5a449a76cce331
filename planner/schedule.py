"""The rules of order: at which position of a pass each move stands.

The compiler applies them to the nodes of a graph, the simulator to the parts of a stage, so that
what is predicted is what runs. A position is "before the piece of compute with this number"; at one
position, what ends comes first, then what starts ahead of its use, then what must have arrived:

    release, grad, offload, offload_wait   values whose last reader has just been passed
    fetch, reload                          copies issued ahead of their use
    wait, reload_wait                      values the next piece of compute reads

[Note: windows] A copy in is issued as early as a window in bytes allows: value j is fetched just
before the wait of value i when the values after i up to and including j fit the window. So the bytes
that have been issued and not waited for never exceed the window (or one value, where that is
larger). A copy out is waited for when the next one would leave more than a window on its way,
and at once where it is larger than the window.
"""

from __future__ import annotations

import enum
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple


class Phase(enum.IntEnum):
    """Order of moves at one position; see the module docstring."""

    ENDS = 0
    AHEAD = 1
    ARRIVES = 2


class Placed(NamedTuple):
    """One move at its position. `arg` is a bucket, a slot or a parameter, by the sort of `op`."""

    position: int
    phase: Phase
    op: str
    arg: int


class Use(NamedTuple):
    """A value that is waited for at a position, or leaves at one. Sorts in program order."""

    position: int
    arg: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class WeightUse:
    """One pass's use of a bucket's weights.

    The first piece of compute that reads them is at `first`, the last at `last`, whose stage ends
    before `stage_end`. `resident` weights are on the GPU for good; `refreshed` ones are, too, and
    the CPU updates them.
    """

    bucket: int
    first: int
    last: int
    stage_end: int
    nbytes: int
    resident: bool = False
    refreshed: bool = False


def issue_positions(waits: Sequence[Use], window_bytes: int) -> list[int]:
    """Where the copy of each of `waits`, given in order, is issued; see [Note: windows]."""
    positions = []
    first, ahead = 0, 0
    for index, use in enumerate(waits):
        ahead += use.nbytes
        while first < index and ahead > window_bytes:
            ahead -= waits[first].nbytes
            first += 1
        # Everything in waits[first:index + 1] may be on its way together, so this one starts
        # once what came before waits[first] has been waited for.
        positions.append(0 if first == 0 and ahead <= window_bytes else waits[first].position)
    return positions


def weight_moves(uses: Sequence[WeightUse], window_bytes: int, *, backward: bool) -> list[Placed]:
    """Fetch, wait and release of every bucket that a pass reads, resident ones too."""
    placed, waits = [], []
    for use in uses:
        # Nothing to wait for, unless the forward must see the CPU's update: that wait may block the
        # host, so it stays at the use.
        early = use.resident and (backward or not use.refreshed)
        waits.append(Use(0 if early else use.first, use.bucket, 0 if use.resident else use.nbytes))
        # A resident bucket has no memory to give back: its stage is not cut for it.
        end = use.stage_end if use.resident else use.last + 1
        placed.append(Placed(end, Phase.ENDS, "release", use.bucket))
    return placed + _arrivals("fetch", "wait", waits, window_bytes)


def reload_moves(waits: Iterable[Use], window_bytes: int) -> list[Placed]:
    """Reload and reload_wait of swapped activations; positions are starts of stages."""
    return _arrivals("reload", "reload_wait", waits, window_bytes)


def _arrivals(issue: str, wait: str, waits: Iterable[Use], window_bytes: int) -> list[Placed]:
    ordered = sorted(waits)
    positions = issue_positions(ordered, window_bytes)
    return [
        *(
            Placed(position, Phase.AHEAD, issue, use.arg)
            for position, use in zip(positions, ordered, strict=True)
        ),
        *(Placed(use.position, Phase.ARRIVES, wait, use.arg) for use in ordered),
    ]


def offload_moves(leaving: Iterable[Use], end: int, window_bytes: int) -> list[Placed]:
    """Offload and offload_wait of swapped activations; positions are ends of stages.

    `end` is the end of the pass, where what is still on its way is waited for.
    """
    placed = []
    in_flight: deque[Use] = deque()
    behind = 0
    for use in sorted(leaving):
        while in_flight and behind + use.nbytes > window_bytes:
            oldest = in_flight.popleft()
            behind -= oldest.nbytes
            placed.append(Placed(use.position, Phase.ENDS, "offload_wait", oldest.arg))
        placed.append(Placed(use.position, Phase.ENDS, "offload", use.arg))
        if use.nbytes > window_bytes:
            placed.append(Placed(use.position, Phase.ENDS, "offload_wait", use.arg))
            continue
        in_flight.append(use)
        behind += use.nbytes
    placed += [Placed(end, Phase.ENDS, "offload_wait", use.arg) for use in in_flight]
    return placed


def gradient_move(made_at: int, arg: int) -> Placed:
    """A gradient is handed over right after the piece of compute that makes it."""
    return Placed(made_at + 1, Phase.ENDS, "grad", arg)


def in_program_order(moves: Iterable[Placed]) -> list[Placed]:
    """By position and phase; at one position and phase, as given."""
    return sorted(moves, key=lambda move: (move.position, move.phase))
