"""From a joint graph to a planner Problem: buckets, stages with seconds and bytes, activations.

Times come from `seconds.Seconds`.
"""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import dataclass

import torch
from torch import fx
from torch.torch_version import TorchVersion

from lohan_fx import program as program_types
from lohan_fx.planner import Activation, Capacities, Overlap, Problem, Stage
from lohan_fx.planner import Bucket as BucketItem
from lohan_fx.planner.problem import PAGE, align_up

from .fusion import free_cuts, is_extern, is_reduction, source_op
from .partition import Candidate, Joint, backward_nodes, param_derived, recompute_closure
from .seconds import Seconds
from .stages import StageInfo
from .values import dtype_name, readers, storage_root, storage_span_bytes, tensor_of, views_of

# AOTAutograd frees the gradients of the results before backward is through only from 2.13 on.
TANGENTS_STAY = torch.__version__ < TorchVersion("2.13")

# What fusion does to a backward is an estimate: measured peaks of a 3B Llama were up to a fifth of a
# layer's workspace above it.
_FUSED_SLACK = 1.25


def formulate_training(
    joint: Joint,
    stages: Sequence[StageInfo],
    candidates: Sequence[Candidate],
    buckets: Sequence[program_types.Bucket],
    *,
    seconds: Seconds,
    capacities: Capacities,
    overlap: Overlap,
    margin_bytes: int,
    gpu_adam_workspace_bytes: int = 0,
    accumulates: bool = False,
    speculating: frozenset[int] | None = None,
    max_ssd_bytes_per_day: int | None = None,
) -> Problem:
    """The Problem of one training step.

    Args:
        seconds: what nodes take, on which hardware, and whether chains of pointwise ops are fused, so
            that they leave no temporaries.
        max_ssd_bytes_per_day, gpu_adam_workspace_bytes: see `Problem`.
        margin_bytes: GPU bytes to leave to the allocator and to libraries' workspaces.
        accumulates: gradients of several backwards are added up before an update.
        speculating: the buckets that may speculate, by index; None is all.
    """
    graph = joint.graph
    backward = backward_nodes(graph)
    derived = param_derived(joint)
    fused = seconds.fused
    saved_roots = {node for candidate in candidates for node in candidate.nodes}
    forward_of, backward_of = _runs(joint, len(stages), backward, saved_roots, derived)

    returned, tangents = _boundary_bytes(joint, saved_roots)
    counted = derived | saved_roots
    ran_forward = {node for run in forward_of for node in run}
    forward_s = [seconds.each(run, ran_forward, saved_roots) for run in forward_of]
    backward_s = [seconds.each(run, backward) for run in backward_of]
    activations = _activations(
        joint,
        candidates,
        backward,
        derived,
        seconds,
        [_Timed.of(*row, saved_roots) for row in zip(forward_of, forward_s, strict=True)],
        [_Timed.of(*row) for row in zip(backward_of, backward_s, strict=True)],
    )
    rows = []
    for info, fw, bw in zip(stages, forward_of, backward_of, strict=True):
        held = tangents if TANGENTS_STAY or info.index == len(stages) - 1 else 0
        rows.append(
            Stage(
                index=info.index,
                name=info.name,
                kind=info.kind,
                forward_s=sum(forward_s[info.index]),
                backward_s=sum(backward_s[info.index]),
                forward_workspace_bytes=workspace_bytes(fw, counted, ran_forward, fused=fused),
                backward_workspace_bytes=held
                + int(_FUSED_SLACK * workspace_bytes(bw, counted, backward, fused=fused)),
            )
        )
    inputs = sum(
        storage_span_bytes(value)
        for node in graph.find_nodes(op="placeholder")
        if node not in joint.param_of
        and "tangents" not in str(node.target)
        and (value := tensor_of(node)) is not None
    )
    return Problem(
        capacities=capacities,
        lanes=seconds.hardware.lanes(),
        stages=tuple(rows),
        buckets=_bucket_items(joint, buckets, backward),
        activations=tuple(activations),
        fixed_gpu_bytes=inputs + returned,
        gpu_margin_bytes=margin_bytes,
        gpu_adam_workspace_bytes=gpu_adam_workspace_bytes,
        overlap=overlap,
        accumulates=accumulates,
        speculating=speculating,
        max_ssd_bytes_per_day=max_ssd_bytes_per_day,
    )


