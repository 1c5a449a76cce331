"""Passes as somebody sees them who looks: stages and moves as ranges of torch's profiler, and noted."""

from __future__ import annotations

from typing import Any

import torch

from lohan_fx.program import Names

from .holdings import Holdings
from .recorder import Recorder

_ITEM_OF_MOVE = {
    "fetch": "buckets",
    "wait": "buckets",
    "release": "buckets",
    "offload": "slot_names",
    "offload_wait": "slot_names",
    "reload": "slot_names",
    "reload_wait": "slot_names",
    "grad": "params",
}


class PassWatcher:
    """Implements ops.Watcher. Ranges are called "forward embed", "fetch embed:embed.weight"."""

    def __init__(self) -> None:
        self.recorder: Recorder | None = None
        self.holdings: Holdings | None = None
        self._names = Names()
        self._in_pass = "forward"
        self._ranges: list[Any] = []
        self._stage = -1
        self._unaccounted = 0

    def begin(self, names: Names, in_pass: str) -> None:
        """A pass begins."""
        self._names, self._in_pass, self._stage = names, in_pass, -1

    def enter_stage(self, stage: int) -> None:
        self._open(self._in_pass, self._names.stages, stage)
        recorder, holdings = self.recorder, self.holdings
        if recorder is None or holdings is None:
            return
        if stage != self._stage:
            # Asking torch's allocator costs more than a launch.
            self._stage, self._unaccounted = stage, holdings.unaccounted()
        recorder.enter("stage", stage)
        recorder.hold(holdings.gpu(self._unaccounted))

    def enter_move(self, op: str, arg: int | None) -> None:
        self._open(op, getattr(self._names, _ITEM_OF_MOVE.get(op, ""), ()), arg)

    def leave(self) -> None:
        if self._ranges:
            self._ranges.pop().__exit__(None, None, None)
        if self.recorder is not None:
            self.recorder.leave()

    def abort(self) -> None:
        """A pass ended in the middle."""
        while self._ranges:
            self._ranges.pop().__exit__(None, None, None)

    def _open(self, what: str, names: tuple[str, ...], index: int | None) -> None:
        if not torch._C._autograd._profiler_enabled():
            return
        known = index is not None and index < len(names)
        label = f"{what} {names[index]}" if known and index is not None else what
        entered = torch._C._profiler._RecordFunctionFast(label)
        entered.__enter__()
        self._ranges.append(entered)
