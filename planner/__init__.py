"""Where everything lives during a training step: Problem -> Solution, without torch.

problem   the question: stages, buckets, activations, lanes, capacities
schedule  where in a pass each move stands; the compiler uses it too
solution  the answer
places    the places that an item may have
traffic   what items move over lanes, and the seconds that lanes are busy with it
ledger    traffic, bytes in every tier and windows of one placement, item by item
cost      the estimate of the step that solvers search with
simulate  a step replayed moment by moment; where predictions come from
replay    the host that a simulation follows; its parts are streams, updates, pipeline and fluid
least     where a search begins; the least each tier must hold
occupancy what lies in a tier at one moment
moves     moves of groups of identical items
greedy    a fast solver
lots      groups as a linear program sees them
milp      placement as a mixed-integer program, and its relaxation
optimal   the program's plan or any policy's that is better, with a proved bound
lohan     LoHan's own algorithm
policies  what other systems do
choice    which of two plans is better
speculation  whether, and for which buckets, to update before step() decides
sharing   windows for steps that run in turns
words     why items are where they are, or why nothing fits
validate  a checker that shares no code with the ledger and the solvers
"""

from __future__ import annotations

from lohan_fx.budget import Capacities
from lohan_fx.errors import LohanError
from lohan_fx.planner import policies
from lohan_fx.planner.cost import estimate
from lohan_fx.planner.greedy import greedy
from lohan_fx.planner.least import least_bytes, start_with_least_dram
from lohan_fx.planner.ledger import Ledger, Room
from lohan_fx.planner.lohan import lohan
from lohan_fx.planner.occupancy import Occupant, dram_occupants, gpu_occupants
from lohan_fx.planner.optimal import best_of
from lohan_fx.planner.places import activation_places, bucket_places, streamed_places
from lohan_fx.planner.policies import default_overlap
from lohan_fx.planner.problem import (
    Activation,
    Bucket,
    BucketPlace,
    Lanes,
    NothingFits,
    Overlap,
    Place,
    Problem,
    Stage,
    speculates,
)
from lohan_fx.planner.sharing import in_turns
from lohan_fx.planner.simulate import (
    MEMORY_CLASSES,
    Simulation,
    Stall,
    TierMemory,
    TimeSpan,
    predict,
    simulate,
)
from lohan_fx.planner.solution import Forced, Optimality, Prediction, Solution, Windows
from lohan_fx.planner.speculation import with_speculation
from lohan_fx.planner.traffic import accumulator_bytes
from lohan_fx.planner.validate import validate

STATIC = {
    "zero-infinity": policies.zero_infinity,
    "zero-offload": policies.zero_offload,
    "flashneuron": policies.flashneuron,
    "checkpoint-all": policies.checkpoint_all,
    "keep-all": policies.keep_all,
    "swap-all": policies.swap_all,
    "capuchin": policies.capuchin,
    "checkmate": policies.checkmate,
    "g10": policies.g10,
}


def optimal(problem: Problem, forced: Forced | None = None) -> Solution:
    """The best plan found by any policy or by integer programming; see lohan_fx.planner.optimal."""
    return best_of(problem, forced, {"lohan": lohan, **STATIC})


SOLVERS = {"optimal": optimal, "greedy": greedy, "lohan": lohan, **STATIC}


DEFAULT_POLICY = "optimal"


def check_policy(policy: str) -> None:
    """Raise LohanError unless this version has the policy."""
    if policy not in SOLVERS:
        raise LohanError(
            f"policy {policy!r} is not available in this version; {DEFAULT_POLICY} is the default, and there "
            f"are: {', '.join(sorted(SOLVERS))}"
        )


def solve(problem: Problem, policy: str = DEFAULT_POLICY, forced: Forced | None = None) -> Solution:
    """The solution of one policy; `validate` says whether to believe it.

    Raises InfeasiblePlan where nothing fits, LohanError for an unknown policy.
    """
    check_policy(policy)
    return SOLVERS[policy](problem, forced)


__all__ = [
    "DEFAULT_POLICY",
    "MEMORY_CLASSES",
    "SOLVERS",
    "Activation",
    "Bucket",
    "BucketPlace",
    "Capacities",
    "Forced",
    "Lanes",
    "Ledger",
    "NothingFits",
    "Occupant",
    "Optimality",
    "Overlap",
    "Place",
    "Prediction",
    "Problem",
    "Room",
    "Simulation",
    "Solution",
    "Stage",
    "Stall",
    "TierMemory",
    "TimeSpan",
    "Windows",
    "accumulator_bytes",
    "activation_places",
    "bucket_places",
    "check_policy",
    "default_overlap",
    "dram_occupants",
    "estimate",
    "gpu_occupants",
    "greedy",
    "in_turns",
    "least_bytes",
    "predict",
    "simulate",
    "solve",
    "speculates",
    "start_with_least_dram",
    "streamed_places",
    "validate",
    "with_speculation",
]
