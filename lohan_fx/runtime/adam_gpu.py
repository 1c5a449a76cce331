"""The update of optimizer state that is in device memory, on the current stream."""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from lohan_fx import native

from .options import AdamGroup

# fp32 copies of 16-bit gradients are made for this many elements at a time.
_BATCH_ELEMENTS = 1 << 24


@dataclass(frozen=True, slots=True)
class Update:
    """Flat device arrays of one parameter, all of N elements; `weight` is None for fp32 weights.

    `step` counts this parameter's updates, from 1.
    """

    grad: torch.Tensor
    master: torch.Tensor
    exp_avg: torch.Tensor
    exp_avg_sq: torch.Tensor
    weight: torch.Tensor | None
    group: AdamGroup
    step: int


@dataclass(frozen=True, slots=True)
class Scale:
    """Every gradient is multiplied by `unscale` (the loss scale's inverse), then by `clip`, in fp32."""

    unscale: float = 1.0
    clip: float = 1.0


@torch.no_grad()
def update_on_device(updates: Sequence[Update], scale: Scale) -> None:
    """One Adam step, with the bits of a CPU-tier bucket's; up to rounding where Triton is missing."""
    if not updates:
        return
    if updates[0].master.device.type == "cpu":
        for update in updates:
            _update_native(update, scale)
    elif has_triton():
        from .adam_triton import adam_update

        for update in updates:
            adam_update(
                update.master,
                update.exp_avg,
                update.exp_avg_sq,
                update.grad,
                update.weight,
                _factors(update.group, update.step, scale),
            )
    else:
        for batch in _batches(updates):
            _update_fused(batch, scale)


@functools.cache
def has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


def workspace_bytes(largest_numel: int, device: torch.device) -> int:
    """GPU memory that an update takes for itself, at most; `largest_numel`: elements of a bucket."""
    if device.type == "cpu" or has_triton():
        return 0
    return 4 * min(largest_numel, _BATCH_ELEMENTS)


@functools.lru_cache(maxsize=64)
def _factors(group: AdamGroup, step: int, scale: Scale) -> tuple[Any, ...]:
    return native.adam_factors(adam_step(group, step, scale))


def adam_step(group: AdamGroup, step: int, scale: Scale) -> native.AdamStep:
    """The native form of one group's scalars."""
    return native.AdamStep(**_scalars(group, step, scale))


def _scalars(group: AdamGroup, step: int, scale: Scale) -> dict[str, Any]:
    """What native.AdamStep and native.adam_update call them."""
    return {**asdict(group), "step": step, "unscale": scale.unscale, "grad_scale": scale.clip}


def _update_native(update: Update, scale: Scale) -> None:
    weight = update.weight
    native.adam_update(
        update.master.data_ptr(),
        update.exp_avg.data_ptr(),
        update.exp_avg_sq.data_ptr(),
        update.grad.data_ptr(),
        str(update.grad.dtype).removeprefix("torch."),
        0 if weight is None else weight.data_ptr(),
        None if weight is None else str(weight.dtype).removeprefix("torch."),
        update.master.numel(),
        **_scalars(update.group, update.step, scale),
    )


def _batches(updates: Sequence[Update]) -> Iterator[list[Update]]:
    """Pieces of one group and step each, with at most _BATCH_ELEMENTS elements together."""
    batch: list[Update] = []
    size = 0
    for update in updates:
        for start in range(0, update.master.numel(), _BATCH_ELEMENTS):
            cut = slice(start, start + _BATCH_ELEMENTS)
            piece = Update(
                update.grad[cut],
                update.master[cut],
                update.exp_avg[cut],
                update.exp_avg_sq[cut],
                None if update.weight is None else update.weight[cut],
                update.group,
                update.step,
            )
            size += piece.master.numel()
            other = batch and (batch[0].group, batch[0].step) != (piece.group, piece.step)
            if batch and (size > _BATCH_ELEMENTS or other):
                yield batch
                batch, size = [], piece.master.numel()
            batch.append(piece)
    if batch:
        yield batch


def _update_fused(batch: list[Update], scale: Scale) -> None:
    group = batch[0].group
    state_step = torch.full(
        (), float(batch[0].step), dtype=torch.float32, device=batch[0].master.device
    )
    grads = [piece.grad.float() for piece in batch]
    ours = batch[0].grad.dtype != torch.float32  # else they are the caller's tensors
    for factor in (scale.unscale, scale.clip):
        if factor == 1.0:
            continue
        if ours:
            torch._foreach_mul_(grads, factor)
        else:
            grads, ours = list(torch._foreach_mul(grads, factor)), True
    masters = [piece.master for piece in batch]
    fused = torch._fused_adamw_ if group.decoupled else torch._fused_adam_
    fused(
        masters,
        grads,
        [piece.exp_avg for piece in batch],
        [piece.exp_avg_sq for piece in batch],
        [],
        [state_step] * len(batch),
        lr=group.lr,
        beta1=group.beta1,
        beta2=group.beta2,
        weight_decay=group.weight_decay,
        eps=group.eps,
        amsgrad=False,
        maximize=False,
    )
    weights = [piece.weight for piece in batch if piece.weight is not None]
    if weights:
        torch._foreach_copy_(weights, masters)
