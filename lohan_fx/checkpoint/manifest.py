"""`lohan_fx.json`: what a checkpoint consists of, with sizes and checksums. JSON, never executed."""

from __future__ import annotations

import base64
import collections
import json
import numbers
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import torch

from lohan_fx.errors import LohanError

from .shards import file_errors

MANIFEST = "lohan_fx.json"
FORMAT = 1


@dataclass(frozen=True, slots=True)
class Shard:
    """One safetensors file: its size, and CRC-32 checksums of its header and of each tensor's pieces."""

    nbytes: int
    header_crc: int
    crcs: Mapping[str, Sequence[int]]  # of every PIECE_BYTES


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """Everything about a checkpoint besides tensors.

    `weights` and `optimizer` are files by name. `steps` are the updates that each trainable parameter
    has had, `step` those of the optimizer. `masters` says that fp32 masters are among the optimizer's
    tensors (else the weights are those).
    `other_files` belong to the checkpoint, but are not needed to load it.
    """

    version: str
    torch_version: str
    created: str
    model: str
    step: int
    masters: bool
    weights: Mapping[str, Shard]
    optimizer: Mapping[str, Shard]
    steps: Mapping[str, int]
    param_groups: Sequence[Mapping[str, Any]] | None
    optimizer_class: str | None
    scheduler: Mapping[str, Any] | None
    scaler: Mapping[str, Any] | None
    random: Mapping[str, torch.Tensor]
    extra: Any = None
    other_files: Sequence[str] = field(default_factory=tuple)

    @property
    def files(self) -> set[str]:
        return {*self.weights, *self.optimizer, *self.other_files, MANIFEST}

    def to_json(self) -> str:
        """Raises LohanError for a value that has no JSON form; names it."""
        content = {
            name: encode(value, name)
            for name, value in ((f.name, getattr(self, f.name)) for f in fields(self))
            if name not in ("weights", "optimizer")
        }
        for kind in ("weights", "optimizer"):
            content[kind] = {name: asdict(shard) for name, shard in getattr(self, kind).items()}
        whole = {"format": FORMAT, "crc32": _crc(content), "checkpoint": content}
        return json.dumps(whole, indent=1, sort_keys=True) + "\n"

    @classmethod
    def read(cls, path: Path) -> Manifest:
        """The manifest in a checkpoint's directory.

        Raises:
            LohanError: there is none, or it is damaged, or of a later version of lohan_fx.
        """
        file = path / MANIFEST
        if not file.is_file():
            what = "there is no such directory" if not path.exists() else f"it has no {MANIFEST}"
            raise LohanError(f"{path} is not a checkpoint of lohan_fx: {what}")
        with file_errors("read", file):
            text = file.read_bytes()
        try:
            whole = json.loads(text)
            if whole["format"] != FORMAT:
                raise LohanError(
                    f"{path} is a checkpoint of format {whole['format']}, this version of lohan_fx reads "
                    f"{FORMAT}; load it with the version that wrote it"
                )
            content = whole["checkpoint"]
            if _crc(content) != whole["crc32"]:
                raise ValueError("its checksum is wrong")
            for kind in ("weights", "optimizer"):
                content[kind] = {name: Shard(**shard) for name, shard in content[kind].items()}
            return cls(
                **{
                    name: value if name in ("weights", "optimizer") else decode(value)
                    for name, value in content.items()
                }
            )
        except (ValueError, TypeError, KeyError) as error:
            raise LohanError(f"{file} is damaged: {error}") from error


def _crc(content: Mapping[str, Any]) -> int:
    return zlib.crc32(json.dumps(content, sort_keys=True, separators=(",", ":")).encode())


def encode(value: Any, where: str) -> Any:
    """A value as JSON that `decode` restores exactly: tuples, sets, odd keys, tensors, infinities.

    Raises:
        LohanError: there is no JSON form; `where` names the value.
    """
    if value is None or isinstance(value, bool | str):
        return value
    if isinstance(value, numbers.Integral):
        return int(value)
    if isinstance(value, numbers.Real):
        number = float(value)
        return number if abs(number) < float("inf") else {"__float__": repr(number)}
    if isinstance(value, torch.Tensor):
        data = value.detach().cpu().contiguous()
        raw = data.reshape(-1).view(torch.uint8).numpy().tobytes()
        text = base64.b64encode(raw).decode()
        dtype = str(data.dtype).removeprefix("torch.")
        return {"__tensor__": text, "dtype": dtype, "shape": list(data.shape)}
    if isinstance(value, list):
        return [encode(item, f"{where}[{i}]") for i, item in enumerate(value)]
    if isinstance(value, tuple):
        return {"__tuple__": [encode(item, f"{where}[{i}]") for i, item in enumerate(value)]}
    if isinstance(value, set | frozenset):
        return {"__set__": [encode(item, where) for item in sorted(value)]}
    if isinstance(value, Mapping):
        plain = all(isinstance(key, str) and not key.startswith("__") for key in value)
        if plain and not isinstance(value, collections.Counter):
            return {key: encode(item, f"{where}[{key!r}]") for key, item in value.items()}
        pairs = [
            [encode(key, where), encode(item, f"{where}[{key!r}]")] for key, item in value.items()
        ]
        kind = "__counter__" if isinstance(value, collections.Counter) else "__dict__"
        return {kind: pairs}
    raise LohanError(
        f"{where} is a {type(value).__name__}, which cannot be saved; checkpoints hold numbers, text, "
        "None, lists, tuples, sets, dicts and tensors"
    )


def decode(value: Any) -> Any:
    """What `encode` was given."""
    if isinstance(value, list):
        return [decode(item) for item in value]
    if not isinstance(value, dict):
        return value
    match value:
        case {"__float__": text}:
            return float(text)
        case {"__tensor__": text, "dtype": name, "shape": shape}:
            dtype = getattr(torch, name, None)
            if not isinstance(dtype, torch.dtype):
                raise ValueError(f"{name} is no dtype")
            raw = bytearray(base64.b64decode(text))
            flat = torch.frombuffer(raw, dtype=torch.uint8) if raw else torch.empty(0).byte()
            return flat.view(dtype).reshape(shape)
        case {"__tuple__": items}:
            return tuple(decode(item) for item in items)
        case {"__set__": items}:
            return {decode(item) for item in items}
        case {"__counter__": pairs}:
            return collections.Counter({decode(key): decode(item) for key, item in pairs})
        case {"__dict__": pairs}:
            return {decode(key): decode(item) for key, item in pairs}
    return {key: decode(item) for key, item in value.items()}
