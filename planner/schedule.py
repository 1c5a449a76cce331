"""The rules of order: at which position of a pass each move stands.

The compiler applies them to the nodes of a graph, the simulator to the parts of a stage, so that
what is predicted is what runs. A position is "before the piece of compute with this number"; at one
position, what ends comes first, then what starts ahead of its use, then what must have arrived:

    release, grad, offload, offload_wait   values whose last reader has just been passed
    fetch, reload                          copies issued at the start of the pass, or past a closed stage
    wait, reload_wait                      values the next piece of compute reads, and right after
                                           each wait the copies for which it makes room

[Note: windows] A copy in is issued as early as a window in bytes allows: value j right after the
wait before that of value i, the first such that values i up to and including j fit the window. So
the bytes that have been issued and not waited for never exceed the window. A value larger than the
window is issued just before its own wait. A copy out is waited for when the next one would leave
more than a window on its way, and at once where it is larger than the window.

[Note: closed stages] One stage may need much more of the GPU than the others (a head whose logits are
large); a window that has room beside it is too narrow for all others. So a plan may close windows
during such stages: a value read after the end of one is not issued before that end.

[Note: where activations move] A swapped activation leaves at the first place after its last reader, and
is waited for at the last place before its first one, where cutting the stage costs nothing: right
before or after an op that is a kernel of its own, not between ops that fuse, or at an end of the
stage. So fused code stays whole.
"""

from __future__ import annotations

import bisect
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
    """A value that is waited for at a position, or leaves at one. Sorts in program order.

    `nbytes` are those it takes on the GPU, a multiple of GPU_ALIGN: windows count in these.
    """

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


def weight_moves(
    uses: Sequence[WeightUse], window_bytes: int, *, backward: bool, closed_ends: Sequence[int] = ()
) -> list[Placed]:
    """Fetch, wait and release of every bucket that a pass reads, resident ones too.

    `closed_ends` are where closed stages end, ascending.
    """
    placed, waits = [], []
    for use in uses:
        # Nothing to wait for, unless the forward must see the CPU's update: that wait may block the
        # host, so it stays at the use.
        early = use.resident and (backward or not use.refreshed)
        waits.append(Use(0 if early else use.first, use.bucket, 0 if use.resident else use.nbytes))
        # A resident bucket has no memory to give back: its stage is not cut for it.
        end = use.stage_end if use.resident else use.last + 1
        placed.append(Placed(end, Phase.ENDS, "release", use.bucket))
    return placed + _arrivals("fetch", "wait", waits, window_bytes, closed_ends)


def reload_moves(
    waits: Iterable[Use], window_bytes: int, closed_ends: Sequence[int] = ()
) -> list[Placed]:
    """Reload and reload_wait of swapped activations, each waited for at its position.

    `closed_ends` are where closed stages end, ascending.
    """
    return _arrivals("reload", "reload_wait", waits, window_bytes, closed_ends)


def _arrivals(
    issue: str, wait: str, waits: Iterable[Use], window_bytes: int, closed_ends: Sequence[int]
) -> list[Placed]:
    """Where each copy in is issued, and each wait; see [Note: windows] and [Note: closed stages]."""
    ordered = sorted(waits)
    placed: list[Placed] = []
    follow: list[list[Use]] = [[] for _ in ordered]  # copies issued right after each wait
    alone: set[int] = set()
    first, ahead = 0, 0
    for index, use in enumerate(ordered):
        ahead += use.nbytes
        while first < index and ahead > window_bytes:
            ahead -= ordered[first].nbytes
            first += 1
        # Everything in ordered[first:index + 1] may be on its way together.
        opened = bisect.bisect_right(closed_ends, use.position)
        not_before = closed_ends[opened - 1] if opened else 0
        if ahead > window_bytes:
            alone.add(index)
        elif first == 0 or ordered[first - 1].position < not_before:
            placed.append(Placed(not_before, Phase.AHEAD, issue, use.arg))
        else:
            follow[first - 1].append(use)
    for index, use in enumerate(ordered):
        if index in alone:
            placed.append(Placed(use.position, Phase.ARRIVES, issue, use.arg))
        placed.append(Placed(use.position, Phase.ARRIVES, wait, use.arg))
        placed += [Placed(use.position, Phase.ARRIVES, issue, u.arg) for u in follow[index]]
    return placed


def offload_moves(leaving: Iterable[Use], end: int, window_bytes: int) -> list[Placed]:
    """Offload and offload_wait of swapped activations, each leaving at its position.

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
