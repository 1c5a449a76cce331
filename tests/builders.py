"""Tiny graphs and models for tests of the compiler, on fake or CPU values."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch._guards
from torch import fx, nn
from torch._dynamo.backends.common import aot_autograd
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.node import map_arg
from torch.nn import functional

from lohan_fx.compiler.region_compilers import RegionCompiler
from lohan_fx.compiler.skeleton import Skeleton, lower
from lohan_fx.compiler.stages import StageInfo, assign_stages, settle_stragglers

aten = torch.ops.aten


class GraphBuilder:
    """An FX graph written call by call, with fake values and stages filled in."""

    def __init__(self) -> None:
        self.mode = FakeTensorMode(allow_non_fake_inputs=True)
        self.graph = fx.Graph()

    def input(self, name: str, *shape: int, dtype: torch.dtype = torch.float32) -> fx.Node:
        node = self.graph.placeholder(name)
        with self.mode:
            node.meta["val"] = torch.empty(shape, dtype=dtype)
        return node

    def call(self, target: Any, *args: Any, stage: int | None = None, **kwargs: Any) -> fx.Node:
        node = self.graph.call_function(target, args, kwargs)
        values, named = map_arg((args, kwargs), lambda source: source.meta["val"])
        with self.mode:
            node.meta["val"] = target(*values, **named)
        if stage is not None:
            node.meta["lohan_stage"] = stage
        return node

    def move(self, name: str, *args: Any, value: Any = None) -> fx.Node:
        """A lohan op of runtime 1; `value` is the fake value of its result."""
        node = self.graph.call_function(getattr(torch.ops.lohan, name).default, (1, *args))
        node.meta["val"] = value
        return node

    def module(self, *results: fx.Node | None) -> fx.GraphModule:
        self.graph.output(tuple(results))
        return fx.GraphModule({}, self.graph)


class Block(nn.Module):
    """A pre-norm transformer block."""

    def __init__(self, width: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.dropout = dropout

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, length, width = x.shape
        heads = [
            part.view(batch, length, 2, width // 2).transpose(1, 2)
            for part in self.qkv(self.norm1(x)).split(width, -1)
        ]
        mixed = functional.scaled_dot_product_attention(*heads, is_causal=True)
        mixed = mixed.transpose(1, 2).reshape(batch, length, width)
        x = x + functional.dropout(self.out(mixed), self.dropout, self.training)
        return x + self.down(functional.gelu(self.up(self.norm2(x))))


class TinyGPT(nn.Module):
    """A language model with tied weights; forward(tokens) is the loss of predicting them."""

    def __init__(self, layers: int, width: int = 16, vocab: int = 32, dropout: float = 0.0) -> None:
        super().__init__()
        self.tokens = nn.Embedding(vocab, width)
        self.blocks = nn.ModuleList([Block(width, dropout) for _ in range(layers)])
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocab, bias=False)
        self.head.weight = self.tokens.weight

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.tokens(tokens)
        for block in self.blocks:
            x = block(x)
        logits = self.head(self.norm(x))
        return functional.cross_entropy(logits.flatten(0, 1), tokens.flatten())


def tokens(batch: int = 2, length: int = 8, vocab: int = 32) -> torch.Tensor:
    return torch.randint(0, vocab, (batch, length), generator=torch.Generator().manual_seed(5))


Partition = Callable[..., tuple[fx.GraphModule, fx.GraphModule]]


class Lowered:
    """What `compile_with` made of a model: its stages and the skeletons of both passes."""

    def __init__(self) -> None:
        self.joint: fx.Graph | None = None
        self.stages: tuple[StageInfo, ...] = ()
        self.skeletons: list[Skeleton] = []


def compile_with(
    model: nn.Module,
    compiler: RegionCompiler,
    *,
    decompositions: Any = None,
    joint_passes: bool = False,
) -> tuple[Callable[..., Any], Lowered]:
    """`model` compiled with torch's own partition and our stages, regions and skeletons."""
    from functorch.compile import min_cut_rematerialization_partition

    found = Lowered()

    def partition(joint: fx.GraphModule, inputs: Sequence[Any], **options: Any) -> Any:
        if joint_passes:
            joint = run_joint_passes(joint)
        found.joint = joint.graph
        found.stages = assign_stages(joint.graph)
        return min_cut_rematerialization_partition(joint, inputs, **options)

    def lower_graph(module: fx.GraphModule, inputs: Sequence[Any]) -> Skeleton:
        if not found.skeletons:
            settle_stragglers(module.graph)
        mode = torch._guards.TracingContext.get().fake_mode
        found.skeletons.append(lower(module, compiler, mode))
        return found.skeletons[-1]

    backend = aot_autograd(
        fw_compiler=lower_graph,
        bw_compiler=lower_graph,
        partition_fn=partition,
        decompositions=decompositions,
        keep_inference_input_mutations=True,
    )
    torch._dynamo.reset()
    return torch.compile(model, backend=backend, fullgraph=True, dynamic=False), found


def run_joint_passes(joint: fx.GraphModule) -> fx.GraphModule:
    """Inductor's passes on joint graphs: dropout becomes seeds and seeded randoms."""
    from torch._inductor.compile_fx import _recursive_joint_graph_passes
    from torch._inductor.virtualized import V

    with V.set_fake_mode(torch._guards.TracingContext.get().fake_mode):
        return _recursive_joint_graph_passes(joint, skip_invoke_subgraph=True)


class _Captured(Exception):
    """Ends a compilation once the joint graph is known."""


def joint_graph(function: Callable[..., torch.Tensor], *args: Any, **kwargs: Any) -> fx.Graph:
    """The joint graph of a model or function whose result is (or holds as .loss) a scalar."""
    graphs: list[fx.Graph] = []

    def partition(joint: fx.GraphModule, inputs: Sequence[Any], **options: Any) -> Any:
        graphs.append(joint.graph)
        raise _Captured

    def unreachable(module: fx.GraphModule, inputs: Sequence[Any]) -> Any:
        raise AssertionError("partition ends the compilation")

    torch._dynamo.reset()
    backend = aot_autograd(fw_compiler=unreachable, partition_fn=partition)
    compiled = torch.compile(function, backend=backend, fullgraph=True, dynamic=False)
    try:
        compiled(*args, **kwargs)
    except Exception:
        if not graphs:
            raise
    return graphs[0]
