"""Hugging Face's `generate` through a compiled model: the same tokens, few captures.

Each distinct shape is captured by itself, so a sequence that grows by a token per call would be
captured once per token. While `generate` runs, the module that it calls gets another class, whose
calls have shapes that repeat:

  with a KV cache     the cache is a static one, its length rounded up (`round_length`), so that all
                      calls for one token are one program. Prompts of the first few lengths are
                      captured as they are; others are read in pieces, powers of two long.
  without one         the sequence is padded on the right to a rounded length, behind a mask.
  anything else       (encoder-decoders, other caches, embeddings in place of tokens) runs eagerly,
                      one operation and its parameters at a time: correct, and slow.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Protocol

import torch

# Prompts of so many distinct lengths are captured as they are; see the module docstring.
MAX_WHOLE_PROMPTS = 4
SHORTEST = 32  # no sequence is padded, and no cache made, to less

# What generate() may be given that needs a cache which can be cut back or that is of another kind.
_OTHER_CACHES = (
    "assistant_model",
    "prompt_lookup_num_tokens",
    "past_key_values",
    "cache_implementation",
    "inputs_embeds",
    "custom_generate",
)


class Evaluator(Protocol):
    """What a session does for `generate`."""

    def evaluate(self, module: torch.nn.Module, kwargs: Mapping[str, Any]) -> Any: ...


def round_length(length: int) -> int:
    """The next of four lengths an octave (..., 64, 80, 96, 112, 128, 160, ...), at least SHORTEST."""
    length = max(length, SHORTEST)
    step = 1 << max(0, (length - 1).bit_length() - 3)
    return -(-length // step) * step


def pieces(length: int) -> list[int]:
    """Powers of two, longest first, that add up to `length`."""
    return [1 << bit for bit in range(length.bit_length() - 1, -1, -1) if length >> bit & 1]


class Generates:
    """Mixed into the class of a compiled model that has a `generate` method."""

    _lohan: Evaluator

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """As the model's own `generate`; see lohan_fx.generation for how it runs."""
        assert isinstance(self, torch.nn.Module)
        part = _generating_part(self)
        with _routed(part, self._lohan):
            if _wants_static_cache(part, kwargs):
                kwargs["cache_implementation"] = "static"
            kwargs.setdefault("disable_compile", True)
            return super().generate(*args, **kwargs)  # type: ignore[misc]


def _generating_part(model: torch.nn.Module) -> torch.nn.Module:
    """The module whose forward `model.generate` calls: itself, or what an adapter is wrapped around."""
    for module in model.modules():
        if hasattr(type(module), "prepare_inputs_for_generation") and hasattr(module, "config"):
            if module is model and hasattr(model, "get_base_model"):
                continue
            return module
    return model


def _wants_static_cache(part: Any, kwargs: Mapping[str, Any]) -> bool:
    config = kwargs.get("generation_config") or getattr(part, "generation_config", None)

    def chosen(name: str, otherwise: Any = None) -> Any:
        value = kwargs.get(name)
        return getattr(config, name, otherwise) if value is None else value

    return bool(
        getattr(part, "_can_compile_fullgraph", False)
        and not part.config.is_encoder_decoder
        and chosen("use_cache") is not False
        and not any(chosen(name) is not None for name in _OTHER_CACHES)
    )


@contextmanager
def _routed(part: torch.nn.Module, evaluator: Evaluator) -> Iterator[None]:
    """While inside, `part` is of a class whose calls go through `evaluator`."""
    base = type(part)
    if "_lohan_prompts" not in part.__dict__:
        object.__setattr__(part, "_lohan_prompts", set())
    part.__class__ = _routed_class(base, evaluator)
    try:
        yield
    finally:
        part.__class__ = base


def _routed_class(base: type, evaluator: Evaluator) -> type:
    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        self.__class__ = base  # which is what captured code is guarded on
        try:
            return _call(self, evaluator, args, kwargs)
        finally:
            self.__class__ = made

    def prepare_static_cache(self: Any, *args: Any, **kwargs: Any) -> Any:
        if "max_cache_len" in kwargs:
            kwargs["max_cache_len"] = round_length(kwargs["max_cache_len"])
        cache = base._prepare_static_cache(self, *args, **kwargs)  # type: ignore[attr-defined]
        _initialize(self, cache, kwargs.get("batch_size"))
        return cache

    made = type(
        base.__name__,
        (base,),
        {
            "__module__": base.__module__,
            "__call__": call,
            "_prepare_static_cache": prepare_static_cache,
        },
    )
    return made


