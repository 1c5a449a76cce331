"""Placements that the user insists on: names of tensors in, forced placements of the planner out.

A pin is a pattern and a place, as in {"model.layers.0.*": "ssd"}. The pattern (fnmatch) is compared
with names of parameters, of buckets and of activations, as a plan lists them:

    PATTERN             parameters (weights and optimizer state), and activations by name
    weights:PATTERN     the weights of parameters alone
    state:PATTERN       the optimizer state of parameters alone
    activation:PATTERN  activations, by name or by the name of their layer

Parameters move in buckets, so a pin on one holds for its whole bucket. A pattern with wildcards pins
what can have the place, and must find something that can; a plain name must be able to have it.
"""

from __future__ import annotations

import difflib
import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase

from lohan_fx.errors import InfeasiblePlan, LohanError
from lohan_fx.plan import TensorRow
from lohan_fx.planner import (
    BucketPlace,
    Forced,
    Place,
    Problem,
    Solution,
    activation_places,
    bucket_places,
    streamed_places,
)

Pins = Mapping[str, str]

_KINDS = ("weights", "state", "activation")
_MOST_NEAR = 3
# Names that a pattern is compared with to suggest near ones; more would take seconds.
_MOST_COMPARED = 20_000


@dataclass(slots=True)
class _Wanted:
    """What pins ask of one bucket, and which pattern asked."""

    weight: Place | None = None
    state: Place | None = None
    asked_by: str = ""


@dataclass(frozen=True, slots=True)
class _Pin:
    text: str  # as the user wrote the pattern
    kind: str  # one of _KINDS, or ""
    pattern: str
    place: Place

    @property
    def is_plain(self) -> bool:
        return not any(sign in self.pattern for sign in "*?[")

    def finds(self, name: str) -> bool:
        return fnmatchcase(name, self.pattern) or name == self.pattern


@dataclass(slots=True)
class _Names:
    """Names of a problem's items, in order."""

    buckets: list[set[str]]
    activations: list[set[str]]
    layers: list[set[str]] = field(default_factory=list)

    @classmethod
    def of(cls, tensors: Sequence[TensorRow], problem: Problem) -> _Names:
        names = cls(
            [{b.name} for b in problem.buckets],
            [{a.name} for a in problem.activations],
            [{problem.stages[a.forward_stage].name} for a in problem.activations],
        )
        for row in tensors:
            if row.bucket is not None:
                names.buckets[row.bucket].add(row.name)
            elif row.activation is not None:
                names.activations[row.activation].add(row.name)
        return names


def parse_pin(text: str) -> tuple[str, str]:
    """(pattern, place) of "PATTERN=PLACE". Raises LohanError for anything else."""
    pattern, equals, place = text.rpartition("=")
    if not equals or not pattern.strip() or not place.strip():
        raise LohanError(
            f"{text!r} is not NAME_PATTERN=PLACE; write it like 'model.layers.0.*=ssd'"
        )
    return pattern.strip(), place.strip()


def check_pins(pins: Pins) -> None:
    """Raise LohanError for a place that there is not, or an empty pattern."""
    for text, place in pins.items():
        _parsed(text, place)


def forced_placements(
    pins: Pins, tensors: Sequence[TensorRow], problem: Problem, *, strict: bool = True
) -> tuple[Forced, ...]:
    """What a solver must honour for `pins`.

    More than one where only weights or only states are pinned: one for each place that the other part
    may have. The best plan over all of them is the answer.

    Args:
        strict: raise for a pattern that finds nothing; else (another program of the same model,
            which may lack the tensor) it asks nothing.

    Raises:
        LohanError: a pattern finds nothing, two disagree, or nothing found can have the place.
    """
    names = _Names.of(tensors, problem)
    wanted: dict[int, _Wanted] = {}
    activations: dict[int, Place] = {}
    for text, place in pins.items():
        pin = _parsed(text, place)
        found = _pin_buckets(pin, names, problem, wanted)
        found += _pin_activations(pin, names, problem, activations)
        if not found and strict:
            raise LohanError(_nothing_found(pin, names))
    return tuple(
        Forced(buckets=buckets, activations=activations) for buckets in _choices(wanted, problem)
    )


def best_of(solve: Callable[[Forced], Solution], forced: Iterable[Forced]) -> Solution:
    """The fastest solution over several sets of forced placements.

    Raises what `solve` raised last where none has one.
    """
    best: Solution | None = None
    failed: InfeasiblePlan | None = None
    for each in forced:
        try:
            solution = solve(each)
        except InfeasiblePlan as exc:
            failed = exc
            continue
        if best is None or solution.predicted.step_s < best.predicted.step_s:
            best = solution
    if best is None:
        assert failed is not None
        raise failed
    return best


