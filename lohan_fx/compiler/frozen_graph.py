"""A graph of ATen calls as bytes, and back.

Kept are the calls in order with their names, and of their metadata what is read later: values (size,
stride, dtype, device, and which share a storage), tags, sequence numbers, module paths, stack traces and
AOTAutograd's descriptions of inputs and outputs. The Python functions that calls came from are left out.
A graph with anything else in it is refused, so that nothing is lost unseen.
"""

from __future__ import annotations

import importlib
import io
import operator
import pickle
from collections.abc import Callable
from typing import Any

import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import _disable_current_modes

from lohan_fx.errors import LohanError

# Metadata that is words and numbers.
_PLAIN = {
    "partitioner_tag",
    "seq_nr",
    "autograd_backward",
    "is_gradient_acc",
    "mutation_region_id",
    "stack_trace",
}
_STACKS = ("nn_module_stack", "fwd_nn_module_stack")
# What says where a node came from only, and what this compiler adds anew.
_LEFT_OUT = {"source_fn_stack", "fwd_source_fn_stack", "from_node", "lohan_stage"}
_AS_THEY_ARE = (
    type(None),
    bool,
    int,
    float,
    str,
    torch.dtype,
    torch.device,
    torch.layout,
    torch.memory_format,
)
_GETITEM = "getitem"
# Modules whose classes may be in the bytes.
_DESCRIPTIONS = "torch._functorch._aot_autograd.descriptors"
_READABLE = {
    (__name__, "Ref"),
    (__name__, "_Tensor"),
    (__name__, "_of_torch"),
    ("torch", "Size"),
    ("torch", "device"),
    ("builtins", "slice"),
    ("torch.fx.passes.shape_prop", "TensorMetadata"),
}


class Unfreezable(LohanError):
    """A graph that cannot be kept as bytes; says why. Never reaches the user."""


class Ref:
    """A node, by its place in the graph."""

    __slots__ = ("index",)

    def __init__(self, index: int) -> None:
        self.index = index

    def __reduce__(self) -> tuple[type[Ref], tuple[int]]:
        return Ref, (self.index,)


class _Tensor:
    """A tensor, by its place in the list of tensors."""

    __slots__ = ("index",)

    def __init__(self, index: int) -> None:
        self.index = index

    def __reduce__(self) -> tuple[type[_Tensor], tuple[int]]:
        return _Tensor, (self.index,)


def freeze(graph: fx.Graph, fake_mode: FakeTensorMode) -> bytes:
    """`graph`, whose values are tensors of `fake_mode`.

    Raises Unfreezable for constants, symbolic sizes, calls of anything but ops, and metadata that is not
    known here.
    """
    freezer = _Freezer(fake_mode)
    nodes = []
    for index, node in enumerate(graph.nodes):
        nodes.append(freezer.node(node))
        freezer.refs[node] = Ref(index)
    content = {
        "nodes": nodes,
        "targets": list(freezer.targets),
        "storages": [nbytes for _, nbytes in freezer.storages.values()],
        "tensors": freezer.tensors,
    }
    file = io.BytesIO()
    try:
        _Pickler(file, protocol=pickle.HIGHEST_PROTOCOL).dump(content)
        return file.getvalue()
    except (pickle.PicklingError, AttributeError, TypeError) as error:
        raise Unfreezable(f"its metadata cannot be kept: {error}") from error


