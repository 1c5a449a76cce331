"""Which tensors a checkpoint of a model holds, under which names, and where each comes from."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from lohan_fx.errors import LohanError
from lohan_fx.params import owner_of

from .shards import TensorSpec

if TYPE_CHECKING:
    from lohan_fx.session import Session

MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True, slots=True)
class Names:
    """The names of a model's persistent tensors, as in its `state_dict()`.

    Attributes:
        params: pid -> every name; the first is the one that files have.
        buffers: name in files -> buffer.
        aliases: further names of buffers -> the one in files.
    """

    params: Mapping[int, tuple[str, ...]]
    buffers: Mapping[str, torch.Tensor]
    aliases: Mapping[str, str]

    def of(self, pid: int) -> str:
        return self.params[pid][0]


def names_of(model: torch.nn.Module) -> Names:
    """The names of a compiled model.

    Raises:
        LohanError: a module has extra state that is no tensor.
    """
    # Without keep_vars every parameter would be read.
    state = torch.nn.Module.state_dict(model, keep_vars=True)
    tied = _is_tied(model)
    params: dict[int, list[str]] = {}
    buffers: dict[int, list[str]] = {}
    tensors: dict[int, torch.Tensor] = {}
    for name, value in state.items():
        if not isinstance(value, torch.Tensor):
            raise LohanError(
                f"{name} in the model's state_dict is a {type(value).__name__}; checkpoints hold tensors "
                "only, so give it to save() as extra="
            )
        found = owner_of(value)
        if found is not None:
            params.setdefault(found[1], []).append(name)
        else:
            buffers.setdefault(id(value), []).append(name)
            tensors[id(value)] = value
    for group in (params, buffers):
        for names in group.values():
            names.sort(key=tied)  # stable: the first name, unless transformers leaves that one out
    return Names(
        params={pid: tuple(names) for pid, names in params.items()},
        buffers={names[0]: tensors[key] for key, names in buffers.items()},
        aliases={name: names[0] for names in buffers.values() for name in names[1:]},
    )


def _is_tied(model: torch.nn.Module) -> Any:
    """True for names that transformers does not save, because it ties them when loading."""
    keys = getattr(model, "all_tied_weights_keys", None) or getattr(
        model, "_tied_weights_keys", None
    )
    if not keys:
        return lambda name: False
    pattern = re.compile("|".join(f"(?:{key})" for key in keys))
    return lambda name: pattern.fullmatch(name) is not None


@dataclass(frozen=True, slots=True)
class Item:
    """One tensor of a file: a section of a parameter (see Session.read_piece), or a buffer's copy.

    `stored` is the section's dtype, `stride` its layout.
    """

    spec: TensorSpec
    pid: int
    section: str
    stored: torch.dtype
    stride: tuple[int, ...]
    buffer: torch.Tensor | None = None

    @property
    def row_major(self) -> bool:
        expected = torch.empty(self.spec.shape, device="meta").stride()
        pairs = zip(self.spec.shape, self.stride, expected, strict=True)
        return all(n == 1 or a == b for n, a, b in pairs)


@dataclass(frozen=True, slots=True)
class Inventory:
    """Everything to save."""

    names: Names
    weights: tuple[Item, ...]
    optimizer: tuple[Item, ...]
    masters: bool  # masters are among `optimizer`

    def __iter__(self) -> Iterator[Item]:
        yield from self.weights
        yield from self.optimizer

    @property
    def nbytes(self) -> int:
        return sum(item.spec.nbytes for item in self)


def take_inventory(
    model: torch.nn.Module, session: Session, *, full: bool, optimizer: bool
) -> Inventory:
    """What a checkpoint of `model` holds; buffers are copied, parameters are not read.

    Args:
        full: weights are fp32 masters, else in the compute dtype.
        optimizer: moments, and masters where weights are not those.
    """
    names = names_of(model)
    weights: list[Item] = []
    state: list[Item] = []
    for pid in names.params:
        stub, name = session.params.stubs[pid], names.of(pid)
        shape, trains = tuple(stub.shape), pid in session.trainable
        widened = full and stub.is_floating_point()
        section = "master" if widened and trains else "weight"
        dtype, stride = torch.float32 if widened else stub.dtype, stub.stride()
        stored = torch.float32 if section == "master" else stub.dtype
        weights.append(Item(TensorSpec(name, dtype, shape), pid, section, stored, stride))
        if optimizer and trains:
            sections = MOMENTS if full or stub.dtype == torch.float32 else ("master", *MOMENTS)
            state += [
                Item(
                    TensorSpec(f"{section}.{name}", torch.float32, shape),
                    pid,
                    section,
                    torch.float32,
                    stride,
                )
                for section in sections
            ]
    for name, buffer in names.buffers.items():
        spec = TensorSpec(name, buffer.dtype, tuple(buffer.shape))
        copy = buffer.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
        weights.append(Item(spec, -1, "buffer", buffer.dtype, copy.stride(), copy))
    return Inventory(names, tuple(weights), tuple(state), any(i.section == "master" for i in state))


def by_bucket(
    items: Iterable[Item], session: Session, *, backwards: bool = False
) -> dict[int, list[Item]]:
    """Items of one bucket together, in the buckets' order or the other way round.

    Those of no bucket (buffers, or everything where nothing is placed yet) are under -1, first.
    """
    bucket_of = {spec.pid: bucket.index for bucket in session.buckets for spec in bucket.params}
    found: dict[int, list[Item]] = {}
    for item in items:
        found.setdefault(bucket_of.get(item.pid, -1), []).append(item)
    return dict(sorted(found.items(), key=lambda g: (g[0] >= 0, -g[0] if backwards else g[0])))
