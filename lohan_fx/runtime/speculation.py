"""Updates made before step() has decided, into second copies of the values.

[Note: speculation]
Where step() decides from all gradients (it clips, or leaves out a step that is not finite), no update
may start before the backward has ended. But mostly it decides to do nothing special. So an update is
made as soon as its gradients are there, as if step() would scale them as it did last time and clip
nothing, and its new values go into a second copy: nothing old changes. If step() then decides so, the
copies change places; the bits are those of an update that waited. If not, what has been made ahead is
dropped and the updates are made from the old values, as without speculation. After a step that clipped,
the next one is expected to clip too, and nothing is made ahead in it.

Making updates ahead and validating them afterwards is the idea of SuperOffload (Lian et al., 2026),
which undoes an update in place.
"""

from __future__ import annotations

from collections.abc import Sequence

from lohan_fx.errors import TransferError

from .adam_gpu import Scale
from .device import Device
from .jobs import Job, JobQueue, Updated, update_job
from .options import AdamGroup
from .records import Record
from .waits import Waits


class Speculation:
    """Updates made ahead in this backward, by bucket, and what they were made with."""

    def __init__(self, jobs: JobQueue, device: Device, waits: Waits) -> None:
        self._jobs = jobs
        self._device = device
        self._waits = waits
        self._ahead: dict[int, tuple[Record, Job]] = {}
        self._expected = Scale()
        self._groups: Sequence[AdamGroup] = ()
        self._likely = True  # the last step clipped nothing
        self.made_ahead = 0  # updates that counted
        self.made_in_vain = 0

    def begin(self, groups: Sequence[AdamGroup]) -> None:
        """A backward begins, with these hyperparameters."""
        self._groups = groups

    def expects(self, record: Record) -> bool:
        """Should the update of a bucket whose gradients are complete be made ahead?"""
        return self._likely and record.home.spare is not None and not record.into_sums

    def submit(self, record: Record, updated: Sequence[Updated]) -> None:
        """Make an update ahead; `updated` are all parameters of the bucket."""
        home, buffer, spare = record.home, record.buffer, record.home.spare
        assert buffer is not None and spare is not None
        work = update_job(home, updated, buffer, self._expected, record.events, into=spare)
        job = self._jobs.submit(
            home,
            work,
            events=record.events,
            mark=self._device.mark(),
            buffer=buffer,
            updated=tuple(each.spec for each in updated),
            weights=spare.weight.memory,
        )
        job.ahead = True
        self._ahead[home.bucket.index] = (record, job)

    def decide(self, scale: Scale, groups: Sequence[AdamGroup]) -> None:
        """step() has decided to update with these; what was made with others is dropped."""
        if scale != self._expected or list(groups) != list(self._groups):
            self.drop()
        self._likely = scale.clip == 1.0
        self._expected = Scale(scale.unscale)

    def take(self, record: Record) -> Job | None:
        """The bucket's new values, if they have been made ahead or are being made: they count now."""
        _, job = self._ahead.pop(record.bucket.index, (record, None))
        if job is not None:
            record.home.swap()
            job.ahead = False
            self.made_ahead += 1
        return job

    def drop(self) -> None:
        """Forget all that was made ahead; blocks for an update that has begun.

        Raises:
            TransferError: it does not end; nothing that counts was touched.
        """
        for record, job in self._ahead.values():
            self._jobs.cancel(record.home, job)
        while self._ahead:
            bucket, (_, job) = next(iter(self._ahead.items()))
            with self._waits.counted("adam", ("adam", bucket)):
                self._end(job)
            del self._ahead[bucket]
            self.made_in_vain += 1

    def _end(self, job: Job) -> None:
        try:
            self._jobs.wait(job)
        except TransferError:
            if not self._jobs.is_done(job):
                raise
            # It failed, and its values were not wanted.
        self._jobs.forget(job)
