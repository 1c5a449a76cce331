"""Hugging Face's Trainer under a memory budget: clipping, accumulation, schedule, checkpoints, resuming.

    python examples/trainer.py                 # on a GPU if there is one, else on the CPU

The Trainer's own arguments say everything; only `budget=` is new. The run stops half way and a second
Trainer resumes it from its checkpoint; then the model writes some text.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import torch
from torch.utils.data import Dataset
from transformers import LlamaConfig, LlamaForCausalLM, TrainingArguments

from lohan_fx.integrations.transformers import LohanTrainer

TEXT = (
    "Each tensor has a place, and each place has a reason; what does not fit waits for its turn. "
)


class Bytes(Dataset[dict[str, torch.Tensor]]):
    """Pieces of a text, one token a byte."""

    def __init__(self, text: str, length: int = 64) -> None:
        data = torch.tensor(list(text.encode()))
        self.pieces = [data[i : i + length] for i in range(0, len(data) - length, 8)]

    def __len__(self) -> int:
        return len(self.pieces)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self.pieces[index], "labels": self.pieces[index]}


def build() -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            hidden_size=96,
            intermediate_size=256,
            num_hidden_layers=3,
            num_attention_heads=4,
            num_key_value_heads=4,
            vocab_size=256,
            max_position_embeddings=256,
            eos_token_id=None,
        )
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--accumulate", type=int, default=2)
    parser.add_argument("--lowering", default="inductor")
    args = parser.parse_args()
    # A GPU's own workspaces are larger than this model.
    budget = "gpu=1GB, dram=1GB" if torch.cuda.is_available() else "gpu=6MB, dram=8MB"
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "disk").mkdir()

        def trainer(max_steps: int) -> LohanTrainer:
            return LohanTrainer(
                model=build(),
                args=TrainingArguments(
                    output_dir=f"{folder}/run",
                    max_steps=max_steps,
                    per_device_train_batch_size=4,
                    gradient_accumulation_steps=args.accumulate,
                    learning_rate=3e-3,
                    lr_scheduler_type="constant_with_warmup",
                    warmup_steps=4,
                    max_grad_norm=1.0,
                    weight_decay=0.01,
                    bf16=True,
                    logging_steps=max(1, args.steps // 8),
                    save_steps=args.steps // 2,
                    report_to=[],
                    use_cpu=not torch.cuda.is_available(),
                ),
                train_dataset=Bytes(TEXT * 12),
                budget=f"{budget}, ssd={folder}/disk:1GB",
                compile_options={"lowering": args.lowering},
            )

        first = trainer(args.steps // 2)
        first.train()
        first.model.close()
        second = trainer(args.steps)
        second.train(resume_from_checkpoint=True)
        print(second.model.report())
        prompt = torch.tensor([list(TEXT[:24].encode())], device=second.args.device)
        written = second.model.eval().generate(prompt, max_new_tokens=40, do_sample=False)
        print(repr(bytes(written[0].tolist()).decode(errors="replace")))
        second.model.close()


if __name__ == "__main__":
    main()
