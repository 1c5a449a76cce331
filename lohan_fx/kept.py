"""Files of a cache: whole or not there, the least recently used dropped first, failures no error."""

from __future__ import annotations

import contextlib
import logging
import os
import tempfile
from pathlib import Path

from lohan_fx.errors import LohanError

log = logging.getLogger(__name__)


def read_kept(path: Path, max_bytes: int) -> bytes | None:
    """What is in a file, which counts as used now; None where there is none.

    Raises LohanError for a file of more than `max_bytes`, OSError for one that cannot be read.
    """
    try:
        if path.stat().st_size > max_bytes:
            raise LohanError(f"it has more than {max_bytes} bytes")
        data = path.read_bytes()
    except FileNotFoundError:
        return None
    with contextlib.suppress(OSError):
        os.utime(path)
    return data


def write_kept(path: Path, data: bytes, max_files: int) -> None:
    """Write a file as a whole, or, where that cannot be, leave it.

    The `max_files` of its folder that were used last stay; what a process left that died while writing
    goes with the others.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, suffix=".part", delete=False) as file:
            file.write(data)
        os.replace(file.name, path)
        used = sorted(path.parent.iterdir(), key=lambda file: file.stat().st_mtime, reverse=True)
    except OSError as error:
        log.info("%s cannot be kept: %s", path, error)
        return
    for old in used[max_files:]:
        with contextlib.suppress(OSError):
            old.unlink()
