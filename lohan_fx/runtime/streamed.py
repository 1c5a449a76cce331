"""Updates that the GPU makes of states which rest in DRAM: copied in, updated, copied back.

[Note: streamed states]
A state passes through a ring of slots in device memory, a piece of its bucket at a time: master and
moments are copied into a slot, Adam's kernel updates them there, and they are copied back. The kernel
writes new 16-bit weights where those rest on the GPU, else into the slot, from where they go to DRAM.
Copies in, kernels and copies out run beside the step, in the order in which the updates were submitted;
a slot is filled again when what it held has been copied out.

What reads new weights on the device follows the kernels, or the copies out of the weights, in stream
order; the host waits only where it reads values itself. The gradients stay on the GPU, and are counted,
until the compute stream has waited for the kernels: where the next forward begins to use the weights.
The compute stream never waits in order to have their memory back, but where the host finds that the
kernels are done already, the memory goes back then.

Copies are issued when the host passes by, one bucket each time, so that step() does not keep the next
forward waiting for the issue of all.

Shapes: P = elements of one piece.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch

from lohan_fx.errors import LohanError
from lohan_fx.planner.traffic import STREAM_SLOTS
from lohan_fx.program import Bucket

from .adam_gpu import Scale, Update, update_on_device
from .buckets import BucketHome
from .device import DEVICE_ALIGN, Arrival, Device
from .jobs import Updated
from .memory import Pools
from .records import Record, UpdateState
from .waits import Waits

_STATE = ("master", "exp_avg", "exp_avg_sq")
# Pieces are multiples of this many elements, so that all arrays in a slot start aligned for vectors.
_PIECE_ALIGN = 64


@dataclass(slots=True, eq=False)
class _Slot:
    """Room for one piece. `free`: after which it may be filled."""

    memory: torch.Tensor
    free: Arrival
    views: dict[tuple[int, torch.dtype | None], _Views] = field(default_factory=dict)

    def cut(self, room: int, weights: torch.dtype | None) -> _Views:
        """The slot as arrays of so many elements; `weights`: with new weights on their way to DRAM."""
        if (room, weights) not in self.views:
            state = [self.memory[4 * room * n : 4 * room * (n + 1)] for n in range(len(_STATE))]
            through = None
            if weights is not None:
                through = self.memory[12 * room : (12 + weights.itemsize) * room].view(weights)
            self.views[room, weights] = _Views(
                state, [array.view(torch.float32) for array in state], through
            )
        return self.views[room, weights]


@dataclass(frozen=True, slots=True)
class _Views:
    """Master, exp_avg, exp_avg_sq, as bytes and as fp32, and new 16-bit weights, if they pass, too."""

    state: Sequence[torch.Tensor]
    state_P: Sequence[torch.Tensor]
    weight_P: torch.Tensor | None


@dataclass(frozen=True, slots=True, eq=False)
class _AtRest:
    """A bucket in DRAM: bytes of its master and moments, and of its weights unless they are on the GPU."""

    name: str
    state: Sequence[torch.Tensor]
    weight: torch.Tensor | None
    room: int  # elements in one slot


@dataclass(slots=True, eq=False)
class _Streaming:
    """One update under way.

    `mark`: the point of the compute stream at which the gradients were complete, and the old weights
    were read. `made`: the kernels are done, once they have been issued; until then, the mark.
    """

    record: Record
    updated: Sequence[Updated]
    scale: Scale
    mark: Arrival
    made: Arrival


class Streamed:
    """The ring, and what passes through it; see [Note: streamed states].

    Args:
        homes: the buckets whose states pass.
        nbytes: device memory of the ring.

    Raises:
        LohanError: a budget is exceeded, or there is no room for a piece.
    """

    def __init__(
        self,
        pools: Pools,
        device: Device,
        waits: Waits,
        homes: Sequence[BucketHome],
        nbytes: int,
    ) -> None:
        self._pools = pools
        self._device = device
        self._waits = waits
        self._slots: deque[_Slot] = deque()  # the next one to be filled first
        self._queue: deque[_Streaming] = deque()  # not issued yet
        self._issued: deque[_Streaming] = deque()  # whose gradients are still held
        self._stored: dict[int, Arrival] = {}  # by bucket: its last copy out
        self._at_rest: dict[int, _AtRest] = {}
        self.count = 0  # updates made
        if not homes:
            self._memory = None
            return
        size = nbytes // STREAM_SLOTS // DEVICE_ALIGN * DEVICE_ALIGN
        for home in homes:
            self._at_rest[home.bucket.index] = at_rest = _at_rest(home, size)
            if not at_rest.room:
                raise LohanError(
                    f"the state of {home.bucket.name} passes through the GPU, in {nbytes:,} bytes, which "
                    "hold no piece of it; raise stream_bytes"
                )
        with torch.inference_mode(False):
            self._memory = pools.device_bytes(nbytes, "the ring of streamed states")
        mark = device.mark()
        for start in range(0, STREAM_SLOTS * size, size):
            self._slots.append(_Slot(self._memory.bytes[start : start + size], mark))

    @property
    def nbytes(self) -> int:
        """Bytes of the ring."""
        return 0 if self._memory is None else self._memory.nbytes

    def submit(self, record: Record, updated: Sequence[Updated], scale: Scale) -> None:
        """Update a bucket from the gradients in its record, which are complete."""
        record.advance(UpdateState.STREAMING)
        mark = self._device.mark()
        self._queue.append(_Streaming(record, updated, scale, mark, mark))
        self.count += 1

    def pump(self) -> None:
        """Issue the next update; give back what the device is done with. Never blocks."""
        if self._queue:
            self._issue(self._queue.popleft())
        while self._issued and self._issued[0].made.is_complete():
            self._end(self._issued.popleft())

    def issue(self, record: Record) -> None:
        """Have a bucket's update, and those before it, issued."""
        while any(one.record is record for one in self._queue):
            self._issue(self._queue.popleft())

    def settle(self, record: Record) -> None:
        """Let the compute stream wait for a bucket's new weights; the gradients go back in its order."""
        self.issue(record)
        for streaming in tuple(self._issued):
            if streaming.record is record:
                self._device.wait(streaming.made)
                self._issued.remove(streaming)
                self._end(streaming)

    def stored(self, bucket: int) -> tuple[Arrival, ...]:
        """What any copy from the bucket's memory in DRAM must follow."""
        arrival = self._stored.get(bucket)
        return () if arrival is None else (arrival,)

    def drain(self) -> None:
        """Block until all values at rest are the newest.

        Raises:
            TransferError: a copy does not end.
        """
        while self._queue:
            self._issue(self._queue.popleft())
        for index, arrival in self._stored.items():
            name = f"the copy of the updated state of {self._at_rest[index].name}"
            self._waits.until("d2h", name, arrival.is_complete, ("state out", index))
        self._stored.clear()
        while self._issued:
            self.settle(self._issued[0].record)

    def close(self) -> None:
        """Give the ring back; nothing may be under way."""
        self._slots.clear()
        self._at_rest.clear()
        if self._memory is not None:
            self._pools.free_device(self._memory)
            self._memory = None

    def _end(self, streaming: _Streaming) -> None:
        streaming.record.drop_grads(self._pools.gpu)
        streaming.record.advance(UpdateState.IDLE)

    def _issue(self, streaming: _Streaming) -> None:
        bucket = streaming.record.bucket
        room = self._at_rest[bucket.index].room
        before = self.stored(bucket.index)
        with torch.inference_mode(False), torch.no_grad():
            for start in range(0, bucket.numel, room):
                stop = min(start + room, bucket.numel)
                changed = _covered(bucket, streaming.updated, start, stop)
                if changed:
                    self._pass(streaming, start, stop, changed, before)
        self._issued.append(streaming)

    def _pass(
        self,
        streaming: _Streaming,
        start: int,
        stop: int,
        changed: Sequence[tuple[int, int]],
        before: tuple[Arrival, ...],
    ) -> None:
        """Issue the update of elements [start, stop) of a bucket.

        `changed`: what of it is updated, padding included. `before`: the bucket's last copy out.
        """
        device, home = self._device, streaming.record.home
        index, at_rest = home.bucket.index, self._at_rest[home.bucket.index]
        slot = self._slots[0]
        self._slots.rotate(-1)
        views = slot.cut(at_rest.room, None if at_rest.weight is None else home.dtype)
        here = [array[: 4 * (stop - start)] for array in views.state]
        there = [array[4 * start : 4 * stop] for array in at_rest.state]
        came = device.copy_in_beside(
            list(zip(here, there, strict=True)), (slot.free, *before), ("state in", index)
        )
        weight_P = views.weight_P
        if weight_P is None:
            weight_P = home.device_section("weight")[start:stop]
        kernels = partial(
            update_on_device,
            [
                _piece(
                    each,
                    streaming.record.grads[each.spec.pid],
                    views.state_P,
                    weight_P,
                    start,
                    stop,
                )
                for each in streaming.updated
                if each.spec.offset < stop and start < each.spec.offset + each.spec.numel
            ],
            streaming.scale,
        )
        streaming.made = device.launch_beside(kernels, (came, streaming.mark), ("state in", index))
        back = list(zip(there, here, strict=True))
        if at_rest.weight is not None:
            size = home.dtype.itemsize
            back += [
                (
                    at_rest.weight[size * first : size * last],
                    weight_P[first - start : last - start].view(torch.uint8),
                )
                for first, last in changed
            ]
        slot.free = device.copy_out_beside(back, (streaming.made,), ("state out", index))
        self._stored[index] = slot.free


