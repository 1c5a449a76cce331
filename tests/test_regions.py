"""Graphs are cut into regions of compute between moves."""

from __future__ import annotations

import logging
import operator

import pytest
import torch
from builders import GraphBuilder, aten
from torch import fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext

from lohan_fx.compiler.region_compilers import AtenCompiler, InductorCompiler
from lohan_fx.compiler.regions import Cut, cut, region_of
from lohan_fx.errors import PassError
from lohan_fx.ops import is_move


def outline(parts: Cut) -> list[str]:
    """The skeleton's lines: region names, moves and plain ops."""
    lines = []
    for node in parts.graph.nodes:
        region = region_of(node)
        if region is not None:
            lines.append(region.name)
        elif is_move(node):
            lines.append(node.target._schema.name.removeprefix("lohan::"))
        elif node.op == "call_function" and node.target is not operator.getitem:
            lines.append(str(node.target))
    return lines


def test_a_move_ends_a_region_and_keeps_its_place() -> None:
    b = GraphBuilder()
    x = b.input("x", 4)
    y = b.call(aten.relu.default, x)
    b.move("fetch", 3)
    z = b.call(aten.exp.default, y)
    assert outline(cut(b.module(z))) == ["region_0", "fetch", "region_1"]


def test_a_change_of_stage_ends_a_region() -> None:
    b = GraphBuilder()
    x = b.input("x", 4)
    y = b.call(aten.relu.default, x, stage=0)
    z = b.call(aten.exp.default, b.call(aten.neg.default, y, stage=1), stage=1)
    assert outline(cut(b.module(z))) == ["region_0", "region_1"]


def test_a_node_without_a_stage_stays_in_the_current_region() -> None:
    b = GraphBuilder()
    y = b.call(aten.relu.default, b.input("x", 4), stage=2)
    z = b.call(aten.exp.default, b.call(aten.neg.default, y), stage=2)
    assert outline(cut(b.module(z))) == ["region_0"]


def test_equal_layers_share_one_region() -> None:
    b = GraphBuilder()
    x = b.input("x", 4, 4)
    for stage in range(5):
        x = b.call(aten.relu.default, b.call(aten.mm.default, x, x, stage=stage), stage=stage)
    parts = cut(b.module(x))
    assert (parts.num_regions, len(parts.regions)) == (5, 1)


@pytest.mark.parametrize("change", ["constant", "shape", "stride", "dtype"])
def test_regions_that_differ_are_kept_apart(change: str) -> None:
    b = GraphBuilder()
    x = b.input("x", 4, 4)
    y = b.input("y", 4, 2 if change == "shape" else 4)
    if change == "stride":
        y = b.call(aten.t.default, y)
    if change == "dtype":
        y = b.input("z", 4, 4, dtype=torch.float64)
    first = b.call(aten.add.Scalar, x, 1, stage=0)
    b.move("fetch", 0)
    second = b.call(aten.add.Scalar, y, 2 if change == "constant" else 1, stage=1)
    assert len(cut(b.module(first, second)).regions) == 2


def test_views_alone_stay_in_the_skeleton() -> None:
    b = GraphBuilder()
    x = b.input("x", 4, 6)
    left, right = (b.call(operator.getitem, b.call(aten.split.Tensor, x, 2), i) for i in (0, 1))
    y = b.call(aten.t.default, left)
    parts = cut(b.module(y, right))
    assert parts.num_regions == 0


def test_getitems_of_a_wait_are_plain_lines_after_it() -> None:
    b = GraphBuilder()
    x = b.input("x", 4)
    weights = b.move("wait", 0, value=[x.meta["val"], x.meta["val"]])
    relu = b.call(aten.relu.default, x)
    first = b.call(operator.getitem, weights, 0)
    second = b.call(operator.getitem, weights, 1)
    parts = cut(b.module(b.call(aten.add.Tensor, b.call(aten.add.Tensor, relu, first), second)))
    names = [node.name for node in parts.graph.nodes]
    at = names.index("wait_default")
    assert names[at + 1 : at + 3] == ["getitem", "getitem_1"]
    assert parts.num_regions == 1


def test_a_tuple_does_not_cross_a_region() -> None:
    b = GraphBuilder()
    norm = b.call(aten.native_layer_norm.default, b.input("x", 4, 8), [8], None, None, 1e-5)
    b.move("fetch", 0)
    mean = b.call(operator.getitem, norm, 1, stage=1)
    value = b.call(operator.getitem, norm, 0, stage=1)
    parts = cut(b.module(b.call(aten.add.Tensor, value, mean, stage=1)))
    first = parts.regions[0]
    assert all(isinstance(value, torch.Tensor) for value in first.outputs)
    assert outline(parts) == ["region_0", "fetch", "region_1"]


