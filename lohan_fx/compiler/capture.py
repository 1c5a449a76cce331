"""The torch.compile backend: one traced step in, a running skeleton out.

    Dynamo graph -> AOTAutograd joint graph -> stages, candidates -> the host decides -> split ->
    weave -> check -> lower

The host (the session behind a compiled model) knows parameters, budget and runtime; this module
knows graphs.
"""

from __future__ import annotations

import gc
import inspect
import logging
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import fx
from torch._dynamo.backends.common import aot_autograd
from torch._inductor.compile_fx import _recursive_joint_graph_passes
from torch._inductor.decomposition import select_decomp_table
from torch._inductor.virtualized import V
from torch.utils._python_dispatch import _disable_current_modes

from lohan_fx.errors import CaptureError
from lohan_fx.params import owner_of
from lohan_fx.program import Tier

from .kernels import warm_workers
from .known_joints import KnownJoint
from .partition import Candidate, Joint, backward_nodes, find_candidates, split, worth_saving
from .region_compilers import AtenCompiler, InductorCompiler, RegionCompiler
from .skeleton import Skeleton, lower
from .stages import StageInfo, assign_stages, settle_stragglers
from .weave import (
    Layout,
    Windows,
    Woven,
    check_moves,
    gradients_of,
    managed_params,
    weave_inference,
    weave_training,
)

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Decision:
    """What the host wants done with one captured step.

    `number` is the runtime's for its ops, `index` the program's. `saved` and `swapped` are indices
    of candidates; a swapped one is saved too.
    """

    number: int
    index: int
    layout: Layout
    saved: frozenset[int]
    swapped: Mapping[int, Tier]
    windows: Windows


@dataclass(frozen=True, slots=True)
class Traced:
    """A captured forward (and backward), annotated with stages, before any decision."""

    joint: Joint
    stages: tuple[StageInfo, ...]
    candidates: tuple[Candidate, ...]
    training: bool  # False: a forward alone
    reached: frozenset[int] = frozenset()  # parameters that get a gradient


class Host(Protocol):
    """Who owns the parameters and decides; see session.Session."""

    device: torch.device
    lowering: str

    @property
    def names(self) -> Sequence[str]: ...
    @property
    def trainable(self) -> frozenset[int]: ...
    @property
    def stubs(self) -> Sequence[torch.Tensor]: ...  # the parameters, by number
    def owns(self, param: torch.Tensor) -> int | None: ...
    def decide(self, traced: Traced) -> Decision: ...
    def accept(self, woven: Woven) -> None: ...
    def keep(self, index: int, part: str, skeleton: Skeleton) -> None: ...
    def prepare(self, index: int) -> None: ...
    def timed(self, what: str) -> AbstractContextManager[None]: ...


# [Note: compiled code holds no model]
# Dynamo keeps backends for good, and what it compiled with the code object, where the garbage
# collector does not see it. A reference from there to the host would keep a dropped model's memory
# and files; so they refer to it weakly. While a compiled call runs, the host is alive: it called.


