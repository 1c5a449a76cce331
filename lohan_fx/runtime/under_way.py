"""Updates from their submission until their weights are in place and their buffers free."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

from lohan_fx.errors import LohanError, TransferError
from lohan_fx.program import Tier

from .device import Arrival, Device
from .gradients import GradBuffer, GradBuffers
from .jobs import Job, JobQueue, runs
from .options import Progress
from .records import Record, UpdateState
from .resting import OnGpu
from .streamed import Streamed
from .waits import Waits


class UnderWay:
    """Follows every job that makes weights or sums, and what the GPU updates beside the step.

    Args:
        records: all trainable buckets, by index.
        buffers: what jobs read gradients from; jobs give them back here.
        streamed: what the GPU updates of states in DRAM.
        progress: is told where a failed job leaves the weights between two steps.
    """

    def __init__(
        self,
        records: Mapping[int, Record],
        jobs: JobQueue,
        buffers: GradBuffers,
        streamed: Streamed,
        device: Device,
        waits: Waits,
        progress: Progress,
    ) -> None:
        self._records = records
        self._jobs = jobs
        self._buffers = buffers
        self._streamed = streamed
        self._device = device
        self._waits = waits
        self._progress = progress

    def is_settled(self, bucket: int) -> bool:
        """May the weights at rest be read by the host, or copied in after what is in `stored`?

        Raises:
            TransferError: their update failed.
        """
        record = self._records.get(bucket)
        if record is not None and record.state is UpdateState.STREAMING:
            self._streamed.issue(record)
        if record is None or record.job is None:
            return True
        if not self._jobs.has_weights(record.job):
            return False
        self._progress_of(record.job)
        return True

    def settle(self, bucket: int) -> None:
        """Block until they may.

        Raises:
            TransferError: the update failed or took too long; names the bucket.
        """
        record = self._records.get(bucket)
        if record is not None and record.job is not None:
            with self._waits.counted("adam", ("adam", bucket)):
                self._wait_weights(record.job)
            self._progress_of(record.job)

    def stored(self, bucket: int) -> tuple[Arrival, ...]:
        """Copies out that a copy in of settled weights in DRAM must follow."""
        return self._streamed.stored(bucket)

    def settle_on_device(self, bucket: int) -> None:
        """Let the compute stream wait for the newest weights of a bucket, where they are made or copied
        on the device."""
        self.settle(bucket)
        record = self._records.get(bucket)
        if record is not None and record.state is UpdateState.UPLOADING:
            assert record.upload is not None
            self._device.wait(record.upload)
            record.upload = None
            record.advance(UpdateState.IDLE)
        elif record is not None and record.state is UpdateState.STREAMING:
            self._streamed.settle(record)

    def drain(self) -> None:
        """Block until every update under way is complete, write-back and upload included."""
        for job in self._jobs:
            self.finish(job, "adam")
        self._streamed.drain()
        for index, record in self._records.items():
            if record.upload is not None:
                name = f"the upload of {record.bucket.name}"
                self._waits.until("h2d", name, record.upload.is_complete, ("upload", index))
                self.settle_on_device(index)

    def pump(self) -> None:
        """Upload what has been updated, free its buffers, report failures; never blocks."""
        self._streamed.pump()
        if self._jobs and self._jobs.any_progress():
            self._progress_of_all()

    def acquire(self, record: Record) -> GradBuffer:
        """A buffer nobody fills or works from; blocks for a job if there is none.

        Raises:
            LohanError: every buffer is being filled.
            TransferError: a job failed, or none got anywhere for too long.
        """
        if record.adding is not None and not self._buffers.num_ring:
            # It reads the bucket's own buffer.
            self.finish(record.adding, "gradient buffer")
        self.pump()
        buffer = self._buffers.take(record.bucket.index)
        while buffer is None:
            holders = [job for job in self._jobs if job.buffer is not None]
            if not holders:
                raise LohanError(
                    f"no gradient buffer for {record.bucket.name}: all {self._buffers.num_ring} are "
                    "being filled; raise grad_buffers"
                )
            with self._waits.counted("gradient buffer", ("adam", holders[0].bucket)):
                self._wait_any_weights(holders)
            self._progress_of_all()
            buffer = self._buffers.take(record.bucket.index)
        return buffer

    def give_buffer(self, holder: Record | Job) -> None:
        buffer, holder.buffer = holder.buffer, None
        if buffer is not None:
            self._buffers.give(buffer)

    @contextmanager
    def _failing(self, job: Job) -> Iterator[None]:
        """A transfer that fails within is a failure of the job."""
        try:
            yield
        except TransferError as error:
            self._fail(job, error)
            raise

    def _wait_weights(self, job: Job) -> None:
        with self._failing(job):
            self._jobs.wait_for_weights(job)

    def _wait_any_weights(self, jobs: Sequence[Job]) -> None:
        with self._failing(jobs[0]):
            self._jobs.wait_for_any(jobs)

    def _wait_done(self, job: Job) -> None:
        with self._failing(job):
            self._jobs.wait(job)

    def _fail(self, job: Job, error: TransferError) -> None:
        self._progress.torn = f"{error}; the weights are between two steps: load a checkpoint"
        if not self._jobs.is_done(job):
            return  # a deadline: the job may still touch its memory
        self._jobs.forget(job)
        self.give_buffer(job)
        record = self._records[job.bucket]
        if record.adding is job:
            record.adding = None
        if record.job is job:
            record.job = None
            record.advance(UpdateState.IDLE)

    def follow(self, record: Record, job: Job) -> None:
        """From now on the job makes the bucket's new weights, or has made them."""
        record.job = job
        record.advance(UpdateState.UPDATING)
        record.buffer = None  # the job gives it back
        if self._jobs.has_weights(job):
            self._progress_of(job)

    def finish(self, job: Job, why: str) -> None:
        with self._waits.counted(why, ("adam", job.bucket)):
            self._wait_done(job)
        self._progress_of(job)

    def _progress_of_all(self) -> None:
        for job in self._jobs:
            if self._jobs.has_weights(job):
                self._progress_of(job)

    def _progress_of(self, job: Job) -> None:
        """Do what a job with its weights ready allows: upload, free its buffer, forget it when done.

        Raises:
            TransferError: the job failed.
        """
        record = self._records[job.bucket]
        if job.ahead:
            return
        if self._jobs.is_done(job):
            self._wait_done(job)  # raises what went wrong
            self._jobs.forget(job)
        if not job.updated:
            if record.adding is job:
                record.adding = None
                for pid, magnitude in job.results().items():
                    if pid in record.home.accumulated:
                        record.home.accumulated[pid] = magnitude
            self.give_buffer(job)
        if record.job is job:
            record.job = None
            if record.home.weight_tier is Tier.GPU:
                self._upload(job)
            else:
                record.advance(UpdateState.IDLE)
            self.give_buffer(job)

    def _upload(self, job: Job) -> None:
        """Copy the new weights in. Only those that the job made: the rest of the buffer is stale."""
        record, buffer = self._records[job.bucket], job.buffer
        home = record.home
        assert isinstance(home.weight, OnGpu) and buffer is not None and job.weights is not None
        for start, stop in runs(home.bucket, job.updated):
            cut = slice(start * home.dtype.itemsize, stop * home.dtype.itemsize)
            record.upload = self._device.copy_in(
                home.weight.memory.bytes[cut],
                job.weights.bytes[cut],
                (job.mark,),
                ("upload", home.bucket.index),
            )
        buffer.busy = record.upload
        record.advance(UpdateState.UPLOADING)
