"""A short soak: nothing grows while a small model trains over all tiers (benchmarks/soak.py)."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest
from loops import new_garbage_only


@pytest.fixture(scope="module")
def soak() -> ModuleType:
    path = Path(__file__).parents[1] / "benchmarks" / "soak.py"
    spec = importlib.util.spec_from_file_location("soak", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["soak"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("overlap", ["backward", "speculative"])
def test_nothing_grows_over_two_hundred_steps(
    overlap: str, soak: ModuleType, tmp_path: Path
) -> None:
    with new_garbage_only():
        samples = soak.soak(200, tmp_path, samples=10, overlap=overlap)
    assert soak.growth(samples[3:]) == dict.fromkeys(soak.growth(samples), 0)
    assert samples[-1].ssd_read > samples[0].ssd_read > 0
    assert all(getattr(samples[-1], tier) > 0 for tier in ("gpu", "dram", "ssd"))
    assert samples[-1].loss < samples[0].loss
    assert list((tmp_path / "disk").iterdir()) == []


def test_growth_is_seen(soak: ModuleType) -> None:
    values = dict.fromkeys(soak.Sample.__dataclass_fields__, 1)
    flat = [soak.Sample(**values) for _ in range(6)]
    leak = [soak.Sample(**{**values, "open_files": n, "rss": n << 22}) for n in range(6)]
    assert not any(soak.growth(flat).values())
    assert {name for name, grown in soak.growth(leak).items() if grown} == {"open_files", "rss"}
