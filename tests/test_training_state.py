"""Saving and loading: state goes out and comes back without losing a bit."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest
import torch
from loops import (
    ROOMY,
    TIGHT,
    Tiny,
    assert_losses,
    assert_same,
    compiled,
    plain_adamw,
    step,
    steps,
    tokens,
)
from training import CASES

import lohan_fx
from lohan_fx.errors import LohanError

MLP = CASES["mlp"]


# ---- State ----


# Every two of the three together.
@pytest.mark.parametrize(
    ("dtype", "placed", "order"),
    [
        (torch.float32, False, "model first"),
        (torch.float32, True, "optimizer first"),
        (torch.bfloat16, False, "optimizer first"),
        (torch.bfloat16, True, "model first"),
    ],
)
def test_training_resumes_bit_equal_under_another_budget(
    dtype: torch.dtype, placed: bool, order: str, tmp_path: Path
) -> None:
    batches = [tokens(index) for index in range(4)]
    model = compiled(Tiny(), tmp_path, TIGHT, dtype=dtype, policy="greedy")
    optimizer = lohan_fx.AdamW(model.parameters(), lr=1e-2)
    steps(model, optimizer, batches[:2])
    saved = pickle.loads(pickle.dumps((model.state_dict(), optimizer.state_dict())))
    rest = steps(model, optimizer, batches[2:])

    torch.manual_seed(1)
    fresh = compiled(Tiny(), tmp_path, ROOMY, dtype=dtype)
    resumed = lohan_fx.AdamW(fresh.parameters(), lr=1.0)
    if placed:
        resumed.param_groups[0]["lr"] = 1e-3
        step(fresh, resumed, batches[3])
    if order == "model first":
        fresh.load_state_dict(saved[0])
        resumed.load_state_dict(saved[1])
    else:
        resumed.load_state_dict(saved[1])
        fresh.load_state_dict(saved[0])
    assert resumed.param_groups[0]["lr"] == 1e-2
    assert steps(fresh, resumed, batches[2:]) == rest
    assert_same(fresh, model, exact=True)
    ours, theirs = optimizer.state_dict(), resumed.state_dict()
    for index, state in ours["state"].items():
        for name, value in state.items():
            assert torch.equal(value, theirs["state"][index][name]), name
    model.close()
    fresh.close()


def test_optimizer_state_goes_to_and_comes_from_torch(tmp_path: Path) -> None:
    ours, theirs = compiled(MLP.build(), tmp_path), MLP.build()
    optimizer = lohan_fx.AdamW(ours.parameters())
    reference = plain_adamw(theirs)
    batches = [MLP.batch(index) for index in range(4)]
    steps(theirs, reference, batches[:2])
    ours.load_state_dict(theirs.state_dict())
    optimizer.load_state_dict(reference.state_dict())
    steps(ours, optimizer, batches[2:3])
    theirs.load_state_dict(ours.state_dict())
    reference.load_state_dict(optimizer.state_dict())
    assert_losses(steps(ours, optimizer, batches[3:]), steps(theirs, reference, batches[3:]))
    assert_same(ours, theirs)
    ours.close()


def test_state_that_does_not_match_is_refused_and_changes_nothing(tmp_path: Path) -> None:
    model = compiled(MLP.build(), tmp_path)
    optimizer = lohan_fx.AdamW(model.parameters())
    state = MLP.build().state_dict()
    with pytest.raises(RuntimeError, match=r"missing: head\.bias"):
        model.load_state_dict({name: v for name, v in state.items() if name != "head.bias"})
    with pytest.raises(RuntimeError, match=r"head\.bias: \(4,\) for \(3,\)"):
        model.load_state_dict(state | {"head.bias": torch.zeros(4)})
    with pytest.raises(RuntimeError, match=r"unexpected \['other'\]"):
        model.load_state_dict(state | {"other": torch.zeros(4)})
    optimizer_state = optimizer.state_dict()
    with pytest.raises(ValueError, match="groups of"):
        optimizer.load_state_dict({"state": {}, "param_groups": []})
    wrong = {"step": torch.tensor(1.0), "exp_avg": torch.zeros(2), "exp_avg_sq": torch.zeros(2)}
    with pytest.raises(LohanError, match=r"exp_avg of scale.*\(2,\).*\(1,\)"):
        optimizer.load_state_dict(optimizer_state | {"state": {0: wrong}})
    assert_same(model, MLP.build(), exact=True)
    assert step(model, optimizer, MLP.batch(0)) > 0
    model.close()


def test_loading_part_of_a_state_keeps_the_rest(tmp_path: Path) -> None:
    model = compiled(MLP.build(), tmp_path)
    result = model.load_state_dict({"head.bias": torch.ones(3)}, strict=False)
    assert "head.weight" in result.missing_keys
    assert "head.bias" not in result.missing_keys
    state = model.state_dict()
    assert torch.equal(state["head.bias"], torch.ones(3))
    assert torch.equal(state["head.weight"], MLP.build().state_dict()["head.weight"])
    model.close()


def test_a_state_dict_is_a_copy(tmp_path: Path) -> None:
    model = compiled(MLP.build(), tmp_path)
    model.state_dict()["head.bias"].fill_(7.0)
    assert_same(model, MLP.build(), exact=True)
    model.close()
