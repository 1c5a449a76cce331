"""A rewritten graph cut into moves, in unchanged order, and calls of regions of pure compute.

A region ends at a lohan op and at a change of stage. Regions that compute the same from inputs of the
same shapes are one Region, so that each is compiled once: layers of a model differ in nothing else,
once random seeds are looked up outside and constants are made inside.
"""

from __future__ import annotations

import hashlib
import operator
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import torch
import torch._inductor.inductor_prims  # defines the seed prims named below
from torch import fx
from torch.fx.node import map_arg

from lohan_fx.errors import PassError
from lohan_fx.ops import is_move

from .values import view_source

_prims = torch.ops.prims
_aten = torch.ops.aten

SEED_OPS = frozenset(
    {
        _prims.inductor_seed.default,
        _prims.inductor_seeds.default,
        _prims.inductor_lookup_seed.default,
    }
)
# Made again in every region that reads them: cheaper than a value kept alive across regions.
CONSTANT_OPS = frozenset(
    {
        _aten.full.default,
        _aten.scalar_tensor.default,
        _aten.arange.default,
        _aten.arange.start,
        _aten.arange.start_step,
        _aten.zeros.default,
        _aten.ones.default,
        _prims.iota.default,
    }
)
# Kernels assume what the example showed about the alignment of their inputs.
_ALIGNED_BYTES = 16


@dataclass(eq=False)
class Region:
    """Pure compute: a graph from `inputs` to a tuple of `outputs`, both lists of fake values.

    `attributes` holds the submodules its get_attr nodes name. `key` is equal for regions that one
    compiled function can serve. As the target of an FX call it runs node by node.
    """

    index: int
    key: str
    graph: fx.Graph
    inputs: tuple[Any, ...]
    outputs: tuple[Any, ...]
    attributes: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        # What FX prints for a call target.
        self.__name__ = self.__qualname__ = f"region_{self.index}"
        self.__module__ = __name__

    @property
    def name(self) -> str:
        return self.__name__

    @property
    def results(self) -> tuple[fx.Node, ...]:
        """The nodes of its graph that `outputs` are the values of."""
        return cast(tuple[fx.Node, ...], self.graph.output_node().args[0])

    def module(self) -> fx.GraphModule:
        """The region as a module with a graph of its own, which may be rewritten."""
        graph = fx.Graph()
        values: dict[fx.Node, fx.Node] = {}
        output = graph.graph_copy(self.graph, values)
        graph.output(output)
        old = self.graph.output_node()
        graph.output_node().meta = dict(old.meta)
        return fx.GraphModule(dict(self.attributes), graph)

    def __call__(self, *args: Any) -> Any:
        return fx.Interpreter(self.module()).run(*args)


@dataclass(frozen=True, slots=True)
class Cut:
    """A skeleton graph: moves, views and calls whose target is a Region, each followed by getitems.

    `regions` are the distinct ones in order of first call; `attributes` are the graph's constants.
    """

    graph: fx.Graph
    regions: tuple[Region, ...]
    num_regions: int
    attributes: Mapping[str, Any]


def region_of(node: fx.Node) -> Region | None:
    """The region that a node of a skeleton graph calls."""
    if node.op == "call_function" and isinstance(node.target, Region):
        return node.target
    return None


def cut(module: fx.GraphModule) -> Cut:
    """Group the compute of `module` into regions; `module` is left as it is.

    Nodes carry meta["val"] and meta["lohan_stage"]; one without a stage belongs to the current one.
    Raises PassError for symbolic sizes and for nodes that are no function calls.
    """
    return _Cutter(module).run()


def getitems_after_producers(graph: fx.Graph) -> Iterator[fx.Node]:
    """Nodes in order, but each getitem directly after the node it unpacks."""
    for node in graph.nodes:
        if _unpacks(node):
            continue
        yield from _with_getitems(node)


def _with_getitems(node: fx.Node) -> Iterator[fx.Node]:
    yield node
    for user in _in_graph_order(user for user in node.users if _unpacks(user)):
        yield from _with_getitems(user)


def _in_graph_order(nodes: Iterable[fx.Node]) -> list[fx.Node]:
    return sorted(nodes)  # fx.Node compares by position


def _unpacks(node: fx.Node) -> bool:
    return node.target is operator.getitem and isinstance(node.args[0], fx.Node)


