"""Diffusion transformers for images, to be planned: the DiT architecture in plain torch.

Blocks of attention and MLP whose normalizations are shifted, scaled and gated by the embedding of
time step and class (adaLN-Zero of Peebles & Xie, arXiv 2212.09748). The loss is the squared error of
the predicted noise; the image encoder is not part of the step.
"""

from __future__ import annotations

import math

import torch
from torch import nn
from torch.nn import functional as F

# Shapes: B = batch, T = patches, C = latent channels, H = hidden.
LATENT_CHANNELS = 4
PATCH = 2
NUM_CLASSES = 1000
_FREQUENCIES = 256


class Block(nn.Module):
    def __init__(self, hidden: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1 = nn.LayerNorm(hidden, elementwise_affine=False, eps=1e-6)
        self.qkv = nn.Linear(hidden, 3 * hidden)
        self.proj = nn.Linear(hidden, hidden)
        self.norm2 = nn.LayerNorm(hidden, elementwise_affine=False, eps=1e-6)
        self.mlp = nn.Sequential(
            nn.Linear(hidden, 4 * hidden),
            nn.GELU(approximate="tanh"),
            nn.Linear(4 * hidden, hidden),
        )
        self.modulation = nn.Linear(hidden, 6 * hidden)

    def forward(self, x_BTH: torch.Tensor, condition_BH: torch.Tensor) -> torch.Tensor:
        shift1, scale1, gate1, shift2, scale2, gate2 = (
            self.modulation(F.silu(condition_BH)).unsqueeze(1).chunk(6, dim=-1)
        )
        x_BTH = x_BTH + gate1 * self._attention(self.norm1(x_BTH) * (1 + scale1) + shift1)
        return x_BTH + gate2 * self.mlp(self.norm2(x_BTH) * (1 + scale2) + shift2)  # type: ignore[no-any-return]

    def _attention(self, x_BTH: torch.Tensor) -> torch.Tensor:
        batch, patches, hidden = x_BTH.shape
        qkv = self.qkv(x_BTH).view(batch, patches, 3, self.heads, hidden // self.heads)
        query, key, value = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        mixed = F.scaled_dot_product_attention(query, key, value)
        return self.proj(mixed.transpose(1, 2).reshape(batch, patches, hidden))  # type: ignore[no-any-return]


class DiT(nn.Module):
    """Predicts the noise in `latents` (B, C, 2 sqrt(T), 2 sqrt(T)) and returns the loss."""

    frequencies: torch.Tensor

    def __init__(self, layers: int, heads: int, hidden: int, side: int) -> None:
        super().__init__()
        self.patchify = nn.Conv2d(LATENT_CHANNELS, hidden, PATCH, stride=PATCH)
        self.positions = nn.Parameter(torch.empty(1, side * side, hidden), requires_grad=False)
        self.time = nn.Sequential(
            nn.Linear(_FREQUENCIES, hidden), nn.SiLU(), nn.Linear(hidden, hidden)
        )
        self.label = nn.Embedding(NUM_CLASSES + 1, hidden)  # the last is "no class"
        self.blocks = nn.ModuleList(Block(hidden, heads) for _ in range(layers))
        self.norm = nn.LayerNorm(hidden, elementwise_affine=False, eps=1e-6)
        self.modulation = nn.Linear(hidden, 2 * hidden)
        self.head = nn.Linear(hidden, PATCH * PATCH * LATENT_CHANNELS)
        half = _FREQUENCIES // 2
        self.register_buffer(
            "frequencies", torch.exp(-math.log(10_000) * torch.arange(half) / half)
        )

    def forward(
        self,
        latents: torch.Tensor,
        noise: torch.Tensor,
        times: torch.Tensor,
        labels: torch.Tensor,
    ) -> torch.Tensor:
        x_BTH = self.patchify(latents).flatten(2).transpose(1, 2) + self.positions
        angles = times[:, None].float() * self.frequencies
        waves = torch.cat([angles.cos(), angles.sin()], dim=-1).to(x_BTH.dtype)
        condition_BH = self.time(waves) + self.label(labels)
        for block in self.blocks:
            x_BTH = block(x_BTH, condition_BH)
        shift, scale = self.modulation(F.silu(condition_BH)).unsqueeze(1).chunk(2, dim=-1)
        predicted = self.head(self.norm(x_BTH) * (1 + scale) + shift)
        target = F.unfold(noise, PATCH, stride=PATCH).transpose(1, 2)
        return F.mse_loss(predicted.float(), target.float())


def example_inputs(batch: int, side: int) -> dict[str, torch.Tensor]:
    """Inputs of one step for images of side x side patches."""
    pixels = torch.zeros(batch, LATENT_CHANNELS, PATCH * side, PATCH * side)
    return {
        "latents": pixels,
        "noise": pixels.clone(),
        "times": torch.zeros(batch, dtype=torch.long),
        "labels": torch.zeros(batch, dtype=torch.long),
    }
