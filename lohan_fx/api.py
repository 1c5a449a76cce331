"""The public face: `compile`, `make_plan`, and what a compiled model can do."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import os
import tempfile
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch

from . import hardware as machines
from .budget import Budget, Machine
from .captured import Captured
from .checkpoint.weights import weights_for
from .compiler.capture import paused_collector
from .errors import BudgetError, CaptureError, LohanError
from .generation import Generates
from .phases import Phases
from .pins import Pins, check_pins
from .plan import Plan
from .planner import DEFAULT_POLICY, Capacities, Overlap, check_policy
from .probe import measured_once
from .recording import recorded
from .report import Report, Run, report_of
from .session import PlanReady, Session
from .settings import Policy, Settings
from .step import TracedStep
from .tracing import Trace
from .units import format_bytes, parse_bytes

OVERLAPS = ("auto", *(str(mode) for mode in Overlap))
LOWERINGS = ("inductor", "aten")
PROFILES = ("auto", "measured", "roofline")
# Types of devices whose machine is measured when they are first used.
_MEASURED = ("cuda",)


class CompiledModel(torch.nn.Module):
    """What `compile` adds to a model's class. The model object, its attributes and methods stay."""

    _lohan: Session

    # An outer torch.compile breaks its graph here; what is compiled inside has a backend of its own.
    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._lohan.call(args, kwargs)

    @property
    def plan(self) -> Plan:
        """The plan of the step captured last.

        Raises:
            LohanError: nothing has been captured yet; call the model once.
        """
        return self._latest("plan").plan

    def report(self) -> Report:
        """Tiers, lanes, peaks and places as planned and, beside that, as measured so far.

        The text is plain; printed on a terminal, it is drawn. Busy lanes are measured by `trace`: the
        latest one is what is shown.
        """
        session = self._lohan
        rates = session.settings.hardware.source
        return report_of(
            self.plan, Run(session.stats(), session.last_trace, session.phases.seconds, rates)
        )

    def trace(self, path: str | os.PathLike[str] | None = None) -> AbstractContextManager[Trace]:
        """Record what every lane does in the training steps inside: `with model.trace("trace.json"):`.

        Steps, their spans by lane (gpu, h2d, d2h, ssd_read, ssd_write, cpu_adam), what the GPU waited
        for, and memory are in the form of the plan's own timeline; see `lohan_fx.tracing`. The trace
        that `with` gives is filled when the block ends, and then written to `path`, if there is one; a
        block that raises writes nothing. Numbers stay the same. A few steps are enough: every event is
        kept until the end. On CUDA, memory of the GPU is that of torch's allocator between regions; on
        the CPU, what the runtime accounts for.

        Raises:
            LohanError: a trace is being recorded already.
        """
        return recorded(self._lohan, path)

    def graphs(self) -> dict[str, str]:
        """The rewritten graphs of the step captured last, as readable Python.

        Keys "forward" and "backward" are the FX graphs with their lohan ops, "forward_skeleton" and
        "backward_skeleton" the programs that run.
        """
        captured = self._latest("graph")
        woven = captured.woven
        assert woven is not None
        found = {"forward": woven.forward.print_readable(print_output=False)}
        if woven.backward is not None:
            found["backward"] = woven.backward.print_readable(print_output=False)
        found.update({f"{part}_skeleton": s.source for part, s in captured.skeletons.items()})
        return found

    def _latest(self, what: str) -> Captured:
        if not self._lohan.captured:
            raise LohanError(f"there is no {what} before the first forward; call the model once")
        return self._lohan.captured[-1]

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget gradients that still wait for the optimizer's `step()`."""
        self._lohan.discard_gradients()

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """As nn.Module.state_dict, with parameters as CPU copies in their compute dtype."""
        state = super().state_dict(*args, **kwargs)
        prefix = kwargs.get("prefix", "")
        copies: dict[int, torch.Tensor] = {}
        for name, pid in self._lohan.params.aliases.items():
            if prefix + name in state:
                if pid not in copies:
                    copies[pid] = self._lohan.read(pid)
                state[prefix + name] = copies[pid]
        return state

    def load_state_dict(
        self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False
    ) -> Any:
        """As nn.Module.load_state_dict; fp32 values are kept in full in the master weights.

        Raises:
            RuntimeError: keys or shapes do not match (see nn.Module.load_state_dict).
        """
        aliases = self._lohan.params.aliases
        values: dict[int, torch.Tensor] = {}
        rest: OrderedDict[str, Any] = OrderedDict()
        wrong = []
        for name, value in state_dict.items():
            if name not in aliases:
                rest[name] = value
                continue
            pid = aliases[name]
            shape = tuple(self._lohan.params.stubs[pid].shape)
            if tuple(value.shape) != shape:
                wrong.append(f"{name}: {tuple(value.shape)} for {shape}")
            values[pid] = value
        missing = [name for name, pid in aliases.items() if pid not in values]
        if wrong or (strict and missing):
            problems = [f"shapes differ: {'; '.join(wrong)}"] if wrong else []
            problems += [f"missing: {', '.join(missing[:5])}"] if missing and strict else []
            raise RuntimeError(
                f"cannot load this state into {type(self).__name__}: " + "; ".join(problems)
            )
        result = super().load_state_dict(rest, strict=False, assign=False)
        buffers_missing = [key for key in result.missing_keys if key not in aliases]
        if strict and (buffers_missing or result.unexpected_keys):
            raise RuntimeError(
                f"cannot load this state into {type(self).__name__}: missing {buffers_missing}, "
                f"unexpected {result.unexpected_keys}"
            )
        for pid, value in values.items():
            self._lohan.write(pid, value)
        result.missing_keys[:] = buffers_missing + (missing if not strict else [])
        return result

    def close(self) -> None:
        """Give back memory, pinned pages and files now. The parameters go with them."""
        self._lohan.close()

    def no_sync(self) -> AbstractContextManager[None]:
        """Accumulate gradients: around all micro-batches of a step but the last one, as with DDP.

            for micro_batch in first_ones:
                with model.no_sync():
                    loss(model(micro_batch)).backward()
            loss(model(last)).backward()
            opt.step(); opt.zero_grad()

        As in DDP it is the forward that counts: the backward of a forward made inside accumulates,
        wherever it is called. Each micro-batch's gradient, in the compute dtype, is added to an fp32
        sum in the order of the backwards; the step is that of a plain loop which keeps `master.grad`
        in fp32 and adds `param.grad.float()` to it. Losses are neither divided nor weighted; do that
        as in plain PyTorch. `zero_grad()` drops the sums; `step()` after accumulating backwards alone
        uses them.

        The sums take 4 bytes a trainable parameter, next to the optimizer state: in DRAM where the CPU
        updates, else on the GPU; the plan counts them. The first use after a forward without it plans
        and compiles anew, so enter it in the first step.

        Raises:
            InfeasiblePlan: at the next forward, where the accumulators do not fit; says how large
                they are.
        """
        return self._lohan.no_sync()

    def to(self, *args: Any, **kwargs: Any) -> Any:
        raise LohanError(
            "a compiled model's tensors stay where the plan puts them; give device= and dtype= to "
            "lohan_fx.compile instead of calling .to()"
        )

    def _apply(self, *args: Any, **kwargs: Any) -> Any:
        return self.to()


