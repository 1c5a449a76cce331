"""`generate` of Hugging Face models through a compiled model: plain tokens, a bounded number of captures."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from loops import compiled, step
from peft import LoraConfig, get_peft_model
from torch import nn
from training import CASES, RandomPolicy, gpt2, llama, qwen3

import lohan_fx
from lohan_fx.generation import MAX_WHOLE_PROMPTS, pieces, round_length

BUILDS: dict[str, Callable[[], nn.Module]] = {
    "llama": lambda: llama(1),
    "gpt2": gpt2,
    "qwen3-tied": qwen3,
}
WAYS: dict[str, dict[str, Any]] = {
    "greedy": {"do_sample": False},
    "sampled": {"do_sample": True, "temperature": 3.0, "top_k": 0},
    "beams": {"do_sample": False, "num_beams": 3},
    "penalty": {"do_sample": False, "repetition_penalty": 1.5},
}


def prompt(length: int, batch: int = 2) -> torch.Tensor:
    generator = torch.Generator().manual_seed(length)
    return torch.randint(1, 97, (batch, length), generator=generator)


def both(ours: Any, theirs: Any, ids: torch.Tensor, **options: Any) -> None:
    """The same tokens, from the same seed, and the same random numbers afterwards."""
    options = {"max_new_tokens": 6, "pad_token_id": 0} | options
    found = []
    for model in (theirs, ours):
        torch.manual_seed(5)
        found.append((model.generate(ids, **options), torch.rand(1)))
    assert torch.equal(found[0][0], found[1][0])
    assert torch.equal(found[0][1], found[1][1])


@pytest.mark.parametrize("use_cache", [True, False], ids=["cache", "no-cache"])
@pytest.mark.parametrize("build", BUILDS)
def test_tokens_are_those_of_plain_generate(build: str, use_cache: bool, tmp_path: Path) -> None:
    ours = compiled(BUILDS[build](), tmp_path, policy=RandomPolicy(2)).eval()
    theirs = BUILDS[build]().eval()
    kind = type(ours)
    for options in WAYS.values():
        both(ours, theirs, prompt(5), use_cache=use_cache, **options)
    assert type(ours) is kind
    # Two batch sizes (beams are a batch): a prompt and a token each, or one padded length each.
    assert len(ours._lohan.captured) == (4 if use_cache else 2)
    ours.close()


def test_no_capture_is_made_per_token_prompt_or_call(tmp_path: Path) -> None:
    ours, theirs = compiled(llama(1), tmp_path).eval(), llama(1).eval()
    for length in (3, 6, 9, 11):
        both(ours, theirs, prompt(length), max_new_tokens=9, use_cache=True)
    captured = ours._lohan.captured
    assert len(captured) == MAX_WHOLE_PROMPTS + 1
    for length in (7, 15, 13, 22, 2, 6, 1):  # in pieces of 16, 8, 4, 2 and 1 tokens, or as before
        both(ours, theirs, prompt(length), max_new_tokens=9, use_cache=True)
    assert len(captured) == MAX_WHOLE_PROMPTS + 1 + 5
    for length in (3, 8, 14, 21):
        both(ours, theirs, prompt(length), max_new_tokens=9, use_cache=False)
    assert len(captured) == MAX_WHOLE_PROMPTS + 1 + 5 + 1
    ours.close()


def test_prompts_padded_on_the_left_generate_as_in_plain(tmp_path: Path) -> None:
    ours, theirs = compiled(llama(1), tmp_path).eval(), llama(1).eval()
    for length in (5, 6, 7, 8, 9, 10):
        ids = prompt(length)
        mask = torch.ones_like(ids)
        mask[0, :3] = ids[0, :3] = 0
        for use_cache in (True, False):
            both(ours, theirs, ids, attention_mask=mask, use_cache=use_cache)
    ours.close()


def test_generation_between_training_steps_sees_the_new_weights(tmp_path: Path) -> None:
    ours, theirs = (compiled(llama(1), tmp_path, policy=RandomPolicy(2)), llama(1))
    optimizer = lohan_fx.AdamW(ours.parameters(), lr=1e-2)
    for index in range(3):
        step(ours, optimizer, CASES["llama"].batch(index))
        theirs.load_state_dict(ours.state_dict())
        both(ours.eval(), theirs.eval(), prompt(5), use_cache=True)
        ours.train()
    # One training program; a prompt's and a token's for generation.
    assert [c.training for c in ours._lohan.captured] == [True, False, False]
    ours.close()


def test_adapters_generate_through_the_compiled_model(tmp_path: Path) -> None:
    def build() -> nn.Module:
        base = llama(1)
        torch.manual_seed(1)
        config = LoraConfig(target_modules=["q_proj"], init_lora_weights=False, r=4)
        return get_peft_model(base, config).eval()

    ours, theirs = compiled(build(), tmp_path, policy=RandomPolicy(2)).eval(), build()
    for length in (5, 4):
        both(ours, theirs, prompt(length), use_cache=True)
    assert len(ours._lohan.captured) == 3
    ours.close()


def test_what_cannot_be_captured_once_runs_eagerly_and_gives_the_same_tokens(
    tmp_path: Path,
) -> None:
    from transformers import T5Config, T5ForConditionalGeneration

    def t5() -> nn.Module:
        torch.manual_seed(0)
        sizes = {"d_model": 16, "d_ff": 32, "d_kv": 8, "num_heads": 2, "num_layers": 2}
        return T5ForConditionalGeneration(
            T5Config(vocab_size=97, decoder_start_token_id=0, dropout_rate=0.0, **sizes)
        ).eval()

    ours, theirs = compiled(t5(), tmp_path, policy=RandomPolicy(2)).eval(), t5()
    both(ours, theirs, prompt(5))
    ours.close()
    ours, theirs = compiled(llama(1), tmp_path).eval(), llama(1).eval()
    both(ours, theirs, prompt(5), cache_implementation="dynamic", use_cache=True)
    both(ours, theirs, prompt(5, batch=1), prompt_lookup_num_tokens=2, use_cache=True)
    assert not ours._lohan.captured
    ours.close()


def test_lengths_are_rounded_to_four_an_octave_and_split_into_powers_of_two() -> None:
    assert [round_length(n) for n in (1, 32, 33, 41, 64, 65, 81, 129, 1000)] == [
        *(32, 32, 40, 48, 64, 80, 96, 160, 1024),
    ]
    assert pieces(22) == [16, 4, 2]
    for length in range(1, 300):
        assert sum(pieces(length)) == length <= round_length(length)
        assert round_length(length) < max(33, 1.25 * length + 1)
