"""What a runtime tells of itself: counts at any time, and notes while somebody records."""

from __future__ import annotations

from lohan_fx import ops
from lohan_fx.plan.timeline import Timeline
from lohan_fx.program import Names, Program

from .holdings import Holdings
from .options import RuntimeStats
from .pace import Pace
from .recorder import Recorder
from .resources import Resources
from .timelines import timelines
from .watcher import PassWatcher


class Observer:
    """Told of passes and steps; `number` is that of the ops of these passes."""

    def __init__(self, resources: Resources, number: int) -> None:
        self._resources = resources
        self._number = number
        self._pace = Pace()
        self._watcher = PassWatcher()
        self._names: dict[int, Names] = {}  # by program
        ops.offer_watcher(number, self._watcher)

    # What happens

    def named(self, program: Program, names: Names) -> None:
        """What the items of a program are called."""
        self._names[program.index] = names

    def forward_begins(self, program: Program) -> None:
        watcher = self._watcher
        if program.training:
            self._pace.forward()
        watcher.begin(self._names[program.index], "forward")
        if watcher.recorder is not None and watcher.holdings is not None:
            self.note_native()
            resting = watcher.holdings.resting()
            watcher.recorder.begin(program.index, program.training, resting)

    def backward_begins(self, program: Program) -> None:
        self._watcher.begin(self._names[program.index], "backward")
        if self._watcher.recorder is not None:
            self._watcher.recorder.begin_backward()

    def pass_is_aborted(self) -> None:
        self._watcher.abort()

    def stepped(self) -> None:
        """The optimizer's step has been called."""
        self._pace.step()
        if self._watcher.recorder is not None:
            self._watcher.recorder.stepped()

    def placed(self) -> None:
        """Buckets have new places, or there are new windows."""
        windows, watcher = self._resources.windows, self._watcher
        watcher.holdings = None
        if windows is not None and watcher.recorder is not None:
            parts = (windows.inbound, windows.slots, windows.updates)
            watcher.holdings = Holdings(self._resources.pools, self._resources.store, *parts)

    def note_native(self) -> None:
        """Keep what is known of native work before it goes away with the windows."""
        if self._watcher.recorder is not None and not self._resources.closed:
            self._watcher.recorder.native += self.take_trace()

    def ends(self) -> None:
        """The runtime is about to be closed."""
        self.note_native()
        ops.watched.pop(self._number, None)

    # Recording

    def record(self, recorder: Recorder | None) -> None:
        """Let `recorder` note what happens from here on; None: nobody."""
        self._resources.check_open()
        self.take_trace()  # what ended before
        self._resources.device.recorder = self._resources.waits.recorder = recorder
        self._watcher.recorder = recorder
        self.placed()
        if recorder is None:
            ops.watched.pop(self._number, None)
        else:
            ops.watched[self._number] = self._watcher

    def recorded(self, recorder: Recorder) -> list[Timeline]:
        """The steps that `recorder` has noted, the last one up to here; it notes no more.

        Completes what is under way. Raises TransferError where that fails.
        """
        recorder.close()
        if not self._resources.closed:
            try:
                self._resources.drain()
                self.note_native()
            finally:
                self.record(None)
        return timelines(recorder, self._names)

    def take_trace(self) -> list[tuple[str, str, float, float]]:
        """(what, lane, start, end) of native work since the last call; seconds of time.monotonic()."""
        windows, engine = self._resources.windows, self._resources.engine
        events = [] if windows is None else windows.updates.take_trace()
        if engine is not None:
            events += engine.take_trace()
        return events

    # Counts

    def stats(self) -> RuntimeStats:
        resources = self._resources
        engine, device, windows = resources.engine, resources.device, resources.windows
        pools, progress = resources.pools, resources.progress
        accounts = (pools.gpu, pools.dram, pools.ssd)
        updates = {} if windows is None else windows.updates.stats()
        return RuntimeStats(
            moved_bytes={
                "h2d": device.bytes_in,
                "d2h": device.bytes_out,
                "ssd_read": engine.bytes_read if engine is not None else 0,
                "ssd_write": engine.bytes_written if engine is not None else 0,
            },
            peak_bytes={str(account.tier): account.peak_bytes for account in accounts},
            current_bytes={str(account.tier): account.current_bytes for account in accounts},
            stall_s=dict(resources.waits.stall_s),
            updates=updates,
            busy_s={
                "ssd_read": engine.read_busy_s if engine is not None else 0.0,
                "ssd_write": engine.write_busy_s if engine is not None else 0.0,
                "cpu_adam": updates.get("adam_s", 0.0),
            },
            step_s=self._pace.step_s,
            steps=progress.step_count,
            skipped_steps=progress.skipped_steps,
        )
