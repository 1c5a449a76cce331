"""The file engine against real files, on every backend this machine allows."""

from __future__ import annotations

import errno
import os
import random
import re
import signal
import stat
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lohan_fx.errors import TransferError
from lohan_fx.native import FileEngine, HostBuffer

PAGE = 4096
BLOCK = 64 << 10


def io_uring_refusal() -> str | None:
    try:
        FileEngine([os.getcwd()], backend="io_uring").close()
    except TransferError as refused:
        return str(refused)
    return None


REFUSAL = io_uring_refusal()


@pytest.fixture(
    params=[
        pytest.param(
            "io_uring", marks=pytest.mark.skipif(REFUSAL is not None, reason=str(REFUSAL))
        ),
        "threads",
    ]
)
def backend(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def make_engine(backend: str, tmp_path: Path) -> Iterator[Callable[..., FileEngine]]:
    engines = []

    def make(*directories: Path, **options: Any) -> FileEngine:
        engine = FileEngine(
            [str(directory) for directory in directories or (tmp_path,)],
            **{"backend": backend, "block_bytes": BLOCK} | options,
        )
        engines.append(engine)
        return engine

    yield make
    for engine in engines:
        engine.close()


def buffer_of(num_bytes: int, seed: int | None = None) -> tuple[HostBuffer, np.ndarray]:
    """Memory for num_bytes, and an array over it: random bytes, or zeros without a seed."""
    buffer = HostBuffer(num_bytes, huge_pages=False, threads=1)
    array = np.frombuffer(buffer, dtype=np.uint8)
    if seed is not None:
        array[:] = np.random.default_rng(seed).integers(0, 256, array.size, dtype=np.uint8)
    return buffer, array


def write_then_read(engine: FileEngine, num_bytes: int) -> None:
    """Writes and reads one whole extent; the bytes must come back."""
    extent = engine.allocate(num_bytes)
    source, sent = buffer_of(num_bytes, seed=num_bytes)
    target, got = buffer_of(num_bytes)
    engine.wait(engine.write(extent, 0, source.ptr, num_bytes, "there"))
    engine.wait(engine.read(extent, 0, target.ptr, num_bytes, "back"))
    assert np.array_equal(got[:num_bytes], sent[:num_bytes])
    engine.release(extent)


def files_in(directory: Path) -> list[os.stat_result]:
    """This process's open files in the directory, nameless ones included."""
    found = []
    for link in Path("/proc/self/fd").iterdir():
        try:
            target = os.readlink(link)
        except FileNotFoundError:
            continue
        if target.startswith(f"{directory}/"):
            found.append(os.stat(link))
    return found


def run_python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)} | environment,
        capture_output=True,
        text=True,
        timeout=60,
    )


# Bytes


def test_random_reads_and_writes_give_what_an_array_gives(make_engine) -> None:
    engine = make_engine(queue_depth=4)
    rng = random.Random(7)
    pages = 67
    extents = [engine.allocate(pages * PAGE) for _ in range(3)]
    _, zeros = buffer_of(pages * PAGE)
    reference = {extent: zeros.copy() for extent in extents}
    for round_ in range(40):
        extent = rng.choice(extents)
        first = rng.randrange(pages)
        last = rng.randrange(first, pages)
        num_bytes = (last - first + 1) * PAGE
        buffer, array = buffer_of(num_bytes, seed=round_)
        if rng.random() < 0.5:
            reference[extent][first * PAGE : first * PAGE + num_bytes] = array
            engine.wait(engine.write(extent, first * PAGE, buffer.ptr, num_bytes, f"w{round_}"))
        else:
            engine.wait(engine.read(extent, first * PAGE, buffer.ptr, num_bytes, f"r{round_}"))
            expected = reference[extent][first * PAGE : first * PAGE + num_bytes]
            assert np.array_equal(array, expected)


@pytest.mark.parametrize("num_bytes", [1, PAGE - 1, PAGE, PAGE + 1, BLOCK - 1, 3 * BLOCK + 5])
def test_sizes_need_not_be_multiples_of_a_page(make_engine, num_bytes: int) -> None:
    write_then_read(make_engine(), num_bytes)


