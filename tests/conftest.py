"""What every test has around it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

if "PYTEST_XDIST_WORKER" in os.environ:  # the cores are taken by the other workers
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")


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
