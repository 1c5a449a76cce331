"""Models by name: presets, Hugging Face configs and factories, without allocating weights."""

from __future__ import annotations

import importlib
import inspect
import json
import math
import os
import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lohan_fx.errors import LohanError

if TYPE_CHECKING:
    import torch

_LLAMA_3 = {"vocab_size": 128256, "num_key_value_heads": 8, "tie_word_embeddings": True}
_LLAMA_2 = {"vocab_size": 32000}
_QWEN = {"vocab_size": 151936, "tie_word_embeddings": True}


def _llama(hidden: int, inner: int, layers: int, heads: int, **rest: Any) -> dict[str, Any]:
    return {
        "model_type": "llama",
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        **rest,
    }


def _qwen(hidden: int, inner: int, layers: int, heads: int, **rest: Any) -> dict[str, Any]:
    return {**_llama(hidden, inner, layers, heads, **rest), "model_type": "qwen2"}


def _gpt(layers: int, heads: int, hidden: int) -> dict[str, Any]:
    # No dropout: the CPU kernel that attention is traced on would otherwise save its whole matrix.
    return {
        "model_type": "gpt2",
        "n_layer": layers,
        "n_head": heads,
        "n_embd": hidden,
        "vocab_size": 50257,
        "attn_pdrop": 0.0,
        "embd_pdrop": 0.0,
        "resid_pdrop": 0.0,
    }


# Name -> the Hugging Face config that builds it. gpt-* is the table of arXiv 2403.06504.
PRESETS: dict[str, dict[str, Any]] = {
    "llama-1b": _llama(2048, 8192, 16, 32, head_dim=64, **_LLAMA_3),
    "llama-3b": _llama(3072, 8192, 28, 24, head_dim=128, **_LLAMA_3),
    "llama-7b": _llama(4096, 11008, 32, 32, **_LLAMA_2),
    "llama-13b": _llama(5120, 13824, 40, 40, **_LLAMA_2),
    "llama-70b": _llama(8192, 28672, 80, 64, num_key_value_heads=8, **_LLAMA_2),
    "qwen-0.5b": _qwen(896, 4864, 24, 14, num_key_value_heads=2, **_QWEN),
    "qwen-1.5b": _qwen(1536, 8960, 28, 12, num_key_value_heads=2, **_QWEN),
    "qwen-3b": _qwen(2048, 11008, 36, 16, num_key_value_heads=2, **_QWEN),
    "qwen-7b": _qwen(3584, 18944, 28, 28, num_key_value_heads=4, vocab_size=152064),
    "qwen-14b": _qwen(5120, 13824, 48, 40, num_key_value_heads=8, vocab_size=152064),
    "qwen-32b": _qwen(5120, 27648, 64, 40, num_key_value_heads=8, vocab_size=152064),
    "gpt-6b": _gpt(28, 32, 4096),
    "gpt-13b": _gpt(40, 40, 5120),
    "gpt-30b": _gpt(48, 56, 7168),
    "gpt-70b": _gpt(80, 64, 8192),
    "gpt-135b": _gpt(88, 88, 11264),
    "gpt-175b": _gpt(96, 96, 12288),
    "gpt-276b": _gpt(112, 112, 14336),
    "gpt-412b": _gpt(128, 128, 16384),
}

# Name -> (layers, heads, hidden) of an image model, see `lohan_fx.cli.dit`. The first is DiT-XL/2 of
# arXiv 2212.09748; the others are sizes of our own, with widths of gpt-*.
DIT_PRESETS: dict[str, tuple[int, int, int]] = {
    "dit-0.7b": (28, 16, 1152),
    "dit-1.4b": (32, 16, 1536),
    "dit-10b": (32, 32, 4096),
    "dit-20b": (42, 40, 5120),
    "dit-40b": (44, 56, 7168),
}


def preset_names() -> tuple[str, ...]:
    """Every model preset; those of one family are in ascending order of size."""
    return (*PRESETS, *DIT_PRESETS)


def family_of(spec: str) -> tuple[str, ...]:
    """The presets of a family, given its name or any of them; () where `spec` is neither."""
    name = spec.split("-")[0]
    if spec != name and spec not in preset_names():
        return ()
    return tuple(preset for preset in preset_names() if preset.split("-")[0] == name)


# Config fields that say how many layers there are, by the families of models that have them.
_LAYERS = ("num_hidden_layers", "n_layer", "num_layers", "n_layers")
# config field -> what a sequence of `seq` tokens needs it to be at least
_POSITIONS = ("n_positions", "max_position_embeddings")


@dataclass(frozen=True, slots=True)
class ModelInput:
    """A model on the meta device, and what to call it with once, on the CPU.

    `tokens` counts those of one step; None where the model reads no tokens. `layers` is the number of
    layers where that is known, and `with_layers` makes the same model with another number.
    """

    name: str
    model: torch.nn.Module
    example_inputs: Mapping[str, Any] | Sequence[Any]
    tokens: int | None
    layers: int | None = None
    with_layers: Callable[[int], ModelInput] | None = None


