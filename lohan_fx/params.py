"""Parameters whose values live in the tiers: the stubs a user sees, and what touching one does.

A managed parameter stays the same `nn.Parameter` object with its shape, stride, dtype and device, but
its storage holds no bytes. Kernels that read such a storage would crash the process, so outside of a
compiled call the object's class is `GuardedParameter`: reading one gives its present value, writing
one raises an error that says what to call instead.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch.utils.weak import WeakIdKeyDictionary

from .errors import LohanError, TrainingLoopError
from .piecewise import Value


class Owner(Protocol):
    """What manages parameters: the session behind one compiled model."""

    def read(self, pid: int) -> torch.Tensor: ...
    def attach(self, optimizer: Any) -> None: ...
    def step(self) -> None: ...
    def discard_gradients(self) -> None: ...
    @property
    def gradients_pending(self) -> bool: ...
    def optimizer_state(self, pid: int) -> dict[str, Any]: ...
    def set_optimizer_state(self, pid: int, state: Mapping[str, Any]) -> None: ...
    @property
    def last_grad_norm(self) -> float | None: ...
    @property
    def skipped_steps(self) -> int: ...
    def check_scaling(self) -> None: ...
    def unscale_gradients(self, inverse: float) -> bool: ...
    def skip_step(self) -> None: ...


# Parameter -> its owner and number; torch's dictionary, which keys by identity, has no types.
_owners: MutableMapping[torch.Tensor, tuple[weakref.ref[Owner], int]] = WeakIdKeyDictionary()


def owner_of(param: torch.Tensor) -> tuple[Owner, int] | None:
    """The owner and the number of a managed parameter; None for any other tensor."""
    found = _owners.get(param)
    if found is None:
        return None
    owner = found[0]()
    return None if owner is None else (owner, found[1])


# Reading these never touches the storage.
_METADATA = frozenset(
    getattr(torch.Tensor, name).__get__
    for name in [
        "shape",
        "dtype",
        "device",
        "requires_grad",
        "is_leaf",
        "grad",
        "grad_fn",
        "layout",
        "is_sparse",
        "is_cuda",
        "is_quantized",
        "is_meta",
        "is_nested",
        "is_mkldnn",
        "is_cpu",
        "is_mps",
        "is_xpu",
        "ndim",
        "names",
        "_version",
        "output_nr",
        "retains_grad",
        "_backward_hooks",
        "_post_accumulate_grad_hooks",
        "itemsize",
        "nbytes",
        "is_vulkan",
        "is_ort",
    ]
    if hasattr(torch.Tensor, name)
) | {
    torch.Tensor.size,
    torch.Tensor.stride,
    torch.Tensor.dim,
    torch.Tensor.numel,
    torch.Tensor.nelement,
    torch.Tensor.element_size,
    torch.Tensor.is_floating_point,
    torch.Tensor.is_complex,
    torch.Tensor.is_contiguous,
    torch.Tensor.get_device,
    torch.Tensor.__len__,
    torch.Tensor.__hash__,
    torch.Tensor.requires_grad.__set__,  # type: ignore[attr-defined]  # a slot, declared as bool
    torch.Tensor.requires_grad_,
    torch.Tensor.grad.__set__,  # type: ignore[union-attr]  # a slot, declared as a tensor
    torch.Tensor.untyped_storage,
    torch.Tensor.data_ptr,
    torch.Tensor.is_pinned,
    torch.is_floating_point,
    torch.is_complex,
    torch.numel,
}


_HOOKS = (torch.Tensor.register_hook, torch.Tensor.register_post_accumulate_grad_hook)
_READ_GRAD = torch.Tensor.grad.__get__  # type: ignore[union-attr]  # a slot, declared as a tensor
# Operators that change their left side; other functions that do end in one underscore.
_IN_PLACE_OPERATORS = frozenset(
    f"__{name}__"
    for name in (
        *("iadd", "isub", "imul", "itruediv", "ifloordiv", "imod", "ipow"),
        *("iand", "ior", "ixor", "ilshift", "irshift", "setitem"),
    )
)


_NO_HOOKS = (
    "gradients are consumed inside the step and never reach param.grad, so a hook would not run; "
    "remove it"
)


class _NoGradient(torch.autograd.Function):
    """A parameter's value outside of the compiled forward: there is no gradient through it."""

    @staticmethod
    def forward(ctx: Any, value: torch.Tensor, anchor: torch.Tensor) -> torch.Tensor:
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        raise TrainingLoopError(
            "a parameter was used outside of the compiled forward, and this backward would lose that "
            "part of its gradient; compute it inside of the model's forward(), or detach() the "
            "parameter"
        )


