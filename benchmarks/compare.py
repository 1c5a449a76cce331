"""lohan_fx and peers side by side: the same model, batch, budget and clipping, one after another.

    python benchmarks/compare.py points.jsonl --size 3b --batch 8 32 --budget "gpu=24GB, dram=100GB" \\
        --engines lohan_fx ds_offload fsdp2 --clip 0 1 --table points.md
    python benchmarks/plot.py points.jsonl

Every engine, budget, batch and clipping is a point, and a line of benchmarks/train.py in the file.
Points that the file has are left out, so that a comparison goes on where it was cut off. A point of
lohan_fx has a process of its own; a peer's points share one, as its start takes longest (`--shared`). A
process that takes longer than its points may is killed, and the point it was at has `status` "timed out".
torch's allocator is held to the GPU budget in all of them. Words that are not known here go to train.py:
`--steps 3 --lanes`.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import selectors
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from lohan_fx import Budget

TRAIN = Path(__file__).with_name("train.py")
OURS = "lohan_fx"
# Engines that keep every state on the GPU are no peers of one that need not.
IN_MEMORY = ("compile", "compile-bf16")
# A process cannot end sooner than this, so none is started with less time left.
LEAST_S = 20.0


@dataclass(frozen=True, slots=True)
class Point:
    engine: str
    size: str
    seq: int
    budget: str
    batch: int
    clip: float  # 0: none

    @classmethod
    def of(cls, line: dict[str, Any]) -> Point:
        return cls(
            line["engine"],
            line["size"],
            line["seq"],
            line["budget"],
            line["batch"],
            float(line["clip"] or 0),
        )

    @property
    def setting(self) -> tuple[Any, ...]:
        """What points must share to be compared."""
        return self.size, self.seq, self.budget, self.batch, self.clip

    def words(self) -> dict[str, Any]:
        """The keys of a line that say which point it is."""
        return {
            "engine": self.engine,
            "size": self.size,
            "seq": self.seq,
            "budget": self.budget,
            "gpu_budget_gb": Budget.parse(self.budget).gpu / 1e9,
            "batch": self.batch,
            "clip": self.clip or None,
        }


def read(path: Path) -> dict[Point, dict[str, Any]]:
    """The last line of each point in the file; a line cut short is left out."""
    found: dict[Point, dict[str, Any]] = {}
    if path.exists():
        for text in path.read_text(encoding="utf-8").splitlines():
            try:
                line = json.loads(text)
            except json.JSONDecodeError:
                continue
            found[Point.of(line)] = line
    return found


def jobs(points: Iterable[Point], shared: str = "peers") -> list[list[Point]]:
    """Points by process, in order. All of one process differ in batch and clipping alone.

    `shared`: whose points share one: "peers", "all" or "none".
    """
    made: dict[Any, list[Point]] = {}
    for index, point in enumerate(points):
        alone = shared == "none" or (shared == "peers" and point.engine == OURS)
        key = index if alone else (point.engine, point.size, point.seq, point.budget)
        made.setdefault(key, []).append(point)
    return list(made.values())


def run(
    job: Sequence[Point], extra: Sequence[str], limit_s: float, train: Path = TRAIN
) -> Iterator[dict[str, Any]]:
    """Lines of a process over the job's points, as they come.

    After a failure the last one has `status` and `error`, and points behind it have none.
    """
    left = list(job)
    first = job[0]
    # One process takes the product of what it is given.
    batches = list(dict.fromkeys(point.batch for point in job))
    clips = list(dict.fromkeys(point.clip for point in job))
    if len(batches) * len(clips) != len(job):
        batches, clips, left = [first.batch], [first.clip], [first]
    command = [
        *(sys.executable, str(train), "--engine", first.engine, "--size", first.size),
        *("--seq", str(first.seq), "--budget", first.budget),
        *("--batch", *map(str, batches), "--clip", *map(str, clips), *extra),
    ]
    start = time.monotonic()
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as errors:
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=errors, text=True, start_new_session=True
        )
        assert process.stdout is not None
        timed_out = True  # until it has said all
        try:
            for text in _lines_until(process.stdout, start + limit_s):
                if not text.startswith("{"):
                    print(f"    {text.rstrip()}", flush=True)
                    continue
                line = json.loads(text)
                left.remove(Point.of(line))
                yield line | {"process_s": round(time.monotonic() - start, 1)}
                if "error" in line:
                    timed_out = False
                    return
            timed_out = time.monotonic() >= start + limit_s
        finally:
            # To give back 100 GB of pinned memory takes seconds.
            _kill(process, 0.0 if timed_out else 30.0)
        if not left:
            return
        seconds = round(time.monotonic() - start, 1)
        about = left[0].words() | {"process_s": seconds}
        if timed_out:
            yield about | {"status": "timed out", "error": f"still running after {seconds:.0f} s"}
            return
        errors.seek(0)
        words = [text for text in errors.read().splitlines() if text.strip()]
        code = process.returncode
        why = f"ended with code {code}" + (f": {words[-1].strip()}" if words else "")
        # Where DRAM runs out the kernel kills the largest process.
        status = "out of memory" if code == -signal.SIGKILL else "failed"
        yield about | {"status": status, "error": why[:300]}


def _lines_until(stream: IO[str], deadline: float) -> Iterator[str]:
    """Lines of a pipe; ends where it does, or at the deadline."""
    descriptor, rest = stream.fileno(), b""
    with selectors.DefaultSelector() as selector:
        selector.register(descriptor, selectors.EVENT_READ)
        while (seconds := deadline - time.monotonic()) > 0:
            if not selector.select(seconds):
                return
            piece = os.read(descriptor, 1 << 16)
            if not piece:
                return
            *whole, rest = (rest + piece).split(b"\n")
            yield from (text.decode(errors="replace") for text in whole)


def _kill(process: subprocess.Popen[str], patience_s: float) -> None:
    """End a process and its children, if it does not end by itself."""
    try:
        process.wait(timeout=patience_s)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def compare(
    points: Sequence[Point],
    out: Path,
    extra: Sequence[str] = (),
    *,
    limit_s: float = 300.0,
    deadline_s: float = float("inf"),
    shared: str = "peers",
    again: bool = False,
    train: Path = TRAIN,
) -> None:
    """Run the points that `out` lacks, and append their lines to it.

    Args:
        limit_s: seconds for a point; a process has the sum of its points'.
        deadline_s: seconds for all; nothing is run after them, nor said of what was not.
        again: run points anew that have failed.
    """
    end = time.monotonic() + deadline_s
    while True:
        done = read(out)
        waiting = [p for p in points if p not in done or (again and "error" in done[p])]
        if not waiting or end - time.monotonic() < LEAST_S:
            return
        (job, *_) = jobs(waiting, shared)
        names = ", ".join(f"batch {p.batch} clip {p.clip:g}" for p in job)
        print(f"{job[0].engine} {job[0].size} {job[0].budget}: {names}", flush=True)
        limit = min(limit_s * len(job), end - time.monotonic())
        for line in run(job, extra, limit, train):
            if line.get("status") == "timed out" and limit < limit_s * len(job):
                print("  out of time for all points", flush=True)
                return
            with out.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
            words = line.get("error") or f"{line['tokens_per_s']:,.0f} tokens/s"
            print(f"  batch {line['batch']} clip {line['clip'] or 0:g}: {words}", flush=True)
            point = Point.of(line)
            points = [other for other in points if other != point]


def table(lines: Iterable[dict[str, Any]]) -> str:
    """Points as a Markdown table, in the order of their settings; see `best_peer` for the last column."""
    rows = sorted(lines, key=lambda line: (Point.of(line).setting, line["engine"] != OURS))
    best = best_peer(rows)
    text = [
        "| size, batch, budget | clip | system | step, s (forward / backward / optimizer) | tokens/s | "
        "model TFLOP/s | GPU peak / reserved, GB | host, GB | GPU idle | step / bound | first step, s | "
        "of the best peer |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for line in rows:
        point = Point.of(line)
        cells = [f"{point.size} {point.batch}, {point.budget}", f"{point.clip:g}", point.engine]
        if "error" in line:
            text.append(_row([*cells, line["status"]]))
            continue
        phases = " / ".join(f"{s:.2f}" for s in line["phases_s"].values())
        gpu = line["peak_gb"].get("gpu")
        peer = best.get(point.setting)
        cells += [
            f"{line['step_s']:.3f} ({phases})",
            f"{line['tokens_per_s']:,.0f}",
            f"{line['model_tflops']:.1f}",
            "-" if gpu is None else f"{gpu:.1f} / {line.get('gpu_reserved_gb', 0):.1f}",
            f"{line['host_rss_gb']:.1f}",
            f"{line['gpu_idle_share']:.1%}" if "gpu_idle_share" in line else "-",
            f"{line['bound_ratio']:.2f}" if "bound_ratio" in line else "-",
            f"{line['first_step_s'] + line.get('build_s', 0):.0f}",
            f"{line['tokens_per_s'] / peer:.2f}x" if peer and point.engine == OURS else "-",
        ]
        text.append(_row(cells))
    return "\n".join(text) + "\n"


def best_peer(lines: Iterable[dict[str, Any]]) -> dict[tuple[Any, ...], float]:
    """Most tokens/s of any peer that offloads, by setting."""
    best: dict[tuple[Any, ...], float] = {}
    for line in lines:
        point = Point.of(line)
        if point.engine not in (OURS, *IN_MEMORY) and "error" not in line:
            rate = line["tokens_per_s"]
            best[point.setting] = max(rate, best.get(point.setting, 0.0))
    return best


def _row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("out", type=Path, help="JSON lines; points that it has are left out")
    add("--engines", nargs="+", default=[OURS, "ds_offload", "fsdp2"])
    add("--size", nargs="+", default=["3b"])
    add("--seq", type=int, default=1024)
    add("--batch", type=int, nargs="+", default=[8, 32])
    add("--budget", nargs="+", default=["gpu=24GB, dram=100GB"])
    add("--clip", type=float, nargs="+", default=[0.0])
    add("--limit", type=float, default=300.0, help="seconds for a point")
    add("--deadline", type=float, default=float("inf"), help="seconds for all of them")
    add("--shared", choices=("peers", "all", "none"), default="peers", help="who shares a process")
    add("--again", action="store_true", help="also points that have failed")
    add("--table", type=Path, help="write all of the file here, as Markdown")
    add("--no-hold", action="store_true", help="leave torch's allocator unlimited")
    args, extra = parser.parse_known_args(argv)
    points = [
        Point(engine, size, args.seq, budget, batch, clip)
        for size, budget, engine, batch, clip in itertools.product(
            args.size, args.budget, args.engines, args.batch, args.clip
        )
    ]
    extra = [*extra, *([] if args.no_hold else ["--memory-fraction"])]
    compare(
        points,
        args.out,
        extra,
        limit_s=args.limit,
        deadline_s=args.deadline,
        shared=args.shared,
        again=args.again,
    )
    text = table(read(args.out).values())
    if args.table:
        args.table.write_text(text, encoding="utf-8")
    print(text, end="")


if __name__ == "__main__":
    main()
