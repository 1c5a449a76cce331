"""What Inductor makes of a run of nodes: ops that stand alone, and kernels that fuse the others.

Used for estimates of memory and time, and for where a stage may be cut (`free_cuts`). What is compiled
does not depend on it otherwise.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Sequence, Set
from dataclasses import dataclass

import torch
from torch import fx

from .node_costs import flop_formula
from .values import storage_root, storage_span_bytes, tensor_of, view_source, views_of

# Ops that move memory by themselves. Of these, look-ups are fused with what reads or feeds them; the
# inputs and outputs of the others, and of matrix products, exist in memory however well the rest is fused.
_LOOKUPS = frozenset({"embedding", "index", "gather", "cat", "slice_scatter", "select_scatter"})
_ALONE = (
    "index_put",
    "scatter",
    "embedding_dense_backward",
    "sort",
    "cumsum",
    "dropout",
    "topk",
    "nll_loss",
    "batch_norm",
    "pool",
    "upsample",
)
# These read as many rows of their first argument as they return.
_GATHERS = frozenset({"embedding", "gather", "index", "index_select"})


def is_lookup(node: fx.Node) -> bool:
    return op_name(node) in _LOOKUPS


def is_extern(node: fx.Node) -> bool:
    """True for ops that are a kernel of their own, whatever stands around them."""
    name = op_name(node)
    return flop_formula(node) is not None or (
        not is_lookup(node) and any(part in name for part in _ALONE)
    )


def is_reduction(node: fx.Node) -> bool:
    value = tensor_of(node)
    if value is None:
        return False
    largest = max(
        (t.numel() for a in node.all_input_nodes if (t := tensor_of(a)) is not None), default=0
    )
    return value.numel() * 4 <= largest and value.numel() > 0


def op_name(node: fx.Node) -> str:
    """The ATen op's name without its overload; "" for anything else."""
    return str(getattr(node.target, "_opname", ""))


def source_op(node: fx.Node) -> fx.Node:
    """The op that made a value: the producer of the tuple that `node` takes one item of."""
    if node.target is operator.getitem:
        source = node.args[0]
        assert isinstance(source, fx.Node)
        return source
    return node


@dataclass(frozen=True, slots=True)
class Kernel:
    """Nodes that run as one kernel, and the bytes it reads and writes in memory."""

    nodes: tuple[fx.Node, ...]
    nbytes: int


# [Note: what fused code moves]
# Pointwise ops and row-wise reductions that are connected, and need the same kernels to be through
# before them, come out as one kernel (their depth: how many kernels the longest way to them has). It
# reads each value from outside once and writes what somebody outside reads; what only its own nodes
# read never reaches memory. A reduction over leading dimensions (the gradient of a bias) is a kernel
# of its own, which repeats the pointwise ops before it rather than read their results.


def fused_kernels(
    run: Sequence[fx.Node], later: Set[fx.Node] = frozenset(), kept: Set[fx.Node] = frozenset()
) -> list[Kernel]:
    """The kernels that the nodes of `run`, in order, fuse into; standalone ops and views are none.

    Args:
        later: nodes that run after these in the same pass, so that what they read is written.
        kept: nodes whose results stay for another pass.
    """
    inside = set(run)
    depth, fusible = _depths(run)
    groups = _connected(fusible, depth)
    kernels = []
    for group in groups:
        members = set(group)
        written = [n for n in group if _is_written(n, members, inside, later, kept)]
        if written:  # else its readers make it again
            nbytes = sum(_size(node) for node in written) + _read_bytes(group, members, inside)
            kernels.append(Kernel(tuple(group), nbytes))
    return kernels


def free_cuts(run: Sequence[fx.Node], kept: Set[fx.Node] = frozenset()) -> list[int]:
    """Positions at which `run`, nodes in order, can be cut in two that run the same kernels as before.

    Position p is between run[p - 1] and run[p]; both ends of the run, which are free too, are not
    listed. A free cut stands right before or after a standalone op (the views of its arguments stay
    with it, and so do the items of its result) and parts no nodes that fuse.

    Args:
        kept: nodes whose results stay for another pass.
    """
    depth, fusible = _depths(run, kept)
    position = {node: index for index, node in enumerate(run)}
    parted = [0] * (len(run) + 1)  # how many more kernels are open before run[p] than before
    for group in _connected(fusible, depth):
        # A constant is made in every region that reads it.
        ends = [position[node] for node in group if node.all_input_nodes]
        for node in group:
            if not is_reduction(node) and not _has_extern_reader(node):
                # A sum over rows repeats what is not in memory.
                readers = (user for view in views_of(node) for user in view.users)
                ends += [
                    position[user] for user in readers if user in position and _over_rows(user)
                ]
        if ends:
            parted[min(ends) + 1] += 1
            parted[max(ends) + 1] -= 1
    comes = [False] * (len(run) + 1)  # whether what runs next, views aside, stands alone
    for p in reversed(range(len(run))):
        comes[p] = comes[p + 1] if view_source(run[p]) is not None else is_extern(run[p])
    cuts, is_open = [], 0
    for p in range(1, len(run)):
        is_open += parted[p]
        if is_open or run[p].target is operator.getitem:
            continue
        before = run[p - 1]
        if is_extern(source_op(before)) or (comes[p] and view_source(before) is None):
            cuts.append(p)
    return cuts