def thaw(data: bytes, fake_mode: FakeTensorMode) -> fx.Graph:
    """The graph in `data`, names and all, its values as tensors of `fake_mode`.

    Raises whatever reading something else than `freeze` wrote comes to.
    """
    content = _Unpickler(io.BytesIO(data)).load()
    tensors = _tensors(content["storages"], content["tensors"], fake_mode)
    targets = [_op(name) for name in content["targets"]]
    graph, nodes = fx.Graph(), list[fx.Node]()

    def back(value: Any) -> Any:
        kind = type(value)
        if kind is Ref:
            return nodes[value.index]
        if kind is tuple or kind is list:
            return kind(back(item) for item in value)
        if kind is dict:
            return {key: back(item) for key, item in value.items()}
        if kind is slice:
            return slice(back(value.start), back(value.stop), back(value.step))
        return value

    def value_of(value: Any) -> Any:
        if type(value) is _Tensor:
            return tensors[value.index]
        if type(value) in (tuple, list):
            return type(value)(value_of(item) for item in value)
        return value

    for op, target, name, args, kwargs, meta in content["nodes"]:
        called = targets[target] if op == "call_function" else target
        node = graph.create_node(op, called, back(args), back(kwargs), name)
        if node.name != name:
            raise LohanError(f"the node {name!r} came back as {node.name!r}")
        if "val" in meta:
            meta["val"] = value_of(meta["val"])
        if "original_aten" in meta:
            meta["original_aten"] = targets[meta["original_aten"]]
        node.meta.update(meta)
        nodes.append(node)
    return graph


class _Freezer:
    def __init__(self, fake_mode: FakeTensorMode) -> None:
        self._fake_mode = fake_mode
        self.refs: dict[fx.Node, Ref] = {}
        self.targets: dict[str, int] = {}
        self.ops: list[Callable[..., Any]] = []  # by the numbers in `targets`
        self.tensors: list[tuple[Any, ...]] = []
        # By the address of a storage: its place here, its bytes.
        self.storages: dict[int, tuple[int, int]] = {}
        self._tensor_of: dict[int, _Tensor] = {}
        self._modules: dict[Any, str] = {}
        self._same: dict[Any, Any] = {}  # what is equal is written once

    def node(self, node: fx.Node) -> tuple[Any, ...]:
        target: Any = node.target
        if node.op == "call_function":
            target = self.target(node.target)
            if self.ops[target] is not node.target:
                raise Unfreezable(f"{node.target} is another op than that of this name")
        elif node.op not in ("placeholder", "output"):
            raise Unfreezable(f"{node.name} is a {node.op}")
        args, kwargs = self.argument(node.args), self.argument(dict(node.kwargs))
        return node.op, target, node.name, args, kwargs, self.meta(node)

    def target(self, target: Any) -> int:
        name = _GETITEM if target is operator.getitem else str(target)
        if target is not operator.getitem and not isinstance(target, torch._ops.OpOverload):
            raise Unfreezable(f"{name} is no op")
        if name not in self.targets:
            self.targets[name] = len(self.ops)
            self.ops.append(_op(name))
        return self.targets[name]

    def argument(self, value: Any) -> Any:
        if isinstance(value, fx.Node):
            return self.refs[value]
        if type(value) in _AS_THEY_ARE:
            return value
        if isinstance(value, tuple):
            return tuple(self.argument(item) for item in value)
        if isinstance(value, list):
            return [self.argument(item) for item in value]
        if isinstance(value, dict):
            return {key: self.argument(item) for key, item in value.items()}
        if isinstance(value, slice):
            parts = (self.argument(part) for part in (value.start, value.stop, value.step))
            return slice(*parts)
        raise Unfreezable(f"a call has {type(value).__name__} {value!r} for an argument")

    def meta(self, node: fx.Node) -> dict[str, Any]:
        kept: dict[str, Any] = {}
        for key, value in node.meta.items():
            if key in _PLAIN:
                kept[key] = self._once(self._checked(key, value))
            elif key in _STACKS:
                kept[key] = self._stack(value)
            elif key == "val":
                kept[key] = self.value(value)
            elif key == "tensor_meta":
                kept[key] = self._tensor_meta(value)
            elif key == "original_aten":
                kept[key] = self.target(value)
            elif key == "desc":
                kept[key] = value
            elif key not in _LEFT_OUT:
                raise Unfreezable(f"{node.name} has the metadata {key!r}")
        return kept

    def value(self, value: Any) -> Any:
        if type(value) in (tuple, list):
            return type(value)(self.value(item) for item in value)
        if not isinstance(value, torch.Tensor):
            return self._checked("val", value)
        if id(value) not in self._tensor_of:
            self.tensors.append(self._spec(value))
            self._tensor_of[id(value)] = _Tensor(len(self.tensors) - 1)
        return self._tensor_of[id(value)]

    def _spec(self, value: torch.Tensor) -> tuple[Any, ...]:
        plain = (
            isinstance(value, FakeTensor)
            and value.fake_mode is self._fake_mode
            and value.layout is torch.strided
            and not (value.requires_grad or value.is_conj() or value.is_neg())
            and not value.is_quantized
        )
        numbers = (*value.shape, *value.stride(), value.storage_offset()) if plain else ()
        if not plain or any(type(number) is not int for number in numbers):
            raise Unfreezable(f"a value is {value!r}")
        storage = value.untyped_storage()
        at, _ = self.storages.setdefault(storage._cdata, (len(self.storages), storage.nbytes()))
        size, stride = tuple(value.shape), value.stride()
        spec = (at, value.dtype, value.storage_offset(), size, stride, value.device)
        return tuple(map(self._once, spec))

    def _stack(self, stack: Any) -> Any:
        """With numbers for addresses, and for classes, which may be of any module, their names."""
        if stack is None:
            return None
        words = tuple(
            (
                self._modules.setdefault(key, str(len(self._modules))),
                str(path),
                kind if isinstance(kind, str) else kind.__qualname__,
            )
            for key, (path, kind) in stack.items()
        )
        if words not in self._same:
            self._same[words] = {key: (path, kind) for key, path, kind in words}
        return self._same[words]

    def _tensor_meta(self, value: Any) -> Any:
        *rest, qparams = value
        if qparams:
            raise Unfreezable("a value is quantized")
        return self._same.setdefault(tuple(rest), value)

    def _checked(self, key: str, value: Any) -> Any:
        if type(value) not in (type(None), bool, int, float, str):
            raise Unfreezable(f"{key} is {value!r}")
        return value

    def _once(self, value: Any) -> Any:
        return self._same.setdefault((type(value), value), value)


