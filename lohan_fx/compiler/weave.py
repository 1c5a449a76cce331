"""Put the plan into forward and backward graphs as lohan ops.

A graph is rebuilt in one walk. Where each move goes is decided beforehand, by the rules of
planner/schedule.py at the granularity of nodes: "before the compute node at this position".
"""

from __future__ import annotations

import bisect
import itertools
import operator
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import fx
from torch.fx._lazy_graph_module import _make_graph_module

from lohan_fx import ops
from lohan_fx.errors import CaptureError, PassError
from lohan_fx.planner import schedule
from lohan_fx.planner.problem import GPU_ALIGN, align_up
from lohan_fx.program import Bucket, Move, Program, Slot, Tier

from .fusion import free_cuts, source_op
from .values import (
    dtype_name,
    readers,
    storage_root,
    storage_span_bytes,
    tensor_of,
    views_of,
)


@dataclass(frozen=True, slots=True)
class Insertion:
    """A move, and the value it takes where it takes one."""

    move: schedule.Placed
    tensor: fx.Node | None = None


@dataclass(frozen=True, slots=True)
class Windows:
    """Bytes that may be on their way at once, by kind of move; see schedule's [Note: windows].

    `closed_forward` and `closed_backward` are stages of a pass: see its [Note: closed stages].
    """

    fetch_bytes: int
    reload_bytes: int
    offload_bytes: int
    closed_forward: tuple[int, ...] = ()
    closed_backward: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Layout:
    """Where parameters are: the buckets, and which of them are on the GPU for good."""

    buckets: tuple[Bucket, ...]
    resident: frozenset[int]
    # Resident buckets that the CPU updates: their forward wait may block, so it stays at the use.
    refreshed: frozenset[int]

    def place_of(self) -> dict[int, tuple[int, int]]:
        """pid -> (bucket, position in the bucket)."""
        return {
            spec.pid: (bucket.index, position)
            for bucket in self.buckets
            for position, spec in enumerate(bucket.params)
        }


