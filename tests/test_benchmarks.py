"""The tools that time training steps: the same lines from every engine, and what becomes of failures."""

from __future__ import annotations

import argparse
import contextlib
import importlib
import io
import json
import os
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


@pytest.fixture(scope="module", autouse=True)
def _folder() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(FOLDER))
        yield


@pytest.fixture(scope="module", autouse=True)
def _alone() -> Iterator[None]:
    """The process group of a peer, left behind, would make the training of later tests distributed."""
    before = set(os.environ)
    yield
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    for name in set(os.environ) - before:
        del os.environ[name]


@pytest.fixture(scope="module")
def train(_folder: None) -> ModuleType:
    return importlib.import_module("train")


@pytest.fixture(scope="module")
def compare(_folder: None) -> ModuleType:
    return importlib.import_module("compare")


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
        words = [*TINY, "--batch", "2", "--budget", BUDGET, "--lanes", "--pin", "state:*=dram"]
        assert train.main([*words, "--clip", "0", "1"]) == 0
    return lines_of(said.getvalue())


def test_a_line_says_where_the_time_and_the_bytes_went(ours: list[dict[str, Any]]) -> None:
    assert [line["clip"] for line in ours] == [None, 1.0]
    for line in ours:
        assert line["tokens_per_s"] == pytest.approx(2 * 16 / line["step_s"], rel=0.01)
        assert set(line["phases_s"]) == {"forward", "backward", "optimizer"}
        assert line["model_tflops"] == pytest.approx(
            6 * line["params"] * line["tokens_per_s"] / 1e12, abs=0.06
        )
        assert {"plan", "lower forward", "lower backward", "rest"} <= set(line["setup_s"])
        one_after_another = [s for what, s in line["setup_s"].items() if "beside" not in what]
        assert sum(one_after_another) <= line["first_step_s"] + 0.1
        assert 0 < line["peak_gb"]["gpu"] <= 0.06 and 0 < line["peak_gb"]["dram"] <= 0.2
        assert line["moved_gb_per_step"]["d2h"] > 0
        assert 0 <= line["trace"]["gpu_idle_share"] < 1 and line["trace"]["busy_s"]["cpu_adam"] > 0
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
        *("setup_s", "predicted", "bound_ratio", "stall_s", "moved_gb_per_step", "trace"),
        *("grad_norm", "updates"),
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
    live = zero["stage3_max_live_parameters"]
    assert params["buffer_count"] * 4_194_304 >= live >= max(numels)
    assert optimizer["buffer_count"] > 3 * 4
    states = peers.deepspeed_config(numels, 16, "/disk", params_too=False)["zero_optimization"]
    assert states["offload_optimizer"] == optimizer
    assert states["offload_param"] == {"device": "cpu", "pin_memory": True}
    cpu = peers.deepspeed_config(numels, 16, None)["zero_optimization"]
    assert cpu["offload_param"] == cpu["offload_optimizer"] == {"device": "cpu", "pin_memory": True}


# A stand-in for train.py whose engines are ways to end: a line for each setting, then the engine's end.
STUB = """
import itertools, json, os, sys, time
words = sys.argv[1:]
def after(flag):
    rest = words[words.index(flag) + 1 :]
    return list(itertools.takewhile(lambda word: not word.startswith("--"), rest))
(engine,), (size,), (budget,) = after("--engine"), after("--size"), after("--budget")
with open("processes", "a") as file:
    file.write(engine + "\\n")
for batch, clip in itertools.product(after("--batch"), after("--clip")):
    rate = {"lohan_fx": 300.0, "slow": 50.0}.get(engine, 100.0) * int(batch)
    line = dict(engine=engine, size=size, seq=int(after("--seq")[0]), budget=budget, batch=int(batch))
    line |= dict(clip=float(clip) or None, gpu_budget_gb=24.0, tokens_per_s=rate, step_s=1024 / rate)
    line |= dict(phases_s=dict(forward=0.1, backward=0.2, optimizer=0.3), model_tflops=1.0)
    line |= dict(peak_gb=dict(gpu=20.0), gpu_reserved_gb=22.0, host_rss_gb=9.0, first_step_s=7.0)
    line |= dict(build_s=3.0, gpu_idle_share=0.25, params=10**9)
    if engine == "crowded" and batch == "32":
        line = {k: line[k] for k in ("engine", "size", "seq", "budget", "batch", "clip", "gpu_budget_gb")}
        line |= dict(status="out of memory", error="CUDA out of memory")
    if engine == "hangs" and batch == "32":
        time.sleep(60)
    if engine == "crashes":
        sys.exit("no such device")
    print("step 0: loss 1", json.dumps(line), sep="\\n", flush=True)
    if "error" in line:
        sys.exit(1)
"""


@pytest.fixture
def stub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "stub.py"
    path.write_text(STUB)
    monkeypatch.chdir(tmp_path)
    return path


def points_of(compare: ModuleType, *engines: str, clips: tuple[float, ...] = (0.0,)) -> list[Any]:
    return [
        compare.Point(engine, "3b", 1024, "gpu=24GB, dram=100GB", batch, clip)
        for engine in engines
        for batch in (8, 32)
        for clip in clips
    ]


