"""CPU Adam: the same bits for every instruction set and split, and torch's numbers."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch

from lohan_fx import native

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
GRAD_DTYPES = ("float32", "bfloat16", "float16")
OUT_DTYPES = (None, "bfloat16", "float16")
SIZES = (*range(71), 1000, 4099)
VECTOR_ISAS = [isa for isa in native.available_isas() if isa != "scalar"]

HYPER = {
    "lr": 3e-3,
    "beta1": 0.9,
    "beta2": 0.999,
    "eps": 1e-8,
    "weight_decay": 0.05,
    "decoupled": True,
    "step": 3,
    "grad_scale": 0.75,
}
VARIANTS = {
    "adamw": {},
    "l2": {"decoupled": False},
    "no_decay": {"weight_decay": 0.0},
    "small_beta1": {"beta1": 0.25},
    "late_step": {"step": 100_000},
}


@dataclass(frozen=True, slots=True)
class Arrays:
    """One bucket's arrays, all of N elements. `out` may be `grad` itself."""

    master: torch.Tensor
    exp_avg: torch.Tensor
    exp_avg_sq: torch.Tensor
    grad: torch.Tensor
    out: torch.Tensor | None

    def clone(self) -> Arrays:
        grad = self.grad.clone()
        out = grad if self.out is self.grad else None if self.out is None else self.out.clone()
        return Arrays(self.master.clone(), self.exp_avg.clone(), self.exp_avg_sq.clone(), grad, out)

    def tensors(self) -> list[torch.Tensor]:
        out = [] if self.out is None else [self.out]
        return [self.master, self.exp_avg, self.exp_avg_sq, *out]


def make_arrays(numel: int, grad_dtype: str, out_dtype: str | None, seed: int = 0) -> Arrays:
    """Values over many magnitudes, with zeros of both signs and denormals among them."""
    gen = torch.Generator().manual_seed(seed)

    def values() -> torch.Tensor:
        spread = torch.pow(10.0, torch.rand(numel, generator=gen) * 12 - 9)
        mixed = torch.randn(numel, generator=gen) * spread
        mixed[::17] = 0.0
        mixed[5::23] = -0.0
        mixed[7::29] = 1e-41
        return mixed

    out = None if out_dtype is None else torch.zeros(numel, dtype=DTYPES[out_dtype])
    grad = values().to(DTYPES[grad_dtype])
    return Arrays(values(), values(), values().abs(), grad, out)


def update(arrays: Arrays, begin: int = 0, end: int | None = None, **settings: object) -> None:
    """Runs the native update on elements [begin, end)."""
    end = len(arrays.master) if end is None else end

    def address(tensor: torch.Tensor) -> int:
        return tensor.data_ptr() + begin * tensor.element_size()

    native.adam_update(
        address(arrays.master),
        address(arrays.exp_avg),
        address(arrays.exp_avg_sq),
        address(arrays.grad),
        str(arrays.grad.dtype).removeprefix("torch."),
        0 if arrays.out is None else address(arrays.out),
        None if arrays.out is None else str(arrays.out.dtype).removeprefix("torch."),
        end - begin,
        **(HYPER | settings),
    )


def bits(tensor: torch.Tensor) -> torch.Tensor:
    """Bit patterns, with every NaN taken for the same."""
    whole = tensor.view(torch.int32 if tensor.element_size() == 4 else torch.int16)
    return torch.where(tensor.isnan(), torch.full_like(whole, -1), whole)


def assert_same_bits(left: Arrays, right: Arrays) -> None:
    for a, b in zip(left.tensors(), right.tensors(), strict=True):
        assert torch.equal(bits(a), bits(b))


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("isa", VECTOR_ISAS)
def test_vector_code_gives_the_bits_of_scalar_code(isa: str, variant: str) -> None:
    settings = VARIANTS[variant]
    for grad_dtype, out_dtype in itertools.product(GRAD_DTYPES, OUT_DTYPES):
        for numel in SIZES if variant == "adamw" else SIZES[::6]:
            expected = make_arrays(numel, grad_dtype, out_dtype, seed=numel)
            actual = expected.clone()
            update(expected, isa="scalar", **settings)
            update(actual, isa=isa, **settings)
            assert_same_bits(actual, expected)


@pytest.mark.parametrize("isa", native.available_isas())
def test_where_an_array_is_split_does_not_change_a_bit(isa: str) -> None:
    whole = make_arrays(333, "bfloat16", "bfloat16")
    parts = whole.clone()
    update(whole, isa=isa)
    cuts = [0, 1, 3, 64, 65, 100, 177, 256, 331, 333]
    for begin, end in itertools.pairwise(cuts):
        update(parts, begin, end, isa=isa)
    assert_same_bits(parts, whole)