class _Pickler(pickle.Pickler):
    def reducer_override(self, value: Any) -> Any:
        # By itself such a value looks for a module that has it, and takes one or another.
        if isinstance(value, torch.memory_format | torch.layout):
            return _of_torch, (str(value).removeprefix("torch."),)
        return NotImplemented


def _of_torch(name: str) -> torch.memory_format | torch.layout:
    value = getattr(torch, name)
    if not isinstance(value, torch.memory_format | torch.layout):
        raise pickle.UnpicklingError(f"torch.{name} is not to be in a graph")
    return value


class _Unpickler(pickle.Unpickler):
    """Of the classes that `freeze` writes alone: the bytes are data, not a program."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in _READABLE or module == _DESCRIPTIONS:
            found = getattr(importlib.import_module(module), name)
            if module != _DESCRIPTIONS or isinstance(found, type):
                return found
        dtype = getattr(torch, name, None) if module == "torch" else None
        if isinstance(dtype, torch.dtype):
            return dtype
        raise pickle.UnpicklingError(f"{module}.{name} is not to be in a graph")


def _tensors(
    storages: list[int], tensors: list[tuple[Any, ...]], fake_mode: FakeTensorMode
) -> list[torch.Tensor]:
    with _disable_current_modes():
        shared = [
            torch.empty(nbytes, dtype=torch.uint8, device="meta").untyped_storage()
            for nbytes in storages
        ]
        made: list[torch.Tensor] = []
        for at, dtype, offset, size, stride, device in tensors:
            plain = torch.empty(0, dtype=dtype, device="meta")
            plain.set_(shared[at], offset, size, stride)
            made.append(FakeTensor(fake_mode, plain, device))
    return made


def _op(name: str) -> Callable[..., Any]:
    if name == _GETITEM:
        return operator.getitem
    namespace, packet, overload = name.split(".")
    found: Callable[..., Any] = getattr(getattr(getattr(torch.ops, namespace), packet), overload)
    return found


__all__ = ["Unfreezable", "freeze", "thaw"]
