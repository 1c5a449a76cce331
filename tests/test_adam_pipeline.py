"""The optimizer pipeline: any placement and mode gives the numbers of a plain update, errors surface."""

from __future__ import annotations

import errno
import itertools
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from adam_jobs import (
    PAGE,
    STATES,
    TIMEOUT_S,
    Bucket,
    Memory,
    make_events,
    run_with_fake_driver,
    running,
)

from lohan_fx import native
from lohan_fx.errors import TransferError


@pytest.fixture
def engine(tmp_path: Path) -> Iterator[native.FileEngine]:
    made = native.FileEngine([str(tmp_path)], block_bytes=16 * PAGE)
    yield made
    made.close()


def mixed_buckets(engine: native.FileEngine) -> list[Bucket]:
    ssd = {"engine": engine}
    return [
        Bucket("all on ssd", 5000, on_ssd=(*STATES, "out"), seed=1, **ssd),
        Bucket("all in dram", 3000, seed=2),
        Bucket("moments on ssd", 4097, on_ssd=("exp_avg", "exp_avg_sq"), seed=3, **ssd),
        Bucket("fp32", 2000, on_ssd=STATES, grad_dtype="float32", out_dtype=None, seed=4, **ssd),
        Bucket("weights over gradient", 7001, on_ssd=STATES, out_in_grad=True, seed=5, **ssd),
        Bucket("only weights on ssd", 1000, on_ssd=("out",), seed=6, **ssd),
        Bucket("half", 90_001, on_ssd=STATES, grad_dtype="float16", out_dtype="float16", **ssd),
    ]


@pytest.mark.parametrize("num_buffers", [1, 2, 3])
@pytest.mark.parametrize("mode", ["optimized", "naive"])
def test_every_placement_gives_the_numbers_of_a_plain_update(
    mode: str, num_buffers: int, engine: native.FileEngine
) -> None:
    buckets = mixed_buckets(engine)
    size = max(bucket.job(1).buffer_bytes for bucket in buckets)
    with running(
        mode, engine, num_threads=2, num_buffers=num_buffers, buffer_bytes=size
    ) as pipeline:
        for step in range(1, 4):
            tickets = []
            for bucket in buckets:
                bucket.new_gradient()
                bucket.update_plainly(step)
                tickets.append(pipeline.submit(bucket.job(step)))
            for ticket in reversed(tickets):
                pipeline.wait(ticket, TIMEOUT_S)
            assert tickets == list(range(tickets[0], tickets[0] + len(buckets)))
        pipeline.drain(TIMEOUT_S)
        stats = pipeline.stats()
    for bucket in buckets:
        bucket.check()
    assert stats["jobs"] == 3 * len(buckets)
    assert stats["params"] == 3 * sum(int(bucket.covered().sum()) for bucket in buckets)


@pytest.mark.parametrize("mode", ["optimized", "naive"])
@pytest.mark.parametrize("on_ssd", [(), STATES, ("exp_avg",), ("out",)])
def test_jobs_of_one_bucket_follow_each_other(
    on_ssd: tuple[str, ...], mode: str, tmp_path: Path
) -> None:
    engine = native.FileEngine([str(tmp_path)], faults={"delay_ms": 5})
    bucket = Bucket("again", 3000, engine=engine, on_ssd=on_ssd)
    bucket.new_gradient()
    size = max(1, bucket.job(1).buffer_bytes)
    with running(mode, engine, num_buffers=3, buffer_bytes=size) as pipeline:
        for step in range(1, 6):
            bucket.update_plainly(step)
            pipeline.submit(bucket.job(step))
        pipeline.drain(TIMEOUT_S)
        bucket.check()


def test_weights_on_ssd_alone_have_zeros_in_their_gaps(engine: native.FileEngine) -> None:
    bucket = Bucket("staged", 5000, engine=engine, on_ssd=("exp_avg", "out"))
    bucket.new_gradient()
    bucket.update_plainly(1)
    job = bucket.job(1, out=0)
    with running(engine=engine, num_buffers=1, buffer_bytes=job.buffer_bytes) as pipeline:
        pipeline.wait(pipeline.submit(job), TIMEOUT_S)
    covered, written = bucket.covered(), bucket.value("out")
    assert bucket.plain_out is not None
    assert torch.equal(written[covered], bucket.plain_out[covered])
    assert not written[~covered].any()


