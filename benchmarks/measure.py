"""Time the steps of an engine, and what its GPU did in one of them."""

from __future__ import annotations

import json
import resource
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from models import VOCABULARY

# Steps before those that count: the first sets everything up, the second may still.
WARM_STEPS = 2
# The first of them may still be warming up.
TRACED_STEPS = 3


class Engine(Protocol):
    """One model with its optimizer, as one system trains it. `num_params` counts parameters.

    Where `overlaps`, the phases of a step are those of the host, as the device goes on behind
    them; else each phase ends in a synchronisation.
    """

    num_params: int
    overlaps: bool

    def forward(self, tokens_BS: torch.Tensor) -> torch.Tensor: ...

    def backward(self, loss: torch.Tensor) -> None: ...

    def step(self) -> None: ...

    def drain(self) -> None:
        """Wait for what a step leaves under way."""
        ...

    def moved_bytes(self) -> dict[str, int]:
        """Bytes moved so far by lane; {} where they are not counted."""
        ...

    def facts(self) -> dict[str, Any]:
        """What else the result should say, after the run."""
        ...


@dataclass(frozen=True, slots=True)
class Shape:
    """Tokens of one step, `batch` x `seq`, and how many steps are timed."""

    batch: int
    seq: int
    steps: int
    lanes: bool = False


def measure(engine: Engine, shape: Shape, device: torch.device) -> dict[str, Any]:
    """Medians over `shape.steps` steps after two others, and with `lanes` one more under a profiler.

    An engine with a `trace` of its own also traces some; they follow those that are timed.

    Keys: seconds end in _s, 1e9 bytes in _gb. `model_tflops` counts 6 FLOPs a parameter and token,
    whatever is recomputed. GPU peaks are those of torch's allocator over the timed steps.
    """
    cuda = device.type == "cuda"
    generator = torch.Generator().manual_seed(1)
    seconds: list[tuple[float, float, float]] = []
    losses: list[float] = []
    first: dict[str, Any] = {}

    def now(sync: bool = True) -> float:
        if cuda and sync:
            torch.cuda.synchronize(device)
        return time.perf_counter()

    def one_step() -> tuple[float, float, float]:
        size_BS = (shape.batch, shape.seq)
        tokens_BS = torch.randint(0, VOCABULARY, size_BS, generator=generator).to(device)
        at = [now()]
        loss = engine.forward(tokens_BS)
        at.append(now(not engine.overlaps))
        engine.backward(loss)
        at.append(now(not engine.overlaps))
        engine.step()
        losses.append(loss.item())
        at.append(now())
        print(f"step {len(losses) - 1}: loss {losses[-1]:.4f}, {at[3] - at[0]:.3f} s", flush=True)
        return at[1] - at[0], at[2] - at[1], at[3] - at[2]

    if cuda:
        torch.cuda.reset_peak_memory_stats(device)
    moved: dict[str, int] = {}
    for index in range(WARM_STEPS + shape.steps):
        if index == WARM_STEPS:
            moved = engine.moved_bytes()
            if cuda:
                first["gpu_setup_peak_gb"] = _gb(torch.cuda.max_memory_allocated(device))
                torch.cuda.reset_peak_memory_stats(device)
        seconds.append(one_step())
    drained = time.perf_counter()
    engine.drain()
    drain_s = time.perf_counter() - drained
    timed = seconds[WARM_STEPS:]
    step_s = statistics.median(sum(phases) for phases in timed)
    tokens_per_s = shape.batch * shape.seq / step_s
    result: dict[str, Any] = {
        "first_step_s": round(sum(seconds[0]), 2),
        "step_s": round(step_s, 4),
        "steps_s": [round(sum(phases), 4) for phases in timed],
        "phases_s": {
            name: round(statistics.median(phases[i] for phases in timed), 4)
            for i, name in enumerate(("forward", "backward", "optimizer"))
        },
        # What the last step left under way; each other one is timed with its predecessor's.
        "drain_s": round(drain_s, 4),
        "tokens_per_s": round(tokens_per_s, 1),
        "model_tflops": round(6 * engine.num_params * tokens_per_s / 1e12, 1),
        "peak_gb": {},
        "losses": [round(loss, 4) for loss in losses],
    }
    if cuda:
        result |= first
        result["peak_gb"]["gpu"] = _gb(torch.cuda.max_memory_allocated(device))
        result["gpu_reserved_gb"] = _gb(torch.cuda.max_memory_reserved(device))
    result["host_rss_gb"] = _gb(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
    if moved:
        result["moved_gb_per_step"] = {
            lane: _gb((total - moved[lane]) / shape.steps)
            for lane, total in engine.moved_bytes().items()
        }
    if shape.lanes:
        try:
            result |= _profiled(engine, one_step, cuda)
        except Exception as error:  # what is timed already counts without it
            result["lanes_error"] = f"{type(error).__name__}: {error}"[:300]
    facts = engine.facts()
    peaks = result["peak_gb"]
    result |= facts
    result["peak_gb"] = facts.get("peak_gb", {}) | peaks
    return result


def _profiled(
    engine: Engine, one_step: Callable[[], Sequence[float]], cuda: bool
) -> dict[str, Any]:
    found: dict[str, Any] = {}
    trace = getattr(engine, "trace", None)
    if trace is not None:
        found["trace"] = trace(lambda: [one_step() for _ in range(TRACED_STEPS)])
    if cuda:
        one_step()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
            step_s = sum(one_step())
        found["lanes"] = lanes(profiler) | {"step_s": round(step_s, 4)}
        kernels_s = found["lanes"]["busy_s"].get("kernels", 0.0)
        found["gpu_idle_share"] = round(max(0.0, 1 - kernels_s / step_s), 4)
    return found


def lanes(profiler: Any) -> dict[str, Any]:
    """Seconds of the profiled time in which each lane had work, by the union of its events, and GB moved."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "trace.json")
        profiler.export_chrome_trace(str(path))
        events = json.loads(path.read_text(encoding="utf-8"))["traceEvents"]
    return lanes_of(events)


def lanes_of(events: list[dict[str, Any]]) -> dict[str, Any]:
    spans: dict[str, list[tuple[float, float]]] = {}
    moved: dict[str, float] = {}
    for event in events:
        kind, name = event.get("cat", ""), event.get("name", "")
        if kind == "kernel":
            lane = "kernels"
        elif kind == "gpu_memcpy":
            named = (("HtoD", "h2d"), ("DtoH", "d2h"), ("DtoD", "d2d"))
            lane = next((short for word, short in named if word in name), "other copies")
            moved[lane] = moved.get(lane, 0.0) + float(event.get("args", {}).get("bytes", 0))
        else:
            continue
        spans.setdefault(lane, []).append((event["ts"], event["ts"] + event["dur"]))
    return {
        "busy_s": {lane: round(union(found) / 1e6, 4) for lane, found in sorted(spans.items())},
        "moved_gb": {lane: _gb(nbytes) for lane, nbytes in sorted(moved.items())},
    }


def union(spans: list[tuple[float, float]]) -> float:
    """Length of what the spans cover together."""
    total, end = 0.0, float("-inf")
    for start, stop in sorted(spans):
        total += max(0.0, stop - max(start, end))
        end = max(end, stop)
    return total


def _gb(nbytes: float) -> float:
    return round(nbytes / 1e9, 3)
