"""One captured training step, to be planned as often as wanted: by policy, budget, rates or pins.

Tracing a large model takes tens of seconds, planning it once more about one. There is no graph and no
tensor in here, and nothing of the model is kept.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from functools import partial
from typing import Any

from lohan_fx.errors import LohanError
from lohan_fx.hardware import Hardware
from lohan_fx.pins import Pins, best_of, forced_placements
from lohan_fx.plan import Plan, TensorRow, build_plan, count_params
from lohan_fx.planner import (
    DEFAULT_POLICY,
    Forced,
    Lanes,
    Overlap,
    Problem,
    Solution,
    solve,
    validate,
)
from lohan_fx.units import format_bytes


@dataclass(frozen=True, slots=True)
class TracedStep:
    """A captured step: the planner's problem, and the tensors it is made of.

    `tokens_per_step` is None where the model reads no tokens. `layers_traced` is the number of layers
    that were traced, where the others are repetitions (see `lohan_fx.repetition`).
    """

    model: str
    hardware: Hardware
    problem: Problem
    tensors: tuple[TensorRow, ...]
    tokens_per_step: int | None
    layers_traced: int | None = None

    @property
    def num_params(self) -> int:
        return count_params(self.tensors)

    def named(self, model: str, tokens_per_step: int | None = None) -> TracedStep:
        """The same step under the name that the user gave the model."""
        tokens = self.tokens_per_step if tokens_per_step is None else tokens_per_step
        return dataclasses.replace(self, model=model, tokens_per_step=tokens)

    def with_capacity(self, **num_bytes: int) -> TracedStep:
        """The same step under another budget: any of gpu=, dram= and ssd=, in bytes."""
        changed = {f"{tier}_bytes": size for tier, size in num_bytes.items()}
        return self._with(capacities=dataclasses.replace(self.problem.capacities, **changed))

    def with_lanes(self, lanes: Lanes) -> TracedStep:
        """The same step on lanes of other rates."""
        return self._with(lanes=lanes)

    def with_overlap(self, overlap: Overlap) -> TracedStep:
        """The same step with the optimizer at another time."""
        return self._with(overlap=overlap)

    def _with(self, **fields: Any) -> TracedStep:
        return self.of(dataclasses.replace(self.problem, **fields))

    def of(self, problem: Problem) -> TracedStep:
        """The same step as another problem."""
        return dataclasses.replace(self, problem=problem)

    def solve(self, policy: str = DEFAULT_POLICY, pins: Pins | None = None) -> Solution:
        """The policy's solution.

        Raises:
            InfeasiblePlan: nothing fits.
            LohanError: there is no such policy, or pins cannot be honoured.
        """
        forced: tuple[Forced, ...] = (Forced(),)
        if pins:
            forced = forced_placements(pins, self.tensors, self.problem)
        return best_of(partial(solve, self.problem, policy), forced)

    def checked(self, solution: Solution) -> Solution:
        """The solution as it is. Raises LohanError where it breaks a rule of this step's problem."""
        faults = validate(self.problem, solution)
        if faults:
            raise LohanError(f"the plan breaks its own rules: {faults[0]} ({len(faults)} in all)")
        return solution

    def plan(self, policy: str = DEFAULT_POLICY, pins: Pins | None = None) -> Plan:
        """The policy's plan, without a schedule (which needs the graphs). Raises as `solve`."""
        solution = self.checked(self.solve(policy, pins))
        return build_plan(
            self.problem,
            solution,
            model=self.model,
            hardware=self.hardware.name,
            budget=self.budget_text(),
            policy=policy,
            tensors=self.tensors,
            tokens_per_step=self.tokens_per_step,
        )

    def tokens_per_s(self, solution: Solution) -> float | None:
        step_s = solution.predicted.step_s
        if self.tokens_per_step is None or step_s <= 0:
            return None
        return self.tokens_per_step / step_s

    def budget_text(self) -> str:
        """The capacities in the words of a budget."""
        have = self.problem.capacities
        tiers = (("gpu", have.gpu_bytes), ("dram", have.dram_bytes), ("ssd", have.ssd_bytes))
        return ", ".join(f"{tier}={format_bytes(size)}" for tier, size in tiers)


__all__ = ["TracedStep"]
