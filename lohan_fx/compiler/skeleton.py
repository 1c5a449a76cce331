"""A rewritten graph as a straight-line Python function, and what it holds in memory line by line.

[Note: the skeleton is the order]
Moves run in the order of the graph because the generated source lists them in that order. Inductor
sees regions of compute only, so nothing it does (dead code, reordering, reuse of buffers) can reach
a move or a value that one is copying.
"""

from __future__ import annotations

import itertools
import logging
import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensorMode

from lohan_fx.ops import is_move, watcher_of

from .emit import Boxed, Emitted, emit
from .region_compilers import RegionCompiler
from .regions import Cut, Region, cut, is_symbolic, region_of
from .values import storage_span_bytes, tensor_of, view_source

_log = logging.getLogger(__name__)

# Below this many regions, having many distinct ones says nothing about how they grow with depth.
_MANY_REGIONS = 64


@dataclass(frozen=True, eq=False)
class Skeleton:
    """A lowered graph. Call it with one list of inputs, which it empties; it returns a list."""

    cut: Cut
    emitted: Emitted
    boxed: Mapping[fx.Node, Boxed]
    # How AOTAutograd asks for the list convention. Its wrappers copy what is in __dict__, hence a
    # field, and no slots.
    _boxed_call: bool = True

    def __call__(self, args: list[Any]) -> Sequence[Any]:
        watcher = watcher_of(self.runtime_number)
        return (self.emitted if watcher is None else self.watched).run(args)

    @cached_property
    def runtime_number(self) -> int:
        """Of the runtime that its moves go to; 0 where it has none."""
        for node in self.graph.nodes:
            if is_move(node):
                return int(node.args[0])
        return 0

    @cached_property
    def watched(self) -> Emitted:
        """The same program, which tells the runtime's watcher where it is."""
        return emit(
            self.graph,
            name="skeleton",
            boxed=self.boxed,
            attributes=self.cut.attributes,
            watcher=partial(watcher_of, self.runtime_number),
        )

    @property
    def source(self) -> str:
        return self.emitted.source

    @property
    def graph(self) -> fx.Graph:
        return self.cut.graph

    @property
    def num_regions(self) -> int:
        return self.cut.num_regions

    @property
    def num_distinct(self) -> int:
        return len(self.cut.regions)


def lower(module: fx.GraphModule, compiler: RegionCompiler, fake_mode: FakeTensorMode) -> Skeleton:
    """`module` cut into regions, each distinct one compiled, as one function.

    Raises PassError where the graph cannot be cut (see `regions.cut`).
    """
    return assemble(cut(module), compiler, fake_mode)


def assemble(parts: Cut, compiler: RegionCompiler, fake_mode: FakeTensorMode) -> Skeleton:
    """The second half of `lower`, for a graph that has been cut already."""
    boxed: dict[fx.Node, Boxed] = {}
    for node in parts.graph.nodes:
        region = region_of(node)
        if region is not None:
            boxed[node] = compiler.compile(region, fake_mode)
    if parts.num_regions >= _MANY_REGIONS and 2 * len(parts.regions) > parts.num_regions:
        _log.warning(
            "%d of %d regions are distinct; compile time grows with depth "
            "(layers differ in shapes, constants or where the plan moves values)",
            len(parts.regions),
            parts.num_regions,
        )
    emitted = emit(parts.graph, name="skeleton", boxed=boxed, attributes=parts.attributes)
    return Skeleton(parts, emitted, boxed)


# --- What is alive when -------------------------------------------------------------------------

# Bytes that a region needs at its peak beyond all its inputs and outputs, given the positions of the
# inputs that die in it. Negative where inputs are freed before outputs are made.
Workspace = Callable[[Region, frozenset[int]], int]


def _root(node: fx.Node) -> fx.Node:
    while (source := view_source(node)) is not None:
        node = source
    return node


def _span(node: fx.Node) -> int:
    value = tensor_of(node)
    if value is None or is_symbolic(value):  # the state of the host's random generator
        return 0
    return storage_span_bytes(value)


@dataclass(slots=True)
class _Storage:
    """One block of memory: its size and the first and last line at which it is alive."""

    nbytes: int
    first: int
    last: int


