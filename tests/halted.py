"""A first placing that an error meets while it is under way, or when it is complete."""

from __future__ import annotations

import threading
from typing import Any

import pytest

from lohan_fx.placing import Placing
from lohan_fx.runtime.store import BucketStore


class HaltedPlacing:
    """While patched in: "under way", placing halts after its first bucket until it is cancelled."""

    def __init__(self, patch: pytest.MonkeyPatch, when: str) -> None:
        self._when = when
        begun, go_on = threading.Event(), threading.Event()
        adopt, cancel = BucketStore._adopt, Placing.cancel

        def halting(store: BucketStore, *args: Any) -> None:
            *rest, progress = args

            def after_a_bucket(nbytes: int) -> None:
                begun.set()
                assert when == "complete" or go_on.wait(30)
                progress(nbytes)

            adopt(store, *rest, after_a_bucket)

        def cancelling(placing: Placing) -> bool:
            threading.Timer(0.05, go_on.set).start()
            return cancel(placing)

        patch.setattr(BucketStore, "_adopt", halting)
        patch.setattr(Placing, "cancel", cancelling)
        self._begun = begun

    def reached(self, model: Any) -> None:
        """Wait until the placing of the model is as it is to be met."""
        assert self._begun.wait(30)
        if self._when == "complete":
            model._lohan.state._placing[0].wait()
