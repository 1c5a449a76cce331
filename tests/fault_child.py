"""A training run of its own process, for test_faults.py: `python fault_child.py MODE FOLDER STEPS`, or
`forked` in a process that has imported this.

MODE
  whole    trains STEPS steps from the checkpoint, if there is one, saving after every second
  killed   the same, but kills itself in the middle of a backward of the step after STEPS
  forever  trains until it is interrupted, closes its model, and says what it still holds
Prints one line of JSON at the end.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
from pathlib import Path
from typing import Any

from loops import Tiny, compiled, step, tokens
from training import RandomPolicy

import lohan_fx
from lohan_fx.runtime.passes import Passes

GRADIENTS_BEFORE_THE_END = 7


def kill_in_backward() -> None:
    grad, seen = Passes.grad, []

    def deadly(self: Passes, *args: Any) -> Any:
        seen.append(1)
        if len(seen) > GRADIENTS_BEFORE_THE_END:
            os.kill(os.getpid(), signal.SIGKILL)
        return grad(self, *args)

    Passes.grad = deadly  # type: ignore[method-assign]


def held(folder: Path) -> dict[str, Any]:
    status = Path("/proc/self/status").read_text()
    kib = {
        line.split(":")[0]: int(line.split()[1]) for line in status.splitlines() if " kB" in line
    }
    links = [
        os.readlink(f"/proc/self/fd/{fd}") for fd in os.listdir("/proc/self/fd") if _is_link(fd)
    ]
    return {
        "files": sorted(path.name for path in folder.iterdir()),
        "descriptors": [link for link in links if str(folder) in link or "io_uring" in link],
        "locked_kib": kib.get("VmLck", 0) + kib.get("VmPin", 0),
        "threads": sorted({t.name for t in threading.enumerate()} - {"tqdm_monitor"}),
    }


def _is_link(fd: str) -> bool:
    try:
        os.readlink(f"/proc/self/fd/{fd}")
    except OSError:
        return False
    return True


def forked(mode: str, folder: Path, steps: int) -> None:
    """The same as main(), printing into files `out` and `err` of FOLDER."""
    for number, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(folder / name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), number)
    run(mode, folder, steps)
    sys.stdout.flush()


def main() -> None:
    signal.signal(signal.SIGINT, signal.default_int_handler)  # what is started with & ignores it
    run(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]))


def run(mode: str, folder: Path, steps: int) -> None:
    disk, checkpoint = folder / "disk", folder / "checkpoint"
    model = compiled(Tiny(dropout=0.1), disk, policy=RandomPolicy(3))
    optimizer = lohan_fx.AdamW(model.parameters(), lr=3e-3)
    first = 0
    if checkpoint.exists():
        first = lohan_fx.load(model, optimizer, checkpoint).step
    if mode == "forever":
        try:
            index = 0
            while True:
                step(model, optimizer, tokens(index))
                index += 1
                if index == steps:
                    print("running", flush=True)
        except KeyboardInterrupt:
            model.close()
            print(json.dumps(held(disk)), flush=True)
            raise
    losses = []
    for index in range(first, steps + (mode == "killed")):
        if index == steps:
            kill_in_backward()
        losses.append(step(model, optimizer, tokens(index)))
        if (index + 1) % 2 == 0:
            lohan_fx.save(model, optimizer, checkpoint)
    masters = [state["master"].tolist() for state in optimizer.state_dict()["state"].values()]
    print(json.dumps({"first": first, "losses": losses, "masters": masters}), flush=True)
    model.close()


if __name__ == "__main__":
    main()
