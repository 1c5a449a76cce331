"""The programs captured of one model, and which one's placements and windows are in force.

[Note: a program has its placements] Windows are sized, and weights waited for, by one plan. Where the
next program to run has another plan, values and windows move first. A capture happens under Dynamo's
fake tensors and may fail, so nothing moves before it is complete; but the first placing of all, in a
thread of its own, begins with the plan or before (known_placings.py), and is undone where what follows
fails (placing.py).

[Note: shapes in turns] Batches of two shapes may alternate for a whole run, so that their programs
should have the same placements and staging. A new shape is planned under the placements that there
are, and all under them get the same staging (planner.sharing). Where a new shape had to move values,
the others are planned anew, once each, when they come again.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from .compiler.capture import Decision, Traced
from .compiler.skeleton import Skeleton
from .compiler.weave import Layout, Windows, Woven
from .plan import Plan, PlanMove
from .planner import BucketPlace, Place, Problem, Solution, in_turns
from .program import Bucket, BucketPlacement, Names, Tier
from .runtime import Runtime, RuntimeOptions


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

    @classmethod
    def of(
        cls, traced: Traced, problem: Problem, solution: Solution, plan: Plan, *, poison: bool
    ) -> Captured:
        """What is known once there is a plan; `poison` as in RuntimeOptions."""
        return cls(
            training=traced.training,
            plan=plan,
            problem=problem,
            solution=solution,
            placements=tuple(
                BucketPlacement(Tier(str(place.weight)), Tier(str(place.state)), place.streamed)
                for place in solution.buckets
            ),
            options=_options(solution, problem, poison),
            activation_of={node.name: c.index for c in traced.candidates for node in c.nodes},
        )

    @property
    def complete(self) -> bool:
        """False for a capture under way, or one that failed."""
        return {"forward", "backward"} <= self.skeletons.keys() or (
            not self.training and "forward" in self.skeletons
        )

    def decision(self, number: int, index: int, buckets: tuple[Bucket, ...]) -> Decision:
        """The solution as the compiler needs it; `number` is the runtime's, `index` the program's."""
        solution, windows = self.solution, self.solution.windows
        closed_forward, closed_backward = windows.closed_stages(self.problem.num_stages)
        return Decision(
            number=number,
            index=index,
            layout=Layout(
                buckets=buckets,
                resident=frozenset(
                    i for i, p in enumerate(self.placements) if p.weight is Tier.GPU
                ),
                refreshed=frozenset(
                    i
                    for i, p in enumerate(self.placements)
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
                closed_forward=closed_forward,
                closed_backward=closed_backward,
            ),
        )

    def accept(self, woven: Woven) -> None:
        """Keep the rewritten graphs; the plan gets their moves."""
        self.woven = woven
        passes = (("forward", woven.program.forward), ("backward", woven.program.backward))
        self.plan = self.plan.with_schedule(
            PlanMove(name, move.op, move.arg) for name, moves in passes for move in moves
        )

    def restage(self, solution: Solution) -> None:
        """Take a solution that differs in its staging only."""
        self.solution = solution
        self.plan = self.plan.with_solution(self.problem, solution)
        self.options = _options(solution, self.problem, self.options.poison)

    def names(self, params: Sequence[str]) -> Names:
        """What the items of the plan are called; `params` are the parameters' names."""
        assert self.woven is not None
        problem, slots = self.problem, self.woven.program.slots
        return Names(
            stages=tuple(stage.name for stage in problem.stages),
            buckets=tuple(bucket.name for bucket in problem.buckets),
            activations=tuple(activation.name for activation in problem.activations),
            slots=tuple(self.activation_of[slot.name] for slot in slots),
            slot_names=tuple(slot.name for slot in slots),
            params=tuple(params),
        )


