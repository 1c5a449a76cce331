"""LoHan's own algorithm: traffic-aware activation swapping (ICDE 2025, arXiv 2403.06504).

Weights and optimizer state are on SSD always. Values at layer boundaries are swapped always; the
others are swapped or recomputed. Those with the largest offloading benefit (seconds of recompute a
byte) are swapped first, and of all lengths of that list the one is taken for which the paper's

    T_f = max(F, A_out / BW_G, P16 / BW_G, P16 / BW_S2M + A_ssd / BW_M2S)
    T_b = max(B + R, P16 / BW_G, (P16 + A_out) / BW_G, (P + A_ssd) / BW_S2M + P / BW_M2S)

add up to least: F, B and R are the seconds of forward, backward and recompute, A_out the bytes
swapped, A_ssd those beyond the DRAM that is left, P16 the bytes of weights and P those of weights
and states. As in the paper, the CPU's Adam takes no time in this choice. DRAM is given to buffers for
weights, then for the optimizer, then to activations in the order in which they are made; what is
left goes to SSD.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from lohan_fx.planner.choice import fitting
from lohan_fx.planner.least import check_forced, is_redone_in_place
from lohan_fx.planner.ledger import Ledger, Room
from lohan_fx.planner.problem import (
    GPU_ALIGN,
    Activation,
    BucketPlace,
    Lanes,
    Place,
    Problem,
    align_up,
)
from lohan_fx.planner.solution import Forced, Solution
from lohan_fx.planner.traffic import state_section_bytes, weight_section_bytes


def lohan(problem: Problem, forced: Forced | None = None, cutoff_s: float = math.inf) -> Solution:
    """LoHan's placement. Raises NothingFits, naming the tier, where it does not fit, and NotFaster
    where its step cannot be below `cutoff_s` seconds.
    """
    forced = forced or Forced()
    check_forced(problem, forced)
    on_ssd = BucketPlace(Place.SSD, Place.SSD)
    buckets = [forced.buckets.get(b.index, on_ssd) for b in problem.buckets]
    swapped = _swapped(problem, forced, _spare_dram(problem, buckets))
    activations = [
        forced.activations.get(a.index, _unswapped(problem, a)) for a in problem.activations
    ]
    if not swapped:
        return fitting(problem, Ledger(problem, buckets, activations), "lohan", cutoff_s)
    for index in swapped:
        activations[index] = Place.SSD
    ledger = Ledger(problem, buckets, activations)
    # Buffers for what is on SSD are given their DRAM first.
    spare = problem.capacities.dram_bytes - ledger.dram_bytes(ledger.windows(Room.STAGE))
    for index in sorted(swapped, key=lambda i: (problem.activations[i].forward_stage, i)):
        size = align_up(problem.activations[index].bytes, GPU_ALIGN)
        if size <= spare:
            ledger.move_activation(index, Place.DRAM)
            spare -= size
    return fitting(problem, ledger, "lohan", cutoff_s)


def offloading_benefit(activation: Activation) -> float:
    """Seconds of recompute that one swapped byte saves."""
    return activation.recompute_s / max(1, activation.bytes)


@dataclass(frozen=True, slots=True)
class Formula:
    """The paper's T_f + T_b of one problem, in its own terms."""

    forward_s: float
    backward_s: float
    weight_bytes: int
    updated_bytes: int
    spare_dram_bytes: int
    lanes: Lanes

    @classmethod
    def of(cls, problem: Problem, spare_dram_bytes: int) -> Formula:
        return cls(
            forward_s=sum(s.forward_s for s in problem.stages),
            backward_s=sum(s.backward_s for s in problem.stages),
            weight_bytes=sum(weight_section_bytes(b) for b in problem.buckets),
            updated_bytes=sum(
                weight_section_bytes(b) + state_section_bytes(b)
                for b in problem.buckets
                if b.trainable
            ),
            spare_dram_bytes=spare_dram_bytes,
            lanes=problem.lanes,
        )

    def step_s(self, swapped_bytes: int, recompute_s: float) -> float:
        """T_f + T_b with so much swapped and so much recomputed."""
        lanes, weights, updated = self.lanes, self.weight_bytes, self.updated_bytes
        over = max(0, swapped_bytes - self.spare_dram_bytes)
        forward = max(
            self.forward_s,
            _over(swapped_bytes, lanes.d2h_bytes_per_s),
            _over(weights, lanes.h2d_bytes_per_s),
            _over(weights, lanes.ssd_read_bytes_per_s) + _over(over, lanes.ssd_write_bytes_per_s),
        )
        backward = max(
            self.backward_s + recompute_s,
            _over(weights, lanes.d2h_bytes_per_s),
            _over(weights + swapped_bytes, lanes.h2d_bytes_per_s),
            _over(updated + over, lanes.ssd_read_bytes_per_s)
            + _over(updated, lanes.ssd_write_bytes_per_s),
        )
        return forward + backward


def _over(num_bytes: int, rate: float) -> float:
    if rate > 0:
        return num_bytes / rate
    return float("inf") if num_bytes else 0.0


def _spare_dram(problem: Problem, buckets: Sequence[BucketPlace]) -> int:
    """DRAM that buffers for weights and the optimizer leave to activations."""
    kept = [Place.GPU] * len(problem.activations)
    ledger = Ledger(problem, buckets, kept)
    return max(0, problem.capacities.dram_bytes - ledger.dram_bytes(ledger.windows(Room.STAGE)))


def _swapped(problem: Problem, forced: Forced, spare_dram_bytes: int) -> list[int]:
    """The activations to swap: the best length of the list in order of offloading benefit."""
    free = [a for a in problem.activations if a.can_swap and a.index not in forced.activations]
    chosen = [a.index for a in free if not is_redone_in_place(problem, a)]
    others = sorted(
        (a for a in free if is_redone_in_place(problem, a)),
        key=lambda a: (-offloading_benefit(a), a.index),
    )
    formula = Formula.of(problem, spare_dram_bytes)
    out = sum(problem.activations[i].bytes for i in chosen)
    redone_s = sum(a.recompute_s for a in others)
    best, best_s = 0, formula.step_s(out, redone_s)
    for length, activation in enumerate(others, start=1):
        out += activation.bytes
        redone_s -= activation.recompute_s
        now_s = formula.step_s(out, max(0.0, redone_s))
        if now_s < best_s * (1 - 1e-12):
            best, best_s = length, now_s
    return [*chosen, *(a.index for a in others[:best])]


def _unswapped(problem: Problem, activation: Activation) -> Place:
    return Place.RECOMPUTE if is_redone_in_place(problem, activation) else Place.GPU
