"""A training that was run before begins to place values before it is traced, whatever the files say."""

from __future__ import annotations

import json
import logging
import shutil
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from halted import HaltedPlacing
from loops import ROOMY, TIGHT, Tiny, assert_same, compiled, leaves_nothing, step, steps, tokens
from safetensors.torch import save_file
from torch import nn
from training import RandomPolicy

import lohan_fx
from lohan_fx import known_placings
from lohan_fx.compiler import op_seconds
from lohan_fx.compiler.capture import Backend
from lohan_fx.placing import Placing
from lohan_fx.runtime.buckets import BucketHome

Result = tuple[list[float], dict[str, torch.Tensor], dict[int, Any], Any]


@pytest.fixture(scope="module")
def disk(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("disk")


@pytest.fixture(autouse=True)
def folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setenv("LOHAN_FX_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(known_placings, "WORTH_S", 0.0)
    return tmp_path / "cache" / "placings"


@pytest.fixture(scope="module")
def whole_run(disk: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Result, Path]:
    """A run that found no file, and the cache that it left."""
    cache = tmp_path_factory.mktemp("known")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LOHAN_FX_CACHE", str(cache))
        patch.setattr(known_placings, "WORTH_S", 0.0)
        return run(disk), cache


@dataclass
class Before:
    """A run that was made before: its result, its file and what that says."""

    result: Result
    file: Path
    text: str

    def change(self, how: Callable[[dict[str, Any]], None]) -> None:
        content = json.loads(self.text)
        how(content)
        self.file.write_text(json.dumps(content))


@pytest.fixture
def before(whole_run: tuple[Result, Path], folder: Path) -> Before:
    result, cache = whole_run
    shutil.copytree(cache, folder.parent)
    (file,) = folder.iterdir()
    return Before(result, file, file.read_text())


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Inductor's gradient of an embedding adds in the order in which threads come."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@dataclass
class Seen:
    """What happened, in order: "placing" begins, a step is "traced", values are "taken back".

    `meanwhile` is called with a step about to be traced through autograd.
    """

    events: list[str] = field(default_factory=list)
    meanwhile: Callable[[], None] = lambda: None

    def take(self) -> list[str]:
        events, self.events = self.events, []
        return events


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> Seen:
    found = Seen()

    def noted(where: Any, name: str, event: str) -> None:
        real = getattr(where, name)

        def call(*args: Any) -> Any:
            found.events.append(event)
            if event == "traced":
                found.meanwhile()
            return real(*args)

        monkeypatch.setattr(where, name, call)

    noted(Placing, "__init__", "placing")
    noted(Placing, "cancel", "taken back")
    noted(Backend, "__call__", "traced")
    return found


AHEAD = ["placing", "traced"]
AS_EVER = ["traced", "placing"]
UNDONE = ["placing", "traced", "taken back", "placing"]


def started(disk: Path, model: nn.Module | None = None, **options: Any) -> tuple[Any, Any]:
    torch._dynamo.reset()
    clip = options.pop("max_grad_norm", None)
    options = {"budget": TIGHT, "dtype": torch.bfloat16, "policy": "greedy"} | options
    ours = compiled(Tiny() if model is None else model, disk, **options)
    return ours, lohan_fx.AdamW(ours.parameters(), lr=1e-2, max_grad_norm=clip)


def run(disk: Path, model: nn.Module | None = None, **options: Any) -> Result:
    """Two steps: losses, the weights, the optimizer's state, where all buckets are."""
    ours, optimizer = started(disk, model, **options)
    losses = steps(ours, optimizer, [tokens(0), tokens(1)])
    peaks, budget = ours._lohan.stats().peak_bytes, ours._lohan.settings.capacities
    assert peaks["gpu"] <= budget.gpu_bytes and peaks["dram"] <= budget.dram_bytes
    weights, state = ours.state_dict(), optimizer.state_dict()["state"]
    places = ours._lohan.captured[-1].placements
    phases = ours._lohan.phases.seconds
    assert {"await placing", "place, beside compiling"} <= phases.keys()
    ours.close()
    return losses, weights, state, places


def assert_same_run(one: Result, other: Result) -> None:
    assert one[0] == other[0]
    assert all(torch.equal(value, other[1][name]) for name, value in one[1].items())
    for pid, state in one[2].items():
        assert all(torch.equal(value, other[2][pid][name]) for name, value in state.items())
    assert one[3] == other[3]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"dtype": torch.float32, "lowering": "inductor"},
        {"policy": "optimal", "max_grad_norm": 0.5, "budget": "gpu=200kB, dram=900kB"},
        {"pin": {"head.*": "dram"}, "budget": "gpu=300kB, dram=500kB"},
    ],
    ids=["all tiers", "float32", "clipping", "pins"],
)
def test_a_second_run_places_before_it_is_traced_and_has_the_same_numbers(
    options: dict[str, Any], one_thread: None, seen: Seen, folder: Path, disk: Path
) -> None:
    first = run(disk, **options)
    assert seen.take() == AS_EVER
    (file,) = folder.iterdir()
    content = file.read_bytes()
    again = run(disk, **options)
    assert seen.take() == AHEAD
    assert_same_run(again, first)
    assert [path.read_bytes() for path in folder.iterdir()] == [content]