def compile(
    model: torch.nn.Module,
    budget: str | int | Budget,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    overlap: str = "auto",
    policy: Policy = DEFAULT_POLICY,
    weights: str | os.PathLike[str] | None = None,
    plan: Plan | str | os.PathLike[str] | None = None,
    pin: Pins | None = None,
    max_writes_per_day: int | str | None = None,
    hardware: machines.Hardware | str | os.PathLike[str] | None = None,
    lowering: str = "inductor",
    profile: str = "auto",
    poison: bool = False,
    bucket_numel: int | None = None,
    verify_io: bool = False,
) -> Any:
    """Make `model` train within a memory budget. Returns the same object, compiled.

    The parameters' values move into the tiers that a plan chooses when the model is first called;
    the model stays an `nn.Module` of its own class. Create `lohan_fx.AdamW(model.parameters())`
    afterwards and train as usual.

    Args:
        budget: "gpu=24GB, dram=100GB, ssd=/mnt/nvme:800GB", a `Budget`, or GPU bytes alone as a
            string or number. GB = 1e9, GiB = 2**30 bytes.
        dtype: compute dtype (bfloat16 or float16 make 16-bit weights with fp32 masters kept from
            the model's own values); None takes the model's dtype.
        device: where to compute; None is CUDA where there is one, else the CPU, on which the GPU
            tier is accounted memory.
        overlap: when updates run: "auto", "backward", "next-forward", "serial" or "naive".
        policy: who plans: "optimal" (no other policy's plan is faster), another of
            `lohan_fx.planner.SOLVERS`, or a callable (Problem, Forced) -> Solution. Policies named
            after a system also settle what overlap="auto" is where that system has but one way.
        weights: a safetensors file, or a directory as Hugging Face lays it out (or as `save` writes
            it), to take all values from. The model may then be on the meta device and larger than
            DRAM: values stream from the files into their tiers when the model is first called.
        plan: replay this plan (an object or a JSON file) instead of solving.
        pin: places to insist on, by name: {"model.layers.0.*": "ssd"}; see `lohan_fx.pins`.
        max_writes_per_day: bytes, or a string such as "2TB", that steps at the predicted pace may
            write to SSD in a day; None is no bound.
        hardware: rates to plan with, a preset's name, or the JSON file of `python -m lohan_fx.probe`;
            None takes what was measured on this machine. Where nothing was, a CUDA machine is measured
            now: seconds, kept on disk.
        lowering: "inductor", or "aten" for plain ATen kernels (slower; any two plans give bit-equal
            numbers).
        profile: whose seconds plans count with: "measured" runs the heavy ops once on the device
            (seconds, kept on disk), "roofline" takes them from the hardware's rates and measures
            nothing, the machine neither; "auto" measures on CUDA.
        poison: fill memory that may no longer be read with NaN (a debugging aid; CPU device).
        bucket_numel: most parameters that move as one; None is right outside of tests.
        verify_io: keep a checksum of every page written to the SSD (8 bytes of DRAM for 4096, outside
            of the budget), and raise TransferError where a read brings back anything else.

    Raises:
        BudgetError: the budget cannot be read or used.
        LohanError: an argument is out of range, a parameter cannot be managed, or `weights` does not
            fit the model; names what is missing or has another shape.
    """
    if isinstance(model, CompiledModel):
        raise LohanError("this model is compiled already; build it anew to compile it differently")
    settings = _settings(
        model,
        budget,
        device=device,
        overlap=overlap,
        policy=policy,
        plan=plan,
        pin=pin,
        max_writes_per_day=max_writes_per_day,
        hardware=hardware,
        lowering=lowering,
        profile=profile,
        poison=poison,
        bucket_numel=bucket_numel,
        verify_io=verify_io,
    )
    _check_dtype(dtype)
    values = {} if weights is None else weights_for(model, weights)
    _refuse_meta(model, frozenset(values))
    phases = Phases()
    if hardware is None and profile != "roofline" and settings.device.type in _MEASURED:
        settings = dataclasses.replace(settings, hardware=_measured_once(settings, phases))
    session = Session(model, dtype, settings, phases)
    session.params.values.update({session.params.aliases[n]: v for n, v in values.items()})
    base = type(model)
    bases = (Generates, CompiledModel, base) if hasattr(base, "generate") else (CompiledModel, base)
    # By the same name: libraries write it into configs and look models up by it.
    model.__class__ = type(base.__name__, bases, {"__module__": base.__module__})
    object.__setattr__(model, "_lohan", session)
    return model