def _at_rest(home: BucketHome, slot_bytes: int) -> _AtRest:
    state = [home.host_section(section) for section in _STATE]
    weight = home.host_section("weight")
    through = 0 if weight is None else home.dtype.itemsize
    return _AtRest(
        home.bucket.name,
        [array_P.view(torch.uint8) for array_P in state if array_P is not None],
        None if weight is None else weight.view(torch.uint8),
        slot_bytes // (12 + through) // _PIECE_ALIGN * _PIECE_ALIGN,
    )


def _piece(
    each: Updated,
    grad_N: torch.Tensor,
    state_P: Sequence[torch.Tensor],
    weight_P: torch.Tensor,
    start: int,
    stop: int,
) -> Update:
    """The part of one parameter's update that is in elements [start, stop) of its bucket."""
    first = max(each.spec.offset, start)
    last = min(each.spec.offset + each.spec.numel, stop)
    here = slice(first - start, last - start)
    master_N, exp_avg_N, exp_avg_sq_N = (array_P[here] for array_P in state_P)
    return Update(
        grad_N[first - each.spec.offset : last - each.spec.offset],
        master_N,
        exp_avg_N,
        exp_avg_sq_N,
        weight_P[here],
        each.group,
        each.step,
    )


def _covered(
    bucket: Bucket, updated: Iterable[Updated], start: int, stop: int
) -> list[tuple[int, int]]:
    """Half-open ranges of [start, stop) that hold the updated parameters and, besides, only padding."""
    wanted = {each.spec.pid for each in updated}
    ends = [spec.offset for spec in bucket.params[1:]] + [bucket.numel]
    found: list[tuple[int, int]] = []
    for spec, end in zip(bucket.params, ends, strict=True):
        first, last = max(spec.offset, start), min(end, stop)
        if spec.pid not in wanted or first >= last:
            continue
        if found and found[-1][1] == first:
            found[-1] = (found[-1][0], last)
        else:
            found.append((first, last))
    return found
