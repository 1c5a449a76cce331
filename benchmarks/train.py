"""Time training steps of a Llama-config model under a budget; a JSON line for each setting.

    python benchmarks/train.py --size 3b --batch 8 --budget "gpu=24GB, dram=100GB"
    python benchmarks/train.py --size 3b --batch 8 32 --clip 0 1 --engine ds_offload
    python benchmarks/train.py --size 3b --batch 8 --budget gpu=78GB --engine compile --memory-fraction

One process has one engine, size and budget; several batches and clippings run one after another, a peer's
with the same model, lohan_fx's each with a new one. Keys of a line: see `measure.measure`; `setup_s` has
the seconds of the first step by phase, `error` and `status` say why a setting has no figures.

Without --memory-fraction the GPU part of a budget is what lohan_fx plans for; peers know no budget and
would take what there is. With it torch's allocator is held to the budget (what it reserves, not only
what it hands out), or to the given share of the device.
"""

from __future__ import annotations

import argparse
import gc
import importlib.metadata
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import measure
import models
import peers
import psutil
import torch

from lohan_fx import Budget, InfeasiblePlan
from lohan_fx.hardware import default_file
from lohan_fx.tracing import summary

OURS = "lohan_fx"


class LohanFx:
    """The model under the budget; see measure.Engine."""

    overlaps = True

    def __init__(self, args: argparse.Namespace, device: torch.device, clip: float | None) -> None:
        import lohan_fx

        model = models.build(args.size, args.seq, torch.bfloat16)
        self.num_params = models.num_params(model)
        self.args = args
        self.model: Any = lohan_fx.compile(
            model,
            args.budget,
            device=device,
            overlap=args.overlap,
            policy=args.policy,
            lowering=args.lowering,
            hardware=args.hardware,
            plan=args.plan,
            **({"pin": dict(word.rsplit("=", 1) for word in args.pin)} if args.pin else {}),
        )
        self.optimizer: Any = lohan_fx.AdamW(
            self.model.parameters(), lr=peers.LEARNING_RATE, max_grad_norm=clip
        )

    def forward(self, tokens_BS: torch.Tensor) -> torch.Tensor:
        loss: torch.Tensor = self.model(input_ids=tokens_BS, labels=tokens_BS).loss
        return loss

    def backward(self, loss: torch.Tensor) -> None:
        loss.backward()

    def step(self) -> None:
        self.optimizer.step()
        self.optimizer.zero_grad()

    def drain(self) -> None:
        self.model._lohan.runtime.drain()

    def moved_bytes(self) -> dict[str, int]:
        return dict(self.model._lohan.stats().moved_bytes)

    def trace(self, steps: Callable[[], None]) -> dict[str, Any]:
        """What the runtime's own record says of `steps`; see lohan_fx.tracing.summary."""
        with self.model.trace(self.args.trace) as trace:
            steps()
        found = summary(trace, self.model.plan)
        return json.loads(json.dumps(found), parse_float=lambda text: round(float(text), 4))

    def facts(self) -> dict[str, Any]:
        stats, plan = self.model._lohan.stats(), self.model.plan
        predicted = plan.predicted
        if self.args.report:
            print(self.model.report())
        if self.args.dump:
            with open(self.args.dump, "w", encoding="utf-8") as file:
                file.write(plan.to_json())
        return {
            "setup_s": {what: round(s, 2) for what, s in self.model._lohan.phases.seconds.items()},
            "peak_gb": {t: round(stats.peak_bytes[t] / 1e9, 3) for t in ("gpu", "dram", "ssd")},
            "stall_s": {what: round(s, 3) for what, s in stats.stall_s.items()},
            "overlap": plan.overlap,
            "grad_norm": self.optimizer.last_grad_norm,
            "updates": {
                what: int(stats.updates[what])
                for what in ("made_ahead", "made_in_vain", "streamed")
            },
            "predicted": {
                "step_s": round(predicted.step_s, 4),
                "bound_s": round(predicted.bound_s, 4),
                "bottleneck": predicted.bottleneck,
                "peak_gb": {k: round(v / 1e9, 3) for k, v in predicted.peak_bytes.items()},
                "lane_busy_s": {k: round(v, 4) for k, v in predicted.lane_busy_s.items()},
            },
        }

    def close(self) -> None:
        self.model.close()


