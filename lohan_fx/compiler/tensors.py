"""The tensors of a captured step, as rows of a plan."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from lohan_fx.plan import TensorRow
from lohan_fx.program import DTYPE_BYTES, Bucket

from .capture import Traced
from .values import dtype_name, tensor_of


def tensor_rows(buckets: Sequence[Bucket], traced: Traced) -> list[TensorRow]:
    """One row per tensor that the plan places, parameters first."""
    rows = []
    layers = [stage.name for stage in traced.stages]
    for bucket in buckets:
        layer = bucket.name.split(":")[0]
        for spec in bucket.params:
            classes = [("weight16" if bucket.dtype != "float32" else "master32", bucket.dtype, 1)]
            if bucket.has_master:
                classes.append(("master32", "float32", 1))
            if bucket.trainable:
                classes += [("moments32", "float32", 2), ("gradient", bucket.dtype, 1)]
            for cls, dtype, copies in classes:
                rows.append(
                    TensorRow(
                        name=spec.name,
                        cls=cls,
                        layer=layer,
                        shape=spec.shape if copies == 1 else (copies, *spec.shape),
                        dtype=dtype,
                        bytes=math.prod(spec.shape) * DTYPE_BYTES[dtype] * copies,
                        bucket=bucket.index,
                    )
                )
    for candidate in traced.candidates:
        for node in candidate.nodes:
            value = tensor_of(node)
            if value is None:
                continue
            rows.append(
                TensorRow(
                    name=node.name,
                    cls="activation",
                    layer=layers[node.meta["lohan_stage"]],
                    shape=tuple(value.shape),
                    dtype=dtype_name(value.dtype),
                    bytes=value.numel() * value.element_size(),
                    activation=candidate.index,
                )
            )
    return rows


def num_tokens(traced: Traced) -> int | None:
    """Elements of the largest integer input of two dimensions (batch, sequence); None without one."""
    sizes = [
        value.numel()
        for node in traced.joint.graph.find_nodes(op="placeholder")
        if (value := tensor_of(node)) is not None
        and node not in traced.joint.param_of
        and value.dtype in (torch.int64, torch.int32)
        and value.dim() == 2
    ]
    return max(sizes, default=None)
