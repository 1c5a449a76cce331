"""Budgets, staging, clipping, failures and the end of a runtime's life."""

from __future__ import annotations

import errno
import gc
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from toy import (
    PLACES,
    D,
    Driver,
    G,
    Hyper,
    Reference,
    S,
    gradient,
    make_buckets,
    make_program,
    make_runtime,
    make_slots,
    place,
    stubs_of,
    values_of,
)

from lohan_fx.errors import LohanError, PlanMismatch, TrainingLoopError, TransferError
from lohan_fx.runtime import Runtime


def test_clipping_is_that_of_clip_grad_norm(tmp_path: Path) -> None:
    buckets = make_buckets(5)
    program = make_program(buckets)
    placements = [place(*tiers) for tiers in PLACES["float32"]]
    hyper = Hyper(max_grad_norm=0.5)
    runtime = make_runtime(
        tmp_path, buckets, placements, [program], hyper=hyper, overlap="next-forward"
    )
    driver, reference = Driver(runtime, buckets), Reference(buckets)
    for _ in range(2):
        stubs = [torch.nn.Parameter(w.clone()) for w in reference.weight.values()]
        for pid, stub in enumerate(stubs):
            stub.grad = gradient(pid, stub.detach())
        norm = float(torch.nn.utils.clip_grad_norm_(stubs, 0.5))
        driver.train(program)
        assert runtime.last_grad_norm == pytest.approx(norm, rel=1e-6)
        found = torch.tensor(runtime.last_grad_norm)
        reference.step(scale=float(0.5 / (found + 1e-6)))
    reference.check(runtime)
    runtime.close()


def test_small_gradients_are_not_scaled_up(tmp_path: Path) -> None:
    buckets = make_buckets(2)
    program = make_program(buckets)
    hyper = Hyper(max_grad_norm=1e9)
    runtime = make_runtime(
        tmp_path,
        buckets,
        [place(G, G), place(D, D)],
        [program],
        hyper=hyper,
        overlap="next-forward",
    )
    reference = Reference(buckets)
    Driver(runtime, buckets).train(program)
    reference.step()
    reference.check(runtime)
    runtime.close()


def test_staging_for_one_item_at_a_time_is_enough(tmp_path: Path) -> None:
    buckets = make_buckets(6)
    slots = make_slots([S] * 5)
    largest = max([b.weight_bytes for b in buckets] + [s.nbytes for s in slots])
    program = make_program(buckets, slots, ahead=3)
    runtime = make_runtime(
        tmp_path,
        buckets,
        [place(S, S)] * 6,
        [program],
        hyper=Hyper(),
        overlap="next-forward",
        inbound_bytes=largest,
        outbound_bytes=max(slot.nbytes for slot in slots),
        grad_window_bytes=0,
        state_buffers=1,
    )
    driver, reference = Driver(runtime, buckets), Reference(buckets)
    for _ in range(2):
        driver.train(program)
        reference.step()
    reference.check(runtime)
    runtime.close()


@pytest.mark.parametrize("what", ["inbound_bytes", "outbound_bytes"])
def test_too_little_staging_is_refused_by_name(tmp_path: Path, what: str) -> None:
    buckets = make_buckets(1)
    program = make_program(buckets, make_slots([S]))
    with pytest.raises(LohanError, match=what):
        runtime = make_runtime(
            tmp_path, buckets, [place(S, S)], [program], hyper=Hyper(), **{what: 4096}
        )
        Driver(runtime, buckets).forward(program)


def test_a_dram_budget_that_is_too_small_is_refused_and_says_who_asked(tmp_path: Path) -> None:
    buckets = make_buckets(4)
    with pytest.raises(LohanError, match=r"state of bucket 1 needs .* dram"):
        make_runtime(tmp_path, buckets, [place(D, D)] * 4, dram_bytes=60_000)


def test_parameters_that_do_not_fit_are_given_back(tmp_path: Path) -> None:
    buckets = make_buckets(4, "bfloat16")
    runtime = Runtime(torch.device("cpu"), dram_bytes=120_000)
    values = values_of(buckets)
    with pytest.raises(LohanError, match="raise the dram budget"):
        runtime.adopt(buckets, stubs_of(buckets), values, [place(D, D)] * 4)
    assert all(torch.equal(value, values[pid]) for pid, value in values_of(buckets).items())
    assert runtime.stats().current_bytes["dram"] == 0
    runtime.close()


