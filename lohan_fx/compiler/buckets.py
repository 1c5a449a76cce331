"""Which parameters move together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
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
    align = program_types.PARAM_ALIGN
    buckets: list[program_types.Bucket] = []
    specs: list[program_types.ParamSpec] = []
    offset = 0
    key: tuple[int, bool, torch.dtype] | None = None

    def close() -> None:
        nonlocal specs, offset
        if specs:
            assert key is not None
            stage = stage_names[key[0]] if key[0] < unread else "unread"
            buckets.append(
                program_types.Bucket(
                    index=len(buckets),
                    name=f"{stage}:{specs[0].name}",
                    dtype=dtype_name(key[2]),
                    params=tuple(specs),
                    numel=offset,
                    trainable=key[1],
                )
            )
        specs, offset = [], 0

    for pid in order:
        param = by_pid[pid]
        this = (first_stage.get(pid, unread), param.trainable, param.dtype)
        padded = -(-param.numel // align) * align
        if this != key or offset + padded > bucket_numel:
            close()
        key = this
        specs.append(
            program_types.ParamSpec(
                pid=pid,
                name=param.name,
                shape=param.shape,
                stride=param.stride,
                offset=offset,
                numel=param.numel,
                trainable=param.trainable,
            )
        )
        offset += padded
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