def trace_of_three_on_ssd(mode: str, path: Path) -> dict[tuple[str, str], tuple[float, float]]:
    """(start, end) by (job, lane); jobs "a", "b", "c" share two state buffers and a slow disk."""
    engine = native.FileEngine([str(path)], faults={"delay_ms": 20})
    buckets = [Bucket(name, 2000, engine=engine, on_ssd=STATES) for name in "abc"]
    size = buckets[0].job(1).buffer_bytes
    with running(mode, engine, num_buffers=2, buffer_bytes=size) as pipeline:
        for bucket in buckets:
            pipeline.submit(bucket.job(1))
        pipeline.drain(TIMEOUT_S)
        events = pipeline.take_trace()
        assert pipeline.take_trace() == []
    assert len(events) == 9
    return {(name, lane): (start, end) for name, lane, start, end in events}


def test_optimized_reads_ahead_of_the_write(tmp_path: Path) -> None:
    seen = trace_of_three_on_ssd("optimized", tmp_path)
    assert seen["b", "ssd_read"][0] < seen["a", "ssd_write"][0]  # the second buffer was free
    assert seen["b", "cpu_adam"][0] < seen["a", "ssd_write"][1]  # beside the write
    assert seen["c", "ssd_read"][0] >= seen["a", "ssd_write"][1]  # the first buffer was not


def test_naive_does_one_thing_after_another(tmp_path: Path) -> None:
    seen = trace_of_three_on_ssd("naive", tmp_path)
    order = [seen[name, lane] for name in "abc" for lane in ("ssd_read", "cpu_adam", "ssd_write")]
    for (_, end), (start, _) in itertools.pairwise(order):
        assert end <= start


def test_a_job_in_dram_does_not_wait_for_the_read_of_another(tmp_path: Path) -> None:
    engine = native.FileEngine([str(tmp_path)], faults={"delay_ms": 200, "on": "read"})
    slow = Bucket("slow", 1000, engine=engine, on_ssd=STATES)
    quick = Bucket("quick", 1000)
    size = slow.job(1).buffer_bytes
    with running(engine=engine, num_buffers=2, buffer_bytes=size) as pipeline:
        first, second = pipeline.submit(slow.job(1)), pipeline.submit(quick.job(1))
        pipeline.wait(second, TIMEOUT_S)
        assert not pipeline.done(first)
        pipeline.wait(first, TIMEOUT_S)
        assert pipeline.stats()["read_wait_s"] > 0.05


def test_weights_are_ready_before_the_state_is_written(tmp_path: Path) -> None:
    engine = native.FileEngine([str(tmp_path)], faults={"delay_ms": 200, "on": "write"})
    bucket = Bucket("slow to write", 1000)
    bucket.extents["out"] = (engine.allocate(PAGE), 0)
    bucket.new_gradient()
    bucket.update_plainly(1)
    with running(engine=engine) as pipeline:
        ticket = pipeline.submit(bucket.job(1))
        pipeline.wait_weights(ticket, TIMEOUT_S)
        assert pipeline.weights_ready(ticket)
        assert not pipeline.done(ticket)
        assert bucket.out is not None and bucket.plain_out is not None
        assert torch.equal(bucket.out.tensor[:100], bucket.plain_out[:100])
        pipeline.wait(ticket, TIMEOUT_S)


