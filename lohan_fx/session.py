"""The session behind one compiled model: what is made in which order, and what a call goes through.

A session goes one way: parameters are taken over at once; the first captured step brings the plan and
the runtime; values move into their tiers while that step is compiled. Further input shapes add
programs, under the same placements if those can work (see the notes of captured.py).

    settings         what the caller chose
    params, state    the parameters' stubs; their values and optimizer state, wherever they are
    forwards         what torch.compile has made of the model
    programs         what was captured, with its plan
    runtime          does the moves; there is none before the first plan
    phases           what the time before the first step goes on

A training that was run before begins to place values before anything is captured, as that run did; see
[Note: placing ahead] in known_placings.py.

A call runs compiled code. Where that has none for the input's shapes yet, the compiler captures a step and
asks back (compiler.capture.Host): `decide` plans it (overlap.py, planning.py), `accept` and `keep` take
what was made of it, and `prepare` is called before each run of a program.
"""

from __future__ import annotations

import logging
import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch

from . import known_placings
from .captured import Captured, Programs
from .compiler.capture import (
    Backend,
    Decision,
    Traced,
    beside_tracing,
    owned,
    paused_collector,
)
from .compiler.compiled import CompiledForwards, Step
from .compiler.dynamo import (
    LeftToEager,
    compiler_settings,
    explained,
    misplaced,
    refuse_autograd_modes,
)
from .compiler.skeleton import Skeleton
from .compiler.weave import Woven
from .errors import LohanError, TrainingLoopError
from .known_placings import Placed
from .optim import Adam
from .overlap import check_overlap, may_speculate, overlap_for
from .params import ManagedParams
from .phases import Phases
from .planner import Overlap, Problem
from .planning import (
    buckets_of,
    formulated,
    lacks_seconds,
    plan_of,
    replayed,
    seconds_of,
    solution_of,
)
from .program import Bucket
from .runtime import Runtime, RuntimeOptions, RuntimeStats
from .runtime.recorder import Recorder
from .settings import Settings
from .step import TracedStep
from .tracing import Trace
from .training_state import TrainingState

log = logging.getLogger(__name__)


class PlanReady(LohanError):
    """Ends a capture that is made for its plan alone; never reaches the user."""


class ComesAgain(LohanError):
    """Ends a call whose program is to be planned anew; never reaches the user."""


