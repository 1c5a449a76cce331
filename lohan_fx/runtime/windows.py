"""What data streams through: staging, buffers of gradients and of optimizer state, and their users."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import torch

from lohan_fx.program import Move, Program, Tier

from .activations import Slots
from .buckets import BucketHome
from .device import Arrival, Device
from .gradients import GradPlan
from .inbound import Inbound, Key, Source
from .memory import Arena, Pools, require_fit
from .options import Progress, RuntimeOptions
from .resting import InDram, OnSsd
from .store import BucketStore
from .updates import Updates
from .waits import Waits


class Windows:
    """Everything whose size the options fix, under one placement of the buckets in `store`.

    Raises:
        LohanError: a budget is exceeded, or a bucket is larger than the staging it must pass.
    """

    def __init__(
        self,
        pools: Pools,
        device: Device,
        waits: Waits,
        store: BucketStore,
        options: RuntimeOptions,
        progress: Progress,
    ) -> None:
        self._pools = pools
        self._store = store
        self._arenas: list[Arena] = []
        self._checked: set[int] = set()  # programs whose staging needs fit
        self._grad_plans: dict[int, GradPlan] = {}
        self._inbound_arena = self._arena(options.inbound_bytes, "the inbound staging")
        self._outbound_arena = self._arena(options.outbound_bytes, "the outbound staging")
        self.inbound = Inbound(pools, device, waits, self._inbound_arena)
        self.slots = Slots(pools, device, waits, self._outbound_arena, poison=options.poison)
        self.updates = Updates(pools, device, waits, store, options, progress)
        for home in store.homes.values():
            if home.weight_tier is Tier.SSD:
                name = f"the weights of {home.bucket.name}"
                require_fit(home.bucket.weight_bytes, self._inbound_arena, name, "inbound_bytes")

    def _arena(self, nbytes: int, what: str) -> Arena | None:
        if not nbytes:
            return None
        arena = Arena(self._pools.host_bytes(nbytes, what, pinned=True))
        self._arenas.append(arena)
        return arena

    def check(self, program: Program) -> None:
        """Raise LohanError for an activation larger than the staging it must pass."""
        if program.index in self._checked:
            return
        for slot in program.slots:
            if slot.tier is Tier.SSD:
                name = f"activation {slot.name}"
                require_fit(slot.nbytes, self._inbound_arena, name, "inbound_bytes")
                require_fit(slot.nbytes, self._outbound_arena, name, "outbound_bytes")
        self._checked.add(program.index)

    def grad_plan(self, program: Program) -> GradPlan:
        """What gradients its backward brings."""
        if program.index not in self._grad_plans:
            self._grad_plans[program.index] = GradPlan.of(program, self._store)
        return self._grad_plans[program.index]

    def incoming(self, moves: Iterable[Move]) -> Iterator[tuple[Key, Source]]:
        """What a pass brings to the GPU, in program order."""
        for move in moves:
            if move.op == "fetch":
                home = self._store.homes[move.arg]
                if home.weight_tier is not Tier.GPU:
                    yield ("fetch", move.arg), _BucketSource(home, self.updates)
            elif move.op == "reload":
                yield ("reload", move.arg), self.slots.source(move.arg)

    def pump(self) -> None:
        """Advance everything that can advance without blocking."""
        self.updates.under_way.pump()
        self.slots.pump()
        self.inbound.pump()

    def close(self) -> None:
        """Give everything back; the device is idle, and no job is under way."""
        self.inbound.cancel()
        self.slots.close()
        self.updates.close()
        for arena in self._arenas:
            self._pools.free_host(arena.memory)
        self._arenas.clear()


class _BucketSource:
    """A bucket's weights as seen by the read-ahead. Implements inbound.Source."""

    def __init__(self, home: BucketHome, updates: Updates) -> None:
        self._home = home
        self._updates = updates
        self.name = f"the weights of {home.bucket.name}"
        self.nbytes = home.bucket.weight_bytes

    def is_valid(self) -> bool:
        return self._updates.under_way.is_settled(self._home.bucket.index)

    def make_valid(self) -> None:
        self._updates.under_way.settle(self._home.bucket.index)

    def host(self) -> torch.Tensor | None:
        weight = self._home.weight
        return weight.memory.bytes[: self.nbytes] if isinstance(weight, InDram) else None

    def on_ssd(self) -> tuple[int, int]:
        assert isinstance(self._home.weight, OnSsd)
        return self._home.weight.extent, 0

    def after(self) -> Sequence[Arrival]:
        return self._updates.under_way.stored(self._home.bucket.index)
