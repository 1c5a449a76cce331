"""Saving in the background: the state of the call is saved, whatever training does meanwhile."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import QUICK, adamw, assert_equal, state_of, train
from loops import ROOMY, TIGHT, Tiny, compiled, tokens

import lohan_fx
from lohan_fx.checkpoint import saving as saving_module
from lohan_fx.checkpoint.shards import ShardWriter

BATCHES = [tokens(index) for index in range(6)]


class Brake:
    """Holds the writing of every piece back until it is let go; counts pieces."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.pieces = threading.Semaphore(0)
        self.free = False
        write = ShardWriter.write

        def slow(writer: ShardWriter, name: str, index: int, data: memoryview) -> None:
            if not self.free:
                self.pieces.acquire()
            write(writer, name, index, data)

        patch.setattr(ShardWriter, "write", slow)

    def let_go(self) -> None:
        self.free = True
        self.pieces.release(10_000)


@pytest.fixture
def brake(monkeypatch: pytest.MonkeyPatch) -> Iterator[Brake]:
    made = Brake(monkeypatch)
    yield made
    made.let_go()


def loaded(
    path: Path, folder: Path, dtype: torch.dtype = torch.bfloat16
) -> dict[str, torch.Tensor]:
    model = compiled(Tiny(), folder, dtype=dtype)
    optimizer = adamw(model)
    lohan_fx.load(model, optimizer, path)
    found = state_of(model, optimizer)
    model.close()
    return {name: value for name, value in found.items() if "master" not in name}


def without_masters(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: value for name, value in state.items() if "master" not in name}


@pytest.mark.parametrize(
    ("overlap", "budget"),
    [
        ("backward", TIGHT),
        ("next-forward", TIGHT),
        ("speculative", TIGHT),
        ("next-forward", ROOMY),
    ],
    ids=["backward", "next-forward", "speculative", "all on the gpu"],
)
def test_the_state_of_the_call_is_saved_while_steps_go_on(
    overlap: str, budget: str, brake: Brake, tmp_path: Path
) -> None:
    model = compiled(Tiny(), tmp_path, budget, overlap=overlap, **QUICK)
    optimizer = adamw(model)
    train(model, optimizer, BATCHES[:2])
    expected = state_of(model, optimizer)
    saving = lohan_fx.save(model, optimizer, tmp_path / "ckpt", asynchronous=True, extra=1)
    assert not saving.done()
    train(model, optimizer, BATCHES[2:4])  # every bucket is updated twice, and nothing is written
    assert not saving.done() and not (tmp_path / "ckpt").exists()
    snapshot = saving._snapshot
    assert snapshot is not None and snapshot.copied_bytes > 0
    brake.let_go()
    saving.wait(60)
    assert saving.done() and snapshot.copied_bytes == 0
    assert_equal(loaded(tmp_path / "ckpt", tmp_path), without_masters(expected))
    later = state_of(model, optimizer)
    assert any(not torch.equal(later[name], value) for name, value in expected.items())
    model.close()


def test_an_update_waits_where_there_is_no_room_for_a_copy(
    brake: Brake, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(saving_module, "COPY_BYTES", 40_000)
    model = compiled(Tiny(), tmp_path, TIGHT, **QUICK)
    optimizer = adamw(model)
    train(model, optimizer, BATCHES[:2])
    expected = state_of(model, optimizer)
    saving = lohan_fx.save(model, optimizer, tmp_path / "ckpt", asynchronous=True)
    finished = threading.Event()

    def later() -> None:
        while not finished.wait(0.05):
            brake.pieces.release()

    helper = threading.Thread(target=later)
    helper.start()
    try:
        train(model, optimizer, BATCHES[2:4])
    finally:
        finished.set()
        helper.join()
    snapshot = saving._snapshot
    assert snapshot is not None
    assert snapshot.waited_s > 0 and 0 < snapshot.peak_copied_bytes <= 40_000
    brake.let_go()
    saving.wait(60)
    assert_equal(loaded(tmp_path / "ckpt", tmp_path), without_masters(expected))
    model.close()


def test_what_changes_values_otherwise_waits_for_the_save(brake: Brake, tmp_path: Path) -> None:
    model = compiled(Tiny(), tmp_path, TIGHT, **QUICK)
    optimizer = adamw(model)
    train(model, optimizer, BATCHES[:1])
    expected = state_of(model, optimizer)
    changes: list[Any] = [
        lambda: model.load_state_dict(Tiny().state_dict()),
        lambda: lohan_fx.save(model, optimizer, tmp_path / "second"),
        model.close,
    ]
    for index, change in enumerate(changes):
        brake.free = False
        while brake.pieces.acquire(blocking=False):
            pass
        path = tmp_path / f"ckpt{index}"
        saving = lohan_fx.save(model, optimizer, path, asynchronous=True)
        assert not saving.done()
        timer = threading.Timer(0.2, brake.let_go)
        timer.start()
        change()
        assert saving.done() and path.is_dir()
        timer.join()
    assert_equal(loaded(tmp_path / "ckpt0", tmp_path), without_masters(expected))


def test_a_failure_in_the_background_is_raised_or_warned_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = compiled(Tiny(), tmp_path, TIGHT, **QUICK)
    optimizer = adamw(model)
    train(model, optimizer, BATCHES[:1])
    lohan_fx.save(model, optimizer, tmp_path / "ckpt", extra="old")
    with monkeypatch.context() as patch:

        def full(writer: ShardWriter, name: str, index: int, data: memoryview) -> None:
            raise lohan_fx.TransferError("no space left", errno=28)

        patch.setattr(ShardWriter, "write", full)
        saving = lohan_fx.save(model, optimizer, tmp_path / "ckpt", asynchronous=True)
        train(model, optimizer, BATCHES[1:2])
        with pytest.raises(lohan_fx.TransferError, match="no space left"):
            saving.wait(60)
        lohan_fx.save(model, optimizer, tmp_path / "ckpt", asynchronous=True)
        with pytest.warns(RuntimeWarning, match=r"ckpt could not be written .*: no space left"):
            info = lohan_fx.load(model, optimizer, tmp_path / "ckpt")
    assert info.extra == "old"
    assert [p.name for p in tmp_path.glob("ckpt*")] == ["ckpt"]
    model.close()


def test_before_the_first_step_it_is_written_at_once(tmp_path: Path) -> None:
    model = compiled(Tiny(), tmp_path)
    saving = lohan_fx.save(model, adamw(model), tmp_path / "ckpt", asynchronous=True)
    assert saving.done() and (tmp_path / "ckpt" / "lohan_fx.json").is_file()
    saving.wait()
    model.close()
