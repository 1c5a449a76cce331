"""What Dynamo is told around a compiled call, and what its errors mean to the user."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils._pytree import keystr, tree_flatten_with_path

from lohan_fx.errors import CaptureError, LohanError, TrainingLoopError

from .capture import graph_break_line, misplaced_input, unwrap

# Sets of input shapes that one model may be called with; each is compiled and planned by itself.
MAX_PROGRAMS = 64


@contextmanager
def compiler_settings() -> Iterator[None]:
    """Dynamo settings for whole steps: transformers' log lines are left out, shapes may be many."""
    ignored = set(torch._dynamo.config.ignore_logging_functions)
    hf_logging = sys.modules.get("transformers.utils.logging")
    if hf_logging is not None:
        logger = type(hf_logging.get_logger("transformers"))
        for name in ("warning_once", "warning_advice", "warning", "info", "debug"):
            ignored.add(getattr(logger, name, None))
        ignored.add(getattr(hf_logging, "warning_once", None))
        ignored.discard(None)
    with torch._dynamo.config.patch(
        ignore_logging_functions=_Functions(ignored),
        recompile_limit=max(MAX_PROGRAMS, torch._dynamo.config.recompile_limit),
    ):
        yield


class _Functions(str):
    """A set of functions that is text to JSON: Dynamo 2.11 writes its settings down, sets sorted."""

    _members: frozenset[object]

    def __new__(cls, members: Iterable[object]) -> _Functions:
        self = super().__new__(cls, "functions that log")
        self._members = frozenset(members)
        return self

    def __iter__(self) -> Iterator[Any]:
        return iter(self._members)

    def __contains__(self, item: object) -> bool:
        return item in self._members


class LeftToEager(CaptureError):
    """The compiled call ran as plain Python; nothing has been read yet."""


_NOT_COMPILED = (
    "torch.compile left this call to eager PyTorch, where parameters have no bytes: it is switched off "
    "(TORCHDYNAMO_DISABLE, torch.compiler.set_stance) or a TorchDispatchMode such as FlopCounterMode is "
    "active; leave that for the forward"
)


def own_code(model: torch.nn.Module) -> Callable[..., Any]:
    """The model's call, hooks included, as a function whose code no other model shares.

    Dynamo keeps compiled entries by code object, up to a limit, and tries each in turn.
    """

    def step(*args: Any, **kwargs: Any) -> Any:
        if not torch.compiler.is_compiling():  # eager kernels would read parameters without bytes
            raise LeftToEager(_NOT_COMPILED)
        return model._call_impl(*args, **kwargs)  # type: ignore[no-untyped-call]

    step.__code__ = step.__code__.replace(co_name=f"step_of_{type(model).__name__}")
    return step


def refuse_autograd_modes() -> None:
    """Raise TrainingLoopError under a mode of autograd that would take the step apart."""
    if torch._C._autograd._top_saved_tensors_default_hooks(True) is not None:
        raise TrainingLoopError(
            "saved-tensor hooks (save_on_cpu, saved_tensors_hooks) are active around the forward; the "
            "plan already decides where each saved tensor goes, so leave that context"
        )
    compiled = torch._dynamo.compiled_autograd.compiled_autograd_enabled
    if compiled or torch._dynamo.config.compiled_autograd:
        raise TrainingLoopError(
            "compiled autograd would trace the planned backward anew and lose its order; turn it off "
            "(torch._dynamo.config.compiled_autograd = False) for this model"
        )


def misplaced(
    error: Exception, args: tuple[Any, ...], kwargs: Mapping[str, Any], device: torch.device
) -> Exception:
    """A CaptureError that names an argument on another device, where there is one; else `error`."""
    numbered: dict[Any, Any] = {**dict(enumerate(args, start=1)), **kwargs}
    for (first, *rest), value in tree_flatten_with_path(numbered)[0]:
        if isinstance(value, torch.Tensor) and value.dim() and value.device.type != device.type:
            name = "argument " + keystr((first,)).strip("[]")
            return misplaced_input(name + keystr(tuple(rest)), value, device)
    return error


def explained(error: Exception) -> Exception:
    """The error a user should see for what came out of torch.compile."""
    inner = unwrap(error)
    if isinstance(inner, LohanError):
        return inner
    if isinstance(error, torch._dynamo.exc.FailOnRecompileLimitHit):
        return CaptureError(
            f"the model has been called with more than {MAX_PROGRAMS} sets of input shapes (or of other "
            "arguments), each of which is compiled by itself; pad inputs to a few lengths"
        )
    if isinstance(error, torch._dynamo.exc.Unsupported):
        line = graph_break_line(error)
        first = str(error).strip().splitlines()[0]
        return CaptureError(
            f"the model cannot be captured as one graph: {first}"
            + (f"\n  at {line}" if line else "")
            + "\nlohan_fx plans whole steps; move this out of forward(), or rewrite it with torch "
            "operations"
        )
    return error
