"""A deep model's step from traces of two shallow ones."""

from __future__ import annotations

import dataclasses
from functools import cache
from typing import Any

import pytest
import torch
from torch import nn

from lohan_fx import api
from lohan_fx.cli.dit import DiT, example_inputs
from lohan_fx.cli.models import resolve_model, with_dtype
from lohan_fx.hardware import Hardware
from lohan_fx.repetition import layers_alike, repeat, repeated_step
from lohan_fx.step import TracedStep

pytest.importorskip("transformers")

# No cache: a model that returns every layer's keys has gradients of them among its inputs.
QWEN2 = {
    "model_type": "qwen2",
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "vocab_size": 64,
    "use_cache": False,
}
GPT2 = {
    "model_type": "gpt2",
    "n_embd": 32,
    "n_head": 2,
    "vocab_size": 64,
    "use_cache": False,
    "attn_pdrop": 0.0,
    "embd_pdrop": 0.0,
    "resid_pdrop": 0.0,
    "bos_token_id": 0,
    "eos_token_id": 0,
}
CONFIGS = {"gpt2": GPT2, "qwen2": QWEN2}
BUCKET_NUMEL = 3000  # so that a layer's parameters are several buckets


def config_of(family: str, layers: int, **rest: Any) -> Any:
    import transformers

    raw = {
        **CONFIGS[family],
        "n_layer" if family == "gpt2" else "num_hidden_layers": layers,
        **rest,
    }
    return transformers.AutoConfig.for_model(**raw)


def build(family: str, layers: int, **rest: Any) -> nn.Module:
    with torch.device("meta"):
        if family == "dit":
            return DiT(layers, heads=2, hidden=32, side=4)
        from transformers import AutoModelForCausalLM

        return AutoModelForCausalLM.from_config(config_of(family, layers, **rest))  # type: ignore[no-any-return]


@cache
def traced(family: str, layers: int) -> TracedStep:
    tokens = torch.zeros(2, 16, dtype=torch.long)
    inputs = {"input_ids": tokens, "labels": tokens}
    return api.trace_step(
        build(family, layers),
        "gpu=24GB,dram=128GB,ssd=1TB",
        with_dtype(example_inputs(2, 4) if family == "dit" else inputs, torch.bfloat16),
        hardware=Hardware.preset("lohan-rtx4090"),
        dtype=torch.bfloat16,
        bucket_numel=BUCKET_NUMEL,
    )


@pytest.mark.parametrize("family", [*CONFIGS, "dit"])
def test_a_repeated_step_is_the_one_that_all_layers_traced_give(family: str) -> None:
    found = repeat(traced(family, 4), traced(family, 5), 7)
    full = traced(family, 7)
    assert found is not None and found.layers_traced == 4
    assert found.problem == full.problem
    assert found.tensors == full.tensors
    assert found.problem.fingerprint() == full.problem.fingerprint()
    assert dataclasses.replace(found, layers_traced=None) == full


def test_traces_that_differ_in_anything_else_are_not_repeated() -> None:
    short, longer = traced("dit", 4), traced("dit", 5)

    def with_activation(index: int, **fields: Any) -> TracedStep:
        rows = list(longer.problem.activations)
        rows[index] = dataclasses.replace(rows[index], **fields)
        return dataclasses.replace(
            longer, problem=dataclasses.replace(longer.problem, activations=tuple(rows))
        )

    at = next(a.index for a in longer.problem.activations if a.forward_stage == 3 and a.needs)
    row = longer.problem.activations[at]
    assert repeat(short, with_activation(at, bytes=row.bytes + 1), 8) is None
    assert repeat(short, with_activation(at, recompute_s=row.recompute_s * 1.5), 8) is None
    assert repeat(short, with_activation(at, needs=()), 8) is None
    assert repeat(short, with_activation(at, last_forward_stage=5), 8) is None
    assert repeat(short, short, 8) is None
    grown = dataclasses.replace(longer.problem, fixed_gpu_bytes=1)
    assert repeat(short, dataclasses.replace(longer, problem=grown), 8) is None


@pytest.mark.parametrize("family", [*CONFIGS, "dit"])
def test_layers_of_one_kind_are_alike(family: str) -> None:
    assert layers_alike(build(family, 12), 12)


def test_layers_that_differ_in_kind_width_or_setting_are_not_alike() -> None:
    def blocks(count: int = 12) -> list[nn.Module]:
        return [nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.1)) for _ in range(count)]

    def alike(layers: list[nn.Module]) -> bool:
        return layers_alike(nn.Sequential(nn.ModuleList(layers)), 12)

    assert alike(blocks())
    assert not alike(blocks(13))
    for odd in (
        nn.Sequential(nn.Linear(4, 4), nn.ReLU()),
        nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 4)),
        nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.2)),
        nn.Sequential(nn.Linear(4, 4, bias=False), nn.Dropout(0.1)),
        nn.Sequential(nn.Linear(4, 4, dtype=torch.float16), nn.Dropout(0.1)),
    ):
        assert not alike([*blocks(7), odd, *blocks(4)])


def test_a_model_whose_upper_layers_attend_to_a_window_is_traced_in_full() -> None:
    model = build("qwen2", 12, use_sliding_window=True, sliding_window=8, max_window_layers=9)

    def trace(layers: int, bucket_numel: int) -> TracedStep:
        raise AssertionError("nothing of it may be traced with fewer layers")

    assert repeated_step(model, 12, trace) is None


def test_buckets_are_those_of_the_whole_model() -> None:
    model = build("qwen2", 400, vocab_size=4096, intermediate_size=512)
    num_params = sum(param.numel() for param in model.parameters())
    asked = []

    def trace(layers: int, bucket_numel: int) -> TracedStep:
        asked.append((layers, bucket_numel))
        return traced("qwen2", layers)

    step = repeated_step(model, 400, trace)
    assert asked == [(4, num_params // 64), (5, num_params // 64)]
    assert (
        step is not None
        and len(step.problem.stages) == len(traced("qwen2", 4).problem.stages) + 396
    )


def test_a_config_is_made_again_with_fewer_layers(tmp_path: Any) -> None:
    import json

    file = tmp_path / "config.json"
    raw = {**QWEN2, "num_hidden_layers": 12, "layer_types": ["full_attention"] * 12}
    file.write_text(json.dumps(raw))
    given = resolve_model(str(file), batch=2, seq=16)
    assert given.layers == 12 and given.with_layers is not None
    assert layers_alike(given.model, 12)
    fewer = given.with_layers(5)
    assert layers_alike(fewer.model, 5) and fewer.tokens == given.tokens
