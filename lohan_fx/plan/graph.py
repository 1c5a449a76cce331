"""What of a problem the graph fixes: how another graph differs, and which stages read what."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lohan_fx.planner import Problem


@dataclass(frozen=True, slots=True)
class GraphSummary:
    """What of a problem the graph fixes, to say how another graph differs.

    Buckets are (name, elements), activations (name, bytes). `stages` are names; the stages whose
    forward or backward reads a bucket's weights are in `bucket_stages`, ascending;
    `activation_stages` are (stage that makes it, last to read it in forward, largest and smallest to
    read it in backward). These three are empty in plans of before they were written.
    """

    num_stages: int
    buckets: tuple[tuple[str, int], ...]
    activations: tuple[tuple[str, int], ...]
    stages: tuple[str, ...] = ()
    bucket_stages: tuple[tuple[int, ...], ...] = ()
    activation_stages: tuple[tuple[int, ...], ...] = ()

    @classmethod
    def of(cls, problem: Problem) -> GraphSummary:
        return cls(
            problem.num_stages,
            tuple((b.name, b.numel) for b in problem.buckets),
            tuple((a.name, a.bytes) for a in problem.activations),
            tuple(stage.name for stage in problem.stages),
            tuple(tuple(sorted({*b.forward_stages, *b.backward_stages})) for b in problem.buckets),
            tuple(
                (
                    a.forward_stage,
                    a.last_forward_stage,
                    a.first_backward_stage,
                    a.last_backward_stage,
                )
                for a in problem.activations
            ),
        )

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> GraphSummary:
        return cls(
            raw["num_stages"],
            tuple((name, size) for name, size in raw["buckets"]),
            tuple((name, size) for name, size in raw["activations"]),
            tuple(raw.get("stages", ())),
            tuple(tuple(row) for row in raw.get("bucket_stages", ())),
            tuple(tuple(row) for row in raw.get("activation_stages", ())),
        )

    def to_dict(self) -> dict[str, Any]:
        """The JSON as plain dicts and lists, without the three tables where they are empty."""
        raw: dict[str, Any] = {
            "num_stages": self.num_stages,
            "buckets": [list(row) for row in self.buckets],
            "activations": [list(row) for row in self.activations],
        }
        if self.stages:
            raw["stages"] = list(self.stages)
            raw["bucket_stages"] = [list(row) for row in self.bucket_stages]
            raw["activation_stages"] = [list(row) for row in self.activation_stages]
        return raw

    def differences(self, other: GraphSummary) -> list[str]:
        """How `other` differs from this, in words, the first few."""
        found: list[str] = []
        if self.num_stages != other.num_stages:
            found.append(f"{other.num_stages} stages instead of {self.num_stages}")
        for kind, unit, ours, theirs in (
            ("bucket", "elements", self.buckets, other.buckets),
            ("activation", "bytes", self.activations, other.activations),
        ):
            if len(ours) != len(theirs):
                plural = "buckets" if kind == "bucket" else "activations"
                found.append(f"{len(theirs)} {plural} instead of {len(ours)}")
            for (name, size), (new_name, new_size) in zip(ours, theirs, strict=False):
                if name != new_name:
                    found.append(f"{kind} {new_name!r} instead of {name!r}")
                    break
                if size != new_size:
                    found.append(f"{kind} {name!r} has {new_size} {unit} instead of {size}")
        return found