@pytest.mark.parametrize("mode", ["optimized", "naive"])
@pytest.mark.parametrize("way", ["read", "write"])
def test_a_failed_transfer_fails_its_job_and_no_other(way: str, mode: str, tmp_path: Path) -> None:
    setup_writes = 3 if way == "write" else 0
    faults = {"errno": errno.EIO, "on": way, "after": setup_writes, "times": 1}
    engine = native.FileEngine([str(tmp_path)], faults=faults)
    broken = Bucket("layer.3", 1000, engine=engine, on_ssd=STATES)
    fine = Bucket("layer.2", 1000)
    fine.new_gradient()
    fine.update_plainly(1)
    size = broken.job(1).buffer_bytes
    with running(mode, engine, num_buffers=2, buffer_bytes=size) as pipeline:
        first, second = pipeline.submit(broken.job(1)), pipeline.submit(fine.job(1))
        pipeline.wait(second, TIMEOUT_S)
        fine.check()
        for _ in range(2):  # as often as asked
            with pytest.raises(TransferError, match=r"layer\.3") as caught:
                pipeline.wait(first, TIMEOUT_S)
            assert caught.value.errno == errno.EIO
            assert caught.value.path is not None and str(tmp_path) in caught.value.path
            assert caught.value.offset is not None
        assert pipeline.done(first)
        with pytest.raises(TransferError, match=r"layer\.3"):
            pipeline.drain(TIMEOUT_S)
        pipeline.wait(pipeline.submit(fine.job(2)), TIMEOUT_S)


def test_a_timeout_names_the_job_and_what_it_does(tmp_path: Path) -> None:
    engine = native.FileEngine([str(tmp_path)], faults={"delay_ms": 300, "on": "read"})
    bucket = Bucket("model.layers.7", 1000, engine=engine, on_ssd=STATES)
    size = bucket.job(1).buffer_bytes
    with running(engine=engine, num_buffers=1, buffer_bytes=size) as pipeline:
        ticket = pipeline.submit(bucket.job(1))
        with pytest.raises(
            TransferError, match=r"'model\.layers\.7' .*reading its state.* 0\.01 s"
        ):
            pipeline.wait(ticket, 0.01)
        with pytest.raises(TransferError, match=r"1 .*'model\.layers\.7'"):
            pipeline.drain(0.01)
        pipeline.wait(ticket, TIMEOUT_S)


def test_a_buffer_is_not_reused_while_a_late_transfer_may_touch_it(tmp_path: Path) -> None:
    engine = native.FileEngine([str(tmp_path)], faults={"delay_ms": 200, "on": "read"})
    late = Bucket("late", 1000, engine=engine, on_ssd=STATES)
    size = late.job(1).buffer_bytes
    with running(engine=engine, num_buffers=1, buffer_bytes=size, timeout_s=0.05) as pipeline:
        ticket = pipeline.submit(late.job(1))
        with pytest.raises(TransferError, match="late"):
            pipeline.wait(ticket, TIMEOUT_S)
        with pytest.raises(ValueError, match="still in the hands"):
            pipeline.set_state_buffers([])
        deadline = time.monotonic() + TIMEOUT_S
        while time.monotonic() < deadline:
            with suppress(ValueError):
                pipeline.set_state_buffers([])
                return
            time.sleep(0.05)
        pytest.fail("the buffer was never given back")


def test_closing_drops_what_has_not_begun(tmp_path: Path) -> None:
    engine = native.FileEngine([str(tmp_path)], faults={"delay_ms": 100, "on": "read"})
    buckets = [Bucket(name, 1000, engine=engine, on_ssd=STATES) for name in ("one", "two")]
    size = buckets[0].job(1).buffer_bytes
    with running(engine=engine, num_buffers=1, buffer_bytes=size) as pipeline:
        tickets = [pipeline.submit(bucket.job(1)) for bucket in buckets]
        pipeline.close()
        for ticket in tickets:
            with pytest.raises(TransferError, match="closed before its update"):
                pipeline.wait(ticket, 0.0)
        with pytest.raises(ValueError, match="closed"):
            pipeline.submit(buckets[0].job(1))
    for bucket in buckets:
        bucket.check()


def test_a_pipeline_may_go_away_with_jobs_in_flight(engine: native.FileEngine) -> None:
    bucket = Bucket("left behind", 100_000, engine=engine, on_ssd=STATES)
    memory = Memory(bucket.job(1).buffer_bytes, torch.uint8)
    pipeline = native.AdamPipeline(2, "optimized", engine, [(memory.ptr, memory.nbytes)])
    for step in range(1, 4):
        pipeline.submit(bucket.job(step))
    del pipeline