@dataclass(slots=True)
class Weaver:
    """Collects the moves of one graph, then rebuilds it with them."""

    graph: fx.Graph
    number: int  # the runtime's
    compute: list[fx.Node] = field(default_factory=list)
    position: dict[fx.Node, int] = field(default_factory=dict)
    insertions: list[Insertion] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.compute = [n for n in self.graph.nodes if n.op not in ("placeholder", "output")]
        self.position = {node: index for index, node in enumerate(self.compute)}

    @property
    def end(self) -> int:
        return len(self.compute)

    def insert(self, moves: Iterable[schedule.Placed]) -> None:
        self.insertions += [Insertion(move) for move in moves]

    def free_cuts(self) -> list[int]:
        """Ascending positions where a region may end without a kernel more: see fusion.free_cuts.

        Ends of stages are among them, and both ends of the graph.
        """
        starts, stage = [], None
        for position, node in enumerate(self.compute):
            own = node.meta.get("lohan_stage", stage)
            # What unpacks a tuple stays with it.
            if position == 0 or (own != stage and source_op(node) is node):
                starts.append(position)
                stage = own
        cuts = []
        for start, end in itertools.pairwise([*starts, self.end]):
            cuts += [start, *(start + p for p in free_cuts(self.compute[start:end]))]
        return [*cuts, self.end]

    def stage_end(self, position: int) -> int:
        """Past the last position of the run of nodes of one stage that `position` is in."""
        stage = self.compute[position].meta.get("lohan_stage")
        while position < self.end and self.compute[position].meta.get("lohan_stage") == stage:
            position += 1
        return position

    def ends_of(self, stages: Iterable[int], *, backward: bool) -> list[int]:
        """Where these stages end in a pass: at its first node of a stage that comes after."""
        found = []
        for closed in stages:
            for position, node in enumerate(self.compute):
                stage = node.meta.get("lohan_stage", closed)
                if stage < closed if backward else stage > closed:
                    found.append(position)
                    break
        return sorted(found)

    def parameters(
        self,
        param_of: Mapping[fx.Node, int],
        layout: Layout,
        window: int,
        closed: Iterable[int],
        *,
        backward: bool,
    ) -> None:
        """Fetch, wait and release for every bucket that this graph reads."""
        place = layout.place_of()
        spans: dict[int, tuple[int, int]] = {}
        for placeholder, pid in param_of.items():
            users = [u for u in placeholder.users if u.op != "output"]
            if not users:
                continue
            bucket = place[pid][0]
            first = min(self.position[user] for user in users)
            uses = [
                *users,
                *readers(placeholder),
                *(v for v in views_of(placeholder) if v is not placeholder),
            ]
            last = max(self.position[use] for use in uses)
            low, high = spans.get(bucket, (first, last))
            spans[bucket] = (min(low, first), max(high, last))
        self.insert(
            schedule.weight_moves(
                [
                    schedule.WeightUse(
                        bucket,
                        first,
                        last,
                        self.stage_end(last),
                        align_up(layout.buckets[bucket].weight_bytes, GPU_ALIGN),
                        resident=bucket in layout.resident,
                        refreshed=bucket in layout.refreshed,
                    )
                    for bucket, (first, last) in spans.items()
                ],
                window,
                backward=backward,
                closed_ends=self.ends_of(closed, backward=backward),
            )
        )

    def offloads(self, slots: Sequence[tuple[Slot, fx.Node]], window: int) -> None:
        """Move swapped activations out at the first free cut after what reads them last."""
        cuts = self.free_cuts() if slots else []
        leaving = []
        for slot, node in slots:
            last = max(
                (
                    self.position[use]
                    for use in (*readers(node), *views_of(node))
                    if use in self.position
                ),
            )
            at = cuts[bisect.bisect_right(cuts, last)]
            leaving.append(schedule.Use(at, slot.index, align_up(slot.nbytes, GPU_ALIGN)))
        node_of = {slot.index: node for slot, node in slots}
        for move in schedule.offload_moves(leaving, self.end, window):
            tensor = node_of[move.arg] if move.op == "offload" else None
            self.insertions.append(Insertion(move, tensor))

    def reloads(
        self, slots: Sequence[tuple[Slot, fx.Node]], window: int, closed: Iterable[int]
    ) -> None:
        """Bring swapped activations back by the last free cut before what reads them first.

        What backward computes again stands in its graph before its first reader, and reads there.
        """
        cuts = self.free_cuts() if slots else []
        waits = []
        for slot, placeholder in slots:
            first = min(self.position[user] for user in placeholder.users if user.op != "output")
            at = cuts[bisect.bisect_right(cuts, first) - 1]
            waits.append(schedule.Use(at, slot.index, align_up(slot.nbytes, GPU_ALIGN)))
        ends = self.ends_of(closed, backward=True)
        self.insert(schedule.reload_moves(waits, window, ends))

    def gradients(self, gradient_of: Mapping[int, fx.Node]) -> None:
        """Hand every parameter's gradient over right after it is computed."""
        for pid, node in gradient_of.items():
            move = schedule.gradient_move(self.position.get(node, -1), pid)
            self.insertions.append(Insertion(move, node))

    def rebuild(
        self,
        *,
        placeholders: Sequence[fx.Node | None],
        begin: tuple[str, int] | None,
        handle_like: torch.Tensor | None,
        param_of: Mapping[fx.Node, int],
        layout: Layout,
        slot_nodes: Mapping[int, fx.Node],
        outputs: Sequence[fx.Node | None],
        returns_handle: bool,
    ) -> tuple[fx.Graph, tuple[Move, ...]]:
        """The graph with its moves, and the moves in order.

        `begin` is ("begin", program) for a forward; a backward takes the handle as its last
        placeholder before the tangents, which the caller has put in `placeholders` as None.
        """
        place = layout.place_of()
        pid_node = {pid: node for node, pid in param_of.items()}
        new = fx.Graph()
        env: dict[fx.Node, fx.Node] = {}
        handle: fx.Node | None = None
        for node in placeholders:
            if node is None:
                handle = new.placeholder("lohan_handle")
                handle.meta["val"] = handle_like
            else:
                env[node] = new.node_copy(node, lambda n: env[n])
        if begin is not None:
            handle = self._call(new, begin[0], begin[1])
            handle.meta["val"] = handle_like
        elif handle is not None:
            opened = new.call_function(
                torch.ops.lohan.begin_backward.default, (self.number, handle)
            )
            opened.meta["val"] = None
        moves: list[Move] = []
        at: dict[int, list[Insertion]] = {}
        for insertion in self.insertions:
            at.setdefault(insertion.move.position, []).append(insertion)

        def emit(position: int) -> None:
            for insertion in sorted(at.get(position, ()), key=lambda i: i.move.phase):
                op, arg, tensor = insertion.move.op, insertion.move.arg, insertion.tensor
                source = None if tensor is None else env[tensor]
                if op == "grad" and tensor is not None:
                    source = self._gradient(new, source, tensor, pid_node[arg])
                call = self._call(new, op, arg, source)
                moves.append(Move(op, arg))
                if op == "wait":
                    bucket = layout.buckets[arg]
                    for spec in bucket.params:
                        node = pid_node.get(spec.pid)
                        if node is None or not any(u.op != "output" for u in node.users):
                            continue
                        item = new.call_function(operator.getitem, (call, place[spec.pid][1]))
                        item.meta["val"] = node.meta["val"]
                        env[node] = item
                elif op == "reload_wait":
                    node = slot_nodes[arg]
                    call.meta["val"] = node.meta["val"]
                    env[node] = call

        for position, node in enumerate(self.compute):
            emit(position)
            env[node] = new.node_copy(node, lambda n: env[n])
        emit(self.end)
        ended = new.call_function(torch.ops.lohan.end.default, (self.number,))
        ended.meta["val"] = None
        results = [None if node is None else env[node] for node in outputs]
        if returns_handle:
            results.append(handle)
        new.output(tuple(results))
        new.lint()
        return new, tuple(moves)

    def _gradient(
        self, new: fx.Graph, source: fx.Node | None, old: fx.Node, param: fx.Node
    ) -> fx.Node:
        """The gradient in its parameter's own layout, so that it leaves as one block of bytes."""
        assert source is not None
        grad, value = tensor_of(old), tensor_of(param)
        assert grad is not None and value is not None
        if grad.stride() == value.stride() or not value.is_contiguous():
            return source
        clone = new.call_function(
            torch.ops.aten.clone.default, (source,), {"memory_format": torch.contiguous_format}
        )
        clone.meta.update(source.meta)
        clone.meta["val"] = torch.empty_like(grad, memory_format=torch.contiguous_format)
        return clone

    def _call(self, new: fx.Graph, op: str, arg: int, tensor: fx.Node | None = None) -> fx.Node:
        args: tuple[int | fx.Node, ...] = (self.number, arg)
        if tensor is not None:
            args = (*args, tensor)
        call = new.call_function(getattr(torch.ops.lohan, op).default, args)
        call.meta["val"] = None
        return call