def _bucket_items(
    joint: Joint, buckets: Sequence[program_types.Bucket], backward: set[fx.Node]
) -> tuple[BucketItem, ...]:
    """Which stages read each bucket, and where its last gradient is final."""
    reads: tuple[dict[int, set[int]], dict[int, set[int]]] = ({}, {})
    for placeholder, pid in joint.param_of.items():
        for user in (*readers(placeholder), *views_of(placeholder)):
            if user.op == "call_function":
                stage = user.meta["lohan_stage"]
                reads[user in backward].setdefault(pid, set()).add(stage)
                # A forward op may run again in the backward of its stage.
                reads[True].setdefault(pid, set()).add(stage)
    grad_stage: dict[int, int] = {}
    pid_of = {placeholder.meta["desc"].idx: pid for placeholder, pid in joint.param_of.items()}
    output = joint.graph.output_node()
    for node, desc in zip(output.args[0], output.meta["desc"], strict=True):  # type: ignore[arg-type]
        final_of = pid_of.get(getattr(getattr(desc, "grad_of", None), "idx", None))
        if final_of is not None and isinstance(node, fx.Node):
            grad_stage[final_of] = node.meta.get("lohan_stage", 0)
    items = []
    for bucket in buckets:
        pids = [spec.pid for spec in bucket.params]
        final = [grad_stage[pid] for pid in pids if pid in grad_stage]
        itemsize = program_types.DTYPE_BYTES[bucket.dtype]
        forward_stages = _stages_of(pids, reads[False])
        items.append(
            BucketItem(
                index=bucket.index,
                name=bucket.name,
                numel=bucket.numel,
                weight_bytes=bucket.weight_bytes,
                grad_bytes=bucket.numel * itemsize if bucket.trainable else 0,
                state_bytes=bucket.state_bytes,
                has_master=bucket.has_master,
                forward_stages=forward_stages,
                backward_stages=_stages_of(pids, reads[True]),
                # A forward alone has no gradients; buffers for them are there all the same, so it
                # is planned as if they came where the bucket is read.
                grad_stage=min(final or forward_stages, default=0) if bucket.trainable else None,
            )
        )
    return tuple(items)


def _stages_of(pids: Sequence[int], reads: Mapping[int, set[int]]) -> tuple[int, ...]:
    return tuple(sorted(set().union(*(reads.get(pid, set()) for pid in pids))))


@dataclass(frozen=True, slots=True)
class _Timed:
    """What one stage runs in a pass: positions of its nodes, its free cuts, and when they come."""

    position: Mapping[fx.Node, int]
    cuts: Sequence[int]  # both ends included
    shares: Sequence[float]  # of the stage's seconds that are over at each cut

    @classmethod
    def of(
        cls, run: Sequence[fx.Node], spent: Sequence[float], kept: Set[fx.Node] = frozenset()
    ) -> _Timed:
        cuts = [0, *free_cuts(run, kept), len(run)]
        passed = [0.0, *itertools.accumulate(spent)]
        total = passed[-1]
        inner = [passed[p] / total if total > 0 else 0.0 for p in cuts[1:-1]]
        return cls({n: p for p, n in enumerate(run)}, cuts, [0.0, *inner, 1.0])

    def after(self, nodes: Iterable[fx.Node]) -> float:
        """The share that is over at the first cut after the last of `nodes`; all where none is here."""
        last = max((self.position[n] for n in nodes if n in self.position), default=None)
        return 1.0 if last is None else self.shares[bisect.bisect_right(self.cuts, last)]

    def before(self, nodes: Iterable[fx.Node]) -> float:
        """The share that is over at the last cut before the first of `nodes`; 0 where none is here."""
        first = min((self.position[n] for n in nodes if n in self.position), default=None)
        return 0.0 if first is None else self.shares[bisect.bisect_right(self.cuts, first) - 1]


