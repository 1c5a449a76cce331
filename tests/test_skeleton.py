"""Skeletons run in graph order, free values early, and give the numbers of eager PyTorch."""

from __future__ import annotations

import operator
import traceback
import weakref
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from builders import GraphBuilder, TinyGPT, aten, compile_with, tokens
from torch import fx, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

import lohan_fx.ops as ops
from lohan_fx.compiler.region_compilers import AtenCompiler, InductorCompiler, RegionCompiler
from lohan_fx.compiler.regions import cut
from lohan_fx.compiler.skeleton import Skeleton, lower, memory_timeline, region_workspace_bytes

FLOAT = 4


class Recorder:
    """A runtime that writes down every move, and how many watched tensors are alive at it."""

    def __init__(self) -> None:
        self.log: list[tuple[Any, ...]] = []
        self.watched: dict[str, weakref.ref[torch.Tensor]] = {}
        self.alive_at: list[list[str]] = []
        self.weights: list[torch.Tensor] = []

    def watch(self, **tensors: torch.Tensor) -> list[torch.Tensor]:
        self.watched = {name: weakref.ref(tensor) for name, tensor in tensors.items()}
        return list(tensors.values())

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)

        def move(*args: Any) -> Any:
            self.log.append((name, *(a for a in args if isinstance(a, int))))
            self.alive_at.append([key for key, ref in self.watched.items() if ref() is not None])
            return self.weights if name == "wait" else None

        return move


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> Iterator[Recorder]:
    runtime = Recorder()
    monkeypatch.setitem(ops._runtimes, 1, runtime)  # type: ignore[arg-type]
    yield runtime


def test_moves_run_in_the_order_of_graph_and_source(recorder: Recorder) -> None:
    b = GraphBuilder()
    x = b.input("x", 4)
    b.move("fetch", 5)
    y = b.call(aten.relu.default, x, stage=0)
    b.move("fetch", 2)
    b.move("offload", 0, y)
    z = b.call(aten.exp.default, y, stage=1)
    b.move("release", 5)
    b.move("offload_wait", 0)
    b.move("end")
    module = b.module(z)
    expected = ["fetch", "fetch", "offload", "release", "offload_wait", "end"]
    moves = [node for node in module.graph.nodes if ops.is_move(node)]
    assert [str(node.target).split(".")[1] for node in moves] == expected
    skeleton = lower(module, AtenCompiler(), b.mode)
    lines = [line.strip().split("(")[0] for line in skeleton.source.splitlines()]
    assert [line for line in lines if line in set(expected)] == expected
    skeleton([torch.ones(4)])
    assert recorder.log == [
        ("fetch", 5),
        ("fetch", 2),
        ("offload", 0),
        ("release", 5),
        ("offload_wait", 0),
        ("end",),
    ]


def test_a_region_frees_inputs_that_die_in_it_before_it_ends() -> None:
    alive: list[list[str]] = []
    refs: dict[str, weakref.ref[torch.Tensor]] = {}

    def probe(value: torch.Tensor) -> torch.Tensor:
        alive.append([name for name, ref in refs.items() if ref() is not None])
        return value + 1

    b = GraphBuilder()
    first, second = b.input("first", 4, 4), b.input("second", 4, 4)
    product = b.call(aten.mm.default, first, first, stage=0)
    seen = b.call(probe, product, stage=0)
    total = b.call(
        aten.add.Tensor,
        seen,
        b.call(probe, b.call(aten.mm.default, seen, second, stage=0), stage=0),
        stage=0,
    )
    skeleton = lower(b.module(total), AtenCompiler(), b.mode)
    args = [torch.ones(4, 4), torch.ones(4, 4)]
    alive.clear()
    refs.update(first=weakref.ref(args[0]), second=weakref.ref(args[1]))
    skeleton(args)
    assert args == []
    assert alive == [["second"], []]


def test_a_value_is_freed_before_the_move_that_follows_its_last_use(recorder: Recorder) -> None:
    b = GraphBuilder()
    x, w = b.input("x", 4, 4), b.input("w", 4, 4)
    y = b.call(aten.mm.default, x, w, stage=0)
    b.move("fetch", 0)
    z = b.call(aten.mm.default, y, w, stage=1)
    b.move("fetch", 1)
    skeleton = lower(b.module(z), AtenCompiler(), b.mode)
    skeleton(recorder.watch(x=torch.ones(4, 4), w=torch.ones(4, 4)))
    assert recorder.alive_at == [["w"], []]


