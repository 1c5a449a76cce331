"""The answer: a place for every bucket and activation, windows, and what they are predicted to do.

A solution is data. It refers to items of its Problem by index, in order.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from lohan_fx.errors import LohanError
from lohan_fx.planner.problem import BucketPlace, Place

SOLUTION_SCHEMA = 1
_STREAMED = "streamed"  # follows the tiers of a bucket in JSON


@dataclass(frozen=True, slots=True)
class Windows:
    """How far movements may run ahead or behind, and the buffers they use.

    GPU, bytes:
      fetch_window_bytes    weights fetched and not yet used, besides those of the running stage
      offload_window_bytes  activations on their way out whose stage is over
      reload_window_bytes   activations on their way back whose stage has not begun
      grad_window_bytes     gradients not yet copied out
      stream_bytes          states in DRAM on their way through the GPU for its update
      An item larger than its window moves alone and is waited for at once.
      closed                positions (see problem's glossary) of stages during which no weight and no
                            activation is on its way to the GPU for a later stage
    DRAM:
      grad_buffers          gradients, then new weights, of that many CPU-updated buckets (where
                            gradients wait for step() there is one buffer per bucket instead)
      state_buffers         optimizer states of that many buckets are between SSD and Adam
      inbound_bytes         arena between SSD and H2D
      outbound_bytes        arena between D2H and SSD
    """

    fetch_window_bytes: int = 0
    offload_window_bytes: int = 0
    reload_window_bytes: int = 0
    grad_window_bytes: int = 0
    grad_buffers: int = 0
    state_buffers: int = 0
    inbound_bytes: int = 0
    outbound_bytes: int = 0
    closed: tuple[int, ...] = ()
    stream_bytes: int = 0

    def closed_stages(self, num_stages: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """(forward, backward) stages that are closed, of a step of so many."""
        forward = tuple(at for at in self.closed if at < num_stages)
        backward = tuple(2 * num_stages - 1 - at for at in self.closed if at >= num_stages)
        return forward, backward


@dataclass(frozen=True, slots=True)
class Prediction:
    """What one steady step does.

    `step_s` is forward, backward and, where the optimizer has a turn of its own, `update_s`.
    `bound_s` is the busiest lane alone: no schedule of this placement can be faster. `stall_s` are
    seconds of idle GPU by the lane it waits for; an estimate has none.
    """

    step_s: float
    forward_s: float
    backward_s: float
    update_s: float
    bottleneck: str
    bound_s: float
    lane_busy_s: Mapping[str, float]
    peak_bytes: Mapping[str, int]
    ssd_bytes_written_per_step: int
    stall_s: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Optimality:
    """What a solver that proves something has proved.

    `bound_s`: no placement has a shorter step by the cost model than this. `gap` is
    (step - bound) / step, by the cost model too; 0 is a proof of optimality. `status` is the
    solver's word ("optimal", "feasible", ...).
    """

    bound_s: float
    gap: float
    status: str


@dataclass(frozen=True, slots=True)
class Solution:
    """One plan for one Problem; `bucket_reasons` and `activation_reasons` are in words.

    `optimality` is None where the policy proves nothing.
    """

    policy: str
    buckets: tuple[BucketPlace, ...]
    activations: tuple[Place, ...]
    windows: Windows
    predicted: Prediction
    bucket_reasons: tuple[str, ...] = ()
    activation_reasons: tuple[str, ...] = ()
    optimality: Optimality | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain dicts, lists, strings and numbers, ready for JSON."""
        raw: dict[str, Any] = {"schema": SOLUTION_SCHEMA, **dataclasses.asdict(self)}
        raw["predicted"]["lane_busy_s"] = dict(self.predicted.lane_busy_s)
        raw["predicted"]["stall_s"] = dict(self.predicted.stall_s)
        raw["predicted"]["peak_bytes"] = dict(self.predicted.peak_bytes)
        raw["windows"]["closed"] = list(self.windows.closed)
        raw["buckets"] = [_place_words(b) for b in self.buckets]
        raw["activations"] = [str(place) for place in self.activations]
        raw["bucket_reasons"] = list(self.bucket_reasons)
        raw["activation_reasons"] = list(self.activation_reasons)
        return raw

    def to_json(self) -> str:
        return json.dumps(self.to_dict(), sort_keys=True)

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> Solution:
        """The solution `to_dict` wrote. Raises LohanError on another schema or malformed data."""
        try:
            fields = dict(raw)
            schema = fields.pop("schema")
            if schema != SOLUTION_SCHEMA:
                raise LohanError(
                    f"this solution has schema {schema!r}, this version reads {SOLUTION_SCHEMA}"
                )
            fields["buckets"] = tuple(_bucket_place(*words) for words in fields["buckets"])
            fields["activations"] = tuple(Place(place) for place in fields["activations"])
            windows = fields["windows"]
            fields["windows"] = Windows(**{**windows, "closed": tuple(windows.get("closed", ()))})
            fields["predicted"] = Prediction(**fields["predicted"])
            if fields.get("optimality") is not None:
                fields["optimality"] = Optimality(**fields["optimality"])
            for key in ("bucket_reasons", "activation_reasons"):
                fields[key] = tuple(fields[key])
            return cls(**fields)
        except (AttributeError, KeyError, TypeError, ValueError) as exc:
            raise LohanError(
                f"this is not a solution as written by Solution.to_json: {exc}"
            ) from exc

    @classmethod
    def from_json(cls, text: str) -> Solution:
        try:
            return cls.from_dict(json.loads(text))
        except json.JSONDecodeError as exc:
            raise LohanError(f"this solution is not JSON: {exc}") from exc


def _place_words(place: BucketPlace) -> list[str]:
    words = [str(place.weight), str(place.state)]
    return [*words, _STREAMED] if place.streamed else words


def _bucket_place(weight: str, state: str, *more: str) -> BucketPlace:
    if more not in ((), (_STREAMED,)):
        raise ValueError(f"a bucket's place ends in {more}, which only {_STREAMED!r} may")
    return BucketPlace(Place(weight), Place(state), streamed=bool(more))


@dataclass(frozen=True, slots=True)
class Forced:
    """Placements that a solver must honour, by index."""

    buckets: Mapping[int, BucketPlace] = field(default_factory=dict)
    activations: Mapping[int, Place] = field(default_factory=dict)
