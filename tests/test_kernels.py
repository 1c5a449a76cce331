"""Kernels of several regions are compiled at once, and are in Inductor's cache afterwards."""

from __future__ import annotations

import gc
import logging
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from builders import GraphBuilder
from torch._dynamo.utils import counters
from torch._inductor import async_compile, codecache
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from lohan_fx.compiler import kernels
from lohan_fx.compiler.region_compilers import InductorCompiler
from lohan_fx.compiler.regions import cut

aten = torch.ops.aten
VALUE = torch.tensor([-1.0, 2.0, 0.5, 3.0])


@pytest.fixture(autouse=True)
def empty_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    counters["inductor"].clear()


@pytest.fixture
def events(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """ "kernel" for each kernel given to a worker, "wait" for each module whose kernels were awaited."""
    found: list[str] = []
    owner: Any = async_compile.AsyncCompile
    give, wait = owner.cpp_pybinding, owner.wait

    def giving(self: Any, *args: Any, **options: Any) -> Any:
        found.append("kernel")
        return give(self, *args, **options)

    def waiting(self: Any, scope: dict[str, Any]) -> None:
        found.append("wait")
        wait(self, scope)

    monkeypatch.setattr(owner, "cpp_pybinding", giving)
    monkeypatch.setattr(owner, "wait", waiting)
    return found


def two_regions(compiler: InductorCompiler) -> list[Any]:
    b = GraphBuilder()
    b.mode = FakeTensorMode(shape_env=ShapeEnv())  # as Dynamo's is; Inductor caches nothing without
    x = b.input("x", 4)
    module = b.module(b.call(aten.relu.default, x, stage=0), b.call(aten.exp.default, x, stage=1))
    return [compiler.compile(region, b.mode) for region in cut(module).regions]


def check(functions: list[Any]) -> None:
    relu, exp = functions
    torch.testing.assert_close(relu([VALUE])[0], VALUE.relu())
    torch.testing.assert_close(exp([VALUE])[0], VALUE.exp())


def test_kernels_are_all_given_out_before_the_first_is_awaited(events: list[str]) -> None:
    assert kernels.can_defer()
    compiler = InductorCompiler()
    functions = two_regions(compiler)
    assert events == ["kernel", "kernel"]
    compiler.finish()
    assert events == ["kernel", "kernel", "wait", "wait"]
    check(functions)
    compiler.finish()
    assert events.count("wait") == 2
    assert compiler.stats.fallbacks == 0


def test_a_region_that_is_called_first_waits_by_itself(events: list[str]) -> None:
    check(two_regions(InductorCompiler()))
    assert events == ["kernel", "kernel", "wait", "wait"]


def test_another_compiler_finds_them_in_inductors_cache(events: list[str]) -> None:
    first = InductorCompiler()
    two_regions(first)
    assert counters["inductor"]["fxgraph_cache_miss"] == 2
    first.finish()
    check(two_regions(InductorCompiler()))
    assert counters["inductor"]["fxgraph_cache_miss"] == 2
    assert counters["inductor"]["fxgraph_cache_hit"] == 2


def test_a_kernel_that_does_not_compile_is_replaced_and_not_kept(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    compiler = InductorCompiler()
    functions = two_regions(compiler)
    calls = iter([True])

    def wait(self: Any, scope: dict[str, Any]) -> None:
        if next(calls, False):
            raise RuntimeError("ptxas is ill")
        real(self, scope)

    real = async_compile.AsyncCompile.wait
    monkeypatch.setattr(async_compile.AsyncCompile, "wait", wait)
    with caplog.at_level(logging.WARNING):
        compiler.finish()
    assert compiler.stats.fallbacks == 1
    assert ["ptxas is ill" in record.message for record in caplog.records] == [True]
    check(functions)
    two_regions(InductorCompiler())
    assert counters["inductor"]["fxgraph_cache_hit"] == 1


def test_an_interrupted_wait_is_taken_up_again(monkeypatch: pytest.MonkeyPatch) -> None:
    compiler = InductorCompiler()
    functions = two_regions(compiler)

    def interrupt(self: Any, scope: dict[str, Any]) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(async_compile.AsyncCompile, "wait", interrupt)
        with pytest.raises(KeyboardInterrupt):
            compiler.finish()
    check(functions)
    assert compiler.stats.fallbacks == 0


def test_an_inductor_of_another_shape_is_waited_for_as_it_wants(
    monkeypatch: pytest.MonkeyPatch, events: list[str]
) -> None:
    monkeypatch.setattr(codecache.FxGraphCache, "_save_graph", lambda *args: None)
    assert not kernels.can_defer()
    compiler = InductorCompiler()
    functions = two_regions(compiler)
    assert events == ["kernel", "wait", "kernel", "wait"]
    check(functions)


def test_kernels_found_before_and_after_the_wait_are_saved_together() -> None:
    from torch._inductor.triton_bundler import TritonBundle

    saved: list[Any] = []

    class Graph:
        def __init__(self) -> None:
            self._triton_bundle: Any = TritonBundle(["early"], [])  # type: ignore[list-item]

        def set_triton_bundle(self, bundle: Any) -> None:
            self._triton_bundle = bundle

    graph = Graph()
    with kernels.deferring() as deferred:
        save: Any = codecache.FxGraphCache._save_graph
        save("key", graph, "inputs")
    (key, kept, *rest) = deferred.saves[0]
    assert (key, rest) == ("key", ["inputs"])
    assert kept is not graph
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(codecache.FxGraphCache, "_save_graph", lambda *args: saved.append(args))
        deferred.finish()
    assert saved[0][0] == "key"
    assert saved[0][1]._triton_bundle.kernel_artifacts == ["early"]


def test_workers_are_started_for_gpus_only(monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[str] = []
    monkeypatch.setattr(async_compile, "maybe_warm_pool", lambda: started.append("pool"))
    kernels.warm_workers(torch.device("cpu"))
    assert not started
    kernels.warm_workers(torch.device("cuda"))
    assert started == ["pool"]


def test_regions_die_without_a_sound(monkeypatch: pytest.MonkeyPatch) -> None:
    found: list[Any] = []
    monkeypatch.setattr(sys, "unraisablehook", found.append)
    compiler = InductorCompiler()
    functions = two_regions(compiler)
    compiler.finish()
    check(functions)
    del compiler, functions
    torch._dynamo.reset()
    gc.collect()
    assert [str(each.exc_value) for each in found] == []