def test_more_requests_than_the_queue_is_deep_all_arrive(make_engine) -> None:
    engine = make_engine(queue_depth=2)
    count = 100
    extent = engine.allocate(count * BLOCK)
    source, sent = buffer_of(count * BLOCK, seed=1)
    target, got = buffer_of(count * BLOCK)
    for do, buffer in ((engine.write, source), (engine.read, target)):
        tickets = [
            do(extent, i * BLOCK, buffer.ptr + i * BLOCK, BLOCK, f"block {i}") for i in range(count)
        ]
        for ticket in tickets:
            engine.wait(ticket)
            assert engine.done(ticket)
    assert np.array_equal(got, sent)


def test_requests_finish_in_about_the_order_they_were_made(make_engine) -> None:
    engine = make_engine(queue_depth=1, faults={"delay_ms": 1})
    extent = engine.allocate(BLOCK)
    buffer, _ = buffer_of(BLOCK, seed=1)
    names = [f"request {i}" for i in range(20)]
    tickets = [engine.write(extent, 0, buffer.ptr, BLOCK, name) for name in names]
    engine.wait(tickets[-1])
    assert [name for name, *_ in engine.take_trace()] == names


def test_several_threads_may_use_one_engine(make_engine) -> None:
    engine = make_engine(queue_depth=3)
    with ThreadPoolExecutor(6) as pool:
        for future in [pool.submit(write_then_read, engine, BLOCK * i + 17) for i in range(24)]:
            future.result()
    assert engine.allocated_bytes == 0


# Directories


def test_an_extent_is_spread_over_its_directories(make_engine, tmp_path: Path) -> None:
    directories = [tmp_path / "a", tmp_path / "b"]
    for directory in directories:
        directory.mkdir()
    engine = make_engine(*directories)
    write_then_read(engine, 10 * BLOCK)
    for directory in directories:
        (file,) = files_in(directory)
        assert file.st_size == 5 * BLOCK
        assert file.st_blocks * 512 >= 5 * BLOCK


def test_a_full_directory_leaves_its_share_to_the_others(make_engine, tmp_path: Path) -> None:
    directories = [tmp_path / "a", tmp_path / "b"]
    for directory in directories:
        directory.mkdir()
    engine = make_engine(*directories, capacities=[2 * BLOCK, 0])
    write_then_read(engine, 10 * BLOCK)
    assert [file.st_size // BLOCK for d in directories for file in files_in(d)] == [2, 8]


def test_the_file_has_no_name_and_nobody_else_may_open_it(make_engine, tmp_path: Path) -> None:
    make_engine().allocate(BLOCK)
    (file,) = files_in(tmp_path)
    assert stat.S_IMODE(file.st_mode) == 0o600
    assert file.st_nlink == 0
    assert list(tmp_path.iterdir()) == []


def test_a_file_system_without_nameless_files_gets_an_unlinked_one(
    make_engine, tmp_path: Path
) -> None:
    engine = make_engine(faults={"refuse_tmpfile": True})
    write_then_read(engine, BLOCK + 1)
    (file,) = files_in(tmp_path)
    assert (stat.S_IMODE(file.st_mode), file.st_nlink) == (0o600, 0)
    assert list(tmp_path.iterdir()) == []


def test_a_file_system_without_direct_io_is_used_through_the_page_cache(make_engine) -> None:
    engine = make_engine(faults={"refuse_direct": True})
    assert engine.direct == [False]
    write_then_read(engine, 2 * BLOCK + 1)


def test_a_file_system_without_fallocate_is_filled_with_zeros(make_engine, tmp_path: Path) -> None:
    make_engine(faults={"refuse_fallocate": True}).allocate(BLOCK + 1)
    (file,) = files_in(tmp_path)
    assert file.st_blocks * 512 >= file.st_size == BLOCK + PAGE


@pytest.mark.parametrize("code", [errno.ENOENT, errno.ENOTDIR, errno.EACCES])
def test_a_directory_that_cannot_be_written_is_named(
    make_engine, tmp_path: Path, code: int
) -> None:
    directory = tmp_path / "d"
    if code == errno.ENOTDIR:
        directory.write_text("a file")
    elif code == errno.EACCES:
        if os.geteuid() == 0:
            pytest.skip("root may write everywhere")
        directory.mkdir(mode=0o500)
    with pytest.raises(TransferError, match=re.escape(str(directory))) as caught:
        make_engine(directory)
    assert (caught.value.path, caught.value.errno) == (str(directory), code)


# Space


def test_released_space_is_used_again(make_engine, tmp_path: Path) -> None:
    engine = make_engine(capacities=[8 * BLOCK])
    for _ in range(10):
        extents = [engine.allocate(2 * BLOCK) for _ in range(4)]
        for extent in extents[::2] + extents[1::2]:
            engine.release(extent)
    engine.allocate(8 * BLOCK)
    (file,) = files_in(tmp_path)
    assert file.st_size == 8 * BLOCK


def test_space_released_under_a_running_write_is_not_given_away_before_its_end(
    make_engine, tmp_path: Path
) -> None:
    engine = make_engine(capacities=[BLOCK], faults={"delay_ms": 200})
    extent = engine.allocate(BLOCK)
    buffer, _ = buffer_of(BLOCK, seed=1)
    ticket = engine.write(extent, 0, buffer.ptr, BLOCK, "late")
    engine.release(extent)
    with pytest.raises(TransferError):
        engine.allocate(BLOCK)
    engine.wait(ticket)
    engine.allocate(BLOCK)


def test_a_capacity_is_a_limit_like_a_full_disk(make_engine, tmp_path: Path) -> None:
    engine = make_engine(capacities=[4 * BLOCK])
    engine.allocate(3 * BLOCK)
    with pytest.raises(TransferError, match=f"no room for {2 * BLOCK} more bytes") as caught:
        engine.allocate(2 * BLOCK)
    assert (caught.value.path, caught.value.errno) == (str(tmp_path), errno.ENOSPC)
    engine.allocate(BLOCK)  # what is left is still there


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    directory = tmp_path / "small"
    directory.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "none", str(directory)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True).returncode != 0:
        pytest.skip("mounting a small tmpfs needs root")
    yield directory
    subprocess.run(["umount", str(directory)], check=True)


