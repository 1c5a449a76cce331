"""What a speculative update needs of the pipeline: new values in arrays of their own, jobs taken back."""

from __future__ import annotations

import random
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from adam_jobs import STATES, TIMEOUT_S, Bucket, Memory, make_events, run_with_fake_driver, running

from lohan_fx import native
from lohan_fx.errors import TransferError

UNTOUCHED = -7.0


class Spare:
    """Second arrays of a bucket's state."""

    def __init__(self, numel: int) -> None:
        self.memory = {key: Memory(numel, torch.float32) for key in STATES}
        self.clear()

    def clear(self) -> None:
        for memory in self.memory.values():
            memory.tensor.fill_(UNTOUCHED)

    def places(self) -> dict[str, int]:
        return {f"new_{key}": memory.ptr for key, memory in self.memory.items()}

    def is_untouched(self) -> bool:
        return all(bool((memory.tensor == UNTOUCHED).all()) for memory in self.memory.values())

    def check(self, bucket: Bucket) -> None:
        """Segments hold the values of the plain update, gaps what they held before."""
        covered = bucket.covered()
        for key, memory in self.memory.items():
            assert torch.equal(memory.tensor[covered], bucket.plain[key][covered]), key
            assert (memory.tensor[~covered] == UNTOUCHED).all(), key


@pytest.mark.parametrize(
    ("grad_dtype", "out_dtype", "out_in_grad"),
    [
        ("bfloat16", "bfloat16", False),
        ("bfloat16", "bfloat16", True),
        ("float16", "float16", False),
        ("float32", None, False),
        ("bfloat16", None, False),
    ],
)
def test_new_arrays_receive_the_update_and_the_old_ones_stay(
    grad_dtype: str, out_dtype: str | None, out_in_grad: bool
) -> None:
    numel = 150_001  # more than one piece
    bucket = Bucket(
        "apart", numel, grad_dtype=grad_dtype, out_dtype=out_dtype, out_in_grad=out_in_grad
    )
    old = {key: bucket.value(key).clone() for key in STATES}
    spare = Spare(numel)
    bucket.new_gradient()
    bucket.update_plainly(1)
    with running(num_threads=2) as pipeline:
        pipeline.wait(pipeline.submit(bucket.job(1, **spare.places())), TIMEOUT_S)
        assert pipeline.stats()["params"] == int(bucket.covered().sum())
    spare.check(bucket)
    for key in STATES:
        assert torch.equal(bucket.value(key), old[key]), key
    if bucket.out is not None and bucket.plain_out is not None:
        covered = bucket.covered()
        assert torch.equal(bucket.out.tensor[covered], bucket.plain_out[covered])


def test_two_copies_in_turn_follow_torch() -> None:
    numel, segments = 999, [(0, 999, 0)]
    bucket = Bucket("in turn", numel, grad_dtype="float32", out_dtype=None)
    param = torch.nn.Parameter(bucket.value("master").clone())
    reference = torch.optim.AdamW([param], lr=1e-2, weight_decay=0.1, foreach=False)
    sides = [{key: bucket.memory[key] for key in STATES}, Spare(numel).memory]
    for key in ("exp_avg", "exp_avg_sq"):
        sides[0][key].tensor.zero_()
    with running() as pipeline:
        for step in range(1, 31):
            bucket.new_gradient()
            param.grad = bucket.grad.tensor.clone()
            reference.step()
            scalars = native.AdamStep(
                lr=1e-2,
                beta1=0.9,
                beta2=0.999,
                eps=1e-8,
                weight_decay=0.1,
                decoupled=True,
                step=step,
            )
            places = {key: sides[0][key].ptr for key in STATES}
            new = {f"new_{key}": sides[1][key].ptr for key in STATES}
            job = bucket.job(step, segments=segments, groups=[scalars], **places, **new)
            pipeline.wait(pipeline.submit(job), TIMEOUT_S)
            sides.reverse()
    torch.testing.assert_close(sides[0]["master"].tensor, param.detach(), rtol=1e-6, atol=1e-6)
    state = reference.state[param]
    for key in ("exp_avg", "exp_avg_sq"):
        torch.testing.assert_close(sides[0][key].tensor, state[key], rtol=1e-6, atol=1e-6)


