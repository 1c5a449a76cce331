"""Which overlap mode a training step is planned for, and what goes with none of the others."""

from __future__ import annotations

from .errors import LohanError
from .optim import Adam, loss_scalers
from .planner import Overlap, default_overlap
from .settings import Settings


def overlap_for(
    settings: Settings, optimizer: Adam | None, *, before: Overlap | None, accumulates: bool
) -> Overlap:
    """The mode that was chosen; for "auto" the one that the optimizer, loss scaling and the policy need.

    Args:
        before: what training steps have been planned for already.
        accumulates: whether gradients of several backwards are summed, which leaves nothing to be
            updated before step().

    Raises:
        LohanError: the optimizer cannot be used in the mode that was chosen.
    """
    chosen, policy = settings.overlap, settings.policy
    if chosen != "auto":
        check_overlap(chosen, optimizer)
        return _summing(Overlap(chosen), accumulates)
    waits = optimizer is not None and (optimizer.waits is not None or bool(loss_scalers))
    waited = before is not None and before.waits_for_step
    own = default_overlap(policy) if isinstance(policy, str) else None
    # Once it waits it goes on so: changing back and forth would compile every time.
    if own is not None and (own.waits_for_step or not (waits or waited)):
        return own
    if not (waits or waited):
        return Overlap.BACKWARD
    for known in (before, None if settings.plan is None else Overlap(settings.plan.overlap)):
        if known is not None and known.waits_for_step:
            return _summing(known, accumulates)
    return Overlap.NEXT_FORWARD


def _summing(mode: Overlap, accumulates: bool) -> Overlap:
    return Overlap.NEXT_FORWARD if accumulates and mode is Overlap.SPECULATIVE else mode


def may_speculate(settings: Settings, before: Overlap | None, *, training: bool) -> bool:
    """Is it open which buckets of a step that waits for step() speculate, and with "auto" if any do?"""
    policy, waited = settings.policy, before is not None and before.waits_for_step
    if settings.plan is not None or waited or not isinstance(policy, str):
        return False
    if settings.overlap == "auto":
        return training and default_overlap(policy) is None
    return settings.overlap == Overlap.SPECULATIVE


def check_overlap(chosen: str, optimizer: Adam | None) -> None:
    """Raise LohanError for an optimizer that needs every gradient first, in a mode that has not."""
    if optimizer is None or optimizer.waits is None or chosen == "auto":
        return
    if not Overlap(chosen).waits_for_step:
        raise LohanError(
            f"{optimizer.waits} needs all gradients before the first update, which "
            f'overlap={chosen!r} does not allow; use overlap="next-forward" or "auto"'
        )
