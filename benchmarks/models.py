"""Llama-config models of several sizes with cheap weights, for timing."""

from __future__ import annotations

from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

# name: hidden, layers, heads, intermediate
SIZES = {
    "tiny": (64, 2, 4, 176),
    "deep": (64, 28, 4, 176),  # as many layers as 3b, and narrow: to time tracing on any machine
    "125m": (768, 12, 12, 2048),
    "1b": (2048, 24, 16, 5504),
    "wide": (4096, 8, 32, 11008),
    "3b": (3072, 28, 24, 8192),
    "7b": (4096, 32, 32, 11008),
    "13b": (5120, 40, 40, 13824),
}
VOCABULARY = 32000

_BLOCK = 1 << 20


def config_of(size: str, seq: int) -> LlamaConfig:
    hidden, layers, heads, intermediate = SIZES[size]
    return LlamaConfig(
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        intermediate_size=intermediate,
        vocab_size=VOCABULARY,
        max_position_embeddings=max(seq, 1024),
        use_cache=False,
        tie_word_embeddings=False,
        attn_implementation="sdpa",
    )


def build(
    size: str, seq: int, dtype: torch.dtype, device: torch.device | str = "cpu"
) -> LlamaForCausalLM:
    """A model of `size` with weights of `dtype` on `device`, in training mode."""
    config = config_of(size, seq)
    previous = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device("meta"):
            model = LlamaForCausalLM(config)
    finally:
        torch.set_default_dtype(previous)
    model.to_empty(device=device)
    fill(model)
    # Rotary tables are not parameters and to_empty left them unset.
    model.model.rotary_emb = type(model.model.rotary_emb)(config).to(device)
    return model.train()


@torch.no_grad()
def fill(model: torch.nn.Module) -> None:
    """Norms 1, everything else normal with deviation 0.02.

    One block of random numbers, at another offset for each parameter: drawing billions takes
    minutes, and a copy runs on all cores.
    """
    generator = torch.Generator().manual_seed(0)
    block = torch.empty(2 * _BLOCK).normal_(0.0, 0.02, generator=generator)
    placed: dict[Any, torch.Tensor] = {}
    for index, (name, param) in enumerate(model.named_parameters()):
        if "norm" in name:
            param.fill_(1.0)
            continue
        kind = param.device, param.dtype
        if kind not in placed:
            placed[kind] = block.to(*kind)
        offset = index * 7919 % _BLOCK
        source = placed[kind][offset : offset + _BLOCK]
        flat = param.view(-1)
        whole = flat.numel() // _BLOCK
        flat[: whole * _BLOCK].view(whole, _BLOCK).copy_(source)
        flat[whole * _BLOCK :].copy_(source[: flat.numel() - whole * _BLOCK])


def num_params(model: torch.nn.Module) -> int:
    """Elements of all parameters; those that ZeRO has partitioned count in full."""
    return sum(int(getattr(p, "ds_numel", p.numel())) for p in model.parameters())
