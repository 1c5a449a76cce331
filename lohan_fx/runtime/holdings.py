"""What the accounts of the three tiers hold, by the classes of memory that plans count."""

from __future__ import annotations

import torch

from lohan_fx.planner.simulate import MEMORY_CLASSES
from lohan_fx.program import Tier

from .activations import Slots
from .buckets import state_section_bytes
from .inbound import Inbound
from .memory import PAGE, Pools, pages
from .store import BucketStore
from .updates import Updates

Row = tuple[int, ...]  # bytes by class, in the order of MEMORY_CLASSES


class Holdings:
    """Reads off what is held now. Placements are looked at once: make another one when they change."""

    def __init__(
        self, pools: Pools, store: BucketStore, inbound: Inbound, slots: Slots, updates: Updates
    ) -> None:
        self._pools = pools
        self._inbound = inbound
        self._slots = slots
        self._updates = updates
        self._at_rest = {tier: _at_rest(store, tier) for tier in Tier}

    def resting(self) -> tuple[tuple[str, Row], ...]:
        """DRAM and SSD, which do not change within a step."""
        dram, ssd = dict(self._at_rest[Tier.DRAM]), dict(self._at_rest[Tier.SSD])
        dram["activations"] = self._slots.dram_bytes
        dram["gradients"] += self._updates.buffer_bytes
        dram["buffers"] = self._pools.dram.current_bytes - sum(dram.values())
        ssd["activations"] = self._pools.ssd.current_bytes - sum(ssd.values())
        return ("dram", _row(dram)), ("ssd", _row(ssd))

    def gpu(self, unaccounted: int) -> Row:
        """Activations are those on their way back, and what else is allocated: `unaccounted` bytes."""
        held = dict(self._at_rest[Tier.GPU])
        held["weights"] += self._inbound.held_bytes("fetch")
        held["activations"] = self._inbound.held_bytes("reload")
        held["buffers"] = self._updates.ring_bytes
        held["gradients"] = self._pools.gpu.current_bytes - sum(held.values())
        held["activations"] += unaccounted
        return _row(held)

    def unaccounted(self) -> int:
        """Bytes of torch's allocator that the account knows nothing of; 0 on the CPU."""
        device = self._pools.device.device
        if device.type != "cuda":
            return 0
        stats = torch.cuda.memory_stats_as_nested_dict(device)
        allocated = int(stats["allocated_bytes"]["all"]["current"])
        return max(0, allocated - self._pools.gpu.current_bytes)


def _at_rest(store: BucketStore, tier: Tier) -> dict[str, int]:
    """Weights, optimizer state and sums of gradients that a tier holds between steps."""
    held = {"weights": 0, "optimizer": 0, "gradients": 0}

    def size(nbytes: int) -> int:
        return nbytes if tier is Tier.GPU else max(pages(nbytes), PAGE)

    for home in store.homes.values():
        bucket = home.bucket
        if home.weight_tier is tier:
            held["weights"] += size(bucket.weight_bytes)
        if home.state_tier is tier:
            sections = 3 if bucket.has_master else 2
            held["optimizer"] += size(state_section_bytes(bucket) * sections)
        if home.spare is not None and tier is Tier.DRAM:
            held["optimizer"] += home.spare.weight.memory.nbytes + home.spare.state.memory.nbytes
        if home.accum is not None and home.accum.tier is tier:
            held["gradients"] += size(4 * bucket.numel)
    # On the GPU the sums are part of what is left over once the rest is counted.
    if tier is Tier.GPU:
        del held["gradients"]
    return held


def _row(held: dict[str, int]) -> Row:
    return tuple(held.get(cls, 0) for cls in MEMORY_CLASSES)
