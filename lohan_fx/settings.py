"""What the caller of `compile` chose, as one value."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from .budget import Budget
from .hardware import Hardware
from .pins import Pins
from .plan import Plan
from .planner import Capacities, Forced, Problem, Solution

Policy = str | Callable[[Problem, Forced], Solution]


@dataclass(frozen=True, slots=True)
class Settings:
    """What the caller of `compile` chose, resolved and checked."""

    model_name: str
    device: torch.device
    budget: Budget
    capacities: Capacities
    hardware: Hardware
    overlap: str
    policy: Policy
    lowering: str
    plan: Plan | None = None
    profile: str = "auto"  # see api.PROFILES
    plan_only: bool = False
    trace_only: bool = False  # no plan either: `Session.traced` is what is wanted
    pin: Pins = field(default_factory=dict)
    max_writes_per_day: int | None = None  # bytes to SSD
    poison: bool = False
    bucket_numel: int | None = None
    verify_io: bool = False
