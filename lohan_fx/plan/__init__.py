"""The plan as a file: frozen, versioned JSON that can be printed, diffed, mailed and replayed.

The JSON is a contract; `schema.json` beside this file is its schema. Loading a plan parses data and
nothing else.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import Any

from lohan_fx.errors import LohanError, PlanMismatch
from lohan_fx.planner import (
    Bucket,
    BucketPlace,
    Optimality,
    Place,
    Prediction,
    Problem,
    Solution,
    simulate,
)
from lohan_fx.units import format_bytes

from .graph import GraphSummary
from .timeline import Timeline

PLAN_SCHEMA = 2
TENSOR_CLASSES = ("weight16", "master32", "moments32", "gradient", "activation", "workspace")
_MOST_DIFFERENCES = 5


@dataclass(frozen=True, slots=True)
class TensorRow:
    """One tensor as the compiler knows it, before it is placed.

    `bucket` or `activation` is the planner's item it belongs to; neither means workspace. `layer`
    is the stage's name or number.
    """

    name: str
    cls: str
    layer: int | str | None
    shape: tuple[int, ...]
    dtype: str
    bytes: int
    bucket: int | None = None
    activation: int | None = None


@dataclass(frozen=True, slots=True)
class PlanTensor:
    """One tensor and its place. In JSON, `cls` is called "class".

    `bucket` or `activation` is the index of the item that it moves with, as in the plan's graph,
    solution and timeline; `recompute_s` is what making an activation again would cost.
    """

    name: str
    cls: str
    layer: int | str | None
    shape: tuple[int, ...]
    dtype: str
    bytes: int
    placement: str
    reason: str
    bucket: int | None = None
    activation: int | None = None
    recompute_s: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """The JSON as a plain dict, without what is None."""
        raw: dict[str, Any] = {
            "name": self.name,
            "class": self.cls,
            "layer": self.layer,
            "shape": list(self.shape),
            "dtype": self.dtype,
            "bytes": self.bytes,
            "placement": self.placement,
            "reason": self.reason,
        }
        for key in ("bucket", "activation", "recompute_s"):
            if getattr(self, key) is not None:
                raw[key] = getattr(self, key)
        return raw


@dataclass(frozen=True, slots=True)
class PlanMove:
    """One movement, in program order. In JSON, `in_pass` is called "pass"."""

    in_pass: str
    op: str
    arg: int | str


@dataclass(frozen=True, slots=True)
class PlanBudget:
    """Bytes that the plan was allowed, per tier, and the budget in the user's words."""

    gpu: int
    dram: int
    ssd: int
    text: str


@dataclass(frozen=True, slots=True)
class Throughput:
    """Rates of a whole step; None where the tokens of a step are not known.

    `model_tflops` is 6 FLOPs a parameter and token, whatever is recomputed, over the step.
    """

    tokens_per_s: float | None = None
    model_tflops: float | None = None