def test_what_the_runtime_holds_stays_within_the_budgets(tmp_path: Path) -> None:
    buckets = make_buckets(6, "bfloat16")
    slots = make_slots([S, D, S], "bfloat16")
    program = make_program(buckets, slots, ahead=1)
    placements = [place(D, D), place(D, S), place(S, S)] * 2
    weights = sorted(bucket.weight_bytes for bucket in buckets)
    gpu_bytes = sum(weights[-3:]) + max(slot.nbytes for slot in slots) + 4096
    runtime = make_runtime(
        tmp_path, buckets, placements, [program], hyper=Hyper(), gpu_bytes=gpu_bytes
    )
    driver = Driver(runtime, buckets)
    driver.train(program)
    runtime.drain()
    first = runtime.stats()
    driver.train(program)
    runtime.drain()
    second = runtime.stats()
    assert 0 < second.peak_bytes["gpu"] <= gpu_bytes
    assert first.peak_bytes == second.peak_bytes
    assert first.current_bytes == second.current_bytes
    runtime.close()


def test_every_lane_counts_its_bytes(tmp_path: Path) -> None:
    buckets = make_buckets(2)
    slots = make_slots([D])
    program = make_program(buckets, slots)
    runtime = make_runtime(tmp_path, buckets, [place(D, D), place(S, S)], [program], hyper=Hyper())
    before = runtime.stats().moved_bytes
    Driver(runtime, buckets).train(program)
    runtime.drain()
    after = runtime.stats().moved_bytes
    weights = sum(bucket.weight_bytes for bucket in buckets)
    grads = 4 * sum(spec.numel for bucket in buckets for spec in bucket.params)
    assert after["h2d"] - before["h2d"] == 2 * weights + slots[0].nbytes
    assert after["d2h"] - before["d2h"] == grads + slots[0].nbytes
    assert after["ssd_write"] - before["ssd_write"] >= 3 * buckets[1].weight_bytes
    assert after["ssd_read"] - before["ssd_read"] >= 5 * buckets[1].weight_bytes
    runtime.close()


@pytest.mark.parametrize("tiers", [(G, D), (D, G), (S, G), (G, S)])
def test_placements_without_an_update_rule_are_refused(
    tmp_path: Path, tiers: tuple[object, object]
) -> None:
    with pytest.raises(PlanMismatch, match="bucket 0"):
        make_runtime(tmp_path, make_buckets(1), [place(*tiers)])  # type: ignore[arg-type]


@pytest.mark.parametrize("mode", ["backward", "next-forward"])
@pytest.mark.parametrize(("tiers", "on"), [((S, D), "read"), ((D, S), "write"), ((D, S), "read")])
def test_a_failing_disk_names_the_bucket(
    tmp_path: Path, tiers: tuple[object, object], on: str, mode: str
) -> None:
    buckets = make_buckets(1, "bfloat16")
    program = make_program(buckets)
    runtime = None
    for after in range(2, 60):  # a little later each time: the first ones come while placing
        try:
            runtime = make_runtime(
                tmp_path,
                buckets,
                [place(*tiers)],  # type: ignore[arg-type]
                [program],
                hyper=Hyper(),
                overlap=mode,
                faults={"errno": errno.EIO, "on": on, "after": after, "times": 1000},
            )
            break
        except TransferError:
            continue
    assert runtime is not None
    driver = Driver(runtime, buckets)
    with pytest.raises(TransferError, match="bucket 0") as caught:
        for _ in range(30):
            driver.train(program)
            runtime.drain()
    assert caught.value.errno == errno.EIO
    if tiers == (D, S):
        with pytest.raises(TrainingLoopError, match="between two steps"):
            runtime.passes.begin(0)
    runtime.close()


def test_a_failing_disk_names_the_activation(tmp_path: Path) -> None:
    buckets = make_buckets(1)
    program = make_program(buckets, make_slots([S]))
    runtime = make_runtime(
        tmp_path,
        buckets,
        [place(D, D)],
        [program],
        hyper=Hyper(),
        faults={"errno": errno.EIO, "on": "write", "times": 1000},
    )
    driver = Driver(runtime, buckets)
    with pytest.raises(TransferError, match="activation x0"):
        driver.train(program)
    runtime.close()


