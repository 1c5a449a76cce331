"""The examples run as they are, from another folder, for a few steps."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import lohan_fx

EXAMPLES = Path(__file__).parents[1] / "examples"
RUNS = {
    "quickstart.py": (["--steps", "3", "--batch", "2", "--seq", "32"], "largest difference"),
    "lora.py": (["--steps", "4", "--lowering", "aten"], "the saved adapter in plain PyTorch"),
    "trainer.py": (["--steps", "4", "--lowering", "aten"], "'Each tensor has a place, "),
}


def test_every_example_is_run_here() -> None:
    assert {path.name for path in EXAMPLES.glob("*.py")} == RUNS.keys()


@pytest.mark.parametrize("name", RUNS)
def test_an_example_runs(name: str, tmp_path: Path) -> None:
    options, words = RUNS[name]
    path = os.pathsep.join(
        [str(Path(lohan_fx.__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
    )
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / name), *options],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": path},
        timeout=500,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert words in done.stdout
    assert list(tmp_path.iterdir()) == []
