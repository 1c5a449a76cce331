"""A line that training keeps up to date on a terminal: step, loss, tokens/s, how busy the lanes are."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from .errors import LohanError
from .planner import Lanes
from .progress import is_shown, live_text
from .runtime import RuntimeStats
from .session import Session

# The line changes at most so often: a loss is read for it, which may wait for the device.
_PERIOD_S = 0.5
_LANES = ("gpu", "h2d", "d2h", "ssd_read", "ssd_write", "cpu_adam")


@contextmanager
def live(model: Any) -> Iterator[LiveLine]:
    """Show a line about the training that goes on inside; nothing where standard error is no terminal.

        with lohan_fx.live(model) as line:
            for batch in loader:
                loss = model(**batch).loss
                loss.backward()
                opt.step(); opt.zero_grad()
                line.update(loss)

    Raises:
        LohanError: `model` is none of `lohan_fx.compile`'s.
    """
    session = getattr(model, "_lohan", None)
    if not isinstance(session, Session):
        raise LohanError(f"live() is for compiled models, this is a {type(model).__name__}")
    with live_text() as show:
        yield LiveLine(session, show)


class LiveLine:
    """What `live` gives; call `update` after each step."""

    def __init__(self, session: Session, show: Any) -> None:
        self._session = session
        self._show = show if is_shown() else None
        self._loss: torch.Tensor | float | None = None
        self._tokens = 0
        self._since: tuple[float, int, RuntimeStats] | None = None

    def update(self, loss: torch.Tensor | float | None = None, tokens: int | None = None) -> None:
        """A step has been made.

        The loss that is shown is that of the step before, so that showing it does not make the host wait
        for this one.

        Args:
            loss: of this step, a tensor of one element or a number.
            tokens: that it has read; None takes what the plan counts.
        """
        if self._show is None:
            return
        self._tokens += self._planned_tokens() if tokens is None else tokens
        last, self._loss = self._loss, _detached(loss)
        now = time.perf_counter()
        stats = self._session.stats()
        if stats is None:
            return
        if self._since is None:
            self._since = now, self._tokens, stats
            return
        begun, tokens_then, before = self._since
        if now - begun < _PERIOD_S:
            return
        self._since = now, self._tokens, stats
        self._show(self._words(last, self._tokens - tokens_then, now - begun, before, stats))

    def _planned_tokens(self) -> int:
        plan = self._session.captured[-1].plan if self._session.captured else None
        if plan is None or plan.predicted is None or plan.throughput.tokens_per_s is None:
            return 0
        return round(plan.throughput.tokens_per_s * plan.predicted.step_s)

    def _words(
        self,
        loss: torch.Tensor | float | None,
        tokens: int,
        elapsed_s: float,
        before: RuntimeStats,
        after: RuntimeStats,
    ) -> str:
        parts = [f"step {after.steps}"]
        if loss is not None:
            parts.append(f"loss {float(loss):.4g}")
        if tokens:
            parts.append(f"{tokens / elapsed_s:,.0f} tokens/s")
        if after.steps > before.steps:
            parts.append(f"{elapsed_s / (after.steps - before.steps):.3g} s/step")
        captured = self._session.captured[-1]
        predicted = captured.plan.predicted
        gpu_s = 0.0 if predicted is None else predicted.lane_busy_s.get("gpu", 0.0)
        shares = utilisation(before, after, elapsed_s, captured.problem.lanes, gpu_s)
        parts += [f"{lane} {share:.0%}" for lane, share in shares.items() if share > 0]
        return "  ".join(parts)


def utilisation(
    before: RuntimeStats, after: RuntimeStats, elapsed_s: float, lanes: Lanes, gpu_s: float
) -> dict[str, float]:
    """Shares of `elapsed_s` in which lanes were busy, at most 1.

    Files and the optimizer count their own seconds. Copies are bytes over the rate of `lanes`, and the GPU
    is the `gpu_s` seconds of compute that the plan expects of a step: `model.trace` measures both.
    """
    rates = {"h2d": lanes.h2d_bytes_per_s, "d2h": lanes.d2h_bytes_per_s}
    busy = {"gpu": (after.steps - before.steps) * gpu_s}
    for lane, rate in rates.items():
        moved = after.moved_bytes.get(lane, 0) - before.moved_bytes.get(lane, 0)
        busy[lane] = moved / rate if rate > 0 else 0.0
    for lane in ("ssd_read", "ssd_write", "cpu_adam"):
        busy[lane] = after.busy_s.get(lane, 0.0) - before.busy_s.get(lane, 0.0)
    # A new placement has counters that begin at 0.
    return {lane: min(max(busy[lane] / elapsed_s, 0.0), 1.0) for lane in _LANES}


def _detached(loss: torch.Tensor | float | None) -> torch.Tensor | float | None:
    return loss.detach() if isinstance(loss, torch.Tensor) else loss


__all__ = ["LiveLine", "live", "utilisation"]
