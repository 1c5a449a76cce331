"""Checkpoints: what is saved comes back bit for bit, others can read it, the one before stays whole."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import (
    BATCHES,
    QUICK,
    Odd,
    adamw,
    assert_equal,
    odd,
    sizes,
    state_of,
    train,
    two_steps,
)
from loops import ROOMY, TIGHT, Tiny, assert_same, compiled
from safetensors.torch import load_file
from training import gpt2, llama, loss_of

import lohan_fx
from lohan_fx import LohanError


@pytest.fixture
def trained(tmp_path: Path) -> Iterator[tuple[Any, Any]]:
    with two_steps(tmp_path) as found:
        yield found


# ---- Round trips ----


@pytest.mark.parametrize(
    ("weights", "dtype", "placed"),
    [
        pytest.param("compute", torch.bfloat16, False, id="bf16 into fresh"),
        pytest.param("compute", torch.bfloat16, True, id="bf16 into one in use"),
        pytest.param("float32", torch.bfloat16, True, id="masters into one in use"),
        pytest.param("compute", torch.float32, False, id="fp32 into fresh"),
    ],
)
def test_everything_comes_back_under_another_budget(
    weights: str, dtype: torch.dtype, placed: bool, tmp_path: Path
) -> None:
    model = compiled(Tiny(), tmp_path, TIGHT, dtype=dtype, policy="greedy")
    optimizer = adamw(model)
    train(model, optimizer, BATCHES[:2])
    lohan_fx.save(model, optimizer, tmp_path / "ckpt", dtype=weights, extra={"epoch": 3})
    expected = state_of(model, optimizer)
    rest = train(model, optimizer, BATCHES[2:4])

    fresh = compiled(Tiny(), tmp_path, ROOMY, dtype=dtype)
    resumed = adamw(fresh, lr=1.0)
    if placed:
        resumed.param_groups[0]["lr"] = 1e-3
        train(fresh, resumed, BATCHES[4:])
    info = lohan_fx.load(fresh, resumed, tmp_path / "ckpt")
    assert info.step == 2 and info.extra == {"epoch": 3}
    assert resumed.param_groups[0]["lr"] == 1e-2
    if placed:
        assert_equal(state_of(fresh, resumed), expected)
    assert train(fresh, resumed, BATCHES[2:4]) == rest
    assert_equal(state_of(fresh, resumed), state_of(model, optimizer))
    model.close()
    fresh.close()


@pytest.mark.parametrize("overlap", ["backward", "next-forward", "speculative", "serial"])
def test_resuming_equals_training_on_bit_for_bit(overlap: str, tmp_path: Path) -> None:
    clip = {"backward": None, "speculative": 100.0}.get(overlap, 0.05)

    def start() -> tuple[Any, Any, Any]:
        model = compiled(Tiny(dropout=0.2), tmp_path, TIGHT, overlap=overlap, **QUICK)
        groups = [
            {"params": [p for p in model.parameters() if p.ndim > 1], "weight_decay": 0.1},
            {"params": [p for p in model.parameters() if p.ndim == 1], "lr": 5e-3},
        ]
        optimizer = lohan_fx.AdamW(groups, lr=1e-2, max_grad_norm=clip)
        return model, optimizer, torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-2, 12)

    model, optimizer, scheduler = start()
    torch.manual_seed(7)
    train(model, optimizer, BATCHES[:3], scheduler)
    lohan_fx.save(model, optimizer, tmp_path / "ckpt", scheduler=scheduler)
    rest = train(model, optimizer, BATCHES[3:], scheduler)
    expected = state_of(model, optimizer)
    model.close()

    model, optimizer, scheduler = start()
    torch.manual_seed(8)
    lohan_fx.load(model, optimizer, tmp_path / "ckpt", scheduler)
    assert train(model, optimizer, BATCHES[3:], scheduler) == rest
    assert_equal(state_of(model, optimizer), expected)
    assert optimizer.param_groups[0]["lr"] == scheduler.get_last_lr()[0]
    model.close()


def test_a_checkpoint_before_the_first_step_has_the_models_own_values(tmp_path: Path) -> None:
    plain = Tiny()
    model = compiled(Tiny(), tmp_path, dtype=torch.bfloat16)
    lohan_fx.save(model, adamw(model), tmp_path / "ckpt", dtype="float32")
    saved = load_file(tmp_path / "ckpt" / "model.safetensors")
    for name, value in plain.state_dict().items():
        assert torch.equal(saved[name], value), name
    model.close()


def test_a_loaded_checkpoint_can_be_saved_again_before_the_first_step(
    trained: tuple[Any, Any], tmp_path: Path
) -> None:
    lohan_fx.save(*trained, tmp_path / "ckpt")
    fresh = compiled(Tiny(), tmp_path, dtype=torch.bfloat16)
    optimizer = adamw(fresh)
    lohan_fx.load(fresh, optimizer, tmp_path / "ckpt")
    lohan_fx.save(fresh, optimizer, tmp_path / "ckpt")
    for name in ("model.safetensors", "optimizer.safetensors"):
        assert len(load_file(tmp_path / "ckpt" / name)) > 5
    train(fresh, optimizer, BATCHES[2:3])  # from files that have been replaced meanwhile
    train(*trained, BATCHES[2:3])
    assert_equal(state_of(fresh, optimizer), state_of(*trained))
    fresh.close()


# ---- Others read it ----


@pytest.mark.parametrize("build", [gpt2, llama], ids=["gpt2, tied", "llama"])
@pytest.mark.parametrize("dtype", ["compute", "float32"])
def test_transformers_loads_it_and_gives_the_same_logits(
    dtype: str, build: Callable[[], Any], tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM

    plain, path = build().eval().bfloat16(), tmp_path / "ckpt"
    model = lohan_fx.compile(build(), "gpu=1GB, dram=1GB", device="cpu", dtype=torch.bfloat16)
    lohan_fx.save(model, adamw(model), path, dtype=dtype, max_shard_bytes=30_000)
    assert len(list(path.glob("model-*-of-*.safetensors"))) > 1
    theirs = AutoModelForCausalLM.from_pretrained(path).eval()
    assert type(theirs) is type(plain)
    assert theirs.dtype == (torch.bfloat16 if dtype == "compute" else torch.float32)
    ids = torch.arange(12).view(1, 12)
    assert torch.equal(theirs.bfloat16()(ids).logits, plain(ids).logits)
    index = json.loads((path / "model.safetensors.index.json").read_text())
    plain.save_pretrained(tmp_path / "theirs", max_shard_size="30KB")
    reference = json.loads((tmp_path / "theirs" / "model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == reference["weight_map"].keys()
    if dtype == "compute":
        assert index["metadata"]["total_size"] == reference["metadata"]["total_size"]
    model.close()


@pytest.mark.parametrize("dtype", ["compute", "float32"])
def test_buffers_tied_transposed_and_frozen_parameters_are_saved_once(
    dtype: str, tmp_path: Path
) -> None:
    plain, model = Odd(), odd(tmp_path, dtype=torch.bfloat16)
    model.count.fill_(11)
    lohan_fx.save(model, adamw(model), tmp_path / "ckpt", dtype=dtype)
    saved = load_file(tmp_path / "ckpt" / "model.safetensors")
    expected = {n: v for n, v in plain.state_dict().items() if not n.startswith("again")}
    assert saved.keys() == expected.keys()
    assert saved["count"] == 11 and torch.equal(saved["mask"], plain.mask)
    for name in ("across", "scalar", "first.weight", "frozen"):
        value = expected[name].bfloat16()
        if dtype == "float32":  # a frozen parameter has no master
            value = value.float() if name == "frozen" else expected[name]
        assert torch.equal(saved[name], value), name
    states = load_file(tmp_path / "ckpt" / "optimizer.safetensors")
    assert ("master.across" in states) == (dtype == "compute")
    assert "exp_avg.frozen" not in states

    fresh = odd(tmp_path, dtype=torch.bfloat16)
    with torch.no_grad():
        fresh.mask.fill_(False)
    optimizer = adamw(fresh)
    lohan_fx.load(fresh, optimizer, tmp_path / "ckpt")
    assert_same(fresh, model, exact=True)
    model.close()
    fresh.close()


# ---- What was there before ----


def test_the_previous_checkpoint_is_replaced_and_files_of_others_stay(tmp_path: Path) -> None:
    model, path = odd(tmp_path), tmp_path / "ckpt"
    optimizer = adamw(model)
    lohan_fx.save(model, optimizer, path, max_shard_bytes=60)
    assert len(list(path.glob("*.safetensors"))) > 4
    (path / "tokenizer.json").write_text("{}")
    (path / "logs").mkdir()
    (path / "logs" / "one").write_text("1")
    link = tmp_path / "latest"
    link.symlink_to(path)
    lohan_fx.save(model, optimizer, link, extra="second")
    assert link.is_symlink()
    assert sizes(path).keys() == {
        *("model.safetensors", "optimizer.safetensors", "lohan_fx.json"),
        *("tokenizer.json", "logs"),
    }
    assert (path / "logs" / "one").read_text() == "1"
    assert lohan_fx.load(model, optimizer, path).extra == "second"
    assert not list(tmp_path.glob("*.tmp-*"))
    model.close()


def test_a_directory_with_other_things_in_it_is_not_replaced(tmp_path: Path) -> None:
    model, path = odd(tmp_path), tmp_path / "home"
    path.mkdir()
    (path / "thesis.tex").write_text("x")
    with pytest.raises(LohanError, match=r"home has files in it, but no checkpoint"):
        lohan_fx.save(model, None, path)
    with pytest.raises(LohanError, match=r"thesis\.tex is not a directory"):
        lohan_fx.save(model, None, path / "thesis.tex")
    assert sizes(path) == {"thesis.tex": 1}
    lohan_fx.save(model, None, path / "deeper" / "ckpt")
    assert "model.safetensors" in sizes(path / "deeper" / "ckpt")
    model.close()


def test_a_system_without_exchange_renames_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lohan_fx.checkpoint import directory

    monkeypatch.setattr(directory, "_exchange", lambda one, other: False)
    model, path = odd(tmp_path), tmp_path / "ckpt"
    for extra in (1, 2):
        lohan_fx.save(model, None, path, extra=extra)
        assert lohan_fx.load(model, None, path).extra == extra
    assert [p.name for p in tmp_path.glob("ckpt*")] == ["ckpt"]
    model.close()


_CHILD = """
import os, sys, time
from pathlib import Path
import lohan_fx
from lohan_fx import api  # once, not in each fork
from lohan_fx.checkpoint import directory, shards
from checkpoints import odd, adamw
import torch

