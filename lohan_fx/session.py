"""The session behind one compiled model: parameters, plan, programs and runtime, and their order.

A session goes one way: parameters are taken over at once; the first captured step brings the plan and
the runtime; values move into their tiers while that step is compiled. Further input shapes add
programs, under the same placements if those can work.

[Note: a program has its placements] Windows are sized, and weights waited for, by one plan. Where the
next program to run has another plan, values and windows move first. A capture happens under Dynamo's
fake tensors and may fail, so nothing moves before it is complete; but the first placing of all, in a
thread of its own, begins with the plan and is undone where what follows fails (placing.py).

[Note: shapes in turns] Batches of two shapes may alternate for a whole run, so that their programs
should have the same placements and staging. A new shape is planned under the placements that there
are, and all under them get the same staging (planner.sharing). Where a new shape had to move values,
the others are planned anew, once each, when they come again.
"""

from __future__ import annotations

import math
import time
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch

from .budget import Budget
from .compiler.buckets import ParamInfo, bucket_numel_for, first_uses, make_buckets
from .compiler.capture import Backend, Decision, Traced, owned, paused_collector
from .compiler.dynamo import (
    LeftToEager,
    compiler_settings,
    explained,
    misplaced,
    own_code,
    refuse_autograd_modes,
)
from .compiler.formulate import formulate_training
from .compiler.op_seconds import OpSeconds
from .compiler.seconds import Seconds
from .compiler.skeleton import Skeleton
from .compiler.tensors import num_tokens, tensor_rows
from .compiler.weave import Layout, Windows, Woven
from .errors import (
    CaptureError,
    InfeasiblePlan,
    LohanError,
    PlanMismatch,
    TrainingLoopError,
)
from .hardware import Hardware
from .optim import Adam, loss_scalers
from .params import ManagedParams
from .piecewise import Value, in_memory
from .pins import Pins, best_of, forced_placements
from .placing import Placing
from .plan import Plan, PlanMove, build_plan
from .planner import (
    BucketPlace,
    Capacities,
    Forced,
    Overlap,
    Place,
    Problem,
    Solution,
    accumulator_bytes,
    default_overlap,
    in_turns,
    validate,
)
from .program import Bucket, BucketPlacement, Names, ParamSpec, Tier
from .progress import progress_of_phase
from .runtime import Runtime, RuntimeOptions, RuntimeStats
from .runtime.adam_gpu import workspace_bytes
from .runtime.buckets import stored_pieces
from .runtime.recorder import Recorder
from .solutions import solved
from .step import TracedStep
from .tracing import Trace
from .units import format_bytes

# torch's allocator also serves cuBLAS workspaces and rounds blocks up; a plan leaves them this much.
CUDA_MARGIN_BYTES = 160 * 2**20
CUDA_MARGIN_SHARE = 50

# What a terminal shows of the work before steps can run; the rest has bars of its own, or is short.
_PHASES = {
    "plan": "Planning",
    "split": "Splitting the graph",
    "lower forward": "Compiling the forward",
    "lower backward": "Compiling the backward",
    "await kernels": "Compiling kernels",
    "place again": "Placing anew",
}

Step = Callable[..., Any]
Policy = str | Callable[[Problem, Forced], Solution]


class PlanReady(LohanError):
    """Ends a capture that is made for its plan alone; never reaches the user."""


class ComesAgain(LohanError):
    """Ends a call whose program is to be planned anew; never reaches the user."""


@dataclass(frozen=True, slots=True)
class Settings:
    """What the caller of `compile` chose, resolved and checked."""

    model_name: str
    device: torch.device
    budget: Budget
    capacities: Capacities
    hardware: Hardware
    overlap: str
    policy: Policy
    lowering: str
    plan: Plan | None = None
    profile: str = "auto"  # see api.PROFILES
    plan_only: bool = False
    trace_only: bool = False  # no plan either: `Session.traced` is what is wanted
    pin: Pins = field(default_factory=dict)
    max_writes_per_day: int | None = None  # bytes to SSD
    poison: bool = False
    bucket_numel: int | None = None
    verify_io: bool = False


@dataclass(slots=True)
class Captured:
    """One program with what it was made from; skeletons come as AOTAutograd lowers them."""

    training: bool
    plan: Plan
    problem: Problem
    solution: Solution
    placements: tuple[BucketPlacement, ...]
    options: RuntimeOptions
    woven: Woven | None = None
    skeletons: dict[str, Skeleton] = field(default_factory=dict)
    activation_of: Mapping[str, int] = field(default_factory=dict)  # by the name of a saved value

    @property
    def complete(self) -> bool:
        """False for a capture under way, or one that failed."""
        return {"forward", "backward"} <= self.skeletons.keys() or (
            not self.training and "forward" in self.skeletons
        )


