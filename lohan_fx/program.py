"""What the compiler hands to the runtime: buckets, activation slots and the order of moves.

Torch-free on purpose: dtypes are their names ("bfloat16"), shapes are tuples of ints.

Glossary
  bucket   parameters of one stage that move together: one contiguous buffer in every tier
  slot     one swapped activation: written once in forward, read once in backward
  program  one captured (forward, backward) pair, or a forward alone, for one set of input shapes
"""

from __future__ import annotations

import enum
from dataclasses import dataclass


class Tier(enum.StrEnum):
    """Where bytes live between uses."""

    GPU = "gpu"
    DRAM = "dram"
    SSD = "ssd"


DTYPE_BYTES = {
    "float64": 8,
    "float32": 4,
    "bfloat16": 2,
    "float16": 2,
    "int64": 8,
    "int32": 4,
    "int16": 2,
    "int8": 1,
    "uint8": 1,
    "bool": 1,
    "complex64": 8,
}

# Parameters start at multiples of this many elements in their bucket, so that every value the GPU
# reads is 512-byte aligned in 16 and in 32 bit, and every array is a whole number of SIMD vectors.
PARAM_ALIGN = 256


@dataclass(frozen=True, slots=True)
class ParamSpec:
    """One parameter inside a bucket. `offset` and `numel` count elements."""

    pid: int
    name: str
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int
    numel: int
    trainable: bool


@dataclass(frozen=True, slots=True)
class Bucket:
    """Parameters that move together. All trainable, or all frozen; one compute dtype.

    `numel` counts elements including the padding between parameters.
    """

    index: int
    name: str
    dtype: str
    params: tuple[ParamSpec, ...]
    numel: int
    trainable: bool

    @property
    def weight_bytes(self) -> int:
        return self.numel * DTYPE_BYTES[self.dtype]

    @property
    def has_master(self) -> bool:
        """False for fp32 compute: the weight itself is the master."""
        return self.trainable and self.dtype != "float32"

    @property
    def state_bytes(self) -> int:
        """Bytes of master (if separate) and both moments, fp32."""
        if not self.trainable:
            return 0
        return self.numel * (12 if self.has_master else 8)


@dataclass(frozen=True, slots=True)
class BucketPlacement:
    """Tiers of one bucket's weights (compute dtype) and of its optimizer state.

    A state on the GPU is updated there and needs its weight there; any other is updated by the CPU,
    unless it is `streamed`: then it rests in DRAM, and is copied to the GPU and back for each update.
    """

    weight: Tier
    state: Tier
    streamed: bool = False

    @property
    def by_gpu(self) -> bool:
        """True if the GPU makes the bucket's updates, False if the CPU does."""
        return self.state is Tier.GPU or self.streamed


@dataclass(frozen=True, slots=True)
class Slot:
    """One swapped activation. `nbytes` covers shape and stride; tier is DRAM or SSD."""

    index: int
    name: str
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: str
    nbytes: int
    tier: Tier


@dataclass(frozen=True, slots=True)
class Move:
    """One lohan op in program order: its name in ops.py and the bucket, slot or pid it moves."""

    op: str
    arg: int


@dataclass(frozen=True, slots=True)
class Names:
    """What the items of a program's plan are called, by index.

    `slots` has the activation that each slot holds, `slot_names` what the slots are called; `params`
    are by pid.
    """

    stages: tuple[str, ...] = ()
    buckets: tuple[str, ...] = ()
    activations: tuple[str, ...] = ()
    slots: tuple[int, ...] = ()
    slot_names: tuple[str, ...] = ()
    params: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Program:
    """The moves of one captured step, in program order.

    `backward` is empty where `training` is False (a forward alone). Every bucket that a pass reads
    has exactly one fetch, wait and release in that pass, in this order; a GPU-resident one too.
    """

    index: int
    training: bool
    slots: tuple[Slot, ...]
    forward: tuple[Move, ...]
    backward: tuple[Move, ...]
