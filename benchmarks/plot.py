"""Tokens/s against batch and against GPU budget, for all systems in files of benchmarks/compare.py.

    pip install "lohan_fx[bench]"
    python benchmarks/plot.py points.jsonl --size 3b --out points.svg

Left: one GPU budget, by batch; right: one batch, by GPU budget (those with the most systems, unless
--gpu and --batch choose). Crosses at the bottom are points that ran out of memory or do not fit.
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from compare import OURS, read

Line = dict[str, Any]

NAMES = {
    OURS: "lohan_fx",
    "ds_offload": "DeepSpeed ZeRO-3 offload",
    "ds_infinity": "DeepSpeed ZeRO-Infinity",
    "ds_infinity-states": "DeepSpeed ZeRO-Infinity, parameters in DRAM",
    "fsdp2": "FSDP2 CPU offload",
    "fsdp2-compile": "FSDP2 CPU offload, compiled layers",
    "compile": "torch.compile, in memory",
    "compile-bf16": "torch.compile, in memory, bf16 states",
}
# One colour and marker a system in every plot.
STYLES = {name: (f"C{index}", "osD^vP*X"[index]) for index, name in enumerate(NAMES)}
NO_ROOM = ("out of memory", "does not fit")


def figure(
    lines: Iterable[Line],
    size: str,
    clip: float = 0.0,
    gpu_gb: float | None = None,
    batch: int | None = None,
) -> plt.Figure:
    """Both plots of the points with this size and clipping (0: none).

    Raises:
        ValueError: there is no such point.
    """
    chosen = [x for x in lines if x["size"] == size and (x["clip"] or 0.0) == clip]
    if not chosen:
        raise ValueError(f"no point has size {size} and clip {clip:g}")
    if gpu_gb is None:
        gpu_gb = _richest(chosen, _gpu, _batch)
    if batch is None:
        batch = int(_richest(chosen, _batch, _gpu))
    drawn, (left, right) = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    _draw(left, [x for x in chosen if _gpu(x) == gpu_gb], _batch, "batch")
    left.set_title(f"GPU budget {gpu_gb:g} GB")
    left.set_xscale("log", base=2)
    left.xaxis.set_major_formatter("{x:g}")
    _draw(right, [x for x in chosen if _batch(x) == batch], _gpu, "GPU budget, GB")
    right.set_title(f"batch {batch}")
    left.set_ylabel("tokens/s")
    handles = {
        label: handle
        for axes in (left, right)
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)
    }
    drawn.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=3)
    params = next((x["params"] for x in chosen if "params" in x), None)
    words = f"{size}" + (f", {params / 1e9:.2f} B parameters" if params else "")
    drawn.suptitle(f"{words}, sequences of {chosen[0]['seq']}" + (", clipping" if clip else ""))
    return drawn


def _gpu(line: Line) -> float:
    return float(line["gpu_budget_gb"])


def _batch(line: Line) -> float:
    return float(line["batch"])


def _richest(
    lines: Sequence[Line], fixed: Callable[[Line], float], free: Callable[[Line], float]
) -> float:
    """The value of `fixed` with most points over `free`, systems together; the smallest of equals."""
    seen: dict[float, set[tuple[str, float]]] = defaultdict(set)
    for line in lines:
        seen[fixed(line)].add((line["engine"], free(line)))
    return min(seen, key=lambda value: (-len(seen[value]), value))


def _draw(axes: Any, lines: Sequence[Line], x: Callable[[Line], float], label: str) -> None:
    for engine, name in NAMES.items():
        colour, marker = STYLES[engine]
        own = sorted((line for line in lines if line["engine"] == engine), key=x)
        ran = [line for line in own if "error" not in line]
        if ran:
            axes.plot(
                [x(line) for line in ran],
                [line["tokens_per_s"] for line in ran],
                color=colour,
                marker=marker,
                label=name,
                linewidth=2.5 if engine == OURS else 1.5,
            )
        no_room = [x(line) for line in own if line.get("status") in NO_ROOM]
        if no_room:
            axes.plot(no_room, [0] * len(no_room), "x", color=colour, clip_on=False, markersize=9)
    axes.set_xlabel(label)
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("files", type=Path, nargs="+", help="JSON lines of compare.py; later lines replace earlier")
    add("--out", type=Path, help=".svg, .png or .pdf; else beside the first file, .svg")
    add("--size", default="3b")
    add("--clip", type=float, default=0.0)
    add("--gpu", type=float, help="GB of the left plot")
    add("--batch", type=int, help="of the right plot")
    args = parser.parse_args(argv)
    found = {point: line for path in args.files for point, line in read(path).items()}
    try:
        drawn = figure(found.values(), args.size, args.clip, args.gpu, args.batch)
    except ValueError as error:
        parser.error(str(error))
    out = args.out or args.files[0].with_suffix(".svg")
    # The same points give the same file.
    plt.rcParams["svg.hashsalt"] = "lohan_fx"
    drawn.savefig(out, metadata={"Date": None} if out.suffix == ".svg" else None)
    print(out)


if __name__ == "__main__":
    main()
