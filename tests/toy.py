"""A toy model for the runtime: buckets, programs and a driver that makes a program's moves by hand.

The gradient of a parameter is a fixed function of its weight, so a reference is a few lines, and any
stale or torn weight shows in the next step's bits.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch

from lohan_fx import native
from lohan_fx.program import (
    DTYPE_BYTES,
    PARAM_ALIGN,
    Bucket,
    BucketPlacement,
    Move,
    ParamSpec,
    Program,
    Slot,
    Tier,
)
from lohan_fx.runtime import AdamGroup, Runtime, RuntimeOptions

G, D, S = Tier.GPU, Tier.DRAM, Tier.SSD
# A runtime does not keep its optimizer alive.
_KEPT: weakref.WeakKeyDictionary[Runtime, Hyper] = weakref.WeakKeyDictionary()
GROUP = AdamGroup(lr=0.1, beta1=0.9, beta2=0.99, eps=1e-8, weight_decay=0.01, decoupled=True)
PLACES = {
    "float32": [(G, G), (D, D), (D, S), (S, D), (S, S)],
    "bfloat16": [(G, G), (G, D), (G, S), (D, D), (D, S), (S, D), (S, S)],
}


# States in DRAM that the GPU updates: they need a master apart from the weight.
STREAMED = {
    "float32": [],
    "bfloat16": [BucketPlacement(G, D, streamed=True), BucketPlacement(D, D, streamed=True)],
}


def place(weight: Tier, state: Tier) -> BucketPlacement:
    return BucketPlacement(weight, state)


def all_places(dtype: str) -> list[BucketPlacement]:
    """Every place that a bucket may have: those of PLACES, then STREAMED."""
    return [*(place(*tiers) for tiers in PLACES[dtype]), *STREAMED[dtype]]


def make_buckets(count: int, dtype: str = "float32", *, frozen: Sequence[int] = ()) -> list[Bucket]:
    """Buckets of a matrix, its transpose-strided twin and a vector; no two have the same size."""
    buckets = []
    for index in range(count):
        rows = 5 + index
        shapes = [((rows, 300), (300, 1)), ((rows, 40), (1, rows)), ((7,), (1,))]
        specs, offset = [], 0
        for number, (shape, stride) in enumerate(shapes):
            numel = math.prod(shape)
            specs.append(
                ParamSpec(
                    3 * index + number,
                    f"b{index}.p{number}",
                    shape,
                    stride,
                    offset,
                    numel,
                    index not in frozen,
                )
            )
            offset += -(-numel // PARAM_ALIGN) * PARAM_ALIGN
        name = f"bucket {index}"
        buckets.append(Bucket(index, name, dtype, tuple(specs), offset, index not in frozen))
    return buckets


def make_slots(tiers: Sequence[Tier], dtype: str = "float32") -> tuple[Slot, ...]:
    slots = []
    for index, tier in enumerate(tiers):
        shape = (3 + index, 500)
        stride = (500, 1) if index % 2 else (1, 3 + index)
        nbytes = math.prod(shape) * DTYPE_BYTES[dtype]
        slots.append(Slot(index, f"x{index}", shape, stride, dtype, nbytes, tier))
    return tuple(slots)


def make_program(
    buckets: Sequence[Bucket],
    slots: Sequence[Slot] = (),
    *,
    index: int = 0,
    ahead: int = 2,
    skip: Sequence[int] = (),
) -> Program:
    """Forward over all buckets, backward in reverse; fetches run `ahead` buckets ahead.

    Slot k goes out after bucket k. A bucket's first gradient comes before its release, the others
    after. `skip` are pids that get no gradient.
    """
    order = [bucket.index for bucket in buckets]
    by_index = {bucket.index: bucket for bucket in buckets}
    swapped = {slot.index for slot in slots}

    def fetches(order: Sequence[int], at: int) -> list[Move]:
        first = range(ahead + 1) if at == 0 else range(at + ahead, at + ahead + 1)
        return [Move("fetch", order[i]) for i in first if i < len(order)]

    forward: list[Move] = [Move("begin", index)]
    for at, bucket in enumerate(order):
        forward += [*fetches(order, at), Move("wait", bucket), Move("release", bucket)]
        if bucket in swapped:
            forward += [Move("offload", bucket), Move("offload_wait", bucket)]
    forward.append(Move("end", 0))

    backward: list[Move] = [Move("begin_backward", 0)]
    last_first = order[::-1]
    for at, bucket in enumerate(last_first):
        if bucket in swapped:
            backward.append(Move("reload", bucket))
        backward += [*fetches(last_first, at), Move("wait", bucket)]
        if bucket in swapped:
            backward.append(Move("reload_wait", bucket))
        pids = [p.pid for p in by_index[bucket].params if p.trainable and p.pid not in skip]
        grads = [Move("grad", pid) for pid in pids]
        backward += [*grads[:1], Move("release", bucket), *grads[1:]]
    backward.append(Move("end", 0))
    return Program(index, True, tuple(slots), tuple(forward), tuple(backward))


def evaluation(program: Program, index: int) -> Program:
    moves = [m for m in program.forward if not m.op.startswith("offload")]
    moves[0] = Move("begin", index)
    return Program(index, False, (), tuple(moves), ())


def gradient(pid: int, weight: torch.Tensor) -> torch.Tensor:
    return (weight.float() * 0.5 + 0.01 * (pid + 1)).to(weight.dtype)


def activation(slot: Slot, salt: float, device: torch.device) -> torch.Tensor:
    count = math.prod(slot.shape)
    flat = torch.arange(count, dtype=torch.float32).mul_(0.001).add_(salt + slot.index)
    return flat.view(slot.shape).to(device, getattr(torch, slot.dtype))


@dataclass
class Hyper:
    """Stands in for an optimizer."""

    max_grad_norm: float | None = None
    norm_type: float = 2.0
    skip_nonfinite: bool = False
    checks_finite: bool = False
    each: list[AdamGroup] = field(default_factory=lambda: [GROUP])
    left_out: frozenset[int] = frozenset()

    @property
    def waits(self) -> str | None:
        return None if self.max_grad_norm is None else f"max_grad_norm={self.max_grad_norm}"

    def groups(self) -> list[AdamGroup]:
        return list(self.each)

    def group_of(self, pid: int) -> int | None:
        return None if pid in self.left_out else pid % len(self.each)


def values_of(buckets: Sequence[Bucket]) -> dict[int, torch.Tensor]:
    """fp32 values, so that 16-bit buckets get masters with more bits than their weights."""
    generator = torch.Generator().manual_seed(0)
    return {
        spec.pid: torch.randn(spec.shape, generator=generator)
        for bucket in buckets
        for spec in bucket.params
    }


def stubs_of(buckets: Sequence[Bucket]) -> dict[int, torch.nn.Parameter]:
    return {
        spec.pid: torch.nn.Parameter(
            torch.empty_strided(spec.shape, spec.stride, dtype=getattr(torch, bucket.dtype))
        )
        for bucket in buckets
        for spec in bucket.params
    }


SIZES = {
    "grad_window_bytes": 4096,
    "inbound_bytes": 1 << 16,
    "outbound_bytes": 1 << 15,
    "stream_bytes": 3 * 12 * 1024,  # a bucket is two or three pieces
    "grad_buffers": 2,
    "num_adam_threads": 1,
    "deadline_s": 20.0,
}


def make_runtime(
    tmp_path: Path,
    buckets: Sequence[Bucket],
    placements: Sequence[BucketPlacement],
    programs: Sequence[Program] = (),
    *,
    hyper: Hyper | None = None,
    faults: dict[str, object] | None = None,
    gpu_bytes: int | None = None,
    dram_bytes: int | None = None,
    device: str = "cpu",
    **options: object,
) -> Runtime:
    """A runtime with everything adopted and, with `hyper`, an optimizer attached."""
    engine = native.FileEngine([str(tmp_path)], faults=faults) if faults is not None else None
    runtime = Runtime(
        torch.device(device),
        gpu_bytes=gpu_bytes,
        dram_bytes=dram_bytes,
        ssd=() if engine is not None else ((str(tmp_path), None),),
        options=RuntimeOptions(**{**SIZES, **options}),  # type: ignore[arg-type]
        engine=engine,
    )
    for program in programs:
        runtime.passes.add_program(program)
    runtime.adopt(buckets, stubs_of(buckets), values_of(buckets), placements)
    if hyper is not None:
        runtime.attach(hyper)
        _KEPT[runtime] = hyper
    return runtime


@dataclass
class Driver:
    """Makes a program's moves one by one, as a skeleton would."""

    runtime: Runtime
    buckets: Sequence[Bucket]
    live: dict[int, list[torch.Tensor]] = field(default_factory=dict)
    sources: dict[int, torch.Tensor] = field(default_factory=dict)
    saved: dict[int, torch.Tensor] = field(default_factory=dict)
    seen: dict[int, torch.Tensor] = field(default_factory=dict)
    handle: torch.Tensor | None = None
    salt: float = 0.0
    pairs: list[tuple[torch.Tensor, torch.Tensor]] = field(default_factory=list)
    factor: float = 1.0  # of every gradient
    linger: int = 0  # GPU clock cycles that each wait and gradient takes, to bring races out

    @property
    def device(self) -> torch.device:
        return self.runtime.device

    def forward(self, program: Program) -> torch.Tensor:
        self.salt += 1
        for move in program.forward:
            self.move(program, move)
        assert self.handle is not None
        return self.handle

    def backward(self, program: Program) -> None:
        for move in program.backward:
            self.move(program, move)
        self.handle = None
        self.saved.clear()
        # Compared at the end only: a comparison on the way would let the device catch up.
        assert all(torch.equal(value, saved) for value, saved in self.pairs)
        self.pairs.clear()

    def train(self, program: Program) -> None:
        self.forward(program)
        self.backward(program)
        self.runtime.step()

    def pause(self) -> None:
        if self.linger:
            torch.cuda._sleep(self.linger)

    def move(self, program: Program, move: Move) -> None:
        ops, number, arg = torch.ops.lohan, self.runtime.number, move.arg
        if move.op == "begin":
            self.handle = ops.begin(number, arg)
        elif move.op == "begin_backward":
            ops.begin_backward(number, self.handle)
        elif move.op == "end":
            ops.end(number)
        elif move.op == "wait":
            views = ops.wait(number, arg)
            self.pause()
            bucket = self.buckets[arg]
            self.live[arg] = views
            for spec, view in zip(bucket.params, views, strict=True):
                assert view.shape == spec.shape and view.stride() == spec.stride
                if self.device.type == "cpu":
                    assert not view.isnan().any(), f"{spec.name} is poisoned"
                self.seen[spec.pid] = view.clone()
                view = None
        elif move.op == "release":
            self.live.pop(arg)
            ops.release(number, arg)
        elif move.op == "offload":
            x = activation(program.slots[arg], self.salt, self.device)
            self.saved[arg], self.sources[arg] = x.clone(), x
            ops.offload(number, arg, x)
        elif move.op == "offload_wait":
            ops.offload_wait(number, arg)
            self.sources.pop(arg)
        elif move.op == "reload_wait":
            value, slot = ops.reload_wait(number, arg), program.slots[arg]
            assert value.stride() == slot.stride
            self.pairs.append((value.clone(), self.saved.pop(arg)))
        elif move.op == "grad":
            self.pause()
            ops.grad(number, arg, gradient(arg, self.seen[arg]) * self.factor)
        else:
            getattr(ops, move.op)(number, arg)