@pytest.mark.parametrize("faults", [{}, {"refuse_fallocate": True}])
def test_a_full_disk_is_an_error_of_allocate(make_engine, small_disk: Path, faults) -> None:
    engine = make_engine(small_disk, faults=faults)
    with pytest.raises(TransferError, match="disk is full") as caught:
        engine.allocate(2 << 20)
    assert (caught.value.path, caught.value.errno) == (str(small_disk), errno.ENOSPC)
    assert os.statvfs(small_disk).f_bfree == os.statvfs(small_disk).f_blocks
    write_then_read(engine, 1 << 19)
    engine.close()


def test_a_file_size_limit_is_an_error_of_allocate(tmp_path: Path, backend: str) -> None:
    result = run_python(
        f"""
        import resource, signal
        from lohan_fx.errors import TransferError
        from lohan_fx.native import FileEngine
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))
        engine = FileEngine([{str(tmp_path)!r}], backend={backend!r})
        engine.allocate(1 << 19)
        try:
            engine.allocate(1 << 20)
        except TransferError as error:
            print(error.errno, error.path)
        """
    )
    assert result.stdout.strip() == f"{errno.ENOSPC} {tmp_path}", result.stderr


# Bad days


@pytest.mark.parametrize("every", [1, 3])
def test_short_transfers_are_continued(make_engine, every: int) -> None:
    engine = make_engine(faults={"short_every": every})
    write_then_read(engine, 5 * BLOCK + 123)


@pytest.mark.parametrize("code", [errno.EINTR, errno.EAGAIN])
def test_interrupted_transfers_are_tried_again(make_engine, code: int) -> None:
    engine = make_engine(faults={"errno": code, "times": 5})
    write_then_read(engine, 5 * BLOCK)


@pytest.mark.parametrize("on", ["read", "write"])
def test_a_failed_transfer_says_what_and_where(make_engine, tmp_path: Path, on: str) -> None:
    engine = make_engine(queue_depth=1, faults={"errno": errno.EIO, "on": on, "after": 2})
    extent = engine.allocate(4 * BLOCK)
    buffer, _ = buffer_of(4 * BLOCK, seed=1)
    if on == "read":
        engine.wait(engine.write(extent, 0, buffer.ptr, 4 * BLOCK, "fill"))
    do = engine.read if on == "read" else engine.write
    ticket = do(extent, 0, buffer.ptr, 4 * BLOCK, "moments of layer 3")
    for _ in range(2):  # told as often as it is asked for
        with pytest.raises(TransferError, match=f"{on} of 'moments of layer 3'") as caught:
            engine.wait(ticket)
        assert caught.value.path == str(tmp_path)
        assert caught.value.offset == 2 * BLOCK
        assert caught.value.errno == errno.EIO
    assert engine.done(ticket)


