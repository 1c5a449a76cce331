"""Bytes in words, both ways. GB is 1e9 bytes, GiB is 2**30."""

from __future__ import annotations

import re

from lohan_fx.errors import LohanError

UNITS = {
    "B": 1,
    "kB": 10**3,
    "KB": 10**3,
    "MB": 10**6,
    "GB": 10**9,
    "TB": 10**12,
    "PB": 10**15,
    "KiB": 2**10,
    "MiB": 2**20,
    "GiB": 2**30,
    "TiB": 2**40,
    "PiB": 2**50,
}
_BY_LOWER = {unit.lower(): scale for unit, scale in UNITS.items()}
_SIZE = re.compile(r"\s*(\d+(?:_\d+)*(?:\.\d*)?|\.\d+)\s*([A-Za-z]*)\s*")


def parse_bytes(text: str | int) -> int:
    """The number of bytes in "24GB", "1.5 GiB", "4096" or 4096.

    Units are read in any case. Raises LohanError for anything else.
    """
    if isinstance(text, bool) or not isinstance(text, str | int):
        raise LohanError(f"{text!r} is not a size; write it like '24GB' or as a number of bytes")
    if isinstance(text, int):
        if text < 0:
            raise LohanError(f"{text} is not a size; a number of bytes is not negative")
        return text
    match = _SIZE.fullmatch(text)
    if match is None:
        raise LohanError(f"{text!r} is not a size; write it like '24GB' or '22GiB'")
    number, unit = match.groups()
    scale = _BY_LOWER.get(unit.lower() or "b")
    if scale is None:
        raise LohanError(f"{text!r} has an unknown unit {unit!r}; known are {', '.join(UNITS)}")
    whole, _, fraction = number.replace("_", "").partition(".")
    # Exact for any number of digits: floats round above 2**53.
    digits = int((whole or "0") + fraction)
    return digits * scale // int(10 ** len(fraction))


def format_bytes(num_bytes: int) -> str:
    """`num_bytes` with three or more digits and a decimal unit: "23.6 GB", "512 B"."""
    size = abs(num_bytes)
    sign = "-" if num_bytes < 0 else ""
    for unit in ("PB", "TB", "GB", "MB", "kB"):
        scale = UNITS[unit]
        # 999.95 of a unit would print as 1000.0; the next larger unit takes over just below that.
        if size >= scale - scale // 20_000:
            return f"{sign}{size / scale:.1f} {unit}"
    return f"{sign}{size} B"
