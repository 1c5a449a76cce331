"""A machine is measured by itself, in short and once; here on the CPU and in tiny sizes."""

from __future__ import annotations

import dataclasses
import fcntl
import functools
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import efforts
import pytest
import torch

import lohan_fx
from lohan_fx import api
from lohan_fx.hardware import Hardware, cpu_name, default_file, detect, on_file, quick_file
from lohan_fx.probe import disk, measured_once, once

CPU = torch.device("cpu")
TINY = dataclasses.replace(efforts.TINY, ssd_blocks=(4096,), ssd_limit_s=0.1, thorough=False)


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder without measurements; disks may be rather full."""
    efforts.allow_full_disks(monkeypatch)
    monkeypatch.setenv("LOHAN_FX_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """What is measured, in order: "machine" and "disks"."""
    made: list[str] = []
    for module, name, word in (
        (once, "measure_machine", "machine"),
        (once, "_ssd_rates", "disks"),
    ):
        monkeypatch.setattr(module, name, _noted(getattr(module, name), made, word))
    yield made


def _noted(real: Any, made: list[str], word: str) -> Any:
    def run(*args: Any, **kwargs: Any) -> Any:
        made.append(word)
        return real(*args, **kwargs)

    return run


def _probed(**changes: Any) -> Hardware:
    """Put a file as `lohan_fx.probe` writes it where planning looks."""
    found = dataclasses.replace(
        Hardware.preset("h200"),
        **{
            "source": "a stopwatch",
            "gpu_name": "cpu",
            "cpu_name": cpu_name(),
            "measured": "2026-01-02",
            **changes,
        },
    )
    default_file().parent.mkdir(parents=True, exist_ok=True)
    default_file().write_text(found.to_json())
    return found


def test_a_machine_is_measured_once_and_kept(calls: list[str]) -> None:
    first = measured_once(CPU, effort=TINY)
    again = measured_once(CPU, effort=TINY)
    assert calls == ["machine"]
    assert "quick automatic measurement of 20" in first.source
    assert again.cpu_adam_params_per_s == first.cpu_adam_params_per_s
    assert detect().cpu_adam_params_per_s == first.cpu_adam_params_per_s
    assert not default_file().exists()


def test_what_only_informs_is_left_out() -> None:
    details = measured_once(CPU, effort=TINY).details
    assert "cpu_adam_bfloat16_params_per_s" in details
    assert not {"cpu_adam_float32_params_per_s", "dram_triad_bytes_per_s"} & set(details)


def test_the_probe_comes_first_and_stays_as_it_is(calls: list[str], tmp_path: Path) -> None:
    measured_once(CPU, effort=TINY)
    _probed(cpu_adam_params_per_s=7.5, ssd_read_bytes_per_s=4.0)
    before = default_file().read_text()
    found = measured_once(CPU, [tmp_path], TINY)
    assert calls == ["machine"]
    assert (found.cpu_adam_params_per_s, found.ssd_read_bytes_per_s) == (7.5, 4.0)
    assert default_file().read_text() == before


def test_a_probe_of_another_machine_stays_beside(calls: list[str]) -> None:
    _probed(gpu_name="NVIDIA H200")
    before = default_file().read_text()
    assert "automatic" in measured_once(CPU, effort=TINY).source
    assert calls == ["machine"] and default_file().read_text() == before


def test_disks_are_measured_where_training_may_write(calls: list[str], tmp_path: Path) -> None:
    assert "SSD not measured" in measured_once(CPU, effort=TINY).source
    found = measured_once(CPU, [tmp_path], TINY)
    assert calls == ["machine", "disks"]
    assert "SSD measured automatically" in found.source and "not measured" not in found.source
    assert found.ssd_read_bytes_per_s not in (0.0, 1e9)
    assert found.ssd_mixed_bytes_per_s > 0
    (tmp_path / "more").mkdir()
    again = measured_once(CPU, [tmp_path / "more"], TINY)  # the same disk
    assert calls == ["machine", "disks"]
    assert again.ssd_read_bytes_per_s == detect().ssd_read_bytes_per_s == found.ssd_read_bytes_per_s


def test_each_disk_has_its_rates(
    calls: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = measured_once(CPU, [tmp_path], TINY)
    with monkeypatch.context() as patch:
        patch.setattr(once, "_disks", lambda _: "7_8")
        patch.setattr(once, "_ssd_rates", lambda *_: disk.SsdRates(4.0, 3.0, 5.8, True))
        other = measured_once(CPU, [tmp_path], TINY)
    assert (other.ssd_read_bytes_per_s, other.ssd_mixed_bytes_per_s) == (4.0, 5.8)
    assert not other.ssd_simplex
    back = measured_once(CPU, [tmp_path], TINY)
    assert calls == ["machine", "disks"]
    assert back.ssd_read_bytes_per_s == first.ssd_read_bytes_per_s


def test_a_probe_without_disks_is_completed_in_another_file(
    calls: list[str], tmp_path: Path
) -> None:
    _probed(ssd_read_bytes_per_s=0.0, ssd_write_bytes_per_s=0.0, cpu_adam_params_per_s=7.5)
    before = default_file().read_text()
    found = measured_once(CPU, [tmp_path], TINY)
    assert calls == ["disks"] and default_file().read_text() == before
    assert found.cpu_adam_params_per_s == 7.5
    assert found.source.startswith("a stopwatch; SSD measured automatically")
    assert detect().source == found.source
    assert detect().ssd_read_bytes_per_s == found.ssd_read_bytes_per_s > 0
    # The next probe that leaves disks alone brings its own rates of the rest.
    _probed(ssd_read_bytes_per_s=0.0, ssd_write_bytes_per_s=0.0, cpu_adam_params_per_s=8.5)
    found = measured_once(CPU, [tmp_path], TINY)
    assert calls == ["disks"] and found.cpu_adam_params_per_s == 8.5


@pytest.mark.parametrize(("speed", "wanted"), [(2e8, [2**26]), (3e9, [2**26, 2**30])])
def test_a_slow_disk_is_measured_by_few_bytes(
    speed: float, wanted: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes: list[int] = []

    def rates(_: Any, nbytes: int, *__: Any, **___: Any) -> disk.SsdRates:
        sizes.append(nbytes)
        return disk.SsdRates(speed, speed, speed, True)

    monkeypatch.setattr(disk, "ssd_rates", rates)
    once._ssd_rates([tmp_path], once.FIRST)
    assert sizes == wanted


def test_a_machine_that_cannot_be_measured_has_the_rates_it_had(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fails(*_: Any, **__: Any) -> Hardware:
        raise torch.OutOfMemoryError("the GPU is full")

    monkeypatch.setattr(once, "measure_machine", fails)
    assert measured_once(CPU, effort=TINY).source == detect().source
    assert "the GPU is full" in caplog.text
    assert on_file("cpu") is None


def test_a_full_disk_costs_its_own_rates_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(disk, "_RESERVE_BYTES", 10**18)
    found = measured_once(CPU, [tmp_path], TINY)
    assert "automatic" in found.source and found.ssd_read_bytes_per_s == 1e9
    assert "too full to be measured" in caplog.text
    monkeypatch.setattr(disk, "_RESERVE_BYTES", 0)
    assert measured_once(CPU, [tmp_path], TINY).ssd_read_bytes_per_s != 1e9


def test_a_folder_that_is_not_there_is_no_disk(tmp_path: Path) -> None:
    assert "SSD not measured" in measured_once(CPU, [tmp_path / "absent"], TINY).source


def test_nothing_need_be_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("LOHAN_FX_CACHE", str(tmp_path / "file"))  # no folder can be made there
    assert "automatic" in measured_once(CPU, effort=TINY).source


def test_a_damaged_file_is_measured_anew(
    calls: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    measured_once(CPU, effort=TINY)
    quick_file("cpu").write_text("{")
    assert "automatic" in measured_once(CPU, effort=TINY).source
    assert calls == ["machine", "machine"] and "is not used" in caplog.text
    assert on_file("cpu") is not None


def test_the_users_state_stays(tmp_path: Path) -> None:
    torch.manual_seed(5)
    before, threads = torch.get_rng_state(), torch.get_num_threads()
    torch.set_default_dtype(torch.float64)
    try:
        measured_once(CPU, [tmp_path], TINY)
        assert torch.get_default_dtype() == torch.float64
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.get_num_threads() == threads


def test_processes_take_turns_and_the_second_finds_what_the_first_kept(
    calls: list[str], _cache: Path
) -> None:
    kept = measured_once(CPU, effort=TINY)
    text = quick_file("cpu").read_text()
    quick_file("cpu").unlink()
    found: list[Hardware] = []
    waits = threading.Event()

    def second() -> None:
        waits.set()
        found.append(measured_once(CPU, effort=TINY))

    with (_cache / "measuring.lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        thread = threading.Thread(target=second)
        thread.start()
        waits.wait()
        thread.join(0.2)
        assert thread.is_alive() and not found
        quick_file("cpu").write_text(text)
    thread.join()
    assert calls == ["machine"]
    assert found[0].cpu_adam_params_per_s == kept.cpu_adam_params_per_s


def test_nobody_waits_for_ever(
    _cache: Path, monkeypatch: pytest.MonkeyPatch, calls: list[str]
) -> None:
    monkeypatch.setattr(once, "_LONGEST_TURN_S", 0.1)
    _cache.mkdir()
    with (_cache / "measuring.lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        measured_once(CPU, effort=TINY)
    assert calls == ["machine"]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_is_measured_and_left_as_it_was() -> None:
    gpu = torch.device("cuda", torch.cuda.current_device())
    torch.cuda.empty_cache()
    state, reserved = torch.cuda.get_rng_state(gpu), torch.cuda.memory_reserved(gpu)
    found = measured_once(gpu)
    assert "automatic" in found.source and found.gpu_name == torch.cuda.get_device_name(gpu)
    assert found.h2d_bytes_per_s > 1e9 and found.pinned_alloc_bytes_per_s > 0
    assert torch.equal(torch.cuda.get_rng_state(gpu), state)
    # The workspace of matrix products stays.
    assert torch.cuda.memory_reserved(gpu) - reserved < 128 * 2**20


# ---- compile ----


@pytest.fixture
def on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """The CPU's machine is measured by itself as a GPU's is."""
    monkeypatch.setattr(api, "_MEASURED", ("cpu",))
    monkeypatch.setattr(api, "measured_once", functools.partial(measured_once, effort=TINY))


def _compiled(tmp_path: Path, **changes: Any) -> Any:
    model = torch.nn.Linear(4, 4)
    budget = f"gpu=1MB, dram=1MB, ssd={tmp_path}:1MB"
    return lohan_fx.compile(model, budget, device="cpu", **changes)


def test_compile_measures_at_the_first_use(on_cpu: None, calls: list[str], tmp_path: Path) -> None:
    for seconds in (True, False):
        model = _compiled(tmp_path)
        session = model._lohan
        assert "automatic" in session.settings.hardware.source
        assert session.settings.hardware.ssd_mixed_bytes_per_s > 0
        assert ("measure the machine" in session.phases.seconds) == seconds
        model.close()
    assert calls == ["machine", "disks"]


@pytest.mark.parametrize("changes", [{"profile": "roofline"}, {"hardware": "h200"}])
def test_compile_measures_nothing_where_that_is_not_wanted(
    on_cpu: None, calls: list[str], tmp_path: Path, changes: dict[str, str]
) -> None:
    _compiled(tmp_path, **changes).close()
    assert not calls


def test_a_plan_alone_measures_nothing(on_cpu: None, calls: list[str]) -> None:
    lohan_fx.make_plan(torch.nn.Linear(4, 4), "gpu=1MB, ssd=none", [torch.zeros(1, 4)])
    assert not calls


def test_a_cpu_is_not_measured_by_itself(calls: list[str], tmp_path: Path) -> None:
    _compiled(tmp_path).close()
    assert not calls
