"""From a gradient's arrival to new weights: host gradient buffers, CPU and GPU Adam, clipping, sums.

[Note: when an update may start]
A bucket's update may start when (1) every gradient of it that this backward makes has been handed
over, and (2) the backward has released the bucket, if it reads it at all. Both are facts of program
order; what they mean on the device is carried by events. The CPU's update waits for the copy out of
the bucket's last gradient (the copies are in order, so for all of them), and for the copy in of this
backward's fetch: it reads the weights that the update overwrites, and a gradient made before the
bucket was first used says nothing about it. The upload of new weights waits for the point of the
compute stream at which the update became possible, so the backward has read the old ones.

[Note: sums of several backwards]
An accumulating backward puts each gradient into its bucket's fp32 sum, as gradients come: sum = g of
the first backward, sum = sum + g of later ones. The CPU does it for buckets that it updates. The last
backward of a step does the same and the update reads the sums: in the modes that update during the
backward both are one job, so nothing waits. A parameter without a gradient in the last backward is
updated from what earlier ones gave it, when step() is called.
"""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable, Iterable, Sequence

import torch

from lohan_fx.errors import LohanError, TrainingLoopError
from lohan_fx.planner import Overlap
from lohan_fx.program import ParamSpec

from .adam_gpu import Scale, Update, update_on_device
from .buckets import BucketHome
from .device import Arrival, Device
from .gradients import GradBuffer, GradBuffers, GradPlan, GradWindow
from .jobs import JobQueue, Updated, sum_job, update_job
from .layout import dense
from .memory import Pools
from .norms import GradNorms, StepNorms, Wanted
from .options import AdamGroup, HyperSource, Progress, RuntimeOptions
from .records import Record, UpdateState
from .resting import OnSsd
from .speculation import Speculation
from .store import BucketStore
from .streamed import Streamed
from .sums import add_on_device, adds_of, sum_of
from .under_way import UnderWay
from .waits import Waits