@dataclass(frozen=True, slots=True)
class Woven:
    """A rewritten pair (or a forward alone) and the program it follows."""

    program: Program
    forward: fx.GraphModule
    backward: fx.GraphModule | None


def weave_training(
    forward: fx.GraphModule,
    backward: fx.GraphModule,
    *,
    index: int,
    number: int,
    num_forward_outputs: int,
    param_index: Mapping[int, int],
    layout: Layout,
    swapped: Mapping[str, Tier],
    windows: Windows,
    trainable: frozenset[int],
    handle_like: torch.Tensor,
    param_names: Sequence[str],
) -> Woven:
    """Rewrite a partitioned forward and backward.

    Args:
        param_index: position among the graph's original inputs -> pid.
        swapped: name of a saved value -> the tier it goes to.
        trainable: pids that may receive a gradient; those that do not are left out of the step.

    Raises:
        CaptureError: no trainable parameter gets a gradient, or an output shows a parameter's bytes.
    """
    fw, bw = Weaver(forward.graph, number), Weaver(backward.graph, number)
    fw_params = managed_params(forward.graph, param_index)
    bw_params = managed_params(backward.graph, param_index)
    _refuse_returned_params(forward.graph, num_forward_outputs, fw_params, param_names)

    results = list(_outputs(forward.graph))
    saved = results[num_forward_outputs:]
    bw_by_name = {n.name: n for n in backward.graph.find_nodes(op="placeholder")}
    slots: list[tuple[Slot, fx.Node, fx.Node]] = []
    kept: list[fx.Node] = []
    for node in saved:
        assert isinstance(node, fx.Node)
        if node in fw_params:
            continue
        tier = swapped.get(node.name)
        placeholder = bw_by_name.get(node.name)
        used = placeholder is not None and any(u.op != "output" for u in placeholder.users)
        value = tensor_of(node)
        if tier is None or not used or value is None:
            kept.append(node)
            continue
        assert placeholder is not None
        slot = Slot(
            index=len(slots),
            name=node.name,
            shape=tuple(value.shape),
            stride=tuple(value.stride()),
            dtype=dtype_name(value.dtype),
            nbytes=storage_span_bytes(value),
            tier=tier,
        )
        slots.append((slot, node, placeholder))

    gradient_of = _gradients(backward.graph, param_index, trainable, param_names)
    fw.parameters(fw_params, layout, windows.fetch_bytes, windows.closed_forward, backward=False)
    fw.offloads([(slot, node) for slot, node, _ in slots], windows.offload_bytes)
    closed = windows.closed_backward
    bw.parameters(bw_params, layout, windows.fetch_bytes, closed, backward=True)
    bw.reloads([(slot, node) for slot, _, node in slots], windows.reload_bytes, closed)
    bw.gradients(gradient_of)

    new_forward, forward_moves = fw.rebuild(
        placeholders=forward.graph.find_nodes(op="placeholder"),
        begin=("begin", index),
        handle_like=handle_like,
        param_of=fw_params,
        layout=layout,
        slot_nodes={},
        outputs=[*results[:num_forward_outputs], *kept],
        returns_handle=True,
    )
    saved_names = {node.name for node in saved if isinstance(node, fx.Node)}
    tangents = [
        node for node in backward.graph.find_nodes(op="placeholder") if node.name not in saved_names
    ]
    handed_over = _gradient_positions(backward.graph, param_index)
    new_backward, backward_moves = bw.rebuild(
        placeholders=[
            *(bw_by_name[node.name] for node in kept),
            None,
            *tangents,
        ],
        begin=None,
        handle_like=handle_like,
        param_of={**bw_params, **{n: p for n, p in _grad_only(fw_params, bw_params).items()}},
        layout=layout,
        slot_nodes={slot.index: node for slot, _, node in slots},
        outputs=[
            None if position in handed_over else node
            for position, node in enumerate(_outputs(backward.graph))
        ],
        returns_handle=False,
    )
    program = Program(
        index=index,
        training=True,
        slots=tuple(slot for slot, _, _ in slots),
        forward=forward_moves,
        backward=backward_moves,
    )
    return Woven(
        program,
        _make_graph_module(forward, new_forward),
        _make_graph_module(backward, new_backward),
    )