def _activations(
    joint: Joint,
    candidates: Sequence[Candidate],
    backward: set[fx.Node],
    derived: set[fx.Node],
    seconds: Seconds,
    forward_of: Sequence[_Timed],
    backward_of: Sequence[_Timed],
) -> list[Activation]:
    owner = {node: c.index for c in candidates for node in c.nodes}
    saved = set(owner)
    items = []
    order = {node: position for position, node in enumerate(joint.graph.nodes)}
    closures = [recompute_closure(c, saved, derived) for c in candidates]
    # Where a value is read in backward: by backward nodes, and by forward nodes that run again.
    for candidate, (run, needs) in zip(candidates, closures, strict=True):
        own = candidate.nodes[0].meta["lohan_stage"]
        forward_last, backward_reads = own, set()
        users = {u for n in candidate.nodes for u in (*readers(n), *views_of(n))}
        users = {user for user in users if user.op == "call_function"}
        for user in users:
            stage = user.meta["lohan_stage"]
            backward_reads.add(stage)
            if user not in backward:
                forward_last = max(forward_last, stage)
        backward_first = max(backward_reads | {own})
        value = tensor_of(candidate.nodes[0])
        items.append(
            Activation(
                index=candidate.index,
                name=candidate.name,
                bytes=_resting_bytes(candidate),
                forward_stage=own,
                last_forward_stage=forward_last,
                first_backward_stage=backward_first,
                last_backward_stage=min(backward_reads | {own}),
                recompute_s=seconds.of(sorted(run, key=order.__getitem__), kept=saved)
                if candidate.can_recompute
                else 0.0,
                needs=tuple(sorted({owner[node] for node in needs}))
                if candidate.can_recompute
                else (),
                can_recompute=candidate.can_recompute,
                can_swap=candidate.can_swap,
                shape=tuple(value.shape) if value is not None else (),
                dtype=dtype_name(value.dtype) if value is not None else "",
                leaves_at=forward_of[forward_last].after(users),
                returns_at=backward_of[backward_first].before(users),
            )
        )
    return items


def _resting_bytes(candidate: Candidate) -> int:
    """Bytes of the candidate where it is kept: each of its results but one on pages of its own."""
    sizes = [
        storage_span_bytes(t) for node in candidate.nodes if (t := tensor_of(node)) is not None
    ]
    return candidate.nbytes - sum(sizes[1:]) + sum(align_up(size, PAGE) for size in sizes[1:])


def _boundary_bytes(joint: Joint, saved_roots: set[fx.Node]) -> tuple[int, int]:
    """(bytes of results that the caller holds and no activation counts, bytes of tangents)."""
    outputs = joint.graph.output_node().args[0]
    roots = {
        storage_root(node)
        for node in outputs[: joint.num_forward_outputs]  # type: ignore[index,union-attr]
        if isinstance(node, fx.Node)
    }
    returned = sum(
        storage_span_bytes(value)
        for root in roots
        if root.op == "call_function"
        and root not in saved_roots
        and (value := tensor_of(root)) is not None
    )
    tangents = sum(
        storage_span_bytes(value)
        for node in joint.graph.find_nodes(op="placeholder")
        if "tangents" in str(node.target) and (value := tensor_of(node)) is not None
    )
    return returned, tangents