class Updates:
    """Owns gradients and updates of every trainable bucket.

    Args:
        store: all buckets, placed.
        progress: step counts and the like, which outlive this object.

    Buffers are allocated here, once; close() gives them back.
    """

    def __init__(
        self,
        pools: Pools,
        device: Device,
        waits: Waits,
        store: BucketStore,
        options: RuntimeOptions,
        progress: Progress,
    ) -> None:
        self.pending = False  # a backward has finished and step() has not been called
        self._progress = progress
        self.before_update: Callable[[int], None] | None = None  # with the bucket; may block
        self._pools = pools
        self._device = device
        self._waits = waits
        self._store = store
        self._overlap = Overlap(options.overlap)
        self._records = {
            index: Record(home, {spec.pid: spec for spec in home.bucket.params})
            for index, home in store.homes.items()
            if home.bucket.trainable
        }
        self._window = GradWindow(pools, device, options.grad_window_bytes)
        self._plan: GradPlan | None = None
        self._accumulating = False  # this backward's gradients are not the step's last
        self._groups: list[AdamGroup] = []
        self._hyper_ref: weakref.ref[HyperSource] | None = None
        self._wanted = Wanted()
        self._measured: set[int] = set()  # sums on the device whose norm is that of this step
        self._scale = Scale()
        self._changed = 0  # buckets updated in this backward
        self._added = False  # this backward has put a gradient into a sum
        by_cpu = [r.home for r in self._records.values() if r.home.updated_by_cpu]
        self._jobs = JobQueue(pools, by_cpu, options, device.device.index or 0)
        self._buffers = GradBuffers(
            pools, by_cpu, None if self._overlap.waits_for_step else options.grad_buffers
        )
        streamed = [r.home for r in self._records.values() if r.home.streamed]
        if streamed and options.accumulates:
            raise LohanError(
                f"the state of {streamed[0].bucket.name} passes through the GPU, which has no sum of "
                "several backwards for it"
            )
        self._streamed = Streamed(pools, device, waits, streamed, options.stream_bytes)
        self.under_way = UnderWay(
            self._records, self._jobs, self._buffers, self._streamed, device, waits, progress
        )
        self._speculation = Speculation(self._jobs, device, waits)
        self._norms: GradNorms | None = None
        if self._overlap.waits_for_step:
            pids = [spec.pid for r in self._records.values() for spec in r.bucket.params]
            self._norms = GradNorms(pools, device, pids)

    @property
    def accumulated(self) -> bool:
        """True where sums of gradients wait for step()."""
        return any(record.home.accumulated for record in self._records.values())

    # A backward

    def attach(self, hyper: HyperSource) -> None:
        """Take hyperparameters from here, which stays its owner's: what lives here outlives the model."""
        self._hyper_ref = weakref.ref(hyper)
        self._check_overlap(hyper)

    @property
    def _hyper(self) -> HyperSource:
        hyper = None if self._hyper_ref is None else self._hyper_ref()
        assert hyper is not None
        return hyper

    def begin_backward(self, plan: GradPlan, *, accumulate: bool = False) -> None:
        """Args:
            accumulate: add the gradients to the sums that a later backward's update will read.

        Raises:
            TrainingLoopError: earlier sums were lost.
            LohanError: more buckets gather gradients at once than there are buffers.
        """
        hyper = self._hyper
        self._changed = 0
        self._added = False
        self._check_lost()
        if not self._overlap.waits_for_step and plan.most_open > self._buffers.num_ring:
            raise LohanError(
                f"this backward gathers gradients of {plan.most_open} buckets at the same time, with "
                f"{self._buffers.num_ring} gradient buffers; raise grad_buffers"
            )
        self._plan = plan
        self._accumulating = accumulate
        self._check_overlap(hyper)
        self._wanted = Wanted.by(hyper)
        self._measured.clear()
        if self._norms is not None:
            self._norms.clear()
        self._groups = hyper.groups()
        self._speculation.begin(self._groups)
        for index, pids in plan.pids.items():
            record = self._records[index]
            record.left = set(pids)
            record.arrived = []
            record.unreleased = index in plan.released
            record.last_copy = record.fetched = None

    def arrive(self, pid: int, g: torch.Tensor) -> None:
        """A gradient is final: copy it out, or keep it where its bucket is updated on the GPU."""
        home, spec = self._store.find(pid)
        record = self._records.get(home.bucket.index)
        if record is None or pid not in record.left:
            raise LohanError(f"the gradient of {spec.name} arrives twice, or was not planned")
        if record.state is not UpdateState.GATHERING:
            self._gather(record)
        with torch.no_grad():
            flat_N = dense(spec, g, home.dtype)
            if record.buffer is not None:
                record.last_copy = self._copy_out(record.buffer, home, spec, flat_N)
                self._window.push(flat_N, record.last_copy)
            elif record.into_sums:
                self._add_on_device(record, spec, flat_N)
            else:
                self._pools.gpu.hold(flat_N.numel() * flat_N.element_size())
                record.grads[pid] = flat_N
            if not record.into_sums:
                self._measure(spec, flat_N)
        record.left.remove(pid)
        record.arrived.append(pid)
        self._maybe_start(record)

    def _gather(self, record: Record) -> None:
        """Get ready for gradients of a bucket, or for an update from its sums alone."""
        # An update that this step's forward did not read may still be under way.
        self.under_way.settle_on_device(record.bucket.index)
        record.into_sums = self._accumulating or bool(record.home.accumulated)
        if record.home.updated_by_cpu:
            record.buffer = self.under_way.acquire(record)
        record.advance(UpdateState.GATHERING)

    def release(self, bucket: int, fetched: Arrival | None) -> None:
        """The backward has read the bucket for the last time; `fetched` is its copy in, if any."""
        record = self._records.get(bucket)
        if record is None or not record.unreleased:
            return
        record.unreleased = False
        record.fetched = fetched
        self._maybe_start(record)

    def end_backward(self) -> None:
        """Check that every planned gradient came.

        Raises:
            LohanError: one did not; names it.
        """
        plan = self._plan
        assert plan is not None
        missing = [
            self._records[index].specs[pid].name
            for index in plan.pids
            for pid in sorted(self._records[index].left)
        ]
        if missing:
            raise LohanError(
                f"the backward ended without the gradient of {missing[0]}"
                + (f" and {len(missing) - 1} more" if len(missing) > 1 else "")
            )
        held = [self._records[i].bucket.name for i in plan.pids if self._records[i].unreleased]
        if held:
            raise LohanError(f"the backward ended without releasing {held[0]}")
        self._window.clear()
        self.pending = bool(plan.pids) and not self._accumulating

    def abandon(self) -> None:
        """Forget the gradients of a backward that did not finish.

        Sets `torn` where some of its updates had been made already, `lost` where it had added to sums.
        """
        self._window.clear()
        self._speculation.drop()
        for record in self._records.values():
            record.left = set()
            record.unreleased = False
            self._forget_gradients(record)
        if self._changed:
            self._progress.torn = (
                f"a backward stopped after {self._changed} buckets had been updated, so the weights "
                'are between two steps; load a checkpoint. (With overlap="next-forward" nothing is '
                "updated before step().)"
            )
        if self._added:
            self._forget_sums()
            self._progress.lost = (
                "a backward stopped after it had added to accumulated gradients, so these are no sum "
                "of whole micro-batches; call opt.zero_grad() and begin the accumulation anew"
            )
        self._changed = 0
        self._added = False
        self._plan = None

    def discard(self) -> None:
        """Drop gradients that wait for step(), and sums of them, as plain torch's zero_grad() does."""
        self._progress.lost = None
        self._scale = Scale()
        self._forget_sums()
        if self.pending and self._overlap.waits_for_step:
            self._speculation.drop()
            for record in self._records.values():
                self._forget_gradients(record)
            self.pending = False

    # A step

    def unscale(self, inverse: float) -> bool:
        """Multiply the gradients that wait for step() by this in their update; True if one of them is
        NaN or Inf.

        Raises:
            TrainingLoopError: no gradients wait, or their updates have been made.
        """
        self._check_lost()
        if not self._overlap.waits_for_step:
            raise TrainingLoopError(
                f'loss scaling needs every gradient before the first update, which overlap="'
                f'{self._overlap}" does not give; compile with overlap="next-forward", or with "auto" '
                "and the GradScaler made before the first forward"
            )
        if not (self.pending or self.accumulated):
            raise TrainingLoopError(
                "there are no gradients to unscale; call scaler.scale(loss).backward() first"
            )
        if not self._wanted.finite:
            raise TrainingLoopError(
                "the GradScaler was made after the backward, so the gradients were not checked for "
                "Inf and NaN; make it before"
            )
        self._scale = Scale(unscale=inverse)
        norms = self._read_norms()
        if self._wanted.clip is not None:
            self._progress.last_grad_norm, _ = norms.clipping(self._wanted, inverse)
        return not norms.finite

    def step(self) -> None:
        """Complete the update of the last backward, or begin it; nothing to do without one.

        Raises:
            TransferError: in serial mode, an update failed.
            TrainingLoopError: hyperparameters changed after they were used, or sums were lost.
        """
        self._check_lost()
        if not self.pending and not self.accumulated:
            return
        assert self._plan is not None or not self.pending
        if self._overlap.waits_for_step:
            self._begin_updates()
            return
        groups = self._hyper.groups()
        if self.pending and groups != self._groups:
            raise TrainingLoopError(
                "the optimizer's hyperparameters changed between backward and step, but "
                f'overlap="{self._overlap}" has updated with the old ones during the backward; '
                'change them after step(), or compile with overlap="next-forward"'
            )
        self.pending = False
        self._groups = groups
        self._progress.step_count += 1
        self._start_all(self._records)

    def skip(self) -> None:
        """Drop the gradients that wait for step() instead of using them, and count that."""
        self.discard()
        self._progress.skipped_steps += 1

    def _begin_updates(self) -> None:
        hyper, wanted = self._hyper, self._wanted
        scale = self._scale
        norms = self._read_norms() if wanted.anything else None
        if norms is not None and wanted.clip is not None:
            total, factor = norms.clipping(wanted, scale.unscale)
            self._progress.last_grad_norm = total
            scale = Scale(scale.unscale, factor)
        if norms is not None and hyper.skip_nonfinite and not norms.finite:
            if not self._progress.skipped_steps:
                warnings.warn(
                    "a gradient was NaN or Inf: this step changes nothing (skip_nonfinite=True). "
                    "opt.skipped_steps counts such steps; later ones are not reported here",
                    RuntimeWarning,
                    stacklevel=2,
                )
            self.skip()
            return
        groups = hyper.groups()
        self._speculation.decide(scale, groups)
        self.pending = False
        self._groups = groups
        self._progress.step_count += 1
        self._scale = scale
        order = self._plan.order if self._plan is not None else ()
        self._start_all(dict.fromkeys([*order, *self._records]))
        self._scale = Scale()
        if self._overlap is Overlap.SERIAL:
            self.under_way.drain()
        else:
            self._streamed.pump()

    def _start_all(self, order: Iterable[int]) -> None:
        """Start what waits, GPU updates first; sums that got no gradient in the last backward, too."""
        records = [self._records[index] for index in order]
        for by_cpu in (False, True):
            for record in records:
                if record.home.updated_by_cpu is not by_cpu:
                    continue
                if record.state is not UpdateState.WAITING and record.home.accumulated:
                    record.arrived = []
                    # Whatever has read the weights is before this point of the compute stream.
                    record.last_copy, record.fetched = None, self._device.mark()
                    self._gather(record)
                    self._start(record)
                elif record.state is UpdateState.WAITING:
                    self._start(record)

    def join(self) -> None:
        """End the optimizer's threads; what they had not begun is dropped."""
        self._jobs.join()

    def close(self) -> None:
        """Join the optimizer's threads and give the buffers back; nothing else may be under way."""
        self._jobs.close()
        self._window.clear()
        self._buffers.close()
        self._streamed.close()
        if self._norms is not None:
            self._norms.close()
            self._norms = None

    def stats(self) -> dict[str, float]:
        ahead = self._speculation
        counts = {"made_ahead": ahead.made_ahead, "made_in_vain": ahead.made_in_vain}
        return self._jobs.stats() | counts | {"streamed": self._streamed.count}

    @property
    def buffer_bytes(self) -> int:
        """Host memory that gradients pass through."""
        return self._buffers.nbytes

    @property
    def ring_bytes(self) -> int:
        """Device memory that states in DRAM pass through."""
        return self._streamed.nbytes

    def take_trace(self) -> list[tuple[str, str, float, float]]:
        """(bucket, lane, start, end) of finished work, seconds of CLOCK_MONOTONIC."""
        return self._jobs.take_trace()

    def _copy_out(
        self, buffer: GradBuffer, home: BucketHome, spec: ParamSpec, flat_N: torch.Tensor
    ) -> Arrival:
        start, size = spec.offset * home.dtype.itemsize, spec.numel * home.dtype.itemsize
        after = () if buffer.busy is None else (buffer.busy,)
        to = buffer.memory.bytes[start : start + size]
        about = ("gradient", home.bucket.index)
        return self._device.copy_out(to, flat_N.view(torch.uint8), after, about)

    # Norms

    def _check_overlap(self, hyper: HyperSource) -> None:
        if hyper.waits is not None and not self._overlap.waits_for_step:
            raise LohanError(
                f"{hyper.waits} needs every gradient before the first update, which "
                f'overlap="{self._overlap}" does not give; compile with overlap="next-forward"'
            )

    def _measure(self, spec: ParamSpec, flat_N: torch.Tensor, *, is_sum: bool = False) -> None:
        if self._norms is None or not self._wanted.anything:
            return
        if self._hyper.group_of(spec.pid) is not None:
            self._norms.take(spec.pid, flat_N, self._wanted, is_sum=is_sum)

    def _read_norms(self) -> StepNorms:
        """Norms of everything that waits for step(); blocks for the device, and for sums."""
        assert self._norms is not None
        sums = [record for record in self._records.values() if record.home.accumulated]
        for record in sums:
            if record.home.updated_by_cpu:
                unknown = [pid for pid, known in record.home.accumulated.items() if known is None]
                if unknown and record.adding is None:
                    self._submit_sums(record, [])
                continue
            for pid in record.home.accumulated:
                if pid not in self._measured:
                    spec = record.specs[pid]
                    self._measure(spec, sum_of(record.home, spec), is_sum=True)
                    self._measured.add(pid)
        measured = {}
        for record in sums:
            if record.adding is not None:
                self.under_way.finish(record.adding, "gradient norm")
            if record.home.updated_by_cpu:
                for pid, known in record.home.accumulated.items():
                    if known is not None and self._hyper.group_of(pid) is not None:
                        measured[pid] = known
        with self._waits.counted("gradient norm"):
            return self._norms.read(measured)

    # Sums

    def _add_on_device(self, record: Record, spec: ParamSpec, flat_N: torch.Tensor) -> None:
        sum_N = add_on_device(record.home, spec, flat_N)
        self._added = True
        if not self._accumulating:
            self._measure(spec, sum_N, is_sum=True)
            self._measured.add(spec.pid)

    def _submit_sums(self, record: Record, arrived: Sequence[int]) -> None:
        """Let the CPU put gradients of `arrived` into the sums, and measure all of them."""
        home = record.home
        specs = tuple(
            s for s in record.bucket.params if s.pid in arrived or s.pid in home.accumulated
        )
        magnitudes = None
        if self._overlap.waits_for_step:
            magnitudes = torch.zeros(len(specs), 2, dtype=torch.float64)
        buffer = record.buffer if arrived else None
        events = record.events
        adds = adds_of(home, specs, arrived)
        job = sum_job(home, specs, adds, buffer, events, magnitudes)
        record.adding = self._jobs.submit(
            home,
            job,
            events=events,
            mark=self._device.mark(),
            buffer=buffer,
            measured=specs,
            magnitudes=magnitudes,
        )
        for spec in specs:
            home.accumulated[spec.pid] = None
        self._added = self._added or bool(arrived)

    def _forget_sums(self) -> None:
        for record in self._records.values():
            # Jobs that still add to them are done before any later one of the bucket begins.
            record.home.accumulated.clear()

    def _check_lost(self) -> None:
        if self._progress.lost is not None:
            raise TrainingLoopError(self._progress.lost)

    # Updates

    def _maybe_start(self, record: Record) -> None:
        """See [Note: when an update may start]; sums may change while the weights are still read."""
        if record.left or record.state is not UpdateState.GATHERING:
            return
        if self._accumulating:
            if record.home.updated_by_cpu:
                self._submit_sums(record, record.arrived)
                record.buffer = None  # the job gives it back
            record.advance(UpdateState.IDLE)
        elif not record.unreleased and self._overlap.waits_for_step:
            if record.into_sums and record.home.updated_by_cpu:
                self._submit_sums(record, record.arrived)
            record.advance(UpdateState.WAITING)
            self._update_ahead(record)
        elif not record.unreleased:
            self._changed += 1
            self._start(record)

    def _update_ahead(self, record: Record) -> None:
        """See [Note: speculation]; a bucket of which some parameters keep their values waits."""
        if self._speculation.expects(record):
            updated = self._updated(record)
            if len(updated) == len(record.bucket.params):
                self._speculation.submit(record, updated)

    def _updated(self, record: Record) -> list[Updated]:
        """What the bucket's next update changes; parameters that no group holds keep their values."""
        pids = {*record.arrived, *(record.home.accumulated if record.into_sums else ())}
        found = []
        for spec in record.bucket.params:
            group = self._hyper.group_of(spec.pid) if spec.pid in pids else None
            if group is not None:
                step = self._progress.steps[spec.pid] + 1
                found.append(Updated(spec, self._groups[group], step))
        return found

    def _start(self, record: Record) -> None:
        """Update a bucket."""
        if self.before_update is not None:
            self.before_update(record.bucket.index)
        home = record.home
        updated = self._updated(record)
        for each in updated:
            self._progress.steps[each.spec.pid] = each.step
        job = self._speculation.take(record)
        if job is not None:
            self.under_way.follow(record, job)
            return
        if not updated:
            record.drop_grads(self._pools.gpu)
            self.under_way.give_buffer(record)
        elif home.streamed:
            self._streamed.submit(record, updated, self._scale)
            return
        elif home.updated_by_cpu:
            self._submit(record, updated)
            return
        else:
            self._update_on_gpu(record, updated)
        home.accumulated.clear()
        record.advance(UpdateState.IDLE)

    def _update_on_gpu(self, record: Record, updated: Sequence[Updated]) -> None:
        home = record.home
        arrays = {name: home.device_section(name) for name in ("master", "exp_avg", "exp_avg_sq")}
        weight_P = home.device_section("weight") if home.bucket.has_master else None
        sums_P = home.sums() if record.into_sums else None
        updates = []
        for each in updated:
            spec = each.spec
            cut = slice(spec.offset, spec.offset + spec.numel)
            updates.append(
                Update(
                    record.grads[spec.pid] if sums_P is None else sums_P[cut],
                    arrays["master"][cut],
                    arrays["exp_avg"][cut],
                    arrays["exp_avg_sq"][cut],
                    None if weight_P is None else weight_P[cut],
                    each.group,
                    each.step,
                )
            )
        recorder = self._device.recorder
        if recorder is not None:
            recorder.enter("adam", record.bucket.index)
        update_on_device(updates, self._scale)
        if recorder is not None:
            recorder.leave()
        record.drop_grads(self._pools.gpu)

    def _submit(self, record: Record, updated: Sequence[Updated]) -> None:
        home, buffer, events = record.home, record.buffer, record.events
        assert buffer is not None
        specs = tuple(each.spec for each in updated)
        adds = None
        if record.into_sums:
            # In the modes that wait for step() the gradients have been added already.
            arrived = () if self._overlap.waits_for_step else record.arrived
            adds = adds_of(home, specs, arrived)
        if home.bucket.has_master and isinstance(home.weight, OnSsd):
            self._complete_weights(record, buffer, specs, events)
        mark = self._device.mark()
        job = self._jobs.submit(
            home,
            update_job(home, updated, buffer, self._scale, events, adds),
            events=events,
            mark=mark,
            buffer=buffer,
            updated=specs,
            weights=buffer.memory,
        )
        home.accumulated.clear()
        self.under_way.follow(record, job)

    def _complete_weights(
        self,
        record: Record,
        buffer: GradBuffer,
        updated: Sequence[ParamSpec],
        events: Sequence[Arrival],
    ) -> None:
        """Put old weights where the job makes no new ones: the whole buffer is written to SSD."""
        kept = [spec for spec in record.bucket.params if spec not in updated]
        if not kept:
            return
        name = f"the gradients of {record.bucket.name}"
        for event in (*events, buffer.busy):
            if event is not None:
                about = ("gradient", record.bucket.index)
                self._waits.until("d2h", name, event.is_complete, about)
        size = record.home.dtype.itemsize
        for spec in kept:
            start = spec.offset * size
            to = buffer.memory.bytes[start : start + spec.numel * size]
            record.home.weight.read(start, to)

    def _forget_gradients(self, record: Record) -> None:
        if record.state in (UpdateState.GATHERING, UpdateState.WAITING):
            record.drop_grads(self._pools.gpu)
            # Copies out into it may be under way; later ones, and their readers, follow them.
            self.under_way.give_buffer(record)
            record.advance(UpdateState.IDLE)
