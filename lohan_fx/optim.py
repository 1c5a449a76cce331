"""Optimizers whose state lives in the tiers: drop-in for torch.optim.AdamW and torch.optim.Adam."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch

from .errors import LohanError, TrainingLoopError
from .params import GuardedParameter, Owner, owner_of
from .runtime import AdamGroup


class Adam(torch.optim.Optimizer):
    """Adam with L2 weight decay (torch.optim.Adam's update), over parameters managed by lohan_fx.

    The state is an fp32 master weight and two fp32 moments per parameter, each in the tier that the
    plan chose; the updates run on the CPU or the GPU while the step goes on. Learning-rate
    schedulers and parameter groups work as with torch.optim.

    Args:
        params: parameters, or groups of them, of one model given to `lohan_fx.compile`. Every one
            that requires a gradient must be in exactly one group.
        lr, betas, eps, weight_decay: as in torch.optim.Adam; each may differ by group.
        max_grad_norm: clip the global L2 norm of all gradients to this, exactly as
            `torch.nn.utils.clip_grad_norm_` does before the step; None does not clip.

    Raises:
        LohanError: a parameter is not managed, or the parameters belong to several models.
    """

    _decoupled = False

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        max_grad_norm: float | None = None,
    ) -> None:
        if max_grad_norm is not None and not max_grad_norm > 0:
            raise ValueError(f"max_grad_norm is {max_grad_norm}; give a positive number or None")
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        self.max_grad_norm = max_grad_norm
        self._group_of: dict[int, int] = {}
        super().__init__(params, defaults)
        owners = {id(owner): owner for owner in self._find_owners()}
        if len(owners) != 1:
            raise LohanError(
                f"the parameters belong to {len(owners)} compiled models; make one optimizer for each"
            )
        (self._owner,) = owners.values()
        self._owner.attach(self)

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
        """Add a group, as in torch.optim; only before the first step."""
        super().add_param_group(param_group)
        if hasattr(self, "_owner"):
            list(self._find_owners())
        for group in self.param_groups:
            _check_group(group)

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
    def last_grad_norm(self) -> float | None:
        """Global L2 norm of the gradients of the last step, before clipping; None unless clipping."""
        return self._owner.last_grad_norm

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
    ) -> None:
        super().__init__(params, lr, betas, eps, weight_decay, max_grad_norm=max_grad_norm)


def _pid(param: torch.Tensor) -> int:
    found = owner_of(param)
    if found is None:
        raise LohanError("this optimizer's model has been closed, and the state went with it")
    return found[1]


def _check_group(group: dict[str, Any]) -> None:
    beta1, beta2 = group["betas"]
    if not 0.0 <= beta1 < 1.0 or not 0.0 <= beta2 < 1.0:
        raise ValueError(f"betas are {group['betas']}; each must be in [0, 1)")
    for name in ("lr", "eps", "weight_decay"):
        if not float(group[name]) >= 0.0:
            raise ValueError(f"{name} is {group[name]}; it must not be negative")
