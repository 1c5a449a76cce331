"""Solutions kept on disk, so that the same step under the same budget is planned once.

A file holds one solution as JSON. Its name is a digest of all that a solver sees (the problem with its
capacities and seconds, the policy, what is forced) and of the planner's own source, so it can be out of
date in nothing. What is read is data, and checked as any solution is.

[Note: an unused SSD] How much of a disk is free changes all the time. A solution that leaves it empty is
found again as long as there is about as much: it was the best with the disk, and still is.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import json
import logging
import time
from pathlib import Path

from lohan_fx import planner
from lohan_fx.errors import LohanError
from lohan_fx.hardware import cache_dir
from lohan_fx.kept import read_kept, write_kept
from lohan_fx.planner import Forced, Problem, Solution, solve, validate

log = logging.getLogger(__name__)

MAX_FILES = 64
MAX_BYTES = 64 << 20  # of one file; that of gpt-175b has 0.5 MB
# A solution that was found sooner is not worth a file.
WORTH_S = 0.5


def solved(problem: Problem, policy: str, forced: Forced) -> Solution:
    """As planner.solve, unless the same was solved before. Raises what that raises."""
    folder, asked = cache_dir() / "solutions", (policy, forced)
    exact = folder / f"{_digest(problem, *asked)}.json"
    # See [Note: an unused SSD].
    about = dataclasses.replace(
        problem.capacities, ssd_bytes=(1 << problem.capacities.ssd_bytes.bit_length()) - 1
    )
    without_ssd = folder / f"{_digest(dataclasses.replace(problem, capacities=about), *asked)}.json"
    for path in (without_ssd, exact):
        known = _read(path, problem)
        if known is not None:
            return known
    began = time.perf_counter()
    solution = solve(problem, policy=policy, forced=forced)
    spent = time.perf_counter() - began
    log.info("planned in %.1f s: %s, under %s, was not known", spent, exact, problem.capacities)
    if spent >= WORTH_S:
        uses_ssd = solution.predicted.peak_bytes.get("ssd", 0) > 0
        path = exact if uses_ssd else without_ssd
        write_kept(path, solution.to_json().encode(), MAX_FILES)
    return solution


def _digest(problem: Problem, policy: str, forced: Forced) -> str:
    wanted = [
        policy,
        sorted((index, str(place)) for index, place in forced.buckets.items()),
        sorted((index, str(place)) for index, place in forced.activations.items()),
    ]
    text = "\n".join((planner_digest(), json.dumps(wanted), problem.to_json()))
    return hashlib.sha256(text.encode()).hexdigest()


@functools.cache
def planner_digest() -> str:
    """Of the planner's source: another version may plan otherwise."""
    digest = hashlib.sha256()
    for path in sorted(Path(planner.__file__).parent.glob("*.py")):
        digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()


def _read(path: Path, problem: Problem) -> Solution | None:
    try:
        data = read_kept(path, MAX_BYTES)
        if data is None:
            return None
        solution = Solution.from_json(data.decode())
        faults = validate(problem, solution)
        if faults:
            raise LohanError(f"it breaks a rule: {faults[0]}")
    except Exception as error:  # whatever is in the file must not end a run
        log.warning("%s is not used, the step is planned anew: %s", path, error)
        with contextlib.suppress(OSError):
            path.unlink()
        return None
    return solution
