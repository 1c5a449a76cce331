"""Small real models, the plain PyTorch loop they are compared with, and random plans."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

import lohan_fx
from lohan_fx.planner import (
    Bucket,
    BucketPlace,
    Forced,
    Ledger,
    Problem,
    Room,
    Solution,
    activation_places,
    bucket_places,
    predict,
    streamed_places,
)

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
Batch = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Case:
    """A model to build (always with the same values) and a batch to make for a step."""

    name: str
    build: Callable[[], nn.Module]
    batch: Callable[[int], Batch]


def _tokens(step: int, vocab: int, batch: int = 2, seq: int = 24) -> Batch:
    generator = torch.Generator().manual_seed(100 + step)
    ids = torch.randint(0, vocab, (batch, seq), generator=generator)
    return {"input_ids": ids, "labels": ids}


def gpt2(dropout: float = 0.0, layers: int = 2) -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    return GPT2LMHeadModel(
        GPT2Config(
            n_embd=32,
            n_layer=layers,
            n_head=2,
            n_positions=32,
            vocab_size=97,
            resid_pdrop=dropout,
            embd_pdrop=dropout,
            attn_pdrop=0.0,
            use_cache=False,
        )
    )


def llama(layers: int = 3, width: int = 32) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            hidden_size=width,
            intermediate_size=3 * width,
            num_hidden_layers=layers,
            num_attention_heads=2,
            num_key_value_heads=2,
            vocab_size=101,
            max_position_embeddings=64,
            use_cache=False,
        )
    )


def qwen3() -> nn.Module:
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(0)
    return Qwen3ForCausalLM(
        Qwen3Config(
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=8,
            vocab_size=101,
            max_position_embeddings=64,
            tie_word_embeddings=True,
            use_cache=False,
        )
    )


def vit() -> nn.Module:
    from transformers import ViTConfig, ViTForImageClassification

    torch.manual_seed(0)
    return ViTForImageClassification(
        ViTConfig(
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=64,
            image_size=16,
            patch_size=4,
            num_labels=5,
        )
    )


def _images(step: int) -> Batch:
    generator = torch.Generator().manual_seed(200 + step)
    return {
        "pixel_values": torch.randn(3, 3, 16, 16, generator=generator),
        "labels": torch.randint(0, 5, (3,), generator=generator),
    }


class OddMlp(nn.Module):
    """Sizes that are multiples of nothing; the loss is computed inside."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(7, 31),
            nn.GELU(),
            nn.Dropout(dropout),
            nn.Linear(31, 13, bias=False),
            nn.Tanh(),
        )
        self.scale = nn.Parameter(torch.tensor([1.5]))
        self.head = nn.Linear(13, 3)

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return nn.functional.mse_loss(self.head(self.layers(x) * self.scale), y)


def odd_mlp(dropout: float = 0.0) -> nn.Module:
    torch.manual_seed(0)
    return OddMlp(dropout)


def _vectors(step: int) -> Batch:
    generator = torch.Generator().manual_seed(300 + step)
    return {
        "x": torch.randn(5, 7, generator=generator),
        "y": torch.randn(5, 3, generator=generator),
    }


CASES = {
    case.name: case
    for case in (
        Case("gpt2", gpt2, lambda step: _tokens(step, 97)),
        Case("gpt2-dropout", lambda: gpt2(0.1), lambda step: _tokens(step, 97)),
        Case("llama", llama, lambda step: _tokens(step, 101)),
        Case("qwen3", qwen3, lambda step: _tokens(step, 101)),
        Case("vit", vit, _images),
        Case("mlp", odd_mlp, _vectors),
        Case("mlp-dropout", lambda: odd_mlp(0.3), _vectors),
    )
}


@dataclass(frozen=True)
class Run:
    """Losses by step, and fp32 weights by parameter name after the last."""

    losses: list[float]
    weights: dict[str, torch.Tensor]
    norms: list[float | None]

    def assert_equal(self, other: Run) -> None:
        """Bit for bit."""
        assert self.losses == other.losses
        for name, value in self.weights.items():
            assert torch.equal(value, other.weights[name]), name

    def assert_close(self, other: Run, loss: float, weight: float) -> None:
        """`loss` is relative; `weight` is absolute, the share of elements beyond it at most 1 %.

        Where a gradient is nothing but rounding (attention's key biases), Adam steps by its sign.
        """
        for ours, theirs in zip(self.losses, other.losses, strict=True):
            assert abs(ours - theirs) <= loss * abs(theirs), (self.losses, other.losses)
        pairs = [(value, other.weights[name]) for name, value in self.weights.items()]
        far = sum(int(((ours - theirs).abs() > weight).sum()) for ours, theirs in pairs)
        assert far <= 0.01 * sum(ours.numel() for ours, _ in pairs)


def to_device(batch: Batch, dtype: torch.dtype, device: torch.device = DEVICE) -> Batch:
    """The batch on the device, its floating-point inputs in the compute dtype."""
    return {
        name: value.to(device, dtype if value.is_floating_point() else None)
        for name, value in batch.items()
    }


def loss_of(output: Any) -> torch.Tensor:
    return output if isinstance(output, torch.Tensor) else output.loss