def test_fetched_weights_are_dropped_one_by_one(recorder: Recorder) -> None:
    b = GraphBuilder()
    x = b.input("x", 4)
    fakes = [x.meta["val"], x.meta["val"]]
    waited = b.move("wait", 0, value=fakes)
    weights = [b.call(operator.getitem, waited, index) for index in range(2)]
    y = b.call(aten.add.Tensor, x, weights[0], stage=0)
    b.move("fetch", 1)
    z = b.call(aten.add.Tensor, y, weights[1], stage=0)
    b.move("release", 0)
    skeleton = lower(b.module(z), AtenCompiler(), b.mode)

    def wait(bucket: int) -> list[torch.Tensor]:
        return recorder.watch(first=torch.ones(4), second=torch.ones(4))

    recorder.__dict__["wait"] = wait
    skeleton([torch.ones(4)])
    assert recorder.alive_at == [["second"], []]


@pytest.mark.parametrize("op", ["native_layer_norm", "attention"])
def test_results_of_ops_with_several_may_leave_a_region(op: str, recorder: Recorder) -> None:
    b = GraphBuilder()
    if op == "attention":
        q, k, v = (b.input(name, 1, 2, 4, 8) for name in "qkv")
        both = b.call(aten._scaled_dot_product_flash_attention_for_cpu.default, q, k, v, stage=0)
        args = [torch.randn(1, 2, 4, 8) for _ in range(3)]
    else:
        x = b.input("x", 4, 8)
        both = b.call(aten.native_layer_norm.default, x, [8], None, None, 1e-5, stage=0)
        args = [torch.randn(4, 8)]
    b.move("fetch", 0)
    second = b.call(operator.getitem, both, 1, stage=0)
    first = b.call(operator.getitem, both, 0, stage=0)
    module = b.module(b.call(aten.relu.default, first, stage=1), second)
    expected = module(*args)
    got = lower(module, AtenCompiler(), b.mode)(list(args))
    assert all(torch.equal(a, e) for a, e in zip(got, expected, strict=True))


def test_a_traceback_shows_the_generated_line(recorder: Recorder) -> None:
    def explode() -> None:
        raise RuntimeError("no disk")

    recorder.__dict__["end"] = explode
    b = GraphBuilder()
    b.move("end")
    skeleton = lower(b.module(), AtenCompiler(), b.mode)
    with pytest.raises(RuntimeError, match="no disk") as caught:
        skeleton([])
    assert any(entry.line == "end(1)" for entry in traceback.extract_tb(caught.value.__traceback__))


def gradients(function: Any, model: nn.Module, *args: Any) -> list[torch.Tensor]:
    """The loss and every gradient."""
    model.zero_grad()
    loss = function(*args)
    loss.backward()
    return [loss.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]


def lowered_gpt(layers: int, compiler: RegionCompiler, **options: Any) -> tuple[Any, Any, Any]:
    """Eager and lowered loss and gradients of a tiny GPT, and what it was lowered to."""
    torch.manual_seed(0)
    model = TinyGPT(layers)
    compiled, lowered = compile_with(model, compiler, **options)
    return (
        gradients(model, model, tokens()),
        gradients(compiled, model, tokens()),
        lowered.skeletons,
    )


def test_plain_aten_regions_give_the_bits_of_eager_at_any_depth() -> None:
    compiler = AtenCompiler()
    counts = []
    for layers in (2, 6):
        eager, ours, skeletons = lowered_gpt(layers, compiler)
        assert len(eager) == len(ours)
        assert all(torch.equal(a, b) for a, b in zip(eager, ours, strict=True))
        counts.append([skeleton.num_distinct for skeleton in skeletons])
        assert [skeleton.num_regions for skeleton in skeletons] == [layers + 2, layers + 2]
    assert counts[0] == counts[1]


