"""`import lohan_fx` is light, and its public surface is what it says."""

from __future__ import annotations

import subprocess
import sys

import pytest

import lohan_fx


def test_importing_the_package_loads_neither_torch_nor_the_native_part() -> None:
    code = (
        "import sys, lohan_fx, lohan_fx.planner, lohan_fx.plan, lohan_fx.hardware\n"
        "heavy = {'torch', 'ortools', 'transformers', 'lohan_fx._native'} & set(sys.modules)\n"
        "sys.exit(f'loaded {heavy}' if heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_every_public_name_exists_and_the_list_is_sorted() -> None:
    assert lohan_fx.__all__ == sorted(lohan_fx.__all__)
    for name in lohan_fx.__all__:
        assert getattr(lohan_fx, name) is not None


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="nonsense"):
        _ = lohan_fx.nonsense
