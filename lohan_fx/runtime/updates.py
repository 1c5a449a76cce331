"""From a gradient's arrival to new weights: host gradient buffers, CPU and GPU Adam, norms, clipping.

[Note: when an update may start]
A bucket's update may start when (1) every gradient of it that this backward makes has been handed
over, and (2) the backward has released the bucket, if it reads it at all. Both are facts of program
order; what they mean on the device is carried by events. The CPU's update waits for the copy out of
the bucket's last gradient (the copies are in order, so for all of them), and for the copy in of this
backward's fetch: it reads the weights that the update overwrites, and a gradient made before the
bucket was first used says nothing about it. The upload of new weights waits for the point of the
compute stream at which the update became possible, so the backward has read the old ones.
"""

from __future__ import annotations

import enum
import weakref
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch

from lohan_fx import native
from lohan_fx.errors import LohanError, TrainingLoopError, TransferError
from lohan_fx.planner import Overlap
from lohan_fx.program import Bucket, ParamSpec, Program, Tier

from .adam_gpu import Update, adam_step, update_on_device
from .buckets import BucketHome, BucketStore, InDram, OnGpu, OnSsd, Place, dense
from .device import Arrival, Device
from .memory import DeviceBytes, HostBytes, Pools, pages
from .options import AdamGroup, HyperSource, RuntimeOptions
from .waits import Waits


class UpdateState(enum.Enum):
    """Where one bucket's gradients and newest weights are.

    IDLE: no gradients anywhere; the weights at rest are the newest.
    GATHERING: gradients are arriving in a host buffer (or are kept on the GPU, with the state there);
        the weights at rest are the newest.
    WAITING: as GATHERING, but complete: step() decides what becomes of them.
    UPDATING: the CPU is making new weights; those at rest must not be read.
    UPLOADING: the new weights are being copied from the gradient buffer to their place on the GPU;
        the compute stream must wait for the upload before it reads them.
    """

    IDLE = enum.auto()
    GATHERING = enum.auto()
    WAITING = enum.auto()
    UPDATING = enum.auto()
    UPLOADING = enum.auto()


_NEXT: dict[UpdateState, tuple[UpdateState, ...]] = {
    UpdateState.IDLE: (UpdateState.GATHERING,),
    UpdateState.GATHERING: (UpdateState.WAITING, UpdateState.UPDATING, UpdateState.IDLE),
    UpdateState.WAITING: (UpdateState.UPDATING, UpdateState.IDLE),
    UpdateState.UPDATING: (UpdateState.UPLOADING, UpdateState.IDLE),
    UpdateState.UPLOADING: (UpdateState.IDLE,),
}


@dataclass(frozen=True, slots=True)
class GradPlan:
    """What one program's backward does to the buckets, by bucket index."""

    pids: Mapping[int, tuple[int, ...]]  # gradients it makes, in program order
    released: frozenset[int]  # buckets it reads
    order: tuple[int, ...]  # buckets with gradients, in forward order
    most_open: int  # buckets whose gradients wait at the same time, at most

    @classmethod
    def of(cls, program: Program, store: BucketStore) -> GradPlan:
        pids: dict[int, list[int]] = {}
        for move in program.backward:
            if move.op == "grad":
                pids.setdefault(store.bucket_of(move.arg), []).append(move.arg)
        released = frozenset(m.arg for m in program.backward if m.op == "release")
        fetched = [m.arg for m in program.forward if m.op == "fetch"]
        order = [b for b in dict.fromkeys(fetched) if b in pids]
        order += [b for b in pids if b not in set(order)]
        return cls(
            {b: tuple(p) for b, p in pids.items()},
            released,
            tuple(order),
            _most_open(program, pids, released, store),
        )