def _options(solution: Solution, problem: Problem, poison: bool) -> RuntimeOptions:
    windows = solution.windows
    return RuntimeOptions(
        overlap=str(problem.overlap),
        grad_window_bytes=windows.grad_window_bytes,
        grad_buffers=windows.grad_buffers,
        state_buffers=windows.state_buffers,
        inbound_bytes=windows.inbound_bytes,
        outbound_bytes=windows.outbound_bytes,
        stream_bytes=windows.stream_bytes,
        speculating=problem.speculating,
        accumulates=problem.accumulates,
        poison=poison,
    )


class Programs:
    """All programs of a model in order of capture. See the notes above."""

    def __init__(self) -> None:
        self.captured: list[Captured] = []
        self._in_force: Captured | None = None  # whose placements the values have
        self._staging: RuntimeOptions | None = None  # whose windows are open
        self._introduced: set[int] = set()  # those that the runtime has
        self._came_again: set[str] = set()  # fingerprints of problems that were planned anew

    def add(self, captured: Captured) -> int:
        """Give a capture under way its index."""
        self.captured.append(captured)
        return len(self.captured) - 1

    def drop_incomplete(self) -> None:
        """Forget the captures that failed."""
        while self.captured and not self.captured[-1].complete:
            self.captured.pop()

    def places_to_keep(self, *, training: bool) -> dict[int, BucketPlace] | None:
        """Where buckets are, for the plan of another input shape; None where they may go anywhere.

        That is before the first placing, and for the first training step: evaluation alone places
        parameters without activations.
        """
        present = self._in_force
        if present is None or (training and not present.training):
            return None
        return {
            i: BucketPlace(Place(str(p.weight)), Place(str(p.state)), p.streamed)
            for i, p in enumerate(present.placements)
        }

    def share_staging(self, problem: Problem, solution: Solution) -> Solution:
        """`solution` with the staging of all training programs under its placements, if one suits all."""
        beside = [
            captured
            for captured in self.captured
            if captured.training
            and captured.complete
            and captured.solution.buckets == solution.buckets
            and captured.problem.overlap == problem.overlap
            and captured.problem.speculating == problem.speculating
            and captured.problem.accumulates == problem.accumulates
        ]
        if not beside:
            return solution
        shared = in_turns([(c.problem, c.solution) for c in beside] + [(problem, solution)])
        if shared is None:
            return solution
        for captured, changed in zip(beside, shared, strict=False):
            if changed is not captured.solution:
                captured.restage(changed)
        return shared[-1]

    def introduce(self, index: int, runtime: Runtime, params: Sequence[str]) -> bool:
        """Make a program known to the runtime; False if it was. `params` are the parameters' names."""
        if index in self._introduced:
            return False
        captured = self.captured[index]
        assert captured.woven is not None
        runtime.passes.add_program(captured.woven.program, captured.names(params))
        self._introduced.add(index)
        return True

    def comes_again(self, index: int) -> bool:
        """True, once for each problem, for a program that has run under placements that are no longer."""
        captured = self.captured[index]
        if (
            not captured.training
            or index not in self._introduced
            or self._has_placements_of(captured)
        ):
            return False
        fingerprint = captured.problem.fingerprint()
        if fingerprint in self._came_again:
            return False
        self._came_again.add(fingerprint)
        return True

    def is_in_force(self, captured: Captured) -> bool:
        """Whether it can run as things are.

        Evaluation has no gradients and no activations, and its weights fit any staging for them.
        """
        staged = not captured.training or captured.options == self._staging
        return self._has_placements_of(captured) and staged

    def put_in_force(self, captured: Captured, runtime: Runtime) -> bool:
        """Have values and windows moved for `captured`; False if the values were in place.

        A runtime that has adopted no values yet is only told of the windows.
        """
        moves = not self._has_placements_of(captured)
        self._in_force = self._staging = None
        runtime.place(captured.placements, captured.options)
        self._in_force, self._staging = captured, captured.options
        return moves

    def found_in_force(self, captured: Captured) -> None:
        """The values are on their way as `captured` has them."""
        self._in_force, self._staging = captured, captured.options

    def _has_placements_of(self, captured: Captured) -> bool:
        present = self._in_force
        return present is not None and present.placements == captured.placements
