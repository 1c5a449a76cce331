"""Whatever the user gets wrong: one clear error, nothing left behind, and the values still there."""

from __future__ import annotations

import gc
import os
import re
import subprocess
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from loops import leaves_nothing
from torch import nn
from training import CASES, loss_of

import lohan_fx
from lohan_fx.errors import (
    BudgetError,
    CaptureError,
    InfeasiblePlan,
    LohanError,
    PlanMismatch,
    TrainingLoopError,
    TransferError,
)

MLP, LLAMA = CASES["mlp"], CASES["llama"]


def compiled(
    model: nn.Module, folder: Path, budget: str = "gpu=1GB, dram=1GB", **options: Any
) -> Any:
    if "ssd=" not in budget:
        budget += f", ssd={folder}:1GB"
    return lohan_fx.compile(model, budget, **({"lowering": "aten", "device": "cpu"} | options))


def train_one(model: Any, optimizer: Any, batch: Any) -> float:
    loss = loss_of(model(**batch))
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return loss.item()


def assert_values(model: nn.Module, reference: nn.Module) -> None:
    expected = reference.state_dict()
    state = model.state_dict()
    assert state.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(state[name], value), name


def refused(
    model: Any, batch: Any, folder: Path, error: type[Exception], words: str, reference: nn.Module
) -> Any:
    """The forward raises; nothing is left on disk, no file is open, no value is lost."""
    optimizer = lohan_fx.AdamW(model.parameters())
    with leaves_nothing(folder), pytest.raises(error, match=words):
        model(**batch)
    assert_values(model, reference)
    return optimizer


# ---- Budgets and directories ----


@pytest.mark.parametrize(
    ("budget", "least"),
    [
        ("gpu=100kB, dram=1GB", r"GPU: [\d.]+ kB at least, the budget has 100.00 kB; DRAM: enough"),
        (
            "gpu=500kB, dram=400kB",
            r"DRAM: [\d.]+ kB at least, the budget has 400.00 kB; SSD: enough",
        ),
        (
            "gpu=500kB, dram=500kB, ssd={}:200kB",
            r"SSD: [\d.]+ kB at least, the budget has 200.00 kB",
        ),
    ],
    ids=["gpu", "dram", "ssd"],
)
def test_a_budget_that_cannot_work_names_the_least_of_each_tier(
    budget: str, least: str, tmp_path: Path
) -> None:
    model = compiled(LLAMA.build(), tmp_path, budget.format(tmp_path))
    refused(model, LLAMA.batch(0), tmp_path, InfeasiblePlan, least, LLAMA.build())


def test_after_a_budget_too_small_for_one_batch_a_smaller_batch_trains(tmp_path: Path) -> None:
    model = compiled(LLAMA.build(), tmp_path, "gpu=330kB, dram=1GB", bucket_numel=3000)
    batch = LLAMA.batch(0)
    large = {name: value.repeat(8, 1) for name, value in batch.items()}
    optimizer = refused(model, large, tmp_path, InfeasiblePlan, "smaller batch", LLAMA.build())
    assert train_one(model, optimizer, batch) > 0
    model.close()


def test_an_unknown_unit_is_named(tmp_path: Path) -> None:
    with pytest.raises(BudgetError, match=r"'24 gigs' has an unknown unit 'gigs'; known are B, kB"):
        compiled(MLP.build(), tmp_path, "gpu=24 gigs")


def test_a_budget_without_gpu_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BudgetError, match="does not say gpu="):
        compiled(MLP.build(), tmp_path, "dram=1GB")


def test_a_missing_ssd_directory_is_named_before_anything_happens(tmp_path: Path) -> None:
    model = MLP.build()
    where = tmp_path / "not there"
    with leaves_nothing(tmp_path), pytest.raises(BudgetError, match="not there: no such directory"):
        compiled(model, tmp_path, f"gpu=1GB, ssd={where}:1GB")
    assert type(model) is type(MLP.build())  # and the model is the user's still
    compiled(model, tmp_path).close()


def test_a_file_in_place_of_the_ssd_directory_is_refused(tmp_path: Path) -> None:
    where = tmp_path / "file"
    where.write_text("the user's")
    with pytest.raises(BudgetError, match="file: is not a directory"):
        compiled(MLP.build(), tmp_path, f"gpu=1GB, ssd={where}:1GB")
    assert where.read_text() == "the user's"


