"""Where a stage may be cut for a move: between kernels, never inside one."""

from __future__ import annotations

import functools
import itertools
import operator
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from builders import GraphBuilder
from torch import fx, nn
from torch.fx.experimental.proxy_tensor import make_fx
from training import CASES

import lohan_fx
from lohan_fx.compiler import capture
from lohan_fx.compiler.fusion import free_cuts, fused_kernels, op_name
from lohan_fx.compiler.regions import cut
from lohan_fx.compiler.weave import Weaver, Woven, weave_training
from lohan_fx.planner import Forced, Problem, Solution, solve

aten = torch.ops.aten
SQUARE = (16, 16)


def run_of(function: Callable[..., Any], *shapes: tuple[int, ...]) -> list[fx.Node]:
    inputs = [torch.zeros(shape) for shape in shapes]
    graph = make_fx(function, tracing_mode="fake")(*inputs).graph
    return [node for node in graph.nodes if node.op == "call_function"]


def parts(function: Callable[..., Any], *shapes: tuple[int, ...]) -> list[list[str]]:
    """Names of the ops between free cuts."""
    run = run_of(function, *shapes)
    bounds = [0, *free_cuts(run), len(run)]
    return [[op_name(node) for node in run[a:b]] for a, b in itertools.pairwise(bounds)]


def test_a_product_is_cut_from_what_is_before_and_after_it() -> None:
    found = parts(lambda x, w: torch.relu((x * 2).exp() @ w) + 1, SQUARE, SQUARE)
    assert found == [["mul", "exp"], ["mm"], ["relu", "add"]]


def test_views_of_the_arguments_stay_with_the_product() -> None:
    found = parts(lambda x, w: (x * 2) @ w.t(), SQUARE, SQUARE)
    assert found == [["mul"], ["t", "mm"]]


def test_code_that_fuses_over_a_product_is_not_cut_there() -> None:
    """silu(gate) stands before the second product; its only reader is behind it."""

    def gated(x: torch.Tensor, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        return nn.functional.silu(x @ gate) * (x @ up)

    assert parts(gated, SQUARE, SQUARE, SQUARE) == [["mm"], ["silu", "mm", "mul"]]


def test_a_value_in_memory_may_be_read_behind_a_cut() -> None:
    def residual(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        y = x + 1
        return y + y @ w

    assert parts(residual, SQUARE, SQUARE) == [["add"], ["mm"], ["add"]]


def test_the_sum_over_rows_stays_with_what_it_repeats() -> None:
    def backward(g: torch.Tensor, x: torch.Tensor, w: torch.Tensor) -> tuple[torch.Tensor, ...]:
        scaled = g * x
        return x @ w, scaled.sum(0)

    assert parts(backward, (64, 16), (64, 16), SQUARE) == [["mul", "mm", "sum"]]


def test_a_tuple_is_not_cut_from_its_items() -> None:
    b = GraphBuilder()
    x = b.input("x", 2, 3, 8, 8)
    pooled = b.call(aten.max_pool2d_with_indices.default, x, [2, 2], stage=0)
    value = b.graph.call_function(operator.getitem, (pooled, 0))
    value.meta["val"] = pooled.meta["val"][0]
    after = b.call(aten.relu.default, value, stage=0)
    assert free_cuts([pooled, value, after]) == [2]


@functools.cache
def woven_graphs(case: str) -> tuple[Woven, list[fx.Graph]]:
    """A case with all swapped that can be: what was woven, and the graphs it was made of."""
    woven: list[Woven] = []
    graphs: list[fx.Graph] = []

    def spy(forward: fx.GraphModule, backward: fx.GraphModule, **options: Any) -> Woven:
        graphs[:] = [forward.graph, backward.graph]
        woven.append(weave_training(forward, backward, **options))
        return woven[-1]

    def swap(problem: Problem, forced: Forced | None) -> Solution:
        return solve(problem, "swap-all", forced)

    chosen = CASES[case]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(capture, "weave_training", spy)
        lohan_fx.make_plan(
            chosen.build(),
            lohan_fx.Budget(gpu=10**9, dram=10**9, ssd=[Path(".")]),
            chosen.batch(0),
            dtype=torch.bfloat16,
            policy=swap,
        )
    return woven[-1], graphs


@pytest.mark.parametrize("case", ["llama", "gpt2"])
def test_cut_everywhere_it_may_be_a_stage_moves_no_byte_more(case: str) -> None:
    _, graphs = woven_graphs(case)
    for graph in graphs:
        weaver = Weaver(graph, 0)
        cuts = weaver.free_cuts()
        assert cuts[0] == 0 and cuts[-1] == weaver.end and cuts == sorted(set(cuts))
        stages = [n.meta.get("lohan_stage") for n in weaver.compute]
        ends = [0, *(p for p in cuts[1:-1] if stages[p] != stages[p - 1]), weaver.end]
        inner = 0
        for start, end in itertools.pairwise(ends):
            later = set(weaver.compute[end:])
            whole = sum(k.nbytes for k in fused_kernels(weaver.compute[start:end], later))
            here = [p for p in cuts if start <= p <= end]
            inner += len(here) - 2
            pieces = [
                sum(k.nbytes for k in fused_kernels(weaver.compute[a:b], set(weaver.compute[b:])))
                for a, b in itertools.pairwise(here)
            ]
            assert sum(pieces) <= whole
        assert inner > 3


def test_layers_that_swap_alike_are_cut_alike() -> None:
    woven, _ = woven_graphs("llama")
    assert woven.backward is not None
    for module in (woven.forward, woven.backward):
        found = cut(module)
        assert len(found.regions) < 0.75 * found.num_regions
