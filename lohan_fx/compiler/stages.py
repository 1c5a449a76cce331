"""Which stage every node of a joint graph belongs to: the repeated blocks of a model, and the rest.

Blocks are found by structure. Submodules of one parent whose forward nodes are the same sequence of
ops and shapes, each fed by the one before, are the blocks of a chain; what lies before, between and
after chains are stages too. No class and no attribute name is looked at. A model in which nothing
repeats is cut into stretches of about equal cost where few bytes cross.
"""

from __future__ import annotations

import bisect
import hashlib
import itertools
import math
import operator
import re
import statistics
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from lohan_fx.errors import PassError

from .node_costs import node_bytes, node_flops
from .regions import describe_value
from .values import storage_span_bytes, tensor_of, view_source

# Weight of a byte against a FLOP where stages are compared: about the ratio on a GPU, and enough to
# give tables and elementwise work a size.
_FLOPS_PER_BYTE = 100
# A chain that covers less of the forward than this is a detail (two equal layers in a head).
_LEAST_COVERAGE = 0.3
# A sibling that differs from the blocks (the first layer of some models) is one of them if it is at
# least this large beside them.
_LEAST_SIBLING = 0.3
# Work between two blocks is part of the first unless it is larger than this beside a block.
_MOST_GLUE = 0.2


@dataclass(frozen=True, slots=True)
class StageInfo:
    """One stage. `kind` is equal for stages with the same ops and shapes; `name` is a module path."""

    index: int
    name: str
    kind: str
    num_forward_nodes: int


def assign_stages(graph: fx.Graph, *, max_chunks: int = 16) -> tuple[StageInfo, ...]:
    """Set meta["lohan_stage"] on every call of a joint (or forward) graph; return the stages.

    Stages count from 0 in forward order and do not decrease over the forward nodes in graph order. A
    backward node has the stage of the forward op it differentiates. `max_chunks` bounds the stages of
    a model without repeated blocks. Raises PassError for a graph without any call.
    """
    calls = [node for node in graph.nodes if node.op == "call_function"]
    backward = backward_calls(graph)
    forward = [node for node in calls if node not in backward]
    if not forward:
        raise PassError("the graph has no forward computation to divide into stages")
    view = _Forward(forward)
    spans = _chain_spans(view, max_chunks)
    if not spans:
        heavy = sum(1 for node in forward if node_flops(node) > 0)
        spans = _pieces(view, (0, len(view)), max(1, min(max_chunks, heavy)))
    starts = [start for start, _ in spans]
    for index, node in enumerate(forward):
        node.meta["lohan_stage"] = bisect.bisect_right(starts, index) - 1
    _assign_backward([node for node in calls if node in backward], forward)
    return tuple(
        StageInfo(index, view.name(start, end), view.kind(start, end), end - start)
        for index, (start, end) in enumerate(spans)
    )


def backward_calls(graph: fx.Graph) -> set[fx.Node]:
    """Calls that belong to the backward pass of a joint graph.

    These are what tracing tagged so; without a tag, what depends on a tangent and what stands after
    the first such node without being tagged as forward (softmax's backward reads no tangent first).
    """
    found: set[fx.Node] = set()
    tangents = {node for node in graph.find_nodes(op="placeholder") if _is_tangent(node)}
    depends = set(tangents)
    reached = False
    for node in graph.nodes:
        if node.op != "call_function":
            continue
        tag = node.meta.get("partitioner_tag")
        if any(source in depends for source in node.all_input_nodes):
            depends.add(node)
            reached = True
        if tag in ("is_forward", "must_be_in_forward"):
            continue
        tagged = tag in ("is_backward", "must_be_in_backward")
        if tagged or node.meta.get("autograd_backward") or reached:
            found.add(node)
            reached = True
    return found


def _is_tangent(node: fx.Node) -> bool:
    desc = type(node.meta.get("desc")).__name__
    return desc == "TangentAOTInput" or "tangents" in str(node.target)


