"""The runtime: does the moves of ops.py over GPU, DRAM and SSD, and owns everything they touch.

Runtime      its life, from taking values over to giving all back; what a training loop asks
  passes       the pass under way, which order of calls is legal
  values       parameters and optimizer state one by one
  observer     counts, and notes for whoever records
    watcher      what somebody sees who looks: ranges of torch's profiler
    recorder     notes of what happens
    timelines    the steps that were noted, as a plan has them
    holdings     what the memory of the tiers holds, by class
    pace         how long steps take
  resources    what these share, and what must be closed
    windows      what data streams through; it is made anew for other placements
      inbound      weights and activations on their way to the GPU
      activations  activations on their way out, and where they are kept
      updates      gradients, the optimizer
        gradients  the memory gradients wait in
        norms      how large they are, whether they are finite
        jobs       what the CPU does: updates, sums of several backwards
        speculation  updates before step() has decided on them
        streamed   updates on the GPU of states that rest in DRAM
    store        all buckets, and their way from tier to tier
      buckets      weights and optimizer state of one, at rest
      resting      allocations of one tier
      layout       a parameter's place within its bucket
    memory       accounted memory of the three tiers; staging
    device       streams, copies, events
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, MutableMapping, Sequence

import torch

from lohan_fx import native
from lohan_fx.errors import LohanError, PlanMismatch, TrainingLoopError
from lohan_fx.piecewise import Value
from lohan_fx.program import Bucket, BucketPlacement

from .device import open_device
from .memory import Pools
from .options import HyperSource, RuntimeOptions, RuntimeStats
from .passes import Passes
from .resources import Resources
from .values import Values
from .waits import Waits


class Runtime:
    """One for each compiled model; not thread-safe, as autograd is not.

    Attributes:
        passes: implements ops.Moves, under `passes.number`.
        values: parameters and optimizer state by number, once they are adopted.
        observer: what has been counted; lets a recorder take notes.

    Args:
        device: where the model computes: a cuda device, or the cpu.
        gpu_bytes, dram_bytes: budgets for what the runtime holds; None for no limit.
        ssd: (directory, capacity in bytes or None) of each directory to stripe over; empty without.
        options: sizes of the windows, and the overlap mode.
        engine: a file engine to use instead of one over `ssd`.
        verify_io: compare what comes back from `ssd` with checksums of what was written.
    """

    def __init__(
        self,
        device: torch.device,
        *,
        gpu_bytes: int | None = None,
        dram_bytes: int | None = None,
        ssd: Sequence[tuple[str, int | None]] = (),
        options: RuntimeOptions | None = None,
        engine: native.FileEngine | None = None,
        verify_io: bool = False,
    ) -> None:
        options = options or RuntimeOptions()
        waits = Waits(options.deadline_s)
        opened = open_device(device)
        if engine is None and ssd:
            engine = native.FileEngine(
                [str(directory) for directory, _ in ssd],
                capacities=[capacity or 0 for _, capacity in ssd],
                verify=verify_io,
            )
        limits = [capacity for _, capacity in ssd if capacity is not None]
        pools = Pools(
            opened,
            engine,
            waits,
            gpu_bytes=gpu_bytes,
            dram_bytes=dram_bytes,
            ssd_bytes=sum(limits) if ssd and len(limits) == len(ssd) else None,
        )
        self._resources = Resources(opened, engine, pools, waits, options)
        self._finalizer = weakref.finalize(self, self._resources.close)
        self.passes = Passes(self._resources)
        self.observer = self.passes.observer
        self.values = Values(self._resources, self.passes)

    # Life

    def adopt(
        self,
        buckets: Sequence[Bucket],
        stubs: Mapping[int, torch.nn.Parameter],
        values: MutableMapping[int, Value],
        placements: Sequence[BucketPlacement],
        moments: Mapping[int, tuple[Value, Value]] | None = None,
        progress: Callable[[int], None] = lambda nbytes: None,
    ) -> None:
        """Take the values of all parameters and place them; `values` is empty of them afterwards.

        Masters keep every bit of an fp32 value; moments (exp_avg, exp_avg_sq) start at zero unless
        given. `progress` is told the bytes placed since its last call. On failure the values are
        back in `values`.

        Raises:
            PlanMismatch: stubs do not match the buckets, or tiers that no update rule covers.
            LohanError: a budget is exceeded; names what asked.
        """
        resources = self._resources
        resources.check_open()
        if resources.windows is not None:
            raise LohanError("this runtime has adopted its parameters already")
        for bucket in buckets:
            for spec in bucket.params:
                stub = stubs[spec.pid]
                if tuple(stub.shape) != spec.shape or stub.dtype != getattr(torch, bucket.dtype):
                    raise PlanMismatch(
                        f"{spec.name} is {tuple(stub.shape)} {stub.dtype}, but was planned as "
                        f"{spec.shape} {bucket.dtype}"
                    )
        frozen = (spec.pid for b in buckets if not b.trainable for spec in b.params)
        unused = {pid for pid in frozen if stubs[pid].requires_grad}
        with torch.inference_mode(False), torch.no_grad():
            resources.store.adopt(buckets, values, placements, moments or {}, unused, progress)
            try:
                resources.store.accumulate(resources.options.accumulates)
                resources.store.keep_spares(resources.speculating)
                self._open_windows()
            except BaseException:
                resources.store.give_back(values)
                raise

    def give_back(self, values: MutableMapping[int, Value]) -> None:
        """Undo adopt(), before settle(): every value is back in `values`, as it was or as fp32.

        One that was interrupted may be called again.
        """
        self._resources.check_open()
        self._resources.close_windows()
        with torch.inference_mode(False), torch.no_grad():
            self._resources.store.give_back(values)

    def settle(self) -> None:
        """After adopt(), before any step: the values stay, and what they came from is let go."""
        self._resources.store.settle()

    def place(self, placements: Sequence[BucketPlacement], options: RuntimeOptions) -> None:
        """Migrate to other tiers and windows, one bucket at a time, when all that runs has finished.

        `placements` are in the order of adopt()'s buckets. Gradients that wait for step() are not
        allowed, nor a live forward; accumulated ones go along.

        Raises:
            TrainingLoopError: in the middle of a step.
            LohanError: a budget is exceeded; every value is whole, in its old or its new tier.
        """
        resources = self._resources
        resources.check_open()
        if resources.windows is None:
            resources.set_options(options)
            return
        self.values.end_watch()
        self.passes.quiet()
        if self.passes.awaits_backward or resources.windows.updates.pending:
            raise TrainingLoopError("the plan can change between steps only; call opt.step() first")
        self.observer.note_native()
        resources.close_windows()
        resources.set_options(options)
        with torch.inference_mode(False), torch.no_grad():
            try:
                store = resources.store
                if not options.accumulates:
                    store.accumulate(False)
                store.drop_spares_but(resources.speculating)
                store.migrate(dict(zip(store.homes, placements, strict=True)))
                store.accumulate(options.accumulates)
                store.keep_spares(resources.speculating)
            finally:
                self._open_windows()

    def _open_windows(self) -> None:
        self._resources.open_windows()
        self.observer.placed()
        hyper = self._resources.hyper
        if hyper is not None:
            self._resources.attach(hyper)

    def attach(self, optimizer: HyperSource) -> None:
        """Take hyperparameters from `optimizer` for as long as it lives; the caller keeps it.

        Raises:
            TrainingLoopError: another one is alive.
            LohanError: it clips gradients, which this overlap mode cannot.
        """
        present = self._resources.hyper
        if present is not None and present is not optimizer:
            raise TrainingLoopError(
                "this model has an optimizer already; change its param_groups instead of making "
                "another one"
            )
        self._resources.attach(optimizer)

    def close(self) -> None:
        """Give everything back. May be repeated, in any state."""
        self.values.end_watch()
        self.observer.ends()
        self.passes.close()
        self._finalizer()

    def stats(self) -> RuntimeStats:
        """What has been counted since this was made."""
        return self.observer.stats()

    @property
    def number(self) -> int:
        """That of its ops."""
        return self.passes.number

    @property
    def device(self) -> torch.device:
        """Where the model computes."""
        return self._resources.device.device

    @property
    def deadline_s(self) -> float:
        """How long one wait may last."""
        return self._resources.waits.deadline_s

    @property
    def closed(self) -> bool:
        return self._resources.closed

    # Training loop

    def step(self) -> None:
        """Complete the last backward's update (or begin it; see Overlap). Nothing without a backward.

        Raises:
            TrainingLoopError: an earlier update failed, so there is nothing sound to go on from.
        """
        windows = self._resources.windows
        if windows is None:
            return
        self.passes.recover()
        self._resources.progress.check_whole()
        self.observer.stepped()
        windows.updates.under_way.pump()
        windows.updates.step()

    def discard_gradients(self) -> None:
        """Forget gradients that wait for step(), as plain torch's zero_grad() does."""
        if self._resources.windows is not None:
            self._resources.windows.updates.discard()

    @property
    def gradients_pending(self) -> bool:
        """True between a backward and its step(), and while gradients are accumulated."""
        return self._resources.gradients_pending

    def unscale_gradients(self, inverse: float) -> bool:
        """Let step() multiply the gradients by this, in fp32; True if one of them is NaN or Inf.

        Raises:
            TrainingLoopError: no gradients wait for step(), or their updates have been made.
        """
        self.passes.recover()
        self._resources.progress.check_whole()
        return self._resources.opened().updates.unscale(inverse)

    def skip_step(self) -> None:
        """Drop the gradients that wait for step(), and count a step that changed nothing."""
        self.observer.stepped()
        self._resources.opened().updates.skip()

    @property
    def last_grad_norm(self) -> float | None:
        """Global norm before clipping of the last step; None before one, or without clipping."""
        return self._resources.progress.last_grad_norm

    @property
    def waits_for_step(self) -> bool:
        """True where updates begin in step(), not during the backward."""
        return self._resources.overlap.waits_for_step

    def drain(self) -> None:
        """Block until every update and every transfer has finished.

        Raises:
            TransferError: one failed.
        """
        self._resources.drain()

    def background_reader(self) -> Callable[[int, str, int, torch.Tensor], None]:
        """`values.read_piece` for another thread, while steps go on; see `values.watch`."""
        through = self._resources.pools.lasting_bounce()

        def read(pid: int, section: str, start: int, out_N: torch.Tensor) -> None:
            # Through the runtime, which is not closed while something reads.
            self.values.read_piece(pid, section, start, out_N, through)

        return read
