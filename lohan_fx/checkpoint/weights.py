"""`weights=` of compile: a model's values from safetensors files, straight into its tiers.

Nothing but headers and buffers is read here; what `weights_for` gives reads pieces of the files when
the parameters are placed.
"""

from __future__ import annotations

import json
import os
import re
import sys
import warnings
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from lohan_fx.errors import LohanError
from lohan_fx.piecewise import Piecewise, in_memory

from .shards import ShardFile, StoredTensor, file_errors

_INDEX = "model.safetensors.index.json"
_FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


def open_weights(path: str | os.PathLike[str]) -> dict[str, StoredTensor]:
    """The tensors of a safetensors file, or of a directory as Hugging Face lays it out, by name.

    Raises:
        LohanError: there are none, a file is damaged, or the index does not match the files.
        TransferError: a file cannot be read.
    """
    where = Path(path)
    files = {file.name: ShardFile(file) for file in _files(where)}
    found: dict[str, StoredTensor] = {}
    for file in files.values():
        for name in file.entries:
            if name in found:
                raise LohanError(f"{name} is in {found[name].file.path} and in {file.path}")
            found[name] = file.tensor(name)
    return found


def _files(where: Path) -> list[Path]:
    if where.is_file():
        return [where]
    if not where.is_dir():
        raise LohanError(f"weights={where}: there is no such file or directory")
    index = where / _INDEX
    if index.is_file():
        with file_errors("read", index):
            text = index.read_bytes()
        try:
            names = sorted(set(json.loads(text)["weight_map"].values()))
            paths = [where / Path(name).name for name in names]
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise LohanError(f"{index} is damaged: {error}") from error
        missing = [path.name for path in paths if not path.is_file()]
        if missing:
            raise LohanError(f"{where} lacks {', '.join(missing)}, which {_INDEX} lists")
        return paths
    if (where / "model.safetensors").is_file():
        return [where / "model.safetensors"]
    present = sorted(where.glob("*.safetensors"))
    if len(present) != 1:
        what = f"has {len(present)} of them and no {_INDEX}" if present else "has none"
        raise LohanError(
            f"weights={where}: a directory with safetensors files is wanted, this one {what}; give the "
            "file, or save the model with save_pretrained()"
        )
    return present


def weights_for(model: torch.nn.Module, path: str | os.PathLike[str]) -> dict[str, Piecewise]:
    """The values of every parameter, by its name in `named_parameters()`; buffers are set at once.

    Tied parameters take the value of whichever of their names the files have. A Hugging Face model
    may have one base-model prefix more or less than the files. Buffers that are in no file are
    computed again by the model's `_init_weights`, as transformers does.

    Raises:
        LohanError: parameters are missing in the files or have other shapes (nothing has been
            changed), or a buffer on the meta device cannot be computed.
    """
    files = open_weights(path)
    find = _Finder(model, files)
    values: dict[str, Piecewise] = {}
    wrong: list[str] = []
    missing: list[str] = []
    names: dict[int, list[str]] = {}
    params = dict(model.named_parameters(remove_duplicate=False))
    for name, param in params.items():
        names.setdefault(id(param), []).append(name)
    for aliases in names.values():
        param = params[aliases[0]]
        found = next((f for f in map(find, aliases) if f is not None), None)
        if found is None:
            missing.append(aliases[0])
            continue
        problem = _mismatch(aliases[0], param, found)
        wrong += [problem] if problem else []
        values[aliases[0]] = found
    buffers = _persistent_buffers(model)
    for name, (module, key) in buffers.items():
        stored, buffer = find(name), module._buffers[key]
        if stored is not None and buffer is not None:
            problem = _mismatch(name, buffer, stored)
            wrong += [problem] if problem else []
    if missing:
        wrong.insert(0, f"{len(missing)} parameter(s) are not in it: {_some(missing)}")
    if wrong:
        raise LohanError(
            f"weights={path} does not fit {type(model).__name__}: " + "; ".join(wrong[:4])
        )
    _warn_of_unused(model, path, find)
    for name, (module, key) in buffers.items():
        stored, buffer = find(name), module._buffers[key]
        if stored is not None and buffer is not None:
            device = None if buffer.is_meta else buffer.device
            module._buffers[key] = in_memory(stored).to(device, buffer.dtype)
    _compute_meta_buffers(model)
    return values


class _Finder:
    """Finds a model's tensor in the files, and remembers what has been used."""

    def __init__(self, model: torch.nn.Module, files: Mapping[str, StoredTensor]) -> None:
        self.files = files
        self.used: set[str] = set()
        prefix = getattr(model, "base_model_prefix", "")
        self._prefix = f"{prefix}." if prefix else ""
        self._names = {new: old for old, new in _renamed(model, files).items()}
        self._names |= {name: name for name in files}

    def __call__(self, name: str) -> StoredTensor | None:
        shorter = name.removeprefix(self._prefix)
        for candidate in (name, shorter, self._prefix + name):
            if candidate in self._names:
                self.used.add(self._names[candidate])
                return self.files[self._names[candidate]]
        return None