def resolve_model(spec: str, *, batch: int, seq: int) -> ModelInput:
    """The model that `spec` names: a preset, a config.json or its directory, or "pkg.mod:factory".

    A factory is called with batch= and seq= where it takes them, and returns (model, inputs), inputs
    being a dict or a tuple. Raises LohanError for anything that is none of these or fails to build.
    """
    if spec in PRESETS:
        return _from_config(spec, PRESETS[spec], batch, seq)
    if spec in DIT_PRESETS:
        return _from_dit(spec, batch, seq)
    path = Path(spec)
    if os.path.exists(spec):  # False, not an error, for what cannot be a path
        return _from_config(_path_name(path), _read_config(path), batch, seq)
    module, colon, factory = spec.partition(":")
    if colon and module and factory.isidentifier():
        return _from_factory(spec, module, factory, batch, seq)
    family = family_of(spec)
    if family:
        raise LohanError(
            f"{spec!r} is a family of models; name one of {', '.join(family)}, or ask for the largest "
            "that fits with --max-model"
        )
    raise LohanError(
        f"{spec!r} is no model: not a file or directory, not 'pkg.module:factory', and not one of "
        f"the presets {', '.join(preset_names())}"
    )


# ---- Hugging Face configs ----


def _path_name(path: Path) -> str:
    folder = path if path.is_dir() else path.parent
    return folder.resolve().name if path.is_dir() or path.name == "config.json" else path.stem


def _read_config(path: Path) -> dict[str, Any]:
    file = path / "config.json" if path.is_dir() else path
    try:
        raw = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as exc:
        raise LohanError(f"{file} cannot be read as a Hugging Face config: {exc}") from exc
    if not isinstance(raw, dict) or "model_type" not in raw:
        raise LohanError(f"{file} is not a Hugging Face config: it has no model_type")
    return raw


def _from_config(name: str, raw: Mapping[str, Any], batch: int, seq: int) -> ModelInput:
    try:
        import transformers
    except ImportError as exc:
        raise LohanError(
            f"building {name} needs transformers; install it with: pip install 'lohan_fx[hf]'"
        ) from exc
    import torch

    fields = dict(raw)
    model_type = fields.pop("model_type")
    for key in _POSITIONS:
        if isinstance(fields.get(key), int):
            fields[key] = max(fields[key], seq)
    try:
        config = transformers.AutoConfig.for_model(model_type, **fields)
        for key in _POSITIONS:
            if key not in fields and isinstance(getattr(config, key, None), int):
                setattr(config, key, max(getattr(config, key), seq))
        config.use_cache = False
        with torch.device("meta"):
            model = _model_class(transformers, config).from_config(config)
        inputs, tokens = _example_inputs(config, type(model).__name__, batch, seq)
    except LohanError:
        raise
    except Exception as exc:  # whatever a config can make a model's constructor raise
        raise LohanError(f"{name} cannot be built from its config: {_one_line(exc)}") from exc
    known = [key for key in _LAYERS if isinstance(raw.get(key), int)]
    if len(known) != 1:
        return ModelInput(name, model, inputs, tokens)
    layers: int = raw[known[0]]

    def with_layers(count: int) -> ModelInput:
        # What the config lists of each layer has to be as long as there are layers.
        listed = {
            key: value[:1] * count
            for key, value in raw.items()
            if isinstance(value, list) and len(value) == layers
        }
        return _from_config(name, {**raw, **listed, known[0]: count}, batch, seq)

    return ModelInput(name, model, inputs, tokens, layers, with_layers)


def _model_class(transformers: Any, config: Any) -> Any:
    """The auto class for what the config was trained as; a causal language model if it says not."""
    endings = {
        "ForCausalLM": transformers.AutoModelForCausalLM,
        "LMHeadModel": transformers.AutoModelForCausalLM,
        "ForMaskedLM": transformers.AutoModelForMaskedLM,
        "ForImageClassification": transformers.AutoModelForImageClassification,
        "ForSequenceClassification": transformers.AutoModelForSequenceClassification,
    }
    for architecture in config.architectures or ():
        for ending, auto in endings.items():
            if architecture.endswith(ending):
                return auto
    for auto in (
        transformers.AutoModelForCausalLM,
        transformers.AutoModelForMaskedLM,
        transformers.AutoModelForImageClassification,
    ):
        if type(config) in auto._model_mapping:
            return auto
    raise LohanError(
        f"a {config.model_type!r} config has no model with a loss that can be built here; write a "
        "factory and name it as 'pkg.module:factory'"
    )


def _example_inputs(
    config: Any, class_name: str, batch: int, seq: int
) -> tuple[dict[str, Any], int | None]:
    """Inputs with labels, so that the loss is part of the step, and the tokens among them."""
    import torch

    if class_name.endswith("ForImageClassification"):
        size = config.image_size
        height, width = size if isinstance(size, list | tuple) else (size, size)
        pixels = torch.zeros(batch, config.num_channels, height, width)
        return {"pixel_values": pixels, "labels": torch.zeros(batch, dtype=torch.long)}, None
    tokens = torch.zeros(batch, seq, dtype=torch.long)
    whole = class_name.endswith("ForSequenceClassification")
    labels = torch.zeros(batch, dtype=torch.long) if whole else torch.zeros_like(tokens)
    return {"input_ids": tokens, "labels": labels}, batch * seq


