"""What the simulator runs is what the compiler weaves: their moves agree for a real traced model."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from problems import activation, bucket, problem
from torch import nn

import lohan_fx
from lohan_fx.compiler import capture
from lohan_fx.compiler.weave import Woven, weave_training
from lohan_fx.planner import (
    BucketPlace,
    Forced,
    Ledger,
    Place,
    Problem,
    Room,
    Solution,
    Windows,
    activation_places,
    bucket_places,
    predict,
)
from lohan_fx.planner.steps import StepProgram, step_program
from lohan_fx.program import Program

G, D, S, R = Place.GPU, Place.DRAM, Place.SSD, Place.RECOMPUTE


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, 4 * width)
        self.down = nn.Linear(4 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(nn.functional.gelu(self.up(self.norm(x))))


class Model(nn.Module):
    def __init__(self, width: int = 256, depth: int = 4) -> None:
        super().__init__()
        self.embed = nn.Embedding(64, width)
        self.blocks = nn.ModuleList(Block(width) for _ in range(depth))
        self.head = nn.Linear(width, 64)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embed(tokens)
        for block in self.blocks:
            x = block(x)
        return nn.functional.cross_entropy(self.head(x).flatten(0, 1), tokens.flatten())


class Placing:
    """A policy that deals places out in turn, and keeps what it was asked and what it answered."""

    def __init__(self, weights: Sequence[BucketPlace], kept: Sequence[Place], room: Room) -> None:
        self.weights, self.kept, self.room = weights, kept, room

    def __call__(self, problem: Problem, forced: Forced | None) -> Solution:
        buckets = []
        for b in problem.buckets:
            wanted = self.weights[b.index % len(self.weights)]
            buckets.append(wanted if wanted in bucket_places(b) else BucketPlace(D, D))
        acts = []
        for a in problem.activations:
            place = self.kept[a.index % len(self.kept)]
            acts.append(place if place in activation_places(a) else G)
        windows = Ledger(problem, buckets, acts).windows(self.room)
        if self.room is Room.AROUND:  # whatever stages are tight
            closed = tuple(range(0, 2 * problem.num_stages, 3))
            windows = dataclasses.replace(windows, closed=closed)
        predicted = predict(problem, buckets, acts, windows)
        self.problem = problem
        self.answer = Solution("placing", tuple(buckets), tuple(acts), windows, predicted)
        return self.answer


STREAMED = BucketPlace(D, D), BucketPlace(S, S)
MIXED = BucketPlace(G, G), BucketPlace(D, D), BucketPlace(G, D), BucketPlace(S, S)


def traced(policy: Placing, monkeypatch: pytest.MonkeyPatch) -> Program:
    """The woven program of the model under `policy`."""
    woven: list[Woven] = []

    def spy(*args: Any, **options: Any) -> Woven:
        woven.append(weave_training(*args, **options))
        return woven[-1]

    monkeypatch.setattr(capture, "weave_training", spy)
    lohan_fx.make_plan(
        Model(),
        lohan_fx.Budget(gpu=10**9, dram=10**9, ssd=[Path(".")]),
        (torch.zeros(4, 32, dtype=torch.int64),),
        dtype=torch.bfloat16,
        policy=policy,
    )
    return woven[-1].program


def as_woven(policy: Placing, program: Program) -> StepProgram:
    """The simulator's program for what the graphs really read.

    A problem counts on every weight that may be read in backward and every value that may be saved;
    which of them are depends on what else is kept.
    """
    asked, answer = policy.problem, policy.answer
    fetched = {m.arg for m in program.backward if m.op == "fetch"}
    buckets = tuple(
        b if b.index in fetched else dataclasses.replace(b, backward_stages=())
        for b in asked.buckets
    )
    saved = {slot.name for slot in program.slots}
    places = [
        place if place not in (D, S) or a.name in saved else G
        for a, place in zip(asked.activations, answer.activations, strict=True)
    ]
    reduced = dataclasses.replace(asked, buckets=buckets)
    return step_program(reduced, answer.buckets, places, answer.windows)


@pytest.mark.parametrize("room", Room)
@pytest.mark.parametrize(
    ("weights", "kept"),
    [(STREAMED, (D,)), (MIXED, (D, S, G)), (MIXED, (G, D))],
    ids=["streamed", "mixed", "kept"],
)
def test_the_simulators_moves_are_those_of_the_woven_graphs(
    weights: Sequence[BucketPlace],
    kept: Sequence[Place],
    room: Room,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    policy = Placing(weights, kept, room)
    program = traced(policy, monkeypatch)
    replayed = as_woven(policy, program)
    asked = policy.problem
    index = {a.name: a.index for a in asked.activations}
    slots = {slot.index: index[slot.name] for slot in program.slots}

    def stage_of(op: str, arg: int, backward: bool) -> int:
        if op in ("fetch", "wait", "release"):
            stages = asked.buckets[arg].backward_stages if backward else ()
            return stages[-1] if stages else asked.buckets[arg].forward_stages[0]
        if backward:
            return replayed.intervals[arg][0]
        return asked.activations[arg].last_forward_stage

    def moved(pairs: list[tuple[str, int]], ops: Sequence[str]) -> list[tuple[str, int]]:
        """What brings or takes bytes, of these ops."""
        return [
            (op, arg)
            for op, arg in pairs
            if op in ops and (op not in WEIGHT_OPS or policy.answer.buckets[arg].weight is not G)
        ]

    for backward in (False, True):
        moves = program.backward if backward else program.forward
        half = replayed.backward if backward else replayed.forward
        woven = [
            (m.op, m.arg if m.op in WEIGHT_OPS else slots[m.arg]) for m in moves if m.op != "grad"
        ]
        own = [(m.op, m.arg) for m in half.in_order() if m.op != "grad"]
        for ops in (("fetch", "wait"), ("release",), ("offload", "offload_wait"), SWAP_IN):
            assert [(op, stage_of(op, arg, backward)) for op, arg in moved(own, ops)] == [
                (op, stage_of(op, arg, backward)) for op, arg in moved(woven, ops)
            ], (ops, backward)
            assert sorted(pair for pair in own if pair[0] in ops) == sorted(
                pair for pair in woven if pair[0] in ops
            )
        # Inside a stage too, activations move in the same order.
        for op in ("offload", "reload_wait"):
            assert [pair for pair in own if pair[0] == op] == [
                pair for pair in woven if pair[0] == op
            ]


WEIGHT_OPS = ("fetch", "wait", "release")
SWAP_IN = ("reload", "reload_wait")


def test_activations_leave_and_return_inside_their_stage_in_both() -> None:
    """A block's values leave at three places of its forward, and the last one is not first to return."""
    policy = Placing((BucketPlace(G, G),), (D,), Room.STAGE)
    with pytest.MonkeyPatch.context() as patch:
        program = traced(policy, patch)
    asked = policy.problem
    block = [a for a in asked.activations if a.forward_stage == a.last_forward_stage == 2]
    inside = [a for a in block if 0 < a.leaves_at < 1]
    assert inside and all(0 < a.returns_at < 1 for a in inside)
    # What is read last in forward is read first in backward.
    for early, late in itertools.pairwise(sorted(block, key=lambda a: a.leaves_at)):
        if early.leaves_at < late.leaves_at:
            assert early.returns_at >= late.returns_at
    replayed = as_woven(policy, program)
    left = [m for m in replayed.forward.in_order() if m.op == "offload"]
    stages = {i: (p.opens, p.stage) for i, p in enumerate(replayed.forward.pieces)}
    assert any(not stages[m.position][0] for m in left if m.position in stages)


