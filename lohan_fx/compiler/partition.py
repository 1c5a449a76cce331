"""Which activations may be saved for backward, and the split of a joint graph for a given choice.

functorch's min cut says which values are worth saving when memory is plenty (what is cheap to recompute
inside a fused kernel is not among them). The split then saves exactly the chosen ones: given those,
there is nothing to optimise, and the graphs are extracted directly.
"""

from __future__ import annotations

import copy
import operator
from collections.abc import Container, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch._functorch import partitioners
from torch._functorch.compile_utils import fx_graph_cse
from torch.fx._lazy_graph_module import _make_graph_module
from torch.utils.checkpoint import CheckpointPolicy

from lohan_fx.errors import PassError

from .values import is_dense, storage_root, storage_span_bytes, tensor_of, view_source, views_of


@dataclass(frozen=True, slots=True)
class Candidate:
    """One op's results that backward may need: kept, swapped or recomputed together.

    `can_recompute` is False for values that cross a stage, random ones and attention outputs;
    `can_swap` for those that cannot be copied as a block of bytes or that the caller also holds.
    """

    index: int
    nodes: tuple[fx.Node, ...]
    nbytes: int
    can_recompute: bool
    can_swap: bool

    @property
    def name(self) -> str:
        return self.nodes[0].name


@dataclass(frozen=True, slots=True)
class Joint:
    """A joint forward and backward graph with what is known about its inputs and outputs."""

    module: fx.GraphModule
    inputs: Sequence[Any]
    num_forward_outputs: int
    param_of: dict[fx.Node, int]  # placeholder -> pid of the managed parameter
    options: dict[str, Any]  # passed through to the partitioner

    @property
    def graph(self) -> fx.Graph:
        return self.module.graph


def backward_nodes(graph: fx.Graph) -> set[fx.Node]:
    """Nodes that depend on a tangent."""
    found: set[fx.Node] = set()
    for node in graph.nodes:
        is_tangent = node.op == "placeholder" and "tangents" in str(node.target)
        if is_tangent or (
            node.op != "placeholder" and any(a in found for a in node.all_input_nodes)
        ):
            found.add(node)
    return found


def param_derived(joint: Joint) -> set[fx.Node]:
    """Managed parameters, their views and their casts: re-fetched in backward, never saved."""
    derived: set[fx.Node] = set(joint.param_of)
    casts = {torch.ops.prims.convert_element_type.default, torch.ops.aten._to_copy.default}
    for node in joint.graph.nodes:
        if node.op != "call_function":
            continue
        source = view_source(node)
        if source is None and node.target in casts:
            source = node.args[0]
        if source in derived:
            derived.add(node)
    return derived


def is_random(node: fx.Node) -> bool:
    tags = getattr(node.target, "tags", ())
    return torch.Tag.nondeterministic_seeded in tags


def _is_random_tensor(node: fx.Node) -> bool:
    return is_random(node) and tensor_of(node) is not None


def find_candidates(joint: Joint, worth_saving: Iterable[str]) -> list[Candidate]:
    """Everything worth saving, in forward order.

    To the values of the unconstrained min cut, whose names are `worth_saving`, are added those that
    cross from one stage into another, so that recomputing anything never reaches beyond its own stage.
    """
    graph = joint.graph
    backward = backward_nodes(graph)
    derived = param_derived(joint)
    by_name = {node.name: node for node in graph.nodes}
    order = {node: position for position, node in enumerate(graph.nodes)}
    output = graph.output_node()
    returned = {
        storage_root(node)
        for node in output.args[0][: joint.num_forward_outputs]  # type: ignore[index,union-attr]
        if isinstance(node, fx.Node)
    }
    needed = _needed_by_backward(graph, backward, derived)

    chosen: dict[fx.Node, bool] = {}  # storage owner -> may be recomputed
    for name in worth_saving:
        node = by_name.get(name)
        if node is None:
            continue
        root = storage_root(node)
        if root.op == "call_function" and root not in derived and root not in backward:
            chosen[root] = True
    constant = _constants(graph)
    for node in graph.nodes:
        if node.op != "call_function" or node in backward or node in derived or node not in needed:
            continue
        if tensor_of(node) is None or view_source(node) is not None or node in constant:
            continue
        if _crosses(node, backward):
            chosen[node] = False
    for node in graph.nodes:
        if node.op == "call_function" and is_random(node) and node not in backward:
            outputs = [node] if tensor_of(node) is not None else list(node.users)
            for result in outputs:
                if result in needed and result not in derived:
                    chosen[result] = False

    groups: dict[fx.Node, list[fx.Node]] = {}
    for node in sorted(chosen, key=order.__getitem__):
        groups.setdefault(_producer(node), []).append(node)
    candidates = []
    for index, nodes in enumerate(groups.values()):
        tensors = [t for node in nodes if (t := tensor_of(node)) is not None]
        candidates.append(
            Candidate(
                index=index,
                nodes=tuple(nodes),
                nbytes=sum(storage_span_bytes(t) for t in tensors),
                can_recompute=all(chosen[node] for node in nodes),
                can_swap=all(is_dense(t) and t.numel() > 0 for t in tensors)
                and not any(node in returned for node in nodes),
            )
        )
    return candidates


