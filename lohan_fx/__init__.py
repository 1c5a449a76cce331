"""Fine-tune models far larger than your GPU: one memory budget, three tiers, exact numbers."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

# Public name -> module. Nothing is imported before it is used: `import lohan_fx` loads no torch.
_PUBLIC = {
    "Adam": "optim",
    "AdamW": "optim",
    "Budget": "budget",
    "BudgetError": "errors",
    "CaptureError": "errors",
    "CompiledModel": "api",
    "GradScaler": "scaling",
    "InfeasiblePlan": "errors",
    "LohanError": "errors",
    "NativeUnavailable": "errors",
    "PassError": "errors",
    "Plan": "plan",
    "PlanMismatch": "errors",
    "Trace": "tracing",
    "TrainingLoopError": "errors",
    "TransferError": "errors",
    "Explanation": "explanation",
    "compile": "api",
    "explain": "explanation",
    "live": "liveline",
    "load": "checkpoint",
    "make_plan": "api",
    "save": "checkpoint",
}

__all__ = sorted([*_PUBLIC, "__version__"])


def __getattr__(name: str) -> Any:
    module = _PUBLIC.get(name)
    if module is None:
        raise AttributeError(f"module 'lohan_fx' has no attribute {name!r}")
    value = getattr(importlib.import_module(f".{module}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__


if TYPE_CHECKING:
    from .api import CompiledModel, compile, make_plan
    from .budget import Budget
    from .checkpoint import load, save
    from .errors import (
        BudgetError,
        CaptureError,
        InfeasiblePlan,
        LohanError,
        NativeUnavailable,
        PassError,
        PlanMismatch,
        TrainingLoopError,
        TransferError,
    )
    from .explanation import Explanation, explain
    from .liveline import live
    from .optim import Adam, AdamW
    from .plan import Plan
    from .scaling import GradScaler
    from .tracing import Trace