class _Cutter:
    def __init__(self, module: fx.GraphModule) -> None:
        self.module = module
        self.old = module.graph
        self.new = fx.Graph()
        self.attributes: dict[str, Any] = {}
        self.values: dict[fx.Node, fx.Node] = {}  # old node -> new node
        self.regions: dict[str, Region] = {}
        self.num_regions = 0
        self.group: list[fx.Node] = []
        self.group_is_random = False
        self.stage: int | None = None
        self.live = _live_nodes(self.old)

    def run(self) -> Cut:
        for node in getitems_after_producers(self.old):
            _check(node)
            if node not in self.live or self.is_lazy(node):
                continue
            if node.op == "call_function":
                self.visit_call(node)
            else:
                if node.op == "output":
                    self.flush()
                self.copy(node)
        self.new.lint()
        return Cut(self.new, tuple(self.regions.values()), self.num_regions, self.attributes)

    def visit_call(self, node: fx.Node) -> None:
        if is_move(node) or self.unpacks_a_move(node):
            self.flush()
            self.copy(node)
            return
        if node.target in SEED_OPS:
            # Ahead of the region it would interrupt, unless that draws random numbers too.
            computed_here = any(source in self.group for source in node.all_input_nodes)
            if computed_here or (self.group_is_random and _is_random(node)):
                self.flush()
            self.copy(node)
            return
        stage = node.meta.get("lohan_stage", self.stage)
        # What unpacks a tuple stays with it, whatever its stage says.
        if stage != self.stage and not _unpacks(node):
            self.flush()
            self.stage = stage
        self.group.append(node)
        self.group_is_random = self.group_is_random or _is_random(node)

    def unpacks_a_move(self, node: fx.Node) -> bool:
        return _unpacks(node) and is_move(node.all_input_nodes[0])

    def is_lazy(self, node: fx.Node) -> bool:
        """Constants and submodules are copied to where they are read."""
        if node.op == "get_attr":
            return isinstance(self.attribute(node), torch.nn.Module)
        return node.target in CONSTANT_OPS and not node.all_input_nodes

    def attribute(self, node: fx.Node) -> Any:
        value: Any = self.module
        for name in str(node.target).split("."):
            value = getattr(value, name)
        return value

    def copy(self, node: fx.Node) -> fx.Node:
        """Put `node` into the skeleton as it is."""
        if node.op == "get_attr":
            self.attributes[str(node.target)] = self.attribute(node)
        copied = self.new.create_node(
            node.op,
            node.target,
            map_arg(node.args, self.value),
            map_arg(node.kwargs, self.value),
            name=node.name,
        )
        copied.meta = dict(node.meta)
        self.values[node] = copied
        return copied

    def value(self, node: fx.Node) -> fx.Node:
        if node not in self.values:
            if not self.is_lazy(node):
                raise PassError(f"{node.name} is read before it is computed")
            self.copy(node)
        return self.values[node]

    def flush(self) -> None:
        """Close the current region."""
        group, self.group, self.group_is_random = self.group, [], False
        if not group:
            return
        if all(_is_free(node) for node in group):
            for node in group:
                self.copy(node)
            return
        region, inputs, outputs = self.region(group)
        self.num_regions += 1
        call = self.new.create_node(
            "call_function",
            region,
            tuple(self.value(node) for node in inputs),
            name=f"{region.name}_call",
        )
        call.meta["val"] = tuple(node.meta.get("val") for node in outputs)
        call.meta["lohan_stage"] = self.stage
        for index, node in enumerate(outputs):
            result = self.new.create_node(
                "call_function", operator.getitem, (call, index), name=node.name
            )
            result.meta = dict(node.meta)
            self.values[node] = result

    def region(self, group: Sequence[fx.Node]) -> tuple[Region, list[fx.Node], list[fx.Node]]:
        """The region that computes `group`, with its inputs and outputs among the old nodes."""
        members = set(group)
        graph = fx.Graph()
        inside: dict[fx.Node, fx.Node] = {}
        attributes: dict[str, Any] = {}
        inputs = []
        for node in group:
            for source in node.all_input_nodes:
                if source in members or self.is_lazy(source) or source in inside:
                    continue
                inputs.append(source)
                inside[source] = graph.placeholder(f"in{len(inputs) - 1}")
                inside[source].meta = {"val": source.meta.get("val")}

        def add(node: fx.Node) -> fx.Node:
            if node.op == "get_attr":
                target: Any = f"module{len(attributes)}"
                attributes[target] = self.attribute(node)
            else:
                target = node.target
            args, kwargs = map_arg(node.args, read), map_arg(node.kwargs, read)
            name = f"n{len(inside) - len(inputs)}"
            inside[node] = graph.create_node(node.op, target, args, kwargs, name=name)
            inside[node].meta = dict(node.meta)
            return inside[node]

        def read(node: fx.Node) -> fx.Node:
            return inside[node] if node in inside else add(node)

        for node in group:
            add(node)
        outputs = [
            node for node in group if any(u not in members and u in self.live for u in node.users)
        ]
        for node in outputs:
            if isinstance(node.meta.get("val"), (tuple, list)):
                raise PassError(
                    f"{node.name} is a tuple that is read as a whole outside its region"
                )
        graph.output(tuple(inside[node] for node in outputs))
        key = _key(graph, attributes)
        if key not in self.regions:
            self.regions[key] = Region(
                len(self.regions),
                key,
                graph,
                tuple(node.meta.get("val") for node in inputs),
                tuple(node.meta.get("val") for node in outputs),
                attributes,
            )
        return self.regions[key], inputs, outputs