def test_equal_layers_with_dropout_share_one_region() -> None:
    b = GraphBuilder()
    x = b.input("x", 4, 4)
    seeds = b.call(torch.ops.prims.inductor_seeds.default, 3, torch.device("cpu"), stage=0)
    for stage in range(3):
        x = b.call(aten.relu.default, x, stage=stage)
        seed = b.call(torch.ops.prims.inductor_lookup_seed.default, seeds, stage, stage=stage)
        noise = b.call(torch.ops.prims.inductor_random.default, [4, 4], seed, "rand", stage=stage)
        x = b.call(aten.mul.Tensor, x, noise, stage=stage)
    parts = cut(b.module(x))
    assert (parts.num_regions, len(parts.regions)) == (3, 1)


def test_a_constant_is_made_in_each_region_that_reads_it() -> None:
    b = GraphBuilder()
    x = b.input("x", 4)
    one = b.call(aten.full.default, [], 1.0, stage=0)
    for stage in range(3):
        x = b.call(aten.add.Tensor, x, one, stage=stage)
    parts = cut(b.module(x))
    assert len(parts.regions) == 1 and len(parts.regions[0].inputs) == 1


def test_a_dead_value_is_not_computed() -> None:
    b = GraphBuilder()
    x = b.input("x", 4)
    b.call(aten.exp.default, x)
    parts = cut(b.module(b.call(aten.relu.default, x)))
    assert [str(n.target) for n in parts.regions[0].graph.nodes if n.op == "call_function"] == [
        "aten.relu.default"
    ]


def test_the_graph_that_was_cut_is_left_alone() -> None:
    b = GraphBuilder()
    module = b.module(b.call(aten.relu.default, b.input("x", 4)))
    before = str(module.graph)
    cut(module)
    assert str(module.graph) == before


def test_symbolic_sizes_are_refused_by_name() -> None:
    b = GraphBuilder()
    node = b.graph.placeholder("ragged")
    context = StatelessSymbolicContext([DimDynamic.DYNAMIC, DimDynamic.STATIC])
    mode = FakeTensorMode(shape_env=ShapeEnv())
    node.meta["val"] = mode.from_tensor(torch.empty(5, 3), symbolic_context=context)
    with pytest.raises(PassError, match=r"ragged.*dynamic=False"):
        cut(b.module(node))


def test_a_cut_graph_computes_what_the_graph_did() -> None:
    b = GraphBuilder()
    x = b.input("x", 4, 4)
    y = b.call(aten.mm.default, x, x, stage=0)
    z = b.call(aten.add.Tensor, b.call(aten.relu.default, y, stage=1), x, stage=1)
    module = b.module(z, None, y)
    parts = cut(module)
    value = torch.randn(4, 4)
    expected = module(value)
    got = fx.Interpreter(fx.GraphModule({}, parts.graph)).run(value)
    assert torch.equal(got[0], expected[0]) and got[1] is None and torch.equal(got[2], expected[2])


def test_seeded_noise_is_the_same_each_time_in_plain_aten() -> None:
    b = GraphBuilder()
    seed = b.input("seed", dtype=torch.int64)
    noise = b.call(torch.ops.prims.inductor_random.default, [8], seed, "rand", stage=0)
    parts = cut(b.module(noise))
    run = AtenCompiler().compile(parts.regions[0], b.mode)
    (first,), (again,), (other,) = (run([torch.tensor(s)]) for s in (7, 7, 8))
    assert torch.equal(first, again) and not torch.equal(first, other)


def test_a_region_is_compiled_once_for_each_compiler() -> None:
    b = GraphBuilder()
    region = cut(b.module(b.call(aten.relu.default, b.input("x", 4)))).regions[0]
    c = GraphBuilder()
    same = cut(c.module(c.call(aten.relu.default, c.input("another", 4)))).regions[0]
    compiler = AtenCompiler()
    assert compiler.compile(region, b.mode) is compiler.compile(same, c.mode)
    assert (compiler.stats.regions, compiler.stats.distinct) == (2, 1)


def test_a_region_that_inductor_refuses_runs_as_plain_aten(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    import torch._inductor.compile_fx

    def refuse(*args: object, **kwargs: object) -> object:
        raise NotImplementedError("no such kernel")

    monkeypatch.setattr(torch._inductor.compile_fx, "compile_fx_inner", refuse)
    b = GraphBuilder()
    x = b.input("x", 4)
    module = b.module(b.call(aten.relu.default, x, stage=0), b.call(aten.exp.default, x, stage=1))
    compiler = InductorCompiler()
    value = torch.tensor([-1.0, 2.0, 0.0, 1.0])
    with caplog.at_level(logging.WARNING):
        runs = [compiler.compile(region, b.mode) for region in cut(module).regions]
    assert torch.equal(runs[0]([value])[0], value.relu())
    assert compiler.stats.fallbacks == 2
    assert [record.message.count("no such kernel") for record in caplog.records] == [1]