def test_state_buffers_can_grow_between_jobs(engine: native.FileEngine) -> None:
    small = Bucket("small", 1000, engine=engine, on_ssd=STATES)
    large = Bucket("large", 9000, engine=engine, on_ssd=STATES)
    large.new_gradient()
    large.update_plainly(1)
    size = small.job(1).buffer_bytes
    grown = Memory(large.job(1).buffer_bytes, torch.uint8)
    with running(engine=engine, num_buffers=2, buffer_bytes=size) as pipeline:
        pipeline.wait(pipeline.submit(small.job(1)), TIMEOUT_S)
        with pytest.raises(ValueError, match=rf"'large' takes {grown.nbytes} bytes.* {size}"):
            pipeline.submit(large.job(1))
        pipeline.set_state_buffers([(grown.ptr, grown.nbytes)])
        pipeline.wait(pipeline.submit(large.job(1)), TIMEOUT_S)
    large.check()


NONSENSE = {
    "overlap": ({"segments": [(0, 20, 0), (10, 20, 0)]}, "overlap at element 10"),
    "outside": ({"segments": [(90, 20, 0)]}, "element 90 leaves the bucket"),
    "group": ({"segments": [(0, 20, 2)]}, "group 2 of 2"),
    "no engine": ({"exp_avg": (1, 0)}, "no file engine"),
    "no master": ({"master": 0}, "master weights: neither"),
    "no gradient": ({"grad": 0}, "no gradient"),
    "no dtype": ({"out_dtype": None}, "without an output dtype"),
    "wrong dtype": ({"out_dtype": "float32"}, "'float32'"),
}


@pytest.mark.parametrize("case", NONSENSE)
def test_a_job_that_makes_no_sense_is_refused(case: str) -> None:
    changes, message = NONSENSE[case]
    with running() as pipeline, pytest.raises(ValueError, match=message):
        pipeline.submit(Bucket("nonsense", 100).job(1, **changes))


def test_an_unknown_ticket_and_mode_are_refused() -> None:
    with pytest.raises(ValueError, match=r"'fastest'.*optimized or naive"):
        native.AdamPipeline(1, "fastest")
    with running() as pipeline, pytest.raises(ValueError, match="ticket 1"):
        pipeline.done(1)


def test_the_trace_is_bounded() -> None:
    bucket = Bucket("traced", 100)
    before = time.monotonic()
    with running(trace_events=3) as pipeline:
        for step in range(1, 8):
            pipeline.submit(bucket.job(step))
        pipeline.drain(TIMEOUT_S)
        events = pipeline.take_trace()
    assert [(name, lane) for name, lane, _, _ in events] == [("traced", "cpu_adam")] * 3
    assert all(before < start <= end < time.monotonic() for _, _, start, end in events)


def scenario_waits_for_events() -> None:
    for mode in ("optimized", "naive"):
        flags, events = make_events(2)
        late, free = Bucket("late", 1000), Bucket("free", 1000)
        late.update_plainly(1)
        with running(mode) as pipeline:
            first = pipeline.submit(late.job(1, ready_events=[0, *events]))
            second = pipeline.submit(free.job(1))
            with pytest.raises(TransferError, match=r"'late' .*waiting for its gradient"):
                pipeline.wait(first, 0.05)
            flags[0] = 1
            with pytest.raises(TransferError):
                pipeline.wait(first, 0.05)
            flags[1] = 1
            pipeline.wait(first, TIMEOUT_S)
            late.check()
            pipeline.wait(second, TIMEOUT_S)
            assert pipeline.stats()["event_wait_s"] > 0.05


def scenario_failed_event() -> None:
    flags, events = make_events(1)
    flags[0] = 2
    bucket, other = Bucket("lost", 1000), Bucket("other", 1000)
    with running() as pipeline:
        ticket = pipeline.submit(bucket.job(1, ready_events=events))
        last = pipeline.submit(other.job(1))
        with pytest.raises(TransferError, match=r"'lost'.*CUDA_ERROR_ILLEGAL_ADDRESS"):
            pipeline.wait(ticket, TIMEOUT_S)
        bucket.check()
        pipeline.wait(last, TIMEOUT_S)


