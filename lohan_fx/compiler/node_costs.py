"""What one node of a graph costs: FLOPs by torch's formulas and our own, bytes it reads and writes."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import fx
from torch.fx.node import map_arg
from torch.utils.flop_counter import flop_registry

from .values import storage_span_bytes, view_source

_aten = torch.ops.aten

Formula = Callable[..., Any]


def _attention(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    """Two matmuls for each query head; key and value may have fewer heads (grouped queries)."""
    batch, heads, queries, head_dim = query.shape
    keys, value_dim = key.shape[2], value.shape[3]
    return 2 * int(batch * heads * queries * keys * (head_dim + value_dim))


def _attention_backward(_: Any, query: Any, key: Any, value: Any, *__: Any, **___: Any) -> int:
    """Five: scores once more, then the gradients of scores, values, queries and keys."""
    batch, heads, queries, head_dim = query.shape
    keys, value_dim = key.shape[2], value.shape[3]
    return 2 * int(batch * heads * queries * keys * (3 * head_dim + 2 * value_dim))


def _matrix_vector(matrix: Any, vector: Any, *_: Any, **__: Any) -> int:
    return 2 * int(matrix.numel())


def _add_matrix_vector(_: Any, matrix: Any, vector: Any, **__: Any) -> int:
    return 2 * int(matrix.numel())


def _own_formulas() -> dict[Any, Formula]:
    """Formulas for ops that torch's table lacks, or where it wants as many key as query heads."""
    wanted: dict[str, Formula] = {
        "mv": _matrix_vector,
        "dot": _matrix_vector,
        "addmv": _add_matrix_vector,
    }
    for kind in ("flash", "efficient", "cudnn", "fused"):
        suffix = "_overrideable" if kind == "fused" else ""
        wanted[f"_scaled_dot_product_{kind}_attention{suffix}"] = _attention
        wanted[f"_scaled_dot_product_{kind}_attention{suffix}_backward"] = _attention_backward
    wanted["_scaled_dot_product_flash_attention_for_cpu"] = _attention
    wanted["_scaled_dot_product_flash_attention_for_cpu_backward"] = _attention_backward
    return {
        getattr(_aten, name): formula for name, formula in wanted.items() if hasattr(_aten, name)
    }


_FORMULAS: dict[Any, Formula] = {**flop_registry, **_own_formulas()}

# Higher-order ops that run another op under a saved random state: position of that op in args.
_WRAPPED = {"run_and_save_rng_state": 0, "run_with_rng_state": 1, "graphsafe_run_with_rng_state": 0}


def node_flops(node: fx.Node) -> int:
    """FLOPs of matmuls, convolutions and attention, as torch counts them; 0 for anything else."""
    formula = flop_formula(node)
    if formula is None:
        return 0
    target, args, kwargs = node.target, node.args, dict(node.kwargs)
    wrapped = _WRAPPED.get(getattr(target, "__name__", ""))
    if wrapped is not None:
        args = args[wrapped + 1 :]
        kwargs.pop("rng_state", None)
    out = node.meta.get("val")
    if wrapped is not None and isinstance(out, tuple) and "save" in target.__name__:  # type: ignore[union-attr]
        out = out[1]
    args, kwargs = map_arg((args, kwargs), lambda n: n.meta.get("val"))
    return int(formula(*args, **kwargs, out_val=out))


def flop_formula(node: fx.Node) -> Formula | None:
    """How to count the FLOPs of a matmul, convolution or attention; None for anything else."""
    if node.op != "call_function":
        return None
    target: Any = node.target
    wrapped = _WRAPPED.get(getattr(target, "__name__", ""))
    if wrapped is not None:
        target = node.args[wrapped]
    return _FORMULAS.get(getattr(target, "overloadpacket", target))


# These read as many rows of their first argument as they return.
_GATHERS = frozenset({_aten.embedding, _aten.gather, _aten.index, _aten.index_select})


def node_bytes(node: fx.Node) -> int:
    """Bytes a node reads and writes when it runs alone; 0 for views and unpacking."""
    if node.op != "call_function" or node.target is operator.getitem:
        return 0
    if view_source(node) is not None or _returns_views(node):
        return 0
    written = _bytes(node.meta.get("val"))
    read = [_bytes(source.meta.get("val")) for source in node.all_input_nodes]
    if getattr(node.target, "overloadpacket", None) in _GATHERS and read:
        read[0] = min(read[0], written)
    return written + sum(read)


def _returns_views(node: fx.Node) -> bool:
    """True for split, unbind and the like."""
    if not isinstance(node.meta.get("val"), (tuple, list)):
        return False
    return any(view_source(user) is not None for user in node.users)


def _bytes(value: Any) -> int:
    """Bytes of a tensor or of a tuple of them; an expanded tensor counts what is there once."""
    if isinstance(value, (tuple, list)):
        return sum(_bytes(item) for item in value)
    if not isinstance(value, torch.Tensor):
        return 0
    return min(value.numel() * value.element_size(), storage_span_bytes(value))
