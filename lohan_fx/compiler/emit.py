"""A straight-line FX graph as Python source that drops every value right after its last use.

The function takes one list, empties it, and hands a boxed callee (a region) its arguments in a list
that is their only reference where they die there, so the callee frees them as it goes.
"""

from __future__ import annotations

import itertools
import keyword
import linecache
import math
import operator
import re
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import fx

from lohan_fx.errors import PassError
from lohan_fx.ops import Watcher, is_move

Boxed = Callable[[list[Any]], Sequence[Any]]

_files = itertools.count(1)


@dataclass(frozen=True, slots=True)
class Emitted:
    """A generated function and the text it was made from; tracebacks show that text."""

    run: Boxed
    source: str


class _Globals:
    """Names for everything the source refers to that is not a literal; never a node's name."""

    def __init__(self, taken: set[str]) -> None:
        self._taken = taken
        self._name_of: dict[int, str] = {}
        self.values: dict[str, object] = {}

    def name(self, value: object, hint: str) -> str:
        known = self._name_of.get(id(value))
        if known is not None:
            return known
        base = re.sub(r"\W+", "_", hint).strip("_") or "value"
        if base[0].isdigit() or keyword.iskeyword(base):
            base = f"_{base}"
        name = base
        for number in itertools.count(1):
            if name not in self._taken:
                break
            name = f"{base}_{number}"
        self._taken.add(name)
        self._name_of[id(value)] = name
        self.values[name] = value  # also keeps the id valid
        return name


def op_hint(target: object) -> str:
    """A readable name for a call target: fetch, aten_add_Tensor, run_with_rng_state."""
    namespace = getattr(target, "namespace", None)
    if namespace == "lohan":
        return str(target).split(".")[1]
    if namespace is not None:
        return str(target)
    return str(getattr(target, "__name__", type(target).__name__))