@pytest.mark.parametrize("isa", native.available_isas())
def test_an_update_leaves_its_neighbours_alone(isa: str) -> None:
    arrays = make_arrays(200, "float16", "bfloat16")
    before = arrays.clone()
    update(arrays, 37, 137, isa=isa)
    for now, then in zip(arrays.tensors(), before.tensors(), strict=True):
        assert torch.equal(now[:37], then[:37])
        assert torch.equal(now[137:], then[137:])
        assert not torch.equal(now[37:137], then[37:137])


@pytest.mark.parametrize("num_threads", [1, 2, 3, 8])
def test_the_number_of_threads_does_not_change_a_bit(num_threads: int) -> None:
    expected = make_arrays(300_001, "bfloat16", "float16")
    actual = expected.clone()
    update(expected, isa="scalar", num_threads=1)
    update(actual, num_threads=num_threads)
    assert_same_bits(actual, expected)


@pytest.mark.parametrize("isa", native.available_isas())
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_new_weights_may_replace_the_gradient(isa: str, dtype: str) -> None:
    apart = make_arrays(1003, dtype, dtype)
    shared = apart.clone()
    shared = replace(shared, out=shared.grad)
    update(apart, isa=isa)
    update(shared, isa=isa)
    assert_same_bits(shared, apart)


@pytest.mark.parametrize("isa", native.available_isas())
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_weights_are_rounded_as_torch_rounds_them(isa: str, dtype: str) -> None:
    # lr 0: the weights stay as they are and are only converted. Every float16 and bfloat16 value,
    # what lies halfway between two of them and just beside that, infinities and NaNs.
    patterns = torch.arange(-(2**15), 2**15, dtype=torch.int32)
    halfway = (torch.tensor([0x7FFF, 0x8000, 0x8001, 0xFFF, 0x1000, 0x1001]))[:, None]
    as_bf16 = ((patterns << 16)[None] + halfway).flatten().to(torch.int32).view(torch.float32)
    as_f16 = patterns.to(torch.int16).view(torch.float16).float()
    f16_halfway = ((as_f16.view(torch.int32))[None] + halfway).flatten().to(torch.int32)
    weights = torch.cat([as_bf16, as_f16, f16_halfway.view(torch.float32)])
    numel = len(weights)
    arrays = Arrays(
        weights.clone(),
        torch.zeros(numel),
        torch.zeros(numel),
        torch.zeros(numel),
        torch.zeros(numel, dtype=DTYPES[dtype]),
    )
    update(arrays, isa=isa, lr=0.0)
    assert arrays.out is not None
    assert torch.equal(bits(arrays.out), bits(weights.to(DTYPES[dtype])))


@pytest.mark.parametrize("isa", native.available_isas())
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_every_16_bit_gradient_is_read_exactly(isa: str, dtype: str) -> None:
    grads = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(DTYPES[dtype])
    numel = len(grads)
    arrays = Arrays(torch.zeros(numel), torch.zeros(numel), torch.zeros(numel), grads, None)
    update(arrays, isa=isa, beta1=0.0, grad_scale=1.0)
    finite = grads.isfinite()
    assert torch.equal(arrays.exp_avg[finite], grads[finite].float())
    assert arrays.exp_avg[~finite].isnan().all()


@pytest.mark.parametrize("isa", native.available_isas())
def test_nan_and_infinity_stay_where_they_are(isa: str) -> None:
    arrays = make_arrays(70, "float32", "bfloat16")
    clean = arrays.clone()
    arrays.grad[3] = float("nan")
    arrays.grad[20] = float("inf")
    arrays.master[40] = float("-inf")
    arrays.master[66] = float("nan")
    update(arrays, isa=isa)
    update(clean, isa=isa)
    assert arrays.out is not None
    touched = [3, 20, 40, 66]
    assert arrays.out[[3, 20, 66]].isnan().all()
    assert arrays.out[40] == float("-inf")
    others = [i for i in range(70) if i not in touched]
    for now, then in zip(arrays.tensors(), clean.tensors(), strict=True):
        assert torch.equal(now[others], then[others])