def test_points_are_run_once_and_peers_share_a_process(compare: ModuleType, stub: Path) -> None:
    out = stub.with_name("points.jsonl")
    points = points_of(compare, "lohan_fx", "fsdp2", clips=(0.0, 1.0))
    compare.compare(points[:2], out, train=stub)
    assert Path("processes").read_text().split() == ["lohan_fx"] * 2
    with out.open("a") as file:
        file.write('{"engine": "fsdp2", "si')  # cut off
        file.write("\n")
    compare.compare(points, out, train=stub)
    assert Path("processes").read_text().split() == ["lohan_fx"] * 4 + ["fsdp2"]
    assert list(compare.read(out)) == points
    assert [len(job) for job in compare.jobs(points, "all")] == [4, 4]
    assert [len(job) for job in compare.jobs(points, "none")] == [1] * 8


def test_failures_are_recorded_and_leave_the_others_alone(compare: ModuleType, stub: Path) -> None:
    out = stub.with_name("points.jsonl")
    points = points_of(compare, "hangs", "crowded", "crashes", clips=(0.0, 1.0))
    compare.compare(points[:3], out, limit_s=2.0, train=stub)  # 6 s
    compare.compare(points[4:], out, limit_s=20.0, train=stub)
    found = {(p.engine, p.batch, p.clip): line for p, line in compare.read(out).items()}
    status = {key: line.get("status") for key, line in found.items()}
    assert status == {
        ("hangs", 8, 0.0): None,
        ("hangs", 8, 1.0): None,
        ("hangs", 32, 0.0): "timed out",
        ("crowded", 8, 0.0): None,
        ("crowded", 8, 1.0): None,
        ("crowded", 32, 0.0): "out of memory",
        ("crowded", 32, 1.0): "out of memory",
        ("crashes", 8, 0.0): "failed",
        ("crashes", 8, 1.0): "failed",
        ("crashes", 32, 0.0): "failed",
        ("crashes", 32, 1.0): "failed",
    }
    assert "no such device" in found["crashes", 8, 0.0]["error"]
    runs = len(Path("processes").read_text().split())
    compare.compare(points[-1:], out, train=stub)
    assert len(Path("processes").read_text().split()) == runs
    compare.compare(points[-1:], out, again=True, train=stub)
    assert len(Path("processes").read_text().split()) == runs + 1


def test_nothing_is_said_of_points_that_there_was_no_time_for(
    compare: ModuleType, stub: Path
) -> None:
    out = stub.with_name("points.jsonl")
    (point,) = points_of(compare, "hangs")[1:]
    compare.compare([point], out, deadline_s=compare.LEAST_S - 1, train=stub)
    assert not Path("processes").exists()


def test_the_table_compares_with_the_best_peer(compare: ModuleType, stub: Path) -> None:
    out = stub.with_name("points.jsonl")
    points = points_of(compare, "slow", "crowded", "compile", "lohan_fx")
    compare.compare(points, out, train=stub)
    rows = compare.table(compare.read(out).values()).splitlines()
    cells = {tuple(row.split(" | ")[:3]): row for row in rows[2:]}
    where = "| 3b {}, gpu=24GB, dram=100GB", "0"
    ours8 = cells[where[0].format(8), where[1], "lohan_fx"]
    assert ours8.endswith("| 20.0 / 22.0 | 9.0 | 25.0% | - | 10 | 3.00x |")
    ours32 = cells[where[0].format(32), where[1], "lohan_fx"]
    assert ours32.endswith("| 6.00x |")  # of the slow one, as the other ran out of memory
    assert cells[where[0].format(32), where[1], "crowded"].endswith("| crowded | out of memory |")
    assert len(rows) == 2 + len(points)


def test_both_plots_have_every_system(
    compare: ModuleType, stub: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib")
    plot = importlib.import_module("plot")
    out = stub.with_name("points.jsonl")
    compare.compare(points_of(compare, "lohan_fx", "fsdp2"), out, train=stub)
    more = [
        dict(line, budget="gpu=12GB", gpu_budget_gb=12.0) for line in compare.read(out).values()
    ]
    more[-1] |= {"status": "out of memory", "error": "CUDA out of memory"}
    with out.open("a") as file:
        file.writelines(json.dumps(line) + "\n" for line in more)
    lines = list(compare.read(out).values())
    left, right = plot.figure(lines, "3b", gpu_gb=24.0, batch=32).axes
    drawn = [
        {line.get_label(): line.get_xydata().tolist() for line in axes.lines}
        for axes in (left, right)
    ]
    assert drawn[0] == {
        "lohan_fx": [[8, 2400], [32, 9600]],
        "FSDP2 CPU offload": [[8, 800], [32, 3200]],
    }
    assert drawn[1]["lohan_fx"] == [[12, 9600], [24, 9600]]
    assert drawn[1]["FSDP2 CPU offload"] == [[24, 3200]]
    assert [12, 0] in [xy for data in drawn[1].values() for xy in data]
    plot.main([str(out)])
    assert "</svg>" in out.with_suffix(".svg").read_text()
    plot.main([str(out), "--out", str(out.with_suffix(".png"))])
    assert out.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(SystemExit):
        plot.main([str(out), "--size", "7b"])
    assert "no point has size 7b" in capsys.readouterr().err


def test_the_command_runs_real_points(
    compare: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "points.jsonl"
    words = [str(out), "--engines", "compile-bf16", "ds_offload", "--size", "tiny", "--seq", "16"]
    words += ["--batch", "1", "--budget", BUDGET, "--steps", "1", "--lowering", "aten"]
    compare.main([*words, "--device", "cpu", "--limit", "120"])
    ran, absent = compare.read(out).values()
    assert ran["engine"] == "compile-bf16" and ran["tokens_per_s"] > 0
    assert absent["status"] == "not installed"
    assert "| compile-bf16 |" in capsys.readouterr().out
