"""Hardware: presets with sources, files, and a look at this machine."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from lohan_fx.errors import LohanError
from lohan_fx.hardware import PRESETS, Hardware, detect, load, nearest


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_has_rates_and_says_where_they_come_from(name: str) -> None:
    machine = Hardware.preset(name)
    assert machine.name == name
    assert len(machine.source) > 40
    assert machine.gpu_memory_bytes >= 16 * 10**9
    assert machine.gpu_flops_per_s("bfloat16") >= machine.gpu_flops_per_s("float32") > 1e12
    for field in dataclasses.fields(machine.lanes()):
        value = getattr(machine.lanes(), field.name)
        assert value is True or value is False or value > 0
    assert 0.5 <= machine.duplex_factor <= 1


def test_the_papers_server_has_the_published_rates() -> None:
    machine = Hardware.preset("lohan-rtx4090")
    assert machine.h2d_bytes_per_s == machine.d2h_bytes_per_s == 21e9
    assert machine.ssd_read_bytes_per_s == 32e9
    assert machine.dram_bytes == 768 * 10**9
    assert 160e12 <= machine.gpu_flops_per_s("float16") <= 164e12


def test_the_papers_server_has_as_many_ssds_as_asked_for() -> None:
    one, six = (Hardware.preset("lohan-rtx4090", num_ssds=n) for n in (1, 6))
    assert one.ssd_read_bytes_per_s == 4.3e9
    assert six.ssd_read_bytes_per_s == pytest.approx(6 * 4.3e9)
    assert six.ssd_bytes == 6 * one.ssd_bytes


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


@pytest.mark.parametrize("text", ["{", "[]", '{"schema": 7}', '{"schema": 1, "name": "x"}'])
def test_a_file_that_is_no_machine_is_refused(tmp_path: Path, text: str) -> None:
    file = tmp_path / "machine.json"
    file.write_text(text)
    with pytest.raises(LohanError, match="hardware file"):
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


def test_an_unknown_gpu_is_planned_for_and_said_to_be_unknown() -> None:
    assert "no preset has a 'Fancy 9000'" in nearest("Fancy 9000").source


def test_an_idle_preset_completes_a_budget() -> None:
    machine = Hardware.preset("lohan-rtx4090").machine()
    assert machine.dram_free_bytes == 768 * 10**9
    assert machine.default_ssd_dir is not None
    assert machine.ssd_free_bytes(machine.default_ssd_dir) == 12 * 3840 * 10**9