def _runs(
    joint: Joint,
    num_stages: int,
    backward: set[fx.Node],
    saved: set[fx.Node],
    derived: set[fx.Node],
) -> tuple[list[list[fx.Node]], list[list[fx.Node]]]:
    """What each stage runs in forward and in backward, in order, when all of `saved` is kept.

    A joint graph lists what backward makes from forward values alone among the forward nodes; here
    it stands in backward, right before its first reader, as the partitioner puts it.
    """
    graph = joint.graph
    outputs = graph.output_node().args[0]
    needed: set[fx.Node] = set()
    stack = [n for n in outputs[: joint.num_forward_outputs] if isinstance(n, fx.Node)]  # type: ignore[index,union-attr]
    stack += saved
    while stack:
        node = stack.pop()
        if node not in needed and node not in backward:
            needed.add(node)
            stack += node.all_input_nodes
    forward_of: list[list[fx.Node]] = [[] for _ in range(num_stages)]
    backward_of: list[list[fx.Node]] = [[] for _ in range(num_stages)]
    present: list[set[fx.Node]] = [set() for _ in range(num_stages)]

    def again(node: fx.Node, stage: int) -> None:
        pending = [node]
        while pending:
            top = pending[-1]
            if top.op != "call_function" or top in present[stage] or top in saved:
                pending.pop()
                continue
            missing = [
                source
                for source in top.all_input_nodes
                if source.op == "call_function"
                and source not in backward
                and source not in saved
                and source not in present[stage]
            ]
            if missing:
                pending += missing
                continue
            pending.pop()
            present[stage].add(top)
            backward_of[stage].append(top)

    for node in graph.nodes:
        if node.op != "call_function":
            continue
        stage = node.meta["lohan_stage"]
        if node in backward:
            for source in node.all_input_nodes:
                if source not in backward and source not in derived:
                    again(source, stage)
            backward_of[stage].append(node)
        elif node in needed:
            forward_of[stage].append(node)
    return forward_of, backward_of


def workspace_bytes(
    run: Sequence[fx.Node], counted: set[fx.Node], ran: set[fx.Node], *, fused: bool
) -> int:
    """Peak of what the nodes of a run, in order, hold at once beyond what exists before them.

    `counted` are values that are accounted elsewhere: parameters, and activations of the problem. So
    are gradients, which nothing in the run reads, once they are made. `ran` are the nodes of all runs in
    this direction: what another one reads stays to the end. With `fused`, a pointwise result
    that only pointwise ops and reductions of the run read is assumed never to reach memory.
    """
    position = {node: index for index, node in enumerate(run)}
    delta = [0] * (len(run) + 1)
    for node in run:
        value = tensor_of(node)
        if value is None or storage_root(node) is not node or node in counted:
            continue
        uses = readers(node)
        inside = [user for user in uses if user in position]
        leaves = node in ran and any(user in ran and user not in position for user in uses)
        if fused and not leaves and inside:
            made_alone = is_extern(source_op(node)) or is_reduction(node)
            if not made_alone and not any(is_extern(user) for user in inside):
                continue
        last = (
            len(run) - 1 if leaves else max((position[u] for u in inside), default=position[node])
        )
        first = _earliest(node, position) if fused else position[node]
        nbytes = -(-storage_span_bytes(value) // 512) * 512
        delta[first] += nbytes
        delta[last + 1] -= nbytes
    peak = live = 0
    for change in delta:
        live += change
        peak = max(peak, live)
    return peak


def _earliest(node: fx.Node, position: dict[fx.Node, int]) -> int:
    """The first position at which a fused kernel may make `node`: after the last extern op it needs.

    Pointwise results that share inputs come out of one kernel, whichever of them is read first.
    """
    latest = 0
    stack = [node]
    seen = set()
    while stack:
        current = stack.pop()
        if current in seen or current not in position:
            continue
        seen.add(current)
        if is_extern(source_op(current)) or is_reduction(current):
            latest = max(latest, position[current])
        else:
            stack += current.all_input_nodes
    return min(latest, position[node])
