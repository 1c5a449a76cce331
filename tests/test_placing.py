"""Values move into their tiers while the first step is lowered, and come back where it is not reached."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from halted import HaltedPlacing
from loops import TIGHT, Tiny, assert_same, compiled, leaves_nothing, step, steps, tokens
from safetensors.torch import save_file

import lohan_fx
from lohan_fx.compiler import capture
from lohan_fx.placing import Placing
from lohan_fx.program import ParamSpec
from lohan_fx.runtime.buckets import BucketHome
from lohan_fx.runtime.store import BucketStore


def started(folder: Path) -> tuple[Any, Any]:
    model = compiled(Tiny(), folder, TIGHT, policy="greedy")
    return model, lohan_fx.AdamW(model.parameters(), lr=1e-2)


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[float], dict[str, Any]]:
    """Losses of two steps that nothing disturbs, and the weights after them."""
    model, optimizer = started(tmp_path_factory.mktemp("expected"))
    losses = steps(model, optimizer, [tokens(0), tokens(1)])
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    model.close()
    return losses, weights


@pytest.fixture
def in_lowering(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[str], None]], None]:
    """Have something called with "forward" and "backward" before each is lowered, for one capture."""
    lower = capture.lower

    def install(action: Callable[[str], None]) -> None:
        parts = ["backward", "forward"]

        def wrapped(*args: Any) -> Any:
            if parts:
                part = parts.pop()
                try:
                    action(part)
                except BaseException:
                    parts.clear()
                    raise
            return lower(*args)

        monkeypatch.setattr(capture, "lower", wrapped)

    return install


@pytest.fixture
def placed_buckets(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The thread that placed each bucket, by name."""
    found: list[str] = []
    fill = BucketStore._adopt

    def watched(self: BucketStore, *args: Any) -> None:
        *rest, progress = args

        def counted(nbytes: int) -> None:
            found.append(threading.current_thread().name)
            progress(nbytes)

        fill(self, *rest, counted)

    monkeypatch.setattr(BucketStore, "_adopt", watched)
    return found


def test_values_are_placed_beside_lowering_by_a_thread_that_ends_before_the_step(
    in_lowering: Any, placed_buckets: list[str], tmp_path: Path
) -> None:
    model, optimizer = started(tmp_path)

    def wait_for_all(part: str) -> None:
        if part == "forward":
            model._lohan.state._placing[0].wait()

    in_lowering(wait_for_all)
    before = set(threading.enumerate())
    start = time.perf_counter()
    step(model, optimizer, tokens(0))
    took = time.perf_counter() - start
    assert len(placed_buckets) == len(model._lohan.buckets) > 3
    assert set(placed_buckets) == {"lohan_fx placing"}
    assert not any(t.name == "lohan_fx placing" for t in set(threading.enumerate()) - before)
    seconds = model._lohan.phases.seconds
    assert seconds["place, beside compiling"] > 0
    assert "await placing" in seconds
    assert "place, beside compiling" in model.report()
    inside = ("plan", "split", "weave", "lower forward", "lower backward", "await placing")
    assert seconds.keys() > {*inside, "Dynamo and AOTAutograd"}
    assert 0 < sum(s for what, s in seconds.items() if "beside" not in what) <= took
    model.close()