def _most_open(
    program: Program, pids: Mapping[int, list[int]], released: frozenset[int], store: BucketStore
) -> int:
    """At most how many CPU-updated buckets are between their first gradient and their update."""
    left = {b: len(p) + (b in released) for b, p in pids.items()}
    begun: set[int] = set()
    most = 0
    for move in program.backward:
        if move.op == "grad":
            bucket = store.bucket_of(move.arg)
        elif move.op == "release" and move.arg in left:
            bucket = move.arg
        else:
            continue
        if not store.homes[bucket].updated_by_cpu:
            continue
        left[bucket] -= 1
        if move.op == "grad":
            begun.add(bucket)
        most = max(most, len(begun))
        if left[bucket] == 0:
            begun.discard(bucket)
    return most


@dataclass(slots=True)
class _GradBuffer:
    """Pinned host memory for one bucket's gradients, in the bucket's layout."""

    memory: HostBytes
    busy: Arrival | None = None  # an upload that still reads it; the next copy out must follow it


@dataclass(slots=True)
class _Record:
    """One trainable bucket's way through a step."""

    home: BucketHome
    specs: dict[int, ParamSpec]
    state: UpdateState = UpdateState.IDLE
    left: set[int] = field(default_factory=set)  # gradients still to come in this backward
    arrived: list[int] = field(default_factory=list)
    unreleased: bool = False
    last_copy: Arrival | None = None  # the copy out of the last gradient
    fetched: Arrival | None = None  # this backward's copy in of the weights
    buffer: _GradBuffer | None = None  # filled, or waiting
    grads: dict[int, torch.Tensor] = field(default_factory=dict)  # flat; GPU-updated buckets only
    job: _Job | None = None  # UPDATING
    upload: Arrival | None = None  # UPLOADING

    @property
    def bucket(self) -> Bucket:
        return self.home.bucket

    def advance(self, to: UpdateState) -> None:
        assert to in _NEXT[self.state], f"{self.bucket.name}: {self.state.name} to {to.name}"
        self.state = to


@dataclass(slots=True)
class _Job:
    """A CPU update under way. Its memory and its events live here until it is done."""

    record: _Record
    ticket: int
    updated: tuple[ParamSpec, ...]
    events: tuple[Arrival, ...]
    mark: Arrival  # the upload follows it
    buffer: _GradBuffer | None


class GradWindow:
    """GPU gradients whose copies to the host are under way, oldest first."""

    def __init__(self, pools: Pools, device: Device, limit_bytes: int) -> None:
        self._pools = pools
        self._device = device
        self._limit_bytes = limit_bytes
        self._held: deque[tuple[torch.Tensor, Arrival]] = deque()
        self._bytes = 0

    def push(self, grad: torch.Tensor, arrival: Arrival) -> None:
        """Keep `grad`; if the window is over its limit, drop the oldest in compute-stream order."""
        nbytes = grad.numel() * grad.element_size()
        self._pools.gpu.hold(nbytes)
        self._held.append((grad, arrival))
        self._bytes += nbytes
        while self._held and self._bytes > self._limit_bytes:
            self._drop()

    def clear(self) -> None:
        while self._held:
            self._drop()

    def _drop(self) -> None:
        grad, arrival = self._held.popleft()
        self._device.wait(arrival)
        nbytes = grad.numel() * grad.element_size()
        self._bytes -= nbytes
        self._pools.gpu.give(nbytes)


