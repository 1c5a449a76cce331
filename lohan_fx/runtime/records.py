"""Where one bucket is on its way through a step: what has arrived of its gradients, what becomes of them."""

from __future__ import annotations

import enum
from dataclasses import dataclass, field

import torch

from lohan_fx.program import Bucket, ParamSpec

from .buckets import BucketHome
from .device import Arrival
from .gradients import GradBuffer
from .jobs import Job
from .memory import Account


class UpdateState(enum.Enum):
    """Where one bucket's gradients and newest weights are.

    IDLE: no gradients anywhere; the weights at rest are the newest.
    GATHERING: gradients are arriving in a host buffer (or are kept on the GPU, with the state there);
        the weights at rest are the newest. An accumulating backward ends in IDLE again: see
        [Note: sums of several backwards] in updates.py.
    WAITING: as GATHERING, but complete: step() decides what becomes of them.
    UPDATING: the CPU is making new weights; those at rest must not be read.
    UPLOADING: the new weights are being copied from the gradient buffer to their place on the GPU;
        the compute stream must wait for the upload before it reads them.
    STREAMING: as UPLOADING, but the GPU makes them of a state that passes through it, from gradients
        that stay there until then: see [Note: streamed states] in streamed.py.
    """

    IDLE = enum.auto()
    GATHERING = enum.auto()
    WAITING = enum.auto()
    UPDATING = enum.auto()
    UPLOADING = enum.auto()
    STREAMING = enum.auto()


_NEXT: dict[UpdateState, tuple[UpdateState, ...]] = {
    UpdateState.IDLE: (UpdateState.GATHERING,),
    UpdateState.GATHERING: (
        UpdateState.WAITING,
        UpdateState.UPDATING,
        UpdateState.STREAMING,
        UpdateState.IDLE,
    ),
    UpdateState.WAITING: (UpdateState.UPDATING, UpdateState.STREAMING, UpdateState.IDLE),
    UpdateState.UPDATING: (UpdateState.UPLOADING, UpdateState.IDLE),
    UpdateState.UPLOADING: (UpdateState.IDLE,),
    UpdateState.STREAMING: (UpdateState.IDLE,),
}


@dataclass(slots=True)
class Record:
    """One trainable bucket's way through a step."""

    home: BucketHome
    specs: dict[int, ParamSpec]
    state: UpdateState = UpdateState.IDLE
    left: set[int] = field(default_factory=set)  # gradients still to come in this backward
    arrived: list[int] = field(default_factory=list)
    unreleased: bool = False
    into_sums: bool = False  # this backward's gradients go into the bucket's sums
    last_copy: Arrival | None = None  # the copy out of the last gradient
    fetched: Arrival | None = None  # this backward's copy in of the weights
    buffer: GradBuffer | None = None  # filled, or waiting
    grads: dict[int, torch.Tensor] = field(default_factory=dict)  # flat; where the GPU updates
    adding: Job | None = None  # puts gradients into the sums
    job: Job | None = None  # UPDATING
    upload: Arrival | None = None  # UPLOADING

    @property
    def bucket(self) -> Bucket:
        return self.home.bucket

    @property
    def events(self) -> tuple[Arrival, ...]:
        """After which the gradients are in the buffer, and the weights may be overwritten."""
        return tuple(e for e in (self.last_copy, self.fetched) if e is not None)

    def drop_grads(self, account: Account) -> None:
        """Give back gradients kept on the GPU, which `account` counts."""
        for grad in self.grads.values():
            account.give(grad.numel() * grad.element_size())
        self.grads.clear()

    def advance(self, to: UpdateState) -> None:
        assert to in _NEXT[self.state], f"{self.bucket.name}: {self.state.name} to {to.name}"
        self.state = to