# ---- image models ----


def _from_dit(name: str, batch: int, seq: int, count: int | None = None) -> ModelInput:
    import torch

    from lohan_fx.cli.dit import DiT, example_inputs

    side = math.isqrt(seq)
    if side * side != seq:
        raise LohanError(
            f"{name} reads square images of seq = side x side patches, and {seq} is no square; "
            f"try {side * side} or {(side + 1) ** 2}"
        )
    preset_layers, heads, hidden = DIT_PRESETS[name]
    layers = count or preset_layers
    with torch.device("meta"):
        model = DiT(layers, heads, hidden, side)
    return ModelInput(
        name,
        model,
        example_inputs(batch, side),
        batch * seq,
        layers,
        partial(_from_dit, name, batch, seq),
    )


# ---- factories ----


def _from_factory(spec: str, module: str, name: str, batch: int, seq: int) -> ModelInput:
    import torch

    try:
        factory = getattr(importlib.import_module(module), name)
    except (Exception, SystemExit) as exc:  # importing a user's module can raise anything
        raise LohanError(f"{spec} cannot be imported: {_one_line(exc)}") from exc
    wanted = _accepted(spec, factory, {"batch": batch, "seq": seq})
    try:
        made = _build(factory, wanted)
    except (Exception, SystemExit) as exc:
        raise LohanError(f"{spec} failed: {_one_line(exc)}") from exc
    is_pair = isinstance(made, tuple) and len(made) == 2
    if not is_pair or not isinstance(made[0], torch.nn.Module):
        raise LohanError(f"{spec} must return (model, example inputs), not {type(made).__name__}")
    model, inputs = made
    if not isinstance(inputs, Mapping | tuple | list):
        raise LohanError(
            f"{spec} must return its example inputs as a dict or a tuple, not "
            f"{type(inputs).__name__}"
        )
    inputs = dict(inputs) if isinstance(inputs, Mapping) else tuple(inputs)
    return ModelInput(spec, model, _on_cpu(inputs), _tokens(inputs))


def _build(factory: Callable[..., Any], wanted: Mapping[str, int]) -> Any:
    """What the factory makes, on the meta device if it can work there."""
    import torch

    failed: Exception | SystemExit | None = None
    for place in (torch.device("meta"), nullcontext()):
        try:
            with place:
                return factory(**wanted)
        except (Exception, SystemExit) as exc:
            # Some models read values while they are built; those have to exist.
            failed = failed or exc
    assert failed is not None
    raise failed


def _accepted(spec: str, factory: Any, offered: Mapping[str, int]) -> dict[str, int]:
    """Those of `offered` that the factory takes."""
    if not callable(factory):
        raise LohanError(f"{spec} is not a function")
    try:
        parameters = inspect.signature(factory).parameters
    except ValueError:  # some built-in functions have none
        return {}
    if any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        return dict(offered)
    return {key: value for key, value in offered.items() if key in parameters}


def _on_cpu(inputs: Any) -> Any:
    """The same inputs on the CPU, with zeros in place of tensors that have no values."""
    import torch

    def move(tensor: torch.Tensor) -> torch.Tensor:
        return torch.zeros_like(tensor, device="cpu") if tensor.is_meta else tensor.cpu()

    return _map_tensors(move, inputs)


def with_dtype(inputs: Any, dtype: torch.dtype) -> Any:
    """The same inputs, those of real numbers in the dtype that the model computes in."""
    return _map_tensors(lambda t: t.to(dtype) if t.is_floating_point() else t, inputs)


def _map_tensors(change: Callable[[torch.Tensor], torch.Tensor], inputs: Any) -> Any:
    import torch
    from torch.utils import _pytree as pytree

    return pytree.tree_map(lambda x: change(x) if isinstance(x, torch.Tensor) else x, inputs)


def _tokens(inputs: Any) -> int | None:
    """Elements of the first integer matrix, which are tokens; None without one."""
    import torch

    values = inputs.values() if isinstance(inputs, dict) else inputs
    for value in values:
        if isinstance(value, torch.Tensor) and value.dim() == 2 and value.dtype == torch.long:
            return value.numel()
    return None


def failed_forward(exc: Exception) -> str:
    """What went wrong when a model was traced on its example inputs, in one line."""
    # Dynamo's text is a page; the error itself is in one of its lines.
    found = re.search(r"got (\w+)\((?:'|\")(.*)(?:'|\")\)", str(exc))
    words = f"{found[1]}: {found[2]}" if found else _one_line(exc)
    return f"forward() fails on the example inputs: {words}"


def _one_line(exc: BaseException) -> str:
    text = " ".join(str(exc).split())
    return f"{type(exc).__name__}: {text[:300]}" if text else type(exc).__name__
