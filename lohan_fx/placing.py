"""Values on their way into the tiers, in another thread, while the step that needs them is compiled.

Pinning, converting and copying are native work, compiling is Python that waits for workers: side by
side they take as long as the longer one. The thread is gone before the first step runs.

[Note: placing is reversible] It begins once there is a plan, or before, where the last run's is taken for
it. Whoever does not get to the first step, or gets another plan, calls `cancel`: the bucket under way is
finished and all are given back, so that the values are as they were.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch

from .progress import progress_of_bytes


class _Cancelled(Exception):
    """Ends the work from inside, between two buckets; never reaches the user."""


class Placing:
    """One adoption under way; `work` gets a function that is to be called with bytes as they are placed.

    `work` may raise, and has then undone what it did.
    """

    def __init__(
        self, work: Callable[[Callable[[int], None]], None], total_bytes: int, device: torch.device
    ) -> None:
        self._work = work
        self._total_bytes = total_bytes
        self._beside = beside(device)
        self._cancelled = False
        self._error: BaseException | None = None
        self.seconds = 0.0  # that the work took
        # Python waits for it at its exit, before it takes the tiers away.
        self._thread = threading.Thread(target=self._run, name="lohan_fx placing")
        self._thread.start()

    def _run(self) -> None:
        start = time.perf_counter()
        try:
            with self._beside(), progress_of_bytes("Placing", self._total_bytes) as progress:

                def placed(nbytes: int) -> None:
                    if self._cancelled or not threading.main_thread().is_alive():
                        raise _Cancelled
                    progress(nbytes)

                self._work(placed)
        except BaseException as error:
            self._error = error
        self.seconds = time.perf_counter() - start

    def wait(self) -> None:
        """Until everything is placed. Raises what placing raised."""
        self._thread.join()
        if self._error is not None:
            raise self._error

    def cancel(self) -> bool:
        """Stop, and wait until that is done; False if everything was placed already."""
        self._cancelled = True
        self._thread.join()
        return self._error is not None


def beside(device: torch.device) -> Callable[[], AbstractContextManager[object]]:
    """A context for another thread, in which its device work is queued where this thread's is."""
    if device.type != "cuda":
        return nullcontext
    stream = torch.cuda.current_stream(device)
    return lambda: torch.cuda.stream(stream)
