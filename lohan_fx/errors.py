"""Errors raised on purpose, as one tree.

LohanError
  + BudgetError         a budget that cannot be read, or a directory in it that cannot be used
  + CaptureError        the model cannot be turned into one graph; names the line
  + PassError           a rewriting pass failed or broke an invariant of the graph
  + InfeasiblePlan      no plan fits the budget; says by how much, per tier
  + PlanMismatch        a plan made for another graph or machine
  + TrainingLoopError   the loop called things in an order that would give wrong numbers
  + TransferError       a read, write or wait failed; carries path, offset and errno
  + NativeUnavailable   the compiled part is missing; says how to build it
"""

from __future__ import annotations


class LohanError(Exception):
    """Base of every error this package raises on purpose."""


class BudgetError(LohanError):
    """A budget that cannot be read, or names a directory that cannot be used."""


class CaptureError(LohanError):
    """The model cannot be turned into one graph."""


class PassError(LohanError):
    """A rewriting pass failed or left a graph that breaks an invariant."""


class InfeasiblePlan(LohanError):
    """No plan fits the budget."""


class PlanMismatch(LohanError):
    """This plan was made for another graph or machine."""


class TrainingLoopError(LohanError):
    """The training loop called things in an order that would give wrong numbers."""


class TransferError(LohanError):
    """A read, a write or a wait for one failed.

    `path`, `offset` (bytes into the file) and `errno` say where and why; unknown ones are None.
    """

    def __init__(
        self,
        message: str,
        *,
        path: str | None = None,
        offset: int | None = None,
        errno: int | None = None,
    ) -> None:
        super().__init__(message)
        self.path = path
        self.offset = offset
        self.errno = errno


class NativeUnavailable(LohanError):
    """The compiled part of the package is missing or does not load."""
