"""What a placement costs: seconds of a step by its slowest lanes, and bytes in every tier.

This is the only model of time and memory that solvers use. The bytes of predictions come from it, and
their bound; their seconds come from `simulate`.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from lohan_fx.planner.ledger import Ledger
from lohan_fx.planner.problem import BucketPlace, Place, Problem
from lohan_fx.planner.solution import Prediction, Windows
from lohan_fx.planner.traffic import (
    LANES,
    NUM_PHASES,
    lane_limits,
    lane_seconds,
    phase_seconds,
    written_bytes,
)


def step_seconds(
    problem: Problem,
    buckets: Sequence[BucketPlace],
    activations: Sequence[Place],
    windows: Windows,
    *,
    spills: bool = False,
) -> float:
    """Seconds of a step by `phase_seconds`: the estimate that solvers search and bound."""
    ledger = Ledger(problem, buckets, activations)
    ahead = ledger.is_ahead(windows)
    return float(
        phase_seconds(problem, windows, ahead, ledger.traffic[None, :], spills=spills).sum()
    )


def estimate(
    problem: Problem,
    buckets: Sequence[BucketPlace],
    activations: Sequence[Place],
    windows: Windows,
    *,
    spills: bool = False,
) -> Prediction:
    """What one steady step of this placement takes: the slowest lane of each phase, and bytes.

    This is what solvers search with; `simulate.predict` replays the step instead. `spills`: see
    `updates_spill`.
    """
    ledger = Ledger(problem, buckets, activations)
    traffic = ledger.traffic[None, :]
    ahead = ledger.is_ahead(windows)
    forward_s, backward_s, update_s = (
        float(x) for x in phase_seconds(problem, windows, ahead, traffic, spills=spills)[0]
    )
    busy = lane_seconds(problem.lanes, traffic)
    limit = lane_limits(problem, windows, traffic, busy)[0]
    total = busy[0].sum(axis=0)
    lane_busy_s = {name: float(total[k]) for k, name in enumerate(LANES)}
    alone = dict(lane_busy_s)
    if problem.lanes.ssd_simplex:
        alone["ssd_read"] = alone["ssd_write"] = alone["ssd_read"] + alone["ssd_write"]
    # The lane that ends the phases it limits latest, summed over phases.
    blame = np.zeros(len(LANES))
    for phase in range(NUM_PHASES):
        blame[int(limit[phase].argmax())] += limit[phase].max()
    gpu, dram, ssd = ledger.peaks(windows)
    return Prediction(
        step_s=forward_s + backward_s + update_s,
        forward_s=forward_s,
        backward_s=backward_s,
        update_s=update_s,
        bottleneck=LANES[int(blame.argmax())],
        bound_s=max(alone.values()),
        lane_busy_s=lane_busy_s,
        peak_bytes={"gpu": gpu, "dram": dram, "ssd": ssd},
        ssd_bytes_written_per_step=round(written_bytes(ledger.traffic)),
    )
