"""Facts about values in an FX graph: which share a storage, how many bytes, who really reads them."""

from __future__ import annotations

import operator
from collections.abc import Iterator

import torch
from torch import fx

from lohan_fx.errors import PassError


def tensor_of(node: fx.Node) -> torch.Tensor | None:
    """The fake tensor a node stands for; None for tuples, numbers and effects."""
    value = node.meta.get("val")
    return value if isinstance(value, torch.Tensor) else None


def returns_view(node: fx.Node) -> bool:
    """True where the op's result shares the storage of its first argument."""
    target = node.target
    if not isinstance(target, torch._ops.OpOverload):
        return False
    if target is torch.ops.aten._unsafe_view.default:
        return True  # its schema does not say so, as its argument is not to be used again
    returns = target._schema.returns
    if not returns:
        return False
    alias = returns[0].alias_info
    return alias is not None and not alias.is_write


def view_source(node: fx.Node) -> fx.Node | None:
    """The node whose storage `node` shares, one step up; None where it owns its storage."""
    if node.op != "call_function":
        return None
    if node.target is operator.getitem:
        producer = node.args[0]
        assert isinstance(producer, fx.Node)
        return view_source(producer)  # of split, unbind, ...; other tuples own their storages
    if returns_view(node) and node.args and isinstance(node.args[0], fx.Node):
        return node.args[0]
    return None


def storage_root(node: fx.Node) -> fx.Node:
    """The node that owns the storage which `node` shows."""
    while (source := view_source(node)) is not None:
        node = source
    return node


def views_of(node: fx.Node) -> Iterator[fx.Node]:
    """`node` and everything that shares its storage downstream, each once."""
    seen = {node}
    stack = [node]
    while stack:
        current = stack.pop()
        yield current
        for user in current.users:
            # A tuple of views (split) is no tensor itself; its getitems are reached through it.
            if user not in seen and view_source(user) is not None:
                seen.add(user)
                stack.append(user)


def readers(node: fx.Node) -> set[fx.Node]:
    """Nodes that read the storage of `node`, through views too; views and the output not counted."""
    found: set[fx.Node] = set()
    for view in views_of(node):
        found.update(user for user in view.users if view_source(user) is None)
    return {user for user in found if user.op != "output"}


def storage_span_bytes(value: torch.Tensor) -> int:
    """Bytes from the first to past the last element of `value`, holes included."""
    if value.numel() == 0:
        return 0
    for size in (*value.shape, *value.stride()):
        if not isinstance(size, int):
            raise PassError(f"symbolic size {size} in {tuple(value.shape)}; use dynamic=False")
    last = sum(
        (size - 1) * stride for size, stride in zip(value.shape, value.stride(), strict=True)
    )
    return (last + 1) * value.element_size()


def is_dense(value: torch.Tensor) -> bool:
    """True where the elements fill their span without holes or overlap."""
    return storage_span_bytes(value) == value.numel() * value.element_size()


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