def test_an_unwritable_ssd_directory_is_refused(tmp_path: Path) -> None:
    where = tmp_path
    if os.geteuid() == 0:
        where = Path("/proc")  # there, not even root may make files
    else:
        where.chmod(0o500)
    with pytest.raises(BudgetError, match="cannot make files there"):
        compiled(MLP.build(), tmp_path, f"gpu=1GB, dram=1GB, ssd={where}:1GB")


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Callable[[str], Path]]:
    """Mounts (or resizes) a memory file system of the given size; skips where that is not allowed."""
    where = tmp_path / "disk"
    mounted = False

    def mount(size: str) -> Path:
        nonlocal mounted
        where.mkdir(exist_ok=True)
        options = f"remount,size={size}" if mounted else f"size={size}"
        command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(where)]
        done = subprocess.run(command, capture_output=True, check=False)
        if done.returncode:
            pytest.skip("mounting a file system is not allowed here")
        mounted = True
        return where

    yield mount
    if mounted:
        gc.collect()
        subprocess.run(["umount", "--lazy", str(where)], check=True)


def test_a_disk_that_is_full_stops_before_the_first_step_and_frees_what_it_took(
    small_disk: Callable[[str], Path],
) -> None:
    disk = small_disk("200k")
    model = compiled(LLAMA.build(), disk, f"gpu=500kB, dram=620kB, ssd={disk}:100MB")
    words = "No space left on device"
    optimizer = refused(model, LLAMA.batch(0), disk, TransferError, words, LLAMA.build())
    status = os.statvfs(disk)
    assert status.f_bfree == status.f_blocks
    small_disk("20m")  # someone makes room
    assert train_one(model, optimizer, LLAMA.batch(0)) > 0
    model.close()


# ---- Models that cannot be captured ----