def test_a_disk_that_hangs_is_an_error_after_the_deadline(tmp_path: Path) -> None:
    buckets = make_buckets(1)
    program = make_program(buckets)
    runtime = make_runtime(
        tmp_path,
        buckets,
        [place(S, D)],
        [program],
        hyper=Hyper(),
        faults={"delay_ms": 400},
        deadline_s=5.0,
    )
    runtime._resources.waits.deadline_s = 0.05
    with pytest.raises(TransferError, match="the weights of bucket 0"):
        Driver(runtime, buckets).forward(program)
    runtime._resources.waits.deadline_s = 5.0
    runtime.close()


def open_files() -> set[str]:
    found = set()
    for entry in os.listdir("/proc/self/fd"):
        try:
            found.add(f"{entry}:{os.readlink(f'/proc/self/fd/{entry}')}")
        except FileNotFoundError:
            continue
    return found


def mapped_kib() -> int:
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith("VmSize"))


def busy_runtime(tmp_path: Path) -> tuple[Runtime, Driver]:
    buckets = make_buckets(5, "bfloat16")
    program = make_program(buckets, make_slots([S, D, S], "bfloat16"))
    placements = [place(*tiers) for tiers in PLACES["bfloat16"][:5]]
    runtime = make_runtime(
        tmp_path,
        buckets,
        placements,
        [program],
        hyper=Hyper(),
        inbound_bytes=256 << 20,
        outbound_bytes=1 << 20,
    )
    driver = Driver(runtime, buckets)
    driver.train(program)
    driver.forward(program)
    for move in program.backward[:8]:
        driver.move(program, move)
    return runtime, driver


@pytest.mark.parametrize("how", ["close", "drop"])
def test_the_end_leaves_no_files_descriptors_or_mappings(tmp_path: Path, how: str) -> None:
    make_runtime(tmp_path, make_buckets(1), [place(S, S)]).close()  # thread pools, caches
    gc.collect()
    files, mapped = open_files(), mapped_kib()
    runtime, driver = busy_runtime(tmp_path)
    assert mapped_kib() > mapped + (200 << 10)
    if how == "close":
        runtime.close()
        runtime.close()
        assert runtime.closed
    else:
        resources = runtime._resources
        del runtime
        driver.runtime = None  # type: ignore[assignment]
        gc.collect()
        assert resources.windows is None
        del resources
    gc.collect()
    assert open_files() <= files
    assert not list(tmp_path.iterdir())
    assert mapped_kib() < mapped + (200 << 10)


def test_a_closed_runtime_refuses_to_work(tmp_path: Path) -> None:
    buckets = make_buckets(1)
    runtime = make_runtime(tmp_path, buckets, [place(D, D)])
    runtime.close()
    with pytest.raises(LohanError, match="closed"):
        runtime.values.weight(0)
    assert runtime.stats().current_bytes == {"gpu": 0, "dram": 0, "ssd": 0}


def test_a_process_may_end_without_closing(tmp_path: Path) -> None:
    script = (
        "from pathlib import Path; import sys; from test_runtime_limits import busy_runtime; "
        "runtime, driver = busy_runtime(Path(sys.argv[1]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path])},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert not list(tmp_path.iterdir())


def test_poison_reaches_a_weight_that_is_read_after_its_release(tmp_path: Path) -> None:
    buckets = make_buckets(1)
    program = make_program(buckets)
    runtime = make_runtime(tmp_path, buckets, [place(D, D)], [program], hyper=Hyper(), poison=True)
    runtime.passes.begin(0)
    runtime.passes.fetch(0)
    kept = runtime.passes.wait(0)[0]
    runtime.passes.release(0)
    assert kept.isnan().all()
    runtime.close()


def test_poison_reaches_an_activation_that_is_read_after_its_wait(tmp_path: Path) -> None:
    buckets = make_buckets(1)
    slots = make_slots([D])
    program = make_program(buckets, slots)
    runtime = make_runtime(tmp_path, buckets, [place(D, D)], [program], hyper=Hyper(), poison=True)
    x = torch.ones(slots[0].shape)
    runtime.passes.begin(0)
    runtime.passes.offload(0, x.as_strided(slots[0].shape, slots[0].stride))
    runtime.passes.offload_wait(0)
    assert x.isnan().all()
    runtime.close()