def stop(*args, **kwargs):
    os.write(1, f"{os.getpid()}\\n".encode())
    time.sleep(600)

def second(function):
    calls = []
    def call(*args, **kwargs):
        calls.append(1)
        return stop() if len(calls) == 2 else function(*args, **kwargs)
    return call

def save(where, moment):
    if moment == "writing":
        shards.ShardWriter.write = second(shards.ShardWriter.write)
    elif moment == "complete, not in place":
        directory.Staging.publish = stop
    elif moment == "between two renames":
        directory._exchange = lambda one, other: False
        directory.os.rename = second(directory.os.rename)
    elif moment == "old one not removed":
        directory.shutil.rmtree = stop
    model = odd(where)
    with torch.no_grad():
        model.count.fill_(77)
    lohan_fx.save(model, adamw(model), where / "ckpt", extra="new")
    os.write(1, b"survived\\n")

for line in sys.stdin:
    where, moment = line.strip().split("|")
    pid = os.fork()
    if pid == 0:
        save(Path(where), moment)
        os._exit(1)
    _, status = os.waitpid(pid, 0)
    os.write(1, f"{os.WTERMSIG(status)}\\n".encode())
"""


@pytest.fixture(scope="module")
def saver() -> Iterator[subprocess.Popen[str]]:
    """A process that forks one that saves, for each "directory|moment" it reads."""
    child = subprocess.Popen(
        [sys.executable, "-c", _CHILD],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
    )
    with child:
        yield child
        assert child.stdin is not None
        child.stdin.close()


@pytest.mark.parametrize(
    ("moment", "found"),
    [
        ("writing", "old"),
        ("complete, not in place", "old"),
        ("between two renames", "new"),
        ("old one not removed", "new"),
    ],
)
def test_killed_while_saving_there_is_a_whole_checkpoint(
    moment: str, found: str, saver: subprocess.Popen[str], tmp_path: Path
) -> None:
    model = odd(tmp_path)
    optimizer = adamw(model)
    lohan_fx.save(model, optimizer, tmp_path / "ckpt", extra="old")
    assert saver.stdin is not None and saver.stdout is not None
    saver.stdin.write(f"{tmp_path}|{moment}\n")
    saver.stdin.flush()
    pid = int(saver.stdout.readline())
    during = {p.name for p in tmp_path.glob("ckpt*")}
    os.kill(pid, signal.SIGKILL)
    assert saver.stdout.readline() == f"{signal.SIGKILL:d}\n"
    assert len(during) == 2
    assert ("ckpt" in during) == (moment != "between two renames")
    info = lohan_fx.load(model, optimizer, tmp_path / "ckpt")
    assert info.extra == found
    assert model.count == (77 if found == "new" else 9)
    assert [p.name for p in tmp_path.glob("ckpt*")] == ["ckpt"]
    lohan_fx.save(model, optimizer, tmp_path / "ckpt")
    model.close()


def test_a_save_under_way_elsewhere_is_left_alone(tmp_path: Path) -> None:
    from lohan_fx.checkpoint.directory import Staging

    model = odd(tmp_path)
    staging = Staging(tmp_path / "ckpt", "lohan_fx.json")
    lohan_fx.save(model, None, tmp_path / "ckpt")
    lohan_fx.load(model, None, tmp_path / "ckpt")
    assert staging.path.is_dir()
    staging.abandon()
    assert not staging.path.exists()
    model.close()


# ---- Values ----


def test_state_is_encoded_exactly() -> None:
    from collections import Counter

    from lohan_fx.checkpoint.manifest import decode, encode

    value = {
        "lr": 0.1 + 0.2,
        "best": float("inf"),
        "milestones": Counter({3: 1, 7: 2}),
        "betas": (0.9, 0.999),
        "by step": {1: "a", (2, 3): None},
        "__tuple__": [True],
        "tensor": torch.tensor([[1.5, float("nan")]], dtype=torch.bfloat16),
        "seen": {3, 1},
    }
    again = decode(json.loads(json.dumps(encode(value, "value"), allow_nan=False)))
    tensor, expected = again.pop("tensor"), value.pop("tensor")
    assert again == value and isinstance(again["milestones"], Counter)
    assert torch.equal(tensor.view(torch.int16), expected.view(torch.int16))  # type: ignore[attr-defined]


def test_loss_scaling_resumes_with_its_scale(tmp_path: Path) -> None:
    def start() -> tuple[Any, Any, Any]:
        scaler = lohan_fx.GradScaler("cpu", init_scale=2.0**40, growth_interval=2)
        model = compiled(Tiny(), tmp_path, dtype=torch.float16)
        return model, adamw(model), scaler

    def scaled(model: Any, optimizer: Any, scaler: Any, batches: Any) -> list[float]:
        losses = []
        for batch in batches:
            loss = loss_of(model(**batch))
            scaler.scale(loss.float()).backward()
            scaler.step(optimizer)
            scaler.update()
            losses.append(loss.item())
        return losses

    model, optimizer, scaler = start()
    scaled(model, optimizer, scaler, BATCHES * 5)
    assert 0 < optimizer.skipped_steps < 30
    lohan_fx.save(model, optimizer, tmp_path / "ckpt", scaler=scaler)
    scale, made = scaler.get_scale(), model._lohan.state.step_count
    rest = scaled(model, optimizer, scaler, BATCHES[:3])
    model.close()
    model, optimizer, scaler = start()
    info = lohan_fx.load(model, optimizer, tmp_path / "ckpt", scaler=scaler)
    assert info.step == made < 30 and scaler.get_scale() == scale != 2.0**40
    assert scaled(model, optimizer, scaler, BATCHES[:3]) == rest
    model.close()
