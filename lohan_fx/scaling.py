"""Dynamic loss scaling for fp16: torch.amp.GradScaler over optimizers whose gradients are in the tiers."""

from __future__ import annotations

from typing import Any

import torch

from .optim import Adam, loss_scalers, optimizers


class GradScaler(torch.amp.GradScaler):
    """torch.amp.GradScaler, with the same methods and the same rules of growth and backoff, that also
    takes lohan_fx's optimizers.

    Gradients are checked for Inf and NaN on the device as they arrive, and unscaled in fp32 within the
    update: g * (1 / scale), then the clipping factor, as `unscale_` and `clip_grad_norm_` do. The norm
    that `max_grad_norm` clips is that of unscaled gradients. A step with an Inf or a NaN changes
    nothing at all: weights, moments and step counts stay, the gradients are dropped, the scale backs
    off at update(), and `opt.skipped_steps` counts it.

    Make it before the model's first forward: updates must wait for step(), which `overlap="auto"`
    then sees to; a model that exists already is planned anew at its next forward. Which model a scaler
    is for shows only in step(), after that forward; so as long as an enabled one exists, every model
    of the process under "auto" waits for step(). Delete a scaler that is not used any more
    (`del scaler`), or give models without scaling an `overlap` of their own.

    Args:
        device: where the scale is; None is "cuda" where there is one, else "cpu".
        init_scale, growth_factor, backoff_factor, growth_interval, enabled: as in torch.amp.GradScaler.

    Raises:
        TrainingLoopError: in scale(), before anything is changed, where a model under way updates its
            weights during the backward (overlap="backward").
    """

    def __init__(
        self,
        device: str | None = None,
        init_scale: float = 2.0**16,
        growth_factor: float = 2.0,
        backoff_factor: float = 0.5,
        growth_interval: int = 2000,
        enabled: bool = True,
    ) -> None:
        if device is None:
            device = "cuda" if torch.cuda.is_available() else "cpu"
        super().__init__(
            device, init_scale, growth_factor, backoff_factor, growth_interval, enabled
        )
        if self.is_enabled():
            loss_scalers.add(self)

    def scale(self, outputs: Any) -> Any:
        """`outputs` (a tensor or an iterable of tensors) times the scale."""
        if self.is_enabled():
            for optimizer in list(optimizers):
                optimizer.owner.check_scaling()
        return super().scale(outputs)

    def step(self, optimizer: torch.optim.Optimizer, *args: Any, **kwargs: Any) -> float | None:
        """optimizer.step() with unscaled gradients, unless one of them is Inf or NaN."""
        if not isinstance(optimizer, Adam):
            return super().step(optimizer, *args, **kwargs)
        with optimizer.stepped_by_scaler():
            return super().step(optimizer, *args, **kwargs)

    def _unscale_grads_(
        self,
        optimizer: torch.optim.Optimizer,
        inv_scale: torch.Tensor,
        found_inf: torch.Tensor,
        allow_fp16: bool,
    ) -> dict[torch.device, torch.Tensor]:
        if not isinstance(optimizer, Adam):
            return super()._unscale_grads_(optimizer, inv_scale, found_inf, allow_fp16)
        found = optimizer.owner.unscale_gradients(float(inv_scale))
        return {found_inf.device: found_inf.fill_(float(found))}

    def _maybe_opt_step(
        self,
        optimizer: torch.optim.Optimizer,
        optimizer_state: dict[str, Any],
        *args: Any,
        **kwargs: Any,
    ) -> float | None:
        result = super()._maybe_opt_step(optimizer, optimizer_state, *args, **kwargs)
        found = optimizer_state["found_inf_per_device"].values()
        if isinstance(optimizer, Adam) and any(bool(each) for each in found):
            optimizer.owner.skip_step()
        return result