def test_the_update_of_sums_may_go_into_new_arrays() -> None:
    bucket = Bucket("sums", 3000, grad_dtype="float32", out_dtype=None)
    bucket.new_gradient()
    bucket.update_plainly(1)
    sums, spare = Memory(3000, torch.float32), Spare(3000)
    sums.tensor.zero_()
    with running() as pipeline:
        job = bucket.job(1, accum=sums.ptr, adds=["set", "add", "set"], **spare.places())
        pipeline.wait(pipeline.submit(job), TIMEOUT_S)
    spare.check(bucket)


REFUSED = {
    "one of three": ({"new_exp_avg": 0}, "no place for the new exp_avg, while others have one"),
    "state on SSD": ({"exp_avg": (1, 0)}, "exp_avg: on SSD; only state in memory"),
    "no update": ({"groups": [], "accum": "sums"}, "no update"),
    "over the old": ({"new_exp_avg_sq": "master"}, "new exp_avg_sq overlap master weights"),
    "over another": ({"new_exp_avg_sq": "new_exp_avg"}, "new exp_avg_sq overlap the new exp_avg"),
    "over the gradient": ({"new_master": "grad"}, "new master weights overlap the gradient"),
    "over the weights": ({"new_exp_avg": "out"}, "new exp_avg overlap 16-bit weights"),
    "over the sums": ({"new_exp_avg": "sums", "accum": "sums"}, "new exp_avg overlap the sums"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_new_arrays_that_make_no_sense_are_refused(
    case: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    engine = native.FileEngine([str(tmp_path)])
    request.addfinalizer(engine.close)
    bucket, spare, sums = Bucket("nonsense", 100), Spare(100), Memory(100, torch.float32)
    assert bucket.out is not None
    known = spare.places() | {"sums": sums.ptr, "grad": bucket.grad.ptr, "out": bucket.out.ptr}
    known["master"] = bucket.memory["master"].ptr + 4 * 99  # by its last element
    changes, message = REFUSED[case]
    fields = spare.places() | {
        key: known[value] if isinstance(value, str) else value for key, value in changes.items()
    }
    with running(engine=engine) as pipeline, pytest.raises(ValueError, match=message):
        pipeline.submit(bucket.job(1, **fields))


def test_jobs_that_are_done_cannot_be_cancelled() -> None:
    bucket = Bucket("done", 1000)
    bucket.new_gradient()
    bucket.update_plainly(1)
    with running() as pipeline:
        ticket = pipeline.submit(bucket.job(1))
        pipeline.wait(ticket, TIMEOUT_S)
        pipeline.cancel(ticket)
        pipeline.wait(ticket, TIMEOUT_S)
        assert pipeline.stats()["jobs"] == 1
        with pytest.raises(ValueError, match=f"ticket {ticket + 1}"):
            pipeline.cancel(ticket + 1)
    bucket.check()


def test_jobs_that_take_a_state_buffer_are_not_cancelled(tmp_path: Path) -> None:
    engine = native.FileEngine([str(tmp_path)], faults={"delay_ms": 50, "on": "read"})
    buckets = [Bucket(name, 1000, engine=engine, on_ssd=STATES) for name in ("read", "queued")]
    size = buckets[0].job(1).buffer_bytes
    with running(engine=engine, num_buffers=1, buffer_bytes=size) as pipeline:
        tickets = []
        for bucket in buckets:
            bucket.new_gradient()
            bucket.update_plainly(1)
            tickets.append(pipeline.submit(bucket.job(1)))
        for ticket in tickets:
            pipeline.cancel(ticket)
            pipeline.wait(ticket, TIMEOUT_S)
        assert pipeline.stats()["jobs"] == 2
    for bucket in buckets:
        bucket.check()


def scenario_waiting_jobs() -> None:
    for mode in ("optimized", "naive"):
        _, (never,) = make_events(1)
        bucket = Bucket("again", 1000)
        bucket.new_gradient()
        bucket.update_plainly(1)
        spares = [Spare(1000) for _ in range(3)]
        jobs = [bucket.job(1, **spare.places(), ready_events=[never]) for spare in spares]
        with running(mode) as pipeline:
            first, second, third = (pipeline.submit(job) for job in jobs)
            last = pipeline.submit(bucket.job(1))
            # The first is asked for its event all the time, the others wait for it.
            pipeline.cancel(second)
            assert pipeline.done(second)
            with pytest.raises(TransferError, match=r"'again' .*waiting for its gradient"):
                pipeline.wait(first, 0.05)
            for ticket in (first, third):
                pipeline.cancel(ticket)
            for ticket in (first, second, third, last):
                pipeline.wait(ticket, TIMEOUT_S)
                pipeline.wait_weights(ticket, TIMEOUT_S)
            pipeline.drain(TIMEOUT_S)
            assert pipeline.stats()["jobs"] == 1
            assert [lane for _, lane, *_ in pipeline.take_trace()] == ["cpu_adam"]
        bucket.check()
        assert all(spare.is_untouched() for spare in spares)


def scenario_failed_event() -> None:
    flags, (event,) = make_events(1)
    bucket = Bucket("lost", 1000)
    with running() as pipeline:
        ticket = pipeline.submit(bucket.job(1, ready_events=[event]))
        pipeline.cancel(ticket)
        flags[0] = 2  # it may be looked at once more
        pipeline.wait(ticket, TIMEOUT_S)
        pipeline.drain(TIMEOUT_S)
    bucket.check()


def scenario_while_events_are_asked_for() -> None:
    dice = random.Random(2)
    rounds = 150
    flags, events = make_events(2 * rounds)
    bucket, other = Bucket("first", 1000), Bucket("second", 1000)
    bucket.new_gradient()
    bucket.update_plainly(1)
    spares = [Spare(1000) for _ in range(rounds)]
    with running() as pipeline:
        for i, spare in enumerate(spares):
            arrives, never = 2 * i, 2 * i + 1
            first = bucket.job(1, **spare.places(), ready_events=[events[arrives]])
            tickets = [
                pipeline.submit(first),
                pipeline.submit(other.job(1, ready_events=[events[never]])),
            ]
            time.sleep(dice.random() * 3e-4)
            # Now the driver is asked for the second one's event, if the first one's has been seen.
            flags[arrives] = 1
            time.sleep(dice.random() * 3e-4)
            for ticket in tickets:
                pipeline.cancel(ticket)
                pipeline.wait(ticket, TIMEOUT_S)
            flags[arrives] = flags[never] = 3  # as if destroyed: nobody may look at them
        pipeline.drain(TIMEOUT_S)
        updated = [spare for spare in spares if not spare.is_untouched()]
        assert pipeline.stats()["jobs"] == len(updated) == len(pipeline.take_trace())
    for spare in updated:
        spare.check(bucket)
    other.check()


def scenario_many_threads() -> None:
    dice = random.Random(1)
    count = 300
    flags, events = make_events(count)
    buckets = [Bucket(f"bucket {i}", 2000, seed=i) for i in range(5)]
    for bucket in buckets:
        bucket.new_gradient()
        bucket.update_plainly(1)
    spares = [Spare(2000) for _ in range(count)]
    with running(num_threads=2) as pipeline:
        tickets = [
            pipeline.submit(
                buckets[i % 5].job(
                    1,
                    **spare.places(),
                    rank=dice.randrange(5),
                    ready_events=[events[i]] if i % 3 else [],
                )
            )
            for i, spare in enumerate(spares)
        ]
        done, setting = [False] * count, threading.Lock()

        def arrive() -> None:
            for i in range(count):
                if i % 10 == 9:
                    time.sleep(0.002)
                with setting:
                    if not done[i]:
                        flags[i] = 1

        def cancel(mine: list[int]) -> None:
            for i in mine:
                pipeline.cancel(tickets[i])
                pipeline.wait(tickets[i], TIMEOUT_S)
                with setting:
                    done[i] = True
                    flags[i] = 3  # as if destroyed: nobody may look at it

        cancel([count - 1])  # before its event
        # Mostly in order, so that jobs are taken back that are being asked for.
        chosen = sorted(dice.sample(range(count), count // 2), key=lambda i: i + dice.randrange(10))
        with ThreadPoolExecutor(3) as pool:
            work = [pool.submit(cancel, chosen[i::2]) for i in range(2)]
            for each in [*work, pool.submit(arrive)]:
                each.result()
        pipeline.drain(TIMEOUT_S)
        num_updated = sum(not spare.is_untouched() for spare in spares)
        assert pipeline.stats()["jobs"] == num_updated == len(pipeline.take_trace())
    assert num_updated < count
    assert spares[-1].is_untouched()
    for i, spare in enumerate(spares):
        if i not in {*chosen, count - 1} or not spare.is_untouched():
            spare.check(buckets[i % 5])


def test_cancelled_jobs_leave_everything_as_it_is(tmp_path: Path) -> None:
    scenarios = (
        "scenario_waiting_jobs",
        "scenario_failed_event",
        "scenario_while_events_are_asked_for",
        "scenario_many_threads",
    )
    run_with_fake_driver("test_adam_speculation", scenarios, tmp_path)