def weave_inference(
    module: fx.GraphModule,
    *,
    index: int,
    number: int,
    param_index: Mapping[int, int],
    layout: Layout,
    windows: Windows,
    handle_like: torch.Tensor,
    param_names: Sequence[str],
) -> Woven:
    """Rewrite a forward without a backward: parameters stream through, nothing is saved."""
    weaver = Weaver(module.graph, number)
    params = managed_params(module.graph, param_index)
    results = list(_outputs(module.graph))
    _refuse_returned_params(module.graph, len(results), params, param_names)
    closed = windows.closed_forward
    weaver.parameters(params, layout, windows.fetch_bytes, closed, backward=False)
    graph, moves = weaver.rebuild(
        placeholders=module.graph.find_nodes(op="placeholder"),
        begin=("begin", index),
        handle_like=handle_like,
        param_of=params,
        layout=layout,
        slot_nodes={},
        outputs=results,
        returns_handle=False,
    )
    program = Program(index=index, training=False, slots=(), forward=moves, backward=())
    return Woven(program, _make_graph_module(module, graph), None)


def check_moves(woven: Woven) -> None:
    """Raise PassError unless each graph holds exactly the program's moves, each pair in order."""
    for graph_module, moves in (
        (woven.forward, woven.program.forward),
        (woven.backward, woven.program.backward),
    ):
        if graph_module is None:
            continue
        listed = [
            (node.target._opname, node.args[1])
            for node in graph_module.graph.nodes
            if ops.is_move(node) and node.target._opname not in ("begin", "begin_backward", "end")
        ]
        if listed != [(move.op, move.arg) for move in moves]:
            raise PassError("the rewritten graph does not hold the moves of its program")
        for first, then in (
            ("fetch", "wait"),
            ("wait", "release"),
            ("offload", "offload_wait"),
            ("reload", "reload_wait"),
        ):
            starts = {arg: i for i, (op, arg) in enumerate(listed) if op == first}
            ends = {arg: i for i, (op, arg) in enumerate(listed) if op == then}
            if starts.keys() != ends.keys() or any(starts[a] > ends[a] for a in starts):
                raise PassError(f"{first} and {then} do not pair up in the rewritten graph")