def memory_timeline(
    graph: fx.Graph,
    *,
    owned_by_runtime: Callable[[fx.Node], bool] = lambda node: False,
    workspace: Workspace | None = None,
) -> list[tuple[str, int]]:
    """Bytes alive at each line of a skeleton graph, as (node name, bytes); the inputs come first.

    Views count with their base, once. A value that is being copied out is alive until its
    offload_wait, one that is brought back from its reload on. Storages whose owner satisfies
    `owned_by_runtime` (fetched parameters, say) are left out: the runtime accounts for them.
    A line counts its inputs, its outputs and the workspace of its region.
    """
    workspace = workspace or _Workspaces()
    lines = [node for node in graph.nodes if node.op != "placeholder" and not _is_result(node)]
    position = {node: index for index, node in enumerate(lines, start=1)}
    for node in graph.nodes:
        if node.op == "placeholder":
            position[node] = 0
        elif _is_result(node):
            position[node] = position[node.all_input_nodes[0]]
    roots = _storage_roots(graph)
    storages: dict[fx.Node, _Storage] = {}
    for node in graph.nodes:
        root = roots.get(node)
        if root is None or owned_by_runtime(root) or owned_by_runtime(node):
            continue
        line = position[node]
        storage = storages.setdefault(root, _Storage(0, line, line))
        storage.nbytes = max(storage.nbytes, _base_bytes(node))
        storage.last = max(storage.last, line, *(position[user] for user in node.users))
    _stretch_over_copies(graph, position, roots, storages)

    change = [0] * (len(lines) + 2)
    for storage in storages.values():
        change[storage.first] += storage.nbytes
        change[storage.last + 1] -= storage.nbytes
    live = list(itertools.accumulate(change))
    for node in lines:
        region = region_of(node)
        if region is not None:
            line = position[node]
            dying = frozenset(
                index
                for index, source in enumerate(node.all_input_nodes)
                if roots.get(source) in storages and storages[roots[source]].last == line
            )
            live[line] += workspace(region, dying)
    return [("inputs", live[0])] + [(node.name, live[position[node]]) for node in lines]


def _is_result(node: fx.Node) -> bool:
    """True for a getitem that unpacks a region call: it is part of that call's line."""
    return node.target is operator.getitem and region_of(node.all_input_nodes[0]) is not None


def _base_bytes(node: fx.Node) -> int:
    """Bytes of the storage behind a value, as far as the value and its fake storage tell."""
    region = region_of(node.all_input_nodes[0]) if _is_result(node) else None
    if region is None:
        return _span(node)
    index = node.args[1]
    assert isinstance(index, int)
    return max(_span(node), _span(_root(region.results[index])))


def _storage_roots(graph: fx.Graph) -> dict[fx.Node, fx.Node]:
    """For each tensor of a skeleton graph, the first tensor with the same storage."""
    roots: dict[fx.Node, fx.Node] = {}
    inputs: dict[int, fx.Node] = {}  # saved values may be views of one storage
    inside: dict[tuple[fx.Node, fx.Node], fx.Node] = {}
    for node in graph.nodes:
        value = tensor_of(node)
        if value is None:
            continue
        if node.op == "placeholder":
            roots[node] = inputs.setdefault(value.untyped_storage()._cdata, node)
        elif _is_result(node):
            call, index = node.all_input_nodes[0], node.args[1]
            region = region_of(call)
            assert region is not None and isinstance(index, int)
            owner = _root(region.results[index])
            if owner.op == "placeholder":
                position = region.graph.find_nodes(op="placeholder").index(owner)
                roots[node] = roots.get(call.all_input_nodes[position], node)
            else:
                roots[node] = inside.setdefault((call, owner), node)
        else:
            base = _root(node)
            roots[node] = roots.get(base, node)
    return roots


def _stretch_over_copies(
    graph: fx.Graph,
    position: dict[fx.Node, int],
    roots: dict[fx.Node, fx.Node],
    storages: dict[fx.Node, _Storage],
) -> None:
    """The runtime holds the source of an offload until its wait, the target of a reload before it."""
    leaving: dict[Any, _Storage] = {}
    arriving: dict[Any, int] = {}
    for node in graph.nodes:
        if not is_move(node):
            continue
        name = node.target._schema.name.removeprefix("lohan::")
        slot = node.args[1] if len(node.args) > 1 else None
        if name == "offload" and roots.get(node.args[2]) in storages:
            leaving[slot] = storages[roots[node.args[2]]]
        elif name == "offload_wait" and slot in leaving:
            storage = leaving.pop(slot)
            storage.last = max(storage.last, position[node])
        elif name == "reload":
            arriving[slot] = position[node]
        elif name == "reload_wait" and slot in arriving and node in storages:
            storages[node].first = min(storages[node].first, arriving[slot])


class _Workspaces:
    """region_workspace_bytes, computed once for each region and set of dying inputs."""

    def __init__(self) -> None:
        self._known: dict[tuple[Region, frozenset[int]], int] = {}

    def __call__(self, region: Region, dying: frozenset[int]) -> int:
        key = (region, dying)
        if key not in self._known:
            self._known[key] = region_workspace_bytes(region.graph, dying)
        return self._known[key]