def scenario_event_that_never_comes() -> None:
    for mode in ("optimized", "naive"):
        flags, events = make_events(1)
        bucket, other = Bucket("waiting", 1000), Bucket("other", 1000)
        with running(mode, timeout_s=0.1) as pipeline:
            ticket = pipeline.submit(bucket.job(1, ready_events=events))
            last = pipeline.submit(other.job(1))
            with pytest.raises(TransferError, match="'waiting': its gradient has not arrived"):
                pipeline.wait(ticket, TIMEOUT_S)
            pipeline.wait(last, TIMEOUT_S)
            pipeline.submit(bucket.job(2, ready_events=events))
            start = time.monotonic()
        assert time.monotonic() - start < 5.0  # closing does not wait for the event
        assert not flags.any()


def scenario_rank() -> None:
    flags, (soon, never) = make_events(2)
    buckets = [Bucket(f"rank {rank}", 1000) for rank in range(5)]
    for bucket in buckets:
        bucket.update_plainly(1)
    with running() as pipeline:
        # Rank 4 is free and goes at once; 0 and what was submitted after it must wait.
        first = pipeline.submit(buckets[4].job(1, rank=4))
        pipeline.wait(first, TIMEOUT_S)
        seen = pipeline.progress
        tickets = [
            pipeline.submit(buckets[r].job(1, rank=r, ready_events=[soon])) for r in (3, 1, 2)
        ]
        last = pipeline.submit(buckets[0].job(1, rank=0, ready_events=[never]))
        with pytest.raises(TransferError, match=r"none of 4 .*'rank 3'.*its gradient.* 0\.05 s"):
            pipeline.wait_any_weights([*tickets, last], 0.05)
        assert pipeline.progress == seen
        flags[0] = 1
        pipeline.wait_any_weights([last, tickets[1]], TIMEOUT_S)
        for ticket in tickets:
            pipeline.wait(ticket, TIMEOUT_S)
        assert pipeline.progress == seen + 3
        assert not pipeline.done(last)
        flags[1] = 1
        pipeline.drain(TIMEOUT_S)
        order = [name for name, *_ in pipeline.take_trace()]
    assert order == ["rank 4", "rank 1", "rank 2", "rank 3", "rank 0"]
    for bucket in buckets:
        bucket.check()


def test_cuda_events_hold_an_update_back(tmp_path: Path) -> None:
    scenarios = (
        "scenario_waits_for_events",
        "scenario_failed_event",
        "scenario_event_that_never_comes",
        "scenario_rank",
    )
    run_with_fake_driver("test_adam_pipeline", scenarios, tmp_path)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a driver")
def test_events_without_a_driver_are_refused() -> None:
    with running() as pipeline, pytest.raises(ValueError, match=r"no driver: .*libcuda\.so\.1"):
        pipeline.submit(Bucket("no gpu", 100).job(1, ready_events=[1]))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_an_update_waits_for_the_copy_of_its_gradient_from_the_gpu() -> None:
    numel = 1 << 22
    bucket = Bucket("from gpu", numel, grad_dtype="float32", out_dtype=None)
    on_gpu = torch.randn(numel, device="cuda")
    pinned = torch.zeros(numel).pin_memory()
    with running(num_threads=2) as pipeline:
        for step in range(1, 4):
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                torch.cuda._sleep(200_000_000)  # about 0.1 s
                pinned.copy_(on_gpu * step, non_blocking=True)
                event = torch.cuda.Event()
                event.record(stream)
            job = bucket.job(step, grad=pinned.data_ptr(), ready_events=[event.cuda_event])
            ticket = pipeline.submit(job)
            assert not pipeline.done(ticket)
            pipeline.wait(ticket, TIMEOUT_S)
            bucket.grad.tensor.copy_((on_gpu * step).cpu())
            bucket.update_plainly(step)
            bucket.check()
        assert pipeline.stats()["event_wait_s"] > 0.05
