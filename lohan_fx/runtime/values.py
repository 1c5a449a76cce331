"""Parameters and their optimizer state one by one, by number: reading, setting, and whole checkpoints.

All but `read_piece` and step counts first completes what is under way, so that what is at rest is the
newest.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch

from lohan_fx.errors import TrainingLoopError
from lohan_fx.piecewise import Value

from .memory import HostBytes
from .passes import Passes
from .resources import Resources


class Values:
    """What the buckets of one runtime hold between steps."""

    def __init__(self, resources: Resources, passes: Passes) -> None:
        self._resources = resources
        self._passes = passes
        self._progress = resources.progress
        self._settle_watch: Callable[[], None] | None = None

    # Reading

    def weight(self, pid: int) -> torch.Tensor:
        """A CPU copy of a parameter as the model computes with it."""
        self._passes.quiet()
        home, spec = self._resources.store.find(pid)
        return home.load(spec, "weight")

    def master(self, pid: int) -> torch.Tensor:
        """An fp32 CPU copy of a parameter; of a frozen one, its weight."""
        self._passes.quiet()
        home, spec = self._resources.store.find(pid)
        if not home.bucket.trainable:
            return home.load(spec, "weight").float()
        return home.load(spec, "master")

    def moments(self, pid: int) -> tuple[torch.Tensor, torch.Tensor]:
        """CPU copies of exp_avg and exp_avg_sq.

        Raises:
            LohanError: the parameter is frozen.
        """
        self._passes.quiet()
        home, spec = self._resources.store.find(pid)
        return home.load(spec, "exp_avg"), home.load(spec, "exp_avg_sq")

    def read_piece(
        self,
        pid: int,
        section: str,
        start: int,
        out_N: torch.Tensor,
        through: HostBytes | None = None,
    ) -> None:
        """Fill `out_N` from element `start` of a parameter's section on, in the order of its strides.

        Sections are "weight" (compute dtype) and, where it is trainable, "master", "exp_avg" and
        "exp_avg_sq" (fp32). The last update must be complete: see `rest`. Another thread gives memory
        of its own for reads from SSD to pass `through`.
        """
        home, spec = self._resources.store.find(pid)
        home.read_piece(spec, section, start, out_N, through)

    def rest(self) -> None:
        """Make the values at rest those after the last step, for `read_piece`.

        Raises:
            TrainingLoopError: in the middle of a step, or after an update that failed.
        """
        self._passes.quiet()
        self._progress.check_whole()
        if self._resources.gradients_pending:
            raise TrainingLoopError(
                "between backward and opt.step() there is no whole state; call opt.step() first"
            )

    def watch(self, before_update: Callable[[int], None], settle: Callable[[], None]) -> None:
        """Call `before_update(bucket)` before a bucket's values at rest change in a step, and
        `settle()`, once, before they change or move otherwise."""
        self._resources.opened().updates.before_update = before_update
        self._settle_watch = settle

    def end_watch(self) -> None:
        """Values are about to change or to move: whoever watches is to settle."""
        settle, self._settle_watch = self._settle_watch, None
        if settle is not None:
            settle()
            if self._resources.windows is not None:
                self._resources.windows.updates.before_update = None

    # Setting

    def set_master(self, pid: int, value: Value) -> None:
        """Set a parameter: its master and, rounded from that, its weight."""
        self._can_change()
        home, spec = self._resources.store.find(pid)
        home.set_value(spec, value)

    def set_moments(self, pid: int, exp_avg: Value, exp_avg_sq: Value) -> None:
        """Set both moments.

        Raises:
            LohanError: the parameter is frozen.
        """
        self._can_change()
        home, spec = self._resources.store.find(pid)
        home.store(spec, ("exp_avg",), exp_avg)
        home.store(spec, ("exp_avg_sq",), exp_avg_sq)

    def reset_moments(self) -> None:
        """Both moments of every parameter to zero, steps to 0: where a new optimizer starts."""
        self._can_change()
        for home in self._resources.store.homes.values():
            if home.bucket.trainable:
                home.zero_moments()
        self.step_count = 0

    def _can_change(self) -> None:
        self.end_watch()
        self._passes.quiet()

    def begin_restore(self) -> None:
        """From here on the values are those of no step, until `end_restore`.

        Raises:
            TrainingLoopError: gradients wait for step().
        """
        self._can_change()
        if self._resources.gradients_pending:
            raise TrainingLoopError(
                "a checkpoint cannot be loaded between backward and opt.step(); call opt.step() first"
            )
        self._progress.torn = (
            "loading a checkpoint stopped in the middle, so the weights are a mixture; load it "
            "again"
        )

    def end_restore(self, steps: Mapping[int, int]) -> None:
        """Everything has been set; `steps` are step counts by pid, others stay."""
        for pid, value in steps.items():
            self.set_steps(pid, value)
        self._progress.torn = self._progress.lost = None

    # Step counts

    @property
    def step_count(self) -> int:
        """Optimizer steps made. Setting it says that a checkpoint has been loaded, all of whose
        parameters have been updated so often; see set_steps()."""
        return self._progress.step_count

    @step_count.setter
    def step_count(self, value: int) -> None:
        self._progress.step_count = value
        self._progress.steps.clear()
        for home in self._resources.store.homes.values():
            self._progress.steps.update({spec.pid: value for spec in home.bucket.params})
        self._progress.torn = self._progress.lost = None

    def steps(self, pid: int) -> int:
        """Updates that a parameter has had: those steps in which it had a gradient."""
        return self._progress.steps[pid]

    def set_steps(self, pid: int, value: int) -> None:
        """As a checkpoint has it; step_count becomes the most that a parameter has had."""
        self._progress.steps[pid] = value
        self._progress.step_count = max(self._progress.steps.values())
        self._progress.torn = self._progress.lost = None