def unused() -> nn.Module:
    model = Tiny()
    model.spare = nn.Linear(3, 3)
    model.norm = nn.LayerNorm(4).requires_grad_(False)
    return model


def test_parameters_without_a_gradient_are_known_as_such(seen: Seen, disk: Path) -> None:
    first = run(disk, unused())
    assert seen.take() == AS_EVER
    again = run(disk, unused())
    assert seen.take() == AHEAD
    assert_same_run(again, first)


def other_places(content: dict[str, Any]) -> None:
    places = [bucket["place"] for bucket in content["buckets"]]
    next(place for place in places if place["state"] == "dram")["state"] = "ssd"


def more_places_than_there_are(content: dict[str, Any]) -> None:
    for bucket in content["buckets"]:
        bucket["place"] |= {"weight": "gpu", "state": "gpu"}


def other_buckets(content: dict[str, Any]) -> None:
    first, second, *rest = content["buckets"]
    first["params"] += second["params"]
    content["buckets"] = [first, *rest]


def other_order(content: dict[str, Any]) -> None:
    content["buckets"].reverse()


def other_windows(content: dict[str, Any]) -> None:
    content["options"]["grad_buffers"] += 1


def unknown_mode(content: dict[str, Any]) -> None:
    content["options"]["overlap"] = "sometimes"


def frozen(content: dict[str, Any]) -> None:
    content["buckets"][0]["trainable"] = False


def join() -> None:
    for thread in threading.enumerate():
        if thread.name == "lohan_fx placing":
            thread.join()