class GuardedParameter(torch.nn.Parameter):
    """A managed parameter as seen outside of compiled calls.

    Reading gives the present value, on its device; a backward through that is an error, as its
    gradient could not reach the optimizer. So is anything that would change the value.
    """

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        with torch._C.DisableTorchFunctionSubclass():
            if func == _READ_GRAD:  # a new wrapper at every access
                _refuse_pending(args[0])
            if func in _METADATA:
                return func(*args, **kwargs)
            name = getattr(func, "__name__", str(func))
            base = getattr(getattr(func, "__self__", None), "__name__", "")
            if func in _HOOKS:
                raise LohanError(f"{name} on a managed parameter: {_NO_HOOKS}")
            in_place = name in _IN_PLACE_OPERATORS or (
                name.endswith("_") and not name.endswith("__")
            )
            changes = name == "__set__" or base == "data"
            changes |= in_place and _holds_guarded(args[:1] or list(kwargs.values()))
            changes |= _holds_guarded([kwargs.get("out")])
            if changes:
                raise LohanError(
                    f"{base or name} would change a parameter whose values live in the memory tiers; "
                    "use model.load_state_dict(...) to set values, or change them before "
                    "lohan_fx.compile (detach() gives a copy to read)"
                )
            return func(*_read_all(args), **_read_all(kwargs))

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        try:
            return f"Parameter managed by lohan_fx:\n{_read_all(self).detach()!r}"
        except LohanError:
            return f"Parameter of a closed model: shape {tuple(self.shape)}, dtype {self.dtype}"

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        raise LohanError(
            "a managed parameter cannot be copied; copy the model before lohan_fx.compile, or build "
            "a second one and load model.state_dict() into it"
        )

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise LohanError(
            "a managed parameter cannot be pickled; save model.state_dict() or call lohan_fx.save"
        )


def _holds_guarded(values: Sequence[Any]) -> bool:
    return any(
        _holds_guarded(value)
        if isinstance(value, list | tuple)
        else isinstance(value, GuardedParameter)
        for value in values
    )


def _refuse_pending(param: torch.Tensor) -> None:
    """Between backward and step(), `param.grad` would be set in a plain loop; None would mislead."""
    found = owner_of(param)
    if found is not None and found[0].gradients_pending:
        raise TrainingLoopError(
            "param.grad is read after a backward, but gradients are consumed inside the step and never "
            "kept there; to clip, give max_grad_norm= to lohan_fx.AdamW instead of calling "
            "clip_grad_norm_; to scale the loss, use lohan_fx.GradScaler instead of torch.amp's"
        )


