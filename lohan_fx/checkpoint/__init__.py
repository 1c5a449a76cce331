"""Checkpoints, and weights from files: streamed, checked, replaced as a whole.

saving      tiers -> directory
snapshot    the state of one moment, while training goes on
weights     weights= of compile
loading     directory -> tiers
inventory   which tensors, under which names
shards      safetensors files, piece by piece
directory   putting a new directory in place of the old one
manifest    lohan_fx.json
"""

from __future__ import annotations

from .loading import Loaded, load
from .saving import Saving, save

__all__ = ["Loaded", "Saving", "load", "save"]
