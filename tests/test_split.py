"""The split of a joint graph: what goes across, what backward makes again, and where."""

from __future__ import annotations

import pytest
import torch
from builders import joint_graph
from torch import fx

from lohan_fx.compiler.partition import Joint, split


def layers(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    for _ in range(2):
        x = torch.mm(x, w).sin().cos()
    return x.sum()


def split_at(graph: fx.Graph, *saved: str) -> tuple[fx.Graph, fx.Graph]:
    joint = Joint(fx.GraphModule({}, graph), (), 1, {}, {})
    forward, backward = split(joint, [n for n in graph.nodes if n.name in saved])
    return forward.graph, backward.graph


def names(graph: fx.Graph, op: str = "call_function") -> list[str]:
    return [node.name for node in graph.nodes if node.op == op]


@pytest.fixture
def joint() -> fx.Graph:
    x, w = torch.randn(4, 4, requires_grad=True), torch.randn(4, 4, requires_grad=True)
    return joint_graph(layers, x, w)


def test_what_is_saved_goes_across_and_nothing_else(joint: fx.Graph) -> None:
    forward, backward = split_at(joint, "mm", "mm_1")
    results = [node.name for node in forward.output_node().args[0]]
    assert results == ["sum_1", "primals_1", "primals_2", "mm", "mm_1"]
    assert names(backward, "placeholder") == [*results[1:], "tangents_1"]


def test_what_is_made_again_stands_right_before_its_first_reader(joint: fx.Graph) -> None:
    _, backward = split_at(joint, "mm", "mm_1")
    order = names(backward)
    assert order[:3] == ["expand", "sin_1", "sin_2"]  # nothing is made before there is a gradient
    assert order[order.index("mul_1") + 1 :][:4] == ["sin", "cos", "t", "mm_2"]
    assert {"mm", "mm_1"}.isdisjoint(order)


def test_both_passes_compute_what_the_joint_graph_computes(joint: fx.Graph) -> None:
    inputs = torch.randn(4, 4), torch.randn(4, 4)
    tangent = torch.tensor(1.0)
    forward, backward = split_at(joint, "mm")
    loss, *saved = fx.GraphModule({}, forward)(*inputs)
    grads = fx.GraphModule({}, backward)(*saved, tangent)
    leaves = [value.clone().requires_grad_() for value in inputs]
    reference = layers(*leaves)
    reference.backward()
    assert torch.equal(loss, reference)
    for grad, leaf in zip(grads, leaves, strict=True):
        assert torch.equal(grad, leaf.grad)


def test_what_unpacks_a_result_follows_it() -> None:
    def halves(x: torch.Tensor) -> torch.Tensor:
        values, places = torch.topk(x.sin(), 2)
        return (values * torch.gather(x, 1, places)).sum()

    graph = joint_graph(halves, torch.randn(4, 4, requires_grad=True))
    forward, _ = split_at(graph, "sin")
    order = names(forward)
    assert order[order.index("topk") + 1 :][:2] == ["getitem", "getitem_1"]
