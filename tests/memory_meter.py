"""Measures the bytes of every tensor alive, operation by operation."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from training import loss_of

from lohan_fx import ops
from lohan_fx.compiler.skeleton import Skeleton


class MemoryMeter(TorchDispatchMode):
    """While active, counts storages that operations make, for as long as anything refers to them.

    A storage counts from the operation that returned it without having been given it, so memory that
    comes from elsewhere (host buffers, inputs, resident weights) never does. Moves are looked into:
    what they allocate counts, what they hand out does not. `peak_bytes` is the most that were alive
    after any operation, `peak_at` that operation.
    """

    def __init__(self) -> None:
        super().__init__()
        self.peak_bytes = 0
        self.peak_at = ""
        self._alive: dict[int, tuple[StorageWeakRef, int]] = {}

    @property
    def current_bytes(self) -> int:
        self._alive = {k: v for k, v in self._alive.items() if not v[0].expired()}
        return sum(nbytes for _, nbytes in self._alive.values())

    def __torch_dispatch__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "namespace", "") == "lohan":
            runtime = ops._runtimes[args[0]]
            with self:
                return getattr(runtime, func._opname)(*args[1:])  # type: ignore[attr-defined]
        result = func(*args, **kwargs)
        given = {storage._cdata for storage in _storages((args, kwargs))}
        for storage in _storages(result):
            if storage._cdata not in given:
                self._alive[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
        current = self.current_bytes
        if current > self.peak_bytes:
            self.peak_bytes, self.peak_at = current, str(func)
        return result


def _storages(values: Any) -> list[torch.UntypedStorage]:
    return [t.untyped_storage() for t in tree_leaves(values) if isinstance(t, torch.Tensor)]


@contextmanager
def metered_skeletons() -> Iterator[MemoryMeter]:
    """Within, a meter is active while skeletons run.

    Not around them: Dynamo leaves calls under a dispatch mode to eager PyTorch.
    """
    meter = MemoryMeter()
    plain = Skeleton.__call__

    def call(self: Skeleton, args: list[Any]) -> Sequence[Any]:
        with meter:
            return plain(self, args)

    Skeleton.__call__ = call  # type: ignore[method-assign]
    try:
        yield meter
    finally:
        Skeleton.__call__ = plain  # type: ignore[method-assign]


def gpu_peak_of_step(model: Any, optimizer: Any, batch: Mapping[str, torch.Tensor]) -> int:
    """Bytes of the GPU tier in use at the fullest moment of one step of a model on the CPU device.

    What is there between steps, by the runtime's account, the batch, and every other tensor alive.
    """
    runtime = model._lohan.runtime
    runtime.drain()
    resident = runtime.stats().current_bytes["gpu"]
    with metered_skeletons() as meter:
        loss = loss_of(model(**batch))
        loss.backward()  # type: ignore[no-untyped-call]
        del loss
        with meter:
            optimizer.step()
    runtime.drain()
    inputs = sum(value.nbytes for value in batch.values())
    return int(resident + inputs + meter.peak_bytes)
