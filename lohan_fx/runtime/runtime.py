"""The runtime: does the moves of ops.py over GPU, DRAM and SSD, and owns everything they touch.

Runtime     which pass is under way, which order of calls is legal
  inbound      weights and activations on their way to the GPU
  activations  activations on their way out, and where they are kept
  updates      gradients, the optimizer
    gradients  the memory gradients wait in
    norms      how large they are, whether they are finite
    jobs       what the CPU does: updates, sums of several backwards
  buckets      weights and optimizer state at rest
  memory       accounted memory of the three tiers; staging
    holdings     what they hold, by class
  pace         how long steps take
  watcher      what somebody sees who looks: ranges of torch's profiler
    recorder     notes of what happens
    timelines    the steps that were noted, as a plan has them
  device       streams, copies, events
"""

from __future__ import annotations

import contextlib
import enum
import itertools
import weakref
from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, field

import torch

from lohan_fx import native, ops
from lohan_fx.errors import LohanError, PlanMismatch, TrainingLoopError
from lohan_fx.piecewise import Value
from lohan_fx.plan.timeline import Timeline
from lohan_fx.planner import Overlap
from lohan_fx.program import Bucket, BucketPlacement, Names, Program, Tier

from .activations import Slots
from .buckets import BucketHome
from .device import Arrival, Device, open_device
from .gradients import GradPlan
from .holdings import Holdings
from .inbound import Inbound, Incoming, Key, Source
from .layout import param_views
from .memory import Arena, Pools, require_fit
from .options import HyperSource, Progress, RuntimeOptions, RuntimeStats
from .pace import Pace
from .recorder import Recorder
from .resting import InDram, OnSsd
from .store import BucketStore
from .timelines import timelines
from .updates import Updates
from .waits import Waits
from .watcher import PassWatcher

_CREATE_OPTIMIZER = (
    "this model has no optimizer yet; create lohan_fx.AdamW(model.parameters(), ...) before the first "
    "training step"
)
_SECOND_BACKWARD = (
    "a second backward before opt.step() would count two batches as one step; call opt.step() first, "
    "or wrap all but the last micro-batch in model.no_sync()"
)
_MISSING_STEP = (
    "opt.step() was not called after the last backward, whose updates have been made already "
    '(overlap="{overlap}"); call it after every backward, or compile with overlap="next-forward", '
    "where a step may be left out"
)
_LIVE_FORWARD = (
    "a training forward while another one's activations wait for their backward; call loss.backward() "
    "or drop the first loss, or run this one under torch.no_grad()"
)
_DEAD_FORWARD = (
    "the activations of this forward are gone: a backward has used them (retain_graph is not "
    "supported), or a later pass failed; run the forward again"
)

_STEP_BETWEEN = (
    "opt.step() changed the weights between this forward and its backward; "
    "call loss.backward() first"
)


class PassKind(enum.Enum):
    """What is under way.

    EVALUATION: a forward alone.
    FORWARD: a training forward; its activations are being moved out.
    BACKWARD: the backward of the live forward.
    """

    EVALUATION = enum.auto()
    FORWARD = enum.auto()
    BACKWARD = enum.auto()


@dataclass(slots=True)
class _Pass:
    kind: PassKind
    program: Program
    fetched: dict[int, Incoming | None] = field(default_factory=dict)  # None: GPU-resident
    reloads: dict[int, Incoming] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class _Live:
    """A training forward whose backward has not run."""

    token: int
    program: Program
    step: int  # updates that its weights had seen
    accumulates: bool  # it ran inside no_sync(), so its gradients wait for those of a later one


