"""FLOPs and bytes of single nodes."""

from __future__ import annotations

import operator

import pytest
import torch
from builders import GraphBuilder, TinyGPT, aten, joint_graph, tokens
from torch import fx
from torch.utils.flop_counter import FlopCounterMode

from lohan_fx.compiler.node_costs import node_bytes, node_flops


def test_flops_are_those_that_torch_counts() -> None:
    model, ids = TinyGPT(2), tokens()
    graph = joint_graph(model, ids)
    # On the CPU torch's counter does not know the attention kernel, so the matmuls are compared.
    with FlopCounterMode(display=False) as counter:
        model(ids).backward()
    counted = counter.get_total_flops()
    matmuls = [
        node for node in graph.nodes if node.op == "call_function" and "attention" not in node.name
    ]
    assert sum(node_flops(node) for node in matmuls) == counted


def test_attention_has_flops_on_the_cpu_too() -> None:
    builder = GraphBuilder()
    q, k, v = (builder.input(name, 2, 4, 8, 16) for name in "qkv")
    attend = aten._scaled_dot_product_flash_attention_for_cpu.default
    assert node_flops(builder.call(attend, q, k, v)) == 2 * (2 * 2 * 4 * 8 * 8 * 16)


@pytest.mark.parametrize("kind", ["flash", "efficient", "cudnn"])
def test_keys_of_grouped_queries_may_have_fewer_heads(kind: str) -> None:
    table = {name: torch.empty(2, 4, 8, 16, device="meta") for name in ("grad", "q")}
    table |= {name: torch.empty(2, 2, 8, 16, device="meta") for name in "kv"}
    graph = fx.Graph()
    nodes = {name: graph.placeholder(name) for name in table}
    for name, node in nodes.items():
        node.meta["val"] = table[name]
    name = f"_scaled_dot_product_{kind}_attention"
    product = 2 * (2 * 4 * 8 * 8 * 16)  # of one matmul
    forward = graph.call_function(getattr(aten, name).default, tuple(nodes[n] for n in "qkv"))
    assert node_flops(forward) == 2 * product
    op = getattr(aten, f"{name}_backward").default
    assert node_flops(graph.call_function(op, tuple(nodes.values()))) == 5 * product


def test_a_view_moves_no_bytes_and_a_sum_those_of_its_operands() -> None:
    builder = GraphBuilder()
    x = builder.input("x", 4, 8)
    assert node_bytes(builder.call(aten.t.default, x)) == 0
    parts = builder.call(aten.split.Tensor, x, 2)
    assert node_bytes(builder.call(operator.getitem, parts, 0)) == node_bytes(parts) == 0
    assert node_bytes(builder.call(aten.add.Tensor, x, x)) == 2 * 4 * 8 * 4


def test_a_table_look_up_reads_the_rows_it_returns() -> None:
    builder = GraphBuilder()
    table = builder.input("table", 1000, 8)
    rows = builder.input("rows", 2, dtype=torch.int64)
    look_up = builder.call(aten.embedding.default, table, rows)
    assert node_bytes(look_up) == 2 * 8 * 4 + 2 * 8 * 4 + 2 * 8
