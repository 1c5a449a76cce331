"""Time training steps of a Llama-config model under a budget; one JSON line at the end.

    python benchmarks/train.py --size 3b --batch 8 --seq 1024 --budget "gpu=24GB, dram=100GB"
    python benchmarks/train.py --size 3b --batch 8 --engine compile     # torch.compile, in memory

Model FLOPs are 6 x parameters x tokens. Peaks are torch.cuda.max_memory_allocated over the timed
steps, and the runtime's own counts elsewhere.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

# name: hidden, layers, heads, intermediate
SIZES = {
    "tiny": (64, 2, 4, 176),
    "125m": (768, 12, 12, 2048),
    "1b": (2048, 24, 16, 5504),
    "wide": (4096, 8, 32, 11008),
    "3b": (3072, 28, 24, 8192),
    "7b": (4096, 32, 32, 11008),
    "13b": (5120, 40, 40, 13824),
}


def build(size: str, seq: int, dtype: torch.dtype) -> LlamaForCausalLM:
    hidden, layers, heads, intermediate = SIZES[size]
    config = LlamaConfig(
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        intermediate_size=intermediate,
        vocab_size=32000,
        max_position_embeddings=max(seq, 1024),
        use_cache=False,
        attn_implementation="sdpa",
    )
    previous = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device("meta"):
            model = LlamaForCausalLM(config)
    finally:
        torch.set_default_dtype(previous)
    model.to_empty(device="cpu")
    generator = torch.Generator().manual_seed(0)
    for name, param in model.named_parameters():
        with torch.no_grad():
            if "norm" in name:
                param.fill_(1.0)
            elif param.numel() > 1 << 20:
                # One block of random numbers, repeated: initialising billions takes minutes.
                block = torch.empty(1 << 20).normal_(0.0, 0.02, generator=generator).to(dtype)
                flat = param.view(-1)
                for start in range(0, flat.numel(), block.numel()):
                    part = flat[start : start + block.numel()]
                    part.copy_(block[: part.numel()])
            else:
                param.normal_(0.0, 0.02, generator=generator)
    # Rotary tables are not parameters and to_empty left them unset.
    rotary = type(model.model.rotary_emb)(config)
    model.model.rotary_emb = rotary
    return model


def lanes(profiler: Any) -> dict[str, float]:
    """Seconds of one profiled step in which each lane of the GPU was busy, by union of its events."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "trace.json")
        profiler.export_chrome_trace(str(path))
        events = json.loads(path.read_text(encoding="utf-8"))["traceEvents"]
    spans: dict[str, list[tuple[float, float]]] = {}
    for event in events:
        kind, name = event.get("cat", ""), event.get("name", "")
        if kind == "kernel":
            lane = "kernels"
        elif kind == "gpu_memcpy":
            lane = next((d for d in ("HtoD", "DtoH", "DtoD") if d in name), "other copies")
        else:
            continue
        spans.setdefault(lane, []).append((event["ts"], event["ts"] + event["dur"]))
    result = {lane: round(union(found) / 1e6, 4) for lane, found in sorted(spans.items())}
    every = [span for found in spans.values() for span in found]
    if every:
        result["wall"] = round((max(e for _, e in every) - min(s for s, _ in every)) / 1e6, 4)
    return result