class _BucketSource:
    """A bucket's weights as seen by the read-ahead. Implements inbound.Source."""

    def __init__(self, home: BucketHome, updates: Updates) -> None:
        self._home = home
        self._updates = updates
        self.name = f"the weights of {home.bucket.name}"
        self.nbytes = home.bucket.weight_bytes

    def is_valid(self) -> bool:
        return self._updates.is_settled(self._home.bucket.index)

    def make_valid(self) -> None:
        self._updates.settle(self._home.bucket.index)

    def host(self) -> torch.Tensor | None:
        weight = self._home.weight
        return weight.memory.bytes[: self.nbytes] if isinstance(weight, InDram) else None

    def on_ssd(self) -> tuple[int, int]:
        assert isinstance(self._home.weight, OnSsd)
        return self._home.weight.extent, 0

    def after(self) -> Sequence[Arrival]:
        return ()


class _Windows:
    """Everything whose size the options fix: staging, gradient and state buffers, and their users."""

    def __init__(
        self,
        pools: Pools,
        device: Device,
        waits: Waits,
        store: BucketStore,
        options: RuntimeOptions,
        progress: Progress,
    ) -> None:
        self._pools = pools
        self._arenas: list[Arena] = []
        self.inbound_arena = self._arena(options.inbound_bytes, "the inbound staging")
        self.outbound_arena = self._arena(options.outbound_bytes, "the outbound staging")
        self.inbound = Inbound(pools, device, waits, self.inbound_arena)
        self.slots = Slots(pools, device, waits, self.outbound_arena, poison=options.poison)
        self.updates = Updates(pools, device, waits, store, options, progress)
        for home in store.homes.values():
            if home.weight_tier is Tier.SSD:
                name = f"the weights of {home.bucket.name}"
                require_fit(home.bucket.weight_bytes, self.inbound_arena, name, "inbound_bytes")

    def _arena(self, nbytes: int, what: str) -> Arena | None:
        if not nbytes:
            return None
        arena = Arena(self._pools.host_bytes(nbytes, what, pinned=True))
        self._arenas.append(arena)
        return arena

    def close(self) -> None:
        """Give everything back; the device is idle, and no job is under way."""
        self.inbound.cancel()
        self.slots.close()
        self.updates.close()
        for arena in self._arenas:
            self._pools.free_host(arena.memory)
        self._arenas.clear()


class _Parts:
    """What must be closed, in an object that does not refer to the Runtime (so it can outlive it)."""

    def __init__(self, device: Device, engine: native.FileEngine | None, pools: Pools) -> None:
        self.device = device
        self.engine = engine
        self.pools = pools
        self.windows: _Windows | None = None
        self.store = BucketStore(pools)

    def close(self) -> None:
        """Join the threads, wait for what is in flight, unpin, unmap; in any state, after any error."""
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


