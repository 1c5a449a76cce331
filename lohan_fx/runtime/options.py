"""What a caller chooses about a run, and what it reads back; plain data, no device."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Protocol

from lohan_fx.errors import TrainingLoopError
from lohan_fx.planner import Overlap


@dataclass(frozen=True, slots=True)
class RuntimeOptions:
    """Sizes of the windows data streams through, and how to stream.

    Args:
        overlap: one of the values of `Overlap`.
        grad_window_bytes: gradients kept on the GPU while their copies to the host are under way.
        grad_buffers: host buffers for gradients in the modes that update during the backward; each
            is as large as the largest bucket that the CPU updates.
        state_buffers: host buffers through which optimizer state on SSD passes.
        inbound_bytes: pinned staging for everything on its way from SSD to GPU.
        outbound_bytes: pinned staging for activations on their way from GPU to SSD.
        stream_bytes: GPU memory through which states pass that rest in DRAM and the GPU updates.
        speculating: indices of the buckets that may have a second copy, with overlap="speculative"; None
            is all.
        num_adam_threads: 0 lets the optimizer choose.
        accumulates: keep an fp32 sum of gradients for every trainable bucket, next to its state: on
            the GPU, or in DRAM where the CPU updates it.
        deadline_s: no wait lasts longer than this.
        poison: fill memory with NaN where nothing may read it any more (tests).
    """

    overlap: str = Overlap.BACKWARD
    grad_window_bytes: int = 256 << 20
    grad_buffers: int = 4
    state_buffers: int = 3
    inbound_bytes: int = 0
    outbound_bytes: int = 0
    stream_bytes: int = 0
    speculating: frozenset[int] | None = None
    num_adam_threads: int = 0
    accumulates: bool = False
    deadline_s: float = 600.0
    poison: bool = False


@dataclass(frozen=True, slots=True)
class AdamGroup:
    """Scalars of one parameter group, as torch.optim names them."""

    lr: float
    beta1: float
    beta2: float
    eps: float
    weight_decay: float
    decoupled: bool


class HyperSource(Protocol):
    """Where the scalars of a step come from: an optimizer.

    `norm_type` is 2 or infinity. `skip_nonfinite`: a step with a NaN or Inf gradient changes nothing.
    `checks_finite`: whether there are such gradients is to be known, for that or for loss scaling.
    """

    max_grad_norm: float | None
    norm_type: float
    skip_nonfinite: bool

    @property
    def checks_finite(self) -> bool: ...

    @property
    def waits(self) -> str | None:
        """Why no update may start before step(); None where it may."""
        ...

    def groups(self) -> list[AdamGroup]: ...

    def group_of(self, pid: int) -> int | None:
        """The index in groups(); None for a parameter that is not to be updated."""
        ...


@dataclass(slots=True)
class Progress:
    """How far training has come; outlives placements and windows.

    Attributes:
        step_count: steps made.
        steps: updates of each parameter; one without a gradient is left out of a step.
        skipped_steps: steps that changed nothing because a gradient was NaN or Inf.
        last_grad_norm: of the last step, before clipping.
        torn: why the weights are no longer those of any step.
        lost: why accumulated gradients are no longer those of whole backwards.
    """

    step_count: int = 0
    steps: Counter[int] = field(default_factory=Counter)
    skipped_steps: int = 0
    last_grad_norm: float | None = None
    torn: str | None = None
    lost: str | None = None

    def check_whole(self) -> None:
        """Raise TrainingLoopError where the weights are torn."""
        if self.torn is not None:
            raise TrainingLoopError(self.torn)


@dataclass(frozen=True, slots=True)
class RuntimeStats:
    """What the runtime moved and held since it was made.

    Attributes:
        moved_bytes: by lane: h2d, d2h, ssd_read, ssd_write.
        peak_bytes, current_bytes: by tier: gpu, dram, ssd; only what the runtime owns.
        stall_s: seconds the host waited, by what it waited for.
        updates: counters of the optimizer's pipeline.
        busy_s: seconds of work by lane: ssd_read, ssd_write, cpu_adam.
        step_s: seconds of a step, the median of the latest; None before there are two.
        steps, skipped_steps: made, and left out because a gradient was NaN or Inf.
    """

    moved_bytes: dict[str, int] = field(default_factory=dict)
    peak_bytes: dict[str, int] = field(default_factory=dict)
    current_bytes: dict[str, int] = field(default_factory=dict)
    stall_s: dict[str, float] = field(default_factory=dict)
    updates: dict[str, float] = field(default_factory=dict)
    busy_s: dict[str, float] = field(default_factory=dict)
    step_s: float | None = None
    steps: int = 0
    skipped_steps: int = 0
