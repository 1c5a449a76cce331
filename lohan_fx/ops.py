"""torch.ops.lohan.*: the moves a rewritten graph makes, in program order.

Every op starts with `rt`, the number under which a runtime registered itself; the op finds the
runtime and calls the method of its own name. The ops exist so that a plan is visible in an ordinary
FX graph (printable, checkable, executable node by node); Inductor never sees one.

    begin(rt, program) -> handle          forward starts; the handle (int64[1]) travels to backward
    begin_backward(rt, handle)            backward of that forward starts
    end(rt)                               the pass is over: everything it fetched has been released
    fetch(rt, bucket)                     start bringing a bucket's weights to the GPU
    wait(rt, bucket) -> Tensor[]          its parameters, once they have arrived on this stream
    release(rt, bucket)                   nothing after this line reads the bucket in this pass
    offload(rt, slot, x)                  start moving an activation out
    offload_wait(rt, slot)                x may be freed once this stream has passed this line
    reload(rt, slot)                      start bringing it back
    reload_wait(rt, slot) -> Tensor       it has arrived on this stream
    grad(rt, pid, g)                      a parameter's gradient is final

`lohan` here is the operator namespace; nothing outside this module registers operators.
"""

from __future__ import annotations

import itertools
import weakref
from typing import Protocol

import torch
from torch import fx, library

from .errors import LohanError


class Moves(Protocol):
    """What a runtime must do; see the module docstring for each method's meaning."""

    def begin(self, program: int) -> torch.Tensor: ...
    def begin_backward(self, handle: torch.Tensor) -> None: ...
    def end(self) -> None: ...
    def fetch(self, bucket: int) -> None: ...
    def wait(self, bucket: int) -> list[torch.Tensor]: ...
    def release(self, bucket: int) -> None: ...
    def offload(self, slot: int, x: torch.Tensor) -> None: ...
    def offload_wait(self, slot: int) -> None: ...
    def reload(self, slot: int) -> None: ...
    def reload_wait(self, slot: int) -> torch.Tensor: ...
    def grad(self, pid: int, g: torch.Tensor) -> None: ...


_runtimes: weakref.WeakValueDictionary[int, Moves] = weakref.WeakValueDictionary()
_numbers = itertools.count(1)


def register(runtime: Moves) -> int:
    """Give `runtime` a number for its ops; it is forgotten when the runtime dies."""
    number = next(_numbers)
    _runtimes[number] = runtime
    return number


_SCHEMAS = (
    "begin(int rt, int program) -> Tensor",
    "begin_backward(int rt, Tensor handle) -> ()",
    "end(int rt) -> ()",
    "fetch(int rt, int bucket) -> ()",
    # The parameters of a bucket share one storage, so the result is declared as aliased.
    "wait(int rt, int bucket) -> Tensor(a)[]",
    "release(int rt, int bucket) -> ()",
    "offload(int rt, int slot, Tensor x) -> ()",
    "offload_wait(int rt, int slot) -> ()",
    "reload(int rt, int slot) -> ()",
    "reload_wait(int rt, int slot) -> Tensor",
    "grad(int rt, int pid, Tensor g) -> ()",
)

_library = library.Library("lohan", "DEF")  # type: ignore[no-untyped-call]


def _define(schema: str) -> None:
    name = schema.split("(")[0]

    def run(rt: int, *args: object) -> object:
        runtime = _runtimes.get(rt)
        if runtime is None:
            raise LohanError("the compiled model of this graph is gone; keep it while you use it")
        return getattr(runtime, name)(*args)

    _library.define(schema)  # type: ignore[no-untyped-call]
    _library.impl(name, run, "CompositeExplicitAutograd")  # type: ignore[no-untyped-call]
    fx.node.has_side_effect(getattr(torch.ops.lohan, name).default)


for _schema in _SCHEMAS:
    _define(_schema)


class Watcher(Protocol):
    """What is told of a pass while somebody looks: each `enter` ends at the next `leave`."""

    def enter_stage(self, stage: int) -> None: ...
    def enter_move(self, op: str, arg: int | None) -> None: ...
    def leave(self) -> None: ...


watched: dict[int, Watcher] = {}  # runtimes that record, by number
_watchers: weakref.WeakValueDictionary[int, Watcher] = weakref.WeakValueDictionary()


def offer_watcher(number: int, watcher: Watcher) -> None:
    """Have `watcher` told of this runtime's passes while torch's profiler runs; the caller keeps it."""
    _watchers[number] = watcher


def watcher_of(number: int) -> Watcher | None:
    """Who is to be told of a pass that starts now; None unless it is recorded or profiled."""
    found = watched.get(number)
    if found is None and torch._C._autograd._profiler_enabled():
        found = _watchers.get(number)
    return found


def is_move(node: fx.Node) -> bool:
    """True for a call of one of the ops above."""
    return node.op == "call_function" and getattr(node.target, "namespace", None) == "lohan"