def union(spans: list[tuple[float, float]]) -> float:
    total, end = 0.0, float("-inf")
    for start, stop in sorted(spans):
        total += max(0.0, stop - max(start, end))
        end = max(end, stop)
    return total


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", choices=SIZES, default="3b")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--seq", type=int, default=1024)
    parser.add_argument("--steps", type=int, default=5, help="timed steps, after two others")
    parser.add_argument("--budget", default="gpu=24GB, dram=100GB")
    parser.add_argument("--engine", choices=("lohan_fx", "compile"), default="lohan_fx")
    parser.add_argument("--overlap", default="auto")
    parser.add_argument("--policy", default="optimal")
    parser.add_argument("--lowering", default="inductor")
    parser.add_argument("--max-grad-norm", type=float)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dump", help="write the plan here")
    parser.add_argument("--lanes", action="store_true", help="profile a last step by lane")
    parser.add_argument("--report", action="store_true")
    args = parser.parse_args()
    device = torch.device(args.device)
    cuda = device.type == "cuda"

    begun = time.perf_counter()
    model: Any = build(args.size, args.seq, torch.bfloat16)
    num_params = sum(p.numel() for p in model.parameters())
    built_s = time.perf_counter() - begun
    result: dict[str, Any] = {
        "engine": args.engine,
        "size": args.size,
        "params": num_params,
        "batch": args.batch,
        "seq": args.seq,
        "budget": args.budget if args.engine == "lohan_fx" else None,
        "overlap": args.overlap,
        "policy": args.policy,
        "max_grad_norm": args.max_grad_norm,
        "torch": torch.__version__,
        "device": torch.cuda.get_device_name(device) if cuda else "cpu",
        "build_s": round(built_s, 2),
    }
    if args.engine == "lohan_fx":
        import lohan_fx

        model = lohan_fx.compile(
            model,
            args.budget,
            device=device,
            overlap=args.overlap,
            policy=args.policy,
            lowering=args.lowering,
        )
        optimizer: Any = lohan_fx.AdamW(
            model.parameters(), lr=1e-5, max_grad_norm=args.max_grad_norm
        )
    else:
        model = model.to(device)
        model.gradient_checkpointing_enable() if args.batch * args.seq > 8192 else None
        model.train()
        model.compile()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)

    def sync() -> float:
        if cuda:
            torch.cuda.synchronize()
        return time.perf_counter()

    generator = torch.Generator().manual_seed(1)
    phases: list[tuple[float, float, float]] = []
    losses = []
    profiler = None
    for step in range(args.steps + 2 + (2 if args.lanes else 0)):
        if args.lanes and step == args.steps + 3:
            profiler = torch.profiler.profile()
            profiler.start()
        tokens = torch.randint(0, 32000, (args.batch, args.seq), generator=generator).to(device)
        if step == 2 and cuda:
            torch.cuda.reset_peak_memory_stats()
        at = [sync()]
        loss = model(input_ids=tokens, labels=tokens).loss
        at.append(time.perf_counter() if args.engine == "lohan_fx" else sync())
        loss.backward()
        at.append(time.perf_counter() if args.engine == "lohan_fx" else sync())
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        del loss
        at.append(sync())
        phases.append((at[1] - at[0], at[2] - at[1], at[3] - at[2]))
        print(f"step {step}: loss {losses[-1]:.4f}, {at[3] - at[0]:.3f} s", flush=True)
    if profiler is not None:
        profiler.stop()
        result["lanes"] = lanes(profiler)
    phases = phases[: args.steps + 2]
    timed = [sum(p) for p in phases[2:]]
    if args.engine == "lohan_fx":
        # The last update may still be under way: what a step costs includes it.
        drained = time.perf_counter()
        model._lohan.runtime.drain()
        result["drain_s"] = round(time.perf_counter() - drained, 4)
    step_s = statistics.median(timed)
    tokens_per_s = args.batch * args.seq / step_s
    result |= {
        "first_step_s": round(sum(phases[0]), 2),
        "step_s": round(step_s, 4),
        "steps_s": [round(t, 4) for t in timed],
        "phases_s": [round(statistics.median(p[i] for p in phases[2:]), 4) for i in range(3)],
        "tokens_per_s": round(tokens_per_s, 1),
        "model_tflops": round(6 * num_params * tokens_per_s / 1e12, 1),
        "losses": [round(x, 4) for x in losses],
    }
    if cuda:
        result["gpu_peak_gb"] = round(torch.cuda.max_memory_allocated() / 1e9, 3)
        result["gpu_reserved_gb"] = round(torch.cuda.max_memory_reserved() / 1e9, 3)
    if args.engine == "lohan_fx":
        held = model._lohan.stats().peak_bytes
        result["peak_gb"] = {tier: round(held[tier] / 1e9, 3) for tier in ("gpu", "dram", "ssd")}
        if cuda:
            result["peak_gb"]["gpu"] = result["gpu_peak_gb"]
        result["stall_s"] = {k: round(v, 3) for k, v in model._lohan.stats().stall_s.items()}
        predicted = model.plan.predicted
        result["predicted"] = {
            "step_s": round(predicted.step_s, 4),
            "bound_s": round(predicted.bound_s, 4),
            "bottleneck": predicted.bottleneck,
            "peak_gb": {k: round(v / 1e9, 3) for k, v in predicted.peak_bytes.items()},
            "lane_busy_s": {k: round(v, 4) for k, v in predicted.lane_busy_s.items()},
        }
        result["bound_ratio"] = round(step_s / predicted.bound_s, 3)
        if args.report:
            print(model.report())
        if args.dump:
            with open(args.dump, "w", encoding="utf-8") as file:
                file.write(model.plan.to_json())
        model.close()
    print(json.dumps(result))


if __name__ == "__main__":
    main()