def make_plan(
    model: torch.nn.Module,
    budget: str | int | Budget,
    example_inputs: Mapping[str, Any] | Sequence[Any],
    *,
    hardware: machines.Hardware | str | os.PathLike[str] | None = None,
    dtype: torch.dtype | None = None,
    policy: Policy = DEFAULT_POLICY,
    overlap: str = "auto",
    pin: Pins | None = None,
    max_writes_per_day: int | str | None = None,
    lowering: str = "inductor",
) -> Plan:
    """The plan for one training step, without running it. `model` cannot be used afterwards.

    No weight is read or allocated: the model may be on the meta device. Tensors are traced as CPU
    tensors, so no GPU is needed.

    Args:
        example_inputs: keyword or positional arguments of the model, on the CPU; their values do not
            matter, their shapes do.

    Raises:
        InfeasiblePlan: nothing fits; says the least that could, per tier.
        CaptureError: the step cannot be captured as one graph.
        LohanError: an argument is out of range, or the inputs are not what forward() takes.
    """
    settings = _settings(
        model,
        budget,
        device="cpu",
        overlap=overlap,
        policy=policy,
        pin=pin,
        max_writes_per_day=max_writes_per_day,
        hardware=hardware,
        lowering=lowering,
        plan_only=True,
    )
    session = _trace(model, example_inputs, dtype, settings)
    if not session.captured:
        raise _nothing_captured(model)
    return session.captured[-1].plan


