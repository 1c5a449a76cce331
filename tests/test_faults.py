"""Bad days that really happen: killed, interrupted, full, failing, hanging, lying disks.

What is refused before anything starts is in test_bad_input.py (a full disk, damaged plans), damaged
checkpoints and kills while saving are in the tests of checkpoints; here training is under way.
"""

from __future__ import annotations

import errno
import json
import multiprocessing.forkserver
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import fault_child
import pytest
import torch
from loops import Tiny, assert_same, compiled, step, steps, tokens
from training import RandomPolicy

import lohan_fx
from lohan_fx import native
from lohan_fx.errors import TrainingLoopError, TransferError

HERE = Path(__file__).parent


PATHS = [str(HERE), str(Path(lohan_fx.__file__).parents[1])]
ENVIRONMENT = {"PYTHONPATH": os.pathsep.join(PATHS), "OMP_NUM_THREADS": "1"}


@dataclass(frozen=True)
class Child:
    process: BaseProcess
    folder: Path

    def result(self, code: int = 0) -> dict[str, Any]:
        """What it has printed last, after it has ended with this code."""
        try:
            self.process.join(300)
        finally:
            self.process.kill()
        assert self.process.exitcode == code, (self.folder / "err").read_text()
        lines = (self.folder / "out").read_text().splitlines()
        found: dict[str, Any] = json.loads(lines[-1]) if lines else {}
        return found


@pytest.fixture(scope="module")
def child() -> Callable[[str, Path, int], Child]:
    """Starts a process that trains, see fault_child: a fork of one that has imported all of it."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["fault_child", "lohan_fx.api"])
    with pytest.MonkeyPatch.context() as patch:
        for name, value in ENVIRONMENT.items():
            patch.setenv(name, value)
        multiprocessing.forkserver.ensure_running()

    def start(mode: str, folder: Path, count: int) -> Child:
        (folder / "disk").mkdir(exist_ok=True)
        process = context.Process(target=fault_child.forked, args=(mode, folder, count))
        process.start()
        return Child(process, folder)

    return start


def interrupted(process: subprocess.Popen[str]) -> dict[str, Any]:
    """What a process that an interrupt ended has printed last.

    Python ends itself by SIGINT then, or with 1 where an exit handler ran code of a string since.
    """
    out, err = process.communicate(timeout=300)
    assert process.returncode in (-signal.SIGINT, 1), err
    assert err.rstrip().endswith("KeyboardInterrupt"), err
    found: dict[str, Any] = json.loads(out.strip().splitlines()[-1])
    return found


# ---- The process ----


def test_killed_in_a_step_it_resumes_from_its_checkpoint_bit_for_bit(
    child: Callable[[str, Path, int], Child], tmp_path: Path
) -> None:
    for name in ("whole", "killed"):
        (tmp_path / name).mkdir()
    whole = child("whole", tmp_path / "whole", 6).result()
    child("killed", tmp_path / "killed", 3).result(code=-signal.SIGKILL)
    assert list((tmp_path / "killed" / "disk").iterdir()) == []  # its files had no names
    resumed = child("whole", tmp_path / "killed", 6).result()
    assert resumed["first"] == 2  # the third step's update is not in the checkpoint
    assert resumed["losses"] == whole["losses"][2:]
    assert resumed["masters"] == whole["masters"]


def test_an_interrupt_is_a_keyboard_interrupt_and_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    process = subprocess.Popen(
        [sys.executable, str(HERE / "fault_child.py"), "forever", str(tmp_path), "3"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | ENVIRONMENT,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "running\n"
    process.send_signal(signal.SIGINT)
    left = interrupted(process)
    assert left == {"files": [], "descriptors": [], "locked_kib": 0, "threads": ["MainThread"]}


def test_two_runs_on_one_directory_do_not_meet(
    child: Callable[[str, Path, int], Child], tmp_path: Path
) -> None:
    (tmp_path / "disk").mkdir()
    folders = [tmp_path / name for name in ("one", "two")]
    for folder in folders:
        folder.mkdir()
        (folder / "disk").symlink_to(tmp_path / "disk")
    both = [child("whole", folder, 4) for folder in folders]
    found = [each.result() for each in both]
    assert found[0] == found[1]
    model = compiled(Tiny(dropout=0.1), tmp_path / "disk", policy=RandomPolicy(3))
    alone = lohan_fx.AdamW(model.parameters(), lr=3e-3)
    model.close()
    assert alone is not None and list((tmp_path / "disk").iterdir()) == []


# ---- The disk ----


def failing(monkeypatch: pytest.MonkeyPatch, **faults: Any) -> None:
    """File engines made from here on have these faults."""
    monkeypatch.setattr(native, "FileEngine", partial(native.FileEngine, faults=faults))


def on_ssd(folder: Path, **options: Any) -> Any:
    return compiled(Tiny(), folder, policy=RandomPolicy(3), **options)


# Every two of the three together.
@pytest.mark.parametrize(
    ("error", "on", "overlap"),
    [
        (errno.EIO, "read", "backward"),
        (errno.EIO, "write", "next-forward"),
        (errno.ENOSPC, "read", "next-forward"),
        (errno.ENOSPC, "write", "backward"),
    ],
)
def test_a_failing_transfer_stops_training_and_names_what_it_moved(
    error: int, on: str, overlap: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the middle of a run; the checkpoint from before it then goes on as if nothing had been."""
    disk = tmp_path / "disk"
    disk.mkdir()
    good = on_ssd(disk, overlap=overlap)
    optimizer = lohan_fx.AdamW(good.parameters())
    steps(good, optimizer, map(tokens, range(2)))
    lohan_fx.save(good, optimizer, tmp_path / "checkpoint")
    steps(good, optimizer, [tokens(2)])
    with monkeypatch.context() as patch:
        failing(patch, errno=error, on=on, after=150)
        bad = on_ssd(disk, overlap=overlap)
        optimizer = lohan_fx.AdamW(bad.parameters())
        with pytest.raises(TransferError, match=os.strerror(error)) as caught:
            steps(bad, optimizer, (tokens(i) for i in range(50)))
        assert caught.value.errno == error
        parts = [*dict(bad.named_children()), "activation"]
        assert any(part in str(caught.value) for part in parts), caught.value
        bad.close()
    assert list(disk.iterdir()) == []
    resumed = on_ssd(disk, overlap=overlap)
    optimizer = lohan_fx.AdamW(resumed.parameters())
    lohan_fx.load(resumed, optimizer, tmp_path / "checkpoint")
    steps(resumed, optimizer, [tokens(2)])
    assert_same(resumed, good, exact=True)
    good.close()
    resumed.close()


