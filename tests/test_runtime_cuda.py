"""The runtime on a CUDA device: the same steps, with kernels that take long enough to lose a race."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from toy import (
    PLACES,
    STREAMED,
    D,
    Driver,
    G,
    Hyper,
    Reference,
    S,
    all_places,
    make_buckets,
    make_program,
    make_runtime,
    make_slots,
    place,
)

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
MODES = ["backward", "next-forward", "speculative", "serial", "naive"]


@pytest.mark.parametrize("linger", [0, 300_000])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", PLACES)
def test_steps_on_cuda_have_the_bits_of_plain_adam(
    tmp_path: Path, dtype: str, mode: str, linger: int
) -> None:
    placements = all_places(dtype) * 3
    buckets = make_buckets(len(placements) + 1, dtype, frozen=[len(placements)])
    placements.append(place(S, S))
    program = make_program(buckets, make_slots([D, S, S, D, S, S, D], dtype))
    runtime = make_runtime(
        tmp_path,
        buckets,
        placements,
        [program],
        hyper=Hyper(),
        overlap=mode,
        device="cuda",
        poison=True,
    )
    driver, reference = Driver(runtime, buckets, linger=linger), Reference(buckets)
    for _ in range(4):
        driver.train(program)
        reference.step()
    by_gpu = frozenset(i for i, p in enumerate(placements) if p.by_gpu)
    reference.check(runtime, rounded=by_gpu)
    runtime.close()


@pytest.mark.parametrize("linger", [0, 300_000])
@pytest.mark.parametrize("mode", ["backward", "next-forward", "serial"])
def test_states_that_pass_through_the_gpu_have_the_bits_of_those_that_rest_there(
    tmp_path: Path, mode: str, linger: int
) -> None:
    buckets = make_buckets(6, "bfloat16")
    program = make_program(buckets, make_slots([D, S, D], "bfloat16"))
    found = []
    for placements in ([place(G, G)] * 6, STREAMED["bfloat16"] * 3):
        runtime = make_runtime(
            tmp_path,
            buckets,
            placements,
            [program],
            hyper=Hyper(),
            overlap=mode,
            device="cuda",
            poison=True,
        )
        driver = Driver(runtime, buckets, linger=linger)
        for _ in range(4):
            driver.train(program)
        values = runtime.values
        found.append(
            [
                value
                for bucket in buckets
                for spec in bucket.params
                for value in (
                    values.weight(spec.pid),
                    values.master(spec.pid),
                    *values.moments(spec.pid),
                )
            ]
        )
        runtime.close()
    assert all(torch.equal(*pair) for pair in zip(*found, strict=True))


def test_clipping_on_cuda_is_that_of_the_cpu(tmp_path: Path) -> None:
    buckets = make_buckets(4, "bfloat16")
    program = make_program(buckets)
    placements = [place(D, D), place(G, D), place(S, S), place(G, G)]
    norms = []
    for device in ("cpu", "cuda"):
        runtime = make_runtime(
            tmp_path,
            buckets,
            placements,
            [program],
            hyper=Hyper(max_grad_norm=0.5),
            overlap="next-forward",
            device=device,
        )
        driver = Driver(runtime, buckets)
        for _ in range(2):
            driver.train(program)
        norms.append(runtime.last_grad_norm)
        runtime.close()
    assert norms[1] == pytest.approx(norms[0], rel=1e-5)


def test_a_close_in_the_middle_of_a_backward_returns_pinned_memory(tmp_path: Path) -> None:
    for dtype, placements in (
        ("float32", [place(D, D), place(S, S), place(D, S)]),
        ("bfloat16", [*STREAMED["bfloat16"], place(D, S)]),
        ("bfloat16", [place(S, S), *STREAMED["bfloat16"]]),
    ):
        buckets = make_buckets(3, dtype)
        program = make_program(buckets, make_slots([S, D, S], dtype))
        runtime = make_runtime(
            tmp_path,
            buckets,
            placements,
            [program],
            hyper=Hyper(),
            device="cuda",
        )
        driver = Driver(runtime, buckets, linger=1_000_000)
        driver.train(program)
        driver.forward(program)
        for move in program.backward[:8]:
            driver.move(program, move)
        runtime.close()
    torch.cuda.synchronize()


def test_device_memory_of_steps_goes_back(tmp_path: Path) -> None:
    placements = all_places("bfloat16")
    buckets = make_buckets(len(placements), "bfloat16")
    program = make_program(buckets, make_slots([S, D, S], "bfloat16"))
    runtime = make_runtime(tmp_path, buckets, placements, [program], hyper=Hyper(), device="cuda")
    driver = Driver(runtime, buckets)
    held = []
    for _ in range(4):
        driver.train(program)
        runtime.drain()
        driver.seen.clear()
        held.append(torch.cuda.memory_allocated())
    assert held[1] == held[3]
    runtime.close()
