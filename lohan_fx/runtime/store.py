"""All buckets of one model: placed, migrated and given back together."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, MutableMapping, Sequence, Set

import torch

from lohan_fx.errors import LohanError
from lohan_fx.piecewise import Value
from lohan_fx.program import Bucket, BucketPlacement, ParamSpec, Tier

from .buckets import BucketHome
from .layout import check_dense
from .memory import Pools


class BucketStore:
    """All buckets of one model, by index, and their parameters by pid."""

    def __init__(self, pools: Pools) -> None:
        self._pools = pools
        self.homes: dict[int, BucketHome] = {}
        self._where: dict[int, tuple[int, ParamSpec]] = {}
        # What was placed, until it is settled, or its dtype where it can be had from the bucket.
        self._given: dict[int, Value | torch.dtype] = {}

    def adopt(
        self,
        buckets: Sequence[Bucket],
        values: MutableMapping[int, Value],
        placements: Sequence[BucketPlacement],
        moments: Mapping[int, tuple[Value, Value]],
        unused: Set[int],
        progress: Callable[[int], None],
    ) -> None:
        """Place every bucket and fill it, one at a time, emptying `values` on the way.

        `unused` are parameters in frozen buckets whose values may still be wanted to the last bit.
        `progress` is told the bytes of each bucket placed. On failure the values are back in
        `values`, and nothing is held.
        """
        try:
            self._adopt(buckets, values, placements, moments, unused, progress)
        except BaseException:
            self.give_back(values)
            raise

    def _adopt(
        self,
        buckets: Sequence[Bucket],
        values: MutableMapping[int, Value],
        placements: Sequence[BucketPlacement],
        moments: Mapping[int, tuple[Value, Value]],
        unused: Set[int],
        progress: Callable[[int], None],
    ) -> None:
        for bucket, placement in zip(buckets, placements, strict=True):
            for spec in bucket.params:
                check_dense(spec)
                self._where[spec.pid] = (bucket.index, spec)
            home = BucketHome(self._pools, bucket, placement)
            self.homes[bucket.index] = home
            home.fill(values, moments)
            for spec in bucket.params:
                value = values[spec.pid]
                stays = spec.pid in unused or not isinstance(value, torch.Tensor)
                self._given[spec.pid] = value if stays else value.dtype
                del values[spec.pid]
            progress(bucket.weight_bytes + bucket.state_bytes)
        self._pools.drop_bounce()

    def settle(self) -> None:
        """The values stay; what they came from is let go."""
        self._given.clear()

    def give_back(self, values: MutableMapping[int, Value]) -> None:
        """Undo adopt(), before settle(). One that was interrupted may be called again.

        No value takes more memory than it did, and those that free most DRAM come first.
        """
        for home in sorted(self.homes.values(), key=_dram_bytes, reverse=True):
            section = "master" if home.bucket.trainable else "weight"
            for spec in home.bucket.params:
                if spec.pid in values:
                    continue
                given = self._given[spec.pid]
                if isinstance(given, torch.dtype):
                    loaded = home.load(spec, section)
                    narrower = given.itemsize < loaded.dtype.itemsize  # and was widened exactly
                    values[spec.pid] = loaded.to(given) if narrower else loaded
                else:
                    values[spec.pid] = given
            del self.homes[home.bucket.index]
            home.free()
        self._where.clear()
        self._given.clear()
        self._pools.drop_bounce()

    def migrate(self, placements: Mapping[int, BucketPlacement]) -> None:
        """Move buckets to new tiers, one at a time, in an order that finds room.

        Raises:
            LohanError: what is left cannot move within the budgets; every bucket is whole.
        """
        left = [
            index
            for index, placement in placements.items()
            if self._place(index) != (placement.weight, placement.state, placement.streamed)
        ]
        for index in left:
            self.homes[index].keep_spare(False)
        depth = {Tier.SSD: 0, Tier.DRAM: 1, Tier.GPU: 2}
        left.sort(key=lambda i: depth[placements[i].weight] + depth[placements[i].state])
        while left:
            stuck, refusal = [], None
            for index in left:
                try:
                    self.homes[index].move(placements[index])
                except LohanError as error:
                    stuck.append(index)
                    refusal = error
            if refusal is not None and len(stuck) == len(left):
                raise refusal
            left = stuck
        self._pools.drop_bounce()

    def accumulate(self, on: bool) -> None:
        """Give every trainable bucket an fp32 sum for its gradients, or none.

        Raises:
            LohanError: a budget is exceeded; says by which bucket's.
        """
        for home in self.homes.values():
            home.accumulate(on)

    def drop_spares_but(self, only: frozenset[int] | None) -> None:
        """Take the second copies of all buckets but those with these indices; None stands for all."""
        for index, home in self.homes.items():
            if only is not None and index not in only:
                home.keep_spare(False)

    def keep_spares(self, only: frozenset[int] | None) -> None:
        """Give the buckets with these indices a second copy where they may speculate, and no others.

        None stands for all buckets.

        Raises:
            LohanError: a budget is exceeded; says by which bucket's.
        """
        self.drop_spares_but(only)
        for index, home in self.homes.items():
            if only is None or index in only:
                home.keep_spare(True)

    def _place(self, index: int) -> tuple[Tier, Tier | None, bool]:
        home = self.homes[index]
        return home.weight_tier, home.state_tier, home.streamed

    def find(self, pid: int) -> tuple[BucketHome, ParamSpec]:
        """Raises LohanError for a pid that no bucket holds."""
        if pid not in self._where:
            raise LohanError(f"parameter {pid} is in no bucket of this model")
        index, spec = self._where[pid]
        return self.homes[index], spec

    def bucket_of(self, pid: int) -> int:
        return self._where[pid][0]

    def specs(self) -> Iterable[ParamSpec]:
        return (spec for _, spec in self._where.values())


def _dram_bytes(home: BucketHome) -> int:
    state = home.bucket.state_bytes if home.state_tier is Tier.DRAM else 0
    return state + (home.bucket.weight_bytes if home.weight_tier is Tier.DRAM else 0)
