"""AOTAutograd prints graphs only for logs that are read."""

from __future__ import annotations

import pytest
from torch._functorch._aot_autograd import graph_compile
from torch._logging._internal import trace_log

from lohan_fx.compiler.graph_logs import unread_logs_left_out


def test_graphs_are_printed_for_logs_that_are_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trace_log, "handlers", [])
    prints = graph_compile._log_fw_bw_graphs
    found = []
    for on in (False, True):
        monkeypatch.setattr(graph_compile.aot_graphs_log, "isEnabledFor", lambda level, on=on: on)
        with unread_logs_left_out():
            found.append(graph_compile._log_fw_bw_graphs)
    assert found[0] is not prints
    assert found[1] is prints is graph_compile._log_fw_bw_graphs