# --- The forward as a sequence --------------------------------------------------------------------

Span = tuple[int, int]  # [start, end) in forward nodes


class _Forward:
    """The forward nodes with their module paths, signatures and costs."""

    def __init__(self, nodes: Sequence[fx.Node]) -> None:
        self.nodes = nodes
        self.position = {node: index for index, node in enumerate(nodes)}
        self.paths = [module_path(node) for node in nodes]
        self.signatures = [_signature(node) for node in nodes]
        self.costs = [_cost(node) for node in nodes]
        self._sums = [0, *itertools.accumulate(self.costs)]

    def __len__(self) -> int:
        return len(self.nodes)

    def cost(self, start: int, end: int) -> int:
        return self._sums[end] - self._sums[start]

    def position_at(self, cost: float) -> int:
        """The first position with at least `cost` before it."""
        return bisect.bisect_left(self._sums, cost)

    def kind(self, start: int, end: int) -> str:
        text = "\n".join(self.signatures[start:end])
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def name(self, start: int, end: int) -> str:
        """The path that all nodes of a span with a path share; of the costliest if that says nothing."""
        known = [path for path in self.paths[start:end] if path]
        if not known:
            return "(no module)"
        shared = known[0]
        for path in known[1:]:
            same = (a == b for a, b in zip(shared, path, strict=False))
            shared = shared[: sum(itertools.takewhile(bool, same))]
        if len(shared) <= len(self.root()):
            costs: Counter[tuple[str, ...]] = Counter()
            for index in range(start, end):
                if self.paths[index]:
                    costs[self.paths[index]] += self.costs[index] + 1
            shared = max(costs, key=lambda path: costs[path])
        return ".".join(shared[len(self.root()) :] or shared)

    def root(self) -> tuple[str, ...]:
        """The path of the model itself."""
        known = [path for path in self.paths if path]
        shortest = min(known, key=len, default=())
        return tuple(
            part
            for index, part in enumerate(shortest)
            if index < 2 and all(path[index] == part for path in known)
        )

    def feeds(self, first: Span, second: Span) -> bool:
        """True where a value of the first span is read in the second, directly or on the way there."""
        reached = set(self.nodes[first[0] : first[1]])
        for index in range(first[1], second[1]):
            node = self.nodes[index]
            if any(source in reached for source in node.all_input_nodes):
                if index >= second[0]:
                    return True
                reached.add(node)
        return False


def module_path(node: fx.Node) -> tuple[str, ...]:
    """The innermost module a forward node was traced in: ("L", "self", "layers", "0"); () if unknown."""
    return _innermost(node.meta.get("nn_module_stack"))


def _innermost(stack: Any) -> tuple[str, ...]:
    if not stack:
        return ()
    path, _ = list(stack.values())[-1]
    # Dynamo writes L['self'].layers.0 or L['self'].layers._modules['0'].
    parts = re.findall(r"[^.\[\]'\"]+", str(path))
    return tuple(part for part in parts if part not in ("_modules", "_orig_mod"))


def _signature(node: fx.Node) -> str:
    value = node.meta.get("val")
    values = value if isinstance(value, (list, tuple)) else (value,)
    target = node.target
    name = str(target) if isinstance(target, torch._ops.OpOverload) else type(target).__name__
    if target is operator.getitem:
        name = f"getitem {node.args[1]}"
    return f"{name} {' '.join(_shape(item) for item in values)}"