@dataclass(frozen=True, slots=True)
class Plan:
    """Where every tensor of one training step lives, what that costs, and what moves when.

    `predicted`, `throughput` and `solution` are None where nothing fits (`fits` False); `reasons`
    say why then, and what limits the step otherwise. `fingerprint` and `graph` name the graph that
    the plan was made for. `seconds_from` says whether the seconds of stages come from
    a "roofline" or were "measured"; `timeline` is the simulated step. `measured` mirrors `predicted`
    after a run, as plain JSON. `speculating` are the buckets that may speculate, in the overlap mode that
    does; None is all.
    """

    schema: int
    model: str
    hardware: str
    budget: PlanBudget
    policy: str
    fits: bool
    reasons: tuple[str, ...]
    predicted: Prediction | None
    throughput: Throughput
    num_params: int
    tensors: tuple[PlanTensor, ...]
    schedule: tuple[PlanMove, ...]
    solution: Solution | None
    fingerprint: str
    graph: GraphSummary
    overlap: str = "backward"
    speculating: frozenset[int] | None = None
    traced_on: str = "cpu"
    seconds_from: str = "roofline"
    timeline: Timeline | None = None
    measured: Mapping[str, Any] | None = None

    @property
    def optimality(self) -> Optimality | None:
        """What the solver proved of this plan; None where its policy proves nothing."""
        return None if self.solution is None else self.solution.optimality

    def to_dict(self) -> dict[str, Any]:
        """The JSON as plain dicts and lists."""
        predicted = None
        if self.predicted is not None:
            predicted = dataclasses.asdict(self.predicted) | dataclasses.asdict(self.throughput)
        raw: dict[str, Any] = {
            "schema": self.schema,
            "model": self.model,
            "hardware": self.hardware,
            "budget": dataclasses.asdict(self.budget),
            "policy": self.policy,
            "overlap": self.overlap,
            "traced_on": self.traced_on,
            "num_params": self.num_params,
            "fits": self.fits,
            "reasons": list(self.reasons),
            "seconds_from": self.seconds_from,
            "predicted": predicted,
            "optimality": None if self.optimality is None else dataclasses.asdict(self.optimality),
            "timeline": None if self.timeline is None else self.timeline.to_dict(),
            "tensors": [t.to_dict() for t in self.tensors],
            "schedule": [{"pass": m.in_pass, "op": m.op, "arg": m.arg} for m in self.schedule],
            "solution": None if self.solution is None else self.solution.to_dict(),
            "fingerprint": self.fingerprint,
            "graph": self.graph.to_dict(),
        }
        if self.speculating is not None:
            raw["speculating"] = sorted(self.speculating)
        if self.measured is not None:
            raw["measured"] = dict(self.measured)
        return raw

    def to_json(self, indent: int | None = None) -> str:
        """The plan as JSON text, keys sorted: the same plan is the same text."""
        return json.dumps(self.to_dict(), sort_keys=True, indent=indent, allow_nan=False)

    @classmethod
    def from_json(cls, text: str) -> Plan:
        """The plan that `to_json` wrote.

        Raises LohanError for another schema number, or for JSON that the schema does not allow.
        """
        try:
            raw = json.loads(text)
        except json.JSONDecodeError as exc:
            raise LohanError(f"this plan is not JSON: {exc}") from exc
        validate_json(raw)
        predicted = throughput = None
        if raw["predicted"] is not None:
            rates = {f.name for f in dataclasses.fields(Throughput)}
            throughput = Throughput(**{key: raw["predicted"][key] for key in rates})
            predicted = Prediction(
                **{key: value for key, value in raw["predicted"].items() if key not in rates}
            )
        try:
            timeline = None if raw["timeline"] is None else Timeline.from_dict(raw["timeline"])
        except IndexError as exc:
            raise LohanError(
                "this is not a plan: at timeline: a row points past the end of its table"
            ) from exc
        return cls(
            schema=raw["schema"],
            model=raw["model"],
            hardware=raw["hardware"],
            budget=PlanBudget(**raw["budget"]),
            policy=raw["policy"],
            overlap=raw["overlap"],
            speculating=frozenset(raw["speculating"]) if "speculating" in raw else None,
            traced_on=raw["traced_on"],
            seconds_from=raw["seconds_from"],
            timeline=timeline,
            num_params=raw["num_params"],
            fits=raw["fits"],
            reasons=tuple(raw["reasons"]),
            predicted=predicted,
            throughput=throughput or Throughput(),
            tensors=tuple(_tensor(row) for row in raw["tensors"]),
            schedule=tuple(PlanMove(m["pass"], m["op"], m["arg"]) for m in raw["schedule"]),
            solution=None if raw["solution"] is None else Solution.from_dict(raw["solution"]),
            fingerprint=raw["fingerprint"],
            graph=GraphSummary.from_dict(raw["graph"]),
            measured=raw.get("measured"),
        )

    def check_matches(self, problem: Problem) -> None:
        """Raise PlanMismatch, with the differences, unless the plan was made for this graph."""
        if self.fingerprint == problem.fingerprint():
            return
        found = self.graph.differences(GraphSummary.of(problem))
        found = found or ["sizes are the same, but tensors are made or read in other stages"]
        more = len(found) - _MOST_DIFFERENCES
        text = "; ".join(found[:_MOST_DIFFERENCES]) + (f"; and {more} more" if more > 0 else "")
        raise PlanMismatch(
            f"this plan was made for another graph ({self.model}): {text}. Plan again for this model"
            " and these input shapes."
        )

    def solution_for(self, problem: Problem) -> Solution:
        """The stored solution, to be replayed on `problem`.

        Raises PlanMismatch for another graph, LohanError for a plan that does not fit its budget.
        """
        self.check_matches(problem)
        if self.solution is None:
            raise LohanError(f"this plan fits nothing and cannot be run: {' '.join(self.reasons)}")
        return self.solution

    def with_tokens(self, tokens_per_step: int) -> Plan:
        """The same plan with `tokens_per_s` and `model_tflops` filled in."""
        if self.predicted is None:
            return self
        return dataclasses.replace(
            self, throughput=_throughput(self.predicted, tokens_per_step, self.num_params)
        )

    def named(self, model: str) -> Plan:
        """The same plan under the name that the user gave the model."""
        return dataclasses.replace(self, model=model)

    def with_schedule(self, schedule: Iterable[PlanMove | Mapping[str, Any]]) -> Plan:
        """The same plan with what moves when, known once the graph has been rewritten."""
        return dataclasses.replace(self, schedule=_moves(schedule))

    def with_solution(self, problem: Problem, solution: Solution) -> Plan:
        """The same plan under other windows: `solution` has every tensor where it was."""
        rate, before = self.throughput.tokens_per_s, self.predicted
        changed = dataclasses.replace(
            self,
            solution=solution,
            predicted=solution.predicted,
            reasons=_summary(problem, solution),
            timeline=Timeline.of(
                simulate(problem, solution.buckets, solution.activations, solution.windows)
            ),
        )
        if rate is None or before is None:
            return changed
        return changed.with_tokens(round(rate * before.step_s))

    def with_measured(self, measured: Mapping[str, Any]) -> Plan:
        """The same plan with what a run measured, in the keys of `predicted`."""
        return dataclasses.replace(self, measured=measured)