def test_compute_is_cut_where_activations_leave_and_return() -> None:
    first = dataclasses.replace(activation(0, 0), leaves_at=0.25, returns_at=0.75)
    second = dataclasses.replace(activation(1, 0), leaves_at=1.0, returns_at=0.5)
    # Made again from the second, so that must be back before this one's own first use.
    third = activation(2, 0, recompute_s=0.125, needs=(1,))
    third = dataclasses.replace(third, leaves_at=0.5, returns_at=0.25)
    question = problem(1, (), (first, second, third))
    program = step_program(question, [], [D, S, R], Windows())
    assert [(p.what, p.seconds) for p in program.forward.pieces] == [
        ("forward", 0.25),
        ("forward", 0.75),
    ]
    assert [(p.what, p.seconds) for p in program.backward.pieces] == [
        ("backward", 0.5),
        ("recompute", 0.125),
        ("backward", 1.0),
        ("backward", 0.5),
    ]
    places = {(m.op, m.arg): m.position for m in program.forward.in_order()}
    assert places[("offload", 0)] == 1 and places[("offload", 1)] == 2
    places = {(m.op, m.arg): m.position for m in program.backward.in_order()}
    assert places[("reload_wait", 1)] == 1 and places[("reload_wait", 0)] == 3


def test_a_layer_that_is_computed_again_has_back_all_it_needs_when_it_starts() -> None:
    kept = dataclasses.replace(activation(0, 0), leaves_at=0.25, returns_at=0.75)
    made = activation(1, 0, recompute_s=1.0, needs=(0,))
    made = dataclasses.replace(made, returns_at=0.5)
    program = step_program(problem(1, (), (kept, made)), [], [D, R], Windows())
    assert [(p.what, p.seconds) for p in program.backward.pieces] == [
        ("recompute", 1.0),
        ("backward", 2.0),
    ]
    assert {m.position for m in program.backward.in_order()} == {0}


def test_compute_is_cut_where_weights_that_move_are_first_read() -> None:
    question = problem(
        2,
        (bucket(0, 0, weight_mib=3), bucket(1, 0, weight_mib=1), bucket(2, 1)),
        (activation(0, 0, recompute_s=0.25), activation(1, 1, recompute_s=1.0)),
    )
    on_gpu = BucketPlace(G, G)
    program = step_program(
        question, [BucketPlace(D, D), BucketPlace(D, D), on_gpu], [R, R], Windows()
    )
    assert [(p.stage, p.what, p.seconds) for p in program.forward.pieces] == [
        (0, "forward", 0.75),
        (0, "forward", 0.25),
        (1, "forward", 1.0),
    ]
    # Stage 0 redoes too little to need its weights; the backward reads them in reverse.
    assert [(p.stage, p.what, p.seconds) for p in program.backward.pieces] == [
        (1, "recompute", 1.0),
        (1, "backward", 2.0),
        (0, "recompute", 0.25),
        (0, "backward", 0.5),
        (0, "backward", 1.5),
    ]
    waits = [(m.arg, m.position) for m in program.backward.in_order() if m.op == "wait"]
    assert waits == [(2, 0), (1, 3), (0, 4)]
    assert program.update_order == (0, 2, 1)