def trace_step(
    model: torch.nn.Module,
    budget: str | int | Budget,
    example_inputs: Mapping[str, Any] | Sequence[Any],
    *,
    hardware: machines.Hardware | str | os.PathLike[str] | None = None,
    dtype: torch.dtype | None = None,
    overlap: str = "auto",
    policy: str = DEFAULT_POLICY,
    max_writes_per_day: int | str | None = None,
    lowering: str = "inductor",
    bucket_numel: int | None = None,
) -> TracedStep:
    """One training step, traced once to be planned many times. `model` cannot be used afterwards.

    As `make_plan`, without deciding anything: the step plans itself for any policy, budget and pins.
    `policy` says what overlap="auto" is, `bucket_numel` how many parameters move as one at most (None
    leaves that to the model's size).

    Raises:
        CaptureError: the step cannot be captured as one graph.
        LohanError: an argument is out of range, or the inputs are not what forward() takes.
    """
    settings = _settings(
        model,
        budget,
        device="cpu",
        overlap=overlap,
        policy=policy,
        max_writes_per_day=max_writes_per_day,
        hardware=hardware,
        lowering=lowering,
        bucket_numel=bucket_numel,
        plan_only=True,
        trace_only=True,
    )
    session = _trace(model, example_inputs, dtype, settings)
    if session.traced is None:
        raise _nothing_captured(model)
    return session.traced


def _trace(
    model: torch.nn.Module,
    example_inputs: Mapping[str, Any] | Sequence[Any],
    dtype: torch.dtype | None,
    settings: Settings,
) -> Session:
    """A session that has traced the model once, and is closed."""
    _check_dtype(dtype)
    args, kwargs = (
        ((), dict(example_inputs))
        if isinstance(example_inputs, Mapping)
        else (tuple(example_inputs), {})
    )
    _check_arguments(model, args, kwargs)
    session = Session(model, dtype, settings)
    model.train()
    try:
        with paused_collector(), torch.enable_grad():
            session.call(args, kwargs)
    except PlanReady:
        pass
    finally:
        session.close()
        torch.compiler.reset()
    return session


def _nothing_captured(model: torch.nn.Module) -> CaptureError:
    return CaptureError(
        f"nothing of {type(model).__name__}.forward() could be captured: it ran without any tensor "
        "operation on these inputs"
    )


def _settings(
    model: torch.nn.Module,
    budget: str | int | Budget,
    *,
    device: torch.device | str | None,
    overlap: str,
    policy: Policy,
    plan: Plan | str | os.PathLike[str] | None = None,
    pin: Pins | None = None,
    max_writes_per_day: int | str | None,
    hardware: machines.Hardware | str | os.PathLike[str] | None,
    lowering: str,
    profile: str = "auto",
    poison: bool = False,
    bucket_numel: int | None = None,
    verify_io: bool = False,
    plan_only: bool = False,
    trace_only: bool = False,
) -> Settings:
    for name, value, allowed in (
        ("overlap", overlap, OVERLAPS),
        ("lowering", lowering, LOWERINGS),
        ("profile", profile, PROFILES),
    ):
        if value not in allowed:
            raise LohanError(f"{name} is {value!r}; choose one of {', '.join(allowed)}")
    if isinstance(policy, str):
        check_policy(policy)
    check_pins(pin or {})
    if pin and plan is not None:
        raise LohanError("pin= and plan= exclude one another: a plan says already where all is")
    where = _device(device)
    rates = _hardware(hardware, where)
    parsed = Budget.parse(budget)
    if plan_only:
        parsed = parsed.resolve(rates.machine())
    else:
        total = rates.gpu_memory_bytes
        if where.type == "cuda":
            total = torch.cuda.get_device_properties(where).total_memory
            if parsed.gpu > total:
                raise BudgetError(
                    f"the budget gives the GPU {format_bytes(parsed.gpu)}, but {where} has "
                    f"{format_bytes(total)}; lower gpu="
                )
        parsed = parsed.resolve(Machine.here(total))
        for path, _ in parsed.ssd or ():
            assert path is not None
            check_directory(path)
    assert parsed.dram is not None
    if isinstance(plan, str | os.PathLike):
        plan = _read_plan(Path(plan))
    return Settings(
        model_name=type(model).__name__,
        device=where,
        budget=parsed,
        capacities=Capacities(parsed.gpu, parsed.dram, parsed.ssd_bytes),
        hardware=rates,
        overlap=overlap,
        policy=policy,
        lowering=lowering,
        plan=plan,
        plan_only=plan_only,
        trace_only=trace_only,
        profile=profile,
        pin=dict(pin or {}),
        max_writes_per_day=None if max_writes_per_day is None else parse_bytes(max_writes_per_day),
        poison=poison,
        bucket_numel=bucket_numel,
        verify_io=verify_io,
    )


