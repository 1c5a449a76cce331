"""safetensors files, written and read piece by piece.

The format: 8 bytes of little-endian header length, a JSON header with each tensor's dtype, shape and
byte range, then the bytes. The library of that name maps whole files or holds whole tensors; here
memory is bounded by a piece, a truncated or unreadable file is an error and not a signal, and every
tensor has a checksum.
"""

from __future__ import annotations

import json
import math
import os
import struct
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lohan_fx.errors import LohanError, TransferError
from lohan_fx.piecewise import scratch

DTYPE_NAMES: dict[torch.dtype, str] = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
    torch.complex64: "C64",
}
_DTYPES = {name: dtype for dtype, name in DTYPE_NAMES.items()}

_MOST_HEADER_BYTES = 100_000_000  # as in the safetensors library

# What is read, written and has a checksum at a time; part of the format.
PIECE_BYTES = 16 << 20


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """A tensor that a file holds."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.numel * self.dtype.itemsize

    @property
    def num_pieces(self) -> int:
        return -(-self.nbytes // PIECE_BYTES)


@dataclass(frozen=True, slots=True)
class Entry:
    """A tensor in a file; `start` is a byte offset in the file."""

    spec: TensorSpec
    start: int


def split_shards(specs: Sequence[TensorSpec], max_bytes: int) -> list[list[TensorSpec]]:
    """Group tensors in their order, at most `max_bytes` together or one alone."""
    shards: list[list[TensorSpec]] = []
    room = 0
    for spec in specs:
        if not shards or (spec.nbytes > room and shards[-1]):
            shards.append([])
            room = max_bytes
        shards[-1].append(spec)
        room -= spec.nbytes
    return shards


def shard_names(stem: str, num: int) -> list[str]:
    """File names as Hugging Face gives them."""
    if num == 1:
        return [f"{stem}.safetensors"]
    return [f"{stem}-{i + 1:05d}-of-{num:05d}.safetensors" for i in range(num)]


def _layout(specs: Sequence[TensorSpec]) -> tuple[bytes, dict[str, Entry]]:
    """The header with its length, and where each tensor's bytes go.

    Wide dtypes come first, so that every tensor starts at a multiple of its item size.
    """
    ordered = sorted(specs, key=lambda s: (-s.dtype.itemsize, s.name))
    fields: dict[str, Any] = {"__metadata__": {"format": "pt"}}  # what transformers asks for
    at = 0
    starts: dict[str, tuple[TensorSpec, int]] = {}
    for spec in ordered:
        if spec.dtype not in DTYPE_NAMES:
            raise LohanError(f"{spec.name} is {spec.dtype}, which safetensors files cannot hold")
        fields[spec.name] = {
            "dtype": DTYPE_NAMES[spec.dtype],
            "shape": list(spec.shape),
            "data_offsets": [at, at + spec.nbytes],
        }
        starts[spec.name] = (spec, at)
        at += spec.nbytes
    text = json.dumps(fields, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    header = struct.pack("<Q", len(text)) + text
    entries = {name: Entry(spec, len(header) + start) for name, (spec, start) in starts.items()}
    return header, entries


class ShardWriter:
    """One file being written, PIECE_BYTES of a tensor at a time, in any order and from any thread.

    Raises:
        TransferError: the file cannot be written; has path and errno.
    """

    def __init__(self, path: Path, specs: Sequence[TensorSpec]) -> None:
        self.path = path
        header, self._entries = _layout(specs)
        self.header_crc = zlib.crc32(header)
        self.nbytes = len(header) + sum(spec.nbytes for spec in specs)
        self.crcs = {spec.name: [-1] * spec.num_pieces for spec in specs}
        self._unsynced = 0
        self._fd = -1
        with file_errors("written", path):
            self._fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
            self._put(header, 0)

    @staticmethod
    def size_of(specs: Sequence[TensorSpec]) -> int:
        """Bytes of a file with these tensors."""
        return len(_layout(specs)[0]) + sum(spec.nbytes for spec in specs)

    def write(self, name: str, index: int, data: memoryview) -> None:
        """One piece of a tensor; all but its last have PIECE_BYTES."""
        entry = self._entries[name]
        with file_errors("written", self.path):
            self._put(data, entry.start + index * PIECE_BYTES)
        self.crcs[name][index] = zlib.crc32(data)

    def finish(self) -> None:
        """All is there, and on the disk."""
        missing = [name for name, crcs in self.crcs.items() if -1 in crcs]
        assert not missing, missing
        with file_errors("written", self.path):
            os.fsync(self._fd)
            self.close()

    def close(self) -> None:
        if self._fd >= 0:
            fd, self._fd = self._fd, -1
            os.close(fd)

    def _put(self, data: bytes | memoryview, offset: int) -> None:
        view = memoryview(data)
        while view:
            written = os.pwrite(self._fd, view, offset)
            view, offset = view[written:], offset + written
            self._unsynced += written
        if self._unsynced > 16 * PIECE_BYTES:
            # What lies in the page cache counts against a container's memory.
            self._unsynced = 0
            os.fdatasync(self._fd)
            os.posix_fadvise(self._fd, 0, 0, os.POSIX_FADV_DONTNEED)


class file_errors:
    """Turns OSError into TransferError with the path and errno."""

    def __init__(self, done: str, path: Path) -> None:
        self._done = done
        self._path = path

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, OSError):
            raise TransferError(
                f"{self._path} cannot be {self._done}: {error.strerror or error}",
                path=str(self._path),
                errno=error.errno,
            ) from error


class ShardFile:
    """A safetensors file, open for as long as this object lives, also when it is replaced.

    Raises:
        TransferError: it cannot be opened or read.
        LohanError: it is not a whole safetensors file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._fd = -1
        with file_errors("read", path):
            self._fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            self.nbytes = os.fstat(self._fd).st_size
            start = self._get(0, min(8, self.nbytes))
            length = struct.unpack("<Q", start)[0] if len(start) == 8 else _MOST_HEADER_BYTES + 1
            if length > min(_MOST_HEADER_BYTES, self.nbytes - 8):
                raise LohanError(f"{path} is no safetensors file: it has no header")
            text = self._get(8, length)
        self.header_crc = zlib.crc32(start + text)
        self.entries = _entries(path, text, self.nbytes)

    def tensor(self, name: str) -> StoredTensor:
        return StoredTensor(self, self.entries[name])

    def pieces(self, name: str) -> Iterator[bytes]:
        """A tensor's bytes."""
        entry = self.entries[name]
        for done in range(0, entry.spec.nbytes, PIECE_BYTES):
            yield self.read(entry.start + done, min(PIECE_BYTES, entry.spec.nbytes - done))

    def read(self, offset: int, nbytes: int) -> bytes:
        with file_errors("read", self.path):
            return self._get(offset, nbytes)

    def read_into(self, offset: int, out: memoryview) -> None:
        with file_errors("read", self.path):
            while out:
                got = os.preadv(self._fd, [out], offset)
                if got == 0:
                    raise LohanError(f"{self.path} ends at byte {offset}: it has been truncated")
                out, offset = out[got:], offset + got

    def _get(self, offset: int, nbytes: int) -> bytes:
        out = bytearray(nbytes)
        self.read_into(offset, memoryview(out))
        return bytes(out)

    def __del__(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)