def _initialize(part: Any, cache: Any, batch_size: int | None) -> None:
    """Allocate a static cache now, so that the first call finds it as the later ones do."""
    shape = getattr(part, "_get_static_cache_init_shape", lambda: None)()
    if batch_size is None or shape is None or not hasattr(cache, "early_initialization"):
        return
    heads, width = shape
    cache.early_initialization(batch_size, heads, width, part.dtype, part.device)
    for layer in cache.layers:
        for value in vars(layer).values():
            # Marked as never moving, which would make a program of its own for every new cache.
            if isinstance(value, torch.Tensor):
                value.__dict__.pop("_dynamo_static_input_type", None)


def _call(part: Any, evaluator: Evaluator, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    tokens, cache = kwargs.get("input_ids"), kwargs.get("past_key_values")
    if not args and isinstance(tokens, torch.Tensor) and tokens.dim() == 2:
        if getattr(cache, "is_compileable", False):
            return _read(part, evaluator, tokens.shape[1], kwargs)
        if cache is None and not kwargs.get("use_cache") and _can_pad(part, kwargs):
            return _padded(part, evaluator, tokens, kwargs)
    return torch.nn.Module.__call__(part, *args, **kwargs)


def _read(part: Any, evaluator: Evaluator, length: int, kwargs: dict[str, Any]) -> Any:
    """The result after `length` more tokens; of a prompt read in pieces, that of the last piece."""
    whole: set[int] = part._lohan_prompts
    if length > 1 and length not in whole:
        if len(whole) < MAX_WHOLE_PROMPTS:
            whole.add(length)
        elif _can_split(kwargs, length):
            start, result = 0, None
            for size in pieces(length):
                result = evaluator.evaluate(part, _sliced(kwargs, length, start, start + size))
                start += size
            return result
    return evaluator.evaluate(part, kwargs)


_ALONG_TOKENS = ("input_ids", "position_ids", "token_type_ids", "cache_position")


def _masks(kwargs: Mapping[str, Any]) -> dict[str, Any]:
    mask = kwargs.get("attention_mask")
    return dict(mask) if isinstance(mask, Mapping) else {"": mask}


def _can_split(kwargs: Mapping[str, Any], length: int) -> bool:
    """Whether every argument is known to be one for the whole call or one row per token.

    Without a mask, the model makes one for each piece from what its cache holds.
    """
    rows = all(
        m is None or (m.dim() == 4 and m.shape[2] == length) for m in _masks(kwargs).values()
    )
    known = (*_ALONG_TOKENS, "attention_mask")
    return rows and not any(
        isinstance(value, torch.Tensor) and value.dim() and name not in known
        for name, value in kwargs.items()
    )


def _sliced(kwargs: Mapping[str, Any], length: int, start: int, stop: int) -> dict[str, Any]:
    found = dict(kwargs)
    for name in _ALONG_TOKENS:
        value = found.get(name)
        if isinstance(value, torch.Tensor) and value.shape[-1] == length:
            found[name] = value[..., start:stop].clone(memory_format=torch.contiguous_format)
    masks = {
        name: mask
        if mask is None
        else mask[:, :, start:stop].clone(memory_format=torch.contiguous_format)
        for name, mask in _masks(kwargs).items()
    }
    if "attention_mask" in found:
        found["attention_mask"] = masks.get("", masks)
    return found


def _can_pad(part: Any, kwargs: Mapping[str, Any]) -> bool:
    mask = kwargs.get("attention_mask")
    known = ("input_ids", "position_ids", "attention_mask")
    return (
        not part.config.is_encoder_decoder
        and (mask is None or mask.shape == kwargs["input_ids"].shape)
        and not kwargs.get("output_hidden_states")
        and not kwargs.get("output_attentions")
        and not any(isinstance(v, torch.Tensor) and k not in known for k, v in kwargs.items())
    )


def _padded(
    part: Any, evaluator: Evaluator, tokens: torch.Tensor, kwargs: Mapping[str, Any]
) -> Any:
    """The result for a right-padded sequence, cut back: causal attention never sees the padding."""
    length = tokens.shape[1]
    extra = round_length(length) - length
    limit = getattr(part.config, "max_position_embeddings", None)
    if limit is not None:
        extra = max(0, min(extra, limit - length))
    found = {name: value for name, value in kwargs.items() if name != "logits_to_keep"}
    for name in ("input_ids", "position_ids", "attention_mask"):
        value = found.get(name)
        if isinstance(value, torch.Tensor):
            found[name] = torch.nn.functional.pad(value, (0, extra))
    result = evaluator.evaluate(part, found)
    result.logits = result.logits[:, :length]
    return result


__all__ = ["Generates", "pieces", "round_length"]