def _parsed(text: str, place: str) -> _Pin:
    kind, colon, pattern = text.partition(":")
    if not colon or kind not in _KINDS:
        kind, pattern = "", text
    if not pattern:
        raise LohanError(f"the pin {text!r} has no name in it; write it like 'model.layers.0.*'")
    places = [str(p) for p in Place]
    if place not in places:
        raise LohanError(f"{text!r} is pinned to {place!r}; places are {', '.join(places)}")
    pin = _Pin(text, kind, pattern, Place(place))
    if kind in ("weights", "state") and pin.place is Place.RECOMPUTE:
        raise LohanError(f"{text!r} is pinned to recompute; only activations can be recomputed")
    return pin


def _pin_buckets(
    pin: _Pin, names: _Names, problem: Problem, wanted: dict[int, _Wanted]
) -> list[int]:
    if pin.kind == "activation" or pin.place is Place.RECOMPUTE:
        return []
    found = [i for i, known in enumerate(names.buckets) if any(map(pin.finds, known))]
    if pin.kind == "state":
        found = [i for i in found if problem.buckets[i].trainable]
    for index in found:
        asked = wanted.setdefault(index, _Wanted())
        for part in ("weight", "state"):
            if pin.kind and not pin.kind.startswith(part):
                continue
            before = getattr(asked, part)
            if before not in (None, pin.place):
                raise LohanError(
                    f"pins {asked.asked_by!r} and {pin.text!r} ask for {before} and {pin.place} of "
                    f"the same bucket, {problem.buckets[index].name!r}; its parameters move together"
                )
            setattr(asked, part, pin.place)
        asked.asked_by = pin.text
    return found


def _pin_activations(
    pin: _Pin, names: _Names, problem: Problem, activations: dict[int, Place]
) -> list[int]:
    if pin.kind in ("weights", "state"):
        return []
    found = []
    for index, known in enumerate(names.activations):
        among = known | names.layers[index] if pin.kind == "activation" else known
        if any(map(pin.finds, among)):
            found.append(index)
    able = [i for i in found if pin.place in activation_places(problem.activations[i])]
    named = [i for i in found if pin.is_plain and pin.pattern in names.activations[i]]
    unable = next((i for i in named if i not in able), None)
    if unable is None and found and not able:
        unable = found[0]
    if unable is not None:
        activation = problem.activations[unable]
        allowed = ", ".join(activation_places(activation))
        raise LohanError(
            f"{pin.text!r} cannot be pinned to {pin.place}: activation {activation.name!r} can be "
            f"{allowed}"
        )
    for index in able:
        before = activations.get(index)
        if before not in (None, pin.place):
            raise LohanError(
                f"pin {pin.text!r} asks for {pin.place} of activation "
                f"{problem.activations[index].name!r}, which another pin puts on {before}"
            )
        activations[index] = pin.place
    return able


def _choices(wanted: Mapping[int, _Wanted], problem: Problem) -> list[dict[int, BucketPlace]]:
    """Complete places for the buckets, one dict per choice of what was left open."""
    kinds: dict[tuple[Place | None, Place | None], list[BucketPlace]] = {}
    allowed: dict[int, list[BucketPlace]] = {}
    for index, asked in wanted.items():
        bucket = problem.buckets[index]
        allowed[index] = [
            place
            for place in (*bucket_places(bucket), *streamed_places(problem, bucket))
            if asked.weight in (None, place.weight) and asked.state in (None, place.state)
        ]
        if not allowed[index]:
            can = "; ".join(str(p) for p in bucket_places(bucket))
            raise LohanError(
                f"{asked.asked_by!r} cannot be pinned so: bucket {bucket.name!r} can have {can}"
            )
        options = kinds.setdefault((asked.weight, asked.state), [])
        options += [place for place in allowed[index] if place not in options]
    result = []
    for chosen in itertools.product(*kinds.values()):
        by_kind = dict(zip(kinds, chosen, strict=True))
        buckets = {}
        for index, asked in wanted.items():
            place = by_kind[asked.weight, asked.state]
            buckets[index] = place if place in allowed[index] else allowed[index][0]
        result.append(buckets)
    return result


def _nothing_found(pin: _Pin, names: _Names) -> str:
    if pin.kind == "activation" or pin.place is Place.RECOMPUTE:
        groups = [*names.activations, *(names.layers if pin.kind else ())]
    else:
        groups = [*names.buckets, *(() if pin.kind else names.activations)]
    known = sorted({name for group in groups for name in group})
    near = difflib.get_close_matches(
        pin.pattern.strip("*"), known[:_MOST_COMPARED], n=_MOST_NEAR, cutoff=0.5
    )
    shown = near or known[:_MOST_NEAR]
    what = {"": "tensor", "activation": "activation"}.get(pin.kind, "parameter")
    if not shown:
        return f"no {what} of this step is called {pin.pattern!r}; it has none at all"
    words = "near names are" if near else "names look like"
    return f"no {what} of this step is called {pin.pattern!r}; {words} {', '.join(shown)}"
