"""The update of GPU-resident state: the kernel of CUDA, and torch's fused ones, here on the CPU."""

from __future__ import annotations

from dataclasses import fields, replace

import pytest
import torch

from lohan_fx.runtime import AdamGroup, adam_gpu
from lohan_fx.runtime.adam_gpu import Scale, Update


def make_updates(
    dtype: torch.dtype, groups: list[AdamGroup], numels: tuple[int, ...] = (7, 300, 1024, 1)
) -> list[Update]:
    generator = torch.Generator().manual_seed(1)
    updates = []
    for index, numel in enumerate(numels):
        master = torch.randn(numel, generator=generator)
        updates.append(
            Update(
                grad=torch.randn(numel, generator=generator).to(dtype),
                master=master,
                exp_avg=torch.randn(numel, generator=generator),
                exp_avg_sq=torch.rand(numel, generator=generator),
                weight=None if dtype is torch.float32 else master.to(dtype),
                group=groups[index % len(groups)],
                step=3 + index // 2,
            )
        )
    return updates


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "scale", [Scale(), Scale(clip=0.25), Scale(unscale=1e-3, clip=0.7)], ids=str
)
def test_the_fused_update_is_the_native_one_up_to_rounding(
    dtype: torch.dtype, scale: Scale, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(adam_gpu, "_BATCH_ELEMENTS", 256)  # pieces, and several batches
    groups = [
        AdamGroup(0.1, 0.9, 0.99, 1e-8, 0.1, True),
        AdamGroup(0.02, 0.8, 0.95, 1e-6, 0.2, False),
    ]
    native, fused = make_updates(dtype, groups), make_updates(dtype, groups)
    adam_gpu.update_on_device(native, scale)
    for batch in adam_gpu._batches(fused):
        adam_gpu._update_fused(batch, scale)
    for a, b in zip(native, fused, strict=True):
        assert torch.equal(a.grad, b.grad)
        torch.testing.assert_close(a.master, b.master)
        torch.testing.assert_close(a.exp_avg, b.exp_avg)
        torch.testing.assert_close(a.exp_avg_sq, b.exp_avg_sq)
        if b.weight is not None:
            assert torch.equal(b.weight, b.master.to(dtype))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    "scale", [Scale(), Scale(clip=0.25), Scale(unscale=1e-3, clip=0.7)], ids=str
)
def test_the_kernel_of_cuda_gives_the_bits_of_the_native_update(
    dtype: torch.dtype, scale: Scale
) -> None:
    groups = [
        AdamGroup(0.1, 0.9, 0.99, 1e-8, 0.1, True),
        AdamGroup(0.02, 0.8, 0.95, 1e-6, 0.2, False),
        AdamGroup(0.02, 0.3, 0.95, 1e-6, 0.0, True),  # beta1 below a half: moments blend from g
    ]
    native = make_updates(dtype, groups, numels=(7, 300, 1024, 1, 4097, 0, 1 << 20))
    arrays = [field.name for field in fields(Update) if field.name not in ("group", "step")]
    ours = []
    for update in native:
        there = {name: getattr(update, name) for name in arrays}
        ours.append(
            replace(update, **{n: None if t is None else t.cuda() for n, t in there.items()})
        )
    adam_gpu.update_on_device(native, scale)
    adam_gpu.update_on_device(ours, scale)
    for a, b in zip(native, ours, strict=True):
        for name in arrays:
            there = getattr(b, name)
            if there is not None:
                assert torch.equal(getattr(a, name), there.cpu()), name


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_an_update_takes_no_more_memory_than_it_says() -> None:
    device = torch.device("cuda")
    update = make_updates(torch.bfloat16, [AdamGroup(0.1, 0.9, 0.99, 1e-8, 0.1, True)])[2]
    moved = [None if t is None else t.to(device) for t in (update.grad, update.weight)]
    state = [t.to(device) for t in (update.master, update.exp_avg, update.exp_avg_sq)]
    there = Update(moved[0], *state, moved[1], update.group, update.step)  # type: ignore[arg-type]
    adam_gpu.update_on_device([there], Scale())
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    adam_gpu.update_on_device([there], Scale())
    taken = torch.cuda.max_memory_allocated() - before
    assert taken <= adam_gpu.workspace_bytes(update.master.numel(), device)
