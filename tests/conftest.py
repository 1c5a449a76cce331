"""What every test has around it."""

from __future__ import annotations

import gc
import itertools
import os
from collections.abc import Generator, Iterator
from pathlib import Path

import pytest

if "PYTEST_XDIST_WORKER" in os.environ:  # the cores are taken by the other workers
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, object, object]:
    """No garbage collection while modules are imported: millions of objects come, and all stay."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.freeze()
        gc.unfreeze()  # into the oldest generation, which is seldom looked through
        gc.enable()


_TESTS_DONE = itertools.count(1)


def pytest_runtest_teardown() -> None:
    """Traced steps leave cycles in the oldest generation: over a whole run, gigabytes."""
    if next(_TESTS_DONE) % 100 == 0:
        gc.collect()


@pytest.fixture(autouse=True, scope="session")
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Measurements of this machine that somebody made must not change what tests see."""
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LOHAN_FX_CACHE", str(folder))
        yield folder


@pytest.fixture(params=["at once", "late"])
def copies(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Copies of the CPU device happen at once, or as late as they may."""
    if request.param == "late":
        from late_device import LateDevice  # not before the threads above are settled

        monkeypatch.setattr("lohan_fx.runtime.runtime.open_device", lambda device: LateDevice())
