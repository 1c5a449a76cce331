"""What torch.compile has made of one model: whole with and without gradients, and parts of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from .capture import Backend
from .dynamo import own_code

Step = Callable[..., Any]


@dataclass(frozen=True, slots=True)
class _Compiled:
    code: Step  # what Dynamo keeps captures by
    call: Step

    def forget(self) -> None:
        torch._dynamo.reset_code(self.code.__code__)


class CompiledForwards:
    """Forwards of one model, each of code of its own, so that what was captured can be dropped by itself."""

    def __init__(self, model: torch.nn.Module, backend: Backend) -> None:
        self._backend = backend  # compiled code refers to it weakly
        self._training = self._compile(model)
        self._evaluation = self._compile(model)
        self._parts: dict[int, _Compiled] = {}  # by id of the module, which its code keeps

    def _compile(self, module: torch.nn.Module) -> _Compiled:
        code, backend = own_code(module), self._backend.weakly()
        call: Step = torch.compile(code, backend=backend, fullgraph=True, dynamic=False)
        return _Compiled(code, call)

    def whole(self, *, grad: bool) -> Step:
        """The model's forward, to be called where gradients are on (`grad`) or off."""
        return (self._training if grad else self._evaluation).call

    def part(self, module: torch.nn.Module) -> Step:
        """The forward of a module of the model, without gradients."""
        if id(module) not in self._parts:
            self._parts[id(module)] = self._compile(module)
        return self._parts[id(module)].call

    def forget_training(self) -> None:
        """Have the forward with gradients captured anew."""
        self._training.forget()

    def forget_evaluation(self) -> None:
        """Have every forward without gradients captured anew."""
        for compiled in (self._evaluation, *self._parts.values()):
            compiled.forget()

    def forget(self) -> None:
        """Have everything captured anew."""
        self.forget_training()
        self.forget_evaluation()
