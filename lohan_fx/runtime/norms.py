"""How large a step's gradients are: the norm that clipping divides by, and whether all are finite.

Every gradient is measured on the device as it arrives, without the host waiting; sums of several
backwards that the CPU keeps are measured by the thread that adds them. Only step() reads the results.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch

from lohan_fx import native

from .device import Device
from .memory import Pools
from .options import HyperSource

# (L2 norm, largest magnitude) of one parameter's gradient
Magnitude = tuple[float, float]


@dataclass(frozen=True, slots=True)
class Wanted:
    """What is to be known of the gradients before an update may start.

    `clip` is the greatest norm allowed (None: any), `norm_type` 2 or infinity.
    """

    clip: float | None = None
    norm_type: float = 2.0
    finite: bool = False

    @classmethod
    def by(cls, hyper: HyperSource) -> Wanted:
        return cls(hyper.max_grad_norm, hyper.norm_type, hyper.checks_finite)

    @property
    def anything(self) -> bool:
        return self.clip is not None or self.finite

    @property
    def squares(self) -> bool:
        return self.clip is not None and self.norm_type == 2.0

    @property
    def largest(self) -> bool:
        return self.finite or (self.clip is not None and self.norm_type != 2.0)


class GradNorms:
    """One L2 norm and one largest magnitude for each parameter, in device memory.

    Args:
        pids: all trainable parameters. The order of their norms in the global one is this.
    """

    def __init__(self, pools: Pools, device: Device, pids: Iterable[int]) -> None:
        self._pools = pools
        self._on_cpu = device.device.type == "cpu"
        self._row = {pid: row for row, pid in enumerate(pids)}
        with torch.inference_mode(False):
            self._memory = pools.device_bytes(8 * len(self._row), "the gradient norms")
        self.clear()

    def _norms_2F(self) -> torch.Tensor:
        return self._memory.bytes.view(torch.float32).view(2, -1)

    def clear(self) -> None:
        self._memory.bytes.zero_()

    def take(self, pid: int, grad_N: torch.Tensor, wanted: Wanted, *, is_sum: bool = False) -> None:
        """Measure a gradient in compute-stream order. On the CPU a sum (fp32) is measured by the
        native code that measures the sums in DRAM, so that its bits do not depend on the tier."""
        if not grad_N.numel():
            return  # the greatest of nothing is an error
        norm, largest = self._norms_2F()[:, self._row[pid]]
        if is_sum and self._on_cpu:
            squares, most = native.measure(grad_N.data_ptr(), grad_N.numel())
            norm.fill_(math.sqrt(squares))
            largest.fill_(most)
            return
        if wanted.squares:
            torch.linalg.vector_norm(grad_N, dtype=torch.float32, out=norm)
        if wanted.largest:
            largest.copy_(torch.linalg.vector_norm(grad_N, math.inf))

    def read(self, measured: Mapping[int, Magnitude]) -> StepNorms:
        """Wait for the device; `measured` are those of sums that the CPU keeps."""
        norms_2F = self._norms_2F().to("cpu", copy=True)
        for pid, magnitude in measured.items():
            norms_2F[:, self._row[pid]] = torch.tensor(magnitude, dtype=torch.float64)
        return StepNorms(norms_2F)

    def close(self) -> None:
        self._pools.free_device(self._memory)


@dataclass(frozen=True, slots=True)
class StepNorms:
    """Norms of a step's gradients on the host, [2, F] for F parameters: L2, largest magnitude."""

    norms_2F: torch.Tensor

    @property
    def finite(self) -> bool:
        return bool(torch.isfinite(self.norms_2F[1]).all())

    def clipping(self, wanted: Wanted, unscale: float) -> tuple[float, float]:
        """(norm of all gradients, factor that clips it), as torch.nn.utils.clip_grad_norm_ has them.

        The norm is that of the gradients times `unscale`; NaN and Inf pass through into the factor as
        they do there. Arithmetic is fp32, as there.
        """
        assert wanted.clip is not None
        if wanted.norm_type == 2.0:
            total = torch.linalg.vector_norm(self.norms_2F[0])
        else:
            total = self.norms_2F[1].max()
        total = total * torch.tensor(unscale, dtype=torch.float32)
        factor = torch.clamp(wanted.clip / (total + 1e-6), max=1.0)
        return float(total), float(factor)