class Linear(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.inner = nn.Linear(4, 4)


class Prints(Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.inner(x)
        print("a line in forward")  # noqa: T201
        return y.sum()


class Branches(Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.inner(x)
        if y.sum() > 0:
            y = y * 2
        return y.sum()


class Listed(Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.inner(x)
        return y.sum() * len(y.tolist()) if y.tolist()[0][0] > 0 else y.sum()


@pytest.mark.parametrize(
    ("cls", "line"),
    [
        (Prints, 'print("a line in forward")'),
        (Branches, "if y.sum() > 0:"),
        (Listed, "return y.sum() * len(y.tolist()) if y.tolist()[0][0] > 0 else y.sum()"),
    ],
)
def test_a_graph_break_names_the_line_of_the_users_code(
    cls: type[Linear], line: str, tmp_path: Path
) -> None:
    source = Path(__file__).read_text().splitlines()
    number = next(i for i, text in enumerate(source, start=1) if text.strip().startswith(line))
    words = rf"{re.escape(__file__)}:{number} in forward: {re.escape(line)}"
    model = compiled(cls(), tmp_path)
    refused(model, {"x": torch.ones(2, 4)}, tmp_path, CaptureError, words, cls())


def test_an_item_in_forward_is_refused_or_exact(tmp_path: Path) -> None:
    class Scaled(Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = self.inner(x)
            return (y * y.sum().item()).sum()

    model, plain = compiled(Scaled(), tmp_path), Scaled()
    ours = lohan_fx.AdamW(model.parameters())
    theirs = torch.optim.AdamW(plain.parameters(), foreach=False)
    for step in range(2):
        x = torch.full((2, 4), 1.0 + step)
        try:
            loss = model(x)
        except CaptureError as error:
            assert "y.sum().item()" in str(error)
            return
        loss.backward()
        ours.step()
        expected = plain(x)
        theirs.zero_grad()
        expected.backward()
        theirs.step()
        torch.testing.assert_close(loss, expected)
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, plain.state_dict()[name])
    model.close()


class WithUnused(Linear):
    def __init__(self) -> None:
        super().__init__()
        self.unused = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x).sum()


def test_freezing_a_parameter_that_the_loss_does_not_depend_on_works(tmp_path: Path) -> None:
    inner = WithUnused()
    inner.unused.requires_grad_(False)
    model = compiled(inner, tmp_path)
    optimizer = lohan_fx.AdamW(model.parameters())
    train_one(model, optimizer, {"x": torch.ones(2, 4)})
    state, start = model.state_dict(), WithUnused().state_dict()
    assert torch.equal(state["unused.weight"], start["unused.weight"])
    assert not torch.equal(state["inner.weight"], start["inner.weight"])
    model.close()


def test_a_sparse_gradient_is_refused_by_its_parameters_name(tmp_path: Path) -> None:
    class Sparse(Linear):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(7, 4, sparse=True)

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            return self.inner(self.embed(ids)).square().mean()

    model = compiled(Sparse(), tmp_path)
    words = r"gradient of 'embed\.weight' is sparse"
    refused(model, {"ids": torch.tensor([1, 2])}, tmp_path, CaptureError, words, Sparse())


def test_an_input_on_another_device_is_named(tmp_path: Path) -> None:
    model = compiled(MLP.build(), tmp_path)
    batch = MLP.batch(0)
    wrong = batch | {"x": batch["x"].to("meta")}
    words = r"argument 'x' \(shape \(5, 7\)\) is on meta, the step runs on cpu; move it there"
    optimizer = refused(model, wrong, tmp_path, CaptureError, words, MLP.build())
    with pytest.raises(CaptureError, match=r"argument 2 \(shape \(5, 3\)\) is on meta"):
        model(batch["x"], batch["y"].to("meta"))
    assert train_one(model, optimizer, batch) > 0
    model.close()


def test_an_error_of_the_users_own_code_comes_through(tmp_path: Path) -> None:
    model = compiled(MLP.build(), tmp_path)
    optimizer = lohan_fx.AdamW(model.parameters())
    batch = MLP.batch(0)
    with leaves_nothing(tmp_path), pytest.raises(Exception, match=r"8|size|shape"):
        model(x=torch.randn(5, 8), y=batch["y"])
    assert train_one(model, optimizer, batch) > 0
    model.close()


# ---- Optimizers ----


def test_training_without_an_optimizer_is_refused_but_evaluation_is_not(tmp_path: Path) -> None:
    model = compiled(MLP.build(), tmp_path)
    with (
        leaves_nothing(tmp_path),
        pytest.raises(TrainingLoopError, match="no optimizer is attached"),
    ):
        model(**MLP.batch(0))
    with torch.no_grad():
        torch.testing.assert_close(model(**MLP.batch(0)), MLP.build()(**MLP.batch(0)))
    model.close()


def test_a_torch_optimizer_by_mistake_is_an_error_in_the_first_forward(tmp_path: Path) -> None:
    model = compiled(MLP.build(), tmp_path)
    optimizer = torch.optim.AdamW(model.parameters())
    with pytest.raises(TrainingLoopError, match=r"create lohan_fx\.AdamW\(model\.parameters\(\)"):
        model(**MLP.batch(0))
    optimizer.step()  # harmless: there are no gradients
    assert_values(model, MLP.build())
    model.close()


def test_an_optimizer_without_some_of_the_parameters_names_them(tmp_path: Path) -> None:
    model = compiled(MLP.build(), tmp_path)
    words = r"2 parameter\(s\) require a gradient but were not given.*head\.weight, head\.bias"
    with pytest.raises(TrainingLoopError, match=words):
        lohan_fx.AdamW(p for name, p in model.named_parameters() if "head" not in name)
    assert train_one(model, lohan_fx.AdamW(model.parameters()), MLP.batch(0)) > 0
    model.close()


def test_an_optimizer_of_a_plain_model_says_what_comes_first() -> None:
    with pytest.raises(LohanError, match=r"lohan_fx\.compile\(model, \.\.\.\) first"):
        lohan_fx.AdamW(MLP.build().parameters())


def test_one_optimizer_for_two_models_is_refused(tmp_path: Path) -> None:
    one, two = compiled(MLP.build(), tmp_path), compiled(MLP.build(), tmp_path)
    with pytest.raises(LohanError, match="belong to 2 compiled models"):
        lohan_fx.AdamW([*one.parameters(), *two.parameters()])
    one.close()
    two.close()


def test_a_second_optimizer_is_refused_while_the_first_is_alive(tmp_path: Path) -> None:
    model = compiled(MLP.build(), tmp_path)
    first = lohan_fx.AdamW(model.parameters())
    with pytest.raises(TrainingLoopError, match="already has an optimizer"):
        lohan_fx.AdamW(model.parameters())
    assert train_one(model, first, MLP.batch(0)) > 0
    model.close()


@pytest.mark.parametrize("overlap", ["backward", "naive"])
def test_clipping_with_updates_during_backward_is_refused_at_once(
    overlap: str, tmp_path: Path
) -> None:
    model = compiled(MLP.build(), tmp_path, overlap=overlap)
    with pytest.raises(LohanError, match=rf"max_grad_norm.*overlap='{overlap}'.*next-forward"):
        lohan_fx.AdamW(model.parameters(), max_grad_norm=1.0)
    assert train_one(model, lohan_fx.AdamW(model.parameters()), MLP.batch(0)) > 0
    model.close()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"lr": -1.0}, "lr is -1.0; it must not be negative"),
        ({"betas": (0.9, 1.0)}, "betas are"),
        ({"max_grad_norm": 0.0}, "max_grad_norm is 0.0"),
        ({"lr": float("nan")}, "lr is nan"),
    ],
)
def test_hyperparameters_out_of_range_are_refused(
    options: dict[str, Any], words: str, tmp_path: Path
) -> None:
    model = compiled(MLP.build(), tmp_path)
    with pytest.raises(ValueError, match=words):
        lohan_fx.AdamW(model.parameters(), **options)
    model.close()


# ---- Arguments of compile ----


def test_compiling_twice_is_refused(tmp_path: Path) -> None:
    model = compiled(MLP.build(), tmp_path)
    with pytest.raises(LohanError, match="compiled already"):
        compiled(model, tmp_path)
    model.close()


