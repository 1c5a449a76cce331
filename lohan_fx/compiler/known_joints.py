"""Joint graphs kept on disk, so that the same step is traced through autograd once.

From Dynamo's graph, AOTAutograd makes the joint graph by running every op of forward and backward again,
in Python, and Inductor then looks for patterns in it; of all that is done before a first step whose
kernels are known, that is the longest. A file holds one joint graph (see frozen_graph) as it is after
Inductor's passes, with what the partitioner would save of it.

[Note: the name of a joint graph] The file's name is a digest of torch's own key for Dynamo's graph and
its inputs (that of AOTAutograd's cache, with torch's source, settings and the machine in it), of what
this compiler's passes read besides, and of global state that tracing depends on. Where torch says that a
graph's key does not tell all of it, and where the graph has constants or ops of others in it, nothing is
kept.

[Note: how a known joint graph gets in] `aot_dispatch_autograd_graph` is the one function of AOTAutograd
that traces; what is before and after it runs as ever. Metadata that tracing might change (mutated inputs,
effects, tensor subclasses) makes a step unfit. A torch whose function has other arguments gets no files.
"""

from __future__ import annotations

import contextlib
import copy
import hashlib
import inspect
import io
import logging
import pickle
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import fx
from torch._functorch._aot_autograd import autograd_cache, graph_compile
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx._lazy_graph_module import _make_graph_module, _use_lazy_graph_module
from torch.utils._pytree import tree_map_only

from lohan_fx.errors import LohanError
from lohan_fx.hardware import cache_dir
from lohan_fx.kept import read_kept, write_kept

from .frozen_graph import Unfreezable, freeze, thaw

log = logging.getLogger(__name__)

MAX_FILES = 32
MAX_BYTES = 256 << 20  # of one file; that of a Llama of 28 layers has 1 MB
# A graph that was traced sooner is not worth a file.
WORTH_S = 0.5

_TRACES = "aot_dispatch_autograd_graph"
_ARGUMENTS = ["flat_fn", "flat_args", "flat_args_descs", "aot_config", "fw_metadata"]
_NAMESPACES = {"aten", "prims", "prim"}


class KnownJoint:
    """The joint graph of one capture: known from a file, or traced and then kept in one."""

    def __init__(
        self,
        module: fx.GraphModule,
        *,
        lowering: str,
        param_index: Mapping[int, int],
        fake_mode: FakeTensorMode,
    ) -> None:
        self._module = module
        self._seen = (lowering, sorted(param_index.items()))
        self._fake_mode = fake_mode
        self._path: Path | None = None  # where the graph may be kept
        self.worth_saving: list[str] | None = None  # known by name, where the graph is

    @property
    def found(self) -> bool:
        """True where the joint graph is one from a file, with Inductor's passes behind it."""
        return self.worth_saving is not None

    @contextmanager
    def looked_up(self) -> Iterator[None]:
        """Within, AOTAutograd takes the joint graph from the file, if there is one.

        To be used under Dynamo's lock: it holds for all threads.
        """
        traces = getattr(graph_compile, _TRACES, None)
        if traces is None or list(inspect.signature(traces).parameters) != _ARGUMENTS:
            yield
            return
        setattr(graph_compile, _TRACES, self._instead_of(traces))
        try:
            yield
        finally:
            setattr(graph_compile, _TRACES, traces)

    def keep(self, module: fx.GraphModule, worth_saving: Sequence[str]) -> None:
        """Write the joint graph to the file, if it is to be kept and not from there."""
        if self.found or self._path is None:
            return
        try:
            content = worth_saving, freeze(module.graph, self._fake_mode)
        except Exception as reason:  # a run does without
            log.info("the joint graph is not kept: %s", reason)
            return
        write_kept(self._path, pickle.dumps(content), MAX_FILES)

    def _instead_of(self, traces: Callable[..., Any]) -> Callable[..., Any]:
        def trace(
            flat_fn: Any,
            flat_args: list[Any],
            flat_args_descs: list[Any],
            aot_config: Any,
            *,
            fw_metadata: Any,
        ) -> Any:
            path = self._file(flat_args, aot_config) if _is_plain(fw_metadata) else None
            graph = None if path is None else self._read(path, flat_args_descs, fw_metadata)
            if graph is not None:
                with _use_lazy_graph_module(True):  # its code is never run
                    module = _make_graph_module(torch.nn.Module(), graph)
                inputs = flat_args, fw_metadata.traced_tangents
                descs = flat_args_descs, fw_metadata.traced_tangents_descs
                return module, tree_map_only(torch.Tensor, torch.Tensor.detach, inputs), descs, None
            before, began = _copied(fw_metadata), time.perf_counter()
            result = traces(
                flat_fn, flat_args, flat_args_descs, aot_config, fw_metadata=fw_metadata
            )
            spent = time.perf_counter() - began
            if spent >= WORTH_S and result[3] is None and _copied(fw_metadata) == before:
                self._path = path
            return result

        return trace

    def _file(self, flat_args: list[Any], aot_config: Any) -> Path | None:
        try:
            _check_self_contained(self._module)
            words = [
                _torch_key(self._module, flat_args, aot_config),
                _own_digest(),
                *map(repr, self._seen),
                *_origins(self._module.graph),
                *_decompositions(aot_config.decompositions or {}),
                *_global_state(),
            ]
        except Exception as reason:  # torch refuses by exceptions of many kinds
            log.info("the joint graph is not looked up: %s", reason)
            return None
        digest = hashlib.sha256("\n".join(words).encode()).hexdigest()
        return cache_dir() / "joints" / f"{digest}.pkl"

    def _read(self, path: Path, inputs: Sequence[Any], fw_metadata: Any) -> fx.Graph | None:
        try:
            data = read_kept(path, MAX_BYTES)
            if data is None:
                return None
            worth_saving, frozen = _Plain(io.BytesIO(data)).load()
            graph = thaw(frozen, self._fake_mode)
            expected = [*inputs, *fw_metadata.traced_tangents_descs]
            described = [n.meta.get("desc") for n in graph.find_nodes(op="placeholder")]
            if described != expected:
                raise LohanError("its inputs are others")
        except Exception as error:  # whatever is in the file must not end a run
            log.warning("%s is not used, the step is traced anew: %s", path, error)
            with contextlib.suppress(OSError):
                path.unlink()
            return None
        self.worth_saving = list(worth_saving)
        return graph