def _read_all(value: Any) -> Any:
    if isinstance(value, GuardedParameter):
        found = owner_of(value)
        if found is None:
            raise LohanError(
                "this parameter's model has been closed; its values went with it. Keep "
                "model.state_dict() from before model.close()"
            )
        owner, pid = found
        present = owner.read(pid).to(value.device)
        if torch.is_grad_enabled() and value.requires_grad:
            anchor = torch.empty(0, device=value.device, requires_grad=True)
            present = _NoGradient.apply(present, anchor)  # type: ignore[no-untyped-call]
        return present
    if isinstance(value, dict):
        return {key: _read_all(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        items = [_read_all(item) for item in value]
        return items if isinstance(value, list) else tuple(items)
    return value


class ManagedParams:
    """The parameters of one model, numbered in `named_parameters()` order; tied ones count once.

    Taking a model over moves every value out of its parameter: `values[pid]` is then the only
    reference to it (the model's own tensor, moved nowhere yet), and the parameter is a stub on
    `device` in the compute dtype. It stays the same object, unless it was on the meta device: such a
    parameter cannot change its device, so every module that holds it gets a new one.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        owner: Owner,
        *,
        device: torch.device,
        dtype: torch.dtype | None,
    ) -> None:
        self.names: list[str] = []
        self.stubs: list[torch.nn.Parameter] = []
        self.values: dict[int, Value] = {}
        self.aliases: dict[str, int] = {}  # every name, tied ones too -> pid
        pid_of: dict[int, int] = {}
        for name, param in model.named_parameters(remove_duplicate=False):
            if id(param) in pid_of:
                self.aliases[name] = pid_of[id(param)]
                continue
            if owner_of(param) is not None:
                raise LohanError(
                    f"parameter {name!r} is already managed by another compiled model; close that one "
                    "first"
                )
            _refuse_hooks(name, param)
            if torch.nn.parameter.is_lazy(param):
                raise LohanError(
                    f"parameter {name!r} has no shape yet; call the model once, or build it with its "
                    "sizes given, before lohan_fx.compile"
                )
            pid = len(self.stubs)
            pid_of[id(param)] = self.aliases[name] = pid
            self.names.append(name)
            self.stubs.append(param)
        reference = weakref.ref(owner)
        replaced: dict[int, torch.nn.Parameter] = {}  # id of a meta parameter -> its stub
        for pid, param in enumerate(self.stubs):
            value = param.detach()
            compute = dtype if dtype is not None and value.is_floating_point() else value.dtype
            self.values[pid] = value
            empty = _zero_byte(value, compute, device)
            if param.is_meta:
                stub = torch.nn.Parameter(empty, requires_grad=param.requires_grad)
                stub.__dict__.update(param.__dict__)  # marks that libraries put on parameters
                replaced[id(param)] = self.stubs[pid] = stub
            else:
                param.data = empty
                param.grad = None
            _owners[self.stubs[pid]] = (reference, pid)
        if replaced:
            _replace(model, replaced)
        self.guard()

    def guard(self) -> None:
        """From here on, touching a stub is caught."""
        for stub in self.stubs:
            stub.__class__ = GuardedParameter

    def expose(self) -> None:
        """From here on the stubs are plain parameters, as the compiler wants them."""
        for stub in self.stubs:
            stub.__class__ = torch.nn.Parameter

    @contextmanager
    def exposed(self) -> Iterator[None]:
        self.expose()
        try:
            yield
        finally:
            self.guard()

    def disown(self) -> None:
        for stub in self.stubs:
            _owners.pop(stub, None)


def _replace(model: torch.nn.Module, stubs: Mapping[int, torch.nn.Parameter]) -> None:
    """Put each stub wherever a module holds the parameter whose id it is listed under."""
    for module in model.modules():
        for name, param in module._parameters.items():
            if id(param) in stubs:
                module._parameters[name] = stubs[id(param)]


def _zero_byte(value: torch.Tensor, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """A tensor with the shape of `value`, over no bytes; dense, in the order of its strides."""
    stride = torch.empty_like(value, device="meta", memory_format=torch.preserve_format).stride()
    # What CUDA graph trees rebuild tensors with; it does not ask that the storage be large enough.
    construct = getattr(torch._C, "_construct_CUDA_Tensor_From_Storage_And_Metadata", None)
    if device.type == "cuda" and construct is not None:
        fields = {
            "size": tuple(value.shape),
            "stride": stride,
            "storage_offset": 0,
            "dtype": dtype,
        }
        made: torch.Tensor = construct(fields, torch.UntypedStorage(0, device=device))  # type: ignore[no-untyped-call]
        return made
    # On a CPU the pages are never touched, so that nothing is taken even for a moment.
    full = torch.empty_strided(value.shape, stride, dtype=dtype, device=device)
    full.untyped_storage().resize_(0)
    return full


def _refuse_hooks(name: str, param: torch.nn.Parameter) -> None:
    if param._backward_hooks or getattr(param, "_post_accumulate_grad_hooks", None):
        raise LohanError(f"parameter {name!r} has gradient hooks: {_NO_HOOKS}")
