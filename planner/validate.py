"""An independent checker: everything wrong with a solution, in words.

Slow and obvious on purpose. It shares no code with the cost model or any solver: memory is counted
position by position, item by item, from the meaning of a plan, so that an error there is not
believed here too.
"""

from __future__ import annotations

from lohan_fx.planner.problem import Bucket, BucketPlace, Overlap, Place, Problem
from lohan_fx.planner.solution import Solution, Windows

# Predicted seconds may differ by rounding; bytes may not.
_CLOSE = 1e-6
# Modes in which gradients are kept until step() has decided.
_WAITING = (Overlap.NEXT_FORWARD, Overlap.SERIAL, Overlap.SPECULATIVE)


def validate(problem: Problem, solution: Solution) -> list[str]:
    """Everything wrong with `solution` as an answer to `problem`; empty means sound."""
    found = _shape(problem, solution)
    if found:
        return found
    found += _places(problem, solution)
    found += _windows(problem, solution)
    if found:
        return found
    found += _gpu(problem, solution)
    found += _dram(problem, solution)
    found += _ssd(problem, solution)
    found += _time(problem, solution)
    return found


def _shape(problem: Problem, solution: Solution) -> list[str]:
    found = []
    if len(solution.buckets) != len(problem.buckets):
        found.append(f"{len(solution.buckets)} places for {len(problem.buckets)} buckets")
    if len(solution.activations) != len(problem.activations):
        found.append(
            f"{len(solution.activations)} places for {len(problem.activations)} activations"
        )
    return found


def _places(problem: Problem, solution: Solution) -> list[str]:
    """Every item is where an item of its sort may be."""
    gpu, dram, ssd = Place.GPU, Place.DRAM, Place.SSD
    found = []
    for bucket, place in zip(problem.buckets, solution.buckets, strict=True):
        if place.weight not in (gpu, dram, ssd) or place.state not in (gpu, dram, ssd):
            found.append(f"bucket {bucket.name!r}: {place} is not a pair of tiers")
        elif bucket.grad_stage is None and place.weight != place.state:
            found.append(f"bucket {bucket.name!r} is frozen, yet its state is apart: {place}")
        elif place.state == gpu and place.weight != gpu:
            found.append(f"bucket {bucket.name!r}: state on the GPU without its weights ({place})")
        elif (
            bucket.grad_stage is not None
            and not bucket.has_master
            and place.weight == gpu
            and place.state != gpu
        ):
            found.append(f"bucket {bucket.name!r}: the CPU would update a weight on the GPU")
        if place.streamed and (
            bucket.grad_stage is None
            or not bucket.has_master
            or place.state != dram
            or place.weight not in (gpu, dram)
            or problem.accumulates
            or problem.overlap == Overlap.NAIVE
        ):
            found.append(
                f"bucket {bucket.name!r}: its state cannot be updated on the GPU ({place})"
            )
    for activation, kept in zip(problem.activations, solution.activations, strict=True):
        if kept in (dram, ssd) and not activation.can_swap:
            found.append(f"activation {activation.name!r} is swapped and cannot be")
        if kept == Place.RECOMPUTE and not activation.can_recompute:
            found.append(f"activation {activation.name!r} is recomputed and cannot be")
    return found


def _fetched(problem: Problem, solution: Solution) -> list[Bucket]:
    return [
        bucket
        for bucket, place in zip(problem.buckets, solution.buckets, strict=True)
        if place.weight != Place.GPU
    ]


def _cpu_updated(problem: Problem, solution: Solution) -> list[tuple[Bucket, BucketPlace]]:
    return [
        (bucket, place)
        for bucket, place in zip(problem.buckets, solution.buckets, strict=True)
        if bucket.grad_stage is not None and place.state != Place.GPU and not place.streamed
    ]


def _copied_states(problem: Problem, solution: Solution) -> list[tuple[Bucket, BucketPlace]]:
    """Buckets whose state rests in DRAM and is updated on the GPU."""
    return [
        (bucket, place)
        for bucket, place in zip(problem.buckets, solution.buckets, strict=True)
        if place.streamed
    ]


def _pages(num_bytes: int) -> int:
    """Bytes of whole 4096-byte pages."""
    return (num_bytes + 4095) // 4096 * 4096


def _blocks(num_bytes: int) -> int:
    """Bytes of whole 512-byte allocator blocks."""
    return (num_bytes + 511) // 512 * 512


