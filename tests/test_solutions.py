"""A step that was planned before is not planned again, whatever is in the files that say so."""

from __future__ import annotations

import dataclasses
import json
import logging
import os
from pathlib import Path
from typing import Any

import pytest
from loops import TIGHT, Tiny, compiled, steps, tokens
from problems import MIB, deep

import lohan_fx
from lohan_fx import solutions
from lohan_fx.errors import InfeasiblePlan
from lohan_fx.planner import BucketPlace, Forced, Place, Problem, Solution
from lohan_fx.solutions import solved

PROBLEM = deep(2)


@pytest.fixture(autouse=True)
def folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setenv("LOHAN_FX_CACHE", str(tmp_path))
    monkeypatch.setattr(solutions, "WORTH_S", 0.0)
    return tmp_path / "solutions"


@pytest.fixture
def solves(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The policy of each call of the solver."""
    found: list[str] = []
    solve = solutions.solve

    def counted(problem: Any, policy: str, forced: Any) -> Solution:
        found.append(policy)
        return solve(problem, policy=policy, forced=forced)

    monkeypatch.setattr(solutions, "solve", counted)
    return found


def test_the_same_is_solved_once_and_the_answer_is_the_same(solves: list[str]) -> None:
    first = solved(PROBLEM, "greedy", Forced())
    again = solved(PROBLEM, "greedy", Forced())
    assert solves == ["greedy"]
    assert again == first
    assert again.to_json() == first.to_json()


def test_whatever_a_solver_sees_makes_another_problem(
    solves: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    capacities = PROBLEM.capacities
    gpu_bytes = capacities.gpu_bytes
    assert gpu_bytes is not None
    larger = dataclasses.replace(
        PROBLEM, capacities=dataclasses.replace(capacities, gpu_bytes=gpu_bytes + MIB)
    )
    slower = dataclasses.replace(
        PROBLEM,
        stages=tuple(dataclasses.replace(s, forward_s=1.5 * s.forward_s) for s in PROBLEM.stages),
    )
    moved = Forced({0: BucketPlace(Place.DRAM, Place.DRAM)})
    solved(PROBLEM, "greedy", Forced())
    solved(larger, "greedy", Forced())
    solved(slower, "greedy", Forced())
    solved(PROBLEM, "zero-offload", Forced())
    solved(PROBLEM, "greedy", moved)
    assert len(solves) == 5
    monkeypatch.setattr(solutions, "planner_digest", lambda: "another version")
    solved(PROBLEM, "greedy", Forced())
    assert len(solves) == 6


@pytest.mark.parametrize(("policy", "uses_ssd"), [("greedy", False), ("zero-infinity", True)])
def test_what_is_free_of_an_ssd_matters_only_where_it_is_used(
    policy: str, uses_ssd: bool, solves: list[str]
) -> None:
    def with_ssd(nbytes: int) -> Problem:
        capacities = dataclasses.replace(PROBLEM.capacities, ssd_bytes=nbytes)
        return dataclasses.replace(PROBLEM, capacities=capacities)

    size = 1 << 42
    found = [solved(with_ssd(size + more), policy, Forced()) for more in (0, 10**6, size // 2)]
    assert (found[0].predicted.peak_bytes["ssd"] > 0) == uses_ssd
    assert len(solves) == (3 if uses_ssd else 1)
    solved(with_ssd(2 * size), policy, Forced())
    solved(with_ssd(0), "greedy", Forced())
    assert len(solves) == (5 if uses_ssd else 3)


def everything_on_the_gpu(text: str) -> str:
    raw = json.loads(text)
    raw["buckets"] = [["gpu", "gpu"] for _ in raw["buckets"]]
    raw["activations"] = ["gpu" for _ in raw["activations"]]
    return json.dumps(raw)


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda text: text[: len(text) // 2], "not JSON"),
        (lambda text: "[]", "not a solution"),
        (lambda text: text.replace('"schema": 1', '"schema": 99'), "has schema 99"),
        (
            lambda text: text.replace('"buckets": [[', '"buckets": [["gpu", "gpu"], ['),
            "breaks a rule",
        ),
        (everything_on_the_gpu, "breaks a rule"),
        (lambda text: "[" * 100_000, "is not used"),
        (lambda text: text + " " * 2000, "has more than"),
    ],
    ids=["cut", "list", "schema", "too many", "does not fit", "deep", "large"],
)
def test_a_damaged_file_is_told_of_ignored_and_replaced(
    damage: Any,
    words: str,
    folder: Path,
    solves: list[str],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    first = solved(PROBLEM, "greedy", Forced())
    (file,) = folder.iterdir()
    text = file.read_text()
    monkeypatch.setattr(
        solutions, "MAX_BYTES", max(len(text) + 1000, 200_000 * (words != "has more than"))
    )
    file.write_text(damage(text))
    with caplog.at_level(logging.WARNING):
        assert solved(PROBLEM, "greedy", Forced()) == first
    assert words in caplog.text
    assert str(file) in caplog.text
    assert solved(PROBLEM, "greedy", Forced()) == first
    assert len(solves) == 2
    assert file.read_text() == text


def test_the_files_used_last_are_kept(
    folder: Path, solves: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(solutions, "MAX_FILES", 2)
    for age, policy in enumerate(("greedy", "zero-offload")):
        solved(PROBLEM, policy, Forced())
        for file in folder.iterdir():
            os.utime(file, (1000 + age, 1000 + age))
    solved(PROBLEM, "greedy", Forced())  # used now
    solved(PROBLEM, "swap-all", Forced())
    assert len(list(folder.iterdir())) == 2
    solved(PROBLEM, "greedy", Forced())
    assert solves == ["greedy", "zero-offload", "swap-all"]


def test_what_is_found_at_once_is_not_kept(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(solutions, "WORTH_S", 1000.0)
    solved(PROBLEM, "greedy", Forced())
    assert not folder.exists()


def test_a_folder_that_cannot_be_written_costs_nothing_but_time(
    folder: Path, solves: list[str]
) -> None:
    folder.write_text("a file in its place")
    assert solved(PROBLEM, "greedy", Forced()) == solved(PROBLEM, "greedy", Forced())
    assert len(solves) == 2


def test_what_fits_nowhere_is_refused_each_time(folder: Path, solves: list[str]) -> None:
    small = dataclasses.replace(
        PROBLEM, capacities=dataclasses.replace(PROBLEM.capacities, gpu_bytes=MIB)
    )
    for _ in range(2):
        with pytest.raises(InfeasiblePlan):
            solved(small, "greedy", Forced())
    assert len(solves) == 2


def test_a_second_run_has_the_same_plan_and_the_same_numbers(
    solves: list[str], tmp_path: Path
) -> None:
    runs = []
    for _ in range(2):
        (tmp_path / "disk").mkdir(exist_ok=True)
        model = compiled(Tiny(1), tmp_path / "disk", TIGHT)
        optimizer = lohan_fx.AdamW(model.parameters(), lr=1e-2)
        losses = steps(model, optimizer, [tokens(0), tokens(1)])
        runs.append((losses, model.plan.to_json()))
        model.close()
    assert solves == ["optimal"]
    assert runs[0] == runs[1]
