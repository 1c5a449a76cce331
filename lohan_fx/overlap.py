"""Which overlap mode a training step is planned for, and what goes with none of the others."""

from __future__ import annotations

from .errors import LohanError
from .optim import Adam, loss_scalers
from .planner import Overlap, default_overlap
from .settings import Settings


def overlap_for(settings: Settings, optimizer: Adam | None, *, waited: bool) -> Overlap:
    """The mode that was chosen; for "auto" the one that the optimizer, loss scaling and the policy need.

    `waited`: training steps have been planned to wait for step() before.

    Raises:
        LohanError: the optimizer cannot be used in the mode that was chosen.
    """
    chosen, policy = settings.overlap, settings.policy
    if chosen != "auto":
        check_overlap(chosen, optimizer)
        return Overlap(chosen)
    waits = optimizer is not None and (optimizer.waits is not None or bool(loss_scalers))
    own = default_overlap(policy) if isinstance(policy, str) else None
    # Once it waits it goes on so: changing back and forth would compile every time.
    if own is not None and (own.waits_for_step or not (waits or waited)):
        return own
    return Overlap.NEXT_FORWARD if waits or waited else Overlap.BACKWARD


def check_overlap(chosen: str, optimizer: Adam | None) -> None:
    """Raise LohanError for an optimizer that needs every gradient first, in a mode that has not."""
    if optimizer is None or optimizer.waits is None or chosen == "auto":
        return
    if not Overlap(chosen).waits_for_step:
        raise LohanError(
            f"{optimizer.waits} needs all gradients before the first update, which "
            f'overlap={chosen!r} does not allow; use overlap="next-forward" or "auto"'
        )