def test_a_limit_on_file_sizes_is_told_at_the_start(tmp_path: Path) -> None:
    """As a quota would be: files are as large as they will be before the first step."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    model = on_ssd(tmp_path)
    optimizer = lohan_fx.AdamW(model.parameters())
    resource.setrlimit(resource.RLIMIT_FSIZE, (16 << 10, before[1]))
    try:
        with pytest.raises(TransferError, match=str(tmp_path)) as caught:
            step(model, optimizer, tokens(0))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert caught.value.errno == errno.ENOSPC
    assert step(model, optimizer, tokens(0)) > 0  # the values are where they were
    model.close()


def test_a_stuck_transfer_hits_the_deadline_and_names_the_tensor(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    failing(monkeypatch, delay_ms=20)
    model = on_ssd(tmp_path)
    optimizer = lohan_fx.AdamW(model.parameters())
    step(model, optimizer, tokens(0))
    model._lohan.runtime._resources.waits.deadline_s = 0.005
    with pytest.raises(TransferError, match=r"(blocks\.|embed|head|activation).* 0\.005 s"):
        steps(model, optimizer, (tokens(i) for i in range(4)))
    model._lohan.runtime._resources.waits.deadline_s = 60.0
    model.close()
    assert list(tmp_path.iterdir()) == []


def test_checksums_catch_a_flipped_bit_and_change_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, checked = on_ssd(tmp_path), on_ssd(tmp_path, verify_io=True)
    for model in (plain, checked):
        steps(model, lohan_fx.AdamW(model.parameters()), map(tokens, range(20)))
    assert_same(plain, checked, exact=True)
    failing(monkeypatch, flip_every=40)
    lying = on_ssd(tmp_path, verify_io=True)
    optimizer = lohan_fx.AdamW(lying.parameters())
    with pytest.raises(TransferError, match="not what was written there") as caught:
        steps(lying, optimizer, (tokens(i) for i in range(40)))
    assert caught.value.errno == errno.EBADMSG
    unseen = on_ssd(tmp_path)  # what goes unnoticed without them
    steps(unseen, lohan_fx.AdamW(unseen.parameters()), map(tokens, range(20)))
    state = plain.state_dict()
    assert not all(torch.equal(value, state[name]) for name, value in unseen.state_dict().items())
    for model in (plain, checked, lying, unseen):
        model.close()


def test_after_a_failed_update_the_model_says_that_it_is_damaged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    failing(monkeypatch, errno=errno.EIO, on="write", after=150)
    model = on_ssd(tmp_path)
    optimizer = lohan_fx.AdamW(model.parameters())
    with pytest.raises(TransferError):
        steps(model, optimizer, (tokens(i) for i in range(50)))
    with pytest.raises((TransferError, TrainingLoopError)):
        lohan_fx.save(model, optimizer, tmp_path / "checkpoint")
    assert not (tmp_path / "checkpoint").exists()
    model.close()
