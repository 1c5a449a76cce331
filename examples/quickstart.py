"""Train a real causal language model under a budget that forces all three tiers, and check it.

    python examples/quickstart.py                 # on a GPU if there is one, else on the CPU
    python examples/quickstart.py --exact         # fp32 over plain ATen kernels: no rounding apart
    python examples/quickstart.py --policy greedy --budget "gpu=40MB, dram=30MB"

The model is a Llama built from a Hugging Face config; the text is the source code of Python's
standard library, one token a byte. The same model is then trained by plain PyTorch (fp32 master
weights, torch.optim.AdamW) and the losses are printed side by side.

The default budget holds less in GPU and DRAM together than the training would take on the GPU alone,
so some of it must be on the SSD. A planner left alone then keeps what is used most off the disk; to
show every path, the default policy here spreads weights, optimizer state and activations each over all
three tiers.
"""

from __future__ import annotations

import argparse
import sysconfig
import tempfile
import time
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import lohan_fx
from lohan_fx.planner import BucketPlace, Forced, Place, Problem, Solution, solve


def spread(problem: Problem, forced: Forced) -> Solution:
    """A third of the buckets and of the swappable activations in each tier."""
    tiers = (Place.GPU, Place.DRAM, Place.SSD)
    trainable = [b.index for b in problem.buckets if b.trainable]
    swappable = [a.index for a in problem.activations if a.can_swap]
    wanted = Forced(
        buckets={
            index: BucketPlace(tiers[n % 3], tiers[n % 3]) for n, index in enumerate(trainable)
        },
        activations={index: tiers[n % 3] for n, index in enumerate(swappable)},
    )
    return solve(problem, forced=wanted)


def build(device: torch.device) -> LlamaForCausalLM:
    """A small Llama; larger on a GPU, so that there is something to see."""
    width, layers = (1024, 8) if device.type == "cuda" else (192, 4)
    config = LlamaConfig(
        hidden_size=width,
        intermediate_size=width * 8 // 3,
        num_hidden_layers=layers,
        num_attention_heads=width // 64,
        num_key_value_heads=width // 64,
        vocab_size=256,
        max_position_embeddings=1024,
        use_cache=False,
    )
    torch.manual_seed(0)
    return LlamaForCausalLM(config)


def batches(steps: int, batch: int, seq: int) -> list[torch.Tensor]:
    """Byte-level tokens (steps, batch, seq) of the standard library's sources."""
    sources = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    need = steps * batch * seq
    text = bytearray()
    for source in sources:
        text += source.read_bytes()
        if len(text) >= need:
            break
    tokens = torch.frombuffer(text[:need], dtype=torch.uint8).long()
    return list(tokens.reshape(steps, batch, seq))


def train_plain(
    data: list[torch.Tensor], device: torch.device, lr: float, dtype: torch.dtype
) -> list[float]:
    """The reference: weights cast from fp32 masters, which torch.optim.AdamW updates."""
    model = build(device).to(device)
    masters = [p.detach().clone() for p in model.parameters()]
    for param in model.parameters():
        param.data = param.data.to(dtype, copy=True)
    optimizer = torch.optim.AdamW(masters, lr=lr, weight_decay=0.01)
    losses = []
    for tokens in data:
        tokens = tokens.to(device)
        loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        with torch.no_grad():
            for master, param in zip(masters, model.parameters(), strict=True):
                master.grad, param.grad = param.grad.float(), None
            optimizer.step()
            for master, param in zip(masters, model.parameters(), strict=True):
                param.copy_(master)
        losses.append(loss.item())
    return losses


def train_lohan(
    data: list[torch.Tensor],
    device: torch.device,
    lr: float,
    dtype: torch.dtype,
    budget: str,
    policy: str,
    lowering: str,
) -> tuple[list[float], str]:
    """The same training within the budget."""
    model = lohan_fx.compile(
        build(device),
        budget,
        dtype=dtype,
        device=device,
        lowering=lowering,
        policy=spread if policy == "spread" else policy,
    )
    optimizer = lohan_fx.AdamW(model.parameters(), lr=lr, weight_decay=0.01)
    losses = []
    for step, tokens in enumerate(data):
        tokens = tokens.to(device)
        start = time.perf_counter()
        loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        if step in (0, 1, len(data) - 1):
            note = " (with tracing, planning and compiling)" if step == 0 else ""
            print(
                f"step {step:3d}  loss {losses[-1]:.4f}  {time.perf_counter() - start:.2f} s{note}"
            )
    report = model.report()
    model.close()
    return losses, report


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--seq", type=int, default=128)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--exact", action="store_true", help="fp32, ATen kernels, twice the budget")
    parser.add_argument("--policy", default="spread", help="spread (see above) or greedy")
    parser.add_argument("--budget", help="default: one that forces all three tiers")
    args = parser.parse_args()

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    data = batches(args.steps, args.batch, args.seq)
    dtype = torch.float32 if args.exact else torch.bfloat16
    lowering = "aten" if args.exact else "inductor"
    gpu, dram = (1000, 700) if device.type == "cuda" else (30, 26)
    if args.exact:
        gpu, dram = 2 * gpu, 2 * dram
    with tempfile.TemporaryDirectory() as folder:
        budget = args.budget or f"gpu={gpu}MB, dram={dram}MB, ssd={folder}:4GB"
        print(f"device {device}, budget {budget}")
        print("the first step compiles: about a minute on two cores, some seconds the next time")
        losses, report = train_lohan(data, device, args.lr, dtype, budget, args.policy, lowering)
        print(report)
    print("\nThe same training in plain PyTorch, for comparison:")
    plain = train_plain(data, device, args.lr, dtype)
    print(" step   lohan_fx   plain PyTorch")
    for step in range(0, args.steps, max(1, args.steps // 10)):
        print(f"{step:5d}   {losses[step]:8.4f}   {plain[step]:8.4f}")
    worst = max(abs(a - b) for a, b in zip(losses, plain, strict=True))
    print(f"largest difference {worst:.2e}; first loss {losses[0]:.4f}, last {losses[-1]:.4f}")


if __name__ == "__main__":
    main()