def build_plan(
    problem: Problem,
    solution: Solution,
    *,
    model: str,
    hardware: str,
    budget: str,
    policy: str,
    tensors: Sequence[TensorRow],
    schedule: Iterable[PlanMove | Mapping[str, Any]] = (),
    tokens_per_step: int | None = None,
    num_params: int | None = None,
    traced_on: str = "cpu",
    seconds_from: str = "roofline",
) -> Plan:
    """The plan of one solved problem, with the timeline of its step.

    `num_params` defaults to the elements of the distinct weights among `tensors`. A mapping in
    `schedule` has the keys "pass", "op" and "arg".
    """
    params = count_params(tensors) if num_params is None else num_params
    throughput = Throughput()
    if tokens_per_step is not None:
        throughput = _throughput(solution.predicted, tokens_per_step, params)
    return Plan(
        schema=PLAN_SCHEMA,
        model=model,
        hardware=hardware,
        budget=_budget(problem, budget),
        policy=policy,
        overlap=str(problem.overlap),
        speculating=problem.speculating,
        traced_on=traced_on,
        fits=True,
        reasons=_summary(problem, solution),
        predicted=solution.predicted,
        throughput=throughput,
        num_params=params,
        tensors=tuple(_placed(row, problem, solution) for row in tensors),
        schedule=_moves(schedule),
        seconds_from=seconds_from,
        timeline=Timeline.of(
            simulate(problem, solution.buckets, solution.activations, solution.windows)
        ),
        solution=solution,
        fingerprint=problem.fingerprint(),
        graph=GraphSummary.of(problem),
    )


def build_unfit_plan(
    problem: Problem,
    reason: str,
    *,
    model: str,
    hardware: str,
    budget: str,
    policy: str,
    tensors: Sequence[TensorRow] = (),
    traced_on: str = "cpu",
) -> Plan:
    """A plan that says that nothing fits, and why."""
    return Plan(
        schema=PLAN_SCHEMA,
        model=model,
        hardware=hardware,
        budget=_budget(problem, budget),
        policy=policy,
        overlap=str(problem.overlap),
        speculating=problem.speculating,
        traced_on=traced_on,
        fits=False,
        reasons=(reason,),
        predicted=None,
        throughput=Throughput(),
        num_params=count_params(tensors),
        tensors=(),
        schedule=(),
        solution=None,
        fingerprint=problem.fingerprint(),
        graph=GraphSummary.of(problem),
    )


def json_schema() -> dict[str, Any]:
    """The published JSON schema of a plan."""
    schema: dict[str, Any] = json.loads(
        resources.files(__name__).joinpath("schema.json").read_text()
    )
    return schema


def validate_json(raw: Any) -> None:
    """Raise LohanError, naming the place, unless `raw` (parsed JSON) is a plan of this schema."""
    if not isinstance(raw, dict) or "schema" not in raw:
        raise LohanError(
            "this is not a plan: it has no schema number; `python -m lohan_fx.plan --dump` writes plans"
        )
    schema = raw["schema"]
    if schema != PLAN_SCHEMA:
        raise LohanError(
            f"this plan has schema {schema!r}, this version reads {PLAN_SCHEMA}; write it again "
            "with `python -m lohan_fx.plan`"
        )
    _check(_validator(), raw, "a plan")


def validate_timeline(raw: Any) -> None:
    """Raise LohanError, naming the place, unless `raw` (parsed JSON) is a timeline as plans have."""
    _check(_timeline_validator(), raw, "a timeline")


def _check(validator: Any, raw: Any, what: str) -> None:
    error = next(iter(validator.iter_errors(raw)), None)
    if error is not None:
        where = "/".join(str(part) for part in error.absolute_path) or "the top"
        message = error.message if len(error.message) < 300 else error.message[:300] + "..."
        raise LohanError(f"this is not {what}: at {where}: {message}")


@cache
def _validator() -> Any:
    import jsonschema

    return jsonschema.Draft202012Validator(json_schema())