@pytest.mark.slow
def test_inductor_regions_are_close_to_eager_and_do_not_grow_with_depth() -> None:
    from torch._inductor.decomposition import select_decomp_table

    compiler = InductorCompiler()
    for layers in (2, 6):
        eager, ours, _ = lowered_gpt(
            layers, compiler, decompositions=select_decomp_table(), joint_passes=True
        )
        for a, b in zip(eager, ours, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
        if layers == 2:
            distinct = compiler.stats.distinct
    # The deeper model needed nothing new.
    assert compiler.stats.distinct == distinct
    assert compiler.stats.fallbacks == 0


def test_layers_with_dropout_share_regions_and_backward_repeats_their_masks() -> None:
    torch.manual_seed(0)
    model = TinyGPT(4, dropout=0.5).double()
    compiler = AtenCompiler()
    compiled, lowered = compile_with(model, compiler, joint_passes=True)

    def run() -> torch.Tensor:
        torch.manual_seed(3)
        return compiled(tokens())

    run().backward()
    assert [skeleton.num_distinct for skeleton in lowered.skeletons] == [3, 3]
    # The directional derivative by finite differences needs the same mask in every run, and agrees
    # with the gradients only if backward used that mask.
    weights = [p for p in model.parameters() if p.grad is not None]
    directions = [torch.randn_like(p) for p in weights]
    slope = sum((p.grad * d).sum() for p, d in zip(weights, directions, strict=True))
    losses = []
    with torch.no_grad():
        for step in (1e-6, -2e-6):
            for p, d in zip(weights, directions, strict=True):
                p.add_(d, alpha=step)
            losses.append(run().detach())
    difference = (losses[0] - losses[1]) / 2e-6
    torch.testing.assert_close(difference, torch.as_tensor(slope), rtol=1e-4, atol=1e-6)


class Checkpointed(TinyGPT):
    """Every block recomputed in backward, dropout masks included."""

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.tokens(tokens)
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False)
        return self.head(self.norm(x)).logsumexp(-1).mean()


def test_recomputed_dropout_repeats_its_masks_to_the_bit() -> None:
    torch.manual_seed(0)
    model = Checkpointed(3, dropout=0.3)
    compiled, lowered = compile_with(model, AtenCompiler())
    torch.manual_seed(4)
    eager = gradients(model, model, tokens())
    torch.manual_seed(4)
    ours = gradients(compiled, model, tokens())
    assert all(torch.equal(a, b) for a, b in zip(eager, ours, strict=True))
    # The saved states of the random generator have no fixed size; they count as host memory.
    assert all(nbytes > 0 for _, nbytes in memory_timeline(lowered.skeletons[1].graph))


def test_running_statistics_are_written_in_place() -> None:
    def build() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(16, 1))

    eager, ours = build(), build()
    image = torch.randn(2, 3, 4, 4)
    eager(image).sum().backward()
    compiled, _ = compile_with(ours, AtenCompiler())
    compiled(image).sum().backward()
    assert all(torch.equal(a, b) for a, b in zip(eager.buffers(), ours.buffers(), strict=True))


class Meter(TorchDispatchMode):
    """The most bytes of storage that were alive at once after any op."""

    def __init__(self, inputs: list[torch.Tensor]) -> None:
        super().__init__()
        self.peak = 0
        self._sizes: dict[int, int] = {}
        self._alive: dict[int, StorageWeakRef] = {}
        self.add(inputs)

    def add(self, values: object) -> None:
        self._alive = {key: ref for key, ref in self._alive.items() if not ref.expired()}
        for value in tree_leaves(values):
            if isinstance(value, torch.Tensor):
                storage = value.untyped_storage()
                self._alive[storage._cdata] = StorageWeakRef(storage)
                self._sizes[storage._cdata] = storage.nbytes()
        self.peak = max(self.peak, sum(self._sizes[key] for key in self._alive))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.add(result)
        return result


def test_the_predicted_peak_of_plain_aten_is_the_measured_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    peaks: list[tuple[int, int]] = []

    def measure(skeleton: Skeleton, args: list[Any]) -> Any:
        with Meter(list(args)) as meter:
            result = skeleton.emitted.run(args)
        predicted = memory_timeline(
            skeleton.graph,
            workspace=lambda region, dying: region_workspace_bytes(
                region.graph, dying, fused=False
            ),
        )
        peaks.append((meter.peak, max(nbytes for _, nbytes in predicted)))
        return result

    monkeypatch.setattr(Skeleton, "__call__", measure)
    compiled, _ = compile_with(TinyGPT(3, width=64, vocab=256), AtenCompiler())
    compiled(tokens(4, 32, 256)).backward()
    assert len(peaks) == 2
    for measured, predicted in peaks:
        assert predicted == pytest.approx(measured, rel=0.02)