class Backend:
    """The host's backend; give `weakly()` of it to torch.compile. One per compiled model."""

    def __init__(self, host: Host) -> None:
        self._host = host
        self._compiler: RegionCompiler = AtenCompiler()
        if host.lowering == "inductor":
            self._compiler = InductorCompiler()
            warm_workers(host.device)

    def weakly(self) -> Callable[[fx.GraphModule, Sequence[Any]], Callable[..., Any]]:
        """This backend as a function that does not keep it alive."""
        reference = weakref.ref(self)

        def lohan(module: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
            backend = reference()
            assert backend is not None  # See [Note: compiled code holds no model]
            return backend(module, example_inputs)

        return lohan

    def __call__(self, module: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        host = self._host
        self._check_inputs(module, example_inputs)
        self._check_nodes(module)
        param_index = {
            position: pid
            for position, value in enumerate(example_inputs)
            if isinstance(value, torch.Tensor) and (pid := host.owns(value)) is not None
        }
        context = torch._guards.TracingContext.try_get()
        assert context is not None and context.fake_mode is not None
        known = KnownJoint(
            module,
            lowering=host.lowering,
            param_index=param_index,
            fake_mode=context.fake_mode,
        )
        step = _Step(host, self._compiler, param_index, context.fake_mode, known)
        # The first step is the last to be waited for: both passes are compiled before it.
        with (
            paused_collector(),
            known.looked_up(),
            torch._functorch.config.patch(force_non_lazy_backward_lowering=True),
        ):
            compiled = aot_autograd(
                partition_fn=step.partition,
                fw_compiler=step.compile_forward,
                bw_compiler=step.compile_backward,
                inference_compiler=step.compile_inference,
                decompositions=select_decomp_table() if host.lowering == "inductor" else {},
                keep_inference_input_mutations=True,
            )(module, example_inputs)
        return compiled  # type: ignore[no-any-return]

    def _check_nodes(self, module: fx.GraphModule) -> None:
        """Refuse regions that would be partitioned and compiled apart from the step."""
        for node in module.graph.nodes:
            if getattr(node.target, "__name__", "") == "invoke_subgraph":
                raise CaptureError(
                    "the model uses torch.compiler.nested_compile_region, which hides its tensors from "
                    "the plan; remove it (repeated blocks are compiled once anyway)"
                )

    def _check_inputs(self, module: fx.GraphModule, example_inputs: Sequence[Any]) -> None:
        placeholders = module.graph.find_nodes(op="placeholder")
        for node, value in zip(placeholders, example_inputs, strict=False):
            if isinstance(value, torch.nn.Parameter) and self._host.owns(value) is None:
                raise CaptureError(
                    f"{_source_name(node)}, a Parameter of shape {tuple(value.shape)}, was replaced or "
                    "added after lohan_fx.compile; set values with load_state_dict, add parameters "
                    "before compiling"
                )
            if isinstance(value, torch.SymInt | torch.SymFloat):
                raise CaptureError(
                    f"input {node.name!r} has a symbolic size; call with fixed shapes"
                )
            if not isinstance(value, torch.Tensor) or value.dim() == 0:
                continue
            if value.device.type != self._host.device.type:
                raise misplaced_input(_source_name(node), value, self._host.device)


class _Step:
    """One capture on its way through AOTAutograd's callbacks."""

    def __init__(
        self,
        host: Host,
        compiler: RegionCompiler,
        param_index: Mapping[int, int],
        fake_mode: Any,
        known: KnownJoint,
    ) -> None:
        self._host_ref = weakref.ref(host)  # See [Note: compiled code holds no model]
        self._compiler = compiler
        self._param_index = param_index
        self._fake_mode = fake_mode
        self._known = known
        self._index = -1

    @property
    def _host(self) -> Host:
        host = self._host_ref()
        assert host is not None
        return host

    def partition(
        self, module: fx.GraphModule, inputs: Sequence[Any], *, num_fwd_outputs: int, **options: Any
    ) -> tuple[fx.GraphModule, fx.GraphModule]:
        options.pop("compiler", None)
        host, known = self._host, self._known
        if host.lowering == "inductor" and not known.found:
            with host.timed("joint passes"):
                module = self._joint_passes(module)
        stages = assign_stages(module.graph)
        joint = Joint(
            module=module,
            inputs=inputs,
            num_forward_outputs=num_fwd_outputs,
            param_of=managed_params(module.graph, self._param_index),
            options=options,
        )
        with host.timed("find candidates"):
            worth = known.worth_saving
            if worth is None:
                worth = worth_saving(joint)
            candidates = tuple(find_candidates(joint, worth))
        if not known.found:
            with host.timed("keep the joint graph"):
                known.keep(module, worth)
        with host.timed("plan"):
            reached = gradients_of(module.graph, self._param_index)
            decision = host.decide(Traced(joint, stages, candidates, True, reached))
        saved = [node for c in candidates if c.index in decision.saved for node in c.nodes]
        with host.timed("split"):
            forward, backward = split(joint, saved)
        with host.timed("weave"):
            woven = self._weave(forward, backward, decision, candidates, num_fwd_outputs)
        self._index = decision.index
        host.accept(woven)
        assert woven.backward is not None
        return woven.forward, woven.backward

    def _weave(
        self,
        forward: fx.GraphModule,
        backward: fx.GraphModule,
        decision: Decision,
        candidates: Sequence[Candidate],
        num_forward_outputs: int,
    ) -> Woven:
        host = self._host
        settle_stragglers(forward.graph)
        inherit_stages(backward.graph)
        woven = weave_training(
            forward,
            backward,
            index=decision.index,
            number=decision.number,
            num_forward_outputs=num_forward_outputs,
            param_index=self._param_index,
            layout=decision.layout,
            swapped={
                node.name: decision.swapped[c.index]
                for c in candidates
                if c.index in decision.swapped
                for node in c.nodes
            },
            windows=decision.windows,
            trainable=host.trainable,
            handle_like=self._handle(),
            param_names=host.names,
        )
        check_moves(woven)
        return woven

    def compile_forward(self, module: fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        return self._run(module, "forward", prepare=True)

    def compile_backward(self, module: fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        skeleton = self._run(module, "backward", prepare=False)
        self._await_kernels()
        return skeleton

    def compile_inference(
        self, module: fx.GraphModule, inputs: Sequence[Any]
    ) -> Callable[..., Any]:
        stages = assign_stages(module.graph)
        joint = Joint(
            module=module,
            inputs=inputs,
            num_forward_outputs=len(module.graph.output_node().args[0]),  # type: ignore[arg-type]
            param_of=managed_params(module.graph, self._param_index),
            options={},
        )
        decision = self._host.decide(Traced(joint, stages, (), training=False))
        woven = weave_inference(
            module,
            index=decision.index,
            number=decision.number,
            param_index=self._param_index,
            layout=decision.layout,
            windows=decision.windows,
            handle_like=self._handle(),
            param_names=self._host.names,
        )
        check_moves(woven)
        self._index = decision.index
        self._host.accept(woven)
        run = self._run(woven.forward, "forward", prepare=True)
        self._await_kernels()
        return run

    def _await_kernels(self) -> None:
        with self._host.timed("await kernels"):
            self._compiler.finish()

    def _run(self, module: fx.GraphModule, part: str, *, prepare: bool) -> Callable[..., Any]:
        host, index = self._host, self._index
        with host.timed(f"lower {part}"):
            skeleton = lower(module, self._compiler, self._fake_mode)
        host.keep(index, part, skeleton)
        if not prepare:
            return skeleton
        expected = tuple(self._param_index.items())
        names, host_ref = list(host.names), self._host_ref

        def run(args: list[Any]) -> Any:
            host = host_ref()
            assert host is not None
            # Dynamo may run this code for another Parameter object than it was planned for.
            stubs = host.stubs
            for position, pid in expected:
                if args[position] is not stubs[pid]:
                    raise CaptureError(
                        f"parameter {names[pid]!r} was replaced after lohan_fx.compile; set "
                        "values with load_state_dict instead of assigning a new Parameter"
                    )
            host.prepare(index)
            return skeleton(args)

        run._boxed_call = True  # type: ignore[attr-defined]
        return run

    def _handle(self) -> torch.Tensor:
        with self._fake_mode:
            return torch.empty(1, dtype=torch.int64)

    def _joint_passes(self, module: fx.GraphModule) -> fx.GraphModule:
        """Inductor's own passes over the joint graph: dropout as seeds, pattern matches."""
        options: dict[str, Any] = {"skip_invoke_subgraph": True}
        if "input_device" in inspect.signature(_recursive_joint_graph_passes).parameters:
            options["input_device"] = self._host.device
        with V.set_fake_mode(self._fake_mode):
            result = _recursive_joint_graph_passes(module, **options)
        return module if result is None else result


@contextmanager
def paused_collector() -> Iterator[None]:
    """No garbage collection meanwhile: a graph of 10^4 nodes is millions of objects that stay, and to
    look through them again and again takes a fifth of the time. Afterwards they count as old, so that
    the next collection does not look through them either."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            if not gc.get_freeze_count():
                gc.freeze()
                gc.unfreeze()  # into the oldest generation
            gc.enable()


def beside_tracing() -> AbstractContextManager[None]:
    """Within, operations run on real tensors, also while a step is being traced."""
    return _disable_current_modes()


def inherit_stages(backward: fx.Graph) -> None:
    """Give forward nodes that run again in backward the stage of their first reader there.

    The partitioner puts them right before that reader, so stages stay in order along the graph.
    """
    depends_on_tangents = backward_nodes(backward)
    for node in reversed(list(backward.nodes)):
        if node.op != "call_function" or node in depends_on_tangents:
            continue
        stages = [user.meta["lohan_stage"] for user in node.users if "lohan_stage" in user.meta]
        if stages:
            node.meta["lohan_stage"] = max(stages)


def _source_name(node: fx.Node) -> str:
    """What the user calls an input of the captured graph, where Dynamo knows."""
    source = getattr(node.meta.get("grapharg"), "source", None)
    name = getattr(source, "name", None)
    return str(name() if callable(name) else name or node.name)


def misplaced_input(name: str, value: torch.Tensor, device: torch.device) -> CaptureError:
    """What to say of a tensor that the step cannot read where it is."""
    return CaptureError(
        f"{name} (shape {tuple(value.shape)}) is on {value.device}, the step runs on {device}; move it "
        f"there before the call: x.to({str(device)!r})"
    )


def unwrap(error: BaseException) -> BaseException:
    """The error that was raised inside of a backend, under what Dynamo wrapped around it."""
    inner = getattr(error, "inner_exception", None)
    return error if inner is None else unwrap(inner)


def graph_break_line(error: BaseException) -> str:
    """ "file:line" of the user's code that could not be captured; "" where unknown."""
    stack = getattr(error, "real_stack", None)
    frames = [f for f in stack or () if "/torch/" not in f.filename]
    if not frames:
        return ""
    return f"{frames[-1].filename}:{frames[-1].lineno} in {frames[-1].name}: {frames[-1].line}"


def owned(host: object, param: torch.Tensor) -> int | None:
    """The number of `param` where `host` manages it."""
    found = owner_of(param)
    return found[1] if found is not None and found[0] is host else None