def plain_model(
    case: Case, dtype: torch.dtype, device: torch.device = DEVICE
) -> tuple[nn.Module, dict[str, nn.Parameter], dict[str, torch.Tensor]]:
    """A model that computes in `dtype`, its parameters, and their fp32 masters to be updated."""
    model = case.build().to(device).train()
    params = dict(model.named_parameters())
    masters = {name: p.detach().clone().requires_grad_() for name, p in params.items()}
    for param in params.values():
        param.data = param.data.to(dtype)
    return model, params, masters


@torch.no_grad()
def take_masters(params: dict[str, nn.Parameter], masters: dict[str, torch.Tensor]) -> None:
    for name, param in params.items():
        param.copy_(masters[name])


def on_cpu(masters: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: master.detach().cpu() for name, master in masters.items()}


def small_buckets(
    case: Case,
    dtype: torch.dtype,
    folder: Path,
    budget: str = "gpu=1GB, dram=1GB",
    device: torch.device = DEVICE,
    **options: Any,
) -> Any:
    """Compiled over plain ATen, in small buckets so that placements can differ within a layer."""
    options = {"lowering": "aten", "bucket_numel": 3000, "poison": device.type == "cpu"} | options
    return lohan_fx.compile(
        case.build().train(), f"{budget}, ssd={folder}:1GB", dtype=dtype, device=device, **options
    )


def masters_of(model: Any, optimizer: Any) -> dict[str, torch.Tensor]:
    """fp32 weights by parameter name."""
    state = optimizer.state_dict()["state"]
    return {name: state[i]["master"] for i, (name, _) in enumerate(model.named_parameters())}


def train_plain(
    case: Case,
    dtype: torch.dtype,
    steps: int = 3,
    *,
    lr: float = 1e-3,
    max_grad_norm: float | None = None,
    device: torch.device = DEVICE,
) -> Run:
    """Eager PyTorch: compute in `dtype`, fp32 masters, torch.optim.AdamW, clip_grad_norm_."""
    model, params, masters = plain_model(case, dtype, device)
    optimizer = torch.optim.AdamW(masters.values(), lr=lr, weight_decay=0.01, foreach=False)
    losses, norms = [], []
    for step in range(steps):
        torch.manual_seed(step)
        loss = loss_of(model(**to_device(case.batch(step), dtype, device)))
        loss.backward()
        for name, param in params.items():
            assert param.grad is not None
            masters[name].grad, param.grad = param.grad.float(), None
        norm = None
        if max_grad_norm is not None:
            norm = torch.nn.utils.clip_grad_norm_(list(masters.values()), max_grad_norm).item()
        optimizer.step()
        take_masters(params, masters)
        losses.append(loss.item())
        norms.append(norm)
    return Run(losses, on_cpu(masters), norms)


def train_lohan(
    case: Case,
    dtype: torch.dtype,
    folder: Path,
    steps: int = 3,
    *,
    lr: float = 1e-3,
    max_grad_norm: float | None = None,
    budget: str = "gpu=1GB, dram=1GB",
    device: torch.device = DEVICE,
    check: Callable[[Any], None] | None = None,
    **options: Any,
) -> Run:
    """The same through lohan_fx."""
    model = small_buckets(case, dtype, folder, budget, device, **options)
    try:
        optimizer = lohan_fx.AdamW(
            model.parameters(), lr=lr, weight_decay=0.01, max_grad_norm=max_grad_norm
        )
        losses, norms = [], []
        for step in range(steps):
            torch.manual_seed(step)
            loss = loss_of(model(**to_device(case.batch(step), dtype, device)))
            loss.backward()
            optimizer.step()
            assert all(p.grad is None for p in model.parameters())
            optimizer.zero_grad()
            losses.append(loss.item())
            norms.append(optimizer.last_grad_norm)
        weights = masters_of(model, optimizer)
        if check is not None:
            check(model)
        return Run(losses, weights, norms)
    finally:
        model.close()


@dataclass(frozen=True)
class RandomPolicy:
    """Places every bucket and activation at random, within what is allowed for each.

    `cpu_adam` leaves out what a GPU would update: its Adam rounds otherwise than the CPU's.
    """

    seed: int
    cpu_adam: bool = DEVICE.type == "cuda"

    def __call__(self, problem: Problem, forced: Forced) -> Solution:
        draw = random.Random(self.seed)
        buckets = [draw.choice(self._places(problem, b)) for b in problem.buckets]
        activations = [draw.choice(activation_places(a)) for a in problem.activations]
        ledger = Ledger(problem, buckets, activations)
        windows = ledger.windows(draw.choice(list(Room)))
        stages = range(2 * problem.num_stages)
        closed = draw.sample(stages, draw.randrange(1 + len(stages) // 2))
        windows = dataclasses.replace(windows, closed=tuple(sorted(closed)))
        return Solution(
            policy=f"random {self.seed}",
            buckets=tuple(buckets),
            activations=tuple(activations),
            windows=windows,
            predicted=predict(problem, buckets, activations, windows),
        )

    def _places(self, problem: Problem, bucket: Bucket) -> list[BucketPlace]:
        places = [*bucket_places(bucket), *streamed_places(problem, bucket)]
        if not (self.cpu_adam and bucket.trainable):
            return places
        return [place for place in places if not place.by_gpu]


def uses(model: Any) -> Mapping[str, Sequence[str]]:
    """Tiers by tensor class in a compiled model's plan."""
    found: dict[str, set[str]] = {}
    for tensor in model.plan.tensors:
        found.setdefault(tensor.cls, set()).add(tensor.placement)
    return {cls: sorted(places) for cls, places in found.items()}
