"""Seconds of the heavy ops of a graph, measured once on the device and kept on disk.

Matrix products, convolutions and attention run with random inputs of their real shapes, strides and
dtypes, back to back until the device is warm. What is measured is keyed by the device's name,
torch's version and the op with its arguments, so it serves every model with the same layers.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import fx
from torch.utils._python_dispatch import _disable_current_modes

from lohan_fx.hardware import cache_dir
from lohan_fx.progress import progress_of_pieces
from lohan_fx.runtime.timing import seconds_per_call

from .node_costs import flop_formula, node_bytes
from .values import dtype_name, storage_span_bytes

log = logging.getLogger(__name__)

CACHE_SCHEMA = 1
# The first op runs this long before anything counts, so that the clock has settled.
_WARM_S = 0.5
_LIMIT_S = 5.0


class OpSeconds:
    """Measured seconds of single ops on one device, with what was measured before.

    Ops that do not run on random inputs, need more than `room_bytes`, or come after `limit_s` seconds
    of measuring have none; a log says which.
    """

    def __init__(
        self,
        device: torch.device,
        *,
        room_bytes: int,
        limit_s: float = _LIMIT_S,
        warm_s: float = _WARM_S,
        measure_s: float = 0.1,
    ) -> None:
        self._device = device
        self._room_bytes = room_bytes
        self._limit_s = limit_s
        self._warm_s = warm_s
        self._measure_s = measure_s
        self._file = cache_dir() / f"ops-{_digest(_machine(device))}.json"
        self._known = _read(self._file, _machine(device))

    def of(self, nodes: Iterable[fx.Node]) -> dict[fx.Node, float]:
        """Seconds of the heavy ops among `nodes`; those without a figure are left out."""
        heavy = _heavy(nodes)
        missing = {key: node for node, key in heavy if not self._known.get(key)}
        if missing and self._room_bytes:
            self._measure(missing)
        return {node: self._known[key] for node, key in heavy if self._known.get(key)}

    def lacks(self, nodes: Iterable[fx.Node]) -> bool:
        """Are there heavy ops among `nodes` that it has not been tried to measure?"""
        return any(key not in self._known for _, key in _heavy(nodes))

    def _measure(self, missing: dict[str, fx.Node]) -> None:
        start = time.perf_counter()
        warm_s, tried = self._warm_s, 0
        # Capturing runs under fake tensors; these are real.
        bar = progress_of_pieces("Measuring ops", len(missing))
        with (
            _disable_current_modes(),
            torch.no_grad(),
            _own_random_numbers(self._device),
            bar as advance,
        ):
            # The largest first: it warms the device, and matters most where time runs out.
            for key, node in sorted(missing.items(), key=lambda item: -node_bytes(item[1])):
                if time.perf_counter() - start > self._limit_s:
                    log.info("%s: out of time to measure it; taken from the roofline", node.name)
                    continue
                advance(node.name)
                seconds = self._time(node, warm_s)
                if seconds is not None:
                    warm_s = 0.0
                self._known[key] = seconds or 0.0
                tried += 1
            if self._device.type == "cuda":
                torch.cuda.empty_cache()
        if tried:
            _write(self._file, _machine(self._device), self._known)

    def _time(self, node: fx.Node, warm_s: float) -> float | None:
        needed = 2 * node_bytes(node)  # results of two calls may be alive at once
        if needed > self._room_bytes:
            log.info(
                "%s: needs %d bytes to be measured, there are %d; taken from the roofline",
                node.name,
                needed,
                self._room_bytes,
            )
            return None
        try:
            call = real_call(node, self._device)
            return seconds_per_call(call, self._device, warm_s=warm_s, measure_s=self._measure_s)
        except Exception as error:  # an estimate must not end a run
            log.info("%s cannot be measured (%s); taken from the roofline", node.name, error)
            return None


def _heavy(nodes: Iterable[fx.Node]) -> list[tuple[fx.Node, str]]:
    heavy = ((node, signature(node)) for node in nodes if flop_formula(node) is not None)
    return [(node, key) for node, key in heavy if key is not None]


def signature(node: fx.Node) -> str | None:
    """An op with its arguments, tensors as dtype, shape and stride; None for wrapped ops."""
    if not isinstance(node.target, torch._ops.OpOverload):
        return None
    words = [_words(argument) for argument in node.args]
    words += [f"{name}={_words(value)}" for name, value in sorted(node.kwargs.items())]
    return f"{node.target}({', '.join(words)})"


def _words(argument: Any) -> str:
    if isinstance(argument, fx.Node):
        argument = argument.meta.get("val")
    if isinstance(argument, torch.Tensor):
        shape, stride = list(argument.shape), list(argument.stride())
        return f"{dtype_name(argument.dtype)}{shape}{stride}"
    if isinstance(argument, (list, tuple)):
        return f"[{', '.join(map(_words, argument))}]"
    return repr(argument)


def real_call(node: fx.Node, device: torch.device) -> Callable[[], object]:
    """The op of a node as a call on `device`, with random tensors like its inputs."""
    made: dict[fx.Node, Any] = {}

    def real(argument: Any) -> Any:
        if isinstance(argument, fx.Node):
            if argument not in made:
                made[argument] = real(argument.meta.get("val"))
            return made[argument]
        if isinstance(argument, torch.Tensor):
            return random_like(argument, device)
        if isinstance(argument, (list, tuple)):
            return type(argument)(map(real, argument))
        if isinstance(argument, torch.device):
            return device
        return argument

    args = tuple(real(argument) for argument in node.args)
    kwargs = {name: real(value) for name, value in node.kwargs.items()}
    target: Any = node.target
    return lambda: target(*args, **kwargs)


def random_like(value: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A tensor of the shape, stride and dtype of `value`: small random numbers, or zeros of integers."""
    # Seeds of attention are on the host even for a GPU.
    where = value.device if value.device.type == "cpu" else device
    span = storage_span_bytes(value) // value.element_size()
    flat = torch.zeros(span, dtype=value.dtype, device=where)
    if value.dtype.is_floating_point:
        flat.normal_(0.0, 0.5)
    return flat.as_strided(value.shape, value.stride())


@contextlib.contextmanager
def _own_random_numbers(device: torch.device) -> Iterator[None]:
    """Leave the user's random state as it is."""
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        yield


# ---- on disk ----


def _machine(device: torch.device) -> str:
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    return f"{name}, torch {torch.__version__}"


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _read(path: Path, machine: str) -> dict[str, float]:
    """What was measured before, 0 for what could not be; nothing where the file is missing, damaged or
    of another version."""
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
        if raw["schema"] != CACHE_SCHEMA or raw["machine"] != machine:
            return {}
        return {str(key): float(value) for key, value in raw["seconds"].items() if value >= 0}
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        log.info("%s is measured again: %s", path, error)
        return {}


def _write(path: Path, machine: str, seconds: dict[str, float]) -> None:
    """All or nothing, together with what another process measured meanwhile."""
    raw = {
        "schema": CACHE_SCHEMA,
        "machine": machine,
        "seconds": {**_read(path, machine), **seconds},
    }
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False) as file:
            json.dump(raw, file, sort_keys=True, indent=0)
        os.replace(file.name, path)
    except OSError as error:
        log.info("measured seconds cannot be kept in %s: %s", path, error)
