"""Graphs as bytes: what comes back is what was written, and what cannot be written is refused."""

from __future__ import annotations

import operator
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from builders import GraphBuilder, aten
from torch import fx
from torch._functorch._aot_autograd.descriptors import (
    GradAOTOutput,
    ParamAOTInput,
    PlainAOTInput,
    PlainAOTOutput,
)
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.passes.shape_prop import _extract_tensor_metadata

from lohan_fx.compiler.frozen_graph import Unfreezable, freeze, thaw


def example() -> GraphBuilder:
    """Views, several results, keywords of every kind, None among the outputs, and metadata."""
    build = GraphBuilder()
    x, weight = build.input("x", 4, 6), build.input("weight", 6, 6)
    turned = build.call(aten.t.default, weight)
    product = build.call(aten.mm.default, x, turned)
    parts = build.call(aten.split.Tensor, product, 3, 1)
    first = build.call(operator.getitem, parts, 1)
    cast = build.call(
        aten._to_copy.default, first, dtype=torch.bfloat16, device=torch.device("cpu")
    )
    dense = build.call(aten.clone.default, cast, memory_format=torch.contiguous_format)
    joined = build.call(aten.cat.default, [dense, dense], -1)
    scaled = build.call(aten.mul.Tensor, joined, 1e-05)
    x.meta["desc"] = PlainAOTInput(0)
    weight.meta["desc"] = ParamAOTInput("weight")
    stack = {"17": ("L['self'].blocks.0", torch.nn.Linear)}
    product.meta |= {
        "nn_module_stack": stack,
        "seq_nr": 3,
        "partitioner_tag": "is_forward",
        "original_aten": aten.linear.default,
        "tensor_meta": _extract_tensor_metadata(product.meta["val"]),
        "source_fn_stack": [("mm", torch.mm)],
    }
    scaled.meta |= {"fwd_nn_module_stack": stack, "autograd_backward": True, "stack_trace": "here"}
    output = build.graph.output((scaled, None, product))
    outputs = [PlainAOTOutput(0), GradAOTOutput(PlainAOTInput(0)), PlainAOTOutput(1)]
    output.meta |= {"desc": outputs, "val": (scaled.meta["val"], None, product.meta["val"])}
    return build


def tensors(node: fx.Node) -> list[torch.Tensor]:
    value = node.meta.get("val")
    values = value if isinstance(value, tuple | list) else [value]
    return [item for item in values if isinstance(item, torch.Tensor)]


def test_what_comes_back_is_what_was_written() -> None:
    build = example()
    mode = FakeTensorMode()
    back = thaw(freeze(build.graph, build.mode), mode)
    back.lint()
    assert str(back) == str(build.graph)
    storage_of: dict[int, int] = {}
    for node, other in zip(build.graph.nodes, back.nodes, strict=True):
        assert (other.op, other.name, other.target) == (node.op, node.name, node.target)
        for key in node.meta.keys() - {"val", "source_fn_stack", "nn_module_stack"}:
            if not key.endswith("nn_module_stack"):
                assert other.meta[key] == node.meta[key], key
        assert "source_fn_stack" not in other.meta
        for a, b in zip(tensors(node), tensors(other), strict=True):
            assert b.fake_mode is mode  # type: ignore[attr-defined]
            assert (b.dtype, b.shape, b.stride()) == (a.dtype, a.shape, a.stride())
            assert (b.device, b.storage_offset()) == (a.device, a.storage_offset())
            assert b.untyped_storage().nbytes() == a.untyped_storage().nbytes()
            storage = b.untyped_storage()._cdata
            assert storage_of.setdefault(a.untyped_storage()._cdata, storage) == storage
    assert len(set(storage_of.values())) == len(storage_of)
    by_name = {node.name: node for node in back.nodes}
    assert by_name["mm_default"].meta["nn_module_stack"] == {"0": ("L['self'].blocks.0", "Linear")}
    # The same value in two places is one tensor again.
    (*_, output) = back.nodes
    assert output.meta["val"][2] is by_name["mm_default"].meta["val"]


def test_calls_compute_the_same_afterwards() -> None:
    build = example()
    back = thaw(freeze(build.graph, build.mode), FakeTensorMode())
    inputs = torch.randn(4, 6), torch.randn(6, 6)
    expected = fx.GraphModule({}, build.graph)(*inputs)
    for a, b in zip(expected, fx.GraphModule({}, back)(*inputs), strict=True):
        assert a is b is None or torch.equal(a, b)


def _constant(build: GraphBuilder) -> None:
    build.graph.get_attr("table")


def _function(build: GraphBuilder) -> None:
    build.graph.call_function(os.getpid)


def _metadata(build: GraphBuilder) -> None:
    build.call(aten.relu.default, next(iter(build.graph.nodes))).meta["custom"] = {"stream": 1}


def _real_value(build: GraphBuilder) -> None:
    build.call(aten.relu.default, next(iter(build.graph.nodes))).meta["val"] = torch.zeros(2)


def _sparse(build: GraphBuilder) -> None:
    build.call(aten.to_sparse.default, next(iter(build.graph.nodes)))


def _generator(build: GraphBuilder) -> None:
    node = build.call(aten.relu.default, next(iter(build.graph.nodes)))
    build.graph.call_function(aten.rand.generator, ([2],), {"generator": torch.Generator()})
    assert node.op == "call_function"


@pytest.mark.parametrize(
    ("add", "words"),
    [
        (_constant, "table is a get_attr"),
        (_function, "getpid> is no op"),
        (_metadata, "has the metadata 'custom'"),
        (_real_value, "a value is tensor"),
        (_sparse, "a value is FakeTensor"),
        (_generator, "has Generator"),
    ],
    ids=["constant", "function", "metadata", "real value", "sparse", "generator"],
)
def test_what_cannot_be_written_is_refused(add: Callable[[GraphBuilder], None], words: str) -> None:
    build = GraphBuilder()
    build.input("x", 2, 3)
    add(build)
    with pytest.raises(Unfreezable, match=words):
        freeze(build.graph, build.mode)


class _Program:
    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.mark),)


def test_bytes_are_data_and_nothing_in_them_runs(tmp_path: Path) -> None:
    content = {"nodes": [], "targets": [], "storages": [], "tensors": _Program(tmp_path / "ran")}
    with pytest.raises(pickle.UnpicklingError, match="mkdir is not to be in a graph"):
        thaw(pickle.dumps(content), FakeTensorMode())
    assert not (tmp_path / "ran").exists()