@dataclass
class Reference:
    """The same steps in plain arrays: fp32 masters and moments, native Adam, nothing moves."""

    buckets: Sequence[Bucket]
    hyper: Hyper = field(default_factory=Hyper)
    skip: Sequence[int] = ()
    steps: int = 0
    master: dict[int, torch.Tensor] = field(default_factory=dict)
    weight: dict[int, torch.Tensor] = field(default_factory=dict)
    exp_avg: dict[int, torch.Tensor] = field(default_factory=dict)
    exp_avg_sq: dict[int, torch.Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        values = values_of(self.buckets)
        for bucket in self.buckets:
            for spec in bucket.params:
                master = values[spec.pid].clone()
                self.master[spec.pid] = master
                self.weight[spec.pid] = master.to(getattr(torch, bucket.dtype))
                self.exp_avg[spec.pid] = torch.zeros(spec.shape)
                self.exp_avg_sq[spec.pid] = torch.zeros(spec.shape)

    def step(self, scale: float = 1.0) -> None:
        self.steps += 1
        groups = self.hyper.groups()
        for bucket in self.buckets:
            for spec in bucket.params:
                pid, group = spec.pid, self.hyper.group_of(spec.pid)
                if not spec.trainable or pid in self.skip or group is None:
                    continue
                grad = gradient(pid, self.weight[pid]).contiguous()
                self.update(pid, groups[group], grad, self.steps, scale)

    def update(
        self, pid: int, group: AdamGroup, grad: torch.Tensor, step: int, scale: float
    ) -> None:
        native.adam_update(
            self.master[pid].data_ptr(),
            self.exp_avg[pid].data_ptr(),
            self.exp_avg_sq[pid].data_ptr(),
            grad.data_ptr(),
            str(grad.dtype).removeprefix("torch."),
            0,
            None,
            grad.numel(),
            **asdict(group),
            step=step,
            grad_scale=scale,
        )
        self.weight[pid] = self.master[pid].to(self.weight[pid].dtype)

    def check(self, runtime: Runtime, *, rounded: frozenset[int] = frozenset()) -> None:
        """Every weight, master and moment has exactly these bits; nearly, in buckets `rounded`."""
        for bucket in self.buckets:
            for spec in bucket.params:
                pid = spec.pid
                pairs = [(runtime.values.weight(pid), self.weight[pid])]
                if spec.trainable:
                    pairs.append((runtime.values.master(pid), self.master[pid]))
                    pairs += zip(
                        runtime.values.moments(pid),
                        (self.exp_avg[pid], self.exp_avg_sq[pid]),
                        strict=True,
                    )
                for found, expected in pairs:
                    if bucket.index in rounded:
                        # A 16-bit weight that rounds the other way changes the next gradient.
                        atol = 1e-2 if found.dtype.itemsize == 2 else 1e-3
                        torch.testing.assert_close(found, expected, rtol=1e-2, atol=atol)
                    else:
                        assert torch.equal(found, expected), spec.name