@cache
def _timeline_validator() -> Any:
    """Of a timeline that is there: a plan's may be null."""
    import jsonschema

    defs = json_schema()["$defs"]
    step = next(row for row in defs["timeline"]["oneOf"] if row["type"] == "object")
    return jsonschema.Draft202012Validator({**step, "$defs": defs})


def _tensor(row: Mapping[str, Any]) -> PlanTensor:
    return PlanTensor(
        name=row["name"],
        cls=row["class"],
        layer=row["layer"],
        shape=tuple(row["shape"]),
        dtype=row["dtype"],
        bytes=row["bytes"],
        placement=row["placement"],
        reason=row["reason"],
        bucket=row.get("bucket"),
        activation=row.get("activation"),
        recompute_s=row.get("recompute_s"),
    )


def _moves(schedule: Iterable[PlanMove | Mapping[str, Any]]) -> tuple[PlanMove, ...]:
    return tuple(
        move if isinstance(move, PlanMove) else PlanMove(move["pass"], move["op"], move["arg"])
        for move in schedule
    )


def _budget(problem: Problem, text: str) -> PlanBudget:
    have = problem.capacities
    return PlanBudget(have.gpu_bytes, have.dram_bytes, have.ssd_bytes, text)


def _throughput(predicted: Prediction, tokens_per_step: int, num_params: int) -> Throughput:
    if predicted.step_s <= 0:
        return Throughput()
    rate = tokens_per_step / predicted.step_s
    return Throughput(tokens_per_s=rate, model_tflops=6 * num_params * rate / 1e12)


def count_params(tensors: Sequence[TensorRow]) -> int:
    """Elements of the distinct parameters; each has several rows, one per class."""
    sizes = {t.name: math.prod(t.shape) for t in tensors if t.cls in ("weight16", "master32")}
    return sum(sizes.values())


def _placed(row: TensorRow, problem: Problem, solution: Solution) -> PlanTensor:
    if row.cls not in TENSOR_CLASSES:
        raise LohanError(
            f"tensor {row.name!r} has class {row.cls!r}; classes are {', '.join(TENSOR_CLASSES)}"
        )
    placement, reason = str(Place.GPU), "live within its stage only"
    recompute_s = None
    if row.bucket is not None:
        bucket, place = problem.buckets[row.bucket], solution.buckets[row.bucket]
        placement = str(_bucket_tier(row.cls, bucket, place))
        reason = _reason(solution.bucket_reasons, row.bucket)
    elif row.activation is not None:
        placement = str(solution.activations[row.activation])
        reason = _reason(solution.activation_reasons, row.activation)
        activation = problem.activations[row.activation]
        recompute_s = activation.recompute_s if activation.can_recompute else None
    return PlanTensor(
        name=row.name,
        cls=row.cls,
        layer=row.layer,
        shape=row.shape,
        dtype=row.dtype,
        bytes=row.bytes,
        placement=placement,
        reason=reason,
        bucket=row.bucket,
        activation=row.activation,
        recompute_s=recompute_s,
    )


def _bucket_tier(cls: str, bucket: Bucket, place: BucketPlace) -> Place:
    """Where one array of a bucket is between its uses."""
    if cls == "weight16" or (cls == "master32" and not bucket.has_master):
        return place.weight
    if cls == "gradient":
        # Consumed where Adam runs: on the GPU, or else from a host buffer.
        return Place.GPU if place.by_gpu else Place.DRAM
    return place.state


def _reason(reasons: tuple[str, ...], index: int) -> str:
    return reasons[index] if reasons else ""


def _summary(problem: Problem, solution: Solution) -> tuple[str, ...]:
    """What limits the step, how near it is to what its lanes allow, and what passes through the GPU."""
    predicted = solution.predicted
    words = [f"the step is limited by {predicted.bottleneck}"]
    if predicted.step_s > 0:
        share = predicted.bound_s / predicted.step_s
        words.append(f"the busiest lane is in use for {share:.0%} of the step")
    placed = zip(problem.buckets, solution.buckets, strict=True)
    copied = sum(bucket.state_bytes for bucket, place in placed if place.streamed)
    if copied:
        words.append(
            f"{format_bytes(copied)} of states in DRAM are copied to the GPU and back for their updates"
        )
    return tuple(words)


__all__ = [
    "PLAN_SCHEMA",
    "TENSOR_CLASSES",
    "GraphSummary",
    "Plan",
    "PlanBudget",
    "PlanMove",
    "PlanTensor",
    "TensorRow",
    "Throughput",
    "Timeline",
    "build_plan",
    "build_unfit_plan",
    "count_params",
    "json_schema",
    "validate_json",
    "validate_timeline",
]
