"""File engine against a plain loop: several Python threads with O_DIRECT preadv and pwritev.

    python benchmarks/files.py /mnt/nvme0 --gib 8
    python benchmarks/files.py /mnt/nvme0 /mnt/nvme1 --gib 16 --threads 8

Both move the same bytes in the same block size, from and to huge pages. --small-pages gives the plain
loop memory in 4 KiB pages instead, as mmap or bytearray would: what the drive must then be told, piece
by piece, can cost more than half of its speed. The plain loop is tried with each number of threads and
its best one counts; every figure is the median of --rounds, taken in turns so that a drive that gets
slower (or a busy neighbour) meets both. Prints a table and, last, one line of JSON. GB = 1e9 bytes.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import threading
import time
from collections.abc import Callable
from typing import Any

from lohan_fx.native import FileEngine, HostBuffer

MIB = 1 << 20


class PlainLoop:
    """One file in each directory, preallocated; each thread moves every num_threads-th block."""

    def __init__(
        self, directories: list[str], total: int, block: int, most_threads: int, huge_pages: bool
    ) -> None:
        self.total, self.block = total, block
        self.buffers = [HostBuffer(block, huge_pages=huge_pages) for _ in range(most_threads)]
        flags = os.O_TMPFILE | os.O_RDWR | os.O_DIRECT
        self.files = [os.open(directory, flags, 0o600) for directory in directories]
        for file in self.files:
            os.posix_fallocate(file, 0, -(-total // len(self.files) // block) * block)

    def run(self, write: bool, num_threads: int) -> float:
        """Seconds for all bytes."""
        move = os.pwritev if write else os.preadv

        def work(first: int) -> None:
            memory = memoryview(self.buffers[first])
            for i in range(first, self.total // self.block, num_threads):
                file = self.files[i % len(self.files)]
                if move(file, [memory], i // len(self.files) * self.block) != self.block:
                    raise OSError(f"short transfer of block {i}")

        threads = [threading.Thread(target=work, args=(i,)) for i in range(num_threads)]
        start = time.perf_counter()
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return time.perf_counter() - start

    def close(self) -> None:
        for file in self.files:
            os.close(file)


class Engine:
    """Requests of request_bytes, two buffers' worth on their way, as a training step has them."""

    def __init__(self, directories: list[str], total: int, request: int, **options: Any) -> None:
        self.total, self.request = total, request
        self.engine = FileEngine(directories, **options)
        self.extent = self.engine.allocate(total)
        self.buffers = [HostBuffer(request) for _ in range(2)]

    def run(self, write: bool) -> float:
        """Seconds for all bytes."""
        start = time.perf_counter()
        submit = self.engine.write if write else self.engine.read
        tickets = [0, 0]
        for i, offset in enumerate(range(0, self.total, self.request)):
            self.engine.wait(tickets[i % 2])
            size = min(self.request, self.total - offset)
            pointer = self.buffers[i % 2].ptr
            tickets[i % 2] = submit(self.extent, offset, pointer, size, f"part {i}")
        for ticket in tickets:
            self.engine.wait(ticket)
        return time.perf_counter() - start

    def close(self) -> None:
        self.engine.close()


def measure(args: argparse.Namespace) -> dict[str, Any]:
    block, request = args.block_mib * MIB, args.request_mib * MIB
    total = int(args.gib * 1024 * MIB) // block * block
    plain = PlainLoop(args.directories, total, block, max(args.threads), not args.small_pages)
    engines = {
        backend: Engine(
            args.directories,
            total,
            request,
            backend=backend,
            block_bytes=block,
            queue_depth=args.depth,
        )
        for backend in args.backends
    }
    runs: dict[str, Callable[[bool], float]] = {
        f"plain loop, {n} threads": lambda write, n=n: plain.run(write, n) for n in args.threads
    } | {f"engine, {backend}": engine.run for backend, engine in engines.items()}
    for run in runs.values():
        run(True)  # the first write of a preallocated block is another thing
    seconds: dict[tuple[str, str], list[float]] = {}
    for _ in range(args.rounds):
        for direction in ("write", "read"):
            for name, run in runs.items():
                seconds.setdefault((direction, name), []).append(run(direction == "write"))
    for thing in (plain, *engines.values()):
        thing.close()
    rates = {key: total / statistics.median(values) / 1e9 for key, values in seconds.items()}

    print(f"{'':28}{'write':>10}{'read':>10}   GB/s, median of {args.rounds}")
    for name in runs:
        print(f"{name:28}{rates['write', name]:10.3f}{rates['read', name]:10.3f}")
    result: dict[str, Any] = {
        "benchmark": "files",
        "machine": f"{platform.machine()}, {os.cpu_count()} CPUs, Linux {platform.release()}",
        "directories": len(args.directories),
        "bytes": total,
        "block_bytes": block,
        "request_bytes": request,
        "queue_depth": args.depth,
        "rounds": args.rounds,
        "plain_small_pages": args.small_pages,
    }
    for direction in ("write", "read"):
        best = max(rates[direction, name] for name in runs if name.startswith("plain"))
        result[f"plain_{direction}_gb_per_s"] = round(best, 3)
        for backend in args.backends:
            rate = rates[direction, f"engine, {backend}"]
            result[f"{backend}_{direction}_gb_per_s"] = round(rate, 3)
            result[f"{backend}_{direction}_of_plain"] = round(rate / best, 3)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("directories", nargs="+", help="on the drives to be measured")
    parser.add_argument("--gib", type=float, default=4, help="moved in each run")
    parser.add_argument("--block-mib", type=int, default=8)
    parser.add_argument("--request-mib", type=int, default=256)
    parser.add_argument("--depth", type=int, default=32, help="transfers in flight per directory")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--small-pages", action="store_true", help="for the plain loop only")
    parser.add_argument("--backends", nargs="+", default=["io_uring", "threads"])
    parser.add_argument("--rounds", type=int, default=3)
    print(json.dumps(measure(parser.parse_args())))


if __name__ == "__main__":
    main()
