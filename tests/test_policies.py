"""The placements of other systems, each on a problem small enough to place by hand."""

from __future__ import annotations

import dataclasses
import re

import pytest
from problems import MIB, activation, bucket, lanes, problem, stage

from lohan_fx.errors import InfeasiblePlan
from lohan_fx.planner import (
    SOLVERS,
    BucketPlace,
    Forced,
    Ledger,
    NothingFits,
    Overlap,
    Place,
    Problem,
    Room,
    Solution,
    default_overlap,
    solve,
    validate,
)
from lohan_fx.planner.choice import NotFaster
from lohan_fx.planner.lohan import Formula
from lohan_fx.planner.policies import zero_infinity

G, D, S, R = Place.GPU, Place.DRAM, Place.SSD, Place.RECOMPUTE


def solved(question: Problem, policy: str, forced: Forced | None = None) -> Solution:
    answer = solve(question, policy, forced)
    assert answer.policy == policy
    assert validate(question, answer) == []
    return answer


def layers(count: int, **rest: float) -> Problem:
    """Layers of a bucket, a value made again from the layer's input, and that input.

    Items by layer k: activation 2k is the input of the layer above, 2k + 1 is inside the layer.
    """
    acts = []
    for k in range(count):
        crosses = activation(2 * k, k, read_in=min(k + 1, count - 1), can_recompute=False)
        acts += [crosses, activation(2 * k + 1, k, mib=4, recompute_s=1.0 + k)]
    return problem(count, tuple(bucket(k, k) for k in range(count)), tuple(acts), **rest)  # type: ignore[arg-type]


def homes(answer: Solution) -> set[tuple[Place, Place]]:
    return {(p.weight, p.state) for p in answer.buckets}


@pytest.mark.parametrize(
    ("policy", "home", "crossing", "inside"),
    [
        ("keep-all", (G, G), G, G),
        ("checkpoint-all", (G, G), G, R),
        ("swap-all", (G, G), D, D),
        ("zero-offload", (G, D), G, R),
        ("zero-infinity", (S, S), G, R),
        ("flashneuron", (G, G), G, G),
        ("capuchin", (G, G), G, G),
        ("checkmate", (G, G), G, G),
        ("g10", (G, G), G, G),
    ],
)
def test_with_room_each_policy_places_as_its_system_does(
    policy: str, home: tuple[Place, Place], crossing: Place, inside: Place
) -> None:
    answer = solved(layers(3), policy)
    assert homes(answer) == {home}
    # The last layer's result is read nowhere else: it is no layer's input.
    assert set(answer.activations[0:4:2]) == {crossing}
    assert set(answer.activations[1::2]) == {inside}


@pytest.mark.parametrize("policy", sorted(set(SOLVERS) - {"optimal", "greedy"}))
def test_a_policy_that_does_not_fit_says_so_with_the_tier(policy: str) -> None:
    question = layers(3, gpu=5)
    with pytest.raises(NothingFits, match=rf"{policy} does not fit.* GPU: .* at least") as caught:
        solve(question, policy)
    assert caught.value.least_bytes["gpu"] > 5 * MIB


@pytest.mark.parametrize("policy", sorted(SOLVERS))
def test_every_policy_honours_what_is_forced(policy: str) -> None:
    forced = Forced(buckets={1: BucketPlace(D, D)}, activations={3: S})
    answer = solved(layers(3), policy, forced)
    assert answer.buckets[1] == BucketPlace(D, D)
    assert answer.activations[3] is S


def test_where_states_do_not_fit_activations_are_kept_and_weights_stream() -> None:
    # States of three buckets are 36, weights 6; all activations are 18.
    answer = solved(layers(3, gpu=34), "keep-all")
    assert homes(answer) == {(D, D)}
    assert set(answer.activations) == {G}


def test_zero_offload_streams_weights_that_do_not_fit() -> None:
    # Inputs 4 and gradients 2, a layer's own 4 and 2: weights of 6 besides do not fit 16.
    assert homes(solved(layers(3, gpu=22), "zero-offload")) == {(G, D)}
    assert homes(solved(layers(3, gpu=14), "zero-offload")) == {(D, D)}


def test_the_optimizer_of_deepspeed_waits_for_the_backward() -> None:
    assert default_overlap("zero-infinity") is Overlap.SERIAL
    assert default_overlap("zero-offload") is Overlap.SERIAL
    assert default_overlap("lohan") is Overlap.BACKWARD
    assert default_overlap("optimal") is None


def test_flashneuron_swaps_the_first_values_and_no_more_than_it_must() -> None:
    acts = tuple(activation(k, k, mib=4) for k in range(5))
    everything = solved(problem(5, (), acts), "flashneuron").predicted.peak_bytes["gpu"] / MIB
    answer = solved(problem(5, (), acts, gpu=everything - 1), "flashneuron")
    # One must go; windows for one that leaves and returns take the room of two more.
    places = answer.activations
    swapped = places.count(S)
    assert 0 < swapped < 5 and places == (S,) * swapped + (G,) * (5 - swapped)
    with pytest.raises(NothingFits, match="SSD: "):
        solve(problem(5, (), acts, gpu=everything - 1, ssd=0), "flashneuron")