@pytest.mark.parametrize(
    "change",
    [
        other_places,
        more_places_than_there_are,
        other_buckets,
        other_order,
        other_windows,
        frozen,
        unknown_mode,
    ],
)
def test_a_file_of_another_placing_changes_nothing(
    change: Callable[[dict[str, Any]], None],
    before: Before,
    seen: Seen,
    disk: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    before.change(change)
    if change is not other_windows:  # which is taken back in whatever state it is
        seen.meanwhile = join
    with caplog.at_level(logging.INFO):
        again = run(disk)
    assert seen.take() == (AS_EVER if change is unknown_mode else UNDONE)
    assert "not placed as in the last run" in caplog.text
    assert_same_run(again, before.result)
    assert before.file.read_text() == before.text
    assert list(disk.iterdir()) == []


def cut(text: str) -> str:
    return text[: len(text) // 2]


def a_list(text: str) -> str:
    return "[]"


def a_parameter_twice(text: str) -> str:
    content = json.loads(text)
    content["buckets"][0]["params"] = content["buckets"][1]["params"]
    return json.dumps(content)


def large(text: str) -> str:
    return text + " " * known_placings.MAX_BYTES


@pytest.mark.parametrize("damage", [cut, a_list, a_parameter_twice, large])
def test_a_damaged_file_is_told_of_ignored_and_replaced(
    damage: Callable[[str], str],
    before: Before,
    seen: Seen,
    disk: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    before.file.write_text(damage(before.text))
    with caplog.at_level(logging.WARNING):
        assert_same_run(run(disk), before.result)
    assert f"{before.file} is not used" in caplog.text
    assert seen.take() == AS_EVER
    assert before.file.read_text() == before.text


@pytest.mark.parametrize(
    "changed",
    [
        {"budget": "gpu=200kB, dram=300kB"},
        {"dtype": torch.float32},
        {"policy": "optimal"},
        {"overlap": "next-forward"},
        {"max_grad_norm": 1.0, "budget": TIGHT},
        {"pin": {"head.*": "gpu"}},
        {"batch": 3},
        {"model": "frozen"},
    ],
    ids=lambda changed: next(iter(changed)),
)
def test_what_is_known_to_be_another_training_does_not_look_there(
    changed: dict[str, Any], before: Before, seen: Seen, folder: Path, disk: Path
) -> None:
    batch = changed.pop("batch", 4)
    model = Tiny()
    if changed.pop("model", ""):
        model.embed.requires_grad_(False)
    ours, optimizer = started(disk, model, **changed)
    step(ours, optimizer, tokens(0, batch))
    ours.close()
    assert seen.take() == AS_EVER
    assert len(list(folder.iterdir())) == 2
    assert before.file.read_text() == before.text


def test_nothing_is_kept_where_it_would_not_help(
    folder: Path, disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(disk, policy=RandomPolicy(1), budget=ROOMY)  # what it will do next time is not known
    lohan_fx.make_plan(Tiny(), ROOMY, tokens(0))
    ours, optimizer = started(disk)
    with torch.no_grad():
        ours(**tokens(0))  # a forward alone places otherwise
    step(ours, optimizer, tokens(0))
    ours.close()
    monkeypatch.setattr(known_placings, "WORTH_S", 1000.0)
    run(disk)
    assert not folder.exists()


def test_evaluation_first_places_as_ever(before: Before, seen: Seen, disk: Path) -> None:
    ours, optimizer = started(disk)
    with torch.no_grad():
        ours(**tokens(0))
    step(ours, optimizer, tokens(0))
    assert seen.take() == ["traced", "placing", "traced"]
    ours.close()


@pytest.mark.parametrize("when", ["under way", "complete"])
@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_a_step_that_cannot_be_traced_leaves_every_value_as_it_was(
    error: type[BaseException],
    when: str,
    before: Before,
    seen: Seen,
    disk: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    first = before.result
    ours, optimizer = started(disk)
    with monkeypatch.context() as patch:
        halted = HaltedPlacing(patch, when)

        def fail() -> None:
            halted.reached(ours)
            raise error("while tracing")

        patch.setattr(seen, "meanwhile", fail)
        with leaves_nothing(disk), pytest.raises(error, match="while tracing"):
            ours(**tokens(0))
    assert ours._lohan.runtime is None
    assert_same(ours, Tiny().bfloat16(), exact=True)
    assert steps(ours, optimizer, [tokens(0), tokens(1)]) == first[0]
    assert all(torch.equal(value, first[1][name]) for name, value in ours.state_dict().items())
    ours.close()


def test_interrupts_while_another_placing_is_undone_lose_nothing(
    before: Before, seen: Seen, disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = before.result
    before.change(other_places)
    ours, optimizer = started(disk)
    load, calls = BucketHome.load, iter([False, False, True])

    def interrupted(self: BucketHome, *args: Any) -> torch.Tensor:
        if next(calls, False):
            raise KeyboardInterrupt("taking back")
        return load(self, *args)

    monkeypatch.setattr(BucketHome, "load", interrupted)
    monkeypatch.setattr(seen, "meanwhile", lambda: ours._lohan.state._placing[0].wait())
    with pytest.raises(KeyboardInterrupt, match="taking back"):
        ours(**tokens(0))
    assert seen.take() == ["placing", "traced", "taken back", "taken back"]
    assert ours._lohan.runtime is None
    monkeypatch.setattr(seen, "meanwhile", lambda: None)
    assert_same(ours, Tiny().bfloat16(), exact=True)
    assert steps(ours, optimizer, [tokens(0), tokens(1)]) == first[0]
    ours.close()


def test_a_model_may_be_closed_while_it_is_traced(before: Before, seen: Seen, disk: Path) -> None:
    ours, optimizer = started(disk)
    seen.meanwhile = ours.close
    with leaves_nothing(disk), pytest.raises(lohan_fx.LohanError):
        step(ours, optimizer, tokens(0))
    assert not any(thread.name == "lohan_fx placing" for thread in threading.enumerate())


class _LateStart(Tiny):
    """Its first call computes nothing."""

    computes = False

    def forward(self, ids: torch.Tensor, labels: torch.Tensor | None = None) -> Any:
        return super().forward(ids, labels) if self.computes else None


def test_a_call_that_computes_nothing_leaves_the_values_where_they_are(
    seen: Seen, disk: Path
) -> None:
    def late(computes: bool) -> tuple[Any, Any]:
        model = _LateStart()
        model.computes = computes
        return started(disk, model)

    ours, optimizer = late(True)
    losses = steps(ours, optimizer, [tokens(0)])
    ours.close()
    seen.take()
    ours, optimizer = late(False)
    assert ours(**tokens(0)) is None
    assert seen.take() == ["placing", "taken back"]
    assert ours._lohan.runtime is None
    assert_same(ours, Tiny().bfloat16(), exact=True)
    ours.computes = True
    assert steps(ours, optimizer, [tokens(0)]) == losses
    assert seen.take() == AHEAD
    ours.close()


@pytest.mark.parametrize("guess", ["right", "wrong"])
@pytest.mark.parametrize("source", ["state dicts", "checkpoint"])
def test_values_set_before_the_first_step_are_those_that_are_placed(
    source: str, guess: str, before: Before, seen: Seen, disk: Path, tmp_path: Path
) -> None:
    ours, optimizer = started(disk)
    steps(ours, optimizer, [tokens(0), tokens(1)])
    saved = ours.state_dict(), optimizer.state_dict()
    lohan_fx.save(ours, optimizer, tmp_path / "saved")
    expected = steps(ours, optimizer, [tokens(2), tokens(3)]), ours.state_dict()
    ours.close()
    if guess == "wrong":
        before.change(other_places)
    again, optimizer = started(disk)
    if source == "checkpoint":
        lohan_fx.load(again, optimizer, tmp_path / "saved")
    else:
        again.load_state_dict(saved[0])
        optimizer.load_state_dict(saved[1])
    seen.take()
    assert steps(again, optimizer, [tokens(2), tokens(3)]) == expected[0]
    assert seen.take() == (AHEAD if guess == "right" else UNDONE)
    assert all(torch.equal(value, expected[1][name]) for name, value in again.state_dict().items())
    again.close()


@pytest.mark.parametrize("guess", ["right", "wrong"])
def test_weights_of_files_are_placed_ahead_too(
    guess: str, before: Before, seen: Seen, disk: Path, tmp_path: Path
) -> None:
    source = tmp_path / "weights.safetensors"
    save_file(Tiny().state_dict(), source)
    if guess == "wrong":
        before.change(other_places)
        seen.meanwhile = join
    with torch.device("meta"):
        model = Tiny()
    assert_same_run(run(disk, model, weights=source), before.result)
    assert seen.take() == (AHEAD if guess == "right" else UNDONE)


def test_gradients_may_be_accumulated_from_the_first_call_on(seen: Seen, disk: Path) -> None:
    def accumulated() -> list[float]:
        ours, optimizer = started(disk, budget="gpu=400kB, dram=900kB")
        with ours.no_sync():
            ours(**tokens(0)).backward()
        losses = steps(ours, optimizer, [tokens(1), tokens(2)])
        ours.close()
        return losses

    expected = accumulated()
    assert seen.take() == AS_EVER
    assert accumulated() == expected
    assert seen.take() == AHEAD


def test_ops_are_measured_without_values_in_the_way(
    seen: Seen, disk: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured: list[bool] = []

    def taken(*_: Any, **__: Any) -> float:
        measured.append(any(t.name == "lohan_fx placing" for t in threading.enumerate()))
        if len(measured) == 1:
            raise RuntimeError("no kernel image")
        return 1e-3

    monkeypatch.setattr(op_seconds, "seconds_per_call", taken)
    first = run(disk, profile="measured")
    tried = len(measured)
    assert seen.take() == AS_EVER and tried > 1
    # What cannot be measured is not tried beside placing.
    assert_same_run(run(disk, profile="measured"), first)
    assert seen.take() == AHEAD and len(measured) == tried
    (file,) = folder.parent.glob("ops-*.json")
    file.unlink()
    measured.clear()
    assert_same_run(run(disk, profile="measured"), first)
    assert seen.take() == UNDONE
    assert len(measured) == tried and not any(measured)


def test_a_placing_that_cannot_begin_is_begun_with_the_plan(
    before: Before, seen: Seen, disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    start, calls = threading.Thread.start, iter([True])

    def refused(self: threading.Thread) -> None:
        if self.name == "lohan_fx placing" and next(calls, False):
            raise RuntimeError("can't start new thread")
        start(self)

    monkeypatch.setattr(threading.Thread, "start", refused)
    assert_same_run(run(disk), before.result)
    assert seen.take() == ["placing", "traced", "placing"]
