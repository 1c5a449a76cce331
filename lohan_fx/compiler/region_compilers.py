"""What turns a region into a function: Inductor, or plain aten calls node by node.

Both compile each distinct region once per process and compiler, and return functions that take one
list and empty it, freeing inputs after their last use. A function may be returned before its kernels are
there; it waits for them when it is first called, if nobody called `finish` before.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch._inductor.inductor_prims  # defines the random prims named below
from torch._guards import TracingContext, tracing
from torch._inductor.virtualized import V
from torch._subclasses.fake_tensor import FakeTensorMode

from lohan_fx.errors import PassError

from .emit import Boxed, emit
from .kernels import Deferred, can_defer, deferring
from .regions import Region

_log = logging.getLogger(__name__)


@dataclass(slots=True)
class RegionStats:
    """How often a compiler was asked, for how many distinct regions, and how long they took."""

    regions: int = 0
    distinct: int = 0
    seconds: float = 0.0
    fallbacks: int = 0


class RegionCompiler(Protocol):
    """Turns regions into functions of one list of inputs."""

    @property
    def stats(self) -> RegionStats: ...

    def compile(self, region: Region, fake_mode: FakeTensorMode) -> Boxed: ...

    def finish(self) -> None:
        """Block until all that was asked for is compiled."""
        ...


class _OncePerKey:
    def __init__(self) -> None:
        self.stats = RegionStats()
        self._compiled: dict[str, Boxed] = {}

    def compile(self, region: Region, fake_mode: FakeTensorMode) -> Boxed:
        self.stats.regions += 1
        if region.key not in self._compiled:
            began = time.perf_counter()
            self._compiled[region.key] = self._compile(region, fake_mode)
            self.stats.seconds += time.perf_counter() - began
            self.stats.distinct += 1
        return self._compiled[region.key]

    def finish(self) -> None:
        """Block until all that was asked for is compiled."""

    def _compile(self, region: Region, fake_mode: FakeTensorMode) -> Boxed:
        raise NotImplementedError


class AtenCompiler(_OncePerKey):
    """Runs a region's ops one by one, in order, without fusion."""

    def _compile(self, region: Region, fake_mode: FakeTensorMode) -> Boxed:
        module = region.module()
        for node in module.graph.nodes:
            node.target = _SEEDED.get(node.target, node.target)
            node.meta.pop("lohan_stage", None)
        return emit(module.graph, name=region.name, attributes=region.attributes).run


class _Late:
    """A region's function, which calls `finish` first until that has set `function`."""

    __slots__ = ("function",)

    def __init__(self, finish: Callable[[], None]) -> None:
        def first(args: list[Any]) -> Sequence[Any]:
            finish()
            return self.function(args)

        self.function: Boxed = first

    def __call__(self, args: list[Any]) -> Sequence[Any]:
        return self.function(args)


@dataclass(frozen=True, slots=True)
class _Pending:
    """A compilation whose kernels are awaited, for `late` to call `function`."""

    late: _Late
    function: Boxed
    deferred: Deferred
    region: Region
    fake_mode: FakeTensorMode


