"""Models on the meta device: planned without a byte of weights, refused for training."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import lohan_fx
from lohan_fx.params import ManagedParams, owner_of


class Tied(nn.Module):
    """Two names for one weight, and a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(12, 8)
        self.head = nn.Linear(8, 12, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("scale", torch.ones(8))

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.head(self.embed(tokens) * self.scale).float().logsumexp(-1).sum()


class Nobody:
    """An owner that is asked for nothing."""


def on_meta() -> Tied:
    with torch.device("meta"):
        return Tied()


def test_a_plan_of_a_meta_model_is_that_of_a_real_one() -> None:
    tokens = (torch.zeros(2, 5, dtype=torch.long),)
    plans = [
        lohan_fx.make_plan(model, "gpu=1GB, dram=1GB, ssd=1GB", tokens, hardware="lohan-rtx4090")
        for model in (on_meta(), Tied())
    ]
    assert plans[0].to_json() == plans[1].to_json()
    assert plans[0].num_params == 12 * 8


def test_a_meta_parameter_becomes_one_stub_in_every_module_that_holds_it() -> None:
    model = on_meta()
    model.embed.weight.requires_grad_(False)
    model.embed.weight.mark = "kept"
    owner = Nobody()
    params = ManagedParams(model, owner, device=torch.device("cpu"), dtype=torch.bfloat16)  # type: ignore[arg-type]
    (stub,) = params.stubs
    assert model.embed.weight is stub and model.head.weight is stub
    assert stub.device.type == "cpu" and stub.dtype is torch.bfloat16
    assert stub.untyped_storage().nbytes() == 0
    assert not stub.requires_grad and stub.mark == "kept"
    assert params.names == ["embed.weight"]
    assert params.aliases == {"embed.weight": 0, "head.weight": 0}
    assert params.values[0].is_meta and params.values[0].shape == (12, 8)
    assert owner_of(stub) == (owner, 0)


@pytest.mark.parametrize("kind", ["parameter", "buffer"])
def test_compiling_what_has_no_values_is_refused_and_named(kind: str) -> None:
    model = Tied()
    if kind == "parameter":
        model.embed.weight = model.head.weight = nn.Parameter(torch.empty(12, 8, device="meta"))
    else:
        model.scale = torch.ones(8, device="meta")
    with pytest.raises(lohan_fx.LohanError, match=f"{kind} '.*' is on the meta device"):
        lohan_fx.compile(model, "gpu=1GB, dram=1GB")
    assert type(model) is Tied and owner_of(model.embed.weight) is None


def test_a_forward_that_computes_nothing_is_named() -> None:
    class Idle(Tied):
        def forward(self) -> None:
            return None

    with pytest.raises(lohan_fx.CaptureError, match=r"Idle.forward\(\)"):
        lohan_fx.make_plan(Idle(), "1GB", (), hardware="h200")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_stubs_on_a_gpu_take_no_memory_even_for_a_moment() -> None:
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_reserved(), torch.cuda.memory_allocated()
    with torch.device("meta"):
        model = nn.Linear(2**20, 2**20, dtype=torch.bfloat16)  # 2 TiB
    device = torch.device("cuda", torch.cuda.current_device())
    params = ManagedParams(model, Nobody(), device=device, dtype=None)  # type: ignore[arg-type]
    assert params.stubs[0].shape == (2**20, 2**20) and params.stubs[0].device == device
    assert params.stubs[0].untyped_storage().nbytes() == 0
    assert torch.cuda.max_memory_allocated() <= before[1]
    assert torch.cuda.memory_reserved() <= before[0]
