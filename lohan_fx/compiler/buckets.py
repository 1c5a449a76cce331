"""Which parameters move together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass

import torch
from torch import fx

from lohan_fx import program as program_types

from .values import dtype_name

# A bucket is a unit of transfer: large enough for full PCIe and SSD bandwidth, small enough that two
# of them are little beside a 24 GB GPU and that placements are fine-grained.
MOST_BUCKET_NUMEL = 32 * 1024 * 1024
LEAST_BUCKET_NUMEL = 64 * 1024
_BUCKETS_PER_MODEL = 64


def bucket_numel_for(num_params: int) -> int:
    """The most parameters in one bucket of a model: a share of it, within the bounds above."""
    share = num_params // _BUCKETS_PER_MODEL
    return min(MOST_BUCKET_NUMEL, max(LEAST_BUCKET_NUMEL, share))


@dataclass(frozen=True, slots=True)
class ParamInfo:
    """What is known of one managed parameter without its value."""

    pid: int
    name: str
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    numel: int
    dtype: torch.dtype
    trainable: bool


def param_infos(
    names: Sequence[str], stubs: Sequence[torch.nn.Parameter], trainable: Set[int]
) -> list[ParamInfo]:
    """What is known of parameters, in their order."""
    return [
        ParamInfo(
            pid=pid,
            name=name,
            shape=tuple(stub.shape),
            stride=tuple(stub.stride()),
            numel=stub.numel(),
            dtype=stub.dtype,
            trainable=pid in trainable,
        )
        for pid, (name, stub) in enumerate(zip(names, stubs, strict=True))
    ]


def make_bucket(index: int, name: str, params: Sequence[ParamInfo]) -> program_types.Bucket:
    """The layout of parameters that move together, all of one dtype and all trainable or all frozen."""
    specs: list[program_types.ParamSpec] = []
    offset = 0
    for param in params:
        specs.append(
            program_types.ParamSpec(
                pid=param.pid,
                name=param.name,
                shape=param.shape,
                stride=param.stride,
                offset=offset,
                numel=param.numel,
                trainable=param.trainable,
            )
        )
        offset += _padded(param.numel)
    return program_types.Bucket(
        index=index,
        name=name,
        dtype=dtype_name(params[0].dtype),
        params=tuple(specs),
        numel=offset,
        trainable=params[0].trainable,
    )


def _padded(numel: int) -> int:
    align = program_types.PARAM_ALIGN
    return -(-numel // align) * align


def make_buckets(
    params: Sequence[ParamInfo],
    first_stage: Mapping[int, int],
    stage_names: Sequence[str],
    bucket_numel: int,
) -> tuple[program_types.Bucket, ...]:
    """Group parameters that are first used together, in that order.

    `first_stage` maps a pid to the stage of its first use, in order of use; parameters that the
    graph never reads are not in it and get buckets of their own at the end.
    """
    unread = len(stage_names)
    order = [*first_stage, *(p.pid for p in params if p.pid not in first_stage)]
    by_pid = {p.pid: p for p in params}
    # Trainable and frozen parameters of one stage interleave (biases, LoRA): sort by kind within the
    # stage first, or nearly every parameter would open a bucket.
    position = {pid: index for index, pid in enumerate(order)}
    order.sort(
        key=lambda pid: (
            first_stage.get(pid, unread),
            not by_pid[pid].trainable,
            str(by_pid[pid].dtype),
            position[pid],
        )
    )
    buckets: list[program_types.Bucket] = []
    members: list[ParamInfo] = []
    numel = 0
    key: tuple[int, bool, torch.dtype] | None = None

    def close() -> None:
        nonlocal members, numel
        if members:
            assert key is not None
            stage = stage_names[key[0]] if key[0] < unread else "unread"
            buckets.append(make_bucket(len(buckets), f"{stage}:{members[0].name}", members))
        members, numel = [], 0

    for pid in order:
        param = by_pid[pid]
        this = (first_stage.get(pid, unread), param.trainable, param.dtype)
        padded = _padded(param.numel)
        if this != key or numel + padded > bucket_numel:
            close()
        key = this
        members.append(param)
        numel += padded
    close()
    return tuple(buckets)


def first_uses(graph: fx.Graph, param_of: Mapping[fx.Node, int]) -> dict[int, int]:
    """pid -> stage of its first use in forward, in order of use."""
    found: dict[int, int] = {}
    for node in graph.nodes:
        if node.op != "call_function":
            continue
        for source in node.all_input_nodes:
            pid = param_of.get(source)
            if pid is not None:
                found.setdefault(pid, node.meta["lohan_stage"])
    return found