def _depths(
    run: Sequence[fx.Node], kept: Set[fx.Node] = frozenset()
) -> tuple[dict[fx.Node, int], list[fx.Node]]:
    """(how many kernels must be through before each node can run, the nodes that may be fused).

    What is read only further on waits for its first reader: a value that backward makes again from
    what forward kept is made where the gradient arrives, in the same kernel. The `kept` do not wait.
    """
    depth: dict[fx.Node, int] = {}
    fusible: list[fx.Node] = []
    alone: set[fx.Node] = set()  # a kernel between what is before and after
    for node in run:
        depth[node] = max((_through(s, depth, alone) for s in node.all_input_nodes), default=0)
        if node.op != "call_function" or view_source(node) is not None:
            continue
        if node.target is operator.getitem:
            continue
        if is_extern(node):
            alone.add(node)
            continue
        fusible.append(node)
        if _over_rows(node):
            alone.add(node)
    for node in reversed(run):
        if node not in alone and node not in kept:
            readers = [depth[user] for user in node.users if user in depth]
            if readers and not any(user.op == "output" for user in node.users):
                depth[node] = max(depth[node], min(readers))
    return depth, fusible


def _through(node: fx.Node, depth: dict[fx.Node, int], alone: Set[fx.Node]) -> int:
    return depth.get(node, 0) + (1 if node in alone else 0)


def _connected(fusible: Sequence[fx.Node], depth: dict[fx.Node, int]) -> list[list[fx.Node]]:
    """Groups of nodes that feed one another, all of one depth."""
    leader = {node: node for node in fusible}

    def find(node: fx.Node) -> fx.Node:
        while leader[node] is not node:
            leader[node] = leader[leader[node]]
            node = leader[node]
        return node

    for node in fusible:
        for source in node.all_input_nodes:
            maker = source_op(storage_root(source))
            if maker in leader and depth[maker] == depth[node] and not _over_rows(node):
                leader[find(node)] = find(maker)
    groups: dict[fx.Node, list[fx.Node]] = {}
    for node in fusible:
        groups.setdefault(find(node), []).append(node)
    return list(groups.values())


def _over_rows(node: fx.Node) -> bool:
    """True for reductions that keep the last dimension: they add up rows, not within them."""
    if not is_reduction(node) or len(node.args) < 2:
        return False
    source, dims = node.args[0], node.args[1]
    value = tensor_of(source) if isinstance(source, fx.Node) else None
    if value is None or not isinstance(dims, (list, tuple)) or not dims:
        return False
    return value.dim() - 1 not in {int(dim) % value.dim() for dim in dims}  # type: ignore[arg-type]


def _is_written(
    node: fx.Node,
    members: Set[fx.Node],
    inside: Set[fx.Node],
    later: Set[fx.Node],
    kept: Set[fx.Node],
) -> bool:
    """Whether the result of a fused node exists in memory. See [Note: what fused code moves]."""
    if node in kept:
        return True
    if not node.all_input_nodes:
        return False  # a constant: every reader makes it anew
    for view in views_of(node):
        if view in kept:
            return True
        for user in view.users:
            if user.op == "output":
                return True
            if user in members or view_source(user) is not None:
                continue
            if user in later or (user in inside and (is_reduction(node) or not _over_rows(user))):
                return True
    return False


def _read_bytes(group: Sequence[fx.Node], members: Set[fx.Node], inside: Set[fx.Node]) -> int:
    """Bytes that a kernel reads: each value once, and of it what its views show."""
    parts: dict[fx.Node, dict[fx.Node, int]] = {}
    stack = [(node, source) for node in group for source in node.all_input_nodes]
    seen: set[fx.Node] = set()
    while stack:
        reader, source = stack.pop()
        root = storage_root(source)
        maker = source_op(root)
        if maker in members or (not root.all_input_nodes and root.op == "call_function"):
            continue
        repeated = (
            _over_rows(reader)
            and maker in inside
            and not is_extern(maker)
            and not is_reduction(maker)
            and not _has_extern_reader(root)
        )
        if repeated:
            if maker not in seen:
                seen.add(maker)
                stack += [(reader, before) for before in maker.all_input_nodes]
            continue
        nbytes = _size(source)
        if op_name(reader) in _GATHERS and reader.args and reader.args[0] is source:
            nbytes = min(nbytes, _size(reader))
        parts.setdefault(root, {})[source] = nbytes
    total = 0
    for root, reads in parts.items():
        value = tensor_of(root)
        most = storage_span_bytes(value) if value is not None else sum(reads.values())
        total += min(most, sum(reads.values()))
    return total


def _has_extern_reader(node: fx.Node) -> bool:
    return any(is_extern(user) for view in views_of(node) for user in view.users)


def _size(node: fx.Node) -> int:
    """Bytes of a node's value that exist once, of all its items where it is a tuple."""
    value = node.meta.get("val")
    items: Iterable[object] = value if isinstance(value, (tuple, list)) else (value,)
    return sum(
        min(t.numel() * t.element_size(), storage_span_bytes(t))
        for t in items
        if isinstance(t, torch.Tensor)
    )
