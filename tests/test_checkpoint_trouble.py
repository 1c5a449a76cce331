"""Damage, other models, full disks and disks that fail: an error that says so, and all is as before."""

from __future__ import annotations

import errno
import json
import os
import resource
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from checkpoints import BATCHES, Odd, adamw, odd, sizes, train, two_steps
from loops import Tiny, compiled
from torch import nn
from training import loss_of

import lohan_fx
from lohan_fx import LohanError, TrainingLoopError


@pytest.fixture
def trained(tmp_path: Path) -> Iterator[tuple[Any, Any]]:
    with two_steps(tmp_path) as found:
        yield found


def damaged(path: Path, name: str, at: int) -> None:
    """Flip one bit; negative positions count from the end."""
    data = bytearray((path / name).read_bytes())
    data[at] ^= 4
    (path / name).write_bytes(data)


def _rewrite(path: Path, **changes: Any) -> None:
    whole = json.loads((path / "lohan_fx.json").read_text())
    (path / "lohan_fx.json").write_text(json.dumps(whole | changes))


DAMAGES: dict[str, tuple[Callable[[Path], None], str]] = {
    "a bit in a weight": (
        lambda p: damaged(p, "model.safetensors", -1),
        r"model\.safetensors is damaged: the checksum of \w+",
    ),
    "a bit in a moment": (
        lambda p: damaged(p, "optimizer.safetensors", -300),
        r"optimizer\.safetensors is damaged: the checksum of exp_avg",
    ),
    "a bit in a header": (
        lambda p: damaged(p, "model.safetensors", 40),
        r"model\.safetensors is (damaged: the checksum of its header|no safetensors file)",
    ),
    "truncated": (
        lambda p: os.truncate(p / "optimizer.safetensors", 1000),
        r"optimizer\.safetensors has 1,000 bytes, but [\d,]+ were written",
    ),
    "a file missing": (
        lambda p: (p / "optimizer.safetensors").unlink(),
        r"lacks optimizer\.safetensors",
    ),
    "a bit in the manifest": (
        lambda p: (p / "lohan_fx.json").write_text(
            (p / "lohan_fx.json").read_text().replace('"step": 0', '"step": 1')
        ),
        r"lohan_fx\.json is damaged: its checksum",
    ),
    "half a manifest": (
        lambda p: os.truncate(p / "lohan_fx.json", 700),
        r"lohan_fx\.json is damaged",
    ),
    "a later format": (lambda p: _rewrite(p, format=99), r"format 99, this version .* reads 1"),
    "no manifest": (lambda p: (p / "lohan_fx.json").unlink(), r"it has no lohan_fx\.json"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_refused_and_nothing_changes(damage: str, tmp_path: Path) -> None:
    do, message = DAMAGES[damage]
    saved = odd(tmp_path, dtype=torch.bfloat16)
    with torch.no_grad():
        saved.count.fill_(50)
    saved.load_state_dict({"scalar": torch.tensor(7.0)}, strict=False)
    lohan_fx.save(saved, adamw(saved, lr=0.3), tmp_path / "ckpt")
    saved.close()

    model = odd(tmp_path, dtype=torch.bfloat16)
    optimizer = adamw(model)
    random = torch.get_rng_state()
    do(tmp_path / "ckpt")
    with pytest.raises(LohanError, match=message):
        lohan_fx.load(model, optimizer, tmp_path / "ckpt")
    assert model.count == 9 and float(model.state_dict()["scalar"]) == 2.5
    assert optimizer.param_groups[0]["lr"] == 1e-2
    assert torch.equal(torch.get_rng_state(), random)
    model.close()


def test_a_checkpoint_of_something_else_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "ckpt"
    model = odd(tmp_path)
    optimizer = adamw(model)
    lohan_fx.save(model, optimizer, path)
    other = compiled(Tiny(), tmp_path)
    with pytest.raises(LohanError, match=r"another model: it lacks embed\.weight, .* and \d+ more"):
        lohan_fx.load(other, None, path)
    wide = Odd()
    wide.first = wide.again = nn.Linear(3, 6)
    wide = compiled(wide, tmp_path)
    with pytest.raises(LohanError, match=r"first\.weight has shape \(5, 3\), the model's \(6, 3\)"):
        lohan_fx.load(wide, adamw(wide), path)
    frozen = Odd()
    frozen.scalar.requires_grad_(False)
    frozen = compiled(frozen, tmp_path)
    of_frozen = adamw(frozen)
    with pytest.raises(LohanError, match="with other parameters frozen: scalar"):
        lohan_fx.load(frozen, of_frozen, path)
    with pytest.raises(LohanError, match="this optimizer is not the model's"):
        lohan_fx.load(model, of_frozen, path)
    with pytest.raises(LohanError, match="no scheduler state; leave scheduler= out"):
        lohan_fx.load(
            model, optimizer, path, torch.optim.lr_scheduler.ConstantLR(optimizer, total_iters=2)
        )
    with pytest.raises(LohanError, match="there is no such directory"):
        lohan_fx.load(model, optimizer, tmp_path / "nowhere")
    with pytest.raises(LohanError, match="Odd is not a compiled model"):
        lohan_fx.load(Odd(), None, path)
    lohan_fx.save(model, None, path)
    with pytest.raises(LohanError, match="no optimizer state; pass None"):
        lohan_fx.load(model, optimizer, path)
    for closed in (other, wide, frozen, model):
        closed.close()


def test_what_cannot_be_saved_is_named(trained: tuple[Any, Any], tmp_path: Path) -> None:
    model, optimizer = trained
    with pytest.raises(LohanError, match=r"extra\['at'\]\[1\] is a PosixPath"):
        lohan_fx.save(model, optimizer, tmp_path / "ckpt", extra={"at": [1, tmp_path]})
    with pytest.raises(LohanError, match="dtype is 'half'"):
        lohan_fx.save(model, optimizer, tmp_path / "ckpt", dtype="half")
    loss = loss_of(model(**BATCHES[2]))
    loss.backward()
    with pytest.raises(TrainingLoopError, match=r"call opt\.step\(\) first"):
        lohan_fx.save(model, optimizer, tmp_path / "ckpt")
    optimizer.step()
    assert not list(tmp_path.glob("ckpt*"))


def test_a_full_disk_leaves_the_previous_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lohan_fx.checkpoint import saving

    model, path = odd(tmp_path), tmp_path / "ckpt"
    optimizer = adamw(model)
    lohan_fx.save(model, optimizer, path, extra="old")
    before = sizes(path)
    with monkeypatch.context() as patch:
        patch.setattr(saving.shutil, "disk_usage", lambda p: SimpleNamespace(free=1000))
        with pytest.raises(LohanError, match=r"needs .* on disk, but .* has 1.*B free"):
            lohan_fx.save(model, optimizer, path)
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (700, limit[1]))  # files end in the middle
    try:
        with pytest.raises(lohan_fx.TransferError, match=r"safetensors cannot be written") as error:
            lohan_fx.save(model, optimizer, path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert error.value.errno == errno.EFBIG
    assert sizes(path) == before and [p.name for p in tmp_path.glob("ckpt*")] == ["ckpt"]
    assert lohan_fx.load(model, optimizer, path).extra == "old"
    model.close()


def test_a_read_error_leaves_the_previous_checkpoint_and_training_goes_on(
    trained: tuple[Any, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lohan_fx.runtime.resting import OnSsd

    def broken(self: OnSsd, ticket: int) -> None:
        raise lohan_fx.TransferError("reading fails", errno=errno.EIO)

    model, optimizer = trained
    path = tmp_path / "ckpt"
    lohan_fx.save(model, optimizer, path, extra="old")
    with monkeypatch.context() as patch:
        patch.setattr(OnSsd, "_wait", broken)
        with pytest.raises(lohan_fx.TransferError, match="reading fails"):
            lohan_fx.save(model, optimizer, path)
    rest = train(model, optimizer, BATCHES[2:3])
    info = lohan_fx.load(model, optimizer, path)
    assert info.extra == "old" and info.step == 2
    assert [p.name for p in tmp_path.glob("ckpt*")] == ["ckpt"]
    assert train(model, optimizer, BATCHES[2:3]) == rest


def test_a_load_that_breaks_off_must_be_repeated(
    trained: tuple[Any, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lohan_fx.checkpoint.shards import StoredTensor

    def broken(self: StoredTensor, start: int, stop: int) -> torch.Tensor:
        raise lohan_fx.TransferError("reading fails", errno=errno.EIO)

    model, optimizer = trained
    lohan_fx.save(model, optimizer, tmp_path / "ckpt")
    expected = train(model, optimizer, BATCHES[2:3])
    with monkeypatch.context() as patch:
        patch.setattr(StoredTensor, "piece", broken)
        with pytest.raises(lohan_fx.TransferError, match="reading fails"):
            lohan_fx.load(model, optimizer, tmp_path / "ckpt")
    with pytest.raises(TrainingLoopError, match="stopped in the middle"):
        model(**BATCHES[2])
    with pytest.raises(TrainingLoopError, match="stopped in the middle"):
        lohan_fx.save(model, optimizer, tmp_path / "other")
    lohan_fx.load(model, optimizer, tmp_path / "ckpt")
    assert train(model, optimizer, BATCHES[2:3]) == expected
