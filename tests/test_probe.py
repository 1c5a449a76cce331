"""Measuring a machine: every figure in tiny sizes, on the CPU and with real files."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from efforts import TINY, allow_full_disks

from lohan_fx.budget import Machine
from lohan_fx.cli.probe import as_text, main
from lohan_fx.errors import LohanError
from lohan_fx.hardware import Hardware, detect, load
from lohan_fx.probe import FULL, QUICK, Effort, device, disk, host, machine, measure_machine
from lohan_fx.probe.once import FIRST
from lohan_fx.runtime.device import CpuDevice
from lohan_fx.runtime.timing import seconds_per_call

CPU = torch.device("cpu")
BRIEF = {"warm_s": 0.0, "measure_s": 0.0}


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> Effort:
    """Tiny sizes, for the command too; disks may be rather full."""
    allow_full_disks(monkeypatch)
    for module in (machine, sys.modules["lohan_fx.probe"]):
        monkeypatch.setattr(module, "FULL", TINY)
        monkeypatch.setattr(module, "QUICK", TINY)
    return TINY


def _takes(seconds: float) -> Any:
    """A stand-in for seconds_per_call: runs once, and took that long."""

    def timed(run: Any, _: torch.device, **__: float) -> float:
        run()
        return seconds

    return timed


def test_a_call_is_timed_by_what_it_takes() -> None:
    clock = threading.Event()
    quick = seconds_per_call(lambda: None, CPU, **BRIEF)
    slow = seconds_per_call(lambda: clock.wait(0.02), CPU, **BRIEF)
    assert quick < 0.02 <= slow


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_matrix_products_have_a_rate(dtype: torch.dtype) -> None:
    assert device.matmul_flops_per_s(CPU, dtype, 64, **BRIEF) > 1e6


def test_products_stop_growing_where_one_takes_too_long(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = []

    def product(a: torch.Tensor, b: torch.Tensor, *, out: torch.Tensor) -> None:
        sizes.append(a.shape[0])

    monkeypatch.setattr(torch, "mm", product)
    monkeypatch.setattr(device, "seconds_per_call", _takes(1.0))
    rate = device.matmul_flops_per_s(CPU, torch.float32, 8192, warm_s=0.0, measure_s=0.1)
    assert sizes == [256] and rate == 2 * 256**3


def test_memory_is_counted_read_and_written(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (device, host):
        monkeypatch.setattr(module, "seconds_per_call", _takes(2.0))
    assert device.memory_bytes_per_s(CPU, 4000, **BRIEF) == 3 * 4000 / 2
    assert host.dram_copy_bytes_per_s(8192, **BRIEF) == 2 * 8192 / 2
    assert host.dram_triad_bytes_per_s(8192, **BRIEF) == 3 * 8192 / 2
    assert host.adam_params_per_s(1000, "bfloat16", **BRIEF) == 500


def test_links_copy_what_they_are_timed_for(monkeypatch: pytest.MonkeyPatch) -> None:
    seam = device.open_device(CPU)
    monkeypatch.setattr(device, "open_device", lambda _: seam)
    monkeypatch.setattr(device, "seconds_per_call", _takes(4.0))
    rates = device.link_rates(CPU, 8192, **BRIEF)
    assert dataclasses.astuple(rates) == (2048, 2048, 2048)
    assert (seam.bytes_in, seam.bytes_out) == (2 * 8192, 2 * 8192)


def test_pinned_memory_has_a_rate() -> None:
    assert device.pinned_alloc_bytes_per_s(CPU, 1 << 20) > 0


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_adam_has_a_rate(dtype: str) -> None:
    assert host.adam_params_per_s(1001, dtype, **BRIEF) > 0


def test_adam_has_a_rate_into_second_copies(monkeypatch: pytest.MonkeyPatch) -> None:
    arrays: list[torch.Tensor] = []
    real = host._floats

    def kept(numel: int) -> torch.Tensor:
        arrays.append(real(numel).fill_(float(len(arrays) < 3)))
        return arrays[-1]

    monkeypatch.setattr(host, "_floats", kept)
    monkeypatch.setattr(host, "seconds_per_call", lambda run, *_, **__: run() or 2.0)
    assert host.adam_ahead_params_per_s(1000, **BRIEF) == 500
    assert all(bool((array == 1).all()) for array in arrays[:3])
    assert all(bool(array.all()) for array in arrays[4:7])


def test_copies_go_on_both_ways_while_adam_is_timed_and_end_with_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    before = threading.active_count()
    device = CpuDevice()
    monkeypatch.setattr(host, "open_device", lambda _: device)
    params_per_s, bytes_per_s = host.adam_while_copying(
        CPU, 100_000, 4096, warm_s=0.02, measure_s=0.05
    )
    assert params_per_s > 0 and bytes_per_s > 0
    assert device.bytes_in == device.bytes_out > 0
    assert threading.active_count() == before


def test_files_are_measured_and_gone_after(tiny: Effort, tmp_path: Path) -> None:
    dirs = [tmp_path / "a", tmp_path / "b"]
    for one in dirs:
        one.mkdir()
    rates = disk.ssd_rates(dirs, 64 * 4096, 4096)
    assert min(rates.read_bytes_per_s, rates.write_bytes_per_s, rates.mixed_bytes_per_s) > 0
    assert not list(dirs[0].iterdir()) and not list(dirs[1].iterdir())


def test_a_slow_disk_is_measured_by_what_it_moves_in_time(
    tiny: Effort, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engines = []
    real = disk.FileEngine

    def slow(*args: Any, **kwargs: Any) -> Any:
        engines.append(real(*args, faults={"delay_ms": 1}, **kwargs))
        return engines[-1]

    monkeypatch.setattr(disk, "FileEngine", slow)
    disk.ssd_rates([tmp_path], 200 * 4096, 4096, limit_s=0.0)
    # Four passes of one request, an eighth of all: two writes, a read, and the read of the mixed one.
    assert engines[0].bytes_written == engines[0].bytes_read == 2 * 25 * 4096


def test_a_full_disk_is_refused_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(disk, "FileEngine", None)
    with pytest.raises(LohanError, match="too full to be measured"):
        disk.ssd_rates([tmp_path], 10**18, 1 << 20)


def test_a_disk_is_simplex_where_mixed_traffic_takes_turns() -> None:
    turns = disk.SsdRates(4.0, 4.0, 4.2, True)
    beside = disk.SsdRates(4.0, 3.0, 5.8, True)
    assert turns.simplex and not beside.simplex


def test_a_machine_is_measured_in_full(tiny: Effort, tmp_path: Path) -> None:
    said: list[str] = []
    found = measure_machine(CPU, [tmp_path, Path(os.getcwd())], tiny, said.append)
    assert Hardware.from_json(found.to_json()) == found
    assert found.measured and found.gpu_name == "cpu" and "CPUs" in found.cpu_name
    lanes = found.lanes()
    assert lanes.ssd_read_bytes_per_s > 0 and lanes.cpu_adam_params_per_s > 0
    assert lanes.dram_bytes_per_s >= 28 * lanes.cpu_adam_params_per_s
    assert found.details["ssd_block8192_read_bytes_per_s"] > 0
    assert found.details["ssd_dir1_block8388608_read_bytes_per_s"] > 0
    assert all(key.endswith("_per_s") for key in found.details)
    assert "matrix products in bfloat16" in said and "Adam beside copies" in said


def test_sizes_shrink_to_what_a_small_machine_holds() -> None:
    small = FULL.within(400 * 2**20, 80 * 2**20)
    assert small.host_bytes == small.link_bytes == 10 * 2**20
    assert small.gpu_bytes == 10 * 2**20
    assert 12 * small.adam_params <= 400 * 2**20 // 10
    assert FULL.within(2**40, 2**37) == FULL


@pytest.mark.parametrize("effort", [FULL, QUICK, FIRST])
def test_adam_goes_over_more_than_a_cache_holds(effort: Effort) -> None:
    assert 14 * effort.adam_params > 2 * 2**30


def test_the_command_writes_where_planning_looks(
    tiny: Effort,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("LOHAN_FX_CACHE", str(tmp_path / "new"))
    assert main(["--device", "cpu", "--ssd", str(tmp_path)]) == 0
    path = tmp_path / "new" / "machine.json"
    assert str(path) in capsys.readouterr().out
    assert detect().measured == load(path).measured != ""


def test_the_command_leaves_disks_alone_when_told(
    tiny: Effort, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "machine.json"
    assert main(["--device", "cpu", "--no-ssd", "--out", str(out)]) == 0
    assert json.loads(out.read_text())["ssd_read_bytes_per_s"] == 0
    assert "SSD" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--out", "{dir}"], "is a directory"),
        (["--out", "{dir}/a/machine.json"], "not a writable directory"),
        (["--out", "{dir}/machine.txt"], "must end in .json"),
        (["--out", "{dir}/m.json", "--ssd", "{dir}/no", "--device", "cpu"], "cannot be used"),
        (["--out", "{dir}/m.json", "--ssd", "{dir}", "--no-ssd"], "exclude each other"),
        (["--fast"], "see --help"),
    ],
)
def test_a_wrong_use_is_one_line(
    arguments: list[str], words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([part.format(dir=tmp_path) for part in arguments]) == 1
    err = capsys.readouterr().err
    assert words in err and err.count("\n") == 1


def test_figures_are_shown_with_units() -> None:
    text = as_text(Hardware.preset("h100-80gb"))
    assert "matmul bfloat16" in text and "TFLOP/s" in text
    assert "GB/s" in text and "G params/s" not in text  # presets have no single measurements


def test_nothing_is_drawn_where_the_output_is_piped(tmp_path: Path) -> None:
    result = subprocess.run(
        [sys.executable, "-m", "lohan_fx.probe", "--help"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert "--quick" in result.stdout and not result.stderr


def test_the_default_disk_is_the_one_plans_use(
    tiny: Effort, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Any] = []

    def measured(_: Any, dirs: Any, *__: Any) -> Hardware:
        asked.extend(dirs)
        return Hardware.preset("h200")

    monkeypatch.setattr("lohan_fx.probe.measure_machine", measured)
    assert main(["--device", "cpu", "--out", str(tmp_path / "m.json")]) == 0
    where = Machine.here().default_ssd_dir
    assert asked == ([] if where is None else [where])
