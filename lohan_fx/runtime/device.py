"""The one seam between the runtime and a device: buffers, copies in both directions, their arrivals.

[Note: stream order]
Device buffers are allocated on the compute stream: the one that is current where an op runs. A copy
runs on a side stream, which first waits until the compute stream has passed the line of the call (or
only for the arrivals in `after`, where those are enough). The compute stream waits for a copy's
arrival before it reads the destination or the source is dropped. So a buffer's memory always goes
back in compute-stream order, the host never polls to free device memory, and no event is waited for
before it was recorded: whatever returns an arrival has recorded it.

[Note: streams beside]
Work of which a step waits for the result only, if at all, has three more streams: for its copies in,
its kernels and its copies out. They follow what is in `after` and nothing else, so they hold nothing of
the step up but by the share of the link that they take.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import torch

from lohan_fx.errors import LohanError

from .recorder import About, Recorder

# Copies of one direction: (to, source), bytes of one size.
Pairs = Sequence[tuple[torch.Tensor, torch.Tensor]]

# Every value handed to a kernel starts at a multiple of this many bytes.
DEVICE_ALIGN = 512


class Arrival(Protocol):
    """A point in a stream: everything queued there before it has happened when it is complete."""

    @property
    def handle(self) -> int:
        """The CUevent for native code; 0 where there is nothing to wait for."""
        ...

    def is_complete(self) -> bool: ...


class Device(Protocol):
    """What the runtime needs of a device; bytes are 1-D uint8 tensors on both sides.

    Copies are told which move they are `about` for `recorder`, if there is one.
    """

    device: torch.device
    bytes_in: int
    bytes_out: int
    recorder: Recorder | None

    def empty(self, nbytes: int) -> torch.Tensor:
        """A buffer allocated on the compute stream, aligned to DEVICE_ALIGN."""
        ...

    def copy_in(
        self,
        to: torch.Tensor,
        source: torch.Tensor,
        after: Sequence[Arrival] | None = None,
        about: About | None = None,
    ) -> Arrival:
        """Start host -> device, after what the compute stream holds now, or only after `after`."""
        ...

    def copy_out(
        self,
        to: torch.Tensor,
        source: torch.Tensor,
        after: Sequence[Arrival] = (),
        about: About | None = None,
    ) -> Arrival:
        """Start device -> host, after what the compute stream holds now and after `after`."""
        ...

    def copy_in_beside(self, pairs: Pairs, after: Sequence[Arrival], about: About) -> Arrival:
        """Start host -> device, one after another; see [Note: streams beside]."""
        ...

    def copy_out_beside(self, pairs: Pairs, after: Sequence[Arrival], about: About) -> Arrival:
        """Start device -> host, one after another; see [Note: streams beside]."""
        ...

    def launch_beside(
        self, kernels: Callable[[], None], after: Sequence[Arrival], about: About
    ) -> Arrival:
        """Launch kernels; see [Note: streams beside]. `about` is the move that their input comes by."""
        ...

    def mark(self) -> Arrival:
        """The point that the compute stream has reached in the program."""
        ...

    def wait(self, arrival: Arrival) -> None:
        """Let the compute stream wait."""
        ...

    def join(self) -> None:
        """Let the compute stream wait for every copy started so far."""
        ...

    def synchronize(self) -> None:
        """Block until the device is idle."""
        ...

    def pin(self, address: int, nbytes: int) -> None: ...
    def unpin(self, address: int) -> None: ...


class _Complete:
    handle = 0

    def is_complete(self) -> bool:
        return True


COMPLETE: Arrival = _Complete()


class CpuDevice:
    """The host as its own device: copies are made at once, so every arrival is complete."""

    def __init__(self) -> None:
        self.device = torch.device("cpu")
        self.bytes_in = 0
        self.bytes_out = 0
        self.recorder: Recorder | None = None

    def empty(self, nbytes: int) -> torch.Tensor:
        room = torch.empty(nbytes + DEVICE_ALIGN, dtype=torch.uint8)
        return room.narrow(0, -room.data_ptr() % DEVICE_ALIGN, nbytes)

    def copy_in(
        self,
        to: torch.Tensor,
        source: torch.Tensor,
        after: Sequence[Arrival] | None = None,
        about: About | None = None,
    ) -> Arrival:
        self._copy("h2d", to, source, about)
        self.bytes_in += source.numel()
        return COMPLETE

    def copy_out(
        self,
        to: torch.Tensor,
        source: torch.Tensor,
        after: Sequence[Arrival] = (),
        about: About | None = None,
    ) -> Arrival:
        self._copy("d2h", to, source, about)
        self.bytes_out += source.numel()
        return COMPLETE

    def copy_in_beside(self, pairs: Pairs, after: Sequence[Arrival], about: About) -> Arrival:
        for to, source in pairs:
            self.copy_in(to, source, after, about)
        return COMPLETE

    def copy_out_beside(self, pairs: Pairs, after: Sequence[Arrival], about: About) -> Arrival:
        for to, source in pairs:
            self.copy_out(to, source, after, about)
        return COMPLETE

    def launch_beside(
        self, kernels: Callable[[], None], after: Sequence[Arrival], about: About
    ) -> Arrival:
        kernels()
        return COMPLETE

    def _copy(self, lane: str, to: torch.Tensor, source: torch.Tensor, about: About | None) -> None:
        recorder = self.recorder
        if recorder is None or about is None:
            to.copy_(source)
            return
        start = recorder.now()
        to.copy_(source)
        end = recorder.now()
        recorder.copied(lane, about, start, end)
        recorder.paused(lane, about, start, end)  # the one thread that there is does not compute

    def mark(self) -> Arrival:
        return COMPLETE

    def wait(self, arrival: Arrival) -> None:
        pass

    def join(self) -> None:
        pass

    def synchronize(self) -> None:
        pass

    def pin(self, address: int, nbytes: int) -> None:
        pass

    def unpin(self, address: int) -> None:
        pass


class _CudaArrival:
    """`copy` is (lane, move) of the copy that arrives, or that kernels waited for, where it is recorded."""

    __slots__ = ("copy", "event")

    def __init__(self, stream: torch.cuda.Stream, copy: tuple[str, About] | None = None) -> None:
        self.event = torch.cuda.Event(enable_timing=copy is not None)  # type: ignore[no-untyped-call]
        self.event.record(stream)
        self.copy = copy

    @property
    def handle(self) -> int:
        return int(self.event.cuda_event)

    def is_complete(self) -> bool:
        return bool(self.event.query())  # type: ignore[no-untyped-call]


_REGISTER_PORTABLE = 1  # cudaHostRegisterPortable: pinned for every context of the process


class CudaDevice:
    """One CUDA device with streams of their own for each direction of the link, and for work beside."""

    def __init__(self, device: torch.device) -> None:
        torch.cuda.init()  # type: ignore[no-untyped-call]
        index = device.index if device.index is not None else torch.cuda.current_device()
        self.device = torch.device("cuda", index)
        self.bytes_in = 0
        self.bytes_out = 0
        self.recorder: Recorder | None = None
        self._h2d, self._d2h = self._stream(), self._stream()
        self._h2d_beside, self._d2h_beside = self._stream(), self._stream()
        # Copies wait for these kernels, which are short; behind those of the step they would come late.
        self._kernels = self._stream(priority=-1)

    def _stream(self, priority: int = 0) -> torch.cuda.Stream:
        return torch.cuda.Stream(self.device, priority)  # type: ignore[no-untyped-call]

    def _compute(self) -> torch.cuda.Stream:
        return torch.cuda.current_stream(self.device)

    def empty(self, nbytes: int) -> torch.Tensor:
        # The caching allocator hands out multiples of 512 bytes at multiples of 512.
        return torch.empty(nbytes, dtype=torch.uint8, device=self.device)

    def copy_in(
        self,
        to: torch.Tensor,
        source: torch.Tensor,
        after: Sequence[Arrival] | None = None,
        about: About | None = None,
    ) -> Arrival:
        if after is None:
            self._h2d.wait_stream(self._compute())
        else:
            self._hold(self._h2d, after)
        self.bytes_in += source.numel()
        return self._copy(self._h2d, ((to, source),), "h2d", about)

    def copy_out(
        self,
        to: torch.Tensor,
        source: torch.Tensor,
        after: Sequence[Arrival] = (),
        about: About | None = None,
    ) -> Arrival:
        self._d2h.wait_stream(self._compute())
        self._hold(self._d2h, after)
        self.bytes_out += source.numel()
        return self._copy(self._d2h, ((to, source),), "d2h", about)

    def copy_in_beside(self, pairs: Pairs, after: Sequence[Arrival], about: About) -> Arrival:
        self._hold(self._h2d_beside, after)
        self.bytes_in += sum(source.numel() for _, source in pairs)
        return self._copy(self._h2d_beside, pairs, "h2d", about)

    def copy_out_beside(self, pairs: Pairs, after: Sequence[Arrival], about: About) -> Arrival:
        self._hold(self._d2h_beside, after)
        self.bytes_out += sum(source.numel() for _, source in pairs)
        return self._copy(self._d2h_beside, pairs, "d2h", about)

    def launch_beside(
        self, kernels: Callable[[], None], after: Sequence[Arrival], about: About
    ) -> Arrival:
        self._hold(self._kernels, after)
        with torch.cuda.stream(self._kernels):
            kernels()
        return _CudaArrival(self._kernels, None if self.recorder is None else ("h2d", about))

    @staticmethod
    def _hold(stream: torch.cuda.Stream, arrivals: Sequence[Arrival]) -> None:
        for arrival in arrivals:
            if isinstance(arrival, _CudaArrival):
                stream.wait_event(arrival.event)

    def _copy(
        self,
        stream: torch.cuda.Stream,
        pairs: Pairs,
        lane: str,
        about: About | None,
    ) -> Arrival:
        recorder = self.recorder if about is not None else None
        start = None if recorder is None else recorder.now(stream)
        # Both sides are contiguous bytes, so each is one cudaMemcpyAsync and no temporary.
        with torch.cuda.stream(stream):
            for to, source in pairs:
                to.copy_(source, non_blocking=True)
        if recorder is None or about is None:
            return _CudaArrival(stream)
        arrival = _CudaArrival(stream, (lane, about))
        recorder.copied(lane, about, start, arrival.event)
        return arrival

    def mark(self) -> Arrival:
        return _CudaArrival(self._compute())

    def wait(self, arrival: Arrival) -> None:
        if not isinstance(arrival, _CudaArrival):
            return
        recorder = self.recorder
        if recorder is None or arrival.copy is None or arrival.is_complete():
            self._compute().wait_event(arrival.event)
            return
        start = recorder.now()
        self._compute().wait_event(arrival.event)
        recorder.paused(*arrival.copy, start, recorder.now())

    def join(self) -> None:
        compute = self._compute()
        for stream in (self._h2d, self._d2h, self._h2d_beside, self._kernels, self._d2h_beside):
            compute.wait_stream(stream)

    def synchronize(self) -> None:
        torch.cuda.synchronize(self.device)

    def pin(self, address: int, nbytes: int) -> None:
        with torch.cuda.device(self.device):
            status = torch.cuda.cudart().cudaHostRegister(address, nbytes, _REGISTER_PORTABLE)  # type: ignore[no-untyped-call]
        if int(status) != 0:
            raise LohanError(
                f"the driver refused to pin {nbytes} bytes of host memory ({status}); lower the dram "
                "budget or raise the limit on locked memory (ulimit -l)"
            )

    def unpin(self, address: int) -> None:
        with torch.cuda.device(self.device):
            status = torch.cuda.cudart().cudaHostUnregister(address)  # type: ignore[no-untyped-call]
        if int(status) != 0:
            raise LohanError(f"the driver could not unpin host memory ({status})")


def open_device(device: torch.device) -> Device:
    """The seam for `device`.

    Raises:
        LohanError: the device is neither a CPU nor a CUDA device.
    """
    if device.type == "cpu":
        return CpuDevice()
    if device.type == "cuda":
        return CudaDevice(device)
    raise LohanError(f"device {device} is not supported; use a cuda or a cpu device")