def recompute_closure(
    candidate: Candidate, saved: set[fx.Node], derived: set[fx.Node]
) -> tuple[set[fx.Node], set[fx.Node]]:
    """What recomputing a candidate alone takes.

    Returns (nodes run again, other candidates' nodes that must be present). Inputs of the graph and
    parameters are always present.
    """
    run: set[fx.Node] = set()
    needs: set[fx.Node] = set()
    stack = list(candidate.nodes)
    while stack:
        node = stack.pop()
        if node in run:
            continue
        run.add(node)
        for source in node.all_input_nodes:
            if source.op == "placeholder" or source in derived:
                continue
            if source in saved and source not in candidate.nodes:
                needs.add(source)
            else:
                stack.append(source)
    return run, needs


def split(joint: Joint, saved: Iterable[fx.Node]) -> tuple[fx.GraphModule, fx.GraphModule]:
    """The forward and backward graphs in which exactly `saved` (and inputs) go across.

    `saved` are storage owners of the forward. What backward does not need of them is not saved. What it
    computes again stands right before its first reader there, as autograd would come to it. The joint
    graph is used up.
    """
    keep = {node.name for node in saved}
    module = joint.module
    module.graph.eliminate_dead_code()
    graph = fx_graph_cse(module.graph)
    backward = backward_nodes(graph)
    if _must_be_tagged(graph, backward):
        module.graph = graph
        return _tagged_split(joint, keep, backward)
    across = _read_across(graph, joint.num_forward_outputs, keep, backward)
    # Those that torch may not check for later writes come last.
    across.sort(key=lambda node: bool(node.meta.get("saved_tensor_with_no_vc_check")))
    results, described = _results(graph), graph.output_node().meta.get("desc")
    count = joint.num_forward_outputs
    placeholders = graph.find_nodes(op="placeholder")

    ahead = _Extract([node for node in placeholders if node not in backward])
    ahead.want(node for node in (*results[:count], *across) if isinstance(node, fx.Node))
    ahead.want(node for node in graph.nodes if _acts(node) and node not in backward)
    ahead.take(graph.nodes)
    behind = _Extract([*across, *(node for node in placeholders if node in backward)])
    behind.want(node for node in results[count:] if isinstance(node, fx.Node))
    behind.want(node for node in graph.nodes if _acts(node) and node in backward)
    behind.take(graph.nodes, after=backward)
    return (
        _make_graph_module(module, ahead.returning([*results[:count], *across])),
        _make_graph_module(
            module, behind.returning(results[count:], described and described[count:])
        ),
    )


def _acts(node: fx.Node) -> bool:
    return node.op == "call_function" and node.is_impure()