def _renamed(model: torch.nn.Module, names: Iterable[str]) -> dict[str, str]:
    """Names in the files of a Hugging Face model -> those of its class today, where they differ.

    Some architectures have been rewritten since their checkpoints were made; transformers knows which.
    Where it also merges tensors (experts), the merged ones are missing and named as such.
    """
    if not hasattr(sys.modules.get("transformers"), "PreTrainedModel"):
        return {}
    from transformers import PreTrainedModel

    try:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightRenaming
    except ImportError:
        return {}
    if not isinstance(model, PreTrainedModel):
        return {}
    rules = [r for r in get_model_conversion_mapping(model) if isinstance(r, WeightRenaming)]
    found = {}
    for name in names:
        renamed = name
        for rule in rules:
            renamed, _ = rule.rename_source_key(renamed)
        if renamed != name:
            found[name] = renamed
    return found


def _mismatch(name: str, wanted: torch.Tensor, found: StoredTensor) -> str | None:
    if tuple(wanted.shape) != found.shape:
        return f"{name} has shape {found.shape} there, {tuple(wanted.shape)} in the model"
    if wanted.dtype in _FLOATS and found.dtype not in _FLOATS:
        return f"{name} is {found.dtype} there; quantized weights must be converted first"
    if wanted.dtype not in _FLOATS and found.dtype != wanted.dtype:
        return f"{name} is {found.dtype} there, {wanted.dtype} in the model"
    return None


def _persistent_buffers(model: torch.nn.Module) -> dict[str, tuple[torch.nn.Module, str]]:
    return {
        f"{prefix}.{key}" if prefix else key: (module, key)
        for prefix, module in model.named_modules()
        for key, buffer in module._buffers.items()
        if buffer is not None and key not in module._non_persistent_buffers_set
    }


def _warn_of_unused(model: torch.nn.Module, path: str | os.PathLike[str], find: _Finder) -> None:
    """Say what the files have and the model has not, except what its class says to ignore."""
    ignored = [
        *(getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ()),
        r"rotary_emb\.inv_freq",
    ]
    unused = [
        name
        for name in find.files
        if name not in find.used and not any(re.search(pattern, name) for pattern in ignored)
    ]
    tied = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    unused = [name for name in unused if name not in tied]
    if unused:
        warnings.warn(
            f"{len(unused)} tensor(s) of weights={path} are not in {type(model).__name__}: {_some(unused)}",
            stacklevel=4,
        )


def _meta_buffers(model: torch.nn.Module) -> Iterator[tuple[str, torch.nn.Module, str]]:
    for prefix, module in model.named_modules():
        for key, buffer in module._buffers.items():
            if buffer is not None and buffer.is_meta:
                yield f"{prefix}.{key}" if prefix else key, module, key


def _compute_meta_buffers(model: torch.nn.Module) -> None:
    """Let a Hugging Face model set the buffers that no file holds, rotary frequencies for instance."""
    left = list(_meta_buffers(model))
    if not left:
        return
    initialize: Any = getattr(model, "_init_weights", None)
    marks: dict[str, torch.Tensor] = {}
    modules: dict[int, torch.nn.Module] = {}
    for name, module, key in left:
        buffer = module._buffers[key]
        assert buffer is not None
        marked = _marked(buffer)
        module._buffers[key] = marked
        marks[name] = marked.clone()
        modules[id(module)] = module
    if initialize is not None:
        with torch.no_grad(), torch.device("cpu"):
            for module in modules.values():
                initialize(module)
    unset = []
    for name, module, key in left:
        buffer = module._buffers[key]
        assert buffer is not None
        if buffer.is_meta or _same_bits(buffer, marks[name]):
            unset.append(name)
    if unset:
        raise LohanError(
            f"buffer(s) {_some(unset)} are on the meta device, in no file, and "
            f"{type(model).__name__} has no _init_weights that sets them; set them before "
            "lohan_fx.compile, or make them persistent and save them"
        )


def _marked(buffer: torch.Tensor) -> torch.Tensor:
    """A buffer of the same kind on the CPU, with contents that no model has."""
    made = torch.empty_like(buffer, device="cpu")
    if made.dtype == torch.bool:
        return made.fill_(True)
    if made.is_floating_point() or made.is_complex():
        return made.fill_(float("nan"))
    return made.fill_(torch.iinfo(made.dtype).max)


def _same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    return torch.equal(
        one.contiguous().reshape(-1).view(torch.uint8), other.reshape(-1).view(torch.uint8)
    )


def _some(names: list[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more