@pytest.mark.parametrize("when", ["under way", "complete"])
@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_a_capture_that_ends_in_lowering_leaves_every_value_as_it_was(
    error: type[BaseException],
    when: str,
    expected: tuple[list[float], dict[str, Any]],
    in_lowering: Any,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    model, optimizer = started(tmp_path)
    with monkeypatch.context() as patch:
        halted = HaltedPlacing(patch, when)

        def fail(part: str) -> None:
            if part == "backward":
                halted.reached(model)
                raise error("in the middle of lowering")

        in_lowering(fail)
        with leaves_nothing(tmp_path), pytest.raises(error, match="middle of lowering"):
            model(**tokens(0))
    assert model._lohan.runtime is None
    assert_same(model, Tiny(), exact=True)
    losses, weights = expected
    assert steps(model, optimizer, [tokens(0), tokens(1)]) == losses
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
    model.close()


def test_an_interrupt_while_the_first_one_is_undone_loses_nothing_either(
    in_lowering: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    model, optimizer = started(tmp_path)
    cancel, calls = Placing.cancel, iter([True])

    def interrupted(self: Placing) -> bool:
        if next(calls, False):
            raise KeyboardInterrupt("again")
        return cancel(self)

    def interrupt(part: str) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Placing, "cancel", interrupted)
    in_lowering(interrupt)
    with pytest.raises(KeyboardInterrupt, match="again"):
        model(**tokens(0))
    assert_same(model, Tiny(), exact=True)
    assert step(model, optimizer, tokens(0)) > 0
    model.close()


def test_an_interrupt_while_values_come_back_loses_none(
    in_lowering: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    model, optimizer = started(tmp_path)
    load, calls = BucketHome.load, iter([False, True])

    def interrupted(self: BucketHome, spec: ParamSpec, section: str) -> torch.Tensor:
        if next(calls, False):
            raise KeyboardInterrupt("again")
        return load(self, spec, section)

    def fail(part: str) -> None:
        model._lohan.state._placing[0].wait()
        raise RuntimeError("in lowering")

    monkeypatch.setattr(BucketHome, "load", interrupted)
    in_lowering(fail)
    with pytest.raises(KeyboardInterrupt, match="again"):
        model(**tokens(0))
    assert_same(model, Tiny(), exact=True)
    assert step(model, optimizer, tokens(0)) > 0
    model.close()


def test_values_that_come_back_take_no_more_memory_than_they_did(
    in_lowering: Any, tmp_path: Path
) -> None:
    disk, file = tmp_path / "disk", tmp_path / "weights.safetensors"
    disk.mkdir()
    save_file(Tiny().state_dict(), file)
    from_file = compiled(Tiny(), disk, TIGHT, dtype=torch.bfloat16, weights=file)
    in_16_bit = compiled(Tiny().bfloat16(), disk, TIGHT, dtype=torch.bfloat16)
    for model in (from_file, in_16_bit):

        def fail(part: str, model: Any = model) -> None:
            model._lohan.state._placing[0].wait()
            raise RuntimeError("in lowering")

        given = dict(model._lohan.params.values)
        optimizer = lohan_fx.AdamW(model.parameters())
        in_lowering(fail)
        with pytest.raises(RuntimeError, match="in lowering"):
            model(**tokens(0))
        values = model._lohan.params.values
        assert values.keys() == given.keys()
        if model is from_file:
            assert all(values[pid] is value for pid, value in given.items())
        else:
            assert {value.dtype for value in values.values()} == {torch.bfloat16}
            assert_same(model, Tiny().bfloat16(), exact=True)
        del optimizer
        model.close()


def test_a_failed_step_costs_parameters_that_it_did_not_use_no_bits(
    in_lowering: Any, tmp_path: Path
) -> None:
    model = Tiny()
    model.spare = torch.nn.Linear(3, 3)
    expected = model.spare.weight.detach().clone()
    ours = compiled(model, tmp_path, TIGHT, dtype=torch.bfloat16)
    optimizer = lohan_fx.AdamW(ours.parameters())

    def fail(part: str) -> None:
        ours._lohan.state._placing[0].wait()
        raise RuntimeError("in lowering")

    in_lowering(fail)
    with pytest.raises(RuntimeError, match="in lowering"):
        ours(**tokens(0))
    params = ours._lohan.params
    assert torch.equal(params.values[params.aliases["spare.weight"]], expected)
    del optimizer
    ours.close()


def test_moments_set_before_the_first_step_come_back_with_the_values(
    in_lowering: Any, tmp_path: Path
) -> None:
    source, source_optimizer = started(tmp_path)
    steps(source, source_optimizer, [tokens(0), tokens(1)])
    weights, state = source.state_dict(), source_optimizer.state_dict()
    model, optimizer = started(tmp_path)
    model.load_state_dict(weights)
    optimizer.load_state_dict(state)

    def fail(part: str) -> None:
        raise RuntimeError("in lowering")

    in_lowering(fail)
    with pytest.raises(RuntimeError, match="in lowering"):
        model(**tokens(2))
    restored = optimizer.state_dict()["state"]
    assert restored.keys() == state["state"].keys()
    for pid, values in state["state"].items():
        assert all(torch.equal(values[name], restored[pid][name]) for name in values)
    assert steps(model, optimizer, [tokens(2)]) == steps(source, source_optimizer, [tokens(2)])
    assert_same(model, source, exact=True)
    model.close()
    source.close()