@pytest.mark.parametrize("isa", native.available_isas())
def test_denormals_survive_a_thread_set_to_flush_them(isa: str) -> None:
    expected = make_arrays(100, "float32", None)
    actual = expected.clone()
    update(expected, isa=isa, num_threads=1)
    if not torch.set_flush_denormal(True):
        pytest.skip("this CPU cannot flush denormals")
    try:
        update(actual, isa=isa, num_threads=1)
    finally:
        torch.set_flush_denormal(False)
    assert_same_bits(actual, expected)


@pytest.mark.parametrize("beta1", [0.9, 0.3, 0.0])
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize("decoupled", [True, False])
def test_200_steps_follow_torch(decoupled: bool, weight_decay: float, beta1: float) -> None:
    numel = 2000
    gen = torch.Generator().manual_seed(1)
    start = torch.randn(numel, generator=gen)
    param = torch.nn.Parameter(start.clone())
    kind = torch.optim.AdamW if decoupled else torch.optim.Adam
    reference = kind(
        [param], lr=1e-3, betas=(beta1, 0.999), weight_decay=weight_decay, foreach=False
    )
    arrays = Arrays(start.clone(), torch.zeros(numel), torch.zeros(numel), start.clone(), None)
    for step in range(1, 201):
        grad = torch.randn(numel, generator=gen) * (0.1 + step / 100)
        param.grad = grad
        reference.step()
        arrays.grad.copy_(grad)
        update(
            arrays,
            lr=1e-3,
            beta1=beta1,
            weight_decay=weight_decay,
            decoupled=decoupled,
            step=step,
            grad_scale=1.0,
        )
    state = reference.state[param]
    torch.testing.assert_close(arrays.master, param.detach(), rtol=1e-6, atol=1e-7)
    # Moments are sums of gradients of size 1 that may cancel.
    torch.testing.assert_close(arrays.exp_avg, state["exp_avg"], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(arrays.exp_avg_sq, state["exp_avg_sq"], rtol=1e-6, atol=1e-6)


def test_a_scaled_gradient_is_that_of_an_unscaled_one() -> None:
    plain = make_arrays(500, "float32", None)
    scaled = plain.clone()
    scaled.grad.mul_(1024.0)
    update(plain, grad_scale=1.0)
    update(scaled, grad_scale=1.0 / 1024.0)
    normal = plain.grad.abs() > 1e-30  # a denormal times 1024 is another number
    for a, b in zip(plain.tensors(), scaled.tensors(), strict=True):
        assert torch.equal(a[normal], b[normal])


UNTOUCHED = -7.0


def room(numel: int, moved: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """A slice of something larger, `moved` elements behind an address that vectors may be streamed to."""
    start = 16 + moved
    return torch.full((start + numel + 16,), UNTOUCHED, dtype=dtype)[start : start + numel]


def around(tensor: torch.Tensor) -> torch.Tensor:
    """What is left and right of such a slice."""
    whole, start = tensor._base, tensor.storage_offset()
    assert whole is not None
    return torch.cat([whole[:start], whole[start + len(tensor) :]])


def new_pointers(new: list[torch.Tensor]) -> dict[str, int]:
    names = ("new_master_ptr", "new_exp_avg_ptr", "new_exp_avg_sq_ptr")
    return {name: tensor.data_ptr() for name, tensor in zip(names, new, strict=True)}


@pytest.mark.parametrize(("moved", "out_moved"), [(0, 0), (0, 1), (1, 0), (8, 8)])
@pytest.mark.parametrize("variant", ["adamw", "l2"])
@pytest.mark.parametrize("isa", native.available_isas())
def test_new_arrays_receive_the_bits_of_an_update_in_place(
    isa: str, variant: str, moved: int, out_moved: int
) -> None:
    settings = VARIANTS[variant]
    for grad_dtype, out_dtype in itertools.product(GRAD_DTYPES, OUT_DTYPES):
        for numel in (1, 5, 15, 16, 33, 64, 100, 1003):
            in_place = make_arrays(numel, grad_dtype, out_dtype, seed=numel)
            old = in_place.clone()
            apart = in_place.clone()
            if out_dtype is not None:
                apart = replace(apart, out=room(numel, out_moved, DTYPES[out_dtype]))
            new = [room(numel, moved) for _ in range(3)]
            update(in_place, isa=isa, **settings)
            update(apart, isa=isa, **settings, **new_pointers(new))
            written = new if apart.out is None else [*new, apart.out]
            for tensor, expected in zip(written, in_place.tensors(), strict=True):
                assert torch.equal(bits(tensor), bits(expected))
                assert (around(tensor) == UNTOUCHED).all()
            for now, then in zip(apart.tensors()[:3], old.tensors()[:3], strict=True):
                assert torch.equal(bits(now), bits(then))


@pytest.mark.parametrize("isa", native.available_isas())
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_with_new_arrays_weights_may_still_replace_the_gradient(isa: str, dtype: str) -> None:
    in_place = make_arrays(1003, dtype, dtype)
    shared = in_place.clone()
    shared = replace(shared, out=shared.grad)
    new = [room(1003, 0) for _ in range(3)]
    update(in_place, isa=isa)
    update(shared, isa=isa, **new_pointers(new))
    for tensor, expected in zip([*new, shared.grad], in_place.tensors(), strict=True):
        assert torch.equal(bits(tensor), bits(expected))


def test_threads_see_the_same_new_arrays() -> None:
    in_place = make_arrays(300_001, "bfloat16", "float16")
    apart = in_place.clone()
    new = [room(300_001, 0) for _ in range(3)]
    update(in_place, isa="scalar", num_threads=1)
    update(apart, num_threads=2, **new_pointers(new))
    for tensor, expected in zip([*new, apart.out], in_place.tensors(), strict=True):
        assert tensor is not None
        assert torch.equal(bits(tensor), bits(expected))


def run_python(code: str, isa: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"LOHAN_FX_ISA": isa, "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        timeout=60,
    )


@pytest.mark.parametrize("isa", native.available_isas())
def test_the_environment_picks_the_instruction_set(isa: str) -> None:
    done = run_python("from lohan_fx import native; assert native.isa() == " + repr(isa), isa)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("call", ["isa()", "AdamPipeline()"])
def test_an_unknown_instruction_set_lists_the_available_ones(call: str) -> None:
    done = run_python(f"from lohan_fx import native; native.{call}", "mmx")
    assert done.returncode == 1
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("ValueError: LOHAN_FX_ISA: ")
    assert "'mmx'" in last
    assert ", ".join(native.available_isas()) in last


@contextmanager
def refused(*words: str) -> Iterator[None]:
    with pytest.raises(ValueError) as caught:
        yield
    for word in words:
        assert word in str(caught.value)


def test_a_call_that_makes_no_sense_says_why() -> None:
    arrays = make_arrays(4, "float32", None)
    pointers = [t.data_ptr() for t in (*arrays.tensors(), arrays.grad)]
    with refused("'sse9'", "scalar"):
        native.adam_update(*pointers, "float32", 0, None, 4, **HYPER, isa="sse9")
    with refused("'float64'", "float32, bfloat16 or float16"):
        native.adam_update(*pointers, "float64", 0, None, 4, **HYPER)
    with refused("out_ptr and out_dtype"):
        native.adam_update(*pointers, "float32", 0, "bfloat16", 4, **HYPER)
    with refused("null pointer"):
        native.adam_update(0, *pointers[1:], "float32", 0, None, 4, **HYPER)
    with refused("new arrays for master and both moments, or for none"):
        native.adam_update(*pointers, "float32", 0, None, 4, **HYPER, new_master_ptr=pointers[0])
    with refused("counts from 1", "0"):
        native.adam_update(*pointers, "float32", 0, None, 4, **(HYPER | {"step": 0}))


@pytest.mark.parametrize("beta1", [0.9, 0.3])
@pytest.mark.parametrize("decoupled", [True, False])
def test_factors_applied_one_by_one_give_the_bits_of_the_update(
    decoupled: bool, beta1: float
) -> None:
    scalars = HYPER | {"beta1": beta1, "decoupled": decoupled, "step": 3, "unscale": 0.5}
    generator = np.random.default_rng(1)
    p, m, g, v = (generator.standard_normal(100, np.float32) for _ in range(4))
    v = np.abs(v)
    unscale, clip, decay, l2, blend, from_grad, beta2, rest, bias2, eps, size = native.adam_factors(
        native.AdamStep(**scalars)
    )
    # numpy rounds each operation to fp32, as the update does; torch's division may be off by one bit.
    scaled = g * unscale * clip
    if l2:
        scaled = scaled + l2 * p
    m2 = (scaled if from_grad else m) + blend * (scaled - m)
    v2 = v * beta2 + rest * scaled * scaled
    p2 = p * decay - size * m2 / (np.sqrt(v2) / bias2 + eps)
    pointers = [array.ctypes.data for array in (p, m, v, g)]
    native.adam_update(*pointers, "float32", 0, None, 100, **scalars)
    for updated, wanted in ((p, p2), (m, m2), (v, v2)):
        np.testing.assert_array_equal(updated, wanted)
