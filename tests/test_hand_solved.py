"""Every solver on problems small enough to solve by hand, and `optimal` against all placements."""

from __future__ import annotations

import itertools
import math

import pytest
from problems import MIB, activation, bucket, lanes, problem, stage

from lohan_fx.planner import (
    SOLVERS,
    NothingFits,
    Place,
    Problem,
    Solution,
    activation_places,
    bucket_places,
    estimate,
    predict,
    solve,
    streamed_places,
    validate,
)

G, D, S, R = Place.GPU, Place.DRAM, Place.SSD, Place.RECOMPUTE

HALF = tuple(stage(i, 0.5) for i in range(3))
THREE = tuple(bucket(i, i) for i in range(3))
FROZEN = tuple(bucket(i, i, trainable=False) for i in range(3))
SLOW = lanes(h2d_bytes_per_s=MIB / 2, d2h_bytes_per_s=MIB / 2)


def _values(recompute_s: float) -> Problem:
    """Three values of 8 MiB over a slow link, with room for one and the next one's arrival."""
    acts = tuple(activation(i, i, mib=8, recompute_s=recompute_s) for i in range(3))
    return problem(3, (), acts, gpu=16, ssd=0, rates=SLOW)


# Problem, homes of (weight, state) by bucket, and places of activations; test_planner.py says why.
TABLE = {
    "room for everything": (
        problem(2, (bucket(0, 0), bucket(1, 1)), (activation(0, 0), activation(1, 1))),
        [(G, G), (G, G)],
        (G, G),
    ),
    "no room on the GPU": (problem(HALF, THREE, gpu=6, ssd=0), [(D, D)] * 3, ()),
    # States of 36, two gradients and an arena of two weights: 18 MiB pass the SSD in a step; with the
    # weights in DRAM instead it would be 72.
    "DRAM for states": (problem(3, THREE, gpu=6, dram=45), [(S, D)] * 3, ()),
    "no DRAM for states": (problem(3, THREE, gpu=6, dram=36), [(D, S)] * 3, ()),
    "no DRAM to spare": (problem(3, THREE, gpu=6, dram=33), [(S, S)] * 3, ()),
    "DRAM before SSD": (problem(3, THREE, gpu=6), [(D, D)] * 3, ()),
    "frozen": (problem(3, FROZEN, gpu=4, ssd=0), [(D, D)] * 3, ()),
    # The last value is read where it is made, and there is room for one more.
    "cheap to redo": (_values(0.01), [], (R, G, G)),
    "expensive to redo": (_values(100.0), [], (D, G, G)),
}


@pytest.mark.parametrize("name", TABLE)
def test_every_solver_on_the_table(name: str) -> None:
    question, homes, acts = TABLE[name]
    best = solve(question, "optimal")
    assert [(p.weight, p.state) for p in best.buckets] == homes
    assert best.activations == acts
    for policy in SOLVERS:
        try:
            answer = solve(question, policy)
        except NothingFits as exc:
            assert policy not in ("optimal", "greedy"), exc
            continue
        assert validate(question, answer) == [], policy
        assert best.predicted.step_s <= answer.predicted.step_s * (1 + 2e-6), policy


ROOMS = {
    "buckets": problem(2, (bucket(0, 0), bucket(1, 1)), gpu=20, dram=60),
    "values": problem(
        4,
        (),
        tuple(activation(i, i, mib=2 + i, recompute_s=0.3 * i) for i in range(4)),
        gpu=12,
        rates=lanes(h2d_bytes_per_s=2 * MIB),
    ),
    "both": problem(
        2,
        (bucket(0, 0), bucket(1, 1)),
        (activation(0, 0, mib=3), activation(1, 1, mib=3)),
        gpu=14,
        dram=50,
    ),
    "slow Adam": problem(
        2,
        (bucket(0, 0), bucket(1, 1, weight_mib=4)),
        (activation(0, 0),),
        gpu=40,
        dram=80,
        rates=lanes(cpu_adam_params_per_s=MIB / 4),
    ),
    "tied": problem(
        2,
        (bucket(0, 0, 1), bucket(1, 1)),
        (activation(0, 0, read_in=1), activation(1, 1)),
        gpu=12,
        dram=100,
    ),
}


@pytest.mark.parametrize("name", ROOMS)
def test_no_placement_at_the_same_windows_is_replayed_faster(name: str) -> None:
    question = ROOMS[name]
    best = solve(question, "optimal")
    least, tried = math.inf, 0
    choices = [(*bucket_places(b), *streamed_places(question, b)) for b in question.buckets]
    for homes in itertools.product(*choices):
        for acts in itertools.product(*map(activation_places, question.activations)):
            guess = estimate(question, homes, acts, best.windows)
            answer = Solution("any", homes, acts, best.windows, guess)
            if guess.bound_s < least and not validate(question, answer):
                least = min(least, predict(question, homes, acts, best.windows).step_s)
                tried += 1
    assert tried
    assert best.predicted.step_s <= least * (1 + 2e-6)