def parser() -> argparse.ArgumentParser:
    found = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = found.add_argument
    add("--size", choices=models.SIZES, default="3b")
    add("--batch", type=int, nargs="+", default=[8])
    add("--seq", type=int, default=1024)
    add("--steps", type=int, default=5, help="timed steps, after two others")
    add("--budget", default="gpu=24GB, dram=100GB")
    add("--engine", choices=(OURS, *peers.ENGINES), default=OURS)
    add("--clip", type=float, nargs="+", default=[0.0], help="bounds on the norm; 0 is none")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--lowering", choices=("inductor", "aten"), default="inductor")
    add("--memory-fraction", nargs="?", const="budget", metavar="SHARE", help="see above")
    add("--lanes", action="store_true", help="profile last steps: lanes, idle share of the GPU")
    add("--warm-start", action="store_true", help="then start again in a new process, caches warm")
    add("--fresh-caches", action="store_true", help="begin with no cache of compiled code")
    ours = found.add_argument_group(OURS).add_argument
    ours("--overlap", default="auto")
    ours("--policy", default="optimal")
    ours("--hardware", help="a preset or a file of rates to plan with")
    ours("--plan", help="replay this plan")
    ours("--pin", nargs="+", default=[], metavar="PATTERN=PLACE", help='as "state:*=ssd"')
    ours("--dump", help="write the plan here")
    ours("--trace", help="write the trace of --lanes here (python -m lohan_fx.view reads it)")
    ours("--report", action="store_true")
    others = found.add_argument_group("peers").add_argument
    others("--checkpoint-layers", type=int, help="in memory; else by an estimate of what fits")
    others("--ssd", help="directory of ds_infinity; else the first of the budget")
    return found


def main(argv: Sequence[str] | None = None) -> int:
    args = parser().parse_args(argv)
    device = torch.device(args.device)
    cuda = device.type == "cuda"
    if cuda and device.index is None:
        device = torch.device("cuda", torch.cuda.current_device())
    budget = Budget.parse(args.budget)
    args.gpu_bytes = budget.gpu
    if args.ssd is None:
        args.ssd = next((str(path) for path, _ in budget.ssd or () if path), tempfile.gettempdir())
    if args.fresh_caches:
        _fresh_caches()
    fraction = _hold_memory(args.memory_fraction, budget.gpu, device)
    about = {
        "engine": args.engine,
        "size": args.size,
        "seq": args.seq,
        "budget": args.budget,
        "gpu_budget_gb": budget.gpu / 1e9,
        "memory_fraction": fraction,
        "overlap": args.overlap if args.engine == OURS else None,
        "policy": args.policy if args.engine == OURS else None,
        "device": torch.cuda.get_device_name(device) if cuda else "cpu",
        "torch": torch.__version__,
        "transformers": importlib.metadata.version("transformers"),
        "allocator": os.environ.get("PYTORCH_ALLOC_CONF")
        or os.environ.get("PYTORCH_CUDA_ALLOC_CONF"),
        "start_s": round(time.time() - psutil.Process().create_time(), 2),
    }
    failed = False
    engine: Any = None
    for batch in args.batch:
        for clip in args.clip:
            line = dict(about, batch=batch, clip=clip or None)
            try:
                if engine is None or args.engine == OURS:
                    engine = _closed(engine, cuda)
                    if cuda:
                        # Of the setting before: what is not given back counts against this one.
                        line["gpu_left_gb"] = torch.cuda.memory_allocated(device) / 1e9
                    start = time.perf_counter()
                    engine = _engine(args, device, clip or None)
                    line["build_s"] = round(time.perf_counter() - start, 2)
                line["params"] = engine.num_params
                shape = measure.Shape(batch, args.seq, args.steps, args.lanes)
                line |= _measured(engine, shape, device, clip or None)
            except Exception as error:
                failed = True
                line |= {"status": _status(error), "error": _words(error)}
                print(f"{type(error).__name__}: {line['error']}", file=sys.stderr)
            else:
                _add_ratios(line)
                if args.warm_start:
                    # The device is free again before the other process wants it.
                    engine = _closed(engine, cuda)
                    line["warm"] = _warm_start(argv, batch, clip)
            print(json.dumps(line), flush=True)
            if "error" in line and args.engine != OURS:
                return 1  # a peer that has failed once may be in any state
    _closed(engine, cuda)
    return int(failed)