def test_two_models_that_share_a_parameter_are_refused_and_the_second_stays_plain(
    tmp_path: Path,
) -> None:
    first, second = MLP.build(), MLP.build()
    second.head.weight = first.head.weight  # type: ignore[union-attr]
    model = compiled(first, tmp_path)
    with pytest.raises(LohanError, match=r"'head\.weight' is already managed"):
        compiled(second, tmp_path)
    assert type(second) is type(MLP.build())
    assert second.head.bias.untyped_storage().nbytes() > 0  # type: ignore[union-attr]
    model.close()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"dtype": torch.int32}, r"dtype is torch\.int32; choose torch\.bfloat16"),
        ({"dtype": "bfloat16"}, "dtype is bfloat16; choose"),
        ({"policy": "magic"}, r"'magic'.*there are: .*greedy"),
        ({"overlap": "always"}, "overlap is 'always'; choose one of auto, backward"),
        ({"lowering": "c"}, "lowering is 'c'; choose one of inductor, aten"),
        ({"device": "meta"}, "device is 'meta'; lohan_fx runs on cuda and cpu"),
        (
            {"plan": "no/such/plan.json"},
            r"the plan no/such/plan\.json cannot be read: No such file",
        ),
    ],
)
def test_an_argument_out_of_range_says_what_is_allowed_and_leaves_the_model_alone(
    options: dict[str, Any], words: str, tmp_path: Path
) -> None:
    model = MLP.build()
    with leaves_nothing(tmp_path), pytest.raises(LohanError, match=words):
        compiled(model, tmp_path, **options)
    assert type(model) is type(MLP.build())
    assert_values(model, MLP.build())


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"{", "is not JSON"),
        (b"\xff\xfe\x00", "can't decode"),
        (b"{}", "has no schema number"),
        (b'{"schema": 99}', "has schema 99, this version reads"),
        (b"[]", "has no schema number"),
    ],
)
def test_a_damaged_plan_file_is_refused_by_its_name(
    content: bytes, words: str, tmp_path: Path
) -> None:
    file = tmp_path / "plan.json"
    file.write_bytes(content)
    with pytest.raises(LohanError, match=rf"plan\.json: .*{words}"):
        compiled(MLP.build(), tmp_path, plan=file)


def plan_of(case: Any, folder: Path) -> lohan_fx.Plan:
    model = compiled(case.build(), folder)
    optimizer = lohan_fx.AdamW(model.parameters())
    train_one(model, optimizer, case.batch(0))
    plan = model.plan
    model.close()
    return plan


def test_a_plan_is_replayed_and_one_for_another_model_or_budget_is_refused(tmp_path: Path) -> None:
    plan = plan_of(MLP, tmp_path)
    again = compiled(MLP.build(), tmp_path, plan=plan)
    optimizer = lohan_fx.AdamW(again.parameters())
    train_one(again, optimizer, MLP.batch(0))
    assert again.plan.solution == plan.solution
    again.close()

    other = compiled(LLAMA.build(), tmp_path, plan=plan)
    words = r"made for another graph \(OddMlp\): \d+ stages instead of \d+"
    refused(other, LLAMA.batch(0), tmp_path, PlanMismatch, words, LLAMA.build())

    tight = compiled(MLP.build(), tmp_path, "gpu=10kB, dram=1GB", plan=plan)
    words = "cannot run within gpu=10.0 kB.*plan again"
    refused(tight, MLP.batch(0), tmp_path, PlanMismatch, words, MLP.build())


# ---- Closing ----


def test_a_closed_model_says_so(tmp_path: Path) -> None:
    model = compiled(MLP.build(), tmp_path)
    optimizer = lohan_fx.AdamW(model.parameters())
    train_one(model, optimizer, MLP.batch(0))
    model.close()
    model.close()
    parameter = next(model.parameters())
    for use in (
        lambda: model(**MLP.batch(0)),
        model.state_dict,
        lambda: model.load_state_dict(MLP.build().state_dict()),
        optimizer.step,
        optimizer.state_dict,
        lambda: parameter.sum(),
        lambda: lohan_fx.AdamW(model.parameters()),
    ):
        with pytest.raises(LohanError, match="closed"):
            use()
    optimizer.zero_grad()


def test_a_dropped_model_gives_back_files_and_memory(tmp_path: Path) -> None:
    with leaves_nothing(tmp_path):
        model = compiled(LLAMA.build(), tmp_path, "gpu=400kB, dram=700kB", bucket_numel=3000)
        optimizer = lohan_fx.AdamW(model.parameters())
        train_one(model, optimizer, LLAMA.batch(0))
        runtime = weakref.ref(model._lohan.runtime)
        del model, optimizer
        gc.collect()
        assert runtime() is None