_POINTWISE = frozenset(
    {
        torch.ops.aten._to_copy.default,
        torch.ops.aten.full.default,
        torch.ops.aten.scalar_tensor.default,
        torch.ops.aten.arange.start_step,
        torch.ops.aten.where.self,
        torch.ops.prims.iota.default,
        torch.ops.prims.convert_element_type.default,
        torch.ops.prims.inductor_random.default,
    }
)
# Fused into their reader, but what they read has to be in memory.
_INDIRECT = frozenset(
    {
        torch.ops.aten.embedding.default,
        torch.ops.aten.gather.default,
        torch.ops.aten.index.Tensor,
        torch.ops.aten.index_select.default,
    }
)
_REDUCTIONS = frozenset(
    {
        torch.ops.aten.sum.default,
        torch.ops.aten.sum.dim_IntList,
        torch.ops.aten.mean.default,
        torch.ops.aten.mean.dim,
        torch.ops.aten.amax.default,
        torch.ops.aten.amin.default,
        torch.ops.aten.prod.default,
        torch.ops.aten.var_mean.correction,
        torch.ops.aten.var.correction,
    }
)


def _tagged(node: fx.Node, tag: str) -> bool:
    wanted = getattr(torch.Tag, tag, None)  # the reduction tag is newer than the oldest torch
    return wanted is not None and wanted in getattr(node.target, "tags", ())


def _is_fusible(node: fx.Node) -> bool:
    """True where Inductor may compute the value inside its reader's kernel."""
    if node.op != "call_function":
        return False
    return node.target in _POINTWISE or node.target in _INDIRECT or _tagged(node, "pointwise")


def _is_reduction(node: fx.Node) -> bool:
    return node.target in _REDUCTIONS or _tagged(node, "reduction")


def _reads_from_memory(reader: fx.Node, value: fx.Node) -> bool:
    """True where `reader` needs its argument `value` as a tensor in memory."""
    if reader.op == "output" or reader.target in _INDIRECT:
        return True
    return not (_is_fusible(reader) or _is_reduction(reader))


def _readers_through_views(node: fx.Node) -> list[fx.Node]:
    found = []
    for user in node.users:
        if view_source(user) is not None or user.target is operator.getitem:
            found += _readers_through_views(user)
        else:
            found.append(user)
    return found


def region_workspace_bytes(
    graph: fx.Graph, dying: frozenset[int] = frozenset(), *, fused: bool = True
) -> int:
    """Peak bytes of a region's run, less all its inputs and outputs. An estimate.

    Pointwise results are taken to live in registers unless a kernel that is not pointwise reads them
    (matmul, attention, convolution, indexing) or a reduction shares them with another reader. With
    `fused` False every result is in memory. `dying` are the positions of inputs that the caller gives
    up: they are freed after their last reader, so the result may be negative.
    """
    nodes = [node for node in graph.nodes if node.op != "output"]
    inputs = [node for node in nodes if node.op == "placeholder"]
    order = {node: index for index, node in enumerate(graph.nodes)}
    results = {_root(node) for node in graph.output_node().all_input_nodes}
    in_memory = {node for node in inputs if tensor_of(node) is not None}
    for node in nodes:
        if node.op != "call_function" or tensor_of(node) is None or view_source(node) is not None:
            continue
        readers = _readers_through_views(node)
        shared_with_reduction = len(readers) > 1 and any(_is_reduction(r) for r in readers)
        if (
            not fused
            or not _is_fusible(node)
            or node in results
            or shared_with_reduction
            or any(_reads_from_memory(reader, node) for reader in readers)
        ):
            in_memory.add(node)

    # When a node's reading really happens: with the last kernel that it was fused into.
    runs_at: dict[fx.Node, int] = {}
    for node in reversed(nodes):
        # Values in memory, views of them and tuples are read where they stand.
        fused_away = node not in in_memory and _is_fusible(node)
        passes_on = fused_away or view_source(node) is not None or node.target is operator.getitem
        users = [runs_at[user] for user in node.users if user in runs_at] if passes_on else []
        runs_at[node] = max([order[node], *users])

    end = len(order)
    change = [0] * (end + 2)
    for node in in_memory:
        if _root(node) is not node:
            continue
        nbytes = _span(node)
        kept = node in results or (node in inputs and inputs.index(node) not in dying)
        first = 0 if node in inputs else order[node]
        read_at = [runs_at[user] for user in node.users if user in runs_at]
        last = end if kept else max([first, *read_at])
        change[first] += nbytes
        change[last + 1] -= nbytes
    peak = max(itertools.accumulate(change))
    held = sum(_span(node) for node in inputs)
    made = sum(_span(node) for node in results if node not in inputs)
    return peak - held - made