class _Extract:
    """A graph of some inputs and of what is wanted that can be computed from them.

    The inputs may be any nodes of the graph it is taken from; they keep their names and metadata.
    """

    def __init__(self, inputs: Iterable[fx.Node]) -> None:
        self._new = fx.Graph()
        self._copies: dict[fx.Node, fx.Node] = {}
        self._wanted: set[fx.Node] = set()
        for node in inputs:
            self._copies[node] = placeholder = self._new.placeholder(node.name)
            placeholder.meta = copy.copy(node.meta)

    def want(self, nodes: Iterable[fx.Node]) -> None:
        """These, and all that they are computed from."""
        stack = list(nodes)
        while stack:
            node = stack.pop()
            if node in self._wanted or node in self._copies:
                continue
            if node.op == "placeholder":
                raise PassError(f"{node.name} is read in a pass that does not get it")
            self._wanted.add(node)
            stack += node.all_input_nodes

    def take(self, nodes: Iterable[fx.Node], after: Container[fx.Node] | None = None) -> None:
        """Copy what is wanted, in order. With `after`, what comes before the first wanted node in there is
        copied only where something later reads it, right before that."""
        ordered = [node for node in nodes if node in self._wanted]
        first = 0
        if after is not None:
            first = next((i for i, node in enumerate(ordered) if node in after), 0)
        position = {node: i for i, node in enumerate(ordered)}
        for node in ordered[first:]:
            missing, stack = set(), [node]
            while stack:
                each = stack.pop()
                if each not in missing and each not in self._copies:
                    missing.add(each)
                    stack += each.all_input_nodes
            for each in sorted(missing, key=position.__getitem__):
                self._copy(each)

    def _copy(self, node: fx.Node) -> None:
        """With what unpacks it."""
        if node in self._copies:
            return
        self._copies[node] = self._new.node_copy(node, self._copies.__getitem__)
        for user in node.users:
            if user.target is operator.getitem and user in self._wanted:
                self._copy(user)

    def returning(self, results: Sequence[Any], described: Any = None) -> fx.Graph:
        """The graph, with these outputs."""
        found = (self._copies[r] if isinstance(r, fx.Node) else r for r in results)
        output = self._new.output(tuple(found))
        output.meta["desc"] = described
        return self._new


def _read_across(
    graph: fx.Graph, num_forward_outputs: int, keep: set[str], backward: set[fx.Node]
) -> list[fx.Node]:
    """Inputs and values of the forward that backward reads, in order; the rest of what it needs it
    makes again from these."""
    stack = [node for node in _results(graph)[num_forward_outputs:] if isinstance(node, fx.Node)]
    reached: set[fx.Node] = set()
    across: set[fx.Node] = set()
    while stack:
        node = stack.pop()
        if node in reached:
            continue
        reached.add(node)
        if node in backward:
            stack += node.all_input_nodes
        elif (
            node.op == "placeholder"
            or node.name in keep
            or (is_random(node) and tensor_of(node) is not None)
        ):
            across.add(node)
        else:
            stack += node.all_input_nodes
    return [node for node in graph.nodes if node in across]


def _results(graph: fx.Graph) -> Sequence[Any]:
    """The graph's outputs: nodes, or None."""
    outputs = graph.output_node().args[0]
    assert isinstance(outputs, tuple | list)
    return outputs


def _must_be_tagged(graph: fx.Graph, backward: set[fx.Node]) -> bool:
    """True for graphs whose split has rules of its own: symbolic sizes, random state of the graph,
    effects that must happen once, inputs written to in backward, or no backward at all."""
    for node in graph.nodes:
        if node.op == "placeholder":
            value = node.meta.get("val")
            if not isinstance(value, torch.Tensor) or "seed" in str(node.target):
                return True
        elif node.op == "call_function":
            if isinstance(node.target, torch._ops.HigherOrderOperator):
                return True
            if node.target is torch.ops.aten.copy_.default and node in backward:
                return True
            if node.meta.get("partitioner_tag") == "must_be_in_backward":
                return True
    return not any(node.op == "call_function" for node in backward)


def _tagged_split(
    joint: Joint, keep: set[str], backward: set[fx.Node]
) -> tuple[fx.GraphModule, fx.GraphModule]:
    """The split by functorch's partitioner, which is told of every forward node what to do."""
    for node in joint.graph.nodes:
        if node.op != "call_function" or node in backward:
            continue
        must_save = node.name in keep or is_random(node)
        policy = CheckpointPolicy.MUST_SAVE if must_save else CheckpointPolicy.MUST_RECOMPUTE
        node.meta["recompute"] = policy
        node.meta["ac_graph_id"] = 0
    return _min_cut(joint.module, joint)