class Runtime:
    """Implements ops.Moves. One for each compiled model; not thread-safe, as autograd is not.

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
        self._options = options or RuntimeOptions()
        self._overlap = Overlap(self._options.overlap)
        self._waits = Waits(self._options.deadline_s)
        self._device = open_device(device)
        if engine is None and ssd:
            engine = native.FileEngine(
                [str(directory) for directory, _ in ssd],
                capacities=[capacity or 0 for _, capacity in ssd],
                verify=verify_io,
            )
        limits = [capacity for _, capacity in ssd if capacity is not None]
        self._pools = Pools(
            self._device,
            engine,
            self._waits,
            gpu_bytes=gpu_bytes,
            dram_bytes=dram_bytes,
            ssd_bytes=sum(limits) if ssd and len(limits) == len(ssd) else None,
        )
        self._parts = _Parts(self._device, engine, self._pools)
        self._finalizer = weakref.finalize(self, self._parts.close)
        self._programs: dict[int, Program] = {}
        self._names: dict[int, Names] = {}
        self._checked: set[int] = set()  # programs whose staging needs fit
        self._grad_plans: dict[int, GradPlan] = {}
        self._hyper_ref: weakref.ref[HyperSource] | None = None
        self._pass: _Pass | None = None
        self._live: _Live | None = None
        self._dropped: set[int] = set()  # tokens of handles that are gone
        self._settle_watch: Callable[[], None] | None = None
        self._tokens = itertools.count(1)
        self._progress = Progress()
        self.no_sync = (
            False  # forwards from now on leave their gradients to a later backward's step
        )
        self._watcher = PassWatcher()
        self._pace = Pace()
        self.number = ops.register(self)
        ops.offer_watcher(self.number, self._watcher)

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
        self._check_open()
        if self._parts.windows is not None:
            raise LohanError("this runtime has adopted its parameters already")
        for bucket in buckets:
            for spec in bucket.params:
                stub = stubs[spec.pid]
                if tuple(stub.shape) != spec.shape or stub.dtype != getattr(torch, bucket.dtype):
                    raise PlanMismatch(
                        f"{spec.name} is {tuple(stub.shape)} {stub.dtype}, but was planned as "
                        f"{spec.shape} {bucket.dtype}"
                    )
        with torch.inference_mode(False), torch.no_grad():
            self._parts.store.adopt(buckets, values, placements, moments or {}, progress)
            try:
                self._parts.store.accumulate(self._options.accumulates)
                self._parts.store.keep_spares(self._overlap is Overlap.SPECULATIVE)
                self._open_windows()
            except BaseException:
                self._parts.store.give_back(values)
                raise

    def give_back(self, values: MutableMapping[int, Value]) -> None:
        """Undo adopt(), before any step: every value is back in `values`, masters as fp32."""
        self._check_open()
        if self._parts.windows is not None:
            self._parts.windows.close()
            self._parts.windows = None
        with torch.inference_mode(False), torch.no_grad():
            self._parts.store.give_back(values)

    def place(self, placements: Sequence[BucketPlacement], options: RuntimeOptions) -> None:
        """Migrate to other tiers and windows, one bucket at a time, when all that runs has finished.

        `placements` are in the order of adopt()'s buckets. Gradients that wait for step() are not
        allowed, nor a live forward; accumulated ones go along.

        Raises:
            TrainingLoopError: in the middle of a step.
            LohanError: a budget is exceeded; every value is whole, in its old or its new tier.
        """
        self._check_open()
        windows = self._parts.windows
        if windows is None:
            self._set_options(options)
            return
        self._end_watch()
        self._quiet()
        if self._live is not None or windows.updates.pending:
            raise TrainingLoopError("the plan can change between steps only; call opt.step() first")
        self._note_native()
        windows.close()
        self._parts.windows = None
        self._set_options(options)
        with torch.inference_mode(False), torch.no_grad():
            try:
                store = self._parts.store
                if not options.accumulates:
                    store.accumulate(False)
                speculates = self._overlap is Overlap.SPECULATIVE
                if not speculates:
                    store.keep_spares(False)
                store.migrate(dict(zip(store.homes, placements, strict=True)))
                store.accumulate(options.accumulates)
                store.keep_spares(speculates)
            finally:
                self._open_windows()

    def _set_options(self, options: RuntimeOptions) -> None:
        self._options = options
        self._overlap = Overlap(options.overlap)
        self._waits.deadline_s = options.deadline_s

    def _open_windows(self) -> None:
        self._grad_plans.clear()
        self._checked.clear()
        before = self._pools.host_addresses()
        try:
            windows = _Windows(
                self._pools,
                self._device,
                self._waits,
                self._parts.store,
                self._options,
                self._progress,
            )
        except BaseException:
            self._pools.free_hosts_but(before)
            raise
        self._parts.windows = windows
        self._look_at_holdings()
        hyper = self._hyper
        if hyper is not None:
            windows.updates.attach(hyper)

    def add_program(self, program: Program, names: Names | None = None) -> None:
        """Make a program known under its index; `names` are for those who watch it run."""
        if program.index in self._programs:
            raise LohanError(f"there is a program {program.index} already")
        self._programs[program.index] = program
        self._names[program.index] = names or Names()

    def attach(self, optimizer: HyperSource) -> None:
        """Take hyperparameters from `optimizer` for as long as it lives; the caller keeps it.

        Raises:
            TrainingLoopError: another one is alive.
            LohanError: it clips gradients, which this overlap mode cannot.
        """
        if self._hyper is not None and self._hyper is not optimizer:
            raise TrainingLoopError(
                "this model has an optimizer already; change its param_groups instead of making "
                "another one"
            )
        if self._parts.windows is not None:
            self._updates.attach(optimizer)
        self._hyper_ref = weakref.ref(optimizer)

    @property
    def _hyper(self) -> HyperSource | None:
        return None if self._hyper_ref is None else self._hyper_ref()

    def close(self) -> None:
        """Give everything back. May be repeated, in any state."""
        self._end_watch()
        self._note_native()
        ops.watched.pop(self.number, None)
        self._pass = None
        self._live = None
        self._finalizer()

    @property
    def device(self) -> torch.device:
        """Where the model computes."""
        return self._device.device

    @property
    def closed(self) -> bool:
        return not self._finalizer.alive

    # Training loop

    def step(self) -> None:
        """Complete the last backward's update (or begin it; see Overlap). Nothing without a backward.

        Raises:
            TrainingLoopError: an earlier update failed, so there is nothing sound to go on from.
        """
        if self._parts.windows is None:
            return
        self._recover()
        self._check_torn()
        self._has_stepped()
        self._updates.pump()
        self._updates.step()

    def discard_gradients(self) -> None:
        """Forget gradients that wait for step(), as plain torch's zero_grad() does."""
        if self._parts.windows is not None:
            self._updates.discard()

    @property
    def gradients_pending(self) -> bool:
        """True between a backward and its step(), and while gradients are accumulated."""
        updates = None if self._parts.windows is None else self._updates
        return updates is not None and (updates.pending or updates.accumulated)

    def unscale_gradients(self, inverse: float) -> bool:
        """Let step() multiply the gradients by this, in fp32; True if one of them is NaN or Inf.

        Raises:
            TrainingLoopError: no gradients wait for step(), or their updates have been made.
        """
        self._recover()
        self._check_torn()
        return self._updates.unscale(inverse)

    def skip_step(self) -> None:
        """Drop the gradients that wait for step(), and count a step that changed nothing."""
        self._has_stepped()
        self._updates.skip()

    @property
    def last_grad_norm(self) -> float | None:
        """Global norm before clipping of the last step; None before one, or without clipping."""
        return self._progress.last_grad_norm

    @property
    def waits_for_step(self) -> bool:
        """True where updates begin in step(), not during the backward."""
        return self._overlap.waits_for_step

    @property
    def awaits_backward(self) -> bool:
        """True between a training forward and its backward."""
        return self._live is not None

    @property
    def step_count(self) -> int:
        """Optimizer steps made. Setting it says that a checkpoint has been loaded, all of whose
        parameters have been updated so often; see set_steps()."""
        return self._progress.step_count

    @step_count.setter
    def step_count(self, value: int) -> None:
        self._progress.step_count = value
        self._progress.steps.clear()
        for home in self._parts.store.homes.values():
            self._progress.steps.update({spec.pid: value for spec in home.bucket.params})
        self._progress.torn = self._progress.lost = None

    def steps(self, pid: int) -> int:
        """Updates that a parameter has had: those steps in which it had a gradient."""
        return self._progress.steps[pid]

    def set_steps(self, pid: int, value: int) -> None:
        """As a checkpoint has it; step_count becomes the most that a parameter has had."""
        self._progress.steps[pid] = value
        self._progress.step_count = max(self._progress.steps.values())
        self._progress.torn = self._progress.lost = None

    def drain(self) -> None:
        """Block until every update and every transfer has finished.

        Raises:
            TransferError: one failed.
        """
        if self._parts.windows is not None:
            self._updates.drain()
            self._device.synchronize()

    def abort(self) -> None:
        """Forget the pass under way, if any: free its buffers, drop its gradients.

        In the modes that update during the backward, updates that were made stay made; training on
        from there raises TrainingLoopError.
        """
        current, self._pass = self._pass, None
        self._watcher.abort()
        windows = self._parts.windows
        if current is None or windows is None:
            return
        # What failed may fail again here; the error that matters is under way already.
        failures = contextlib.suppress(LohanError, RuntimeError)
        with failures:
            self._device.join()
        with failures:
            windows.inbound.cancel()
        if current.kind is not PassKind.EVALUATION:
            self._live = None
            with failures:
                windows.slots.forget()
        if current.kind is PassKind.BACKWARD:
            windows.updates.abandon()

    # Values

    def weight(self, pid: int) -> torch.Tensor:
        """A CPU copy of a parameter as the model computes with it."""
        self._quiet()
        home, spec = self._parts.store.find(pid)
        return home.load(spec, "weight")

    def master(self, pid: int) -> torch.Tensor:
        """An fp32 CPU copy of a parameter; of a frozen one, its weight."""
        self._quiet()
        home, spec = self._parts.store.find(pid)
        if not home.bucket.trainable:
            return home.load(spec, "weight").float()
        return home.load(spec, "master")

    def moments(self, pid: int) -> tuple[torch.Tensor, torch.Tensor]:
        """CPU copies of exp_avg and exp_avg_sq.

        Raises:
            LohanError: the parameter is frozen.
        """
        self._quiet()
        home, spec = self._parts.store.find(pid)
        return home.load(spec, "exp_avg"), home.load(spec, "exp_avg_sq")

    def read_piece(self, pid: int, section: str, start: int, out_N: torch.Tensor) -> None:
        """Fill `out_N` from element `start` of a parameter's section on, in the order of its strides.

        Sections are "weight" (compute dtype) and, where it is trainable, "master", "exp_avg" and
        "exp_avg_sq" (fp32). The last update must be complete: see `rest`.
        """
        home, spec = self._parts.store.find(pid)
        home.read_piece(spec, section, start, out_N)

    def background_reader(self) -> Callable[[int, str, int, torch.Tensor], None]:
        """`read_piece` for another thread, while steps go on; see `watch`."""
        through = self._pools.lasting_bounce()

        def read(pid: int, section: str, start: int, out_N: torch.Tensor) -> None:
            home, spec = self._parts.store.find(pid)  # keeps the runtime while something reads
            home.read_piece(spec, section, start, out_N, through)

        return read

    def watch(self, before_update: Callable[[int], None], settle: Callable[[], None]) -> None:
        """Call `before_update(bucket)` before a bucket's values at rest change in a step, and
        `settle()`, once, before they change or move otherwise."""
        self._updates.before_update = before_update
        self._settle_watch = settle

    def _end_watch(self) -> None:
        settle, self._settle_watch = self._settle_watch, None
        if settle is not None:
            settle()
            if self._parts.windows is not None:
                self._updates.before_update = None

    @property
    def deadline_s(self) -> float:
        """How long one wait may last."""
        return self._waits.deadline_s

    def rest(self) -> None:
        """Make the values at rest those after the last step, for `read_piece`.

        Raises:
            TrainingLoopError: in the middle of a step, or after an update that failed.
        """
        self._quiet()
        self._check_torn()
        if self.gradients_pending:
            raise TrainingLoopError(
                "between backward and opt.step() there is no whole state; call opt.step() first"
            )

    def begin_restore(self) -> None:
        """From here on the values are those of no step, until `end_restore`.

        Raises:
            TrainingLoopError: gradients wait for step().
        """
        self._end_watch()
        self._quiet()
        if self.gradients_pending:
            raise TrainingLoopError(
                "a checkpoint cannot be loaded between backward and opt.step(); call opt.step() first"
            )
        self._progress.torn = (
            "loading a checkpoint stopped in the middle, so the weights are a mixture; load it "
            "again"
        )

    def end_restore(self, steps: Mapping[int, int]) -> None:
        """Everything has been set; `steps` are step counts by pid, others stay."""
        for pid, value in steps.items():
            self.set_steps(pid, value)
        self._progress.torn = self._progress.lost = None

    def set_master(self, pid: int, value: Value) -> None:
        """Set a parameter: its master and, rounded from that, its weight."""
        self._end_watch()
        self._quiet()
        home, spec = self._parts.store.find(pid)
        home.set_value(spec, value)

    def set_moments(self, pid: int, exp_avg: Value, exp_avg_sq: Value) -> None:
        """Set both moments.

        Raises:
            LohanError: the parameter is frozen.
        """
        self._end_watch()
        self._quiet()
        home, spec = self._parts.store.find(pid)
        home.store(spec, ("exp_avg",), exp_avg)
        home.store(spec, ("exp_avg_sq",), exp_avg_sq)

    def reset_moments(self) -> None:
        """Both moments of every parameter to zero, steps to 0: where a new optimizer starts."""
        self._end_watch()
        self._quiet()
        for home in self._parts.store.homes.values():
            if home.bucket.trainable:
                home.zero_moments()
        self.step_count = 0

    # Reports

    def stats(self) -> RuntimeStats:
        engine, pools = self._pools.engine, self._pools
        accounts = (pools.gpu, pools.dram, pools.ssd)
        updates = {} if self._parts.windows is None else self._updates.stats()
        return RuntimeStats(
            moved_bytes={
                "h2d": self._device.bytes_in,
                "d2h": self._device.bytes_out,
                "ssd_read": engine.bytes_read if engine is not None else 0,
                "ssd_write": engine.bytes_written if engine is not None else 0,
            },
            peak_bytes={str(account.tier): account.peak_bytes for account in accounts},
            current_bytes={str(account.tier): account.current_bytes for account in accounts},
            stall_s=dict(self._waits.stall_s),
            updates=updates,
            busy_s={
                "ssd_read": engine.read_busy_s if engine is not None else 0.0,
                "ssd_write": engine.write_busy_s if engine is not None else 0.0,
                "cpu_adam": updates.get("adam_s", 0.0),
            },
            step_s=self._pace.step_s,
            steps=self._progress.step_count,
            skipped_steps=self._progress.skipped_steps,
        )

    def take_trace(self) -> list[tuple[str, str, float, float]]:
        """(what, lane, start, end) of native work since the last call; seconds of time.monotonic()."""
        events = [] if self._parts.windows is None else self._updates.take_trace()
        if self._pools.engine is not None:
            events += self._pools.engine.take_trace()
        return events

    # Recording

    def record(self, recorder: Recorder | None) -> None:
        """Let `recorder` note what happens from here on; None: nobody."""
        self._check_open()
        self.take_trace()  # what ended before
        self._device.recorder = self._waits.recorder = self._watcher.recorder = recorder
        self._look_at_holdings()
        if recorder is None:
            ops.watched.pop(self.number, None)
        else:
            ops.watched[self.number] = self._watcher

    def recorded(self, recorder: Recorder) -> list[Timeline]:
        """The steps that `recorder` has noted, the last one up to here; it notes no more.

        Completes what is under way. Raises TransferError where that fails.
        """
        recorder.close()
        if not self.closed:
            try:
                self.drain()
                self._note_native()
            finally:
                self.record(None)
        return timelines(recorder, self._names)

    def _note_native(self) -> None:
        if self._watcher.recorder is not None and not self.closed:
            self._watcher.recorder.native += self.take_trace()

    def _look_at_holdings(self) -> None:
        windows, watcher = self._parts.windows, self._watcher
        watcher.holdings = None
        if windows is not None and watcher.recorder is not None:
            parts = (windows.inbound, windows.slots, windows.updates)
            watcher.holdings = Holdings(self._pools, self._parts.store, *parts)

    def _has_stepped(self) -> None:
        self._pace.step()
        if self._watcher.recorder is not None:
            self._watcher.recorder.stepped()

    def _begins(self, program: Program) -> None:
        """A forward begins: tell whoever watches."""
        watcher = self._watcher
        if program.training:
            self._pace.forward()
        watcher.begin(self._names[program.index], "forward")
        if watcher.recorder is not None and watcher.holdings is not None:
            self._note_native()
            resting = watcher.holdings.resting()
            watcher.recorder.begin(program.index, program.training, resting)

    # ops.Moves

    def begin(self, program: int) -> torch.Tensor:
        self._recover()
        windows = self._opened()
        entry = self._programs[program]
        self._pools.drop_bounce()
        self._check_torn()
        if windows.updates.pending and not self._overlap.waits_for_step:
            raise TrainingLoopError(_MISSING_STEP.format(overlap=self._overlap))
        if entry.training:
            self._begin_training(entry)
        self._begins(entry)
        self._pump()
        token = next(self._tokens)
        self._pass = _Pass(PassKind.FORWARD if entry.training else PassKind.EVALUATION, entry)
        handle = torch.tensor([token], dtype=torch.int64, device="cpu")
        if entry.training:
            self._live = _Live(token, entry, self._progress.step_count, self.no_sync)
            weakref.finalize(handle, self._dropped.add, token).atexit = False
        windows.inbound.start(
            token, [*self._incoming(entry, "forward"), *self._incoming(entry, "backward")]
        )
        return handle

    def _begin_training(self, program: Program) -> None:
        if self._hyper is None:
            raise TrainingLoopError(_CREATE_OPTIMIZER)
        if self._live is not None:
            _finish_failed_backward()
            self._recover()
        if self._live is not None:
            raise TrainingLoopError(_LIVE_FORWARD)
        if program.index not in self._checked:
            windows = self._opened()
            for slot in program.slots:
                if slot.tier is Tier.SSD:
                    name = f"activation {slot.name}"
                    require_fit(slot.nbytes, windows.inbound_arena, name, "inbound_bytes")
                    require_fit(slot.nbytes, windows.outbound_arena, name, "outbound_bytes")
            self._checked.add(program.index)
        self._opened().slots.activate(program)

    def begin_backward(self, handle: torch.Tensor) -> None:
        self._recover()
        windows = self._opened()
        self._check_torn()
        if self._hyper is None:
            raise TrainingLoopError(_CREATE_OPTIMIZER)
        token = int(handle[0])
        live = self._live
        if windows.updates.pending:
            raise TrainingLoopError(_SECOND_BACKWARD)
        if live is None or live.token != token:
            raise TrainingLoopError(_DEAD_FORWARD)
        if live.step != self._progress.step_count:
            raise TrainingLoopError(_STEP_BETWEEN)
        program = live.program
        if program.index not in self._grad_plans:
            self._grad_plans[program.index] = GradPlan.of(program, self._parts.store)
        self._pass = _Pass(PassKind.BACKWARD, program)
        self._watcher.begin(self._names[program.index], "backward")
        if self._watcher.recorder is not None:
            self._watcher.recorder.begin_backward()
        windows.updates.begin_backward(self._grad_plans[program.index], accumulate=live.accumulates)
        if windows.inbound.token != token:
            windows.inbound.start(token, list(self._incoming(program, "backward")))
        self._pump()

    def end(self) -> None:
        current, windows = self._current(), self._opened()
        try:
            if current.fetched:
                name = self._parts.store.homes[next(iter(current.fetched))].bucket.name
                raise LohanError(f"the pass ended without releasing {name}")
            if current.kind is PassKind.BACKWARD:
                windows.updates.end_backward()
                windows.slots.consumed()
                self._live = None
            self._pump()
        except BaseException:
            self.abort()
            raise
        self._pass = None

    def fetch(self, bucket: int) -> None:
        self._pump()
        resident = self._parts.store.homes[bucket].weight_tier is Tier.GPU
        item = None if resident else self._opened().inbound.request(("fetch", bucket))
        self._current().fetched[bucket] = item

    def wait(self, bucket: int) -> list[torch.Tensor]:
        self._pump()
        windows = self._opened()
        home = self._parts.store.homes[bucket]
        item = self._current().fetched[bucket]
        if item is None:
            windows.updates.settle_on_device(bucket)
            return home.views()
        return param_views(home.bucket, home.dtype, windows.inbound.receive(item).bytes)

    def release(self, bucket: int) -> None:
        current, windows = self._current(), self._opened()
        item = current.fetched.pop(bucket)
        if item is not None:
            assert item.device is not None
            if self._options.poison:
                item.device.bytes.fill_(0xFF)
            windows.inbound.release(item)
        if current.kind is PassKind.BACKWARD:
            windows.updates.release(bucket, None if item is None else item.arrival)
        self._pump()

    def offload(self, slot: int, x: torch.Tensor) -> None:
        self._pump()
        self._opened().slots.offload(slot, x)

    def offload_wait(self, slot: int) -> None:
        self._opened().slots.offload_wait(slot)
        self._pump()

    def reload(self, slot: int) -> None:
        self._pump()
        self._current().reloads[slot] = self._opened().inbound.request(("reload", slot))

    def reload_wait(self, slot: int) -> torch.Tensor:
        self._pump()
        windows = self._opened()
        item = self._current().reloads.pop(slot)
        memory = windows.inbound.receive(item).bytes
        spec = windows.slots.slot(slot)
        typed = memory.view(getattr(torch, spec.dtype))
        value = typed.as_strided(spec.shape, spec.stride, typed.storage_offset())
        windows.inbound.release(item)
        return value

    def grad(self, pid: int, g: torch.Tensor) -> None:
        self._opened().updates.arrive(pid, g)
        self._pump()

    # Internals

    @property
    def _updates(self) -> Updates:
        return self._opened().updates

    def _opened(self) -> _Windows:
        self._check_open()
        windows = self._parts.windows
        if windows is None:
            raise LohanError("the parameters have not been placed yet (Runtime.adopt)")
        return windows

    def _current(self) -> _Pass:
        if self._pass is None:
            raise LohanError("a move outside of a pass: begin() or begin_backward() comes first")
        return self._pass

    def _check_open(self) -> None:
        if self.closed:
            raise LohanError("this model has been closed")

    def _check_torn(self) -> None:
        if self._progress.torn is not None:
            raise TrainingLoopError(self._progress.torn)

    def _pump(self) -> None:
        """Advance everything that can advance without blocking."""
        windows = self._opened()
        windows.updates.pump()
        windows.slots.pump()
        windows.inbound.pump()

    def _recover(self) -> None:
        """Clean up after a pass left in the middle, and after a forward nobody will use."""
        self._check_open()
        self.abort()
        live = self._live
        if live is not None and live.token in self._dropped:
            self._live = None
            windows = self._opened()
            if windows.inbound.token == live.token:
                windows.inbound.cancel()
            windows.slots.forget()
        if self._live is None:
            self._dropped.clear()

    def _quiet(self) -> None:
        """Make values at rest the newest, and forget what was read ahead of them."""
        self._recover()
        if self._parts.windows is not None:
            self._parts.windows.inbound.cancel()
        self.drain()

    def _incoming(self, program: Program, which: str) -> Iterator[tuple[Key, Source]]:
        """What a pass brings to the GPU, in program order."""
        windows = self._opened()
        for move in program.forward if which == "forward" else program.backward:
            if move.op == "fetch":
                home = self._parts.store.homes[move.arg]
                if home.weight_tier is not Tier.GPU:
                    yield ("fetch", move.arg), _BucketSource(home, windows.updates)
            elif move.op == "reload":
                yield ("reload", move.arg), windows.slots.source(move.arg)


def _finish_failed_backward() -> None:
    """Let autograd drop what is left of a backward that raised: it keeps that until the next one."""
    with torch.enable_grad():
        torch.zeros((), requires_grad=True).clone().backward()  # type: ignore[no-untyped-call]
