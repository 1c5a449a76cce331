"""From a captured step to its plan: what the planner is told of it, and what it decides.

    Traced -> buckets, seconds -> TracedStep -> Solution -> Plan

All of it follows from the caller's settings and what is passed in; a session says what holds at the
time: the overlap mode, and placements that are to stay.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import replace
from functools import partial

from torch import fx

from .compiler.buckets import bucket_numel_for, first_uses, make_buckets, param_infos
from .compiler.capture import Traced
from .compiler.formulate import formulate_training
from .compiler.op_seconds import OpSeconds
from .compiler.seconds import Seconds
from .compiler.tensors import num_tokens, tensor_rows
from .errors import InfeasiblePlan, LohanError, PlanMismatch
from .params import ManagedParams
from .phases import Phases
from .pins import best_of, forced_placements
from .plan import Plan, build_plan
from .planner import (
    BucketPlace,
    Forced,
    Overlap,
    Problem,
    Solution,
    accumulator_bytes,
    validate,
    with_speculation,
)
from .program import Bucket
from .runtime.adam_gpu import workspace_bytes
from .settings import Settings
from .solutions import solved
from .step import TracedStep
from .units import format_bytes

# torch's allocator also serves cuBLAS workspaces and rounds blocks up; a plan leaves them this much.
CUDA_MARGIN_BYTES = 160 * 2**20
CUDA_MARGIN_SHARE = 50
# And it reserves more than it hands out: 280 MB at most in steps of 0.3 to 1.5 s, with expandable segments.
CUDA_RESERVE_BYTES = 160 * 2**20


def buckets_of(
    traced: Traced, params: ManagedParams, trainable: frozenset[int], numel: int | None
) -> tuple[Bucket, ...]:
    """The parameters as they move together, in the order of their first uses.

    At most `numel` elements each; None leaves that to the model's size.
    """
    infos = param_infos(params.names, params.stubs, trainable)
    uses = first_uses(traced.joint.graph, traced.joint.param_of)
    names = [stage.name for stage in traced.stages]
    numel = numel or bucket_numel_for(sum(info.numel for info in infos))
    return make_buckets(infos, uses, names, numel)


def seconds_of(traced: Traced, settings: Settings, phases: Phases, *, room_bytes: int) -> Seconds:
    """What nodes take: heavy ops as measured on the device, where the profile asks for it.

    Args:
        room_bytes: of GPU memory that measuring may take; with 0, what is known already is used still.
    """
    measured: dict[fx.Node, float] = {}
    if _measures(settings):
        with phases.timed("measure ops"):
            known = OpSeconds(settings.device, room_bytes=room_bytes)
            measured = known.of(traced.joint.graph.nodes)
    return Seconds(settings.hardware, fused=settings.lowering == "inductor", measured=measured)


def lacks_seconds(traced: Traced, settings: Settings) -> bool:
    """Are there ops that would have to be run for `seconds_of`?"""
    known = OpSeconds(settings.device, room_bytes=0) if _measures(settings) else None
    return known is not None and known.lacks(traced.joint.graph.nodes)


def _measures(settings: Settings) -> bool:
    on_device = settings.device.type == "cuda" and not settings.plan_only
    return settings.profile == "measured" or (settings.profile == "auto" and on_device)


def formulated(
    traced: Traced,
    buckets: tuple[Bucket, ...],
    seconds: Seconds,
    settings: Settings,
    *,
    overlap: Overlap,
    accumulates: bool,
    speculating: frozenset[int] | None,
) -> TracedStep:
    """The captured step as the planner sees it: no graph and no tensor is in it."""
    largest = max((bucket.numel for bucket in buckets if bucket.trainable), default=0)
    problem = formulate_training(
        traced.joint,
        traced.stages,
        traced.candidates,
        buckets,
        seconds=seconds,
        capacities=settings.capacities,
        overlap=overlap,
        margin_bytes=_margin_bytes(settings),
        gpu_adam_workspace_bytes=workspace_bytes(largest, settings.device),
        accumulates=accumulates,
        speculating=speculating,
        max_ssd_bytes_per_day=settings.max_writes_per_day,
    )
    return TracedStep(
        model=settings.model_name,
        hardware=settings.hardware,
        problem=problem,
        tensors=tuple(tensor_rows(buckets, traced)),
        tokens_per_step=num_tokens(traced),
    )


def _margin_bytes(settings: Settings) -> int:
    if settings.device.type != "cuda":
        return 0
    share = settings.capacities.gpu_bytes // CUDA_MARGIN_SHARE
    return CUDA_MARGIN_BYTES + share + min(share, CUDA_RESERVE_BYTES)


def replayed(step: TracedStep, plan: Plan, settings: Settings) -> tuple[TracedStep, Solution]:
    """The solution of a plan that was made before, and the step with the buckets that speculate by it.

    Raises:
        PlanMismatch: the plan is of another step, or needs a larger budget.
    """
    solution = plan.solution_for(step.problem)
    step = step.of(replace(step.problem, speculating=plan.speculating))
    faults = validate(step.problem, solution)
    if faults:
        raise PlanMismatch(
            f"this plan cannot run within {settings.budget}: {faults[0]}; plan again for this budget"
        )
    return step, solution


def solution_of(
    step: TracedStep,
    settings: Settings,
    *,
    training: bool,
    stay: Mapping[int, BucketPlace] | None,
    may_speculate: bool = False,
) -> tuple[TracedStep, Solution]:
    """What the policy decides, with the caller's pins, and the step that it decided for: where it
    speculates, that is another overlap mode.

    Args:
        training: False for a forward alone.
        stay: places of buckets that are kept if they can work; None where nothing is to stay.
        may_speculate: which buckets speculate is open; with overlap="auto" a step that waits for step()
            speculates only if that is faster. One that does is planned without where it would not fit.

    Raises:
        InfeasiblePlan: nothing fits.
        LohanError: pins cannot be honoured, or a policy of the caller's own breaks a rule.
    """

    def solve(problem: Problem) -> Solution:
        return _decided(step.of(problem), settings, training, stay)

    problem = step.problem
    if may_speculate:
        problem, solution = with_speculation(problem, solve)
    else:
        try:
            solution = solve(problem)
        except InfeasiblePlan:
            if problem.overlap is not Overlap.SPECULATIVE or settings.overlap != "auto":
                raise
            problem = replace(problem, overlap=Overlap.NEXT_FORWARD)
            solution = solve(problem)
    step = step.of(problem)
    return step, step.checked(solution)


def _decided(
    step: TracedStep, settings: Settings, training: bool, stay: Mapping[int, BucketPlace] | None
) -> Solution:
    run = partial(_run_policy, step.problem, settings)
    pinned: tuple[Forced, ...] = (Forced(),)
    if settings.pin:
        # Evaluation has no activations, so that not finding one there is no mistake.
        pinned = forced_placements(settings.pin, step.tensors, step.problem, strict=training)
    if stay is not None:
        with suppress(LohanError):
            return run(Forced(stay, pinned[0].activations))
    return best_of(run, pinned)


def _run_policy(problem: Problem, settings: Settings, forced: Forced) -> Solution:
    policy = settings.policy
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


def plan_of(step: TracedStep, solution: Solution, settings: Settings, seconds_from: str) -> Plan:
    """The plan, still without a schedule; `seconds_from` says whose seconds it counts with."""
    policy = settings.policy
    if callable(policy):  # what it calls in turn would name the solution
        policy = getattr(policy, "__name__", type(policy).__name__)
    return build_plan(
        step.problem,
        solution,
        model=step.model,
        hardware=step.hardware.name,
        budget=str(settings.budget),
        policy=policy,
        tensors=step.tensors,
        tokens_per_step=step.tokens_per_step,
        traced_on=str(settings.device.type),
        seconds_from=seconds_from,
    )
