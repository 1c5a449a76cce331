"""Inductor's kernels, compiled by its workers while further regions are generated.

Inductor writes a region's code in a tenth of a second or two, gives its kernels to worker processes
(Triton) or threads (C++), and waits for them before it returns. Region by region, that leaves all but a
few workers idle. `deferring` takes the wait out of one compilation; `Deferred.finish` makes it, and then
saves the region in Inductor's cache, kernels included, as would have been done at once.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch._inductor import async_compile, codecache

_WAIT, _SAVE = "wait", "_save_graph"


@dataclass(slots=True)
class Deferred:
    """What is left to do for one compilation. `waits` are arguments of AsyncCompile.wait, `saves` those of
    FxGraphCache._save_graph."""

    waits: list[tuple[Any, ...]] = field(default_factory=list)
    saves: list[tuple[Any, ...]] = field(default_factory=list)

    def finish(self) -> None:
        """Block until the kernels are there; call it in the contexts of the compilation.

        May be called again where it was interrupted. Raises what compiling them raised.
        """
        from torch._inductor.triton_bundler import TritonBundler

        TritonBundler.begin_compile()
        try:
            for compiler, scope in self.waits:
                compiler.wait(scope)
            late, _ = TritonBundler.collect()
        finally:
            TritonBundler.end_compile()
        for key, graph, *rest in self.saves:
            # Kernels that no worker took were compiled, and collected, before.
            early = graph._triton_bundle
            if early is not None:
                late = type(late)(
                    early.kernel_artifacts + late.kernel_artifacts,
                    early.static_autotuners + late.static_autotuners,
                )
            graph.set_triton_bundle(late)
            codecache.FxGraphCache._save_graph(key, graph, *rest)
        self.saves.clear()


@contextmanager
def deferring() -> Iterator[Deferred]:
    """Within, compile_fx_inner returns before its kernels are there.

    What it returns must not be called before `finish`. To be used under Dynamo's lock: it holds for
    all threads.
    """
    deferred = Deferred()

    def wait(compiler: Any, scope: dict[str, Any]) -> None:
        deferred.waits.append((compiler, scope))

    def save(key: str, graph: Any, *rest: Any) -> None:
        kept = copy.copy(graph)  # it changes before it is used
        kept.compiled_fn_runner = None  # is not saved, and dies with the graph that holds it
        deferred.saves.append((key, kept, *rest))

    owners: tuple[Any, Any] = async_compile.AsyncCompile, codecache.FxGraphCache
    before = [vars(owner)[name] for owner, name in zip(owners, (_WAIT, _SAVE), strict=True)]
    setattr(owners[0], _WAIT, wait)
    setattr(owners[1], _SAVE, staticmethod(save))
    try:
        yield deferred
    finally:
        setattr(owners[0], _WAIT, before[0])
        setattr(owners[1], _SAVE, before[1])


def can_defer() -> bool:
    """True for the torch versions whose Inductor has what this module takes apart."""
    graph = getattr(torch._inductor.output_code, "CompiledFxGraph", None)
    return (
        _WAIT in vars(async_compile.AsyncCompile)
        and isinstance(vars(codecache.FxGraphCache).get(_SAVE), staticmethod)
        and "_triton_bundle" in getattr(graph, "__annotations__", {})
    )


def warm_workers(device: torch.device) -> None:
    """Start what Inductor needs seconds for, beside what is done before: the digest of its source, and
    the worker processes for Triton.

    Inductor does this when Dynamo looks it up by name. Until the workers are ready it compiles in this
    process.
    """
    prefetch = getattr(codecache.torch_key, "prefetch", None)  # torch 2.12 and later
    if prefetch is not None:
        prefetch()
    if device.type == "cuda":
        async_compile.maybe_warm_pool()
