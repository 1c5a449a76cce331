"""Whatever the plan, the numbers are those of plain training.

Over plain ATen regions all plans of a model agree bit for bit. With eager PyTorch they agree within
rounding: in fp32 the losses to 1e-6 relative; in bf16 to 1e-2 (a step of bf16 is 2**-8, and an
update's sign may flip where a gradient is all rounding).
"""

from __future__ import annotations

import dataclasses
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch
from training import CASES, DEVICE, Case, RandomPolicy, Run, llama, train_lohan, train_plain

TOLERANCE = {torch.float32: (1e-5, 1e-5), torch.bfloat16: (1e-2, 2.5e-3)}
DTYPES = [pytest.param(torch.float32, id="fp32"), pytest.param(torch.bfloat16, id="bf16")]


@cache
def all_on_the_gpu(name: str, dtype: torch.dtype) -> Run:
    with TemporaryDirectory() as folder:
        return train_lohan(CASES[name], dtype, Path(folder))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", CASES)
def test_all_on_the_gpu_agrees_with_plain_pytorch(name: str, dtype: torch.dtype) -> None:
    plain = train_plain(CASES[name], dtype)
    loss, weight = TOLERANCE[dtype]
    all_on_the_gpu(name, dtype).assert_close(plain, loss, weight)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", CASES)
def test_random_plans_are_bit_equal_to_all_on_the_gpu(
    name: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    """To each other on a real one, whose Adam rounds otherwise than the CPU's."""
    first = 2 * (list(CASES).index(name) + len(CASES) * (dtype is torch.float32))  # no seed twice
    plan = train_lohan(CASES[name], dtype, tmp_path, policy=RandomPolicy(first))
    if DEVICE.type == "cpu":
        plan.assert_equal(all_on_the_gpu(name, dtype))
    else:
        train_lohan(CASES[name], dtype, tmp_path, policy=RandomPolicy(first + 1)).assert_equal(plan)


@pytest.mark.parametrize("name", ["llama", "mlp"])
def test_updates_on_the_gpu_agree_within_rounding(name: str, tmp_path: Path) -> None:
    reference = train_lohan(CASES[name], torch.bfloat16, tmp_path, policy=RandomPolicy(0))
    other = train_lohan(
        CASES[name], torch.bfloat16, tmp_path, policy=RandomPolicy(5, cpu_adam=False)
    )
    other.assert_close(reference, *TOLERANCE[torch.bfloat16])


# Every region is compiled by a C++ compiler, so one layer has to do.
ONE_LAYER = dataclasses.replace(CASES["llama"], build=lambda: llama(layers=1))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("case", "dtype"),
    [
        pytest.param(CASES["mlp"], torch.float32, id="mlp"),
        pytest.param(ONE_LAYER, torch.bfloat16, id="llama"),
    ],
)
def test_inductor_agrees_with_plain_aten_within_rounding(
    case: Case, dtype: torch.dtype, tmp_path: Path
) -> None:
    aten = train_lohan(case, dtype, tmp_path, policy=RandomPolicy(1))
    fused = train_lohan(case, dtype, tmp_path, policy=RandomPolicy(2), lowering="inductor")
    fused.assert_close(aten, *TOLERANCE[dtype])
