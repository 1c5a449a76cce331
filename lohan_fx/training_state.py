"""Weights, masters, moments and step counts of one model: first as they were given, then in the tiers.

Values are placed by a thread beside the compiler (placing.py), and can be had back until that is waited
for. Before, setting one only remembers it; a placing takes it along.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch

from .errors import CaptureError, LohanError
from .params import ManagedParams
from .phases import Phases
from .piecewise import Value, in_memory
from .placing import Placing
from .program import Bucket, BucketPlacement, ParamSpec
from .runtime import Runtime
from .runtime.layout import stored_pieces
from .runtime.values import Values


class TrainingState:
    """What a checkpoint holds, by parameter number, wherever it is.

    Attributes:
        trainable: parameters that the step updates; they have optimizer state.
        unused: those that it would update, but whose gradient is None.
    """

    def __init__(self, params: ManagedParams) -> None:
        self._params = params
        self._given: dict[int, Mapping[str, Any]] = {}  # optimizer state that waits for placing
        self._placing: tuple[Placing, Runtime] | None = None
        self._tiers: Values | None = None  # once it has every value
        self.trainable = frozenset(
            pid for pid, stub in enumerate(params.stubs) if stub.requires_grad
        )
        self.unused: frozenset[int] = frozenset()

    @property
    def placed(self) -> bool:
        """True once the values are in their tiers."""
        return self._tiers is not None

    # Which parameters have optimizer state.

    def leave_out_unused(self, reached: frozenset[int], *, settled: bool) -> None:
        """Leave out parameters without a gradient, as torch.optim does where `grad` is None.

        The first captured step settles which they are: they get no optimizer state.

        Raises:
            CaptureError: one that was left out has a gradient in this step.
        """
        late = [self._params.names[pid] for pid in sorted(self.unused & reached)]
        if late:
            raise CaptureError(
                f"{late[0]!r} has a gradient in this step, but had none in the first one and so has no "
                "optimizer state; make the first step use every parameter that is to be trained (later "
                f"ones may leave some out), or freeze it ({len(late)} such parameter(s) in this step)"
            )
        if settled or not self.trainable & reached:
            return
        self.unused = self.trainable - reached
        self.trainable -= self.unused

    def take_unused_back(self) -> None:
        """Undo `leave_out_unused`: the step that settled it has failed."""
        self.trainable |= self.unused
        self.unused = frozenset()

    # Placing.

    @property
    def placing(self) -> bool:
        """True between `begin_placing` and `end_placing` or `undo_placing`."""
        return self._placing is not None

    def begin_placing(
        self,
        runtime: Runtime,
        buckets: tuple[Bucket, ...],
        placements: Sequence[BucketPlacement],
    ) -> None:
        """Let another thread put every value into its tier."""
        moments = {
            pid: (state["exp_avg"], state["exp_avg_sq"]) for pid, state in self._given.items()
        }
        # The thread must not keep the session.
        work = partial(
            runtime.adopt,
            buckets,
            dict(enumerate(self._params.stubs)),
            self._params.values,
            placements,
            moments,
        )
        nbytes = sum(bucket.weight_bytes + bucket.state_bytes for bucket in buckets)
        self._placing = Placing(work, nbytes, runtime.device), runtime

    def end_placing(self, phases: Phases) -> None:
        """Wait until every value is in its tier. Raises what placing raised."""
        assert self._placing is not None
        placing, runtime = self._placing
        with phases.timed("await placing"):
            placing.wait()
        phases.seconds["place, beside compiling"] = placing.seconds
        runtime.settle()
        self._tiers, self._placing = runtime.values, None
        for pid, state in self._given.items():
            if "master" in state:
                self._tiers.set_master(pid, state["master"])
            self._tiers.set_steps(pid, int(state["step"]))
        self._given.clear()

    def undo_placing(self) -> None:
        """Have the values back where they were, if they are on their way."""
        if self._placing is None:
            return
        placing, runtime = self._placing
        complete = not placing.cancel()
        if complete:
            runtime.give_back(self._params.values)
        self._placing = None

    def stop_placing(self) -> None:
        """Leave the values where they are; nothing needs them any more."""
        if self._placing is not None:
            self._placing[0].cancel()
            self._placing = None

    # Weights.

    def read(self, pid: int) -> torch.Tensor:
        """A CPU copy of a parameter in its compute dtype."""
        if self._tiers is not None:
            return self._tiers.weight(pid)
        value = in_memory(self._params.values[pid])
        return value.to("cpu", self._params.stubs[pid].dtype, copy=True)

    def write(self, pid: int, value: torch.Tensor) -> None:
        """Set a parameter's value (the master's, where there is one).

        A 16-bit value that the parameter has already leaves its more exact master as it is, so that
        the order in which a checkpoint's model and optimizer are loaded does not matter.
        """
        itself = value.dtype == self._params.stubs[pid].dtype and value.dtype.itemsize == 2
        if itself and torch.equal(self.read(pid), value.cpu()):
            return
        if self._tiers is not None:
            self._tiers.set_master(pid, value)
        else:
            self._params.values[pid] = value.detach().clone()

    # What the optimizer keeps.

    @property
    def step_count(self) -> int:
        """Optimizer steps made, those before a checkpoint was loaded included."""
        if self._tiers is not None:
            return self._tiers.step_count
        steps = [int(state["step"]) for state in self._given.values() if "step" in state]
        return max(steps, default=0)

    def steps(self, pid: int) -> int:
        """Updates that a parameter has had: those steps in which it had a gradient."""
        if self._tiers is not None:
            return self._tiers.steps(pid)
        return int(self._given.get(pid, {}).get("step", 0))

    def optimizer_state(self, pid: int) -> dict[str, Any]:
        """step, exp_avg, exp_avg_sq and master of one parameter, as CPU copies; {} if frozen."""
        if pid not in self.trainable:
            return {}
        if self._tiers is None:
            return {name: in_memory(value) for name, value in self._given.get(pid, {}).items()}
        exp_avg, exp_avg_sq = self._tiers.moments(pid)
        return {
            "step": torch.tensor(float(self._tiers.steps(pid))),
            "exp_avg": exp_avg,
            "exp_avg_sq": exp_avg_sq,
            "master": self._tiers.master(pid),
        }

    def set_optimizer_state(self, pid: int, state: Mapping[str, Any]) -> None:
        """Set what `optimizer_state` gives.

        Raises:
            LohanError: a tensor has another shape than the parameter.
        """
        if not state:
            return
        for name, value in state.items():
            shape = self._params.stubs[pid].shape
            if name != "step" and value.shape != shape:
                raise LohanError(
                    f"{name} of {self._params.names[pid]} has shape {tuple(value.shape)}, its "
                    f"parameter {tuple(shape)}; this optimizer state is of another model"
                )
        if self._tiers is None:
            self._given[pid] = dict(state)
            return
        if "master" in state:
            self._tiers.set_master(pid, state["master"])
        self._tiers.set_moments(pid, state["exp_avg"], state["exp_avg_sq"])
        self._tiers.set_steps(pid, int(state["step"]))

    def reset_moments(self) -> None:
        """Begin with moments of zero: another optimizer takes over. Given ones stay."""
        if self._tiers is not None:
            self._tiers.reset_moments()

    # Whole checkpoints.

    def rest(self) -> None:
        """Make what `read_piece` gives the state after the last step.

        Raises:
            TrainingLoopError: between backward and step(), or after an update that failed.
        """
        if self._tiers is not None:
            self._tiers.rest()

    def read_piece(self, pid: int, section: str, start: int, out_N: torch.Tensor) -> None:
        """Fill `out_N` (1-D, CPU) from element `start` of a parameter's section on.

        Sections: "weight" (compute dtype); for trainable parameters "master", "exp_avg" and
        "exp_avg_sq" (fp32). Elements are in the order of the parameter's strides. Call `rest` first.
        """
        if self._tiers is not None:
            self._tiers.read_piece(pid, section, start, out_N)
            return
        value: Value | None = self._params.values[pid]
        if section.startswith("exp"):
            value = self._given.get(pid, {}).get(section)
        if value is None:
            out_N.zero_()
            return
        stub = self._params.stubs[pid]
        spec = ParamSpec(
            pid=pid,
            name=self._params.names[pid],
            shape=tuple(stub.shape),
            stride=stub.stride(),
            offset=0,
            numel=stub.numel(),
            trainable=pid in self.trainable,
        )
        through = torch.float32 if spec.trainable else out_N.dtype
        piece_N = stored_pieces(spec, value, through)(start, start + out_N.numel())
        out_N.copy_(piece_N.to(through))

    def restore(
        self,
        values: Mapping[int, Value],
        moments: Mapping[int, tuple[int, Value, Value]] | None,
        progress: Callable[[int], None] = lambda nbytes: None,
    ) -> None:
        """Set parameters (their masters) and, unless None, their step counts and moments.

        Where nothing is placed yet, values are only remembered: they are read when they are placed.
        On failure in the middle, training goes on only after another restore.
        """
        if self._tiers is None:
            self._params.values.update(values)
            if moments is not None:
                self._given = {
                    pid: {"step": torch.tensor(float(step)), "exp_avg": m, "exp_avg_sq": v}
                    for pid, (step, m, v) in moments.items()
                }
            return
        tiers = self._tiers
        tiers.begin_restore()
        for pid, value in values.items():
            tiers.set_master(pid, value)
            progress(_nbytes(value))
        for pid, (_, exp_avg, exp_avg_sq) in (moments or {}).items():
            tiers.set_moments(pid, exp_avg, exp_avg_sq)
            progress(_nbytes(exp_avg) + _nbytes(exp_avg_sq))
        tiers.end_restore({pid: step for pid, (step, _, _) in (moments or {}).items()})


def _nbytes(value: Value) -> int:
    return math.prod(value.shape) * value.dtype.itemsize