def _entries(path: Path, text: bytes, nbytes: int) -> dict[str, Entry]:
    """Check a header in full: every tensor's bytes are there, and no byte is left over."""
    base = 8 + len(text)
    found: dict[str, Entry] = {}
    try:
        fields = json.loads(text)
        fields.pop("__metadata__", None)
        at = 0
        for name, field in sorted(fields.items(), key=lambda item: item[1]["data_offsets"]):
            shape = tuple(int(n) for n in field["shape"])
            start, stop = field["data_offsets"]
            if field["dtype"] not in _DTYPES:
                raise LohanError(f"{path}: {name} has dtype {field['dtype']}, which torch lacks")
            spec = TensorSpec(name, _DTYPES[field["dtype"]], shape)
            if start != at or stop - start != spec.nbytes or min(shape, default=0) < 0:
                raise ValueError(f"{name} is at bytes {start} to {stop}")
            found[name] = Entry(spec, base + start)
            at = stop
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise LohanError(
            f"{path} is no safetensors file: its header is damaged ({error})"
        ) from error
    if base + at != nbytes:
        raise LohanError(f"{path} has {nbytes:,} bytes, but its header says {base + at:,}")
    return found


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A tensor in an open file. Implements runtime's Piecewise."""

    file: ShardFile
    entry: Entry

    @property
    def shape(self) -> tuple[int, ...]:
        return self.entry.spec.shape

    @property
    def dtype(self) -> torch.dtype:
        return self.entry.spec.dtype

    def piece(self, start: int, stop: int) -> torch.Tensor:
        """Elements [start, stop) of the flattened tensor."""
        out_N = scratch(stop - start, self.dtype)
        if stop > start:
            offset = self.entry.start + start * self.dtype.itemsize
            self.file.read_into(offset, out_N.view(torch.uint8).numpy().data)
        return out_N


def index_json(weight_map: Mapping[str, str], total_bytes: int) -> str:
    """`model.safetensors.index.json` as transformers writes it."""
    content = {"metadata": {"total_size": total_bytes}, "weight_map": dict(weight_map)}
    return json.dumps(content, indent=2, sort_keys=True) + "\n"
