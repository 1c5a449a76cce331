"""How long nodes take: a roofline over what they compute and what they move, or measurements.

[Note: efficiencies]
Rates of a Hardware are what one large matrix product and one large memory-bound kernel reach. A model's
ops reach a share of them:

  matrix products  90 %: shapes that are no multiple of the tiles, and a last wave that fills only part
                   of the chip
  attention        50 % forward, 40 % backward of the matmul rate, of the products that are not
                   masked away (FlashAttention-2, arXiv 2307.08691, has about that of an A100 for
                   sequences of 1k to 4k and a head dimension of 128)
  memory-bound     85 % of the memory rate: short rows, several streams, conversions

With these, steps recorded on an H100 are predicted within 7 % (benchmarks/results/2026-11-24-h100.md),
and each kernel takes 4 us more than its share of work: launch, first loads, the tail. A product of
3 GFLOP at 700 TFLOP/s reaches half of the rate with that, one of 25 GFLOP nine tenths; that is how
small products are slower.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from lohan_fx.hardware import Hardware

from .fusion import fused_kernels, is_extern, op_name
from .node_costs import node_bytes, node_flops
from .values import dtype_name, tensor_of

MATMUL_EFFICIENCY = 0.90
ATTENTION_EFFICIENCY = 0.50
ATTENTION_BACKWARD_EFFICIENCY = 0.40
MEMORY_EFFICIENCY = 0.85
KERNEL_S = 4e-6


@dataclass(frozen=True, slots=True)
class Seconds:
    """How long nodes take on a GPU of the given rates. See [Note: efficiencies].

    `measured` has the seconds of single ops that were measured on the device; the others, and all
    fused code, come from the roofline. `fused` is False where every op runs alone.
    """

    hardware: Hardware
    fused: bool = True
    measured: Mapping[fx.Node, float] = field(default_factory=dict)

    @property
    def source(self) -> str:
        """ "measured" where the seconds of heavy ops are, else "roofline"."""
        return "measured" if self.measured else "roofline"

    def of(
        self,
        run: Sequence[fx.Node],
        later: Set[fx.Node] = frozenset(),
        kept: Set[fx.Node] = frozenset(),
    ) -> float:
        """Seconds of the nodes of `run`, in order, one after another.

        Args:
            later: nodes that run after these in the same pass.
            kept: nodes whose results stay for another pass.
        """
        return sum(self.each(run, later, kept))

    def each(
        self,
        run: Sequence[fx.Node],
        later: Set[fx.Node] = frozenset(),
        kept: Set[fx.Node] = frozenset(),
    ) -> list[float]:
        """Seconds by node of `run`; those of a fused kernel are at its last node. Arguments as `of`."""
        if not self.fused:
            return [self.of_op(node) for node in run]
        spent = [self.of_op(node) if is_extern(node) else 0.0 for node in run]
        position = {node: index for index, node in enumerate(run)}
        for kernel in fused_kernels(run, later, kept):
            last = max(position[node] for node in kernel.nodes)
            spent[last] += self._memory_s(kernel.nbytes)
        return spent

    def of_op(self, node: fx.Node) -> float:
        """Seconds of one op that runs alone; 0 for views."""
        if node in self.measured:
            return self.measured[node]
        flops, nbytes = work_flops(node), node_bytes(node)
        if not flops and not nbytes:
            return 0.0
        compute = 0.0
        if flops:
            rate = self.hardware.gpu_flops_per_s(_compute_dtype(node)) * _efficiency(node)
            compute = flops / rate + KERNEL_S
        return max(compute, self._memory_s(nbytes))

    def _memory_s(self, nbytes: int) -> float:
        return nbytes / (self.hardware.gpu_mem_bytes_per_s * MEMORY_EFFICIENCY) + KERNEL_S


def is_attention(node: fx.Node) -> bool:
    return "scaled_dot_product" in op_name(node) or "flash_attention" in op_name(node)


def work_flops(node: fx.Node) -> float:
    """FLOPs that a node really does: torch's count, without what a causal mask lets it skip."""
    flops = node_flops(node)
    if flops and is_attention(node) and _argument(node, "is_causal"):
        return flops / 2
    return flops


def _efficiency(node: fx.Node) -> float:
    if not is_attention(node):
        return MATMUL_EFFICIENCY
    return ATTENTION_BACKWARD_EFFICIENCY if "backward" in op_name(node) else ATTENTION_EFFICIENCY


def _argument(node: fx.Node, name: str) -> Any:
    """An argument of an ATen op by its name; None where it is not given."""
    if name in node.kwargs:
        return node.kwargs[name]
    schema = getattr(node.target, "_schema", None)
    for position, argument in enumerate(schema.arguments if schema is not None else ()):
        if argument.name == name and position < len(node.args):
            return node.args[position]
    return None


def _compute_dtype(node: fx.Node) -> str:
    """The dtype that an op computes in: that of its first matrix."""
    tensors: list[torch.Tensor] = [
        t for source in node.all_input_nodes if (t := tensor_of(source)) is not None
    ]
    matrices = [t for t in tensors if t.dim() > 1 and t.dtype.is_floating_point]
    return dtype_name((matrices or tensors)[0].dtype) if tensors else "float32"