def _read_plan(path: Path) -> Plan:
    try:
        return Plan.from_json(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise LohanError(f"the plan {path} cannot be read: {error.strerror}") from error
    except (LohanError, UnicodeDecodeError) as error:
        raise LohanError(f"{path}: {error}") from error


def check_directory(path: Path) -> None:
    """Raise BudgetError unless files can be made in `path`; leaves nothing behind."""
    if not path.is_dir():
        what = "is not a directory" if path.exists() else "no such directory; make it first"
        raise BudgetError(f"ssd={path}: {what}")
    try:
        with tempfile.TemporaryFile(dir=path):
            pass
    except OSError as error:
        raise BudgetError(f"ssd={path}: cannot make files there ({error.strerror})") from error


def _check_dtype(dtype: torch.dtype | None) -> None:
    if dtype not in (None, torch.float32, torch.bfloat16, torch.float16):
        raise LohanError(f"dtype is {dtype}; choose torch.bfloat16, torch.float16 or torch.float32")


def _check_arguments(
    model: torch.nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> None:
    try:
        inspect.signature(model.forward).bind(*args, **kwargs)
    except TypeError as error:
        raise LohanError(
            f"the example inputs do not fit {type(model).__name__}.forward(): {error}"
        ) from None


def _refuse_meta(model: torch.nn.Module, filled: frozenset[str]) -> None:
    for kind, named in (
        ("parameter", model.named_parameters()),
        ("buffer", model.named_buffers()),
    ):
        for name, tensor in named:
            if tensor.is_meta and name not in filled:
                raise LohanError(
                    f"{kind} {name!r} is on the meta device and has no values to train; give weights=, "
                    "or build the model on the CPU (lohan_fx.make_plan takes it as it is)"
                )


def _device(device: torch.device | str | None) -> torch.device:
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    where = torch.device(device)
    if where.type not in ("cuda", "cpu"):
        raise LohanError(f"device is {device!r}; lohan_fx runs on cuda and cpu")
    if where.type == "cuda":
        if not torch.cuda.is_available():
            raise LohanError("device is 'cuda', but torch sees no CUDA device here")
        if where.index is None:
            where = torch.device("cuda", torch.cuda.current_device())
    return where


def _measured_once(settings: Settings, phases: Phases) -> machines.Hardware:
    """This machine's rates from measurements; see lohan_fx.probe.once."""
    directories = [path for path, _ in settings.budget.ssd or () if path is not None]
    measuring = functools.partial(phases.timed, "measure the machine")
    return measured_once(settings.device, directories, measuring=measuring)


def _hardware(
    hardware: machines.Hardware | str | os.PathLike[str] | None, device: torch.device
) -> machines.Hardware:
    if isinstance(hardware, machines.Hardware):
        return hardware
    if isinstance(hardware, str | os.PathLike):
        return machines.load(hardware)
    if device.type == "cpu":
        return machines.detect()
    return machines.nearest(torch.cuda.get_device_name(device))


__all__ = ["CompiledModel", "check_directory", "compile", "make_plan", "trace_step"]