class _Plain(pickle.Unpickler):
    """Of tuples, lists, words and bytes alone."""

    def find_class(self, module: str, name: str) -> Any:
        raise pickle.UnpicklingError(f"{module}.{name} is not to be in a file of a joint graph")


# --- What a joint graph depends on ----------------------------------------------------------------


def _torch_key(module: fx.GraphModule, inputs: Sequence[Any], aot_config: Any) -> str:
    make_key = autograd_cache.autograd_cache_key
    if "fx_config" in inspect.signature(make_key).parameters:  # before torch 2.12
        with autograd_cache.sanitize_gm_for_cache(module):
            return str(make_key(module, inputs, aot_config, {})[0])
    return str(make_key(module, inputs, aot_config)[0])


def _check_self_contained(module: fx.GraphModule) -> None:
    """Raise Unfreezable for a graph with values, graphs or ops that are not those of torch in it."""
    for node in module.graph.nodes:
        if node.op == "get_attr":
            raise Unfreezable(f"{node.name} is a constant of the graph")
        namespace = getattr(node.target, "namespace", None)
        if namespace is None:
            namespace = str(getattr(node.target, "_qualified_op_name", "aten")).split("::", 1)[0]
        if node.op == "call_function" and namespace not in _NAMESPACES:
            raise Unfreezable(f"{node.name} calls {node.target}")


def _origins(graph: fx.Graph) -> Iterator[str]:
    """Stages are found, and named, by where in the model a node is; graphs are shown with lines of code."""
    for node in graph.nodes:
        stack = node.meta.get("nn_module_stack") or {}
        yield f"{node.name} {[str(path) for path, _ in stack.values()]}"
        yield str(node.meta.get("stack_trace"))


def _decompositions(table: Mapping[Any, Any]) -> list[str]:
    return sorted(
        f"{op} {getattr(function, '__module__', '')}.{getattr(function, '__qualname__', '')}"
        for op, function in table.items()
    )


def _global_state() -> Iterator[str]:
    """What torch's key leaves out: what attention may use, and dtypes that are not given."""
    attention = [
        getattr(torch._C, f"_get_{kind}_sdp_enabled")()
        for kind in ("flash", "mem_efficient", "math", "cudnn")
    ]
    order = getattr(torch._C, "_get_sdp_priority_order", list)
    yield f"{attention} {order()} {torch.backends.mkldnn.enabled}"
    yield f"{torch.get_default_dtype()} {torch.is_inference_mode_enabled()}"
    for device in torch._C._autocast_supported_devices():
        if torch.is_autocast_enabled(device):
            yield f"autocast {device} {torch.get_autocast_dtype(device)}"


@cache
def _own_digest() -> str:
    """Of the compiler's source: another version may read other things."""
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()


# --- What tracing might change --------------------------------------------------------------------


def _is_plain(fw_metadata: Any) -> bool:
    """True for steps without mutated inputs and effects."""
    return not (
        fw_metadata.tokens
        or fw_metadata.num_backward_tokens
        or any(info.mutates_data or info.mutates_metadata for info in fw_metadata.input_info)
    )


def _copied(fw_metadata: Any) -> Any:
    copied = copy.copy(fw_metadata)
    for name, value in vars(copied).items():
        if isinstance(value, list):
            setattr(copied, name, list(value))
    return copied


__all__ = ["KnownJoint"]
