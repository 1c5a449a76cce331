"""The tools that time training steps: the same lines from every engine, and what becomes of failures."""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

FOLDER = Path(__file__).parents[1] / "benchmarks"
TINY = ["--size", "tiny", "--seq", "16", "--steps", "1", "--lowering", "aten", "--device", "cpu"]
BUDGET = "gpu=60MB, dram=200MB"


@pytest.fixture(scope="module")
def train() -> Iterator[ModuleType]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(FOLDER))
        import train as module

        yield module


@pytest.fixture(scope="module")
def peers(train: ModuleType) -> ModuleType:
    return train.peers


def lines_of(text: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in text.splitlines() if line.startswith("{")]


@pytest.fixture(scope="module")
def ours(train: ModuleType) -> list[dict[str, Any]]:
    """Lines of lohan_fx, without and with clipping."""
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        assert train.main([*TINY, "--batch", "2", "--budget", BUDGET, "--clip", "0", "1"]) == 0
    return lines_of(said.getvalue())


def test_a_line_says_where_the_time_and_the_bytes_went(ours: list[dict[str, Any]]) -> None:
    assert [line["clip"] for line in ours] == [None, 1.0]
    for line in ours:
        assert line["tokens_per_s"] == pytest.approx(2 * 16 / line["step_s"], rel=0.01)
        assert set(line["phases_s"]) == {"forward", "backward", "optimizer"}
        assert line["model_tflops"] == pytest.approx(
            6 * line["params"] * line["tokens_per_s"] / 1e12, abs=0.06
        )
        assert {"plan", "place", "lower forward", "lower backward"} <= set(line["setup_s"])
        assert sum(line["setup_s"].values()) <= line["first_step_s"] + 0.1
        assert 0 < line["peak_gb"]["gpu"] <= 0.06 and 0 < line["peak_gb"]["dram"] <= 0.2
        assert line["moved_gb_per_step"]["d2h"] > 0
        assert line["bound_ratio"] == pytest.approx(
            line["step_s"] / line["predicted"]["bound_s"], rel=0.05
        )


@pytest.mark.parametrize("engine", ["compile", "fsdp2"])
def test_peers_train_the_same_model_to_the_same_losses(
    engine: str,
    train: ModuleType,
    ours: list[dict[str, Any]],
    capsys: pytest.CaptureFixture[str],
) -> None:
    words = [*TINY, "--engine", engine, "--batch", "2", "--budget", BUDGET]
    assert train.main(words) == 0
    (line,) = lines_of(capsys.readouterr().out)
    assert line["losses"] == pytest.approx(ours[0]["losses"], abs=2e-3)
    assert line["params"] == ours[0]["params"]
    assert ours[0].keys() - line.keys() == {
        *("setup_s", "predicted", "bound_ratio", "stall_s", "moved_gb_per_step")
    }


