"""What a terminal shows of long work and of training; nothing where there is none."""

from __future__ import annotations

import io
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from loops import Tiny, compiled, step, tokens
from problems import lanes
from rich.progress import Progress
from terminals import terminal

import lohan_fx
from lohan_fx import liveline, progress
from lohan_fx.errors import LohanError
from lohan_fx.runtime import RuntimeStats

MB = 10**6


def lines() -> list[tuple[str, float, float | None]]:
    """(words, done, total) of what is shown now."""
    bars = progress._display._bars
    assert isinstance(bars, Progress)
    bars.refresh()
    return [(task.description, task.completed, task.total) for task in bars.tasks]


def test_everything_under_way_shares_one_display(monkeypatch: pytest.MonkeyPatch) -> None:
    shown = terminal(monkeypatch)
    with progress.progress_of_bytes("Placing [w]", 100 * MB) as placed:
        placed(60 * MB)
        with (
            progress.progress_of_phase("Planning") as say,
            progress.progress_of_pieces("ops", 3) as advance,
        ):
            say("Compiling [x]")
            advance("mm")
            assert [words.replace("\\", "") for words, _, _ in lines()] == [
                "Placing [w]",
                "Compiling [x]",
                "ops: mm",
            ]
            assert [row[1:] for row in lines()] == [(60 * MB, 100 * MB), (0, None), (1, 3)]
        assert len(lines()) == 1
    assert progress._display._bars is None
    for words in ("60.0/100.0 MB", "Compiling [x]", "1/3"):
        assert words in shown.getvalue()


def test_threads_share_it_too(monkeypatch: pytest.MonkeyPatch) -> None:
    shown = terminal(monkeypatch)

    def work(number: int) -> None:
        for _ in range(20):
            with progress.progress_of_phase(f"thread {number}"):
                pass

    threads = [threading.Thread(target=work, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert progress._display._bars is None
    assert "thread 3" in shown.getvalue()


def test_nothing_is_shown_where_there_is_no_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    with (
        progress.progress_of_bytes("Placing", 100 * MB),
        progress.progress_of_phase("Planning"),
        progress.live_text() as show,
    ):
        show("a line")
        assert progress._display._bars is None
    assert sys.stderr.getvalue() == ""  # type: ignore[attr-defined]


def test_small_work_has_no_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal(monkeypatch)
    with progress.progress_of_bytes("Saving", MB):
        assert progress._display._bars is None


class Clock:
    """time.perf_counter that moves a second at each look."""

    def __init__(self) -> None:
        self.now_s = 0.0

    def perf_counter(self) -> float:
        self.now_s += 1.0
        return self.now_s


def test_training_shows_a_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shown = terminal(monkeypatch)
    monkeypatch.setattr(liveline, "time", Clock())
    model = compiled(Tiny(), tmp_path)
    optimizer = lohan_fx.AdamW(model.parameters(), lr=1e-3)
    losses = []
    with lohan_fx.live(model) as line:
        for number in range(3):
            losses.append(step(model, optimizer, tokens(number)))
            line.update(torch.tensor(losses[-1]))
        # The phases of the first step came and went above it.
        ((words, _, _),) = lines()
        assert f"loss {losses[1]:.4g}" in words and words.startswith("step 3")
        assert "48 tokens/s" in words and "1 s/step" in words
        line.update(None, tokens=7)
        assert "7 tokens/s" in lines()[0][0]
    assert "Planning" in shown.getvalue() and "Compiling the backward" in shown.getvalue()
    model.close()


def test_training_without_a_terminal_never_looks_at_the_loss(tmp_path: Path) -> None:
    model = compiled(Tiny(1), tmp_path)

    class Untouchable:
        def __getattr__(self, name: str) -> Any:
            raise AssertionError(name)

    with lohan_fx.live(model) as line:
        line.update(Untouchable())  # type: ignore[arg-type]
    model.close()
    with pytest.raises(LohanError, match="this is a Linear"), lohan_fx.live(torch.nn.Linear(1, 1)):
        pass


def test_lanes_are_busy_for_their_bytes_and_seconds() -> None:
    before = RuntimeStats(
        moved_bytes={"h2d": 100, "d2h": 0}, busy_s={"ssd_read": 1.0, "cpu_adam": 9.0}, steps=2
    )
    after = RuntimeStats(
        moved_bytes={"h2d": 400, "d2h": 10**9},
        busy_s={"ssd_read": 2.0, "ssd_write": 0.5, "cpu_adam": 1.0},
        steps=5,
    )
    rates = lanes(h2d_bytes_per_s=100.0, d2h_bytes_per_s=100.0)
    assert liveline.utilisation(before, after, 4.0, rates, 1.0) == {
        "gpu": 0.75,
        "h2d": 0.75,
        "d2h": 1.0,
        "ssd_read": 0.25,
        "ssd_write": 0.125,
        "cpu_adam": 0.0,
    }