class _Emitter:
    def __init__(
        self,
        graph: fx.Graph,
        name: str,
        boxed: Mapping[fx.Node, Boxed],
        attributes: Mapping[str, object],
        watcher: Callable[[], Watcher | None] | None,
    ) -> None:
        self.name = name
        self.boxed = boxed
        self.attributes = attributes
        self.nodes = list(graph.nodes)
        taken = {node.name for node in self.nodes} | {name, "args", "inputs", "told"}
        self.globals = _Globals(taken)
        self.watcher = watcher
        self.names: dict[fx.Node, str] = {node: node.name for node in self.nodes}
        self.lines: list[str] = []
        self.dies_at: dict[fx.Node, list[fx.Node]] = {}

    def argument(self, value: Any) -> str:
        if isinstance(value, fx.Node):
            return self.names[value]
        if isinstance(value, tuple):
            inner = ", ".join(self.argument(item) for item in value)
            return f"({inner},)" if len(value) == 1 else f"({inner})"
        if isinstance(value, list):
            return f"[{', '.join(self.argument(item) for item in value)}]"
        if isinstance(value, dict):
            items = (f"{key!r}: {self.argument(item)}" for key, item in value.items())
            return f"{{{', '.join(items)}}}"
        if isinstance(value, slice):
            parts = (self.argument(part) for part in (value.start, value.stop, value.step))
            return f"slice({', '.join(parts)})"
        if value is None or type(value) in (bool, int, str):
            return repr(value)
        if type(value) is float and math.isfinite(value):
            return repr(value)
        return self.globals.name(value, str(value)[:40])

    def call(self, node: fx.Node) -> str:
        if node.target is operator.getitem:
            source, index = node.args
            return f"{self.argument(source)}[{self.argument(index)}]"
        function = self.globals.name(node.target, op_hint(node.target))
        arguments = [self.argument(value) for value in node.args]
        arguments += [f"{key}={self.argument(value)}" for key, value in node.kwargs.items()]
        return f"{function}({', '.join(arguments)})"

    def line(self, text: str, node: fx.Node) -> None:
        stage = node.meta.get("lohan_stage")
        self.lines.append(text if stage is None else f"{text}  # stage {stage}")

    def find_last_uses(self) -> None:
        unpacked = self._unpacked()
        last: dict[fx.Node, fx.Node] = {}
        for node in self.nodes:
            if node.op in ("placeholder", "call_function"):
                last[node] = node
            for source in node.all_input_nodes:
                if source in last:
                    last[source] = node
        for node, reader in last.items():
            if node in self.boxed:
                continue  # its results are unpacked at once; the tuple itself has no name
            if reader is node and node in unpacked:
                reader = unpacked[node]
            self.dies_at.setdefault(reader, []).append(node)

    def _unpacked(self) -> dict[fx.Node, fx.Node]:
        """Result of a boxed call -> that call."""
        return {
            node: node.args[0]
            for node in self.nodes
            if node.op == "call_function"
            and node.target is operator.getitem
            and isinstance(node.args[0], fx.Node)
            and node.args[0] in self.boxed
        }

    def tell(self, what: str) -> None:
        if self.watcher is not None:
            self.lines.append(f"told.{what}")

    def boxed_call(self, node: fx.Node, results: Sequence[fx.Node]) -> None:
        function = self.globals.name(self.boxed[node], op_hint(node.target))
        ends = self.dies_at.get(node, [])
        given = [value.name for value in ends if value not in results]
        unread = [value.name for value in ends if value in results]
        self.lines.append(f"inputs = [{', '.join(self.argument(value) for value in node.args)}]")
        if given:
            self.lines.append(f"del {', '.join(given)}")
        names = ", ".join(value.name for value in results)
        left = f"{names}{',' if len(results) == 1 else ''} = " if results else ""
        self.tell(f"enter_stage({node.meta.get('lohan_stage') or 0})")
        self.line(f"{left}{function}(inputs)", node)
        self.tell("leave()")
        if unread:
            self.lines.append(f"del {', '.join(unread)}")

    def emit(self) -> Emitted:
        self.find_last_uses()
        unpacked = self._unpacked()
        results_of: dict[fx.Node, list[fx.Node]] = {node: [] for node in self.boxed}
        for node, producer in unpacked.items():
            results_of[producer].append(node)
        inputs = [node for node in self.nodes if node.op == "placeholder"]
        if inputs:
            comma = "," if len(inputs) == 1 else ""
            self.lines.append(f"{', '.join(node.name for node in inputs)}{comma} = args")
        self.lines.append("args.clear()")
        if self.watcher is not None:
            self.lines.append(f"told = {self.globals.name(self.watcher, 'watcher')}()")
        unused = [node.name for node in inputs if node in self.dies_at.get(node, ())]
        if unused:
            self.lines.append(f"del {', '.join(unused)}")

        for node in self.nodes:
            if node.op == "placeholder" or node in unpacked:
                self._drop_after(node)
                continue
            if node.op == "get_attr":
                value = self.attributes[str(node.target)]
                self.names[node] = self.globals.name(value, str(node.target))
                continue
            if node.op == "output":
                self.lines.append(f"return {self.argument(_as_list(node.args[0]))}")
                continue
            if node.op != "call_function":
                raise PassError(f"{node.name} is a {node.op}; only call_function can be lowered")
            if node in self.boxed:
                results = results_of[node]
                wanted = [_result_index(result) for result in results]
                if wanted != list(range(len(wanted))):
                    raise PassError(f"results {wanted} of {node.name} are not unpacked in order")
                self.boxed_call(node, results)
                continue
            dying = self.dies_at.get(node, [])
            move = _move_in_pass(node)
            if move is not None:
                self.tell(f"enter_move({move[0]!r}, {move[1]})")
            if node in dying:  # nobody reads it
                self.line(self.call(node), node)
            else:
                self.line(f"{node.name} = {self.call(node)}", node)
            if move is not None:
                self.tell("leave()")
            self._drop_after(node)

        body = "".join(f"    {line}\n" for line in self.lines)
        source = f"def {self.name}(args):\n{body}"
        return Emitted(_load(source, self.name, self.globals.values), source)

    def _drop_after(self, node: fx.Node) -> None:
        names = [value.name for value in self.dies_at.get(node, ()) if value is not node]
        if names:
            self.lines.append(f"del {', '.join(names)}")


def _as_list(value: Any) -> list[Any]:
    return list(value) if isinstance(value, (list, tuple)) else [value]


def _move_in_pass(node: fx.Node) -> tuple[str, int] | None:
    """A move's op and what it moves; None for other nodes, and for what begins or ends a pass."""
    if not is_move(node) or len(node.args) < 2 or not isinstance(node.args[1], int):
        return None
    op = op_hint(node.target)
    return None if op == "begin" else (op, node.args[1])


def _result_index(node: fx.Node) -> int:
    index = node.args[1]
    assert isinstance(index, int)
    return index


def _load(source: str, name: str, values: dict[str, object]) -> Boxed:
    filename = f"<lohan_fx {name} {next(_files)}>"
    scope: dict[str, Any] = dict(values)
    exec(compile(source, filename, "exec"), scope)
    function: Boxed = scope.pop(name)
    lines = source.splitlines(keepends=True)
    linecache.cache[filename] = (len(source), None, lines, filename)
    weakref.finalize(function, linecache.cache.pop, filename, None)
    return function


def emit(
    graph: fx.Graph,
    *,
    name: str,
    boxed: Mapping[fx.Node, Boxed] | None = None,
    attributes: Mapping[str, object] | None = None,
    watcher: Callable[[], Watcher | None] | None = None,
) -> Emitted:
    """`graph` as a function of one list of its inputs, which it empties; returns a list.

    `boxed` gives the callee of each call that takes its arguments as one list and whose results are
    the getitems that follow it; `attributes` holds the values of the graph's get_attr nodes. With a
    `watcher`, the function asks for one when it begins, and tells it of each region and each move.
    Raises PassError for calls of methods and modules.
    """
    return _Emitter(graph, name, boxed or {}, attributes or {}, watcher).emit()
