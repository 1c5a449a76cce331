"""A step that was traced before is not traced through autograd again, whatever the files say."""

from __future__ import annotations

import itertools
import logging
import os
import pickle
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from loops import VOCAB, WIDTH, Tiny, compiled, steps, tokens
from torch import library, nn

import lohan_fx
from lohan_fx import ops
from lohan_fx.compiler import known_joints

TRACES = "aot_dispatch_autograd_graph"


@pytest.fixture(autouse=True)
def folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setenv("LOHAN_FX_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(known_joints, "WORTH_S", 0.0)
    (tmp_path / "disk").mkdir()
    return tmp_path / "cache" / "joints"


@pytest.fixture
def traces(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows by one with each step that is traced through autograd."""
    found: list[int] = []
    trace = getattr(known_joints.graph_compile, TRACES)

    def counted(
        flat_fn: Any, flat_args: Any, flat_args_descs: Any, aot_config: Any, *, fw_metadata: Any
    ) -> Any:
        found.append(len(flat_args))
        return trace(flat_fn, flat_args, flat_args_descs, aot_config, fw_metadata=fw_metadata)

    monkeypatch.setattr(known_joints.graph_compile, TRACES, counted)
    return found


def run(disk: Path, model: nn.Module, **options: Any) -> tuple[Any, ...]:
    """Two steps: losses, the graphs as text, the weights."""
    torch._dynamo.reset()
    ours = compiled(model, disk, "gpu=200kB, dram=260kB", **options)
    optimizer = lohan_fx.AdamW(ours.parameters(), lr=1e-2)
    torch.manual_seed(1)
    losses = steps(ours, optimizer, [tokens(0), tokens(1)])
    graphs, weights = ours.graphs(), list(ours.state_dict().values())
    ours.close()
    return losses, graphs, weights


@pytest.mark.parametrize("lowering", ["aten", "inductor"])
def test_a_second_run_has_the_same_graphs_and_the_same_numbers(
    lowering: str,
    traces: list[int],
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # Graphs have their runtime's number in them.
    monkeypatch.setattr(ops, "_numbers", itertools.count(10**6))
    first = run(tmp_path / "disk", Tiny(2, dropout=0.1), lowering=lowering)
    monkeypatch.setattr(ops, "_numbers", itertools.count(10**6))
    again = run(tmp_path / "disk", Tiny(2, dropout=0.1), lowering=lowering)
    assert len(traces) == len(list(folder.iterdir())) == 1
    assert again[0] == first[0]
    assert again[1] == first[1]
    assert "# File: " in again[1]["forward"]
    assert all(map(torch.equal, again[2], first[2]))


class Odd(nn.Module):
    """Something between an embedding and a head."""

    def __init__(self, what: Callable[[torch.Tensor], torch.Tensor] | nn.Module) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(VOCAB, WIDTH), nn.Linear(WIDTH, VOCAB)
        self.what = what

    def forward(self, ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        logits = self.head(self.what(self.embed(ids)))
        return nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())


def capture(disk: Path, model: nn.Module, **options: Any) -> None:
    torch._dynamo.reset()
    ours = compiled(model, disk, **options)
    optimizer = lohan_fx.AdamW(ours.parameters())
    ours(**tokens(0))
    del optimizer
    ours.close()


def relu() -> nn.Module:
    return Odd(nn.ReLU())


def frozen() -> nn.Module:
    model = relu()
    model.embed.requires_grad_(False)
    return model


class _Renamed(Odd):
    def __init__(self) -> None:
        super().__init__(nn.ReLU())
        self.other = self.what
        del self.what
        self.what = self.other.forward


_MATH = torch.nn.attention.SDPBackend.MATH


@pytest.mark.parametrize(
    ("make", "around"),
    [
        (lambda: Odd(nn.Tanh()), nullcontext),
        (lambda: relu().bfloat16(), nullcontext),
        (frozen, nullcontext),
        (_Renamed, nullcontext),
        (relu, lambda: torch.autocast("cpu", dtype=torch.bfloat16)),
        (relu, lambda: torch.nn.attention.sdpa_kernel(_MATH)),
    ],
    ids=["op", "dtype", "frozen", "names", "autocast", "attention"],
)
def test_whatever_tracing_sees_makes_another_graph(
    make: Callable[[], nn.Module], around: Any, traces: list[int], tmp_path: Path
) -> None:
    capture(tmp_path / "disk", relu())
    with around():
        capture(tmp_path / "disk", make())
    assert len(traces) == 2
    capture(tmp_path / "disk", relu())
    assert len(traces) == 2


def test_another_version_of_the_compiler_traces_anew(
    traces: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    capture(tmp_path / "disk", relu())
    monkeypatch.setattr(known_joints, "_own_digest", lambda: "another version")
    capture(tmp_path / "disk", relu())
    assert len(traces) == 2


@library.custom_op("lohan_test::doubled", mutates_args=())
def _doubled(x: torch.Tensor) -> torch.Tensor:
    return x * 2


@_doubled.register_fake
def _(x: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(x)


_doubled.register_autograd(lambda ctx, gradient: gradient * 2)


class _Counting(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls.add_(1)
        return x


@pytest.mark.parametrize(
    "what",
    [_doubled, _Counting(), lambda x: x * torch.tensor([2.0, 3.0] * (WIDTH // 2))],
    ids=["an op whose gradient is not torch's", "a buffer written to", "a constant"],
)
def test_what_a_key_does_not_tell_all_of_is_not_kept(
    what: Any, folder: Path, traces: list[int], tmp_path: Path
) -> None:
    for _ in range(2):
        capture(tmp_path / "disk", Odd(what))
    assert len(traces) == 2
    assert not folder.exists()


class _Program:
    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.mark),)


@pytest.mark.parametrize("damage", ["cut", "a program", "another's", "large"])
def test_a_damaged_file_is_told_of_ignored_and_replaced(
    damage: str,
    folder: Path,
    traces: list[int],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    disk = tmp_path / "disk"
    capture(disk, relu())
    (file,) = folder.iterdir()
    whole = file.read_bytes()
    if damage == "cut":
        file.write_bytes(whole[: len(whole) // 2])
    elif damage == "a program":
        file.write_bytes(pickle.dumps(_Program(tmp_path / "ran")))
    elif damage == "another's":
        capture(disk, Tiny(1))
        (other,) = set(folder.iterdir()) - {file}
        file.write_bytes(other.read_bytes())
    else:
        monkeypatch.setattr(known_joints, "MAX_BYTES", len(whole) - 1)
    before = len(traces)
    with caplog.at_level(logging.WARNING):
        capture(disk, relu())
    assert f"{file} is not used" in caplog.text
    assert len(traces) == before + 1
    monkeypatch.setattr(known_joints, "MAX_BYTES", 10 * len(whole))
    capture(disk, relu())
    assert len(traces) == before + 1
    assert not (tmp_path / "ran").exists()


def test_what_is_traced_at_once_is_not_kept(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(known_joints, "WORTH_S", 1000.0)
    capture(tmp_path / "disk", relu())
    assert not folder.exists()


def test_a_torch_that_traces_otherwise_gets_no_files(
    folder: Path, traces: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(known_joints, "_ARGUMENTS", ["other", "arguments"])
    capture(tmp_path / "disk", relu())
    assert len(traces) == 1
    assert not folder.exists()
