"""Sizes and budgets: what a user may write, and what an incomplete budget becomes."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lohan_fx.budget import Budget, Capacities, Machine
from lohan_fx.errors import BudgetError, LohanError
from lohan_fx.units import format_bytes, parse_bytes

GIB = 2**30


@pytest.mark.parametrize(
    ("text", "num_bytes"),
    [
        ("24GB", 24 * 10**9),
        ("24 gb", 24 * 10**9),
        ("1.5GiB", 3 * GIB // 2),
        ("0.1TB", 10**11),
        (".5kB", 500),
        ("4096", 4096),
        ("12B", 12),
        ("1_000MB", 10**9),
        (" 7 MiB ", 7 * 2**20),
        ("9007199254740993", 9007199254740993),
        (17, 17),
    ],
)
def test_a_size_is_read_exactly(text: str | int, num_bytes: int) -> None:
    assert parse_bytes(text) == num_bytes


@pytest.mark.parametrize("text", ["", "GB", "-1GB", "1e9", "1 2GB", "nan", -4, True, "24GB."])
def test_what_is_no_size_is_refused(text: str | int) -> None:
    with pytest.raises(LohanError, match=r"is not a size|unknown unit"):
        parse_bytes(text)


def test_an_unknown_unit_is_answered_with_the_known_ones() -> None:
    with pytest.raises(LohanError, match=r"unknown unit 'GIG'.*GB.*GiB"):
        parse_bytes("24GIG")


@pytest.mark.parametrize(
    ("num_bytes", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1500, "1.5 kB"),
        (999_960, "1.0 MB"),
        (24 * 10**9, "24.0 GB"),
        (-(10**12), "-1.0 TB"),
    ],
)
def test_a_size_is_shown_in_the_unit_that_fits(num_bytes: int, text: str) -> None:
    assert format_bytes(num_bytes) == text


@given(st.integers(0, 10**18))
def test_a_shown_size_reads_back_as_nearly_itself(num_bytes: int) -> None:
    assert parse_bytes(format_bytes(num_bytes)) == pytest.approx(num_bytes, rel=0.06)


def test_a_full_budget_names_every_tier() -> None:
    budget = Budget.parse("gpu=24GB, dram=100GiB, ssd=/mnt/a:1TB+/mnt/b:500GB")
    assert budget.gpu == 24 * 10**9
    assert budget.dram == 100 * GIB
    assert budget.ssd == ((Path("/mnt/a"), 10**12), (Path("/mnt/b"), 500 * 10**9))
    assert budget.ssd_bytes == 1500 * 10**9


@pytest.mark.parametrize("value", ["24GB", 24 * 10**9, Budget(gpu=24 * 10**9)])
def test_a_size_alone_is_the_gpus(value: str | int | Budget) -> None:
    assert Budget.parse(value) == Budget(gpu=24 * 10**9, dram=None, ssd=None)


@pytest.mark.parametrize(
    ("text", "ssd"),
    [
        ("/mnt/a", ((Path("/mnt/a"), None),)),
        ("2TB", ((None, 2 * 10**12),)),
        ("none", ()),
        ("/a:b:1GB", ((Path("/a:b"), 10**9),)),
        ("nvme/x:1GB", ((Path("nvme/x"), 10**9),)),
    ],
)
def test_an_ssd_may_leave_out_its_size_or_its_directory(text: str, ssd: object) -> None:
    assert Budget.parse(f"gpu=1GB,ssd={text}").ssd == ssd


def test_a_budget_is_built_from_python_values_too() -> None:
    budget = Budget(gpu="24GB", dram="1GiB", ssd=[Path("/a"), "/b:1GB", ("/c", 5)])  # type: ignore[arg-type]
    assert budget.gpu == 24 * 10**9
    assert budget.ssd == ((Path("/a"), None), (Path("/b"), 10**9), (Path("/c"), 5))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("dram=1GB", "does not say gpu"),
        ("gpu=1GB, vram=2GB", "'vram' is not a tier"),
        ("gpu=1GB, gpu=2GB", "gpu is in the budget twice"),
        ("gpu=", "is not tier=size"),
        ("gpu=1GB,,dram=2GB", "is not tier=size"),
        ("gpu=lots", "gpu in the budget: 'lots' is not a size"),
        ("gpu=1GB,ssd=/a:big", "ssd /a in the budget: 'big'"),
        ("gpu=1GB,ssd=/a:1GB+/a:2GB", "/a is in the budget twice"),
        ("gpu=1GB,ssd=/a+", "empty SSD directory"),
    ],
)
def test_a_budget_that_cannot_be_read_says_where(text: str, words: str) -> None:
    with pytest.raises(BudgetError, match=words):
        Budget.parse(text)


MACHINE = Machine(
    gpu_bytes=24 * GIB,
    dram_free_bytes=100 * GIB,
    ssd_free_bytes=lambda path: {"/scratch": 1000, "/mnt/a": 500}[str(path)] * GIB,
    default_ssd_dir=Path("/scratch"),
)


def test_what_a_budget_leaves_out_is_what_the_machine_has_less_a_tenth() -> None:
    budget = Budget(gpu=10).resolve(MACHINE)
    assert budget.gpu == 10
    assert budget.dram == 90 * GIB
    assert budget.ssd == ((Path("/scratch"), 896 * GIB),)
    assert budget.capacities() == Capacities(10, 90 * GIB, 896 * GIB)


@pytest.mark.parametrize("more", [0, 1, 10**6, 500 * 10**6])
def test_what_comes_and_goes_on_a_machine_does_not_change_the_budget(more: int) -> None:
    machine = dataclasses.replace(
        MACHINE,
        dram_free_bytes=MACHINE.dram_free_bytes + more,
        ssd_free_bytes=lambda path: MACHINE.ssd_free_bytes(path) + more,
    )
    assert Budget(gpu=10).resolve(machine) == Budget(gpu=10).resolve(MACHINE)


def test_what_a_budget_says_is_kept_and_only_the_rest_filled_in() -> None:
    budget = Budget.parse("gpu=1GB,dram=500GB,ssd=2TB+/mnt/a").resolve(MACHINE)
    assert budget.dram == 500 * 10**9
    assert budget.ssd == ((Path("/scratch"), 2 * 10**12), (Path("/mnt/a"), 448 * GIB))


def test_a_machine_without_a_disk_has_no_ssd() -> None:
    diskless = Machine(0, 10 * GIB, lambda _: 0, None)
    assert Budget(gpu=1).resolve(diskless).ssd == ()
    with pytest.raises(BudgetError, match="no directory on a disk"):
        Budget.parse("gpu=1GB,ssd=2TB").resolve(diskless)


def test_a_small_machine_keeps_half_of_its_last_memory() -> None:
    small = Machine(0, 2 * GIB, lambda _: 0, None)
    assert Budget(gpu=1).resolve(small).dram == GIB


def test_an_incomplete_budget_has_no_capacities() -> None:
    with pytest.raises(BudgetError, match="resolve it first"):
        Budget(gpu=1).capacities()


def test_this_machine_completes_a_budget(tmp_path: Path) -> None:
    budget = Budget(gpu=10**9, ssd=((tmp_path, None),)).resolve()
    assert budget.dram is not None and budget.dram > 0
    assert budget.ssd_bytes > 0


def test_a_directory_that_does_not_exist_is_named(tmp_path: Path) -> None:
    with pytest.raises(BudgetError, match="cannot be used"):
        Budget(gpu=1, ssd=((tmp_path / "absent", None),)).resolve()


def test_a_budget_prints_as_something_that_can_be_read_again() -> None:
    text = "gpu=24.0 GB, dram=100.0 GB, ssd=/mnt/a:1.0 TB"
    assert str(Budget.parse(text)) == text