class Session:
    """Everything behind one compiled model. See the module docstring for its life."""

    def __init__(
        self, model: torch.nn.Module, dtype: torch.dtype | None, settings: Settings
    ) -> None:
        self.settings = settings
        self.device = settings.device
        self.lowering = settings.lowering
        self.runtime: Runtime | None = None
        self.buckets: tuple[Bucket, ...] = ()
        self.captured: list[Captured] = []
        self.traced: TracedStep | None = None  # where settings.trace_only
        self.seconds: dict[str, float] = {}  # spent before steps could run, by what on
        self._inner: list[float] = [0.0]  # seconds of what is timed within each open `timed` block
        self._call_began = 0.0, 0.0  # when, and what had been timed by then
        self._optimizer: weakref.ref[Adam] | None = None
        self._pending_state: dict[int, Mapping[str, Any]] = {}
        self._placing: tuple[Placing, Captured] | None = None  # the first one, under way
        self._placed: Captured | None = None  # whose placements are in force
        self._staged: RuntimeOptions | None = None  # in force
        self._came_again: set[str] = set()  # fingerprints of problems that were planned anew
        self._known: set[int] = set()  # programs that the runtime has
        self._no_sync = False  # inside of no_sync()
        self._accumulates = False  # since no_sync() was first used
        self._trained_by: tuple[Overlap, bool] | None = (
            None  # what training programs were planned for
        )
        self._adopted = False
        self._closed = False
        self.saving: Any = None  # the checkpoint written last in the background
        self.recorder: Recorder | None = None  # notes what steps do
        self.last_trace: Trace | None = None
        self.params = ManagedParams(model, self, device=settings.device, dtype=dtype)
        self._requires_grad = [stub.requires_grad for stub in self.params.stubs]
        # Parameters that the step updates, and those that it would but whose gradient is None.
        self.trainable = frozenset(
            pid for pid, required in enumerate(self._requires_grad) if required
        )
        self.unused: frozenset[int] = frozenset()
        _move_buffers(model, settings.device)
        self._backend = Backend(self)
        # By whether gradients are on: what evaluation compiled can be dropped by itself.
        self._steps = {mode: own_code(model) for mode in (True, False)}
        self._compiled = {mode: self._compile(step) for mode, step in self._steps.items()}
        self._evaluations: dict[int, tuple[Step, Step]] = {}  # of parts, by id: code, compiled

    # What params.Owner, the optimizer and the compiler's Host ask for.

    @property
    def names(self) -> Sequence[str]:
        return self.params.names

    def owns(self, param: torch.Tensor) -> int | None:
        return owned(self, param)

    def read(self, pid: int) -> torch.Tensor:
        """A CPU copy of a parameter in its compute dtype."""
        self._check_open()
        if self.runtime is not None and self._adopted:
            return self.runtime.weight(pid)
        value = in_memory(self.params.values[pid])
        return value.to("cpu", self.params.stubs[pid].dtype, copy=True)

    def read_piece(self, pid: int, section: str, start: int, out_N: torch.Tensor) -> None:
        """Fill `out_N` (1-D, CPU) from element `start` of a parameter's section on.

        Sections: "weight" (compute dtype); for trainable parameters "master", "exp_avg" and
        "exp_avg_sq" (fp32). Elements are in the order of the parameter's strides. Call `rest` first.
        """
        if self.runtime is not None and self._adopted:
            self.runtime.read_piece(pid, section, start, out_N)
            return
        value: Value | None = self.params.values[pid]
        if section.startswith("exp"):
            value = self._pending_state.get(pid, {}).get(section)
        if value is None:
            out_N.zero_()
            return
        spec = ParamSpec(
            pid=pid,
            name=self.names[pid],
            shape=tuple(self.params.stubs[pid].shape),
            stride=self.params.stubs[pid].stride(),
            offset=0,
            numel=self.params.stubs[pid].numel(),
            trainable=pid in self.trainable,
        )
        through = torch.float32 if spec.trainable else out_N.dtype
        piece_N = stored_pieces(spec, value, through)(start, start + out_N.numel())
        out_N.copy_(piece_N.to(through))

    def rest(self) -> None:
        """Make what `read_piece` gives the state after the last step.

        Raises:
            TrainingLoopError: between backward and step(), or after an update that failed.
        """
        self._check_open()
        if self.runtime is not None and self._adopted:
            self.runtime.rest()

    @property
    def step_count(self) -> int:
        """Optimizer steps made, those before a checkpoint was loaded included."""
        if self.runtime is not None and self._adopted:
            return self.runtime.step_count
        steps = [int(state["step"]) for state in self._pending_state.values() if "step" in state]
        return max(steps, default=0)

    @property
    def placed(self) -> bool:
        """True once the values are in their tiers."""
        return self._adopted

    def steps(self, pid: int) -> int:
        """Updates that a parameter has had: those steps in which it had a gradient."""
        if self.runtime is not None and self._adopted:
            return self.runtime.steps(pid)
        return int(self._pending_state.get(pid, {}).get("step", 0))

    def restore(
        self,
        values: Mapping[int, Value],
        moments: Mapping[int, tuple[int, Value, Value]] | None,
        progress: Callable[[int], None] = lambda nbytes: None,
    ) -> None:
        """Set parameters (their masters) and, unless None, their step counts and moments.

        Where nothing is placed yet, values are only remembered: they are read when they are placed.
        On failure in the middle, training goes on only after another restore.
        """
        self._check_open()
        if self.runtime is None or not self._adopted:
            self.params.values.update(values)
            if moments is not None:
                self._pending_state = {
                    pid: {"step": torch.tensor(float(step)), "exp_avg": m, "exp_avg_sq": v}
                    for pid, (step, m, v) in moments.items()
                }
            return
        runtime = self.runtime
        runtime.begin_restore()
        for pid, value in values.items():
            runtime.set_master(pid, value)
            progress(_nbytes(value))
        for pid, (_, exp_avg, exp_avg_sq) in (moments or {}).items():
            runtime.set_moments(pid, exp_avg, exp_avg_sq)
            progress(_nbytes(exp_avg) + _nbytes(exp_avg_sq))
        runtime.end_restore({pid: step for pid, (step, _, _) in (moments or {}).items()})

    def attach(self, optimizer: Adam) -> None:
        present = None if self._optimizer is None else self._optimizer()
        if present is not None and present is not optimizer:
            raise TrainingLoopError(
                "this model already has an optimizer; delete it first (del opt), or put all parameters "
                "into one with several groups"
            )
        missing = [
            self.names[pid]
            for pid in sorted(self.trainable | self.unused)
            if optimizer.group_of(pid) is None
        ]
        if missing:
            raise TrainingLoopError(
                f"{len(missing)} parameter(s) require a gradient but were not given to the optimizer: "
                f"{', '.join(missing[:5])}{', ...' if len(missing) > 5 else ''}; pass them, or freeze "
                "them with requires_grad_(False) before lohan_fx.compile"
            )
        self._check_overlap(optimizer)
        replaces = self._optimizer is not None and present is None
        if replaces and self.runtime is not None and self._adopted:
            self.runtime.reset_moments()
        self._optimizer = weakref.ref(optimizer)

    def step(self) -> None:
        self._check_open()
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
        if runtime is not None and runtime.awaits_backward and not runtime.waits_for_step:
            raise TrainingLoopError(
                "loss scaling needs every gradient before the first update, which "
                f'overlap={self.settings.overlap!r} does not give here; use overlap="next-forward", '
                'or "auto" with the GradScaler made before the forward'
            )

    def unscale_gradients(self, inverse: float) -> bool:
        """Let step() multiply gradients by this; True if one is NaN or Inf."""
        self._check_open()
        if self.runtime is None:
            raise TrainingLoopError(
                "there are no gradients to unscale; run a forward and a backward"
            )
        return self.runtime.unscale_gradients(inverse)

    def skip_step(self) -> None:
        if self.runtime is not None:
            self.runtime.skip_step()

    @contextmanager
    def no_sync(self) -> Iterator[None]:
        """Forwards inside leave their gradients to the step of a later backward."""
        before, self._no_sync = self._no_sync, True
        self._accumulates = True
        try:
            yield
        finally:
            self._no_sync = before

    def optimizer_state(self, pid: int) -> dict[str, Any]:
        """step, exp_avg, exp_avg_sq and master of one parameter, as CPU copies; {} if frozen."""
        if pid not in self.trainable:
            return {}
        if self.runtime is None or not self._adopted:
            state = self._pending_state.get(pid, {})
            return {name: in_memory(value) for name, value in state.items()}
        exp_avg, exp_avg_sq = self.runtime.moments(pid)
        return {
            "step": torch.tensor(float(self.runtime.steps(pid))),
            "exp_avg": exp_avg,
            "exp_avg_sq": exp_avg_sq,
            "master": self.runtime.master(pid),
        }

    def set_optimizer_state(self, pid: int, state: Mapping[str, Any]) -> None:
        """Set what `optimizer_state` gives; kept until the first step where nothing is placed yet."""
        if not state:
            return
        for name, value in state.items():
            shape = self.params.stubs[pid].shape
            if name != "step" and value.shape != shape:
                raise LohanError(
                    f"{name} of {self.names[pid]} has shape {tuple(value.shape)}, its parameter "
                    f"{tuple(shape)}; this optimizer state is of another model"
                )
        if self.runtime is None or not self._adopted:
            self._pending_state[pid] = dict(state)
            return
        if "master" in state:
            self.runtime.set_master(pid, state["master"])
        self.runtime.set_moments(pid, state["exp_avg"], state["exp_avg_sq"])
        self.runtime.set_steps(pid, int(state["step"]))

    # Captures.

    def decide(self, traced: Traced) -> Decision:
        """Plan one captured step: make buckets, formulate, solve, and size the runtime by it."""
        settings = self.settings
        if traced.training:
            self._set_unused(traced.reached)
        if not self.buckets:
            self.buckets = self._make_buckets(traced)
        overlap = self._overlap()
        seconds = self._seconds(traced)
        problem = formulate_training(
            traced.joint,
            traced.stages,
            traced.candidates,
            self.buckets,
            seconds=seconds,
            capacities=settings.capacities,
            overlap=overlap,
            margin_bytes=self._margin_bytes(),
            gpu_adam_workspace_bytes=workspace_bytes(
                max((b.numel for b in self.buckets if b.trainable), default=0), self.device
            ),
            accumulates=self._accumulates,
            max_ssd_bytes_per_day=settings.max_writes_per_day,
        )
        if settings.trace_only:
            self.traced = TracedStep(
                model=settings.model_name,
                hardware=settings.hardware,
                problem=problem,
                tensors=tuple(tensor_rows(self.buckets, traced)),
                tokens_per_step=num_tokens(traced),
            )
            raise PlanReady("traced")
        if traced.training:
            self._trained_by = overlap, self._accumulates
        solution = self._solve(problem, traced)
        if traced.training:
            solution = self._share_staging(problem, solution)
        captured = Captured(
            training=traced.training,
            plan=self._plan(problem, solution, traced, seconds.source),
            problem=problem,
            solution=solution,
            placements=tuple(_placement(place) for place in solution.buckets),
            options=self._options(solution, problem),
            activation_of={node.name: c.index for c in traced.candidates for node in c.nodes},
        )
        index = len(self.captured)
        self.captured.append(captured)
        # A plan alone needs no runtime; the graphs are still rewritten, for its schedule.
        if self.runtime is None and not settings.plan_only:
            self.runtime = Runtime(
                settings.device,
                gpu_bytes=settings.capacities.gpu_bytes,
                dram_bytes=settings.capacities.dram_bytes,
                ssd=tuple((str(path), capacity) for path, capacity in settings.budget.ssd or ()),
                options=captured.options,
                verify_io=settings.verify_io,
            )
            self.runtime.record(self.recorder)
            self._begin_placing(captured)
        placements = captured.placements
        windows = solution.windows
        return Decision(
            number=0 if self.runtime is None else self.runtime.number,
            index=index,
            layout=Layout(
                buckets=self.buckets,
                resident=frozenset(i for i, p in enumerate(placements) if p.weight is Tier.GPU),
                refreshed=frozenset(
                    i
                    for i, p in enumerate(placements)
                    if p.weight is Tier.GPU and p.state is not Tier.GPU
                ),
            ),
            saved=frozenset(
                i for i, place in enumerate(solution.activations) if place is not Place.RECOMPUTE
            ),
            swapped={
                i: Tier(str(place))
                for i, place in enumerate(solution.activations)
                if place in (Place.DRAM, Place.SSD)
            },
            windows=Windows(
                fetch_bytes=windows.fetch_window_bytes,
                reload_bytes=windows.reload_window_bytes,
                offload_bytes=windows.offload_window_bytes,
            ),
        )

    def accept(self, woven: Woven) -> None:
        program = woven.program
        captured = self.captured[program.index]
        captured.woven = woven
        passes = (("forward", program.forward), ("backward", program.backward))
        captured.plan = captured.plan.with_schedule(
            PlanMove(name, move.op, move.arg) for name, moves in passes for move in moves
        )
        if self.settings.plan_only:
            raise PlanReady("planned")

    def keep(self, index: int, part: str, skeleton: Skeleton) -> None:
        self.captured[index].skeletons[part] = skeleton

    @contextmanager
    def timed(self, what: str) -> Iterator[None]:
        """Add what the block takes, less what is timed within it, to `seconds`, and show what goes on if
        it is one of `_PHASES`."""
        start = time.perf_counter()
        words = _PHASES.get(what)
        self._inner.append(0.0)
        try:
            with nullcontext() if words is None else progress_of_phase(words):
                yield
        finally:
            took = time.perf_counter() - start
            self._add_seconds(what, took - self._inner.pop())
            self._inner[-1] += took

    def _add_seconds(self, what: str, seconds: float) -> None:
        self.seconds[what] = self.seconds.get(what, 0.0) + seconds

    def prepare(self, index: int) -> None:
        """Before a program runs: its values in their tiers, its windows, its optimizer.

        See [Note: a program has its placements].

        Raises:
            ComesAgain: for one that has run, under placements that are no longer; see
                [Note: shapes in turns].
        """
        runtime, captured = self.runtime, self.captured[index]
        assert runtime is not None and captured.woven is not None
        if captured.training and index in self._known and not self._is_placed(captured):
            fingerprint = captured.problem.fingerprint()
            if fingerprint not in self._came_again:
                self._came_again.add(fingerprint)
                raise ComesAgain("planned anew")
        if index not in self._known:
            runtime.add_program(captured.woven.program, self._names_of(captured))
            self._known.add(index)
            began, timed = self._call_began
            self._add_seconds(
                "Dynamo and AOTAutograd", time.perf_counter() - began - (self._inner[0] - timed)
            )
        if not self._adopted:
            self._end_placing()
        if not self._is_placed(captured) or self._must_restage(captured):
            with self.timed("place again"):
                placed, self._placed, self._staged = self._placed, None, None
                runtime.place(captured.placements, captured.options)
                self._placed, self._staged = captured, captured.options
            if captured.training and (placed is None or placed.placements != captured.placements):
                self._forget_evaluation()
        optimizer = self._optimizer_now()
        if captured.training and optimizer is not None:
            runtime.attach(optimizer)
        runtime.no_sync = self._no_sync

    def _names_of(self, captured: Captured) -> Names:
        assert captured.woven is not None
        problem, slots = captured.problem, captured.woven.program.slots
        return Names(
            stages=tuple(stage.name for stage in problem.stages),
            buckets=tuple(bucket.name for bucket in problem.buckets),
            activations=tuple(activation.name for activation in problem.activations),
            slots=tuple(captured.activation_of[slot.name] for slot in slots),
            slot_names=tuple(slot.name for slot in slots),
            params=tuple(self.names),
        )

    def _begin_placing(self, captured: Captured) -> None:
        """Let another thread put every value where `captured` wants it."""
        runtime = self.runtime
        assert runtime is not None
        runtime.place(captured.placements, captured.options)
        moments = {
            pid: (state["exp_avg"], state["exp_avg_sq"])
            for pid, state in self._pending_state.items()
        }
        # The thread must not keep the session.
        work = partial(
            runtime.adopt,
            self.buckets,
            dict(enumerate(self.params.stubs)),
            self.params.values,
            captured.placements,
            moments,
        )
        nbytes = sum(bucket.weight_bytes + bucket.state_bytes for bucket in self.buckets)
        self._placing = Placing(work, nbytes, self.device), captured

    def _end_placing(self) -> None:
        """Wait until every value is in its tier. Raises what placing raised."""
        runtime = self.runtime
        assert runtime is not None and self._placing is not None
        placing, captured = self._placing
        with self.timed("await placing"):
            placing.wait()
        self.seconds["place, beside compiling"] = placing.seconds
        self._adopted, self._placed, self._staged = True, captured, captured.options
        self._placing = None
        pending = self._pending_state
        for pid, state in pending.items():
            if "master" in state:
                runtime.set_master(pid, state["master"])
            runtime.set_steps(pid, int(state["step"]))
        pending.clear()

    def _undo_placing(self) -> None:
        """Have the values back where they were, if they are on their way."""
        if self._placing is None:
            return
        complete = not self._placing[0].cancel()
        if complete and self.runtime is not None:
            self.runtime.give_back(self.params.values)
        self._placing = None

    def _is_placed(self, program: Captured) -> bool:
        return self._placed is not None and program.placements == self._placed.placements

    def _must_restage(self, program: Captured) -> bool:
        """Evaluation has no gradients and no activations, and its weights fit any staging for them."""
        return program.training and program.options != self._staged

    def _share_staging(self, problem: Problem, solution: Solution) -> Solution:
        """`solution` with the staging of all training programs under its placements, if one suits all."""
        beside = [
            captured
            for captured in self.captured
            if captured.training
            and captured.complete
            and captured.solution.buckets == solution.buckets
            and captured.problem.overlap == problem.overlap
            and captured.problem.accumulates == problem.accumulates
        ]
        if not beside or self.settings.plan_only:
            return solution
        shared = in_turns([(c.problem, c.solution) for c in beside] + [(problem, solution)])
        if shared is None:
            return solution
        for captured, changed in zip(beside, shared, strict=False):
            if changed is not captured.solution:
                captured.solution = changed
                captured.plan = captured.plan.with_solution(captured.problem, changed)
                captured.options = self._options(changed, captured.problem)
        return shared[-1]

    def _forget_evaluation(self) -> None:
        """Let evaluation be captured anew, under the placements that training has."""
        for step in (self._steps[False], *(step for step, _ in self._evaluations.values())):
            torch._dynamo.reset_code(step.__code__)

    def _compile(self, step: Step) -> Step:
        backend = self._backend.weakly()
        compiled: Step = torch.compile(step, backend=backend, fullgraph=True, dynamic=False)
        return compiled

    # Calls.

    def call(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """One forward of the compiled model."""
        self._check_open()
        now = [stub.requires_grad for stub in self.params.stubs]
        if torch.is_grad_enabled() and now != self._requires_grad:
            changed = [
                n for n, a, b in zip(self.names, now, self._requires_grad, strict=True) if a != b
            ]
            raise TrainingLoopError(
                f"requires_grad of {changed[0]!r} changed after lohan_fx.compile; freeze parameters "
                "before it"
            )
        trains = torch.is_grad_enabled() and self.trainable and not self.settings.plan_only
        if trains and self._optimizer_now() is None:
            raise TrainingLoopError(
                "no optimizer is attached, so gradients would go nowhere; create "
                "lohan_fx.AdamW(model.parameters(), ...) before the first forward, or run the "
                "forward under torch.no_grad()"
            )
        if trains:
            refuse_autograd_modes()
            self._forget_training_unless_planned()
        compiled = self._compiled[torch.is_grad_enabled()]
        try:
            return self._run(compiled, args, kwargs)
        except ComesAgain:
            torch._dynamo.reset_code(self._steps[True].__code__)
            return self._run(compiled, args, kwargs)

    def evaluate(self, module: torch.nn.Module, kwargs: Mapping[str, Any]) -> Any:
        """One forward, without gradients, of a module of the model as if it were the model."""
        self._check_open()
        if id(module) not in self._evaluations:
            step = own_code(module)
            self._evaluations[id(module)] = (step, self._compile(step))
        with torch.no_grad():
            return self._run(self._evaluations[id(module)][1], (), kwargs)

    def _run(self, compiled: Step, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        # The first call makes what stays; later ones make little besides.
        collector = nullcontext() if self.captured else paused_collector()
        self._call_began = time.perf_counter(), self._inner[0]
        try:
            with self.params.exposed(), compiler_settings(), collector:
                return compiled(*args, **kwargs)
        except Exception as error:
            self._undo_call()
            shown = explained(error)
            if isinstance(shown, LeftToEager):
                self._reset_code()  # Dynamo may have marked it to be skipped for good
            if not isinstance(shown, LohanError):
                shown = misplaced(error, args, kwargs, self.device)
            if shown is error:
                raise
            # What Dynamo wraps around it, and its frames, say nothing more.
            raise shown.with_traceback(None) from None
        except BaseException:  # an interrupt
            if self._placing is not None:
                self._undo_call()
            raise

    def _forget_training_unless_planned(self) -> None:
        """Plan anew where what there is was not planned for accumulation, or to wait for step()."""
        wanted = self._overlap(), self._accumulates
        if self._trained_by is not None and self._trained_by != wanted:
            self._trained_by = None
            torch._dynamo.reset_code(self._steps[True].__code__)

    def stats(self) -> RuntimeStats | None:
        """What the runtime has counted; None before there is one."""
        return None if self.runtime is None else self.runtime.stats()

    def write(self, pid: int, value: torch.Tensor) -> None:
        """Set a parameter's value (the master's, where there is one).

        A 16-bit value that the parameter has already leaves its more exact master as it is, so that
        the order in which a checkpoint's model and optimizer are loaded does not matter.
        """
        self._check_open()
        itself = value.dtype == self.params.stubs[pid].dtype and value.dtype.itemsize == 2
        if itself and torch.equal(self.read(pid), value.cpu()):
            return
        if self.runtime is not None and self._adopted:
            self.runtime.set_master(pid, value)
        else:
            self.params.values[pid] = value.detach().clone()

    def close(self) -> None:
        """Give back memory and files. The model's parameters are gone with it."""
        if not self._closed:
            self._closed = True
            self._reset_code()
            if self._placing is not None:
                self._placing[0].cancel()
                self._placing = None
            if self.runtime is not None:
                self.runtime.close()
            self.params.disown()
            self.params.values.clear()

    # Internals.

    def _undo_call(self) -> None:
        """After a failed call: drop what its pass holds, what was captured in part, and a runtime
        that holds no values yet."""
        if self.runtime is None:
            return
        self._undo_placing()
        self.runtime.abort()
        while self.captured and not self.captured[-1].complete:
            self.captured.pop()
        if not self._adopted:
            self.runtime.close()
            self.runtime = None
            self.captured.clear()
            self._known.clear()
            self.buckets = ()
            self.trainable |= self.unused
            self.unused = frozenset()
            self._reset_code()  # it holds the runtime's number

    def _reset_code(self) -> None:
        for step in (*self._steps.values(), *(step for step, _ in self._evaluations.values())):
            torch._dynamo.reset_code(step.__code__)

    def _check_open(self) -> None:
        if self._closed:
            raise LohanError("this model was closed; build and compile it again")
        if self._placing is not None:  # a second interrupt cut the undoing of the first short
            self._undo_call()

    @property
    def optimizer(self) -> Adam | None:
        """The optimizer made from these parameters, while it lives."""
        return self._optimizer_now()

    def _optimizer_now(self) -> Adam | None:
        return None if self._optimizer is None else self._optimizer()

    def _overlap(self) -> Overlap:
        chosen = self.settings.overlap
        optimizer = self._optimizer_now()
        if chosen != "auto":
            self._check_overlap(optimizer)
            return Overlap(chosen)
        waited = self._trained_by is not None and self._trained_by[0].waits_for_step
        waits = optimizer is not None and (optimizer.waits is not None or bool(loss_scalers))
        policy = self.settings.policy
        own = default_overlap(policy) if isinstance(policy, str) else None
        # Once it waits it goes on so: changing back and forth would compile every time.
        if own is not None and (own.waits_for_step or not (waits or waited)):
            return own
        return Overlap.NEXT_FORWARD if waits or waited else Overlap.BACKWARD

    def _check_overlap(self, optimizer: Adam | None) -> None:
        chosen = self.settings.overlap
        if optimizer is None or optimizer.waits is None or chosen == "auto":
            return
        if not Overlap(chosen).waits_for_step:
            raise LohanError(
                f"{optimizer.waits} needs all gradients before the first update, which "
                f'overlap={chosen!r} does not allow; use overlap="next-forward" or "auto"'
            )

    def _seconds(self, traced: Traced) -> Seconds:
        """What nodes take: heavy ops as measured on the device, where the profile asks for it."""
        settings = self.settings
        measures = settings.profile == "measured" or (
            settings.profile == "auto" and self.device.type == "cuda" and not settings.plan_only
        )
        measured: dict[torch.fx.Node, float] = {}
        if measures:
            # Once values are placed there is no room; what is known already is used still.
            room = 0 if self._adopted else settings.capacities.gpu_bytes
            with self.timed("measure ops"):
                measured = OpSeconds(self.device, room_bytes=room).of(traced.joint.graph.nodes)
        return Seconds(settings.hardware, fused=settings.lowering == "inductor", measured=measured)

    def _margin_bytes(self) -> int:
        if self.device.type != "cuda":
            return 0
        return CUDA_MARGIN_BYTES + self.settings.capacities.gpu_bytes // CUDA_MARGIN_SHARE

    def _set_unused(self, reached: frozenset[int]) -> None:
        """Leave out parameters without a gradient, as torch.optim does where `grad` is None.

        The first captured step settles which they are: they get no optimizer state.
        """
        late = [self.names[pid] for pid in sorted(self.unused & reached)]
        if late:
            raise CaptureError(
                f"{late[0]!r} has a gradient in this step, but had none in the first one and so has no "
                "optimizer state; make the first step use every parameter that is to be trained (later "
                f"ones may leave some out), or freeze it ({len(late)} such parameter(s) in this step)"
            )
        if self.buckets or not self.trainable & reached:
            return
        self.unused = self.trainable - reached
        self.trainable -= self.unused

    def _make_buckets(self, traced: Traced) -> tuple[Bucket, ...]:
        infos = [
            ParamInfo(
                pid=pid,
                name=name,
                shape=tuple(stub.shape),
                stride=tuple(stub.stride()),
                numel=stub.numel(),
                dtype=stub.dtype,
                trainable=pid in self.trainable,
            )
            for pid, (name, stub) in enumerate(
                zip(self.params.names, self.params.stubs, strict=True)
            )
        ]
        uses = first_uses(traced.joint.graph, traced.joint.param_of)
        names = [stage.name for stage in traced.stages]
        numel = self.settings.bucket_numel or bucket_numel_for(sum(info.numel for info in infos))
        return make_buckets(infos, uses, names, numel)

    def _solve(self, problem: Problem, traced: Traced) -> Solution:
        settings = self.settings
        replayed = None
        if settings.plan is not None and not self._adopted:
            solution = replayed = settings.plan.solution_for(problem)
        else:
            solution = self._plan_anew(problem, traced)
        faults = validate(problem, solution)
        if faults and solution is replayed:
            raise PlanMismatch(
                f"this plan cannot run within {settings.budget}: {faults[0]}; plan again for this budget"
            )
        if faults:
            raise LohanError(f"the plan breaks its own rules: {faults[0]} ({len(faults)} in all)")
        return solution

    def _plan_anew(self, problem: Problem, traced: Traced) -> Solution:
        run = partial(self._run_policy, problem)
        pinned = self._pinned(problem, traced)
        placed = self._placed
        if placed is not None and (placed.training or not traced.training):
            # Another input shape: leave the parameters where they are if that can work. The
            # first training step does not: evaluation alone places them without activations.
            stay = {
                i: BucketPlace(Place(str(p.weight)), Place(str(p.state)))
                for i, p in enumerate(placed.placements)
            }
            with suppress(LohanError):
                return run(Forced(stay, pinned[0].activations))
        return best_of(run, pinned)

    def _pinned(self, problem: Problem, traced: Traced) -> tuple[Forced, ...]:
        pins = self.settings.pin
        if not pins:
            return (Forced(),)
        # Evaluation has no activations, so that not finding one there is no mistake.
        rows = tensor_rows(self.buckets, traced)
        return forced_placements(pins, rows, problem, strict=traced.training)

    def _run_policy(self, problem: Problem, forced: Forced) -> Solution:
        policy = self.settings.policy
        try:
            if callable(policy):
                return policy(problem, forced)
            return solved(problem, policy, forced)
        except InfeasiblePlan as error:
            if problem.accumulates:
                error.args = (
                    f"{error}; no_sync() adds "
                    f"{format_bytes(sum(accumulator_bytes(b) for b in problem.buckets))} of fp32 "
                    "gradient accumulators, in DRAM where the CPU updates and else on the GPU",
                )
            raise

    def _options(self, solution: Solution, problem: Problem) -> RuntimeOptions:
        windows = solution.windows
        return RuntimeOptions(
            overlap=str(problem.overlap),
            grad_window_bytes=windows.grad_window_bytes,
            grad_buffers=windows.grad_buffers,
            state_buffers=windows.state_buffers,
            inbound_bytes=windows.inbound_bytes,
            outbound_bytes=windows.outbound_bytes,
            accumulates=problem.accumulates,
            poison=self.settings.poison,
        )

    def _plan(
        self, problem: Problem, solution: Solution, traced: Traced, seconds_from: str
    ) -> Plan:
        settings = self.settings
        policy = settings.policy if isinstance(settings.policy, str) else solution.policy
        return build_plan(
            problem,
            solution,
            model=settings.model_name,
            hardware=settings.hardware.name,
            budget=str(settings.budget),
            policy=policy,
            tensors=tensor_rows(self.buckets, traced),
            tokens_per_step=num_tokens(traced),
            traced_on=str(self.device.type),
            seconds_from=seconds_from,
        )


def _nbytes(value: Value) -> int:
    return math.prod(value.shape) * value.dtype.itemsize


def _placement(place: BucketPlace) -> BucketPlacement:
    return BucketPlacement(Tier(str(place.weight)), Tier(str(place.state)))


def _move_buffers(model: torch.nn.Module, device: torch.device) -> None:
    """Put buffers on the device; they keep their dtype."""
    for module in model.modules():
        for name, buffer in module._buffers.items():
            if buffer is not None and buffer.device != device:
                if buffer.is_meta:
                    module._buffers[name] = torch.empty_like(buffer, device=device)
                else:
                    module._buffers[name] = buffer.to(device)
