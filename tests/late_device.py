"""A device whose copies, and kernels beside, happen as late as the rules of streams allow.

Compute happens at once (it is the CPU's), the rest waits in one queue for each stream until somebody is
entitled to see its effect: the compute stream waits, native code takes an event, or the host has asked
often enough. Whoever reads a destination too early, or overwrites or frees a source too early, gets wrong
numbers every time instead of once a week.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from functools import partial

import torch

from lohan_fx.runtime.device import Arrival, CpuDevice, Pairs
from lohan_fx.runtime.recorder import About


class LateArrival:
    def __init__(self, device: LateDevice, queue: deque[LateArrival], patience: int) -> None:
        self.device = device
        self.queue = queue
        self.patience = patience
        self.work: Callable[[], object] | None = None
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
            assert head.work is not None
            head.work()
            head.work, head.done = None, True


class LateDevice(CpuDevice):
    def __init__(self, patience: int = 5) -> None:
        super().__init__()
        self.patience = patience
        streams = ("h2d", "d2h", "h2d beside", "kernels", "d2h beside")
        self.queues: dict[str, deque[LateArrival]] = {name: deque() for name in streams}

    def _start(self, stream: str, work: Callable[[], object], after: Sequence[Arrival]) -> Arrival:
        arrival = LateArrival(self, self.queues[stream], self.patience)
        arrival.work, arrival.after = work, tuple(after)
        self.queues[stream].append(arrival)
        return arrival

    def copy_in(
        self,
        to: torch.Tensor,
        source: torch.Tensor,
        after: Sequence[Arrival] | None = None,
        about: About | None = None,
    ) -> Arrival:
        self.bytes_in += source.numel()
        return self._start("h2d", partial(to.copy_, source), after or ())

    def copy_out(
        self,
        to: torch.Tensor,
        source: torch.Tensor,
        after: Sequence[Arrival] = (),
        about: About | None = None,
    ) -> Arrival:
        self.bytes_out += source.numel()
        return self._start("d2h", partial(to.copy_, source), after)

    def copy_in_beside(self, pairs: Pairs, after: Sequence[Arrival], about: About) -> Arrival:
        self.bytes_in += sum(source.numel() for _, source in pairs)
        return self._start("h2d beside", partial(_copy, pairs), after)

    def copy_out_beside(self, pairs: Pairs, after: Sequence[Arrival], about: About) -> Arrival:
        self.bytes_out += sum(source.numel() for _, source in pairs)
        return self._start("d2h beside", partial(_copy, pairs), after)

    def launch_beside(
        self, kernels: Callable[[], None], after: Sequence[Arrival], about: About
    ) -> Arrival:
        return self._start("kernels", kernels, after)

    def wait(self, arrival: Arrival) -> None:
        if isinstance(arrival, LateArrival):
            arrival.force()

    def join(self) -> None:
        for queue in self.queues.values():
            if queue:
                queue[-1].force()

    def synchronize(self) -> None:
        self.join()


def _copy(pairs: Pairs) -> None:
    for to, source in pairs:
        to.copy_(source)