@pytest.mark.slow
def test_an_inductor_region_keeps_strides_and_frees_inputs() -> None:
    alive: list[bool] = []
    refs: list[weakref.ref[torch.Tensor]] = []
    b = GraphBuilder()
    x, w = b.input("x", 8, 6), b.input("w", 6, 8)
    y = b.call(aten.mm.default, x, w, stage=0)
    flipped = b.call(aten.t.default, b.call(aten.relu.default, y, stage=0), stage=0)
    skeleton = lower(b.module(flipped), InductorCompiler(), b.mode)
    args = [torch.randn(8, 6), torch.randn(6, 8)]
    expected = (args[0] @ args[1]).relu().t()
    refs.extend(weakref.ref(arg) for arg in args)
    (result,) = skeleton(args)
    alive.extend(ref() is not None for ref in refs)
    assert result.stride() == flipped.meta["val"].stride() == (1, 8)
    torch.testing.assert_close(result, expected)
    assert alive == [False, False]


def timeline(module: fx.GraphModule, **options: Any) -> dict[str, int]:
    options.setdefault("workspace", lambda region, dying: 0)
    return dict(memory_timeline(cut(module).graph, **options))


def test_a_line_counts_its_inputs_and_outputs_and_a_view_counts_once() -> None:
    b = GraphBuilder()
    x = b.input("x", 10)
    y = b.call(aten.relu.default, x, stage=0)
    seen = b.call(aten.view.default, y, [2, 5], stage=0)
    b.move("fetch", 0)
    z = b.call(aten.exp.default, seen, stage=1)
    assert timeline(b.module(z, seen)) == {
        "inputs": 10 * FLOAT,
        "region_0_call": 20 * FLOAT,
        "fetch_default": 10 * FLOAT,
        "region_1_call": 20 * FLOAT,
        "output": 20 * FLOAT,
    }


def test_a_copy_keeps_its_source_until_its_wait_and_its_target_from_the_start() -> None:
    b = GraphBuilder()
    x = b.input("x", 10)
    b.move("offload", 4, x)
    b.move("fetch", 0)
    b.move("offload_wait", 4)
    b.move("fetch", 1)
    b.move("reload", 4)
    back = b.move("reload_wait", 4, value=x.meta["val"])
    assert list(timeline(b.module(back)).values()) == [
        size * FLOAT for size in (10, 10, 10, 10, 0, 10, 10, 10)
    ]


def test_what_the_runtime_owns_is_left_out() -> None:
    b = GraphBuilder()
    x = b.input("x", 10)
    weight = b.call(operator.getitem, b.move("wait", 0, value=[x.meta["val"]]), 0)
    module = b.module(b.call(aten.add.Tensor, x, weight, stage=0))
    owned = timeline(
        module,
        owned_by_runtime=lambda node: node.target is operator.getitem and ops.is_move(node.args[0]),
    )
    assert max(owned.values()) == 20 * FLOAT
    assert max(timeline(module).values()) == 30 * FLOAT


def workspace(module: fx.GraphModule, **options: Any) -> int:
    (region,) = cut(module).regions
    return region_workspace_bytes(region.graph, **options)


def test_a_pointwise_chain_needs_no_workspace_when_fused() -> None:
    b = GraphBuilder()
    x = b.input("x", 10)
    y = x
    for op in (aten.exp.default, aten.sin.default, aten.neg.default):
        y = b.call(op, y, stage=0)
    module = b.module(y)
    assert workspace(module) == 0
    assert workspace(module, fused=False) == 10 * FLOAT


def test_what_a_matmul_reads_is_workspace() -> None:
    b = GraphBuilder()
    x = b.input("x", 4, 4)
    y = b.call(aten.mm.default, b.call(aten.exp.default, x, stage=0), x, stage=0)
    assert workspace(b.module(y)) == 16 * FLOAT


def test_inputs_that_die_early_make_room() -> None:
    b = GraphBuilder()
    x, w = b.input("x", 100, 2), b.input("w", 2, 2)
    y = b.call(aten.sum.dim_IntList, b.call(aten.mm.default, x, w, stage=0), [0], stage=0)
    big = b.call(aten.mm.default, b.input("p", 100, 1), b.input("q", 1, 2), stage=0)
    module = b.module(y, big)
    kept, given = workspace(module), workspace(module, dying=frozenset({0}))
    assert given < kept
