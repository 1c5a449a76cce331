"""What the parts of one runtime share, and what must be closed with it."""

from __future__ import annotations

import contextlib
import weakref

from lohan_fx import native
from lohan_fx.errors import LohanError
from lohan_fx.planner import Overlap

from .device import Device
from .memory import Pools
from .options import HyperSource, Progress, RuntimeOptions
from .store import BucketStore
from .waits import Waits
from .windows import Windows


class Resources:
    """Refers to no Runtime, so that it can outlive it and be closed then."""

    def __init__(
        self,
        device: Device,
        engine: native.FileEngine | None,
        pools: Pools,
        waits: Waits,
        options: RuntimeOptions,
    ) -> None:
        self.device = device
        self.engine = engine
        self.pools = pools
        self.waits = waits
        self.progress = Progress()
        self.store = BucketStore(pools)
        self.windows: Windows | None = None  # while the buckets in `store` stay where they are
        self.closed = False
        self._hyper_ref: weakref.ref[HyperSource] | None = None
        self.set_options(options)

    def set_options(self, options: RuntimeOptions) -> None:
        """For the windows that are opened next."""
        self.options = options
        self.overlap = Overlap(options.overlap)
        self.waits.deadline_s = options.deadline_s

    @property
    def speculating(self) -> frozenset[int] | None:
        """Indices of the buckets that may have a second copy; None is all."""
        return self.options.speculating if self.overlap is Overlap.SPECULATIVE else frozenset()

    def open_windows(self) -> None:
        """Raises LohanError where a budget is exceeded; then nothing of them is held."""
        before, gpu_bytes = self.pools.host_addresses(), self.pools.gpu.current_bytes
        try:
            windows = Windows(
                self.pools, self.device, self.waits, self.store, self.options, self.progress
            )
        except BaseException:
            self.pools.free_hosts_but(before)
            self.pools.gpu.give(self.pools.gpu.current_bytes - gpu_bytes)
            raise
        self.windows = windows

    def close_windows(self) -> None:
        if self.windows is not None:
            self.windows.close()
            self.windows = None

    def opened(self) -> Windows:
        """The windows. Raises LohanError where there are none."""
        self.check_open()
        if self.windows is None:
            raise LohanError("the parameters have not been placed yet (Runtime.adopt)")
        return self.windows

    def check_open(self) -> None:
        """Raise LohanError once this has been closed."""
        if self.closed:
            raise LohanError("this model has been closed")

    @property
    def hyper(self) -> HyperSource | None:
        """The optimizer, while it lives."""
        return None if self._hyper_ref is None else self._hyper_ref()

    def attach(self, hyper: HyperSource) -> None:
        """Take hyperparameters from there. Raises LohanError where it cannot go with the overlap mode."""
        if self.windows is not None:
            self.windows.updates.attach(hyper)
        self._hyper_ref = weakref.ref(hyper)

    @property
    def gradients_pending(self) -> bool:
        """True between a backward and its step(), and while gradients are accumulated."""
        if self.windows is None:
            return False
        updates = self.windows.updates
        return updates.pending or updates.accumulated

    def drain(self) -> None:
        """Block until every update and every transfer has finished.

        Raises:
            TransferError: one failed.
        """
        if self.windows is not None:
            self.windows.updates.under_way.drain()
            self.device.synchronize()

    def close(self) -> None:
        """Join the threads, wait for what is in flight, unpin, unmap; in any state, after any error."""
        self.closed = True
        # A device that failed reports its error again at every call; it must not keep us from the rest.
        with contextlib.suppress(RuntimeError):
            self.device.synchronize()
        if self.windows is not None:
            self.windows.updates.join()
        if self.engine is not None:
            self.engine.close()
        self.windows = None
        self.store = BucketStore(self.pools)
        self.pools.close()