def test_one_failed_request_does_not_touch_the_next(make_engine) -> None:
    engine = make_engine(queue_depth=1, faults={"errno": errno.EIO, "times": 1})
    extent = engine.allocate(BLOCK)
    buffer, _ = buffer_of(BLOCK, seed=1)
    bad, good = (engine.write(extent, 0, buffer.ptr, BLOCK, name) for name in ("bad", "good"))
    engine.wait(good)
    with pytest.raises(TransferError, match="'bad'"):
        engine.wait(bad)


def test_a_wait_that_takes_too_long_names_the_request(make_engine, tmp_path: Path) -> None:
    engine = make_engine(faults={"delay_ms": 400})
    extent = engine.allocate(BLOCK)
    buffer, _ = buffer_of(BLOCK, seed=1)
    ticket = engine.write(extent, 0, buffer.ptr, BLOCK, "layer 5")
    start = time.monotonic()
    with pytest.raises(TransferError, match=r"'layer 5' .* not done after 0.05 s") as caught:
        engine.wait(ticket, timeout_s=0.05)
    assert time.monotonic() - start < 0.3
    assert (caught.value.path, caught.value.errno) == (str(tmp_path), errno.ETIMEDOUT)
    assert not engine.done(ticket)
    engine.wait(ticket)


def test_nothing_is_left_when_the_process_is_killed(tmp_path: Path, backend: str) -> None:
    code = f"""
    import time
    from lohan_fx.native import FileEngine, HostBuffer
    engine = FileEngine([{str(tmp_path)!r}], backend={backend!r}, block_bytes={BLOCK})
    extent = engine.allocate(4 << 20)
    buffer = HostBuffer(4 << 20)
    print("writing", flush=True)
    while True:
        engine.wait(engine.write(extent, 0, buffer.ptr, 4 << 20, "on and on"))
    """
    with subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code)],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "writing\n"
        time.sleep(0.1)
        process.kill()
        assert process.wait() == -signal.SIGKILL
    assert list(tmp_path.iterdir()) == []


def test_a_wait_ends_at_a_signal(tmp_path: Path, backend: str) -> None:
    result = run_python(
        f"""
        import os, signal, threading, time
        from lohan_fx.native import FileEngine, HostBuffer
        engine = FileEngine([{str(tmp_path)!r}], backend={backend!r}, faults={{"delay_ms": 1500}})
        extent = engine.allocate(4096)
        buffer = HostBuffer(4096)
        ticket = engine.write(extent, 0, buffer.ptr, 4096, "slow")
        signal.signal(signal.SIGINT, signal.default_int_handler)  # what is started with & ignores it
        threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGINT)).start()
        try:
            engine.wait(ticket)
        except KeyboardInterrupt:
            print("interrupted", engine.done(ticket))
        """
    )
    assert result.stdout.strip() == "interrupted False", result.stderr


def test_closing_waits_for_what_is_in_flight(make_engine) -> None:
    engine = make_engine(queue_depth=1, faults={"delay_ms": 20})
    extent = engine.allocate(BLOCK)
    buffer, _ = buffer_of(BLOCK, seed=1)
    tickets = [engine.write(extent, 0, buffer.ptr, BLOCK, "last words") for _ in range(5)]
    engine.close()
    assert all(engine.done(ticket) for ticket in tickets)
    engine.close()
    with pytest.raises(TransferError, match="closed"):
        engine.allocate(BLOCK)


def test_a_forked_child_can_drop_the_engine(tmp_path: Path, backend: str) -> None:
    result = run_python(
        f"""
        import os
        from lohan_fx.native import FileEngine, HostBuffer
        engine = FileEngine([{str(tmp_path)!r}], backend={backend!r})
        child = os.fork()
        if child == 0:
            del engine
            os._exit(7)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
        extent = engine.allocate(4096)
        buffer = HostBuffer(4096)
        engine.wait(engine.write(extent, 0, buffer.ptr, 4096, "after the fork"))
        """
    )
    assert result.stdout.strip() == "7", result.stderr
    assert result.returncode == 0


# Wrong calls


