"""Optimizer jobs for tests: buckets beside the same ones updated plainly, a pipeline, a driver of events."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from lohan_fx import native

PAGE = 4096
TIMEOUT_S = 60.0
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
STATES = ("master", "exp_avg", "exp_avg_sq")


def round_up(size: int) -> int:
    return -(-size // PAGE) * PAGE


class Memory:
    """Page-aligned host memory seen as one tensor of `numel` elements."""

    def __init__(self, numel: int, dtype: torch.dtype) -> None:
        self.nbytes = numel * dtype.itemsize
        self.buffer = native.HostBuffer(round_up(max(self.nbytes, 1)), huge_pages=False)
        self.ptr = self.buffer.ptr
        self.tensor = torch.frombuffer(self.buffer, dtype=dtype, count=numel)


@contextmanager
def running(
    mode: str = "optimized",
    engine: native.FileEngine | None = None,
    *,
    num_threads: int = 1,
    num_buffers: int = 0,
    buffer_bytes: int = 1,
    **options: object,
) -> Iterator[native.AdamPipeline]:
    """A pipeline with its own state buffers, filled with rubbish."""
    memory = [Memory(buffer_bytes, torch.uint8) for _ in range(num_buffers)]
    for buffer in memory:
        buffer.tensor.fill_(0x5A)
    told = [(buffer.ptr, buffer.buffer.nbytes) for buffer in memory]
    pipeline = native.AdamPipeline(num_threads, mode, engine, told, **options)
    try:
        yield pipeline
    finally:
        pipeline.close()


class Bucket:
    """One bucket's arrays, those named in `on_ssd` in extents, and the same ones updated plainly.

    Segments leave gaps; values in the gaps must stay.
    """

    def __init__(
        self,
        name: str,
        numel: int,
        *,
        engine: native.FileEngine | None = None,
        on_ssd: tuple[str, ...] = (),
        grad_dtype: str = "bfloat16",
        out_dtype: str | None = "bfloat16",
        out_in_grad: bool = False,
        seed: int = 0,
    ) -> None:
        self.name, self.numel, self.engine, self.on_ssd = name, numel, engine, on_ssd
        self.grad_dtype, self.out_dtype = grad_dtype, out_dtype
        gen = torch.Generator().manual_seed(seed)
        self.gen = gen
        values = {
            "master": torch.randn(numel, generator=gen),
            "exp_avg": torch.randn(numel, generator=gen),
            "exp_avg_sq": torch.rand(numel, generator=gen),
        }
        self.plain = {key: value.clone() for key, value in values.items()}
        self.memory: dict[str, Memory] = {}
        self.extents: dict[str, tuple[int, int]] = {}
        for key, value in values.items():
            memory = Memory(numel, torch.float32)
            memory.tensor.copy_(value)
            if key in on_ssd:
                assert engine is not None
                # Not at the extent's start, so that offsets matter.
                self.extents[key] = (engine.allocate(PAGE + round_up(numel * 4)), PAGE)
                self.transfer("write", key, memory)
            else:
                self.memory[key] = memory
        self.grad = Memory(numel, DTYPES[grad_dtype])
        self.out: Memory | None = None
        self.plain_out: torch.Tensor | None = None
        if out_dtype is not None:
            self.plain_out = torch.zeros(numel, dtype=DTYPES[out_dtype])
            self.out = self.grad if out_in_grad else Memory(numel, DTYPES[out_dtype])
            if "out" in on_ssd:
                assert engine is not None
                self.extents["out"] = (engine.allocate(round_up(numel * 2)), 0)
        third = numel // 3
        self.segments = [(0, third, 0), (third + 5, third - 9, 1), (numel - 3, 2, 0)]

    def transfer(self, way: str, key: str, memory: Memory) -> None:
        extent, offset = self.extents[key]
        assert self.engine is not None
        move = getattr(self.engine, way)
        ticket = move(extent, offset, memory.ptr, memory.nbytes, f"{self.name} {key}")
        self.engine.wait(ticket, TIMEOUT_S)

    def new_gradient(self) -> None:
        self.grad.tensor.copy_(torch.randn(self.numel, generator=self.gen))

    def groups(self, step: int) -> list[dict[str, object]]:
        common = {"beta1": 0.9, "beta2": 0.99, "eps": 1e-8, "step": step, "grad_scale": 0.5}
        return [
            common | {"lr": 1e-2, "weight_decay": 0.1, "decoupled": True},
            common | {"lr": 3e-3, "weight_decay": 0.0, "decoupled": False},
        ]

    def job(self, step: int, **changes: object) -> native.AdamJob:
        out = {} if self.out is None else {"out": self.out.ptr, "out_dtype": self.out_dtype}
        if "out" in self.extents:
            out["out_extent"] = self.extents["out"]
        places = {
            key: self.extents[key] if key in self.extents else self.memory[key].ptr
            for key in STATES
        }
        fields = {
            "name": self.name,
            "numel": self.numel,
            "grad": self.grad.ptr,
            "grad_dtype": self.grad_dtype,
            "segments": self.segments,
            "groups": [native.AdamStep(**group) for group in self.groups(step)],
        }
        return native.AdamJob(**(fields | places | out | changes))

    def update_plainly(self, step: int) -> None:
        grad = self.grad.tensor.clone()
        for offset, numel, group in self.segments:
            native.adam_update(
                *(self.plain[key].data_ptr() + 4 * offset for key in STATES),
                grad.data_ptr() + grad.element_size() * offset,
                self.grad_dtype,
                0 if self.plain_out is None else self.plain_out.data_ptr() + 2 * offset,
                self.out_dtype,
                numel,
                **self.groups(step)[group],
            )

    def value(self, key: str) -> torch.Tensor:
        if key in self.memory:
            return self.memory[key].tensor
        back = Memory(self.numel, torch.float32 if key in STATES else DTYPES[str(self.out_dtype)])
        self.transfer("read", key, back)
        return back.tensor

    def covered(self) -> torch.Tensor:
        mask = torch.zeros(self.numel, dtype=torch.bool)
        for offset, numel, _ in self.segments:
            mask[offset : offset + numel] = True
        return mask

    def check(self) -> None:
        """Everything equals the plain update, bit for bit, gaps included."""
        for key in STATES:
            assert torch.equal(self.value(key), self.plain[key]), (self.name, key)
        covered = self.covered()
        if self.plain_out is not None:
            assert self.out is not None
            expected = self.plain_out[covered]
            assert torch.equal(self.out.tensor[covered], expected), self.name
            if "out" in self.extents:
                assert torch.equal(self.value("out")[covered], expected), self.name


# A driver whose events are ints in memory: 0 not ready, 1 complete, 2 failed, 3 destroyed. It is slow to
# say that one is not ready.
FAKE_DRIVER = """
#include <stdlib.h>
#include <unistd.h>
int cuInit(unsigned flags) { return 0; }
int cuDeviceGet(int* device, int index) { *device = index; return 0; }
int cuDevicePrimaryCtxRetain(void** context, int device) { *context = context; return 0; }
int cuDevicePrimaryCtxRelease_v2(int device) { return 0; }
int cuCtxSetCurrent(void* context) { return 0; }
int cuEventQuery(void* event) {
  volatile int* state = event;
  if (*state == 0) usleep(100);
  switch (*state) { case 0: return 600; case 1: return 0; case 3: abort(); default: return 700; }
}
int cuGetErrorName(int error, const char** name) {
  *name = "CUDA_ERROR_ILLEGAL_ADDRESS";
  return error == 700 ? 0 : 1;
}
"""


# Imports once what each scenario then has in a process of its own.
_SCENARIOS = """
import os, sys, traceback, {module} as module
for name in {names}:
    if os.fork() == 0:
        try:
            getattr(module, name)()
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    if os.wait()[1] != 0:
        sys.exit(name)
"""


def run_with_fake_driver(module: str, names: Sequence[str], path: Path) -> None:
    """Runs functions of a module of tests/, each in a process whose libcuda.so.1 is FAKE_DRIVER."""
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        pytest.skip("needs a C compiler")
    (path / "fake.c").write_text(FAKE_DRIVER)
    subprocess.run(
        [compiler, "-shared", "-fPIC", "-o", path / "libcuda.so.1", path / "fake.c"], check=True
    )
    code = _SCENARIOS.format(module=module, names=tuple(names))
    search = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"LD_LIBRARY_PATH": str(path), "PYTHONPATH": search},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr


def make_events(count: int) -> tuple[torch.Tensor, list[int]]:
    flags = torch.zeros(count, dtype=torch.int32)
    return flags, [flags.data_ptr() + 4 * i for i in range(count)]