def _shape(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        return f"{value.dtype}{list(value.shape)}"
    return describe_value(value) if value is None else type(value).__name__


def _cost(node: fx.Node) -> int:
    return node_flops(node) + _FLOPS_PER_BYTE * node_bytes(node)


# --- Chains of blocks -----------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Chain:
    """Blocks of one parent, in order. Spans do not overlap; glue between them is inside them."""

    spans: tuple[Span, ...]
    cost: int

    @property
    def hull(self) -> Span:
        return self.spans[0][0], self.spans[-1][1]


def _chain_spans(view: _Forward, max_chunks: int) -> list[Span]:
    """Spans of all stages where blocks repeat, covering every forward node; [] where none do."""
    chosen: list[_Chain] = []
    for chain in _preferred(_all_chains(view)):
        start, end = chain.hull
        if all(end <= other.hull[0] or other.hull[1] <= start for other in chosen):
            chosen.append(chain)
    covered = sum(chain.cost for chain in chosen)
    covered_nodes = sum(end - start for chain in chosen for start, end in chain.spans)
    share = max(covered / max(view.cost(0, len(view)), 1), covered_nodes / len(view))
    if share < _LEAST_COVERAGE:
        return []
    spans = sorted(span for chain in chosen for span in chain.spans)
    return _divide_rest(view, spans, max_chunks)


def _divide_rest(view: _Forward, blocks: Sequence[Span], max_chunks: int) -> list[Span]:
    """`blocks` and the rest; rest much larger than a block is cut where little crosses, if anywhere."""
    crossing = _crossing_bytes(view)
    block_cost = statistics.median(view.cost(*span) for span in blocks)
    block_crossing = statistics.median(
        crossing[at] for span in blocks for at in span if at in crossing
    )
    known = set(blocks)
    result: list[Span] = []
    for span in _fill(blocks, len(view)):
        count = min(int(view.cost(*span) / max(block_cost, 1)), max_chunks)
        if span in known or count < 2:
            result.append(span)
        else:
            result += _pieces(view, span, count, most_crossing=1.5 * block_crossing)
    return result


def _fill(spans: Sequence[Span], length: int) -> list[Span]:
    """`spans` and what lies before, between and after them."""
    result: list[Span] = []
    at = 0
    for start, end in spans:
        if at < start:
            result.append((at, start))
        result.append((start, end))
        at = end
    if at < length:
        result.append((at, length))
    return result


def _preferred(chains: list[_Chain]) -> list[_Chain]:
    """Chains, best first: most cost covered; of two that cover about the same, the one with more blocks
    if the other has very few (two halves of a network are no blocks)."""

    def rank(chain: _Chain) -> tuple[float, int]:
        inner = [
            other
            for other in chains
            if other is not chain
            and chain.hull[0] <= other.hull[0]
            and other.hull[1] <= chain.hull[1]
        ]
        finer = sum(len(other.spans) for other in _disjoint(inner))
        finer_cost = sum(other.cost for other in _disjoint(inner))
        coarse = len(chain.spans) < 4 and finer >= 2 * len(chain.spans)
        demoted = coarse and finer_cost >= 0.9 * chain.cost
        return (0.0 if demoted else float(chain.cost), len(chain.spans))

    return sorted(chains, key=rank, reverse=True)


def _disjoint(chains: list[_Chain]) -> list[_Chain]:
    chosen: list[_Chain] = []
    for chain in sorted(chains, key=lambda chain: chain.cost, reverse=True):
        start, end = chain.hull
        if all(end <= other.hull[0] or other.hull[1] <= start for other in chosen):
            chosen.append(chain)
    return chosen


def _all_chains(view: _Forward) -> list[_Chain]:
    reach: dict[tuple[str, ...], Span] = {}  # path -> first to past last node inside it
    for index, path in enumerate(view.paths):
        for depth in range(1, len(path) + 1):
            start, _ = reach.get(path[:depth], (index, index))
            reach[path[:depth]] = (start, index + 1)
    chains = []
    for path, span in sorted(reach.items()):
        chains += _chains_of(view, path, span)
        chains += _loops_of(view, span)
    return chains


def _chains_of(view: _Forward, parent: tuple[str, ...], span: Span) -> list[_Chain]:
    """Chains among the children of `parent`: maximal runs of siblings that feed one another."""
    runs = _child_runs(view, parent, span)
    counts = Counter(view.kind(*span) for span in runs)
    typical = max((view.cost(*span) for span in runs if counts[view.kind(*span)] > 1), default=0)
    if typical == 0:
        return []
    # Odd siblings of a block's size are blocks too; small ones (norms, activations) are glue.
    blocks = [run for run in runs if view.cost(*run) >= _LEAST_SIBLING * typical]
    groups: list[list[Span]] = []
    for block in blocks:
        if groups and _follows(view, groups[-1][-1], block):
            groups[-1].append(block)
        else:
            groups.append([block])
    return [chain for group in groups for chain in _finished(view, group)]


def _follows(view: _Forward, before: Span, after: Span) -> bool:
    glue = view.cost(before[1], after[0])
    smaller = min(view.cost(*before), view.cost(*after))
    return view.feeds(before, after) and glue <= _MOST_GLUE * smaller


def _finished(view: _Forward, blocks: Sequence[Span]) -> list[_Chain]:
    """The chain of `blocks`, each with the glue after it; none where less than half is alike."""
    if len(blocks) < 2:
        return []
    counts = Counter(view.kind(*span) for span in blocks)
    alike = sum(view.cost(*span) for span in blocks if counts[view.kind(*span)] > 1)
    if 2 * alike < sum(view.cost(*span) for span in blocks):
        return []
    spans = [(start, following[0]) for (start, _), following in itertools.pairwise(blocks)]
    start, end = blocks[-1]
    # The last block ends with the same glue as the one before it, where that follows it too.
    glue = view.signatures[blocks[-2][1] : blocks[-1][0]]
    if glue and view.signatures[end : end + len(glue)] == glue:
        end += len(glue)
    spans.append((start, end))
    return [_Chain(tuple(spans), sum(view.cost(*span) for span in spans))]


def _child_runs(view: _Forward, parent: tuple[str, ...], span: Span) -> list[Span]:
    """Stretches of forward nodes in `span` that lie in one child of `parent`, in order."""
    depth = len(parent)
    runs: list[Span] = []
    current: str | None = None
    for index in range(*span):
        path = view.paths[index]
        if len(path) <= depth or path[:depth] != parent:
            # Nodes of no module (seeds, casts) do not end a run; nodes of another module do.
            if path and path[:depth] != parent:
                current = None
            continue
        child = path[depth]
        if child == current:
            runs[-1] = (runs[-1][0], index + 1)
        else:
            runs.append((index, index + 1))
            current = child
    return runs


def _loops_of(view: _Forward, span: Span) -> list[_Chain]:
    """A chain where one module is called again and again, as with shared layers."""
    start, end = span
    period = _period(view.signatures[start:end])
    if period == end - start:
        return []
    spans = tuple((at, at + period) for at in range(start, end, period))
    if not all(view.feeds(*pair) for pair in itertools.pairwise(spans)):
        return []
    return [_Chain(spans, view.cost(start, end))]


def _period(items: Sequence[str]) -> int:
    """Length of the shortest stretch that `items` is a whole number of repeats of."""
    border = [0] * len(items)
    length = 0
    for index in range(1, len(items)):
        while length and items[index] != items[length]:
            length = border[length - 1]
        if items[index] == items[length]:
            length += 1
        border[index] = length
    period = len(items) - border[-1]
    return period if len(items) % period == 0 else len(items)


# --- Without blocks -------------------------------------------------------------------------------


def _pieces(
    view: _Forward, span: Span, count: int, *, most_crossing: float = math.inf
) -> list[Span]:
    """At most `count` pieces of `span` of about equal cost, cut where the fewest bytes cross."""
    crossing = _crossing_bytes(view)
    start, end = span
    before = view.cost(0, start)
    total = view.cost(start, end)
    cuts = [start]
    for number in range(1, count):
        lowest, ideal, highest = (
            view.position_at(before + total * (number + shift) / count)
            for shift in (-0.5, 0.0, 0.5)
        )
        allowed = [
            at
            for at in range(max(lowest, cuts[-1] + 1), min(highest + 1, end))
            if at in crossing and crossing[at] <= most_crossing
        ]
        if allowed:
            cuts.append(min(allowed, key=lambda at: (crossing[at], abs(at - ideal))))
    return list(itertools.pairwise([*cuts, end]))


def _crossing_bytes(view: _Forward) -> dict[int, int]:
    """Bytes of forward values alive across each place where the forward may be cut."""
    change = [0] * (len(view) + 1)
    joined = [0] * (len(view) + 1)
    for index, node in enumerate(view.nodes):
        last = max((view.position.get(user, index) for user in node.users), default=index)
        value = tensor_of(node)
        if value is not None and view_source(node) is None:
            for at, sign in ((index + 1, 1), (last + 1, -1)):
                change[min(at, len(view))] += sign * storage_span_bytes(value)
        if isinstance(node.meta.get("val"), (tuple, list)):
            joined[index + 1] += 1
            joined[min(last + 1, len(view))] -= 1
    tuples = list(itertools.accumulate(joined))
    crossing = list(itertools.accumulate(change))
    return {at: crossing[at] for at in range(1, len(view)) if tuples[at] == 0}


# --- Backward -------------------------------------------------------------------------------------


def _assign_backward(backward: Sequence[fx.Node], forward: Sequence[fx.Node]) -> None:
    """Give each backward node the stage of its forward op; nodes without one follow their neighbour."""
    by_sequence: dict[int, int] = {}
    by_path: dict[tuple[str, ...], set[int]] = {}
    for node in forward:
        stage = node.meta["lohan_stage"]
        if node.meta.get("seq_nr") is not None:
            by_sequence[node.meta["seq_nr"]] = stage
        by_path.setdefault(module_path(node), set()).add(stage)

    def origin(node: fx.Node) -> int | None:
        by_stack = by_path.get(_innermost(node.meta.get("fwd_nn_module_stack")), set())
        by_number = by_sequence.get(node.meta.get("seq_nr", -1))
        if by_number in by_stack or len(by_stack) != 1:
            return by_number
        return next(iter(by_stack))

    found = [(node, stage) for node in backward if (stage := origin(node)) is not None]
    # Sums of a tied weight's gradients carry the number of whatever ran last. Autograd runs from the
    # last op to the first, so what does not fit into a descending order is such a stray.
    trusted = {found[i][0]: found[i][1] for i in _descending([stage for _, stage in found])}
    last_stage = max((node.meta["lohan_stage"] for node in forward), default=0)
    stage = last_stage
    for node in backward:
        stage = trusted.get(node, stage)
        node.meta["lohan_stage"] = stage


def settle_stragglers(graph: fx.Graph) -> None:
    """Move forward nodes of an earlier stage that stand in a later one up to what they read.

    Partitioning appends to the forward what backward would compute from forward values alone (a
    layer norm's 1 / width, say), last stage first; left there, each would be a region of its own.
    """
    position = {node: index for index, node in enumerate(graph.nodes)}
    stage = -1
    for node in list(graph.nodes):
        own = node.meta.get("lohan_stage")
        if node.op != "call_function" or own is None:
            continue
        if own >= stage or node.is_impure():
            stage = max(stage, own)
            continue
        sources = [source for source in node.all_input_nodes if source.op == "call_function"]
        if sources:
            last = max(sources, key=position.__getitem__)
            last.append(node)
            position[node] = position[last]


def _descending(values: Sequence[int]) -> list[int]:
    """Positions of a longest subsequence of `values` that does not increase."""
    ends: list[int] = []  # negated last value of the best subsequence of each length
    at: list[int] = []  # its position
    previous: list[int] = []
    for index, value in enumerate(values):
        length = bisect.bisect_right(ends, -value)
        previous.append(at[length - 1] if length else -1)
        if length == len(ends):
            ends.append(-value)
            at.append(index)
        else:
            ends[length] = -value
            at[length] = index
    result = []
    index = at[-1] if at else -1
    while index >= 0:
        result.append(index)
        index = previous[index]
    return result[::-1]