class InductorCompiler(_OncePerKey):
    """Compiles a region with Inductor; one that it cannot compile runs as plain aten.

    Kernels are compiled beside what follows (kernels.py). `patches` are Inductor options on top of, or
    instead of, the ones that regions need.
    """

    def __init__(self, patches: Mapping[str, Any] | None = None) -> None:
        super().__init__()
        self._patches = {**_region_options(), **(patches or {})}
        self._aten = AtenCompiler()
        self._warned = False
        self._defers = can_defer()
        self._pending: list[_Pending] = []  # in the order of their kernels

    def finish(self) -> None:
        began = time.perf_counter()
        while self._pending:
            pending = self._pending[0]
            region, fake_mode = pending.region, pending.fake_mode
            try:
                with self._contexts(fake_mode):
                    pending.deferred.finish()
                pending.late.function = pending.function
            except Exception as error:
                pending.late.function = self._without(region, fake_mode, error)
            del self._pending[0]
        self.stats.seconds += time.perf_counter() - began

    def _compile(self, region: Region, fake_mode: FakeTensorMode) -> Boxed:
        try:
            with self._contexts(fake_mode):
                if not self._defers:
                    return self._inductor(region)
                with deferring() as deferred:
                    function = self._inductor(region)
        except Exception as error:
            return self._without(region, fake_mode, error)
        late = _Late(self.finish)
        self._pending.append(_Pending(late, function, deferred, region, fake_mode))
        return late

    def _without(self, region: Region, fake_mode: FakeTensorMode, error: Exception) -> Boxed:
        """Whatever went wrong inside Inductor, plain aten computes the same."""
        self.stats.fallbacks += 1
        level = logging.DEBUG if self._warned else logging.WARNING
        self._warned = True
        _log.log(
            level,
            "Inductor failed on %s (%s: %s); it runs as plain aten, slower but right",
            region.name,
            type(error).__name__,
            str(error).split("\n", 1)[0],
        )
        return self._aten.compile(region, fake_mode)

    @contextmanager
    def _contexts(self, fake_mode: FakeTensorMode) -> Iterator[None]:
        from torch._inductor import config

        with (
            config.patch(self._patches),
            V.set_fake_mode(fake_mode),
            # Inductor reports strides and donated inputs through the context, once per context.
            tracing(TracingContext(fake_mode)),
        ):
            yield

    def _inductor(self, region: Region) -> Boxed:
        from torch._inductor.compile_fx import compile_fx_inner

        module = region.module()
        # Strides of what leaves a region are promised to whoever reads it.
        output = module.graph.output_node()
        output.meta["user_visible_output_idxs"] = list(range(len(region.outputs)))
        compiled: Boxed = compile_fx_inner(module, list(region.inputs))
        return compiled


def _region_options() -> dict[str, Any]:
    """Inductor options for regions, those that this version of torch has."""
    from torch._inductor import config

    wanted = {
        # Benchmarking and graph capture allocate device memory that the plan does not know.
        "shape_padding": False,
        "max_autotune": False,
        "max_autotune_gemm": False,
        "max_autotune_pointwise": False,
        "coordinate_descent_tuning": False,
        "triton.cudagraphs": False,
        "cpp_wrapper": False,
        # A region is to free and allocate in the order that its graph shows.
        "reorder_for_peak_memory": False,
        # Values may only change by fusion, never by a layout that the graph does not show.
        "keep_output_stride": True,
        "layout_optimization": False,
    }
    known = set(config.get_config_copy())
    return {name: value for name, value in wanted.items() if name in known}


def _seeded(draw: Callable[[torch.Generator], torch.Tensor], seed: torch.Tensor) -> torch.Tensor:
    generator = torch.Generator(seed.device).manual_seed(int(seed.item()))
    return draw(generator)


def _random(size: Sequence[int], seed: torch.Tensor, mode: str, **options: Any) -> torch.Tensor:
    """The numbers of inductor_random: fixed by the seed, so that recomputing repeats them."""
    function = {"rand": torch.rand, "randn": torch.randn}.get(mode)
    if function is None:
        raise PassError(f"inductor_random mode {mode!r} is unknown; use rand or randn")

    def draw(generator: torch.Generator) -> torch.Tensor:
        return function(size, generator=generator, device=seed.device, dtype=torch.float32)

    return _seeded(draw, seed)


def _randint(low: int, high: int, size: Sequence[int], seed: torch.Tensor) -> torch.Tensor:
    """The numbers of inductor_randint, fixed by the seed."""

    def draw(generator: torch.Generator) -> torch.Tensor:
        return torch.randint(low, high, size, generator=generator, device=seed.device)

    return _seeded(draw, seed)


# Torch's own eager versions ignore the seed.
_SEEDED: dict[Any, Any] = {
    torch.ops.prims.inductor_random.default: _random,
    torch.ops.prims.inductor_randint.default: _randint,
}