def _state_sections(bucket: Bucket) -> int:
    """Bytes of a state, each of its arrays in whole pages."""
    arrays = 3 if bucket.has_master else 2
    return sum(_pages((bucket.state_bytes + arrays - 1) // arrays) for _ in range(arrays))


def _through_buffers(bucket: Bucket, place: BucketPlace) -> int:
    """Bytes of fp32 arrays on SSD that one update reads: state, and a weight that is the master."""
    used = _state_sections(bucket) if place.state == Place.SSD else 0
    if place.weight == Place.SSD and not bucket.has_master:
        used += _pages(bucket.weight_bytes)
    return used


def _windows(problem: Problem, solution: Solution) -> list[str]:
    """Buffers are there for what is placed, and at least as many as the schedule needs."""
    windows: Windows = solution.windows
    found = []
    updated = _cpu_updated(problem, solution)
    largest_grad = max((b.grad_bytes for b, _ in updated), default=0)
    if windows.grad_window_bytes < largest_grad:
        found.append(
            f"a gradient of {largest_grad} bytes does not fit the grad window of "
            f"{windows.grad_window_bytes}"
        )
    if updated and windows.grad_buffers < 2:
        found.append(f"{windows.grad_buffers} grad buffers; 2 are needed")
    for stage in range(len(problem.stages)):
        gathering = 0
        for bucket, _ in updated:
            final = -1 if bucket.grad_stage is None else bucket.grad_stage
            read = [*bucket.backward_stages, final]
            gathering += max([*bucket.forward_stages, *read]) >= stage >= min(read)
        if gathering > windows.grad_buffers and problem.overlap in (
            Overlap.BACKWARD,
            Overlap.NAIVE,
        ):
            found.append(
                f"{gathering} buckets gather gradients in stage {stage}, with "
                f"{windows.grad_buffers} grad buffers"
            )
    nowhere = [at for at in windows.closed if not 0 <= at < 2 * len(problem.stages)]
    if nowhere:
        found.append(f"windows are closed at {nowhere[0]}, which is no position of a stage")
    if any(_through_buffers(b, p) for b, p in updated) and windows.state_buffers < 2:
        found.append(f"{windows.state_buffers} state buffers; 2 are needed")
    largest = max((b.numel for b, _ in _copied_states(problem, solution)), default=0)
    # Three pieces of master and two moments in fp32; a piece has 4 Mi elements, or the largest has fewer.
    ring = 3 * 3 * 4 * min(largest, 4 * 1024 * 1024)
    if windows.stream_bytes < ring:
        found.append(
            f"{windows.stream_bytes} bytes for states on their way through the GPU; {ring} are needed"
        )
    slots = [
        _pages(a.bytes)
        for a, place in zip(problem.activations, solution.activations, strict=True)
        if place == Place.SSD
    ]
    weights_in = [
        _pages(b.weight_bytes)
        for b, place in zip(problem.buckets, solution.buckets, strict=True)
        if place.weight == Place.SSD
    ]
    for arena, have, need in (
        ("inbound", windows.inbound_bytes, 2 * max(slots + weights_in, default=0)),
        ("outbound", windows.outbound_bytes, 2 * max(slots, default=0)),
    ):
        if have < need:
            found.append(f"the {arena} arena has {have} bytes; twice the largest item is {need}")
    return found


def _backward_uses(problem: Problem, solution: Solution) -> list[list[int]]:
    """For each activation, the backward stages at which it is read, by the backward itself or to
    recompute another that is read there."""
    uses = [[a.first_backward_stage, a.last_backward_stage] for a in problem.activations]
    changed = True
    while changed:
        changed = False
        for activation, place in zip(problem.activations, solution.activations, strict=True):
            if place != Place.RECOMPUTE:
                continue
            made_at = max(uses[activation.index])
            for need in activation.needs:
                if made_at not in uses[need]:
                    uses[need].append(made_at)
                    changed = True
    # A value recomputed later than first thought leaves no trace: uses only grow earlier in time.
    return uses


def _gpu(problem: Problem, solution: Solution) -> list[str]:
    """At every position, what is on the GPU fits, and is no more than was predicted."""
    num_stages = len(problem.stages)
    windows = solution.windows
    uses = _backward_uses(problem, solution)
    waits = problem.overlap in _WAITING
    fetched = _fetched(problem, solution)
    any_gpu_state = any(
        b.grad_stage is not None and p.state == Place.GPU
        for b, p in zip(problem.buckets, solution.buckets, strict=True)
    )
    copied = _copied_states(problem, solution)
    found = []
    worst = 0
    for position in range(2 * num_stages + 1):
        forward = position < num_stages
        backward = num_stages <= position < 2 * num_stages
        stage = position if forward else 2 * num_stages - 1 - position
        live = problem.fixed_gpu_bytes + windows.stream_bytes
        if copied:
            live += problem.gpu_adam_workspace_bytes
        for bucket, _ in copied:
            made = max([bucket.grad_stage or 0, *bucket.forward_stages, *bucket.backward_stages])
            held = not forward and stage <= made
            # The update may last until the next reader, in the forward if there is one.
            if bucket.forward_stages:
                held |= forward and position <= min(bucket.forward_stages)
            elif bucket.backward_stages:
                held |= forward or stage >= max(bucket.backward_stages)
            else:
                held = True
            live += _blocks(bucket.grad_bytes) * held
        if forward:
            live += problem.stages[stage].forward_workspace_bytes
        if backward:
            live += problem.stages[stage].backward_workspace_bytes
            live += windows.grad_window_bytes
        for bucket, place in zip(problem.buckets, solution.buckets, strict=True):
            if place.weight == Place.GPU:
                live += _blocks(bucket.weight_bytes)
            else:
                readers = bucket.forward_stages if forward else bucket.backward_stages
                if position < 2 * num_stages and readers:
                    live += _blocks(bucket.weight_bytes) * (readers[0] <= stage <= readers[-1])
            if bucket.grad_stage is None or place.state != Place.GPU:
                continue
            live += _state_sections(bucket)
            live += _pages(4 * bucket.numel) * problem.accumulates
            earliest = max([bucket.grad_stage, *bucket.forward_stages, *bucket.backward_stages])
            latest = min([bucket.grad_stage, *bucket.backward_stages])
            if not forward and stage <= earliest and (waits or stage >= latest):
                live += _blocks(bucket.grad_bytes)
        leaving = arriving = 0
        for activation, kept in zip(problem.activations, solution.activations, strict=True):
            size = _blocks(activation.bytes)
            first, last = max(uses[activation.index]), min(uses[activation.index])
            if kept == Place.GPU:
                if forward:
                    live += size * (stage >= activation.forward_stage)
                elif backward:
                    live += size * (stage >= last)
                continue
            if forward:
                live += size * (activation.forward_stage <= stage <= activation.last_forward_stage)
            elif backward:
                live += size * (first >= stage >= last)
            if kept in (Place.DRAM, Place.SSD):
                leaving += size * (forward and activation.last_forward_stage < stage)
                arriving += size * (backward and first < stage)
        live += min(leaving, windows.offload_window_bytes)
        open_here = position not in windows.closed
        live += min(arriving, windows.reload_window_bytes) * open_here
        ahead = 0
        for bucket in fetched:
            if forward and bucket.forward_stages:
                ahead += _blocks(bucket.weight_bytes) * (bucket.forward_stages[0] > stage)
            if backward and bucket.backward_stages:
                ahead += _blocks(bucket.weight_bytes) * (bucket.backward_stages[-1] < stage)
        live += min(ahead, windows.fetch_window_bytes) * open_here
        if any_gpu_state and not copied and (position == 2 * num_stages if waits else backward):
            live += problem.gpu_adam_workspace_bytes
        worst = max(worst, live)
        with_margin = live + problem.gpu_margin_bytes
        if with_margin > problem.capacities.gpu_bytes:
            found.append(
                f"position {position}: {with_margin} bytes on a GPU of "
                f"{problem.capacities.gpu_bytes}"
            )
    if worst > solution.predicted.peak_bytes["gpu"]:
        found.append(
            f"the GPU peak is {worst} bytes, predicted {solution.predicted.peak_bytes['gpu']}"
        )
    return found


def _dram(problem: Problem, solution: Solution) -> list[str]:
    """Everything ever allocated in DRAM fits at once."""
    windows = solution.windows
    updated = _cpu_updated(problem, solution)
    used = windows.inbound_bytes + windows.outbound_bytes
    for bucket, place in zip(problem.buckets, solution.buckets, strict=True):
        used += _pages(bucket.weight_bytes) * (place.weight == Place.DRAM)
        if bucket.grad_stage is not None and place.state == Place.DRAM:
            used += _state_sections(bucket)
    slots = [
        _blocks(a.bytes)
        for a, kept in zip(problem.activations, solution.activations, strict=True)
        if kept == Place.DRAM
    ]
    used += _pages(sum(slots))
    if problem.accumulates:
        used += sum(_pages(4 * bucket.numel) for bucket, _ in updated)
    if problem.overlap == Overlap.SPECULATIVE:
        # New values are written beside the old ones where an update touches no SSD.
        for bucket, place in updated:
            chosen = problem.speculating is None or bucket.index in problem.speculating
            if chosen and Place.SSD not in (place.weight, place.state):
                used += _pages(bucket.weight_bytes) + _state_sections(bucket)
    gradients = [_pages(b.grad_bytes) for b, _ in updated]
    if problem.overlap in _WAITING:
        used += sum(gradients)
    else:
        used += windows.grad_buffers * max(gradients, default=0)
    passing = [_through_buffers(b, p) for b, p in updated]
    used += windows.state_buffers * max(passing, default=0)
    if solution.predicted.peak_bytes["ssd"]:
        used += problem.ssd_bounce_bytes
    return _tier("dram", used, problem.capacities.dram_bytes, solution)


def _ssd(problem: Problem, solution: Solution) -> list[str]:
    """Everything that has a place on SSD fits at once."""
    used = 0
    for bucket, place in zip(problem.buckets, solution.buckets, strict=True):
        used += _pages(bucket.weight_bytes) * (place.weight == Place.SSD)
        if bucket.grad_stage is not None and place.state == Place.SSD:
            used += _state_sections(bucket)
    for activation, kept in zip(problem.activations, solution.activations, strict=True):
        used += _pages(activation.bytes) * (kept == Place.SSD)
    return _tier("ssd", used, problem.capacities.ssd_bytes, solution)


def _tier(tier: str, used: int, capacity: int, solution: Solution) -> list[str]:
    found = []
    if used > capacity:
        found.append(f"{used} bytes in a {tier} of {capacity}")
    if used != solution.predicted.peak_bytes[tier]:
        predicted = solution.predicted.peak_bytes[tier]
        found.append(f"the {tier} peak is {used} bytes, predicted {predicted}")
    return found


def _time(problem: Problem, solution: Solution) -> list[str]:
    """The predicted step is no shorter than any lane needs for its bytes, and it adds up."""
    lanes, predicted = problem.lanes, solution.predicted
    gpu_s = sum(s.forward_s + s.backward_s for s in problem.stages)
    h2d = d2h = read = written = params = 0
    for bucket, place in zip(problem.buckets, solution.buckets, strict=True):
        fetches = bool(bucket.forward_stages) + bool(bucket.backward_stages)
        if place.weight != Place.GPU:
            h2d += fetches * bucket.weight_bytes
        if place.weight == Place.SSD:
            read += fetches * _pages(bucket.weight_bytes)
    for bucket, place in _cpu_updated(problem, solution):
        d2h += bucket.grad_bytes
        params += bucket.numel
        if place.weight == Place.GPU:
            h2d += bucket.weight_bytes
        if place.weight == Place.SSD:
            written += _pages(bucket.weight_bytes)
            read += 0 if bucket.has_master else _pages(bucket.weight_bytes)
        if place.state == Place.SSD:
            read += _state_sections(bucket)
            written += _state_sections(bucket)
    for bucket, place in _copied_states(problem, solution):
        h2d += bucket.state_bytes
        d2h += bucket.state_bytes
        if place.weight == Place.DRAM:
            d2h += bucket.weight_bytes
    for activation, kept in zip(problem.activations, solution.activations, strict=True):
        if kept == Place.RECOMPUTE:
            gpu_s += activation.recompute_s
        elif kept != Place.GPU:
            d2h += activation.bytes
            h2d += activation.bytes
        if kept == Place.SSD:
            written += _pages(activation.bytes)
            read += _pages(activation.bytes)
    found = []
    if written != predicted.ssd_bytes_written_per_step:
        found.append(
            f"{written} bytes written to SSD a step, predicted "
            f"{predicted.ssd_bytes_written_per_step}"
        )
    bound = problem.max_ssd_bytes_per_day
    a_day = written * 86400
    if bound is not None and a_day > bound * predicted.step_s * (1 + _CLOSE):
        found.append(
            f"{written} bytes written to SSD every {predicted.step_s} s; the bound is {bound} a day"
        )
    needs = {"gpu": gpu_s}
    for lane, amount, rate in (
        ("h2d", h2d, lanes.h2d_bytes_per_s),
        ("d2h", d2h, lanes.d2h_bytes_per_s),
        ("ssd_read", read, lanes.ssd_read_bytes_per_s),
        ("ssd_write", written, lanes.ssd_write_bytes_per_s),
        ("cpu_adam", params, lanes.cpu_adam_params_per_s),
    ):
        if amount and not rate > 0:
            found.append(f"{amount} over lane {lane}, which does not exist")
        needs[lane] = amount / rate if amount and rate > 0 else 0.0
    if lanes.ssd_simplex:
        needs["ssd"] = needs["ssd_read"] + needs["ssd_write"]
    for lane, seconds in needs.items():
        if predicted.step_s < seconds * (1 - _CLOSE):
            found.append(f"a step of {predicted.step_s} s is shorter than lane {lane}: {seconds} s")
    parts = predicted.forward_s + predicted.backward_s + predicted.update_s
    if abs(parts - predicted.step_s) > _CLOSE * max(parts, predicted.step_s):
        found.append(f"forward, backward and update add up to {parts} s, not {predicted.step_s} s")
    if predicted.bound_s > predicted.step_s * (1 + _CLOSE):
        found.append(f"the bound of {predicted.bound_s} s is above the step")
    return found
