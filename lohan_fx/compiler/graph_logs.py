"""Logs of AOTAutograd's graphs, left out where nobody reads them.

AOTAutograd prints the joint, forward and backward graphs of every step for its logs, whether or not these
are on; of a deep model, that takes as long as to plan it.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch._functorch._aot_autograd import graph_compile
from torch._logging._internal import trace_log

# What logs graphs: its name, what it is said to return (the graphs as text), and what it may return then.
_PRINTS: tuple[tuple[str, str, Any], ...] = (
    ("_log_joint_graph", "str | None", None),
    ("_log_fw_bw_graphs", "tuple[str | None, str | None]", (None, None)),
)


@contextmanager
def unread_logs_left_out() -> Iterator[None]:
    """Within, AOTAutograd prints no graphs, unless its logs or torch's trace are on.

    To be used under Dynamo's lock: it holds for all threads.
    """
    replaced = {}
    if not _are_read():
        for name, returns, nothing in _PRINTS:
            function = getattr(graph_compile, name, None)
            if function is not None and _returns(function) == returns:
                replaced[name] = function
                setattr(graph_compile, name, _returning(nothing))
    try:
        yield
    finally:
        for name, function in replaced.items():
            setattr(graph_compile, name, function)


def _are_read() -> bool:
    logs = [value for value in vars(graph_compile).values() if isinstance(value, logging.Logger)]
    return bool(trace_log.handlers) or any(log.isEnabledFor(logging.INFO) for log in logs)


def _returns(function: Any) -> str:
    return str(inspect.signature(function).return_annotation)


def _returning(value: Any) -> Any:
    def log(*args: Any, **options: Any) -> Any:
        return value

    return log