class Session:
    """Everything behind one compiled model. See the module docstring for its life."""

    def __init__(
        self,
        model: torch.nn.Module,
        dtype: torch.dtype | None,
        settings: Settings,
        phases: Phases | None = None,
    ) -> None:
        self.settings = settings
        self.device = settings.device
        self.lowering = settings.lowering
        self.params = ManagedParams(model, self, device=settings.device, dtype=dtype)
        self._requires_grad = [stub.requires_grad for stub in self.params.stubs]
        _move_buffers(model, settings.device)
        self.state = TrainingState(self.params)
        self.forwards = CompiledForwards(model, Backend(self))
        self.programs = Programs()
        self.phases = Phases() if phases is None else phases
        self.runtime: Runtime | None = None
        self.buckets: tuple[Bucket, ...] = ()
        self._ahead: Placed | None = None  # as what values are being placed before there is a plan
        self._placed_file: Path | None = None  # where the next run will look for this
        self.traced: TracedStep | None = None  # where settings.trace_only
        self.saving: Any = None  # the checkpoint written last in the background
        self.recorder: Recorder | None = None  # notes what steps do
        self.last_trace: Trace | None = None
        self._optimizer: weakref.ref[Adam] | None = None
        # What training programs were planned for: all that the next shape is to have in common with it.
        self._trained_by: Problem | None = None
        self._no_sync = False  # inside of no_sync()
        self._accumulates = False  # since no_sync() was first used
        self._closed = False

    # Calls.

    def call(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """One forward of the compiled model."""
        self.check_open()
        with torch._C.DisableTorchFunctionSubclass():  # whose guard takes its time
            now = [stub.requires_grad for stub in self.params.stubs]
        if torch.is_grad_enabled() and now != self._requires_grad:
            changed = [
                n for n, a, b in zip(self.names, now, self._requires_grad, strict=True) if a != b
            ]
            raise TrainingLoopError(
                f"requires_grad of {changed[0]!r} changed after lohan_fx.compile; freeze parameters "
                "before it"
            )
        trains = torch.is_grad_enabled() and bool(self.trainable) and not self.settings.plan_only
        if trains and self.optimizer is None:
            raise TrainingLoopError(
                "no optimizer is attached, so gradients would go nowhere; create "
                "lohan_fx.AdamW(model.parameters(), ...) before the first forward, or run the "
                "forward under torch.no_grad()"
            )
        if trains:
            refuse_autograd_modes()
            self._forget_training_unless_planned()
        forward = self.forwards.whole(grad=torch.is_grad_enabled())
        try:
            return self._run(forward, args, kwargs, trains=trains)
        except ComesAgain:
            self.forwards.forget_training()
            return self._run(forward, args, kwargs)

    def evaluate(self, module: torch.nn.Module, kwargs: Mapping[str, Any]) -> Any:
        """One forward, without gradients, of a module of the model as if it were the model."""
        self.check_open()
        forward = self.forwards.part(module)
        with torch.no_grad():
            return self._run(forward, (), kwargs)

    def _forget_training_unless_planned(self) -> None:
        """Plan anew where what there is was not planned for accumulation, or to wait for step()."""
        wanted, known = (self._overlap(), self._accumulates), self._trained_by
        if known is not None and (known.overlap, known.accumulates) != wanted:
            self._trained_by = None
            self.forwards.forget_training()

    def _run(
        self,
        forward: Step,
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        *,
        trains: bool = False,
    ) -> Any:
        # The first call makes what stays; later ones make little besides.
        collector = nullcontext() if self.captured else paused_collector()
        self.phases.call_begins()
        try:
            with self.params.exposed(), compiler_settings(), collector:
                if trains and self.runtime is None:
                    self._place_ahead(args, kwargs)
                result = forward(*args, **kwargs)
        except Exception as error:
            self._undo_call()
            shown = explained(error)
            if isinstance(shown, LeftToEager):
                self.forwards.forget()  # Dynamo may have marked it to be skipped for good
            if not isinstance(shown, LohanError):
                shown = misplaced(error, args, kwargs, self.device)
            if shown is error:
                raise
            # What Dynamo wraps around it, and its frames, say nothing more.
            raise shown.with_traceback(None) from None
        except BaseException:  # an interrupt
            if not self.state.placed:
                self._undo_call()
            raise
        if self._ahead is not None:  # nothing was captured
            self._undo_call()
        return result

    def _place_ahead(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """Begin to place values as the last run of this training did, if it is known."""
        with self.timed("look up the placing"):
            try:
                self._placed_file = known_placings.file_of(
                    self.settings,
                    self.params,
                    overlap=self._overlap(),
                    accumulates=self._accumulates,
                    args=args,
                    kwargs=kwargs,
                )
                if self._placed_file is None:
                    return
                self._ahead = known_placings.read(self._placed_file, self.params)
                if self._ahead is None:
                    return
                self.runtime = self._open_runtime(self._ahead.options)
                self.state.begin_placing(self.runtime, self._ahead.buckets, self._ahead.placements)
            except Exception as error:  # met again once there is a plan, where it matters
                self._place_anew(str(error))

    def _place_anew(self, reason: str) -> None:
        """Take back what was placed ahead; it is placed once there is a plan."""
        log.info("values are not placed as in the last run: %s", reason)
        with self.timed("take values back"), beside_tracing():
            self.state.undo_placing()
            if self.runtime is not None:
                self.runtime.close()
        self.runtime = self._ahead = None

    def _undo_call(self) -> None:
        """After a failed call: drop what its pass holds, what was captured in part, and a runtime
        that holds no values yet."""
        self._ahead = None
        if self.runtime is None:
            return
        self.state.undo_placing()
        self.runtime.passes.abort()
        self.programs.drop_incomplete()
        if not self.state.placed:
            self.runtime.close()
            self.runtime = None
            self.programs = Programs()
            self.buckets = ()
            self.state.take_unused_back()
            self.forwards.forget()  # it holds the runtime's number

    def check_open(self) -> None:
        """Raise LohanError where the model was closed."""
        if self._closed:
            raise LohanError("this model was closed; build and compile it again")
        if self.state.placing:  # a second interrupt cut the undoing of the first short
            self._undo_call()

    def close(self) -> None:
        """Give back memory and files. The model's parameters are gone with it."""
        if not self._closed:
            self._closed = True
            self.forwards.forget()
            self.state.stop_placing()
            if self.runtime is not None:
                self.runtime.close()
            self.params.disown()
            self.params.values.clear()

    # What the compiler asks (compiler.capture.Host).

    @property
    def names(self) -> Sequence[str]:
        return self.params.names

    @property
    def trainable(self) -> frozenset[int]:
        return self.state.trainable

    @property
    def stubs(self) -> Sequence[torch.Tensor]:
        return self.params.stubs

    def owns(self, param: torch.Tensor) -> int | None:
        return owned(self, param)

    def timed(self, what: str) -> AbstractContextManager[None]:
        return self.phases.timed(what)

    def decide(self, traced: Traced) -> Decision:
        """Plan one captured step: make buckets, formulate, solve, and size the runtime by it."""
        settings, state = self.settings, self.state
        if traced.training:
            state.leave_out_unused(traced.reached, settled=bool(self.buckets))
        if not self.buckets:
            self.buckets = buckets_of(traced, self.params, self.trainable, settings.bucket_numel)
        if self._ahead is not None and self._ahead.buckets != self.buckets:
            self._place_anew("other parameters move together")
        if self._ahead is not None and lacks_seconds(traced, settings):
            self._place_anew("ops are to be measured")
        overlap = self._overlap()
        # Once values are placed there is no room to measure in.
        room = 0 if state.placed or state.placing else settings.capacities.gpu_bytes
        seconds = seconds_of(traced, settings, self.phases, room_bytes=room)
        step = formulated(
            traced,
            self.buckets,
            seconds,
            settings,
            overlap=overlap,
            accumulates=self._accumulates,
            speculating=self._speculating,
        )
        if settings.trace_only:
            self.traced = step
            raise PlanReady("traced")
        if settings.plan is not None and not state.placed:
            step, solution = replayed(step, settings.plan, settings)
        else:
            stay = self.programs.places_to_keep(training=traced.training)
            ahead = may_speculate(settings, self._planned_for, training=traced.training)
            step, solution = solution_of(
                step, settings, training=traced.training, stay=stay, may_speculate=ahead
            )
        if traced.training:
            self._trained_by = step.problem
            solution = self.programs.share_staging(step.problem, solution)
        plan = plan_of(step, solution, settings, seconds.source)
        captured = Captured.of(traced, step.problem, solution, plan, poison=settings.poison)
        index = self.programs.add(captured)
        placed = Placed(self.buckets, captured.placements, captured.options)
        if self._ahead is not None and self._ahead != placed:
            self._place_anew("the plan is another")
        if self._ahead is not None:
            self.programs.found_in_force(captured)
            self._ahead = self._placed_file = None  # which says so already
        # A plan alone needs no runtime; the graphs are still rewritten, for its schedule.
        if self.runtime is None and not settings.plan_only:
            self.runtime = self._open_runtime(captured.options)
            self.programs.put_in_force(captured, self.runtime)
            state.begin_placing(self.runtime, self.buckets, captured.placements)
        number = 0 if self.runtime is None else self.runtime.number
        return captured.decision(number, index, self.buckets)

    def _open_runtime(self, options: RuntimeOptions) -> Runtime:
        settings = self.settings
        runtime = Runtime(
            settings.device,
            gpu_bytes=settings.capacities.gpu_bytes,
            dram_bytes=settings.capacities.dram_bytes,
            ssd=tuple((str(path), capacity) for path, capacity in settings.budget.ssd or ()),
            options=options,
            verify_io=settings.verify_io,
        )
        runtime.observer.record(self.recorder)
        return runtime

    def accept(self, woven: Woven) -> None:
        self.captured[woven.program.index].accept(woven)
        if self.settings.plan_only:
            raise PlanReady("planned")

    def keep(self, index: int, part: str, skeleton: Skeleton) -> None:
        self.captured[index].skeletons[part] = skeleton

    def prepare(self, index: int) -> None:
        """Before a program runs: its values in their tiers, its windows, its optimizer.

        See [Note: a program has its placements].

        Raises:
            ComesAgain: for one that has run, under placements that are no longer; see
                [Note: shapes in turns].
        """
        runtime, captured = self.runtime, self.captured[index]
        assert runtime is not None
        if self.programs.comes_again(index):
            raise ComesAgain("planned anew")
        if self.programs.introduce(index, runtime, self.names):
            self.phases.capture_ends()
        if not self.state.placed:
            self.state.end_placing(self.phases)
            self._keep_placed(captured)
        if not self.programs.is_in_force(captured):
            with self.timed("place again"):
                moved = self.programs.put_in_force(captured, runtime)
            if moved and captured.training:
                self.forwards.forget_evaluation()  # it is to have the placements of training
        optimizer = self.optimizer
        if captured.training and optimizer is not None:
            runtime.attach(optimizer)
        runtime.passes.no_sync = self._no_sync

    def _keep_placed(self, captured: Captured) -> None:
        worth = self.phases.seconds["place, beside compiling"] >= known_placings.WORTH_S
        if captured.training and self._placed_file is not None and worth:
            placed = Placed(self.buckets, captured.placements, captured.options)
            known_placings.keep(self._placed_file, placed)
        self._placed_file = None

    # What parameters, the optimizer and a loss scaler ask (params.Owner).

    def read(self, pid: int) -> torch.Tensor:
        """A CPU copy of a parameter in its compute dtype."""
        self.check_open()
        return self.state.read(pid)

    def write(self, pid: int, value: torch.Tensor) -> None:
        """Set a parameter's value; see TrainingState.write."""
        self.check_open()
        self.state.write(pid, value)

    def optimizer_state(self, pid: int) -> dict[str, Any]:
        """step, exp_avg, exp_avg_sq and master of one parameter, as CPU copies; {} if frozen."""
        return self.state.optimizer_state(pid)

    def set_optimizer_state(self, pid: int, state: Mapping[str, Any]) -> None:
        """Set what `optimizer_state` gives; kept until the first step where nothing is placed yet."""
        self.state.set_optimizer_state(pid, state)

    @property
    def optimizer(self) -> Adam | None:
        """The optimizer made from these parameters, while it lives."""
        return None if self._optimizer is None else self._optimizer()

    def attach(self, optimizer: Adam) -> None:
        present = self.optimizer
        if present is not None and present is not optimizer:
            raise TrainingLoopError(
                "this model already has an optimizer; delete it first (del opt), or put all parameters "
                "into one with several groups"
            )
        missing = [
            self.names[pid]
            for pid in sorted(self.trainable | self.state.unused)
            if optimizer.group_of(pid) is None
        ]
        if missing:
            raise TrainingLoopError(
                f"{len(missing)} parameter(s) require a gradient but were not given to the optimizer: "
                f"{', '.join(missing[:5])}{', ...' if len(missing) > 5 else ''}; pass them, or freeze "
                "them with requires_grad_(False) before lohan_fx.compile"
            )
        check_overlap(self.settings.overlap, optimizer)
        if self._optimizer is not None and present is None:  # it replaces one that is gone
            self.state.reset_moments()
        self._optimizer = weakref.ref(optimizer)

    def _overlap(self) -> Overlap:
        """What the next training step would be planned for."""
        return overlap_for(
            self.settings,
            self.optimizer,
            before=self._planned_for,
            accumulates=self._accumulates,
        )

    @property
    def _planned_for(self) -> Overlap | None:
        return None if self._trained_by is None else self._trained_by.overlap

    @property
    def _speculating(self) -> frozenset[int] | None:
        """The buckets that may speculate, as decided for the first shape; None is all."""
        return None if self._trained_by is None else self._trained_by.speculating

    @contextmanager
    def no_sync(self) -> Iterator[None]:
        """Forwards inside leave their gradients to the step of a later backward."""
        before, self._no_sync = self._no_sync, True
        self._accumulates = True
        try:
            yield
        finally:
            self._no_sync = before

    def step(self) -> None:
        self.check_open()
        if self.runtime is not None:
            self.runtime.step()

    def discard_gradients(self) -> None:
        if self.runtime is not None:
            self.runtime.discard_gradients()

    @property
    def gradients_pending(self) -> bool:
        """True between a backward and its step(), and while gradients are accumulated."""
        return self.runtime is not None and self.runtime.gradients_pending

    @property
    def last_grad_norm(self) -> float | None:
        return None if self.runtime is None else self.runtime.last_grad_norm

    @property
    def skipped_steps(self) -> int:
        return 0 if self.runtime is None else self.runtime.stats().skipped_steps

    def check_scaling(self) -> None:
        """Refuse a scaled loss whose backward would use gradients before they are unscaled."""
        runtime = self.runtime
        if runtime is not None and runtime.passes.awaits_backward and not runtime.waits_for_step:
            raise TrainingLoopError(
                "loss scaling needs every gradient before the first update, which "
                f'overlap={self.settings.overlap!r} does not give here; use overlap="next-forward", '
                'or "auto" with the GradScaler made before the forward'
            )

    def unscale_gradients(self, inverse: float) -> bool:
        """Let step() multiply gradients by this; True if one is NaN or Inf."""
        self.check_open()
        if self.runtime is None:
            raise TrainingLoopError(
                "there are no gradients to unscale; run a forward and a backward"
            )
        return self.runtime.unscale_gradients(inverse)

    def skip_step(self) -> None:
        if self.runtime is not None:
            self.runtime.skip_step()

    # What others read.

    @property
    def captured(self) -> list[Captured]:
        """The programs in order of capture."""
        return self.programs.captured

    def stats(self) -> RuntimeStats | None:
        """What the runtime has counted; None before there is one."""
        return None if self.runtime is None else self.runtime.stats()


def _move_buffers(model: torch.nn.Module, device: torch.device) -> None:
    """Put buffers on the device; they keep their dtype."""
    for module in model.modules():
        for name, buffer in module._buffers.items():
            if buffer is not None and buffer.device != device:
                if buffer.is_meta:
                    module._buffers[name] = torch.empty_like(buffer, device=device)
                else:
                    module._buffers[name] = buffer.to(device)
