"""Host buffers, parallel copies, and how much memory is left."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
import torch

from lohan_fx import native
from lohan_fx.native import HostBuffer, host_available_bytes

MIB = 1 << 20


def smaps_of(address: int) -> dict[str, str]:
    """The lines of /proc/self/smaps about the mapping that the address is in."""
    found: dict[str, str] = {}
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        head = line.split()[0]
        if not head.endswith(":"):
            first, last = (int(part, 16) for part in head.split("-"))
            inside = first <= address < last
        elif inside:
            found[head[:-1]] = line.split(":", 1)[1].strip()
    return found


def run_python(code: str) -> str:
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    ).stdout.strip()


@pytest.mark.parametrize(
    ("asked", "got"), [(1, 4096), (4096, 4096), (4097, 8192), (3 * MIB + 1, 3 * MIB + 4096)]
)
def test_a_buffer_is_rounded_up_to_pages_and_no_further(asked: int, got: int) -> None:
    buffer = HostBuffer(asked)
    assert buffer.nbytes == len(memoryview(buffer)) == got
    assert buffer.ptr % 4096 == 0


def test_a_tensor_over_a_buffer_is_the_same_memory_and_keeps_it_alive() -> None:
    buffer = HostBuffer(MIB)
    tensor = torch.frombuffer(buffer, dtype=torch.uint8)
    assert tensor.data_ptr() == buffer.ptr
    assert tensor.numel() == MIB
    del buffer
    gc.collect()
    tensor.fill_(5)
    assert int(tensor.sum()) == 5 * MIB


def test_every_page_is_there_from_the_start() -> None:
    buffer = HostBuffer(5 * MIB, huge_pages=False)
    assert int(smaps_of(buffer.ptr)["Rss"].split()[0]) * 1024 >= 5 * MIB


def test_a_new_buffer_is_zero() -> None:
    assert not np.frombuffer(HostBuffer(130 * MIB, threads=2), dtype=np.uint8).any()


def test_a_large_buffer_asks_for_huge_pages_at_their_boundary() -> None:
    buffer = HostBuffer(5 * MIB)
    assert buffer.ptr % (2 * MIB) == 0
    assert "hg" in smaps_of(buffer.ptr)["VmFlags"].split()


def test_huge_pages_can_be_declined() -> None:
    buffer = HostBuffer(5 * MIB, huge_pages=False)
    assert "hg" not in smaps_of(buffer.ptr)["VmFlags"].split()


def test_the_memory_goes_with_the_last_reference() -> None:
    buffer = HostBuffer(64 * MIB)
    address = buffer.ptr
    del buffer
    gc.collect()
    assert int(smaps_of(address).get("Rss", "0 kB").split()[0]) * 1024 < 64 * MIB


def test_a_forked_child_does_not_have_the_memory() -> None:
    answer = run_python(
        """
        import os
        from lohan_fx.native import HostBuffer
        buffer = HostBuffer(8 << 20)
        def mapped():
            spans = [line.split()[0].split("-") for line in open("/proc/self/maps")]
            return any(int(a, 16) <= buffer.ptr < int(b, 16) for a, b in spans)
        assert mapped()
        child = os.fork()
        if child == 0:
            os._exit(10 + mapped())
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
        """
    )
    assert answer == "10"


@pytest.mark.parametrize("num_bytes", [1 << 50, (1 << 64) - 1])
def test_more_than_the_host_has_is_refused_with_the_bytes(num_bytes: int) -> None:
    with pytest.raises(MemoryError, match=f"{num_bytes} bytes"):
        HostBuffer(num_bytes)


def test_an_address_space_limit_is_a_memory_error() -> None:
    answer = run_python(
        """
        import resource
        from lohan_fx.native import HostBuffer
        resource.setrlimit(resource.RLIMIT_AS, (1 << 30, 1 << 30))
        try:
            HostBuffer(1 << 30)
        except MemoryError as error:
            print(error)
        """
    )
    assert answer.startswith(f"cannot get {1 << 30} bytes of host memory: ")


def test_an_empty_buffer_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one byte"):
        HostBuffer(0)


@pytest.mark.parametrize("num_bytes", [0, 1, 4095, 9 * MIB + 3])
@pytest.mark.parametrize("threads", [0, 1, 3])
def test_a_copy_moves_every_byte_and_no_more(num_bytes: int, threads: int) -> None:
    source = np.random.default_rng(3).integers(0, 256, num_bytes + 8, dtype=np.uint8)
    target = np.zeros_like(source)
    native.copy(target.ctypes.data, source.ctypes.data, num_bytes, threads=threads)
    assert np.array_equal(target[:num_bytes], source[:num_bytes])
    assert not target[num_bytes:].any()


def test_a_copy_onto_itself_is_refused() -> None:
    buffer = HostBuffer(8192)
    with pytest.raises(ValueError, match="overlap"):
        native.copy(buffer.ptr, buffer.ptr + 4096, 5000)


# What is left of the host's memory. Each test draws the files that the kernel would show.


def machine(root: Path, files: dict[str, str]) -> str:
    for path, text in ({"proc/meminfo": "MemAvailable: 1000 kB\n"} | files).items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_text(text)
    return str(root)


def test_a_machine_without_groups_has_what_is_available(tmp_path: Path) -> None:
    assert host_available_bytes(machine(tmp_path, {})) == 1000 * 1024


def test_a_version_2_group_leaves_its_limit_less_what_cannot_be_dropped(tmp_path: Path) -> None:
    root = machine(
        tmp_path,
        {
            "proc/self/cgroup": "0::/job\n",
            "proc/self/mountinfo": "30 23 0:26 / /sys/fs/cgroup rw - cgroup2 cgroup2 rw\n",
            "sys/fs/cgroup/job/memory.max": "500000\n",
            "sys/fs/cgroup/job/memory.current": "300000\n",
            "sys/fs/cgroup/job/memory.stat": "anon 20\ninactive_file 60000\nactive_file 40000\n",
        },
    )
    assert host_available_bytes(root) == 300000


def test_a_group_above_may_be_the_tighter_one(tmp_path: Path) -> None:
    root = machine(
        tmp_path,
        {
            "proc/self/cgroup": "0::/a/b\n",
            "proc/self/mountinfo": "30 23 0:26 / /sys/fs/cgroup rw - cgroup2 cgroup2 rw\n",
            "sys/fs/cgroup/a/memory.max": "1000\n",
            "sys/fs/cgroup/a/memory.current": "900\n",
            "sys/fs/cgroup/a/b/memory.max": "max\n",
            "sys/fs/cgroup/a/b/memory.current": "800\n",
        },
    )
    assert host_available_bytes(root) == 100


def test_a_version_1_group_seen_from_inside_a_container_counts(tmp_path: Path) -> None:
    root = machine(
        tmp_path,
        {
            "proc/self/cgroup": "9:cpu:/docker/x\n7:memory:/docker/x\n",
            "proc/self/mountinfo": (
                "31 23 0:27 /docker/x /cg/cpu rw - cgroup cgroup rw,cpu\n"
                "32 23 0:28 /docker/x /cg/memory rw - cgroup cgroup rw,memory\n"
            ),
            "cg/memory/memory.limit_in_bytes": "5000\n",
            "cg/memory/memory.usage_in_bytes": "4000\n",
            "cg/memory/memory.stat": "total_inactive_file 500\n",
        },
    )
    assert host_available_bytes(root) == 1500


def test_a_group_over_its_limit_leaves_nothing(tmp_path: Path) -> None:
    root = machine(
        tmp_path,
        {
            "proc/self/cgroup": "0::/\n",
            "proc/self/mountinfo": "30 23 0:26 / /sys/fs/cgroup rw - cgroup2 cgroup2 rw\n",
            "sys/fs/cgroup/memory.max": "100\n",
            "sys/fs/cgroup/memory.current": "200\n",
        },
    )
    assert host_available_bytes(root) == 0


def test_this_machine_has_some_memory_left() -> None:
    assert host_available_bytes() > MIB
