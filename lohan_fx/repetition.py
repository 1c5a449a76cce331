"""The step of a deep model from traces of two shallow ones, where all its layers are alike.

Tracing takes about a third of a second a layer, and 96 equal layers say no more than five. Two traces, of
n and of n + 1 layers, show what one more layer adds and what it shifts:

    n layers      embed  0  1        2  3  head
    n + 1 layers  embed  0  1  1'    2  3  head       1' is layer 1 again, one further
    count layers  embed  0  1  1' 1" ...   2  3  head

Stages, buckets, activations and tensors of layer 1 come again, with every number that says which one
(stages, indices, numbers in names) as far on as the traces show. All else (bytes, seconds, shapes,
kinds) has to be the same; a pair of traces that differs in any other way is not repeated. So the result
is what tracing all layers would give, names and fingerprint included.

This cannot see code that asks for a certain layer's number, so that `layers_alike` looks at the whole
model's layers first, as they are built.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lohan_fx.errors import LohanError
from lohan_fx.planner import Problem
from lohan_fx.step import TracedStep

if TYPE_CHECKING:
    import torch

# Layers of the shorter trace. The first and the last may differ from those between (casts, names),
# of which the longer one shows three.
LAYERS_TRACED = 4
# With fewer layers, two traces save too little.
_LEAST_LAYERS = 12


class _Differs(Exception):
    """The traces differ in more than one layer between equal ones."""


def repeated_step(
    model: torch.nn.Module, layers: int, trace: Callable[[int, int], TracedStep]
) -> TracedStep | None:
    """The step of a model with `layers` layers, from two traces of fewer; None where it has to be
    traced in full.

    Args:
        trace: traces the same model with another number of layers, in buckets of at most so many
            parameters.
    """
    from lohan_fx.compiler.buckets import bucket_numel_for

    if layers < _LEAST_LAYERS or not layers_alike(model, layers):
        return None
    bucket_numel = bucket_numel_for(sum(param.numel() for param in model.parameters()))
    try:
        short = trace(LAYERS_TRACED, bucket_numel)
        longer = trace(LAYERS_TRACED + 1, bucket_numel)
    except LohanError:  # tracing in full says what is wrong, of the model that was asked for
        return None
    return repeat(short, longer, layers)


def repeat(short: TracedStep, longer: TracedStep, layers: int) -> TracedStep | None:
    """The step with `layers` layers, of which `short` has LAYERS_TRACED and `longer` one more.

    Both have to be cut into buckets of the same most elements as the whole model. None where the traces
    do not show how to go on.
    """
    kinds = [stage.kind for stage in longer.problem.stages]
    # Rather not the first of the equal ones: it may read what the others do not.
    for middle in (*range(1, len(kinds) - 2), 0):
        if len(set(kinds[middle : middle + 3])) == 1:
            try:
                if _grown(short, longer, middle, 1) != longer:
                    continue
                made = _grown(short, longer, middle, layers - LAYERS_TRACED)
            except (_Differs, LohanError):
                continue
            return dataclasses.replace(made, layers_traced=LAYERS_TRACED)
    return None


# ---- growing ----

# How far a number is on, for one more copy before it and for one more layer in all.
_Steps = tuple[int, int]

# Fields that number or count rows, and rows of which kind.
_STAGE_FIELDS = {"index": "stages"}
_BUCKET_FIELDS = {
    "index": "buckets",
    "forward_stages": "stages",
    "backward_stages": "stages",
    "grad_stage": "stages",
}
_ACTIVATION_FIELDS = {
    "index": "activations",
    "needs": "activations",
    "forward_stage": "stages",
    "last_forward_stage": "stages",
    "first_backward_stage": "stages",
    "last_backward_stage": "stages",
}
_TENSOR_FIELDS = {"bucket": "buckets", "activation": "activations"}


def _grown(short: TracedStep, longer: TracedStep, middle: int, more: int) -> TracedStep:
    """`short` with `more` copies of its stage `middle` behind that stage. Raises _Differs."""
    mine, other = short.problem, longer.problem
    if other.num_stages != mine.num_stages + 1:
        raise _Differs
    made = {"stages", "buckets", "activations"}
    for field in dataclasses.fields(Problem):
        if field.name not in made and getattr(mine, field.name) != getattr(other, field.name):
            raise _Differs
    stages = _stage_homes(mine), _stage_homes(other)
    buckets = _bucket_homes(mine), _bucket_homes(other)
    activations = _activation_homes(mine), _activation_homes(other)
    sizes = {
        "stages": 1,
        "buckets": buckets[0].count(middle),
        "activations": activations[0].count(middle),
    }
    grower = _Grower(middle, more, sizes)
    tensors = []
    for owner, homes in (("bucket", buckets), ("activation", activations)):
        rows = [row for row in short.tensors if getattr(row, owner) is not None]
        longer_rows = [row for row in longer.tensors if getattr(row, owner) is not None]
        of_rows = [homes[0][getattr(row, owner)] for row in rows]
        of_longer = [homes[1][getattr(row, owner)] for row in longer_rows]
        tensors += grower.rows(rows, longer_rows, (of_rows, of_longer), _TENSOR_FIELDS)
    return dataclasses.replace(
        short,
        problem=dataclasses.replace(
            mine,
            stages=tuple(grower.rows(mine.stages, other.stages, stages, _STAGE_FIELDS)),
            buckets=tuple(grower.rows(mine.buckets, other.buckets, buckets, _BUCKET_FIELDS)),
            activations=tuple(
                grower.rows(mine.activations, other.activations, activations, _ACTIVATION_FIELDS)
            ),
        ),
        tensors=tuple(tensors),
    )


# Homes: the stage of every row.


def _stage_homes(problem: Problem) -> list[int]:
    return list(range(problem.num_stages))


def _bucket_homes(problem: Problem) -> list[int]:
    return [min(b.forward_stages, default=problem.num_stages) for b in problem.buckets]


def _activation_homes(problem: Problem) -> list[int]:
    return [a.forward_stage for a in problem.activations]


@dataclass(frozen=True, slots=True)
class _Grower:
    """Goes on from two lists of rows as `_grown` says. `sizes` are the rows of a layer, by kind."""

    middle: int
    more: int
    sizes: Mapping[str, int]

    def rows(
        self,
        short: Sequence[Any],
        longer: Sequence[Any],
        homes: tuple[list[int], list[int]],
        counts: Mapping[str, str],
    ) -> list[Any]:
        """The rows before, of and behind the layer, in order. Raises _Differs."""
        if any(of != sorted(of) for of in homes):
            raise _Differs
        at = self.middle
        end = max(homes[1], default=0) + 1

        def mine(low: int, high: int) -> list[Any]:
            return [row for row, home in zip(short, homes[0], strict=True) if low <= home < high]

        def other(low: int, high: int) -> list[Any]:
            return [row for row, home in zip(longer, homes[1], strict=True) if low <= home < high]

        layer = mine(at, at + 1)
        repeats = [other(at + copy, at + copy + 1) for copy in range(3)]
        before = mine(0, at), other(0, at)
        behind = mine(at + 1, end), other(at + 2, end)
        if any(len(rows) != len(layer) for rows in repeats):
            raise _Differs
        if len(before[0]) != len(before[1]) or len(behind[0]) != len(behind[1]):
            raise _Differs
        self._check_steady(repeats, counts)
        grown = [self._row(a, b, b, 0, counts) for a, b in zip(*before, strict=True)]
        for copy in range(self.more + 1):
            grown += [
                self._row(a, b, c, copy, counts)
                for a, b, c in zip(layer, repeats[0], repeats[1], strict=True)
            ]
        return grown + [self._row(a, b, b, 0, counts) for a, b in zip(*behind, strict=True)]

    def _check_steady(self, repeats: Sequence[Sequence[Any]], counts: Mapping[str, str]) -> None:
        """Raise _Differs unless each of the longer trace's three layers differs from the one before
        as that does from its own."""
        once = dataclasses.replace(self, more=0)
        for first, second, third in zip(*repeats, strict=True):
            if once._row(first, first, second, 2, counts) != third:
                raise _Differs

    def _row(
        self, short: Any, longer: Any, copied: Any, copy: int, counts: Mapping[str, str]
    ) -> Any:
        """A row of `short` in the grown list, itself (copy 0) or a copy, given the same row and its
        first copy in `longer`."""
        fields = {}
        for field in dataclasses.fields(short):
            a, b, c = (getattr(row, field.name) for row in (short, longer, copied))
            if field.name in counts:
                of = counts[field.name]
                a = self._counted(a, b, c, copy, self.sizes[of], of == "stages")
            elif field.name in ("name", "layer"):
                a = self._named(a, b, c, copy)
            elif not a == b == c:
                raise _Differs
            fields[field.name] = a
        return dataclasses.replace(short, **fields)

    def _counted(
        self, short: Any, longer: Any, copied: Any, copy: int, size: int, is_stage: bool
    ) -> Any:
        if isinstance(short, tuple) and isinstance(longer, tuple) and isinstance(copied, tuple):
            if len(short) == len(longer) == len(copied):
                return tuple(
                    self._counted(a, b, c, copy, size, is_stage)
                    for a, b, c in zip(short, longer, copied, strict=True)
                )
            if is_stage and longer == copied == self._read_by_all(short, 1):
                return self._read_by_all(short, self.more)
            raise _Differs
        if short is None and longer is None and copied is None:
            return None
        if not all(isinstance(number, int) for number in (short, longer, copied)):
            raise _Differs
        steps = copied - longer, longer - short
        if steps not in ((0, 0), (size, 0), (0, size)):
            raise _Differs
        return _at(short, steps, copy, self.more)

    def _read_by_all(self, stages: tuple[int, ...], more: int) -> tuple[int, ...]:
        """Stages that read what every layer reads, with more layers."""
        if self.middle not in stages:
            raise _Differs
        before = [stage for stage in stages if stage <= self.middle]
        behind = [stage + more for stage in stages if stage > self.middle]
        return (*before, *range(self.middle + 1, self.middle + 1 + more), *behind)

    def _named(self, short: Any, longer: Any, copied: Any, copy: int) -> Any:
        """A name whose numbers go on as in the three given."""
        if not all(isinstance(name, str) for name in (short, longer, copied)):
            raise _Differs
        pieces = [re.split(r"(\d+)", name) for name in (short, longer, copied)]
        if len({tuple(piece[::2]) for piece in pieces}) != 1:
            raise _Differs
        found = list(pieces[0])
        for at in range(1, len(found), 2):
            first, second, third = (int(piece[at]) for piece in pieces)
            found[at] = str(_at(first, (third - second, second - first), copy, self.more))
        return "".join(found)


def _at(number: int, steps: _Steps, copy: int, more: int) -> int:
    return number + steps[0] * copy + steps[1] * more


# ---- whether layers are alike ----


def layers_alike(model: torch.nn.Module, layers: int) -> bool:
    """True where the model has one list of `layers` modules and they are built alike.

    Alike are modules with the same classes, shapes, dtypes and settings; a whole number that is each
    layer's own position may differ. Where a Hugging Face config says something of each layer, it has
    to say the same of all.
    """
    import torch

    lists = [
        module
        for module in model.modules()
        if isinstance(module, torch.nn.ModuleList) and len(module) == layers
    ]
    if len(lists) != 1 or not _says_the_same(getattr(model, "config", None), layers):
        return False
    described = [_description(layer) for layer in lists[0]]
    if any(one.keys() != described[0].keys() for one in described):
        return False
    for key, first in described[0].items():
        values = [one[key] for one in described]
        is_own_number = type(first) is int and values == list(range(layers))
        if not is_own_number and any(type(v) is not type(first) or v != first for v in values):
            return False
    return True


def _says_the_same(config: Any, layers: int) -> bool:
    listed = [
        list(value)
        for value in getattr(config, "__dict__", {}).values()
        if isinstance(value, list | tuple) and len(value) == layers
    ]
    return all(values == values[:1] * layers for values in listed)


def _description(layer: torch.nn.Module) -> dict[tuple[str, str], Any]:
    """What a layer is, to be compared with others: by path of the module, and what of it."""
    found: dict[tuple[str, str], Any] = {}
    for path, module in layer.named_modules():
        found[path, "class"] = type(module)
        for name, value in vars(module).items():
            if name not in ("_parameters", "_buffers", "_modules"):
                found[path, f".{name}"] = value
        for name, tensor in (*module._parameters.items(), *module._buffers.items()):
            found[path, name] = (
                None if tensor is None else (tensor.shape, tensor.dtype, tensor.requires_grad)
            )
    return found


__all__ = ["LAYERS_TRACED", "layers_alike", "repeat", "repeated_step"]