def test_a_model_that_does_not_fit_is_said_to(
    train: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train.main([*TINY, "--batch", "2", "--budget", "gpu=20MB, dram=200MB"]) == 1
    (line,) = lines_of(capsys.readouterr().out)
    assert line["status"] == "does not fit" and "GPU" in line["error"]


def test_a_peer_that_is_not_there_is_named(
    train: ModuleType, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "deepspeed", None)
    assert train.main([*TINY, "--engine", "ds_offload"]) == 1
    (line,) = lines_of(capsys.readouterr().out)
    assert line["status"] == "not installed" and "pip install deepspeed" in line["error"]


def in_memory(peers: ModuleType, gpu_bytes: int, layers: int | None = None) -> Any:
    args = argparse.Namespace(
        size="tiny", seq=16, lowering="aten", gpu_bytes=gpu_bytes, checkpoint_layers=layers
    )
    return peers.InMemory(args, torch.device("cpu"), masters=True)


def test_layers_are_checkpointed_where_activations_do_not_fit(peers: ModuleType) -> None:
    engine = in_memory(peers, 10**9)
    engine.set(2, None)
    assert engine.checkpointed == 0
    engine.args.gpu_bytes = 16 * engine.num_params
    engine.set(4, None)
    assert [layer.gradient_checkpointing for layer in engine.model.model.layers] == [True, True]


def test_out_of_memory_is_tried_again_with_more_layers_checkpointed(
    train: ModuleType, peers: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = in_memory(peers, 10**9)
    seen = []

    def forward(tokens: torch.Tensor) -> torch.Tensor:
        seen.append(engine.checkpointed)
        if engine.checkpointed < 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return next(engine.model.parameters()).sum().float()

    monkeypatch.setattr(engine, "forward", forward)
    monkeypatch.setattr(engine, "step", lambda: None)
    shape = train.measure.Shape(2, 16, 1)
    result = train._measured(engine, shape, torch.device("cpu"), None)
    assert seen[:3] == [0, 1, 2] and result["retries"] == 2
    assert result["checkpointed_layers"] == 2
    assert not engine.save_memory()


def test_the_baseline_updates_as_adamw_with_fp32_masters_does(peers: ModuleType) -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.nn.Parameter(torch.randn(64, 8, generator=generator).bfloat16())
    reference = torch.nn.Parameter(weight.detach().float())
    update = peers.FusedAdamW([weight], backend="aot_eager")
    optimizer = torch.optim.AdamW(
        [reference], lr=peers.LEARNING_RATE, weight_decay=peers.WEIGHT_DECAY
    )
    for _ in range(3):
        weight.grad = torch.randn(64, 8, generator=generator).bfloat16()
        reference.grad = weight.grad.float()
        update.step()
        optimizer.step()
    (_, master_N, *_), *_ = update.states
    torch.testing.assert_close(master_N.view(64, 8), reference.detach(), rtol=1e-6, atol=1e-7)
    assert torch.equal(weight.detach(), master_N.view(64, 8).bfloat16())


def test_lanes_are_the_union_of_their_events(train: ModuleType) -> None:
    def event(kind: str, name: str, start: float, seconds: float, nbytes: int = 0) -> Any:
        return {
            "cat": kind,
            "name": name,
            "ts": start * 1e6,
            "dur": seconds * 1e6,
            "args": {"bytes": nbytes},
        }

    found = train.measure.lanes_of(
        [
            event("kernel", "a", 0.0, 2.0),
            event("kernel", "b", 1.0, 2.0),
            event("kernel", "c", 5.0, 1.0),
            event("gpu_memcpy", "Memcpy HtoD (Pinned -> Device)", 0.0, 1.0, 3 * 10**9),
            event("gpu_memcpy", "Memcpy DtoH (Device -> Pinned)", 2.0, 1.0, 10**9),
            event("cpu_op", "aten::mm", 0.0, 9.0),
        ]
    )
    assert found == {
        "busy_s": {"d2h": 1.0, "h2d": 1.0, "kernels": 4.0},
        "moved_gb": {"d2h": 1.0, "h2d": 3.0},
    }


def test_zero_infinity_has_buffers_for_what_may_be_live(peers: ModuleType) -> None:
    numels = [65_536_000, 4_194_304, 11_272_192, 2048]
    config = peers.deepspeed_config(numels, 16, "/disk")
    zero = config["zero_optimization"]
    params, optimizer = zero["offload_param"], zero["offload_optimizer"]
    assert params["device"] == optimizer["device"] == "nvme"
    assert params["buffer_size"] >= max(numels)
    live = zero["stage3_max_live_parameters"] + zero["stage3_prefetch_bucket_size"]
    assert params["buffer_count"] * 4_194_304 >= live >= max(numels)
    assert optimizer["buffer_count"] > 3 * 4
    cpu = peers.deepspeed_config(numels, 16, None)["zero_optimization"]
    assert cpu["offload_param"] == cpu["offload_optimizer"] == {"device": "cpu", "pin_memory": True}