def _check(node: fx.Node) -> None:
    if node.op not in ("placeholder", "get_attr", "call_function", "output"):
        raise PassError(f"{node.name} is a {node.op}; only call_function can be lowered")
    if _is_random_state(node) or _saves_random_state(node):
        return
    value = node.meta.get("val")
    for item in value if isinstance(value, (list, tuple)) else (value,):
        if is_symbolic(item):
            raise PassError(
                f"{node.name} has a symbolic size ({item}); "
                "pad to fixed shapes and compile with dynamic=False"
            )


def is_symbolic(value: Any) -> bool:
    """True for a symbolic number and for a tensor with one in its shape."""
    if isinstance(value, torch.Tensor):
        return any(map(is_symbolic, (*value.shape, *value.stride(), value.storage_offset())))
    return isinstance(value, (torch.SymInt, torch.SymFloat, torch.SymBool))


def _saves_random_state(node: fx.Node) -> bool:
    return getattr(node.target, "__name__", "") == "run_and_save_rng_state"


def _is_random_state(node: fx.Node) -> bool:
    """True for a saved state of the CPU's generator; torch gives it a symbolic size."""
    if _unpacks(node):
        return bool(node.args[1] == 0) and _saves_random_state(node.all_input_nodes[0])
    restores = [getattr(user.target, "__name__", "") == "run_with_rng_state" for user in node.users]
    return node.op == "placeholder" and bool(restores) and all(restores)


def _live_nodes(graph: fx.Graph) -> set[fx.Node]:
    """Nodes that have an effect, or that one of these reads."""
    live: set[fx.Node] = set()
    for node in reversed(graph.nodes):
        if node.is_impure() or node.op == "output" or any(user in live for user in node.users):
            live.add(node)
    return live


def _is_random(node: fx.Node) -> bool:
    return torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ())


def _is_free(node: fx.Node) -> bool:
    """Views and the tuples they come in: no kernel runs."""
    if view_source(node) is not None:
        return True
    return node.target is operator.getitem and _is_free(node.all_input_nodes[0])


def describe_value(value: Any) -> str:
    """All that compiled code may assume about an input or output."""
    if isinstance(value, torch.Tensor):
        if is_symbolic(value):
            return "random state"  # nothing else of symbolic size gets past the check
        offset = value.storage_offset() * value.element_size()
        aligned = "" if offset % _ALIGNED_BYTES == 0 else " unaligned"
        return f"{value.dtype}{list(value.shape)}{list(value.stride())}{value.device}{aligned}"
    if isinstance(value, torch.Generator):
        return f"generator {value.device}"
    return repr(value)


def _describe(argument: Any) -> str:
    if isinstance(argument, fx.Node):
        return argument.name
    if isinstance(argument, (list, tuple)):
        return f"[{', '.join(_describe(item) for item in argument)}]"
    if isinstance(argument, dict):
        items = (f"{key}: {_describe(item)}" for key, item in argument.items())
        return f"{{{', '.join(items)}}}"
    if isinstance(argument, slice):
        return f"slice{_describe([argument.start, argument.stop, argument.step])}"
    return f"{type(argument).__name__} {argument}"


def _describe_module(module: Any) -> str:
    lines = []
    for name, child in module.named_modules():
        code = getattr(child, "code", None)
        lines.append(f"{name}: {code if code is not None else repr(child)}")
    return "\n".join(lines)


def _key(graph: fx.Graph, attributes: Mapping[str, Any]) -> str:
    lines = []
    for node in graph.nodes:
        if node.op == "placeholder":
            lines.append(f"{node.name}: {describe_value(node.meta['val'])}")
        elif node.op == "output":
            for result in node.args[0]:
                lines.append(f"return {result.name}: {describe_value(result.meta.get('val'))}")
        else:
            target = node.target if node.op == "get_attr" else _qualified(node.target)
            call = f"{target}({_describe(node.args)}, {_describe(node.kwargs)})"
            lines.append(f"{node.name} = {call}")
    lines += [f"{name} is {_describe_module(module)}" for name, module in attributes.items()]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def _qualified(target: Any) -> str:
    if isinstance(target, torch._ops.OpOverload):
        return str(target)
    module, name = getattr(target, "__module__", ""), getattr(target, "__qualname__", None)
    return f"{module}.{name or target}"