def _min_cut(module: fx.GraphModule, joint: Joint) -> tuple[fx.GraphModule, fx.GraphModule]:
    return partitioners.min_cut_rematerialization_partition(  # type: ignore[no-any-return]
        module, joint.inputs, num_fwd_outputs=joint.num_forward_outputs, **joint.options
    )


def worth_saving(joint: Joint) -> list[str]:
    """Names of what the partitioner saves by itself (parameters' views excepted by a tag)."""
    trial = _make_graph_module(joint.module, _without_duplicates(joint.graph))
    derived = {node.name for node in param_derived(joint)}
    for node in trial.graph.nodes:
        if node.op == "call_function" and node.name in derived:
            node.meta["recompute"] = CheckpointPolicy.MUST_RECOMPUTE
            node.meta["ac_graph_id"] = 0
    if any(partitioners.must_recompute(node) for node in trial.graph.nodes):
        trial = partitioners.cleanup_recompute_tags(trial, is_default_partition=False)
    partitioners.force_save_collectives(trial)
    partitioners.force_save_effectful_ops(trial)
    partitioners.force_save_bw_mutation_src(trial)
    info = partitioners.classify_nodes(
        trial,
        joint.options.get("static_lifetime_input_indices") or [],
        joint.num_forward_outputs,
    )
    if not info.required_bw_nodes:
        forward, _ = _min_cut(trial, joint)
        saved = _results(forward.graph)[joint.num_forward_outputs :]
        return [node.name for node in saved if isinstance(node, fx.Node)]
    far = 10**9
    for node in reversed(trial.graph.nodes):
        if node.op == "output":
            node.dist_from_bw = far
        elif info.is_required_fw(node):
            node.dist_from_bw = min([far, *(user.dist_from_bw + 1 for user in node.users)])
        else:
            node.dist_from_bw = 0
    return [
        node.name
        for node in partitioners.choose_saved_values_set(trial.graph, info, memory_budget=1)
    ]


def _without_duplicates(graph: fx.Graph) -> fx.Graph:
    """A copy of the graph, without dead code and common subexpressions; names stay."""
    if any(_is_dead(node) for node in graph.nodes):
        graph = _copy(graph)
        graph.eliminate_dead_code()
    return fx_graph_cse(graph)  # type: ignore[no-any-return]


def _is_dead(node: fx.Node) -> bool:
    return node.op == "call_function" and not node.users and not node.is_impure()


def _copy(graph: fx.Graph) -> fx.Graph:
    """The same graph anew, names and metadata included."""
    new = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    for node in graph.nodes:
        copies[node] = new.node_copy(node, copies.__getitem__)
    return new


def _needed_by_backward(
    graph: fx.Graph, backward: set[fx.Node], derived: set[fx.Node]
) -> set[fx.Node]:
    """Forward nodes that some backward node depends on, directly or by recomputation."""
    needed: set[fx.Node] = set()
    for node in reversed(list(graph.nodes)):
        if node in backward or node in needed:
            if node in derived and node not in backward:
                continue
            needed.update(a for a in node.all_input_nodes if a not in backward)
    return needed


def _crosses(node: fx.Node, backward: set[fx.Node]) -> bool:
    """True where a later stage of the forward reads the value."""
    stage = node.meta["lohan_stage"]
    return any(
        user.op == "call_function" and user not in backward and user.meta["lohan_stage"] != stage
        for view in views_of(node)
        for user in view.users
    )


def _constants(graph: fx.Graph) -> set[fx.Node]:
    """Nodes that depend on no input: positions, masks. Any stage can make them again by itself."""
    found: set[fx.Node] = set()
    for node in graph.nodes:
        inputs = node.all_input_nodes
        if node.op == "call_function" and not is_random(node) and found.issuperset(inputs):
            found.add(node)
    return found


def _producer(node: fx.Node) -> fx.Node:
    if node.target is operator.getitem:
        producer = node.args[0]
        assert isinstance(producer, fx.Node)
        return producer
    return node