def test_capuchin_swaps_what_the_link_hides_and_recomputes_the_rest() -> None:
    # A forward of 2 s hides one value of 2 MiB; swapping another would take 4 s, redoing it 1 s.
    stages = tuple(stage(k, 0.4) for k in range(5))
    acts = tuple(activation(k, k, recompute_s=1.0) for k in range(5))
    answer = solved(problem(stages, (), acts, gpu=4), "capuchin")
    assert answer.activations[0] is D
    assert set(answer.activations[1:]) == {R, G}


def test_checkmate_recomputes_what_is_cheapest_for_its_bytes() -> None:
    costs = (5.0, 1.0, 4.0, 2.0, 3.0, 0.0)
    acts = tuple(activation(k, k, recompute_s=cost) for k, cost in enumerate(costs))
    answer = solved(problem(6, (), acts, gpu=8), "checkmate")
    # The last is on the GPU in its own stage anyway; of the others, three are kept.
    assert answer.activations == (G, R, G, R, G, G)
    assert answer.predicted.step_s == pytest.approx(6 * 3 + 1 + 2)


def test_g10_moves_states_first_since_they_are_idle_longest() -> None:
    question = layers(3)
    full = solved(question, "g10").predicted.peak_bytes["gpu"] / MIB
    answer = solved(layers(3, gpu=full - 1), "g10")
    assert (G, G) in homes(answer) and len(homes(answer)) > 1
    assert set(answer.activations) == {G}


def test_lohan_keeps_states_on_ssd_and_swaps_by_benefit() -> None:
    # Redoing layer k takes 1 + k s for 4 MiB; links of 8 MiB/s.
    rates = lanes(h2d_bytes_per_s=8 * MIB, d2h_bytes_per_s=8 * MIB, ssd_simplex=False)
    rates = dataclasses.replace(
        rates, ssd_read_bytes_per_s=1e4 * MIB, ssd_write_bytes_per_s=1e4 * MIB
    )
    answer = solved(dataclasses.replace(layers(3, gpu=60), lanes=rates), "lohan")
    assert homes(answer) == {(S, S)}
    assert set(answer.activations[0::2]) == {D}
    # All 18 MiB leave in a forward of 3 s, so all three are swapped.
    assert answer.activations[1::2] == (D, D, D)
    slow = dataclasses.replace(rates, d2h_bytes_per_s=MIB * 10 / 3)
    answer = solved(dataclasses.replace(layers(3, gpu=60), lanes=slow), "lohan")
    # 10 MiB leave in a forward of 3 s: the inputs, 6, and one of 4, the dearest to redo. A second
    # would take 1.2 s more and save 2 s, a third as much and save 1 s.
    assert answer.activations[1::2] == (R, D, D)


def test_lohan_overflows_dram_to_ssd() -> None:
    question = layers(12, gpu=100)
    roomy = solved(question, "lohan")
    # Without the gradient buffers that spare DRAM holds.
    ledger = Ledger(question, roomy.buckets, roomy.activations)
    held = ledger.dram_bytes(ledger.windows(Room.STAGE)) / MIB
    tight = solved(layers(12, gpu=100, dram=held - 1), "lohan")
    assert D in tight.activations and S in tight.activations
    # The first made fill it.
    kept = [place for place in tight.activations if place in (D, S)]
    assert kept[0] is D and kept[-1] is S


def test_the_formula_of_the_paper_adds_up() -> None:
    question = layers(2)
    formula = Formula.of(question, spare_dram_bytes=3 * MIB)
    # Weights 4, states 24 MiB at 1 MiB/s; compute 2 and 4 s. 8 MiB swapped, of which 5 to SSD.
    assert formula.step_s(0, 0.0) == pytest.approx(max(2, 4) + (28 + 28))
    assert formula.step_s(8 * MIB, 0.5) == pytest.approx(max(8, 4 + 5) + (28 + 5 + 28))


def test_an_impossible_force_is_refused_by_every_policy() -> None:
    for policy in SOLVERS:
        with pytest.raises(InfeasiblePlan, match=re.escape("bucket 9; there are 3")):
            solve(layers(3), policy, Forced(buckets={9: BucketPlace(G, G)}))


def test_a_plan_is_not_replayed_where_its_busiest_lane_takes_longer_than_is_known() -> None:
    predicted = solved(layers(3), "zero-infinity").predicted
    with pytest.raises(NotFaster):
        zero_infinity(layers(3), cutoff_s=predicted.bound_s / 2)
    assert zero_infinity(layers(3), cutoff_s=predicted.bound_s).predicted == predicted