def _outputs(graph: fx.Graph) -> Sequence[fx.Node | None]:
    results = graph.output_node().args[0]
    assert isinstance(results, list | tuple)
    return results  # type: ignore[return-value]


def managed_params(graph: fx.Graph, param_index: Mapping[int, int]) -> dict[fx.Node, int]:
    """Placeholders that are managed parameters -> pid, by AOTAutograd's input descriptors."""
    found = {}
    for node in graph.find_nodes(op="placeholder"):
        desc = node.meta.get("desc")
        kind = type(desc).__name__
        if kind in ("PlainAOTInput", "ParamAOTInput") and desc.idx in param_index:
            found[node] = param_index[desc.idx]
    return found


def _gradient_positions(graph: fx.Graph, param_index: Mapping[int, int]) -> dict[int, int]:
    """Position in the backward's outputs -> pid, for managed parameters."""
    descs = graph.output_node().meta["desc"]
    found = {}
    for position, desc in enumerate(descs):
        source = getattr(desc, "grad_of", None)
        index: int | None = getattr(source, "idx", None)
        if index is not None and index in param_index:
            found[position] = param_index[index]
    return found


def gradients_of(graph: fx.Graph, param_index: Mapping[int, int]) -> frozenset[int]:
    """The managed parameters (pids) that a joint or a backward graph has a gradient for."""
    outputs = _outputs(graph)
    return frozenset(
        pid
        for position, pid in _gradient_positions(graph, param_index).items()
        if isinstance(outputs[position], fx.Node)
    )


def _gradients(
    graph: fx.Graph,
    param_index: Mapping[int, int],
    trainable: frozenset[int],
    names: Sequence[str],
) -> dict[int, fx.Node]:
    outputs = _outputs(graph)
    found: dict[int, fx.Node] = {}
    for position, pid in _gradient_positions(graph, param_index).items():
        node = outputs[position]
        if isinstance(node, fx.Node):
            value = tensor_of(node)
            if value is not None and value.layout is not torch.strided:
                raise CaptureError(
                    f"the gradient of {names[pid]!r} is sparse, which Adam does not take; make it dense "
                    "(sparse=False on the embedding)"
                )
            found[pid] = node
    gradients = {pid: node for pid, node in found.items() if pid in trainable}
    if trainable and not gradients:
        missing = sorted(names[pid] for pid in trainable)
        raise CaptureError(
            f"{len(missing)} parameter(s) require a gradient but the loss does not depend on them: "
            f"{', '.join(missing[:5])}{', ...' if len(missing) > 5 else ''}; look for a detach() or a "
            "no_grad() between them and the loss"
        )
    return gradients


def _refuse_returned_params(
    graph: fx.Graph, num_outputs: int, params: Mapping[fx.Node, int], names: Sequence[str]
) -> None:
    for node in _outputs(graph)[:num_outputs]:
        if isinstance(node, fx.Node) and storage_root(node) in params:
            name = names[params[storage_root(node)]]
            raise CaptureError(
                f"the model returns parameter {name!r} or a view of it; its bytes are only on the GPU "
                "inside the step, so return a copy (clone) instead"
            )


def _grad_only(
    forward: Mapping[fx.Node, int], backward: Mapping[fx.Node, int]
) -> dict[fx.Node, int]:
    """Forward placeholders of parameters that backward does not read (for their layout only)."""
    read = set(backward.values())
    return {node: pid for node, pid in forward.items() if pid not in read}