class Updates:
    """Owns gradients and updates of every trainable bucket.

    Args:
        store: all buckets, placed.
        engine: SSD, or None without one.

    Buffers are allocated here, once; close() gives them back.
    """

    def __init__(
        self,
        pools: Pools,
        device: Device,
        waits: Waits,
        store: BucketStore,
        options: RuntimeOptions,
    ) -> None:
        self.step_count = 0
        self.last_grad_norm: float | None = None
        self.pending = False  # a backward has finished and step() has not been called
        self.torn: str | None = None  # why the weights are no longer those of any step
        self._pools = pools
        self._device = device
        self._waits = waits
        self._store = store
        self._options = options
        self._overlap = Overlap(options.overlap)
        self._records = {
            index: _Record(home, {spec.pid: spec for spec in home.bucket.params})
            for index, home in store.homes.items()
            if home.bucket.trainable
        }
        self._window = GradWindow(pools, device, options.grad_window_bytes)
        self._plan: GradPlan | None = None
        self._groups: list[AdamGroup] = []
        self._hyper_ref: weakref.ref[HyperSource] | None = None
        self._clip: float | None = None
        self._started = 0  # buckets updated in this backward
        self._jobs: deque[_Job] = deque()  # in order of submission, until they are done
        self._owned: list[HostBytes] = []
        self._ring: deque[_GradBuffer] = deque()
        self._own: dict[int, _GradBuffer] = {}
        self._norms: DeviceBytes | None = None
        self._norm_index: dict[int, int] = {}
        self._pipeline = native.AdamPipeline(
            options.num_adam_threads,
            "naive" if self._overlap is Overlap.NAIVE else "optimized",
            pools.engine,
            timeout_s=options.deadline_s,
            cuda_device=device.device.index or 0,
        )
        self._allocate_buffers()
        self._give_state_buffers()

    # What the rest of the runtime asks

    def is_settled(self, bucket: int) -> bool:
        """May the weights at rest be read by the host?

        Raises:
            TransferError: their update failed.
        """
        record = self._records.get(bucket)
        if record is None or record.job is None:
            return True
        if not self._weights_ready(record.job):
            return False
        self._progress(record.job)
        return True

    def settle(self, bucket: int) -> None:
        """Block until they may.

        Raises:
            TransferError: the update failed or took too long; names the bucket.
        """
        record = self._records.get(bucket)
        if record is not None and record.job is not None:
            with self._waits.counted("adam"):
                self._wait_weights(record.job)
            self._progress(record.job)

    def settle_on_device(self, bucket: int) -> None:
        """Let the compute stream wait for the newest weights of a GPU-resident bucket."""
        self.settle(bucket)
        record = self._records.get(bucket)
        if record is not None and record.state is UpdateState.UPLOADING:
            assert record.upload is not None
            self._device.wait(record.upload)
            record.upload = None
            record.advance(UpdateState.IDLE)

    def drain(self) -> None:
        """Block until every update under way is complete, write-back and upload included."""
        while self._jobs:
            job = self._jobs[0]
            with self._waits.counted("adam"):
                self._wait_done(job)
            self._progress(job)
        for index, record in self._records.items():
            if record.upload is not None:
                name = f"the upload of {record.bucket.name}"
                self._waits.until("h2d", name, record.upload.is_complete)
                self.settle_on_device(index)

    def pump(self) -> None:
        """Upload what has been updated, free its buffers, report failures; never blocks."""
        for job in list(self._jobs) if self._jobs else ():
            if not self._weights_ready(job):
                return
            self._progress(job)

    # A backward

    def attach(self, hyper: HyperSource) -> None:
        """Take hyperparameters from here, which stays its owner's: what lives here outlives the model."""
        self._hyper_ref = weakref.ref(hyper)
        self._check_clip(hyper.max_grad_norm)

    @property
    def _hyper(self) -> HyperSource:
        hyper = None if self._hyper_ref is None else self._hyper_ref()
        assert hyper is not None
        return hyper

    def begin_backward(self, plan: GradPlan) -> None:
        hyper = self._hyper
        if not self._overlap.waits_for_step and plan.most_open > self._num_ring:
            raise LohanError(
                f"this backward gathers gradients of {plan.most_open} buckets at the same time, with "
                f"{self._num_ring} gradient buffers; raise grad_buffers"
            )
        self._plan = plan
        self._started = 0
        self._clip = hyper.max_grad_norm
        self._check_clip(self._clip)
        if self._norms is not None:
            self._norms.bytes.zero_()
        if not self._overlap.waits_for_step:
            self._groups = hyper.groups()
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
        if record.state in (UpdateState.UPDATING, UpdateState.UPLOADING):
            self.settle_on_device(home.bucket.index)  # an update this step's forward did not read
        if record.state is UpdateState.IDLE:
            if home.updated_by_cpu:
                record.buffer = self._acquire(record)
            record.advance(UpdateState.GATHERING)
        with torch.no_grad():
            flat_N = dense(spec, g, home.dtype)
            if self._clip is not None and self._group_of(pid) is not None:
                self._take_norm(pid, flat_N)
        if record.buffer is None:
            self._pools.gpu.hold(flat_N.numel() * flat_N.element_size())
            record.grads[pid] = flat_N
        else:
            record.last_copy = self._copy_out(record.buffer, home, spec, flat_N)
            self._window.push(flat_N, record.last_copy)
        record.left.remove(pid)
        record.arrived.append(pid)
        self._maybe_start(record)

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
        self.pending = bool(plan.pids)

    def abandon(self) -> None:
        """Forget the gradients of a backward that did not finish.

        Sets `torn` where some of its updates had been made already.
        """
        self._window.clear()
        for record in self._records.values():
            record.left = set()
            record.unreleased = False
            self._forget_gradients(record)
        if self._started:
            self.torn = (
                f"a backward stopped after {self._started} buckets had been updated, so the weights "
                'are between two steps; load a checkpoint. (With overlap="next-forward" nothing is '
                "updated before step().)"
            )
        self._started = 0
        self._plan = None

    def discard(self) -> None:
        """Drop gradients that wait for step(), as plain torch's zero_grad() does."""
        if self.pending and self._overlap.waits_for_step:
            for record in self._records.values():
                self._forget_gradients(record)
            self.pending = False

    def step(self) -> None:
        """Complete the update of the last backward; nothing to do without one.

        Raises:
            TransferError: in serial mode, an update failed.
            TrainingLoopError: hyperparameters changed after they were used.
        """
        if not self.pending:
            return
        assert self._plan is not None
        if not self._overlap.waits_for_step:
            if self._hyper.groups() != self._groups:
                raise TrainingLoopError(
                    "the optimizer's hyperparameters changed between backward and step, but "
                    f'overlap="{self._overlap}" has updated with the old ones during the backward; '
                    'change them after step(), or compile with overlap="next-forward"'
                )
            self.pending = False
            self.step_count += 1
            return
        self.pending = False
        scale = self._clip_factor()
        self._groups = self._hyper.groups()
        self.step_count += 1
        records = [self._records[index] for index in self._plan.order]
        for record in records:
            if not record.home.updated_by_cpu:
                self._start(record, self.step_count, scale)
        for record in records:
            if record.home.updated_by_cpu:
                self._start(record, self.step_count, scale)
        if self._overlap is Overlap.SERIAL:
            self.drain()

    def join(self) -> None:
        """End the optimizer's threads; what they had not begun is dropped."""
        self._pipeline.close()

    def close(self) -> None:
        """Join the optimizer's threads and give the buffers back; nothing else may be under way."""
        self._pipeline.close()
        self._window.clear()
        self._jobs.clear()
        self._ring.clear()
        self._own.clear()
        for memory in self._owned:
            self._pools.free_host(memory)
        self._owned.clear()
        if self._norms is not None:
            self._pools.free_device(self._norms)
            self._norms = None

    def stats(self) -> dict[str, float]:
        return dict(self._pipeline.stats())

    def take_trace(self) -> list[tuple[str, str, float, float]]:
        """(bucket, lane, start, end) of finished work, seconds of CLOCK_MONOTONIC."""
        return list(self._pipeline.take_trace())

    # Buffers

    def _allocate_buffers(self) -> None:
        by_cpu = [r for r in self._records.values() if r.home.updated_by_cpu]
        if by_cpu and self._overlap.waits_for_step:
            for record in by_cpu:
                name = f"the gradient buffer of {record.bucket.name}"
                self._own[record.bucket.index] = self._grad_buffer(record.bucket.weight_bytes, name)
        elif by_cpu:
            largest = max(record.bucket.weight_bytes for record in by_cpu)
            for number in range(self._options.grad_buffers):
                self._ring.append(self._grad_buffer(largest, f"gradient buffer {number}"))
        self._num_ring = len(self._ring)
        if self._overlap.waits_for_step:
            pids = [spec.pid for r in self._records.values() for spec in r.bucket.params]
            self._norm_index = {pid: index for index, pid in enumerate(pids)}
            with torch.inference_mode(False):
                self._norms = self._pools.device_bytes(4 * len(pids), "the gradient norms")

    def _grad_buffer(self, nbytes: int, name: str) -> _GradBuffer:
        memory = self._pools.host_bytes(nbytes, name, pinned=True)
        self._owned.append(memory)
        return _GradBuffer(memory)

    def _give_state_buffers(self) -> None:
        sizes = [_ssd_bytes(r.home) for r in self._records.values() if r.home.updated_by_cpu]
        largest = max(sizes, default=0)
        if not largest:
            return
        buffers = []
        for number in range(self._options.state_buffers):
            memory = self._pools.host_bytes(largest, f"state buffer {number}", pinned=False)
            self._owned.append(memory)
            buffers.append((memory.address, memory.nbytes))
        self._pipeline.set_state_buffers(buffers)

    def _acquire(self, record: _Record) -> _GradBuffer:
        """A buffer nobody fills or updates from; blocks for the oldest update if there is none.

        Raises:
            LohanError: every buffer is being filled.
            TransferError: the oldest update failed or took too long.
        """
        if self._overlap.waits_for_step:
            return self._own[record.bucket.index]
        self.pump()
        while not self._ring:
            oldest = next((job for job in self._jobs if job.buffer is not None), None)
            if oldest is None:
                raise LohanError(
                    f"no gradient buffer for {record.bucket.name}: all {self._num_ring} are being "
                    "filled; raise grad_buffers"
                )
            with self._waits.counted("gradient buffer"):
                self._wait_weights(oldest)
            self._progress(oldest)
        return self._ring.popleft()

    def _give_buffer(self, holder: _Record | _Job) -> None:
        buffer, holder.buffer = holder.buffer, None
        if buffer is not None and not self._overlap.waits_for_step:
            self._ring.append(buffer)

    def _copy_out(
        self, buffer: _GradBuffer, home: BucketHome, spec: ParamSpec, flat_N: torch.Tensor
    ) -> Arrival:
        start, size = spec.offset * home.dtype.itemsize, spec.numel * home.dtype.itemsize
        after = () if buffer.busy is None else (buffer.busy,)
        to = buffer.memory.bytes[start : start + size]
        return self._device.copy_out(to, flat_N.view(torch.uint8), after)

    # Norms

    def _check_clip(self, max_grad_norm: float | None) -> None:
        if max_grad_norm is not None and not self._overlap.waits_for_step:
            raise LohanError(
                f"max_grad_norm={max_grad_norm} needs every gradient before the first update, which "
                f'overlap="{self._overlap}" does not give; compile with overlap="next-forward"'
            )

    def _norms_F(self) -> torch.Tensor:
        assert self._norms is not None
        return self._norms.bytes.view(torch.float32)

    def _take_norm(self, pid: int, flat_N: torch.Tensor) -> None:
        to = self._norms_F()[self._norm_index[pid]]
        torch.linalg.vector_norm(flat_N, dtype=torch.float32, out=to)

    def _clip_factor(self) -> float:
        """As torch.nn.utils.clip_grad_norm_; NaN and Inf pass through it as they do there."""
        if self._clip is None:
            return 1.0
        with self._waits.counted("gradient norm"):
            total = float(torch.linalg.vector_norm(self._norms_F()))
        self.last_grad_norm = total
        factor = self._clip / (total + 1e-6)
        return 1.0 if factor > 1.0 else factor

    # Updates

    def _maybe_start(self, record: _Record) -> None:
        """See [Note: when an update may start]"""
        if record.left or record.unreleased or record.state is not UpdateState.GATHERING:
            return
        if self._overlap.waits_for_step:
            record.advance(UpdateState.WAITING)
        else:
            self._started += 1
            self._start(record, self.step_count + 1, 1.0)

    def _start(self, record: _Record, step: int, scale: float) -> None:
        groups = {pid: self._group_of(pid) for pid in record.arrived}
        # In the bucket's order; parameters that no group holds keep their values.
        chosen = [(s, groups[s.pid]) for s in record.bucket.params if s.pid in groups]
        updated = [(spec, group) for spec, group in chosen if group is not None]
        if not record.home.updated_by_cpu:
            self._update_on_gpu(record, updated, step, scale)
        elif updated:
            self._submit(record, updated, step, scale)
            return
        else:
            self._give_buffer(record)
        record.advance(UpdateState.IDLE)

    def _group_of(self, pid: int) -> int | None:
        return self._hyper.group_of(pid)

    def _update_on_gpu(
        self, record: _Record, updated: Sequence[tuple[ParamSpec, int]], step: int, scale: float
    ) -> None:
        home = record.home
        arrays = {name: home.device_section(name) for name in ("master", "exp_avg", "exp_avg_sq")}
        weight_P = home.device_section("weight") if home.bucket.has_master else None
        updates = []
        for spec, group in updated:
            cut = slice(spec.offset, spec.offset + spec.numel)
            updates.append(
                Update(
                    record.grads[spec.pid],
                    arrays["master"][cut],
                    arrays["exp_avg"][cut],
                    arrays["exp_avg_sq"][cut],
                    None if weight_P is None else weight_P[cut],
                    self._groups[group],
                )
            )
        update_on_device(updates, step, scale)
        self._drop_grads(record)

    def _submit(
        self, record: _Record, updated: Sequence[tuple[ParamSpec, int]], step: int, scale: float
    ) -> None:
        home, buffer = record.home, record.buffer
        assert buffer is not None
        specs = tuple(spec for spec, _ in updated)
        events = tuple(e for e in (record.last_copy, record.fetched) if e is not None)
        used = sorted({group for _, group in updated})
        number = {group: index for index, group in enumerate(used)}
        out, out_extent = 0, None
        if home.bucket.has_master:
            out = buffer.memory.address
            if isinstance(home.weight, InDram):
                out = home.weight.memory.address
            elif isinstance(home.weight, OnSsd):
                out_extent = (home.weight.extent, 0)
                self._complete_weights(record, buffer, specs, events)
        job = native.AdamJob(
            name=home.bucket.name,
            numel=home.bucket.numel,
            grad=buffer.memory.address,
            grad_dtype=home.bucket.dtype,
            segments=[(spec.offset, spec.numel, number[group]) for spec, group in updated],
            groups=[adam_step(self._groups[group], step, scale) for group in used],
            master=_native_place(home.place("master")),
            exp_avg=_native_place(home.place("exp_avg")),
            exp_avg_sq=_native_place(home.place("exp_avg_sq")),
            out=out,
            out_extent=out_extent,
            out_dtype=home.bucket.dtype if home.bucket.has_master else None,
            ready_events=[event.handle for event in events],
        )
        mark = self._device.mark()
        ticket = self._pipeline.submit(job)
        record.advance(UpdateState.UPDATING)
        record.buffer = None
        record.job = _Job(record, ticket, specs, events, mark, buffer)
        self._jobs.append(record.job)

    def _complete_weights(
        self,
        record: _Record,
        buffer: _GradBuffer,
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
                self._waits.until("d2h", name, event.is_complete)
        size = record.home.dtype.itemsize
        for spec in kept:
            start = spec.offset * size
            to = buffer.memory.bytes[start : start + spec.numel * size]
            record.home.weight.read(start, to)

    def _weights_ready(self, job: _Job) -> bool:
        """May the weights at rest be read? True also after a failure, which `_progress` raises."""
        if self._pipeline.done(job.ticket):
            return True
        if job.record.home.weight_tier is Tier.SSD:
            return False
        return self._pipeline.weights_ready(job.ticket)

    def _wait_weights(self, job: _Job) -> None:
        on_ssd = job.record.home.weight_tier is Tier.SSD
        wait = self._pipeline.wait if on_ssd else self._pipeline.wait_weights
        try:
            wait(job.ticket, self._waits.deadline_s)
        except TransferError as error:
            self._fail(job, error)
            raise

    def _wait_done(self, job: _Job) -> None:
        try:
            self._pipeline.wait(job.ticket, self._waits.deadline_s)
        except TransferError as error:
            self._fail(job, error)
            raise

    def _fail(self, job: _Job, error: TransferError) -> None:
        self.torn = f"{error}; the weights are between two steps: load a checkpoint"
        if not self._pipeline.done(job.ticket):
            return  # a deadline: the job may still touch its memory
        self._jobs.remove(job)
        self._give_buffer(job)
        if job.record.job is job:
            job.record.job = None
            job.record.advance(UpdateState.IDLE)

    def _progress(self, job: _Job) -> None:
        """Do what a job with its weights ready allows: upload, free its buffer, forget it when done.

        Raises:
            TransferError: the job failed.
        """
        record = job.record
        if self._pipeline.done(job.ticket):
            self._wait_done(job)  # raises what went wrong
            self._jobs.remove(job)
        if record.job is job:
            record.job = None
            if record.home.weight_tier is Tier.GPU:
                self._upload(job)
            else:
                record.advance(UpdateState.IDLE)
            self._give_buffer(job)

    def _upload(self, job: _Job) -> None:
        """Copy the new weights in. Only those that the job made: the rest of the buffer is stale."""
        home, buffer = job.record.home, job.buffer
        assert isinstance(home.weight, OnGpu) and buffer is not None
        for start, stop in _runs(home.bucket, job.updated):
            cut = slice(start * home.dtype.itemsize, stop * home.dtype.itemsize)
            job.record.upload = self._device.copy_in(
                home.weight.memory.bytes[cut], buffer.memory.bytes[cut], (job.mark,)
            )
        buffer.busy = job.record.upload
        job.record.advance(UpdateState.UPLOADING)

    def _drop_grads(self, record: _Record) -> None:
        for grad in record.grads.values():
            self._pools.gpu.give(grad.numel() * grad.element_size())
        record.grads.clear()

    def _forget_gradients(self, record: _Record) -> None:
        if record.state in (UpdateState.GATHERING, UpdateState.WAITING):
            self._drop_grads(record)
            # Copies out into it may be under way; later ones, and their readers, follow them.
            self._give_buffer(record)
            record.advance(UpdateState.IDLE)


def _runs(bucket: Bucket, updated: Sequence[ParamSpec]) -> Iterable[tuple[int, int]]:
    """Half-open element ranges that cover `updated` and, besides them, only padding."""
    wanted = {spec.pid for spec in updated}
    runs: list[list[int]] = []
    open_run = False
    for spec in bucket.params:
        if spec.pid not in wanted:
            open_run = False
            continue
        if open_run:
            runs[-1][1] = spec.offset + spec.numel
        else:
            runs.append([spec.offset, spec.offset + spec.numel])
            open_run = True
    return [(start, stop) for start, stop in runs]


def _native_place(place: Place) -> int | tuple[int, int]:
    """A host address, or an extent and a byte offset in it."""
    if isinstance(place.home, InDram):
        return place.home.memory.address + place.offset
    assert isinstance(place.home, OnSsd)
    return place.home.extent, place.offset


def _ssd_bytes(home: BucketHome) -> int:
    """State buffer that one update of the bucket takes: its fp32 arrays on SSD, on whole pages."""
    nbytes = pages(home.bucket.numel * 4)
    names = ("master", "exp_avg", "exp_avg_sq")
    return sum(nbytes for name in names if home.place(name).home.tier is Tier.SSD)
