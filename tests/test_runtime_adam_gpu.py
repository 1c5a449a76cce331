"""The update of GPU-resident state, in the form CUDA runs it: torch's fused kernels, here on the CPU."""

from __future__ import annotations

import pytest
import torch

from lohan_fx.runtime import AdamGroup, adam_gpu
from lohan_fx.runtime.adam_gpu import Scale, Update


def make_updates(dtype: torch.dtype, groups: list[AdamGroup]) -> list[Update]:
    generator = torch.Generator().manual_seed(1)
    updates = []
    for index, numel in enumerate((7, 300, 1024, 1)):
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
