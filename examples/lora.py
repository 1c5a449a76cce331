"""LoRA with Hugging Face's peft under a memory budget, in a plain loop.

    python examples/lora.py                    # on a GPU if there is one, else on the CPU

The base model is frozen: it is only read, in 16 bit, from whichever tier the plan puts it in, and has no
optimizer state. The adapters train; they are saved with peft's own save_pretrained. A real run would
load a pretrained model where this builds a small one; nothing else changes.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

import lohan_fx

TEXT = (
    "A model that is larger than the memory of its GPU is trained layer by layer, as bytes arrive. "
)


def base() -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            hidden_size=128,
            intermediate_size=344,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=4,
            vocab_size=256,
            max_position_embeddings=256,
        )
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--budget", default="gpu=6MB, dram=4MB")
    parser.add_argument("--lowering", default="inductor")
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    budget = args.budget
    if device.type == "cuda":
        budget = "gpu=1GB, dram=1GB"  # a GPU's own workspaces are larger than this model

    config = LoraConfig(
        r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"
    )
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "disk").mkdir()
        model = lohan_fx.compile(
            get_peft_model(base(), config),
            f"{budget}, ssd={folder}/disk:1GB",
            dtype=torch.bfloat16,
            device=device,
            lowering=args.lowering,
        )
        model.print_trainable_parameters()
        optimizer = lohan_fx.AdamW(model.parameters(), lr=1e-2, max_grad_norm=1.0)
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=args.steps)
        tokens = torch.tensor([list((TEXT * 2)[:128].encode())] * 4, device=device)
        for step in range(args.steps):
            loss = model(input_ids=tokens, labels=tokens).loss
            loss.backward()
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
            if step in (0, args.steps - 1) or step % 10 == 9:
                print(
                    f"step {step + 1:3d}  loss {loss.item():.4f}  norm {optimizer.last_grad_norm:.3f}"
                )
        print(model.report())
        model.save_pretrained(Path(folder) / "adapter")
        with torch.no_grad():
            ours = model.eval()(input_ids=tokens, labels=tokens).loss.item()
        model.close()
        loaded = PeftModel.from_pretrained(base(), Path(folder) / "adapter").to(device)
        with torch.no_grad():
            plain = loaded.eval()(input_ids=tokens, labels=tokens).loss.item()
        print(f"evaluated here {ours:.4f}; the saved adapter in plain PyTorch, fp32, {plain:.4f}")


if __name__ == "__main__":
    main()
