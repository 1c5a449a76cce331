"""A device whose copies happen as late as the rules of streams allow.

Compute happens at once (it is the CPU's), copies wait in two queues until somebody is entitled to see
their effect: the compute stream waits, native code takes an event, or the host has asked often
enough. Whoever reads a destination too early, or overwrites or frees a source too early, gets wrong
numbers every time instead of once a week.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

import torch

from lohan_fx.runtime.device import Arrival, CpuDevice
from lohan_fx.runtime.recorder import About


class LateArrival:
    def __init__(self, device: LateDevice, queue: deque[LateArrival], patience: int) -> None:
        self.device = device
        self.queue = queue
        self.patience = patience
        self.copy: tuple[torch.Tensor, torch.Tensor] | None = None
        self.after: Sequence[Arrival] = ()
        self.done = False

    @property
    def handle(self) -> int:
        self.force()  # the optimizer waits for it; here that happens before it is asked to
        return 0

    def is_complete(self) -> bool:
        self.patience -= 1
        if self.patience < 0:
            self.force()
        return self.done

    def force(self) -> None:
        while not self.done:
            head = self.queue[0]
            for arrival in head.after:
                if isinstance(arrival, LateArrival):
                    arrival.force()
            if head.done:
                continue
            self.queue.popleft()
            assert head.copy is not None
            to, source = head.copy
            to.copy_(source)
            head.copy, head.done = None, True


class LateDevice(CpuDevice):
    def __init__(self, patience: int = 5) -> None:
        super().__init__()
        self.patience = patience
        self.queues: tuple[deque[LateArrival], deque[LateArrival]] = (deque(), deque())

    def _start(
        self, which: int, to: torch.Tensor, source: torch.Tensor, after: Sequence[Arrival]
    ) -> Arrival:
        arrival = LateArrival(self, self.queues[which], self.patience)
        arrival.copy, arrival.after = (to, source), tuple(after)
        self.queues[which].append(arrival)
        return arrival

    def copy_in(
        self,
        to: torch.Tensor,
        source: torch.Tensor,
        after: Sequence[Arrival] | None = None,
        about: About | None = None,
    ) -> Arrival:
        self.bytes_in += source.numel()
        return self._start(0, to, source, after or ())

    def copy_out(
        self,
        to: torch.Tensor,
        source: torch.Tensor,
        after: Sequence[Arrival] = (),
        about: About | None = None,
    ) -> Arrival:
        self.bytes_out += source.numel()
        return self._start(1, to, source, after)

    def wait(self, arrival: Arrival) -> None:
        if isinstance(arrival, LateArrival):
            arrival.force()

    def join(self) -> None:
        for queue in self.queues:
            if queue:
                queue[-1].force()

    def synchronize(self) -> None:
        self.join()
