"""Recording a run's trace: from the user's `with` to the runtime's notes and back."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from .errors import LohanError
from .runtime.recorder import Recorder
from .session import Session
from .tracing import Trace


@contextmanager
def recorded(session: Session, path: str | os.PathLike[str] | None) -> Iterator[Trace]:
    """Record what happens inside; the trace is filled when it ends, and written to `path`, if any.

    Where the block raises, nothing is written and the trace stays empty.

    Raises:
        LohanError: a trace is being recorded already.
    """
    if session.recorder is not None:
        raise LohanError("a trace of this model is being recorded already; end that one first")
    device = session.device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    trace = Trace(session.settings.model_name, name)
    recorder = session.recorder = Recorder(device)
    try:
        if session.runtime is not None:
            session.runtime.observer.record(recorder)
        yield trace
        runtime = session.runtime
        if runtime is not None:
            trace.steps = tuple(runtime.observer.recorded(recorder))
            trained = [
                begin.program
                for begin in recorder.begins
                if session.captured[begin.program].training
            ]
            if trained:
                trace.fingerprint = session.captured[trained[-1]].plan.fingerprint
            session.last_trace = trace
        if path is not None:
            trace.save(path)
    finally:
        session.recorder = None
        if session.runtime is not None and not session.runtime.closed:
            session.runtime.observer.record(None)
