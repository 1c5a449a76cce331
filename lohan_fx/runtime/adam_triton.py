"""Adam on a CUDA device in one pass over its arrays: 28 bytes an element with 16-bit weights.

The operations of kernels/adam_loop.h in the same order, rounded alike and never fused into
multiply-adds, so the bits are those of the CPU's update: where a state rests changes no number. Triton
comes with torch on CUDA; this module does not import without it.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

_BLOCK = 1024


def adam_update(
    master_N: torch.Tensor,
    exp_avg_N: torch.Tensor,
    exp_avg_sq_N: torch.Tensor,
    grad_N: torch.Tensor,
    weight_N: torch.Tensor | None,
    factors: tuple[Any, ...],
) -> None:
    """Update N elements in place, on the current stream of their device.

    Args:
        master_N, exp_avg_N, exp_avg_sq_N: contiguous, fp32.
        grad_N: contiguous, fp32 or 16-bit.
        weight_N: receives the new weights in 16 bit, rounded to nearest even; None: there are none.
        factors: as `native.adam_factors` gives them.
    """
    numel = master_N.numel()
    if numel == 0:
        return
    unscale, grad_scale, decay, l2, blend, from_grad, *others = factors
    with torch.cuda.device(master_N.device):
        _adam[(triton.cdiv(numel, _BLOCK),)](
            master_N,
            exp_avg_N,
            exp_avg_sq_N,
            grad_N,
            master_N if weight_N is None else weight_N,
            numel,
            unscale,
            grad_scale,
            decay,
            l2,
            blend,
            *others,
            FROM_GRAD=from_grad,
            HAS_L2=l2 != 0.0,
            HAS_WEIGHT=weight_N is not None,
            BLOCK=_BLOCK,
            enable_fp_fusion=False,
        )


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def _adam(  # type: ignore[no-untyped-def]
    master_ptr,
    exp_avg_ptr,
    exp_avg_sq_ptr,
    grad_ptr,
    weight_ptr,
    numel,
    unscale,
    grad_scale,
    decay,
    l2,
    blend,
    beta2,
    one_minus_beta2,
    bias2_sqrt,
    eps,
    step_size,
    FROM_GRAD: tl.constexpr,
    HAS_L2: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = at < numel
    g = tl.load(grad_ptr + at, mask).to(tl.float32) * unscale * grad_scale
    p = tl.load(master_ptr + at, mask)
    m = tl.load(exp_avg_ptr + at, mask)
    v = tl.load(exp_avg_sq_ptr + at, mask)
    if HAS_L2:
        g = g + l2 * p
    p = p * decay
    base = g if FROM_GRAD else m
    m = base + blend * (g - m)
    v = v * beta2 + one_minus_beta2 * g * g
    denom = tl.div_rn(tl.sqrt_rn(v), bias2_sqrt) + eps
    p = p - tl.div_rn(step_size * m, denom)
    tl.store(master_ptr + at, p, mask)
    tl.store(exp_avg_ptr + at, m, mask)
    tl.store(exp_avg_sq_ptr + at, v, mask)
    if HAS_WEIGHT:
        tl.store(weight_ptr + at, p.to(weight_ptr.dtype.element_ty), mask)
