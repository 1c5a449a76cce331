"""Hardware: presets with sources, files, and a look at this machine."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from lohan_fx.errors import LohanError
from lohan_fx.hardware import (
    PRESETS,
    Hardware,
    cpu_name,
    default_file,
    detect,
    load,
    nearest,
)


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_has_rates_and_says_where_they_come_from(name: str) -> None:
    machine = Hardware.preset(name)
    assert machine.name == name
    assert len(machine.source) > 40
    assert machine.gpu_memory_bytes >= 16 * 10**9
    assert machine.gpu_flops_per_s("bfloat16") >= machine.gpu_flops_per_s("float32") > 1e12
    assert machine.lanes().cpu_adam_ahead_params_per_s == machine.cpu_adam_params_per_s
    for field in dataclasses.fields(machine.lanes()):
        value = getattr(machine.lanes(), field.name)
        assert value is True or value is False or value > 0
    assert 0.5 <= machine.duplex_factor <= 1


def test_the_papers_server_has_the_published_rates() -> None:
    machine = Hardware.preset("lohan-rtx4090")
    assert machine.h2d_bytes_per_s == machine.d2h_bytes_per_s == 21e9
    assert machine.dram_bytes == 768 * 10**9
    assert 160e12 <= machine.gpu_flops_per_s("float16") <= 164e12
    # Adam's own traffic fits under the DRAM lane.
    assert 28 * machine.cpu_adam_params_per_s < machine.dram_bytes_per_s


# Published: 13B, "TFLOPS" (8 FLOPs a nominal parameter and token) by number of SSDs, and tokens/s
# by batch with 12. Rows that the SSDs limit.
_BY_SSDS = [(1, 32, 37.5), (1, 64, 70.3), (2, 32, 64.3), (2, 64, 111.7), (3, 32, 81.1)]
_BY_SSDS += [(3, 64, 136.3), (6, 32, 121.7)]
_LIMITED = [(n, batch, tflops * 1e12 / (8 * 13e9)) for n, batch, tflops in _BY_SSDS]
_LIMITED += [(12, 8, 411.0), (12, 16, 811.0), (12, 32, 1376.0)]


@pytest.mark.parametrize(("num_ssds", "batch", "tokens_per_s"), _LIMITED)
def test_the_ssds_of_the_papers_server_explain_its_published_steps(
    num_ssds: int, batch: int, tokens_per_s: float
) -> None:
    params = 12.84e9
    forward_s = 2 * params * batch * 1024 / 140e12
    rate = Hardware.preset("lohan-rtx4090", num_ssds).ssd_read_bytes_per_s
    step_s = forward_s + 28 * params / rate
    assert step_s == pytest.approx(batch * 1024 / tokens_per_s, rel=0.07)


def test_more_ssds_of_the_papers_server_are_faster_and_larger() -> None:
    machines = [Hardware.preset("lohan-rtx4090", num_ssds=n) for n in range(1, 13)]
    rates = [machine.ssd_read_bytes_per_s for machine in machines]
    assert rates == sorted(set(rates)) and rates[-1] < 32e9
    assert machines[5].ssd_bytes == 6 * machines[0].ssd_bytes
    assert all(
        m.lanes().ssd_simplex and m.ssd_read_bytes_per_s == m.ssd_write_bytes_per_s
        for m in machines
    )


@pytest.mark.parametrize("num_ssds", [0, 13])
def test_the_papers_server_has_one_to_twelve_ssds(num_ssds: int) -> None:
    with pytest.raises(LohanError, match="1 to 12 SSDs"):
        Hardware.preset("lohan-rtx3090", num_ssds)


def test_other_presets_have_a_fixed_number_of_ssds() -> None:
    with pytest.raises(LohanError, match="fixed"):
        Hardware.preset("rtx4090", num_ssds=2)


def test_an_unknown_preset_is_answered_with_the_known_ones() -> None:
    with pytest.raises(LohanError, match="h100-80gb"):
        Hardware.preset("abacus")


def test_a_dtype_without_a_rate_takes_the_slowest_known() -> None:
    machine = Hardware.preset("h100-80gb")
    assert machine.gpu_flops_per_s("float64") == machine.gpu_flops_per_s("float32")


def test_a_machine_survives_its_file(tmp_path: Path) -> None:
    machine = Hardware.preset("h200")
    file = tmp_path / "machine.json"
    file.write_text(machine.to_json())
    assert load(file) == machine


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"schema": 7}', '{"schema": 2, "name": "x"}'])
def test_a_file_that_is_no_machine_is_refused(tmp_path: Path, text: str) -> None:
    file = tmp_path / "machine.json"
    file.write_text(text)
    with pytest.raises(LohanError, match=r"machine\.json: this .*hardware file"):
        load(file)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("h2d_bytes_per_s", 0),
        ("h2d_bytes_per_s", "fast"),
        ("ssd_read_bytes_per_s", -1.0),
        ("dram_bytes", 1.5),
        ("flops_per_s", {"bfloat16": -1}),
        ("ssd_simplex", 1),
        ("name", None),
        ("details", {"a_s": "long"}),
    ],
)
def test_a_machine_with_an_impossible_value_is_refused_and_the_field_named(
    tmp_path: Path, field: str, value: object
) -> None:
    raw = json.loads(Hardware.preset("h200").to_json()) | {field: value}
    file = tmp_path / "machine.json"
    file.write_text(json.dumps(raw))
    with pytest.raises(LohanError, match=f"hardware file: {field} is"):
        load(file)


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(LohanError, match=r"absent\.json cannot be read"):
        load(tmp_path / "absent.json")


def test_this_machine_without_a_gpu_computes_on_its_cpu() -> None:
    machine = detect()
    assert machine.gpu_name == "cpu"
    assert machine.dram_bytes > 0
    assert machine.lanes().cpu_adam_params_per_s > 0


def test_a_known_gpu_brings_its_presets_rates_and_this_machines_sizes() -> None:
    machine = nearest("NVIDIA H100 80GB HBM3")
    preset = Hardware.preset("h100-80gb")
    assert machine.h2d_bytes_per_s == preset.h2d_bytes_per_s
    assert machine.dram_bytes != preset.dram_bytes


def _put_default_file(folder: Path, monkeypatch: pytest.MonkeyPatch, **changes: Any) -> None:
    monkeypatch.setenv("LOHAN_FX_CACHE", str(folder))
    machine = dataclasses.replace(
        Hardware.preset("h200"), **{"source": "a stopwatch", "cpu_name": cpu_name(), **changes}
    )
    default_file().write_text(machine.to_json())


def test_a_measured_machine_is_preferred_to_a_preset(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _put_default_file(
        tmp_path, monkeypatch, gpu_name="NVIDIA H100 80GB HBM3", h2d_bytes_per_s=1.25e9
    )
    machine = nearest("NVIDIA H100 80GB HBM3")
    assert machine.source == "a stopwatch"
    assert machine.h2d_bytes_per_s == 1.25e9
    assert machine.dram_bytes != Hardware.preset("h200").dram_bytes


def test_a_measured_cpu_is_preferred_to_generic_rates(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _put_default_file(tmp_path, monkeypatch, gpu_name="cpu", cpu_adam_params_per_s=7.5)
    assert detect().cpu_adam_params_per_s == 7.5


def test_a_disk_that_was_not_measured_gets_a_generic_rate(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _put_default_file(
        tmp_path, monkeypatch, gpu_name="cpu", ssd_read_bytes_per_s=0.0, ssd_write_bytes_per_s=0.0
    )
    machine = detect()
    assert machine.ssd_read_bytes_per_s == machine.ssd_write_bytes_per_s == 1e9
    assert "SSD not measured" in machine.source


@pytest.mark.parametrize("changes", [{"gpu_name": "other"}, {"cpu_name": "abacus, 2 CPUs"}])
def test_a_file_of_another_machine_is_passed_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, str]
) -> None:
    _put_default_file(tmp_path, monkeypatch, **{"gpu_name": "cpu", **changes})
    assert detect().source != "a stopwatch"


def test_a_damaged_default_file_is_named_and_passed_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("LOHAN_FX_CACHE", str(tmp_path))
    default_file().write_text("{")
    assert "generic" in detect().source
    assert "machine.json is not used" in caplog.text


def test_the_default_file_is_in_the_users_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LOHAN_FX_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert default_file() == Path("/somewhere/lohan_fx/machine.json")


def test_an_unknown_gpu_is_planned_for_and_said_to_be_unknown() -> None:
    assert "no preset has a 'Fancy 9000'" in nearest("Fancy 9000").source


def test_an_idle_preset_completes_a_budget() -> None:
    machine = Hardware.preset("lohan-rtx4090").machine()
    assert machine.dram_free_bytes == 768 * 10**9
    assert machine.default_ssd_dir is not None
    assert machine.ssd_free_bytes(machine.default_ssd_dir) == 12 * 3840 * 10**9