def test_a_request_past_its_extent_is_refused(make_engine) -> None:
    engine = make_engine()
    extent = engine.allocate(BLOCK)
    buffer, _ = buffer_of(2 * BLOCK)
    with pytest.raises(ValueError, match=r"'too long' .* ends past its extent"):
        engine.read(extent, PAGE, buffer.ptr, BLOCK, "too long")
    with pytest.raises(ValueError, match="multiples of 4096"):
        engine.read(extent, 0, buffer.ptr + 1, PAGE, "crooked")
    with pytest.raises(ValueError, match="does not exist"):
        engine.read(extent + 1, 0, buffer.ptr, PAGE, "nowhere")
    with pytest.raises(ValueError, match="never given out"):
        engine.done(12345)


def test_an_empty_request_is_done_at_once(make_engine) -> None:
    engine = make_engine()
    ticket = engine.read(engine.allocate(BLOCK), BLOCK, 0, 0, "nothing")
    assert engine.done(ticket)
    engine.wait(ticket)


@pytest.mark.parametrize(
    "options",
    [
        {"backend": "aio"},
        {"block_bytes": 5000},
        {"queue_depth": 0},
        {"capacities": [1, 2]},
        {"faults": {"on": "both ways"}},
        {"faults": {"gremlins": 1}},
    ],
)
def test_an_unknown_option_value_is_refused(tmp_path: Path, options: dict[str, Any]) -> None:
    with pytest.raises(ValueError):
        FileEngine([str(tmp_path)], **options)


def test_at_least_one_directory_is_needed() -> None:
    with pytest.raises(ValueError, match="at least one"):
        FileEngine([])


# Choice of backend, counters


def test_the_environment_forces_the_backend(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, backend: str
) -> None:
    monkeypatch.setenv("LOHAN_FX_IO", backend)
    assert FileEngine([str(tmp_path)]).backend == backend


def test_an_unknown_backend_in_the_environment_is_refused(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("LOHAN_FX_IO", "carrier pigeon")
    with pytest.raises(ValueError, match="LOHAN_FX_IO=carrier pigeon"):
        FileEngine([str(tmp_path)])


def test_io_uring_is_chosen_where_it_is_allowed(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv("LOHAN_FX_IO", raising=False)
    assert FileEngine([str(tmp_path)]).backend == ("threads" if REFUSAL else "io_uring")


def test_threads_are_chosen_where_io_uring_is_refused(tmp_path: Path) -> None:
    result = run_python(
        f"""
        import ctypes, struct
        from lohan_fx.errors import TransferError
        from lohan_fx.native import FileEngine
        # A seccomp filter that answers io_uring_setup (425) with EPERM.
        code = [(0x20, 0, 0, 0), (0x15, 0, 1, 425), (0x06, 0, 0, 0x50001), (0x06, 0, 0, 0x7FFF0000)]
        program = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *op) for op in code))
        filter = ctypes.create_string_buffer(struct.pack("HxxxxxxP", 4, ctypes.addressof(program)))
        libc = ctypes.CDLL(None, use_errno=True)
        assert libc.prctl(38, 1, 0, 0, 0) == 0
        assert libc.prctl(22, 2, filter, 0, 0) == 0, ctypes.get_errno()
        print(FileEngine([{str(tmp_path)!r}]).backend)
        try:
            FileEngine([{str(tmp_path)!r}], backend="io_uring")
        except TransferError as error:
            print(error.errno)
        """,
        LOHAN_FX_IO="",
    )
    assert result.stdout.split() == ["threads", str(errno.EPERM)], result.stderr


def test_bytes_and_busy_seconds_are_counted(make_engine) -> None:
    engine = make_engine(faults={"delay_ms": 10})
    write_then_read(engine, 2 * BLOCK + 1)
    assert engine.bytes_written == engine.bytes_read == 2 * BLOCK + PAGE
    assert 0.01 <= engine.read_busy_s < 5
    assert 0.01 <= engine.write_busy_s < 5


def test_the_trace_has_each_request_once(make_engine) -> None:
    before = time.monotonic()
    engine = make_engine()
    write_then_read(engine, 3 * BLOCK)
    (there, back) = engine.take_trace()
    assert (there[0], there[1], back[0], back[1]) == ("there", "ssd_write", "back", "ssd_read")
    assert before < there[2] < there[3] < back[2] < back[3] < time.monotonic()
    assert engine.take_trace() == []
