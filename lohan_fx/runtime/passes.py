"""Passes over a program: a forward, a backward, and which order of calls is legal."""

from __future__ import annotations

import contextlib
import enum
import itertools
import weakref
from dataclasses import dataclass, field

import torch

from lohan_fx import ops
from lohan_fx.errors import LohanError, TrainingLoopError
from lohan_fx.program import Names, Program, Tier

from .inbound import Incoming
from .layout import param_views
from .observer import Observer
from .resources import Resources

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


class Passes:
    """Implements ops.Moves, of one pass at a time.

    Attributes:
        no_sync: forwards from now on leave their gradients to a later backward's step.
    """

    def __init__(self, resources: Resources) -> None:
        self._resources = resources
        self._programs: dict[int, Program] = {}
        self._pass: _Pass | None = None
        self._live: _Live | None = None
        self._dropped: set[int] = set()  # tokens of handles that are gone
        self._tokens = itertools.count(1)
        self.no_sync = False
        self.number = ops.register(self)
        self.observer = Observer(resources, self.number)

    def add_program(self, program: Program, names: Names | None = None) -> None:
        """Make a program known under its index; `names` are for those who watch it run."""
        if program.index in self._programs:
            raise LohanError(f"there is a program {program.index} already")
        self._programs[program.index] = program
        self.observer.named(program, names or Names())

    @property
    def awaits_backward(self) -> bool:
        """True between a training forward and its backward."""
        return self._live is not None

    # ops.Moves

    def begin(self, program: int) -> torch.Tensor:
        self.recover()
        windows = self._resources.opened()
        entry = self._programs[program]
        self._resources.pools.drop_bounce()
        self._resources.progress.check_whole()
        if windows.updates.pending and not self._resources.overlap.waits_for_step:
            raise TrainingLoopError(_MISSING_STEP.format(overlap=self._resources.overlap))
        if entry.training:
            self._begin_training(entry)
        self.observer.forward_begins(entry)
        windows.pump()
        token = next(self._tokens)
        self._pass = _Pass(PassKind.FORWARD if entry.training else PassKind.EVALUATION, entry)
        handle = torch.tensor([token], dtype=torch.int64, device="cpu")
        if entry.training:
            self._live = _Live(token, entry, self._resources.progress.step_count, self.no_sync)
            weakref.finalize(handle, self._dropped.add, token).atexit = False
        windows.inbound.start(token, list(windows.incoming((*entry.forward, *entry.backward))))
        return handle

    def _begin_training(self, program: Program) -> None:
        if self._resources.hyper is None:
            raise TrainingLoopError(_CREATE_OPTIMIZER)
        if self._live is not None:
            _finish_failed_backward()
            self.recover()
        if self._live is not None:
            raise TrainingLoopError(_LIVE_FORWARD)
        windows = self._resources.opened()
        windows.check(program)
        windows.slots.activate(program)

    def begin_backward(self, handle: torch.Tensor) -> None:
        self.recover()
        windows = self._resources.opened()
        self._resources.progress.check_whole()
        if self._resources.hyper is None:
            raise TrainingLoopError(_CREATE_OPTIMIZER)
        token = int(handle[0])
        live = self._live
        if windows.updates.pending:
            raise TrainingLoopError(_SECOND_BACKWARD)
        if live is None or live.token != token:
            raise TrainingLoopError(_DEAD_FORWARD)
        if live.step != self._resources.progress.step_count:
            raise TrainingLoopError(_STEP_BETWEEN)
        program = live.program
        grad_plan = windows.grad_plan(program)
        self._pass = _Pass(PassKind.BACKWARD, program)
        self.observer.backward_begins(program)
        windows.updates.begin_backward(grad_plan, accumulate=live.accumulates)
        if windows.inbound.token != token:
            windows.inbound.start(token, list(windows.incoming(program.backward)))
        windows.pump()

    def end(self) -> None:
        current, windows = self._current(), self._resources.opened()
        try:
            if current.fetched:
                name = self._resources.store.homes[next(iter(current.fetched))].bucket.name
                raise LohanError(f"the pass ended without releasing {name}")
            if current.kind is PassKind.BACKWARD:
                windows.updates.end_backward()
                windows.slots.consumed()
                self._live = None
            windows.pump()
        except BaseException:
            self.abort()
            raise
        self._pass = None

    def fetch(self, bucket: int) -> None:
        windows = self._resources.opened()
        windows.pump()
        resident = self._resources.store.homes[bucket].weight_tier is Tier.GPU
        item = None if resident else windows.inbound.request(("fetch", bucket))
        self._current().fetched[bucket] = item

    def wait(self, bucket: int) -> list[torch.Tensor]:
        windows = self._resources.opened()
        windows.pump()
        home = self._resources.store.homes[bucket]
        item = self._current().fetched[bucket]
        memory = None if item is None else windows.inbound.receive(item)
        if memory is None or home.streamed:
            windows.updates.under_way.settle_on_device(bucket)
        if memory is None:
            return home.views()
        return param_views(home.bucket, home.dtype, memory.bytes)

    def release(self, bucket: int) -> None:
        current, windows = self._current(), self._resources.opened()
        item = current.fetched.pop(bucket)
        if item is not None:
            assert item.device is not None
            if self._resources.options.poison:
                item.device.bytes.fill_(0xFF)
            windows.inbound.release(item)
        if current.kind is PassKind.BACKWARD:
            windows.updates.release(bucket, None if item is None else item.arrival)
        windows.pump()

    def offload(self, slot: int, x: torch.Tensor) -> None:
        windows = self._resources.opened()
        windows.pump()
        windows.slots.offload(slot, x)

    def offload_wait(self, slot: int) -> None:
        windows = self._resources.opened()
        windows.slots.offload_wait(slot)
        windows.pump()

    def reload(self, slot: int) -> None:
        windows = self._resources.opened()
        windows.pump()
        self._current().reloads[slot] = windows.inbound.request(("reload", slot))

    def reload_wait(self, slot: int) -> torch.Tensor:
        windows = self._resources.opened()
        windows.pump()
        item = self._current().reloads.pop(slot)
        memory = windows.inbound.receive(item).bytes
        spec = windows.slots.slot(slot)
        typed = memory.view(getattr(torch, spec.dtype))
        value = typed.as_strided(spec.shape, spec.stride, typed.storage_offset())
        windows.inbound.release(item)
        return value

    def grad(self, pid: int, g: torch.Tensor) -> None:
        windows = self._resources.opened()
        windows.updates.arrive(pid, g)
        windows.pump()

    def _current(self) -> _Pass:
        if self._pass is None:
            raise LohanError("a move outside of a pass: begin() or begin_backward() comes first")
        return self._pass

    # Ends in the middle

    def abort(self) -> None:
        """Forget the pass under way, if any: free its buffers, drop its gradients.

        In the modes that update during the backward, updates that were made stay made; training on
        from there raises TrainingLoopError.
        """
        current, self._pass = self._pass, None
        self.observer.pass_is_aborted()
        windows = self._resources.windows
        if current is None or windows is None:
            return
        # What failed may fail again here; the error that matters is under way already.
        failures = contextlib.suppress(LohanError, RuntimeError)
        with failures:
            self._resources.device.join()
        with failures:
            windows.inbound.cancel()
        if current.kind is not PassKind.EVALUATION:
            self._live = None
            with failures:
                windows.slots.forget()
        if current.kind is PassKind.BACKWARD:
            windows.updates.abandon()

    def recover(self) -> None:
        """Clean up after a pass left in the middle, and after a forward nobody will use."""
        self._resources.check_open()
        self.abort()
        live = self._live
        if live is not None and live.token in self._dropped:
            self._live = None
            windows = self._resources.opened()
            if windows.inbound.token == live.token:
                windows.inbound.cancel()
            windows.slots.forget()
        if self._live is None:
            self._dropped.clear()

    def quiet(self) -> None:
        """Make values at rest the newest, and forget what was read ahead of them."""
        self.recover()
        if self._resources.windows is not None:
            self._resources.windows.inbound.cancel()
        self._resources.drain()

    def close(self) -> None:
        """Forget the pass under way, and the forward whose backward has not run; nothing is freed."""
        self._pass = None
        self._live = None


def _finish_failed_backward() -> None:
    """Let autograd drop what is left of a backward that raised: it keeps that until the next one."""
    with torch.enable_grad():
        torch.zeros((), requires_grad=True).clone().backward()  # type: ignore[no-untyped-call]
