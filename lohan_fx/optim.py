"""Optimizers whose state lives in the tiers: drop-in for torch.optim.AdamW and torch.optim.Adam."""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from .errors import LohanError, TrainingLoopError
from .params import GuardedParameter, Owner, owner_of
from .runtime import AdamGroup

# Enabled loss scalers (scaling.GradScaler) and optimizers, as long as they live.
loss_scalers: weakref.WeakSet[Any] = weakref.WeakSet()
optimizers: weakref.WeakSet[Adam] = weakref.WeakSet()
# In a group these would be kept and never read.
_NOT_BY_GROUP = ("max_grad_norm", "norm_type", "skip_nonfinite")
_NOT_SUPPORTED = ("amsgrad", "maximize", "differentiable")


class Adam(torch.optim.Optimizer):
    """Adam with L2 weight decay (torch.optim.Adam's update), over parameters managed by lohan_fx.

    The state is an fp32 master weight and two fp32 moments per parameter, each in the tier that the
    plan chose; the updates run on the CPU or the GPU while the step goes on. Learning-rate
    schedulers and parameter groups work as with torch.optim.

    Args:
        params: parameters, or groups of them, of one model given to `lohan_fx.compile`. Every one
            that requires a gradient must be in exactly one group.
        lr, betas, eps, weight_decay: as in torch.optim.Adam; each may differ by group.
        max_grad_norm: clip the global norm of all gradients, over every group, to this, exactly as
            `torch.nn.utils.clip_grad_norm_` does before the step; None does not clip. May be changed
            between steps.
        norm_type: the norm that is clipped: 2.0, or infinity for the largest magnitude.
        skip_nonfinite: a step with a NaN or Inf gradient changes nothing: no weight, no moment, no
            step count. `skipped_steps` counts them.

    Clipping, `skip_nonfinite` and loss scaling need every gradient before an update counts, so they go
    with `overlap="speculative"` or `"next-forward"`, of which "auto" picks the faster then. Both give
    the same bits.

    A parameter without a gradient in some step (unused in that forward) is left out of it, as in
    torch.optim: its moments, its weight and its own step count stay.

    Raises:
        LohanError: a parameter is not managed, or the parameters belong to several models.
        ValueError: an argument is out of range, or given by group although it is not one's own.
    """

    _decoupled = False
    max_grad_norm: float | None

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        max_grad_norm: float | None = None,
        norm_type: float = 2.0,
        skip_nonfinite: bool = False,
    ) -> None:
        if max_grad_norm is not None and not max_grad_norm > 0:
            raise ValueError(f"max_grad_norm is {max_grad_norm}; give a positive number or None")
        if float(norm_type) not in (2.0, math.inf):
            raise ValueError(f"norm_type is {norm_type}; give 2.0 or float('inf')")
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        self.max_grad_norm = max_grad_norm
        self.norm_type = float(norm_type)
        self.skip_nonfinite = bool(skip_nonfinite)
        self._with_scaler = False
        self._group_of: dict[int, int] = {}
        super().__init__(params, defaults)
        owners = {id(owner): owner for owner in self._find_owners()}
        if len(owners) != 1:
            raise LohanError(
                f"the parameters belong to {len(owners)} compiled models; make one optimizer for each"
            )
        (self._owner,) = owners.values()
        self._owner.attach(self)
        optimizers.add(self)

    def _find_owners(self) -> Iterable[Owner]:
        for index, group in enumerate(self.param_groups):
            for param in group["params"]:
                found = owner_of(param)
                if found is None and isinstance(param, GuardedParameter):
                    raise LohanError(
                        "the model of these parameters has been closed; build it again"
                    )
                if found is None:
                    raise LohanError(
                        f"a parameter of shape {tuple(param.shape)} is not managed by lohan_fx; call "
                        "lohan_fx.compile(model, ...) first and pass model.parameters()"
                    )
                owner, pid = found
                self._group_of[pid] = index
                yield owner

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, as in torch.optim; only before the first step. Nothing changes on an error.

        Raises:
            ValueError: a value is out of range, or a parameter is in another group already.
            LohanError: a parameter is not managed.
        """
        super().add_param_group(param_group)
        try:
            _check_group(self.param_groups[-1])
            if hasattr(self, "_owner"):
                list(self._find_owners())
        except BaseException:
            self.param_groups.pop()
            raise

    def groups(self) -> list[AdamGroup]:
        """The scalars in force now, one entry per parameter group."""
        return [
            AdamGroup(
                lr=float(group["lr"]),
                beta1=float(group["betas"][0]),
                beta2=float(group["betas"][1]),
                eps=float(group["eps"]),
                weight_decay=float(group["weight_decay"]),
                decoupled=self._decoupled,
            )
            for group in self.param_groups
        ]

    def group_of(self, pid: int) -> int | None:
        """Which group a parameter is in; None where it was not given to this optimizer."""
        return self._group_of.get(pid)

    @property
    def checks_finite(self) -> bool:
        """Whether it must be known at step() if a gradient is NaN or Inf."""
        return self.skip_nonfinite or bool(loss_scalers)

    @property
    def waits(self) -> str | None:
        """What of this optimizer needs every gradient before the first update; None if nothing does."""
        if self.max_grad_norm is not None:
            return f"max_grad_norm={self.max_grad_norm}"
        return "skip_nonfinite=True" if self.skip_nonfinite else None

    @property
    def last_grad_norm(self) -> float | None:
        """Global norm of the gradients of the last step, unscaled, before clipping, as
        `clip_grad_norm_` returns it; None unless clipping."""
        return self._owner.last_grad_norm

    @property
    def skipped_steps(self) -> int:
        """Steps that changed nothing because a gradient was NaN or Inf (see `skip_nonfinite`), those
        that a GradScaler skipped included."""
        return self._owner.skipped_steps

    # What GradScaler asks.

    @property
    def owner(self) -> Owner:
        """What manages the parameters."""
        return self._owner

    @contextmanager
    def stepped_by_scaler(self) -> Iterator[None]:
        """Let a lohan_fx.GradScaler make the step."""
        self._with_scaler = True
        try:
            yield
        finally:
            self._with_scaler = False

    @property
    def _step_supports_amp_scaling(self) -> bool:
        """Asked by torch.amp.GradScaler.step(), which finds no gradients to unscale or to check."""
        if not self._with_scaler:
            raise TrainingLoopError(
                "torch.amp.GradScaler unscales param.grad, where lohan_fx keeps no gradients; use "
                "lohan_fx.GradScaler, which takes the same arguments"
            )
        return False

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Complete the update that the last backward began (or begin it; see the overlap modes)."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._owner.step()
        return loss

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget gradients that still wait for `step()`; there are none in `param.grad`."""
        self._owner.discard_gradients()

    def state_dict(self) -> dict[str, Any]:
        """As torch.optim's: `state` by parameter index with step, exp_avg, exp_avg_sq; `param_groups`.

        Each state also holds `master`, the fp32 weight. Values are CPU copies, so this needs 12 bytes
        a parameter of DRAM.
        """
        self.state.clear()
        for group in self.param_groups:
            for param in group["params"]:
                self.state[param] = self._owner.optimizer_state(_pid(param))
        try:
            return super().state_dict()
        finally:
            self.state.clear()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Set hyperparameters, moments, step and (where present) masters from `state_dict()`.

        Raises:
            TrainingLoopError: the parameters have not been placed yet and it cannot be deferred.
            ValueError: the groups do not match, as in torch.optim.
        """
        saved = state_dict["param_groups"]
        sizes = [len(group["params"]) for group in self.param_groups]
        if [len(group["params"]) for group in saved] != sizes:
            raise ValueError(
                f"the state has groups of {[len(g['params']) for g in saved]} parameters, this "
                f"optimizer of {sizes}"
            )
        for stored in saved:
            _check_group({**self.defaults, **stored})
        for group, stored in zip(self.param_groups, saved, strict=True):
            group.update({k: v for k, v in stored.items() if k != "params"})
            for param, index in zip(group["params"], stored["params"], strict=True):
                state = state_dict["state"].get(index)
                if state is not None:
                    self._owner.set_optimizer_state(_pid(param), state)

    def __getstate__(self) -> dict[str, Any]:
        raise TrainingLoopError("a lohan_fx optimizer cannot be pickled; use state_dict()")


class AdamW(Adam):
    """AdamW (decoupled weight decay, torch.optim.AdamW's update); see `Adam` for everything else."""

    _decoupled = True

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        max_grad_norm: float | None = None,
        norm_type: float = 2.0,
        skip_nonfinite: bool = False,
    ) -> None:
        super().__init__(
            params,
            lr,
            betas,
            eps,
            weight_decay,
            max_grad_norm=max_grad_norm,
            norm_type=norm_type,
            skip_nonfinite=skip_nonfinite,
        )


def _pid(param: torch.Tensor) -> int:
    found = owner_of(param)
    if found is None:
        raise LohanError("this optimizer's model has been closed, and the state went with it")
    return found[1]


def _check_group(group: dict[str, Any]) -> None:
    for name in _NOT_BY_GROUP:
        if name in group:
            raise ValueError(
                f"{name} is given to a parameter group, but it holds for all of them together; give it "
                "to the optimizer"
            )
    for name in _NOT_SUPPORTED:
        if group.get(name):
            raise ValueError(f"{name}={group[name]} is not supported; leave it out of the group")
    beta1, beta2 = group["betas"]
    if not 0.0 <= beta1 < 1.0 or not 0.0 <= beta2 < 1.0:
        raise ValueError(f"betas are {group['betas']}; each must be in [0, 1)")
    for name in ("lr", "eps", "weight_decay"):
        if not float(group[name]) >= 0.0:
            raise ValueError(f"{name} is {group[name]}; it must not be negative")