def _engine(args: argparse.Namespace, device: torch.device, clip: float | None) -> Any:
    if args.engine == OURS:
        return LohanFx(args, device, clip)
    return peers.ENGINES[args.engine](args, device)


def _closed(engine: Any, cuda: bool) -> None:
    """Close an engine; whoever holds it lets go of it with the result, None."""
    if engine is None:
        return
    engine.close()
    engine.__dict__.clear()
    torch._dynamo.reset()
    gc.collect()
    if cuda:
        torch.cuda.empty_cache()


def _measured(
    engine: Any, shape: measure.Shape, device: torch.device, clip: float | None
) -> dict[str, Any]:
    if isinstance(engine, peers.Peer):
        engine.set(shape.batch, clip)
    tries = 0
    while True:
        try:
            return measure.measure(engine, shape, device) | ({"retries": tries} if tries else {})
        except torch.OutOfMemoryError:
            if not isinstance(engine, peers.Peer) or not engine.save_memory():
                raise
        tries += 1
        print("out of memory; once more with more layers checkpointed", file=sys.stderr)


def _add_ratios(line: dict[str, Any]) -> None:
    if "setup_s" in line:
        # Dynamo, AOTAutograd, and what else is not timed by itself.
        timed = sum(s for what, s in line["setup_s"].items() if "beside" not in what)
        rest = line["first_step_s"] - line["step_s"] - timed
        line["setup_s"]["rest"] = round(max(0.0, rest), 2)
    if "predicted" in line:
        line["bound_ratio"] = round(line["step_s"] / line["predicted"]["bound_s"], 3)


def _status(error: Exception) -> str:
    if isinstance(error, peers.NotInstalled):
        return "not installed"
    if isinstance(error, torch.OutOfMemoryError) or "out of memory" in str(error):
        return "out of memory"
    return "does not fit" if isinstance(error, InfeasiblePlan) else "failed"


def _words(error: Exception) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__


def _hold_memory(wanted: str | None, gpu_bytes: int, device: torch.device) -> float | None:
    """Hold torch's allocator to a share of the device, and say which."""
    if wanted is None or device.type != "cuda":
        return None
    total = torch.cuda.get_device_properties(device).total_memory
    share = gpu_bytes / total if wanted == "budget" else float(wanted)
    if not 0 < share <= 1:
        raise SystemExit(f"--memory-fraction: {share:.3f} of {device} is not between 0 and 1")
    torch.cuda.set_per_process_memory_fraction(share, device)
    return round(share, 4)


def _fresh_caches() -> None:
    """Compiled code of this process and its children goes to a new folder; a machine's rates stay."""
    folder = Path(tempfile.mkdtemp(prefix="caches-"))
    for variable in ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR", "LOHAN_FX_CACHE"):
        (folder / variable).mkdir()
    rates = default_file()
    if rates.exists():
        shutil.copy(rates, folder / "LOHAN_FX_CACHE" / rates.name)
    for path in folder.iterdir():
        os.environ[path.name] = str(path)


def _warm_start(argv: Sequence[str] | None, batch: int, clip: float) -> dict[str, Any]:
    """The first step of the same setting in a new process, which finds what this one has compiled."""
    once = ("--warm-start", "--fresh-caches", "--lanes", "--report")
    words = [word for word in (sys.argv[1:] if argv is None else argv) if word not in once]
    words += ["--batch", str(batch), "--clip", str(clip), "--steps", "1"]
    begun = time.perf_counter()
    done = subprocess.run(
        [sys.executable, os.path.abspath(__file__), *words],
        stdout=subprocess.PIPE,
        text=True,
        check=False,
    )
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    if not lines:
        return {"error": f"exit code {done.returncode} and no line"}
    found = json.loads(lines[-1])
    wanted = ("start_s", "build_s", "first_step_s", "setup_s", "error")
    return {key: found[key] for key in wanted if key in found} | {
        "process_s": round(time.perf_counter() - begun, 1)
    }


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    # Threads of peers may keep an interpreter from ending.
    os._exit(code)
